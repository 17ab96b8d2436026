"""Pictures and tables of a test: which questions are answered, and what the filled option looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import CatMetric

from zoo.common.artifacts import log_figure, log_table
from zoo.summary_mrc.metrics import answered_right, predictions

if TYPE_CHECKING:
    from zoo.summary_mrc.choice_module import ChoiceModule
    from zoo.summary_mrc.types import QuestionTable

PLACES = ("start", "middle", "end")
"""Thirds of a question."""

_TABLE_ROWS = 200


class TestReport(nn.Module):
    """Collects the answers of a test, on all processes.

    Attributes:
        example: A batch to draw the attention of, on the first process.
    """

    __test__ = False  # no test class, whatever its name begins with

    def __init__(self) -> None:
        super().__init__()
        # One row of the table, whether it is right, the scores: as numbers of one list per question.
        self.answers = CatMetric(nan_strategy="disable")
        self.example: Any = None

    def update(self, rows: Tensor, scores: Tensor, accepted: Tensor) -> None:
        """Note the answers of a batch.

        Args:
            rows: int64 `(batch,)`.
            scores: `(batch, options)`.
            accepted: bool `(batch, options)`.
        """
        right = answered_right(scores, accepted)
        self.answers.update(torch.cat([rows[:, None].double(), right[:, None].double(), scores.double()], 1))

    def draw(self, module: ChoiceModule, priors: dict[str, float]) -> None:
        """Log what was collected and forget it. All processes must call it.

        Args:
            module: The module under test.
            priors: Accuracy of answers without reading, by name.
        """
        answers, example, self.example = self.answers.compute(), self.example, None
        self.answers.reset()
        table = module.questions("test")
        if not module.trainer.is_global_zero or table is None or not isinstance(answers, Tensor) or answers.ndim != 2:
            return
        answers = answers.cpu()
        rows = answers[:, 0].long()
        # A sampler that evens out processes may show a question twice.
        _, first = _unique(rows)
        answers, rows = answers[first], rows[first]
        self._groups(module, table, rows, answers[:, 1], priors)
        self._table(module, table, rows[:_TABLE_ROWS].tolist(), answers[:_TABLE_ROWS])
        if example is not None:
            self._attention(module, example)

    def _groups(
        self, module: ChoiceModule, table: QuestionTable, rows: Tensor, right: Tensor, priors: dict[str, float]
    ) -> None:
        from zoo.summary_mrc.figures import length_groups, plot_accuracy_by

        chance = 1 / module.num_options
        priors = {name: value for name, value in priors.items() if name != "chance"}
        words = torch.tensor([len(table.articles[row].split()) for row in rows.tolist()])
        place = torch.tensor([_third(table.questions[row]) for row in rows.tolist()])
        if int(words.max()):
            names, group = length_groups(words)
            shares, counts = _shares(group, right, len(names))
            figure = plot_accuracy_by(names, shares, counts, chance, priors, "words in the passage", "test accuracy")
            log_figure(module, "test/accuracy_by_passage_length", figure)
        shares, counts = _shares(place, right, len(PLACES))
        figure = plot_accuracy_by(
            list(PLACES), shares, counts, chance, priors, "place of the slot in the question", "test accuracy"
        )
        log_figure(module, "test/accuracy_by_slot", figure)
        columns = ["group", "accuracy", "questions"]
        lines = [[f"slot at the {name}", s, c] for name, s, c in zip(PLACES, shares, counts, strict=True)]
        if int(words.max()):
            shares, counts = _shares(group, right, len(names))
            lines += [[f"{name} words", s, c] for name, s, c in zip(names, shares, counts, strict=True)]
        log_table(module, "test/accuracy", columns, lines)

    def _table(self, module: ChoiceModule, table: QuestionTable, rows: list[int], answers: Tensor) -> None:
        options = [f"option {number}" for number in range(module.num_options)]
        scores = [f"score {number}" for number in range(module.num_options)]
        gold = getattr(table, "labels", None)
        lines = []
        for row, values in zip(rows, answers, strict=True):
            chosen = int(predictions(values[None, 2:]))
            texts = table.options[row]
            right = "" if gold is None or gold[row] < 0 else texts[int(gold[row])]
            lines.append([table.ids[row], table.questions[row], texts[chosen], right, *texts, *values[2:].tolist()])
        log_table(module, "test/questions", ["id", "question", "chosen", "gold", *options, *scores], lines)

    def _attention(self, module: ChoiceModule, batch: Any) -> None:
        from zoo.summary_mrc.figures import plot_attention

        tokenizer = getattr(getattr(module.trainer, "datamodule", None), "tokenizer", None)
        found = module.attention(batch)
        if found is None or tokenizer is None:
            return
        option = int(batch.labels[0])
        summary, passage, weights = (part[option].cpu() for part in found)
        summary_kept, passage_kept = summary >= 0, passage >= 0
        if not bool(passage_kept.any()):
            return
        places = batch.option_mask[0, option].cpu()[summary_kept].nonzero().flatten().tolist()
        figure = plot_attention(
            tokenizer.convert_ids_to_tokens(summary[summary_kept].tolist()),
            tokenizer.convert_ids_to_tokens(passage[passage_kept].tolist()),
            weights[summary_kept][:, passage_kept].float(),
            places,
            "what the right option, filled in, attends to",
        )
        log_figure(module, "test/attention", figure)


def _unique(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct values in rising order, and the first place of each."""
    values, inverse = torch.unique(rows, return_inverse=True)
    places = torch.full((len(values),), len(rows), dtype=torch.int64)
    places.scatter_reduce_(0, inverse, torch.arange(len(rows)), "amin")
    return values, places


def _third(question: str) -> int:
    """Third of the question, by words, in which the slot stands."""
    words = question.split()
    place = next((number for number, word in enumerate(words) if "@placeholder" in word), 0)
    return min(2, 3 * place // max(1, len(words)))


def _shares(group: Tensor, right: Tensor, count: int) -> tuple[list[float], list[int]]:
    """Share of right answers and number of questions of each group."""
    counts = torch.bincount(group, minlength=count)
    sums = torch.bincount(group, weights=right.double(), minlength=count)
    return (sums / counts.clamp(min=1)).tolist(), counts.tolist()
