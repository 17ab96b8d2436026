"""Models of dialogue under a Trainer: what a fit, a test and a prediction leave."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import Trainer

from datamodules.dialogue import DialogueData
from zoo.common.checkpoints import AtomicCheckpointIO
from zoo.eacm.eacm import EACM, EmoEmb, Seq2Seq
from zoo.eacm.tagger import EmotionTagger
from zoo.eacm.types import EOS_ID

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.eacm.dialogue_module import DialogueModule

NAMES = ["neutral", "happy", "sad", "angry"]
PAIRS = 200
SMALL: dict[str, Any] = {
    "hidden_size": 8, "num_layers": 1, "embedding_size": 6, "emotion_size": 5, "emotion_head": "softmax",
    "optimizer": "adam", "lr": 0.01, "max_length": 6,
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def data(**options: Any) -> DialogueData:
    return DialogueData(**{"source": "embedded", "sample_pairs": PAIRS, "seed": 0, **options})


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip


def talkative(module: Any) -> Any:
    """The same model, whose replies never end before the longest one."""
    with torch.no_grad():
        module.decoder.vocabulary.bias[EOS_ID] = -20
    return module


def sizes(source: DialogueData) -> dict[str, Any]:
    return {name: getattr(source, name) for name in ("post_vocab_size", "reply_vocab_size", "num_emotions")}


def model(kind: type[DialogueModule] = EACM, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**{**sizes(data()), **SMALL, **options})


def measured(module: Any, folder: Path, source: DialogueData | None = None) -> dict[str, float]:
    """What a test logs, of a model that is as it was made."""
    (values,) = trainer(folder).test(module, source or data(), verbose=False)
    return {name.removeprefix("test/"): value for name, value in values.items()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tagger after an epoch."""
    folder = tmp_path_factory.mktemp("judge")
    source = data(sample_pairs=600, batch_size=16)
    torch.manual_seed(0)
    own = trainer(folder)
    own.fit(EmotionTagger(**sizes(source), hidden_size=16, embedding_size=16, lr=0.02), source)
    own.save_checkpoint(folder / "judge.ckpt")
    return str(folder / "judge.ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An EACM after an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    own = trainer(folder)
    own.fit(model(), data())
    own.save_checkpoint(folder / "best.ckpt")
    return str(folder / "best.ckpt")


def test_a_test_with_a_judge_measures_replies_and_forced_ones(judge: str, tmp_path: Path) -> None:
    values = measured(model(judge=judge, table_rows=7), tmp_path)
    forced = [f"forced/{name}" for name in NAMES]
    expected = [
        "perplexity", "bleu4", "distinct2", "emotion_a", "emotion_macro_f1", "judge/acc", "judge/macro_f1", "copy/acc",
        "copy/macro_f1", "selector/acc", "post_selector/acc", "forced_gold/emotion_a", "forced/followed",
        "forced/diverse", "forced/different", *forced,
    ]  # fmt: skip
    assert set(expected) <= set(values)
    assert values["judge/acc"] > 0.6
    assert values["forced/followed"] == pytest.approx(sum(values[name] for name in forced) / len(NAMES))
    rows = lines(tmp_path / "tables/test/replies.jsonl")
    assert len(rows) == 7
    columns = ["post", "true reply", "true emotion", "chosen emotion", "judged emotion", "reply"]
    assert list(rows[0]) == [*columns, *(f"reply, {name}" for name in NAMES)]
    assert all(row["true emotion"] in NAMES and row["judged emotion"] in NAMES for row in rows)
    drawn = sorted(path.name for path in (tmp_path / "figures/test").iterdir())
    assert drawn == ["attention.png", "gate.png", "transitions.png"]


def test_what_the_data_alone_say_is_what_counting_says(judge: str, tmp_path: Path) -> None:
    source = data()
    values = measured(model(judge=judge), tmp_path, source)
    part = source.whole("test")
    post, reply = part.post_emotion.argmax(1), part.reply_emotion.argmax(1)
    assert values["copy/acc"] == pytest.approx(float((post == reply).float().mean()))
    tags = EmotionTagger.load_from_checkpoint(judge, weights_only=True).tag(part.reply_text).primary
    assert values["judge/acc"] == pytest.approx(float((tags == reply).float().mean()))


def test_replies_with_the_true_emotion_are_those_forced_to_it(judge: str, tmp_path: Path) -> None:
    # A model steered by the true emotion needs no force to say what the forced one says.
    values = measured(model(EmoEmb, judge=judge), tmp_path)
    assert values["forced_gold/emotion_a"] == values["emotion_a"]
    assert "selector/acc" not in values


def test_forced_replies_are_judged_by_the_emotion_that_was_asked_for(judge: str, tmp_path: Path) -> None:
    module = talkative(model(judge=judge, table_rows=PAIRS))
    values = measured(module, tmp_path)
    tagger = EmotionTagger.load_from_checkpoint(judge, weights_only=True)
    rows = lines(tmp_path / "tables/test/replies.jsonl")
    for label, name in enumerate(NAMES):
        tags = tagger.tag([row[f"reply, {name}"] for row in rows]).primary
        assert values[f"forced/{name}"] == pytest.approx(float((tags == label).float().mean()))
    kinds = [len({row[f"reply, {name}"] for name in NAMES}) for row in rows]
    assert values["forced/diverse"] == pytest.approx(sum(kind > 1 for kind in kinds) / len(rows))
    assert values["forced/different"] == pytest.approx(sum(kind - 1 for kind in kinds) / (3 * len(rows)))


def test_without_a_judge_nothing_is_forced_unless_it_is_asked_for(judge: str, tmp_path: Path) -> None:
    plain = measured(model(), tmp_path / "plain")
    assert not [name for name in plain if "forced" in name or "judge" in name or name == "emotion_a"]
    assert "reply, happy" not in lines(tmp_path / "plain/tables/test/replies.jsonl")[0]
    forced = measured(talkative(model(test_forced=True)), tmp_path / "forced")
    assert {"forced/diverse", "forced/different"} <= set(forced)
    assert "forced/followed" not in forced
    assert lines(tmp_path / "forced/tables/test/replies.jsonl")[0]["reply, happy"]
    judged = measured(model(judge=judge, test_forced=False), tmp_path / "judged")
    assert "emotion_a" in judged
    assert not [name for name in judged if name.startswith("forced")]


def test_a_model_without_emotion_is_judged_as_well(judge: str, tmp_path: Path) -> None:
    values = measured(model(Seq2Seq, judge=judge), tmp_path)
    assert {"emotion_a", "emotion_macro_f1", "judge/acc", "copy/acc"} <= set(values)
    assert not [name for name in values if name.startswith("forced") or "selector" in name]
    row = lines(tmp_path / "tables/test/replies.jsonl")[0]
    assert row["chosen emotion"] == ""
    assert row["judged emotion"] in NAMES
    drawn = sorted(path.name for path in (tmp_path / "figures/test").iterdir())
    assert drawn == ["attention.png", "transitions.png"]


def test_a_judge_of_other_emotions_is_refused(judge: str, tmp_path: Path) -> None:
    path = tmp_path / "other.tsv"
    path.write_text("".join(f"hello {n}\thi {n}\tcalm\t{'loud' if n % 2 else 'calm'}\n" for n in range(60)))
    source = data(source=None, path=str(path))
    module = EACM(**sizes(source), **SMALL, judge=judge)
    message = r"judge: .* knows the emotions neutral, happy, sad, angry, the model calm, loud: train it on the same"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).test(module, source, verbose=False)


