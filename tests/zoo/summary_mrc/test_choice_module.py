"""What all modules of the room share: loss, metrics, optimizer, report of a test, predictions and submission."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule
from torch import Tensor, nn

from datamodules.cloze_rows import ClozeRows
from tests.zoo.summary_mrc.choices import fit, loader, rows, tokenizer, trainer, uneven, write
from zoo.common.schedules import WarmupLinear
from zoo.summary_mrc import read_submission
from zoo.summary_mrc.choice_module import ChoiceModule, decay_groups
from zoo.summary_mrc.module import SummaryMRC

if TYPE_CHECKING:
    from pathlib import Path

SCORES = torch.tensor([[2, 1, 0], [0, 0, 0], [1, 3, 3], [-1, 1, 0], [0, 1, 2], [5, 4, 3], [1, 2, 0]]).float()
LABELS = torch.tensor([0, 0, 1, 1, 2, 1, 0])
RIGHT = [True, False, True, True, True, False, False]


class Questions(NamedTuple):
    labels: Tensor
    accepted: Tensor
    rows: Tensor


class Table(ChoiceModule):
    """Scores that are given."""

    def __init__(self, scores: Tensor, **options: Any) -> None:
        super().__init__(**{"num_options": 3, "lr": 0.1, "weight_decay": 0.0, "warmup_ratio": 0.0, **options})
        self.scores = nn.Parameter(scores.clone())

    def forward(self, batch: Questions) -> Tensor:
        return self.scores[batch.rows]


class Given(LightningDataModule):
    """Batches for every stage, with their questions as text."""

    def __init__(self, parts: list[Questions], table: ClozeRows) -> None:
        super().__init__()
        self.parts, self.table = parts, table

    def questions(self, stage: str) -> ClozeRows:
        assert stage in ("test", "predict")
        return self.table

    def priors(self, stage: str) -> dict[str, float]:
        assert stage == "test"
        return {"chance": 1 / 3, "rarest": 0.4}

    def test_dataloader(self) -> Any:
        return loader(self.parts)

    def predict_dataloader(self) -> Any:
        return loader(self.parts)


def parts(*places: list[int], labelled: bool = True) -> list[Questions]:
    """Batches of questions; both of the highest options of question 2 are accepted."""
    accepted = nn.functional.one_hot(LABELS, 3).bool()
    accepted[2, 2] = True
    labels = LABELS if labelled else torch.full_like(LABELS, -100)
    return [Questions(labels[rows], accepted[rows] & labelled, torch.tensor(rows)) for rows in places]


def table() -> ClozeRows:
    questions = ["@placeholder a b", "a @placeholder b", "a b @placeholder", "@placeholder", "a b c '@placeholder' ."]
    questions = [*questions, "a @placeholder b c d e f g", "a a @placeholder b"]
    options = [[f"{row}-{option}" for option in range(3)] for row in range(7)]
    articles = ["word " * count for count in (3, 9, 9, 3, 20, 20, 20)]
    return ClozeRows(
        "seven", articles, questions, options, LABELS.numpy(), list("abcdefg"), [f"line {n}" for n in range(7)]
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_loss_is_the_mean_cross_entropy_over_the_options() -> None:
    logs = SCORES.double().log_softmax(1)
    gold = -logs[torch.arange(7), LABELS].mean()
    for smoothing in (0.0, 0.3):
        loss = Table(SCORES, label_smoothing=smoothing).loss(SCORES, LABELS)
        torch.testing.assert_close(loss.double(), (1 - smoothing) * gold - smoothing * logs.mean(), rtol=1e-6, atol=0)
        equal = Table(SCORES, label_smoothing=smoothing).loss(torch.zeros(7, 3), LABELS)
        assert float(equal) == pytest.approx(math.log(3))
    low = Table(SCORES).loss(SCORES.bfloat16().requires_grad_(), LABELS)
    assert low.dtype == torch.float32


def test_validation_counts_questions_and_not_batches() -> None:
    module, runner = Table(SCORES), trainer()
    (found,) = runner.validate(module, loader(parts([0, 1, 2], [3, 4, 5, 6])), verbose=False)
    loss = nn.functional.cross_entropy(SCORES, LABELS).item()
    expected = {"val/loss": loss, "val/acc": 4 / 7, "val/ties": 2 / 7, "val/macro_f1": (2 / 3 + 2 / 3 + 1) / 3}
    assert found == pytest.approx(expected)
    (again,) = runner.validate(module, loader(parts([0], [3, 4])), verbose=False)
    assert (again["val/acc"], again["val/ties"]) == (1, 0)


def test_training_logs_the_loss_of_a_batch_and_the_accuracy_of_an_epoch() -> None:
    batches = parts([0, 1, 2], [3, 4, 5, 6])
    runner = fit(Table(SCORES, lr=1e-9), batches)
    last = nn.functional.cross_entropy(SCORES[3:], LABELS[3:]).item()
    assert runner.callback_metrics["train/loss"].item() == pytest.approx(last)
    assert runner.callback_metrics["train/acc"].item() == pytest.approx(4 / 7)
    # The first step breaks the tie of question 1, in favour of its right option.
    runner = fit(Table(SCORES, lr=1e-9), batches, max_epochs=2)
    assert runner.callback_metrics["train/acc"].item() == pytest.approx(5 / 7)


def test_training_learns_the_right_options() -> None:
    module = Table(torch.zeros(7, 3))
    fit(module, parts([0, 1, 2], [3, 4, 5, 6]), max_epochs=30)
    assert torch.equal(module.scores.argmax(1), LABELS)


def test_a_constant_scorer_is_all_ties_never_right_and_chooses_the_first(tmp_path: Path) -> None:
    module, runner = Table(torch.full((7, 3), 0.5)), trainer(tmp_path)
    (found,) = runner.validate(module, loader(parts([0, 1, 2], [3, 4, 5, 6])), verbose=False)
    assert (found["val/acc"], found["val/ties"], found["val/loss"]) == pytest.approx((0, 1, math.log(3)))
    chosen = runner.predict(module, loader(parts(list(range(7)))))
    assert chosen is not None and chosen[0]["pred"].tolist() == [0] * 7


def test_questions_without_labels_are_refused_in_training_and_test_and_answered_in_prediction(tmp_path: Path) -> None:
    module, unlabelled = Table(SCORES), parts([0, 1, 2], labelled=False)
    message = "3 of 3 questions of a batch have no label: .*use `predict`"
    with pytest.raises(ValueError, match=message):
        fit(module, unlabelled)
    for stage in ("validate", "test"):
        with pytest.raises(ValueError, match=message):
            getattr(trainer(), stage)(module, loader(unlabelled), verbose=False)
    found = trainer(tmp_path).predict(module, loader(unlabelled))
    assert found is not None
    assert found[0]["id"] == ["0", "1", "2"] and found[0]["pred"].tolist() == [0, 0, 1]
    assert found[0]["pred"].dtype == torch.int64
    torch.testing.assert_close(found[0]["prob"], SCORES[:3].softmax(1))
    assert torch.equal(module.scores, SCORES)


def test_biases_and_norms_do_not_decay() -> None:
    options = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "num_layers": 1}
    module = SummaryMRC("tiny", encoder_options=options, vocab_size=20)
    frozen = module.encoder.get_input_embeddings().weight
    frozen.requires_grad_(False)
    decayed, kept = decay_groups(module, 0.3)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {parameter: name for name, parameter in module.named_parameters()}
    found = {names[parameter] for parameter in kept["params"]}
    assert found == {name for name in names.values() if name.endswith("bias") or "norm" in name.lower()}
    everything = [*decayed["params"], *kept["params"]]
    assert len(everything) == len(names) - 1 and all(parameter is not frozen for parameter in everything)
    (only,) = decay_groups(nn.LayerNorm(3), 0.3)
    assert len(only["params"]) == 2


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_rate_rises_and_falls_over_the_whole_training() -> None:
    rates = Rates()
    module = Table(SCORES, lr=0.5, weight_decay=0.2, warmup_ratio=0.4)
    runner = fit(module, parts(*([row] for row in range(5))), max_epochs=2, callbacks=[rates])
    assert rates.seen == pytest.approx([0.5 * WarmupLinear(0.4, 10)(step) for step in range(10)])
    assert max(rates.seen) == rates.seen[4] == 0.5 and rates.seen[-1] < 0.1
    assert isinstance(runner.optimizers[0], torch.optim.AdamW)
    assert runner.optimizers[0].param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_options": 1}, "num_options must be at least 2, got 1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
    ],
)
def test_values_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(SCORES, **options)


def test_a_test_reports_groups_and_answers_of_each_question_once(tmp_path: Path) -> None:
    # The last batch is what a sampler adds that evens out processes.
    data = Given(parts([6, 5, 4, 3], [2, 1, 0], [6, 5]), table())
    (found,) = trainer(tmp_path).test(Table(SCORES), datamodule=data, verbose=False)
    assert found["test/acc"] == pytest.approx(4 / 9)
    assert (found["test/prior/chance"], found["test/prior/rarest"]) == pytest.approx((1 / 3, 0.4))
    groups = {
        line["group"]: (line["accuracy"], line["questions"]) for line in lines(tmp_path / "tables/test/accuracy.jsonl")
    }
    members = {"start": [0, 3, 5], "middle": [1, 4, 6], "end": [2]}
    shares = {place: [RIGHT[row] for row in rows] for place, rows in members.items()}
    for place, values in shares.items():
        assert groups.pop(f"slot at the {place}") == (pytest.approx(np.mean(values)), len(values))
    assert sum(count for _, count in groups.values()) == 7
    assert sum(share * count for share, count in groups.values()) == pytest.approx(4)
    answers = lines(tmp_path / "tables/test/questions.jsonl")
    assert [answer["id"] for answer in answers] == list("abcdefg")
    assert [answer["chosen"] for answer in answers] == ["0-0", "1-0", "2-1", "3-1", "4-2", "5-0", "6-1"]
    assert [answer["gold"] for answer in answers] == [f"{row}-{label}" for row, label in enumerate(LABELS.tolist())]
    assert [[answer[f"score {option}"] for option in range(3)] for answer in answers] == SCORES.tolist()
    figures = {path.name for path in (tmp_path / "figures/test").iterdir()}
    assert figures == {"accuracy_by_passage_length.png", "accuracy_by_slot.png"}


def test_questions_without_passages_are_grouped_by_slot_only(tmp_path: Path) -> None:
    questions = table()
    questions.articles[:] = [""] * 7
    trainer(tmp_path).test(Table(SCORES), datamodule=Given(parts([0, 1, 2]), questions), verbose=False)
    assert [path.name for path in (tmp_path / "figures/test").iterdir()] == ["accuracy_by_slot.png"]


def test_without_a_table_of_questions_a_test_draws_nothing(tmp_path: Path) -> None:
    module = Table(SCORES)
    for _ in range(2):
        (found,) = trainer(tmp_path).test(module, loader(parts([0, 1, 2])), verbose=False)
        assert found["test/acc"] == pytest.approx(2 / 3)
    assert not list(tmp_path.iterdir())


def test_predictions_are_in_a_file_and_in_a_submission_in_the_order_of_the_rows(tmp_path: Path) -> None:
    data = Given(parts([6, 3], [0, 5, 4], [1, 2], labelled=False), table())
    module = Table(SCORES)
    for _ in range(2):
        trainer(tmp_path).predict(module, datamodule=data)
        assert read_submission(tmp_path / "submission.csv", 3) == [0, 0, 1, 1, 2, 0, 1]
    found = {line["id"]: line for line in lines(tmp_path / "predictions.jsonl")}
    assert list(found) == ["g", "d", "a", "f", "e", "b", "c"]
    for row, identity in enumerate("abcdefg"):
        assert found[identity]["prob"] == pytest.approx(SCORES[row].softmax(0).tolist())


def test_an_incomplete_prediction_is_no_submission(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Given(parts([0, 1, 2], [3, 4, 5, 6], labelled=False), table())
    with caplog.at_level(logging.WARNING, "zoo"):
        trainer(tmp_path, limit_predict_batches=1).predict(Table(SCORES), datamodule=data)
    assert caplog.messages == ["No submission.csv: only 3 of 7 questions are answered"]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert len(lines(tmp_path / "predictions.jsonl")) == 3


def test_a_trial_run_leaves_no_file(tmp_path: Path) -> None:
    data = Given(parts([0, 1, 2], labelled=False), table())
    trainer(tmp_path, fast_dev_run=True).predict(Table(SCORES), datamodule=data)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1")
def test_a_run_writes_the_submission_of_an_unlabelled_file_and_two_processes_the_same(run: Any, tmp_path: Path) -> None:
    module = uneven(
        SummaryMRC("tiny", encoder_options={"hidden_size": 16, "num_heads": 2}, vocab_size=len(tokenizer()))
    )
    module.encoder.save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    unlabelled = rows(11, labelled=False, seed=1)
    command = (
        "predict", "--model", "SummaryMRC", "--model.encoder", str(tmp_path / "encoder"),
        "--data", "ClozeData", "--data.tokenizer", str(tmp_path / "encoder"), "--data.max_length", "64",
        "--data.path", write(rows(), tmp_path / "train.jsonl"), "--data.eval_batch_size", "3",
        "--data.predict_path", write(unlabelled, tmp_path / "questions.jsonl"),
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    folder = run(*command).run_folder
    found = {line["id"]: line["pred"] for line in lines(folder / "predictions.jsonl")}
    submitted = read_submission(folder / "submission.csv")
    assert submitted == [found[identity] for identity in unlabelled.ids]
    assert len(set(submitted)) > 1
    two = run(*command, "--trainer.strategy", "ddp_fork", "--trainer.devices", "2").run_folder
    assert read_submission(two / "submission.csv") == submitted
    assert not (run(*command, "--trainer.limit_predict_batches", "0.5").run_folder / "submission.csv").exists()
