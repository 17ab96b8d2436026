"""Metrics of replies, emotions and selectors: by hand, against libraries, over batches and processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torchmetrics.text import BLEUScore

from tests.ranks import run_ranks
from zoo.eacm.lexicon import EmotionLexicon
from zoo.eacm.reply_metrics import CorpusPerplexity, DialogueMetrics, EmotionMetrics, SelectorMetrics

if TYPE_CHECKING:
    from pathlib import Path

    from torchmetrics import Metric

REPLIES = ["the cat sat on the mat", "the the the", "i am here"]
REFERENCES = ["the cat sat on a mat today", "the cat is here", "i am so glad"]
WORDS = ["the", "cat", "sat", "mat", "i", "am"]
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-2.0, 0.5], [0.5, -1.0], [0.0, 0.0]])
KNOWN = torch.tensor([True, True, True, True, True, False])


def split(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


def plain(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def test_the_perplexity_of_uneven_batches_is_that_of_one_and_by_hand() -> None:
    whole, parts = CorpusPerplexity(), CorpusPerplexity()
    nll = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    tokens = torch.tensor([1, 2, 3])
    whole.update(nll.sum(), tokens.sum())
    parts.update(nll[:1].sum(), 1)
    parts.update(nll[1:].sum(), tokens[1:].sum())
    assert float(whole.compute()) == float(parts.compute()) == pytest.approx(math.exp(9 / 6))
    # Not the mean of the batches' own.
    assert float(whole.compute()) != pytest.approx((math.e + math.exp(8 / 5)) / 2, rel=1e-3)


def test_a_perplexity_of_nothing_or_of_nan_is_the_worst() -> None:
    metric = CorpusPerplexity()
    metric.update(torch.tensor(0.0), 0)
    assert metric.compute().isposinf()
    metric.update(torch.tensor(torch.nan), 3)
    assert metric.compute().isposinf()


def test_bleu_and_distinct_by_hand_on_three_sentences() -> None:
    metric = DialogueMetrics()
    metric.update(split(REPLIES), split(REFERENCES))
    values = plain(metric.compute())
    # Words that match: the, cat, sat, on, mat (the second "the" is clipped); the; i, am. 8 of 12; 15 in the references.
    brevity = math.exp(1 - 15 / 12)
    assert values["bleu1"] == pytest.approx(brevity * 8 / 12)
    # Pairs: the cat, cat sat, sat on; none; i am. 4 of 5 + 2 + 2.
    assert values["bleu2"] == pytest.approx(brevity * math.sqrt(8 / 12 * 4 / 9))
    # Different: the cat sat on mat i am here; the-cat cat-sat sat-on on-the the-mat the-the i-am am-here.
    assert values["distinct1"] == pytest.approx(8 / 12)
    assert values["distinct2"] == pytest.approx(8 / 9)
    assert values["mean_length"] == 4.0
    assert "embedding_average" not in values


@pytest.mark.parametrize("length", [1, 4, 9], ids=["short", "medium", "long"])
def test_bleu_is_that_of_torchmetrics(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    for _ in range(5):
        replies, references = (
            [
                [f"w{word}" for word in torch.randint(4, (int(size),), generator=draw).tolist()]
                for size in torch.randint(length + 6, (12,), generator=draw)
            ]
            for _ in range(2)
        )
        metric = DialogueMetrics()
        metric.update(replies, references)
        values = plain(metric.compute())
        texts = [" ".join(reply) for reply in replies]
        targets = [[" ".join(reference)] for reference in references]
        for order in (1, 2, 3, 4):
            assert values[f"bleu{order}"] == pytest.approx(float(BLEUScore(order)(texts, targets)), rel=1e-5, abs=1e-9)


def test_without_ngrams_values_are_zero_and_never_nan() -> None:
    metric = DialogueMetrics(WORDS, VECTORS, KNOWN)
    metric.update([], [])
    assert all(value == 0 for value in plain(metric.compute()).values())
    metric.update([["yes"], []], [["no"], ["so", "it", "is"]])
    values = plain(metric.compute())
    assert values.pop("distinct1") == 1 and values.pop("mean_length") == 0.5
    assert all(value == 0 for value in values.values())


def test_embedding_metrics_by_hand_on_three_sentences() -> None:
    metric = DialogueMetrics(WORDS, VECTORS, KNOWN)
    # "on" has no row and "am" no vector; the third pair has no known word on one side.
    metric.update(split(["the cat on", "i am", "the"]), split(["sat", "the mat", "am on"]))
    values = plain(metric.compute())
    # the + cat = (0.5, 0.5) beside sat = (1, 1); i = (0.5, -1) beside (the + mat) / 2 = (-0.5, 0.25).
    assert values["embedding_average"] == pytest.approx((1 + (-0.5) / math.sqrt(1.25 * 0.3125)) / 3)
    first = 1 / math.sqrt(2)
    i_the, i_mat = 0.5 / math.sqrt(1.25), (-1 - 0.5) / math.sqrt(1.25 * 4.25)
    second = (max(i_the, i_mat) + (i_the + i_mat) / 2) / 2
    assert values["embedding_greedy"] == pytest.approx((first + second) / 3)
    # Extrema: (1, 1) beside (1, 1); (0.5, -1) beside (-2, 0.5).
    assert values["embedding_extrema"] == pytest.approx((1 + (-1 - 0.5) / math.sqrt(1.25 * 4.25)) / 3)


def test_word_vectors_that_do_not_fit_are_errors_and_names_say_whose_they_are() -> None:
    with pytest.raises(ValueError, match="both, or neither"):
        DialogueMetrics(words=WORDS)
    with pytest.raises(ValueError, match=r"got \(6, 2\) for 5 words"):
        DialogueMetrics(WORDS[:5], VECTORS)
    with pytest.raises(ValueError, match="known must be bool"):
        DialogueMetrics(WORDS, VECTORS, torch.ones(6))
    with pytest.raises(ValueError, match="got 1 and 2"):
        DialogueMetrics().update([[]], [[], []])
    metric = DialogueMetrics(WORDS, VECTORS, embedding_name="model_embedding")
    metric.update([["the"]], [["the"]])
    assert plain(metric.compute())["model_embedding_greedy"] == pytest.approx(1)
    assert metric.state_dict() == {}


def emotion_update(metric: EmotionMetrics, rows: slice) -> None:
    judged, target = torch.tensor([1, 1, 0, 2, 2, 1]), torch.tensor([1, 0, 0, 2, 1, 1])
    replies = split(["glad", "oh", "no", "cry", "glad", "oh"])
    metric.update(judged[rows], target[rows], replies[rows])


def new_emotion_metrics() -> EmotionMetrics:
    names = ["none", "happy", "sad", "fear"]
    return EmotionMetrics(4, names, EmotionLexicon({"joy": ["glad"], "sad": ["cry"]}, names))


def test_emotion_metrics_by_hand() -> None:
    metric = new_emotion_metrics()
    emotion_update(metric, slice(None))
    values = plain(metric.compute())
    assert values["emotion_a"] == pytest.approx(4 / 6)
    # none: F1 2/3; happy: 2 of 3 judged, 2 of 3 targets; sad: 1 of 2 judged, 1 target; fear does not occur.
    assert values["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 2 / 3) / 3)
    accuracies = {"acc/none": 0.5, "acc/happy": 2 / 3, "acc/sad": 1.0}
    assert {name: value for name, value in values.items() if "/" in name} == pytest.approx(accuracies)
    # Targets with words: happy, sad, happy, happy; said: glad, cry, glad.
    assert values["emotion_w"] == 0.75


def test_a_class_that_is_never_judged_right_has_an_f1_of_zero_and_nothing_is_nan() -> None:
    metric = EmotionMetrics(3)
    empty = torch.zeros(0, dtype=torch.int64)
    metric.update(empty, empty)
    assert plain(metric.compute()) == {"emotion_a": 0.0, "macro_f1": 0.0}
    metric.update(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]))
    values = plain(metric.compute())
    assert values["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert values["acc/1"] == 0


def test_bad_labels_and_missing_replies_are_errors() -> None:
    with pytest.raises(ValueError, match="label_names has 2 classes, expected 3"):
        EmotionMetrics(3, ["a", "b"])
    with pytest.raises(ValueError, match="lexicon has 2 classes, expected 3"):
        EmotionMetrics(3, lexicon=EmotionLexicon.default(["neutral", "happy"]))
    with pytest.raises(ValueError, match="judged must be classes from 0 to 2"):
        EmotionMetrics(3).update(torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"got \(1,\) and \(2,\)"):
        EmotionMetrics(3).update(torch.tensor([3]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs the replies"):
        new_emotion_metrics().update(torch.tensor([1]), torch.tensor([1]))


def selector_rows() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    scores, labels = torch.randn(40, 5, generator=draw), torch.randint(4, (40,), generator=draw)
    return scores, torch.nn.functional.one_hot(labels, 5).float(), torch.rand(40, generator=draw) > 0.3


def test_selector_metrics_of_single_labels_are_those_of_scikit_learn_over_known_rows() -> None:
    scores, targets, known = selector_rows()
    metric = SelectorMetrics(5)
    metric.update(scores, targets, known)
    values = plain(metric.compute())
    truth, chosen = targets.argmax(1)[known], scores.argmax(1)[known]
    assert values["acc"] == pytest.approx(float((truth == chosen).float().mean()))
    assert values["macro_f1"] == pytest.approx(f1_score(truth, chosen, average="macro", zero_division=0))
    taken = (scores[known] > 0).int()
    assert values["multilabel_f1"] == pytest.approx(f1_score(targets[known].int(), taken, average="micro"))


def test_of_two_labels_either_is_right_unless_the_primary_one_is_given() -> None:
    scores = torch.tensor([[0.0, 1.0, 5.0], [9.0, 2.0, 1.0]])
    targets = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    either, primary = SelectorMetrics(3, "softmax"), SelectorMetrics(3, "softmax")
    either.update(scores, targets)
    primary.update(scores, targets, primary=torch.tensor([1, 1]))
    assert float(either.compute()["acc"]) == 0.5 and float(primary.compute()["acc"]) == 0
    # Softmax: class 2 of the first row and class 0 of the second are above one half.
    assert float(either.compute()["multilabel_f1"]) == pytest.approx(2 * 1 / (2 * 1 + 1 + 3))
    exact = SelectorMetrics(3, "probabilities", threshold=0.2)
    exact.update(torch.tensor([[0.1, 0.3, 0.9]]), targets[:1])
    assert float(exact.compute()["multilabel_f1"]) == 1


def test_a_constant_or_nan_output_is_never_right_and_nothing_is_nan() -> None:
    metric = SelectorMetrics(3)
    metric.update(torch.tensor([[1.0, 1.0, 1.0], [torch.nan, 0.0, 1.0]]), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    values = plain(metric.compute())
    assert values["acc"] == 0 and values["macro_f1"] == 0
    none = SelectorMetrics(3)
    assert not none.has_rows()
    none.update(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool))
    assert not none.has_rows() and plain(none.compute()) == {"acc": 0.0, "macro_f1": 0.0, "multilabel_f1": 0.0}


def test_bad_selector_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="head must be"):
        SelectorMetrics(3, "tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be \(batch, 3\)"):
        SelectorMetrics(3).update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="has no label"):
        SelectorMetrics(3).update(torch.zeros(2, 3), torch.zeros(2, 3))


def filled(rows: list[slice]) -> list[Metric]:
    perplexity, dialogue, emotions, selector = (
        CorpusPerplexity(), DialogueMetrics(WORDS, VECTORS, KNOWN), new_emotion_metrics(), SelectorMetrics(5),
    )  # fmt: skip
    nll = torch.tensor([1.0, 2.5, 6.0, 0.5, 2.0, 3.0])
    scores, targets, known = selector_rows()
    replies, references = split(REPLIES + REFERENCES), split(REFERENCES + REPLIES)
    # A module's metrics are moved, which must not change what an empty state is sent as.
    metrics: list[Metric] = [metric.to("cpu") for metric in (perplexity, dialogue, emotions, selector)]
    for metric in metrics:
        metric.reset()
    for part in rows:
        perplexity.update(nll[part].sum(), len(nll[part]))
        dialogue.update(replies[part], references[part])
        emotion_update(emotions, part)
        selector.update(scores[part], targets[part], known[part])
    return metrics


def values_of(metrics: list[Metric]) -> dict[str, float]:
    result: dict[str, float] = {}
    for number, metric in enumerate(metrics):
        value = metric.compute()
        result |= {f"{number}/{k}": float(v) for k, v in (value if isinstance(value, dict) else {"": value}).items()}
    return result


def test_uneven_batches_count_as_one_and_a_reset_forgets_all() -> None:
    whole, parts = filled([slice(0, 6)]), filled([slice(0, 4), slice(4, 5), slice(5, 6)])
    assert values_of(parts) == pytest.approx(values_of(whole), rel=1e-12)
    for metric in parts:
        metric.reset()
    again = filled([])
    dialogue = parts[1]
    assert isinstance(dialogue, DialogueMetrics)
    dialogue.update(split(REPLIES), split(REFERENCES))
    again[1].update(split(REPLIES), split(REFERENCES))
    assert plain(dialogue.compute()) == plain(again[1].compute())


def _rank(rank: int, uneven: list[list[slice]]) -> dict[str, float]:
    return values_of(filled(uneven[rank]))


@pytest.mark.parametrize(
    "uneven",
    [[[slice(0, 2)], [slice(2, 5), slice(5, 6)]], [[slice(0, 6)], []]],
    ids=["both", "one rank without a batch"],
)
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_two_processes_count_as_one(tmp_path: Path, uneven: list[list[slice]]) -> None:
    expected = values_of(filled([slice(0, 6)]))
    for values in run_ranks(tmp_path, _rank, uneven):
        assert values == pytest.approx(expected, rel=1e-12)