def test_a_judge_that_is_no_tagger_is_refused(trained: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"judge: .*best\.ckpt is no checkpoint of an EmotionTagger"):
        trainer(tmp_path).test(model(judge=trained), data(), verbose=False)
    with pytest.raises(ValueError, match=r"nowhere\.ckpt: no such checkpoint file"):
        trainer(tmp_path).test(model(judge=str(tmp_path / "nowhere.ckpt")), data(), verbose=False)


def test_words_of_a_lexicon_are_found_in_replies(tmp_path: Path) -> None:
    source = data()
    words = {word for text in source.whole("train").reply_text for word in text.split()}
    path = tmp_path / "words.tsv"
    # Every word is one of happiness: each reply of a happy target holds one, and no other target counts.
    path.write_text("".join(f"{word}\thappy\n" for word in sorted(words)))
    assert measured(talkative(model(lexicon=str(path))), tmp_path / "own")["emotion_w"] == 1
    assert 0 <= measured(model(lexicon="default"), tmp_path / "default")["emotion_w"] <= 1
    assert "emotion_w" not in measured(model(), tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"gone\.tsv does not exist"):
        measured(model(lexicon=str(tmp_path / "gone.tsv")), tmp_path)


def test_word_vectors_of_the_model_or_of_a_file_compare_replies(tmp_path: Path) -> None:
    own = measured(model(word_vectors="model"), tmp_path / "own")
    kinds = ("average", "greedy", "extrema")
    assert all(-1 <= own[f"model_embedding_{kind}"] <= 1 for kind in kinds)
    words = data().reply_tokenizer.get_vocab()
    path = tmp_path / "vectors.txt"
    # All words have one vector: all replies are alike.
    path.write_text("".join(f"{word} 1 2 3\n" for word in words))
    given = measured(talkative(model(word_vectors=str(path))), tmp_path / "given")
    assert [given[f"embedding_{kind}"] for kind in kinds] == pytest.approx([1, 1, 1])
    assert not [name for name in measured(model(), tmp_path / "none") if "embedding" in name]


def test_perplexity_is_the_exponential_of_the_likelihood_of_all_words(tmp_path: Path) -> None:
    source, module = data(eval_batch_size=7), model()
    (values,) = trainer(tmp_path).validate(module, source, verbose=False)
    part = source.whole("val")
    with torch.no_grad():
        logits = module.eval()(part)["logits"].double()
    logs = logits.log_softmax(-1).gather(2, part.reply_out[..., None]).squeeze(2)
    total = -float(logs[part.reply_mask].sum())
    assert values["val/perplexity"] == pytest.approx(math.exp(total / int(part.reply_mask.sum())), rel=1e-5)
    selected = module.choose(part.post_ids, part.post_mask)[0].reply_logits.argmax(1)
    right = (selected == part.reply_emotion.argmax(1)).float().mean()
    assert values["val/selector/acc"] == pytest.approx(float(right))


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_chosen_emotions_are_counted_by_the_probabilities_of_the_head(head: str, tmp_path: Path) -> None:
    source, module = data(), model(emotion_head=head)
    assert module.selector is not None
    # Logits of a sigmoid that are all above 0, of which a softmax makes one choice.
    torch.nn.init.constant_(module.selector.reply_head.bias, 5.0)
    module.selector.reply_head.bias.data[1] = 9.0
    torch.nn.init.zeros_(module.selector.reply_head.weight)
    (values,) = trainer(tmp_path).validate(module, source, verbose=False)
    share = float((source.whole("val").reply_emotion.argmax(1) == 1).float().mean())
    expected = share if head == "softmax" else 2 * 1 / (1 + 4)
    assert values["val/selector/multilabel_f1"] == pytest.approx(expected)


def test_a_fit_logs_the_terms_of_its_loss_and_lowers_perplexity(tmp_path: Path) -> None:
    module, own = model(lr=0.03), trainer(tmp_path)
    (before,) = own.validate(module, data(), verbose=False)
    own.fit(module, data(batch_size=16))
    found = own.callback_metrics
    assert {"train/loss", "train/reply", "train/post_emotion", "train/reply_emotion"} <= set(found)
    assert found["train/loss"] == pytest.approx(
        float(found["train/reply"] + found["train/post_emotion"] + found["train/reply_emotion"]), rel=1e-5
    )
    assert found["val/perplexity"] < 0.8 * before["val/perplexity"]


def test_posts_of_a_file_are_answered_in_lines(trained: str, tmp_path: Path) -> None:
    path = tmp_path / "posts.txt"
    posts = ["the train left me fuming again", "i feel glad about the exam today", "what a lonely day with the dog"]
    path.write_text("\n".join(posts) + "\n")
    module = EACM.load_from_checkpoint(trained, weights_only=True)
    parts: Any = trainer(tmp_path).predict(module, data(predict_path=str(path)))
    found = {line["post"]: line for line in lines(tmp_path / "predictions.jsonl")}
    assert sorted(found) == sorted(posts)
    for post in posts:
        line = found[post]
        assert list(line) == ["post", "reply", "emotion", "distribution"]
        assert list(line["distribution"]) == NAMES
        assert sum(line["distribution"].values()) == pytest.approx(1, abs=1e-3)
        assert line["emotion"] == max(NAMES, key=line["distribution"].__getitem__)
    assert sorted(row[0] for part in parts for row in part["replies"]) == sorted(f["reply"] for f in found.values())


def test_several_replies_of_a_post_are_listed_best_first(trained: str, tmp_path: Path) -> None:
    path = tmp_path / "posts.txt"
    path.write_text("the train left me fuming again\n")
    module = EACM.load_from_checkpoint(trained, weights_only=True, decoding="beam", beam_size=4, num_return=3)
    parts: Any = trainer(tmp_path).predict(module, data(predict_path=str(path)))
    (line,) = lines(tmp_path / "predictions.jsonl")
    assert len(line["replies"]) == 3
    assert line["replies"][0] == line["reply"]
    assert parts[0]["scores"][0].diff().le(0).all()


def test_a_model_without_emotion_predicts_replies_alone(tmp_path: Path) -> None:
    trainer(tmp_path).predict(model(Seq2Seq), data())
    assert list(lines(tmp_path / "predictions.jsonl")[0]) == ["post", "reply"]


@pytest.mark.parametrize("kind", [EACM, Seq2Seq, EmoEmb])
def test_a_checkpoint_is_tested_with_other_ways_to_decode(kind: type[DialogueModule], tmp_path: Path) -> None:
    module, own = model(kind), trainer(tmp_path)
    own.fit(module, data())
    path = tmp_path / "best.ckpt"
    talkative(module)
    own.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert saved["dialogue_model"] == kind.__name__
    assert not {"decoding", "judge", "lexicon"} & set(saved["hyper_parameters"])
    given: dict[str, Any] = {"decoding": "beam", "beam_size": 2, "max_length": 3, "table_rows": PAIRS}
    other = kind.load_from_checkpoint(path, weights_only=True, **given)
    one, two = measured(module, tmp_path / "one"), measured(other, tmp_path / "two")
    assert one["perplexity"] == two["perplexity"]
    assert (one["mean_length"], two["mean_length"]) == (6, 3)
    part = data().whole("test")
    said = other.answer(part, decoding="beam", beam_size=2, max_length=3).words
    shown = {row["post"]: row["reply"] for row in lines(tmp_path / "two/tables/test/replies.jsonl")}
    assert shown == {post: " ".join(row[0]) for post, row in zip(part.post_text, said, strict=True)}


def test_a_model_is_not_tested_on_other_words(trained: str, tmp_path: Path) -> None:
    module = EACM.load_from_checkpoint(trained, weights_only=True)
    with pytest.raises(ValueError, match="was trained with other words or emotions than this datamodule has"):
        trainer(tmp_path).test(module, data(vocab_size=50), verbose=False)
