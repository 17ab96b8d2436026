"""A few cloze questions of uneven length, in every layout, and modules small enough for them."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_tokenizer import load_tokenizer
from datamodules.cloze_tokens import ClozeTokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

WORDS = [
    "amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "ledge",
    "marsh", "north", "ocean", "pearl", "quarry", "ridge", "shore", "trail", "upland", "valley", "willow", "yard",
]  # fmt: skip
OPTIONS = 5
WIDTH = 16
TINY = {"hidden_size": WIDTH, "num_layers": 2, "num_heads": 2, "intermediate_size": 24, "max_length": 64}
TINY_LINE = "{hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 24, max_length: 64, dropout: 0.0}"


def rows(count: int = 12, labelled: bool = True, seed: int = 0) -> ClozeRows:
    """Questions with options of one to three words; the passages have 3 to 30."""
    draw = random.Random(seed)
    articles = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for _ in range(count)]
    questions = [
        " ".join(
            [*draw.choices(WORDS, k=draw.randint(0, 6)), "@placeholder", *draw.choices(WORDS, k=draw.randint(1, 4))]
        )
        for _ in range(count)
    ]
    options = [[" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(OPTIONS)] for _ in range(count)]
    labels = np.array([draw.randrange(OPTIONS) if labelled else -100 for _ in range(count)])
    ids = [f"question-{number}" for number in range(count)]
    return ClozeRows(
        "some", articles, questions, options, labels, ids, [f"some.jsonl, line {n + 1}" for n in range(count)]
    )


def permuted(questions: ClozeRows, order: Sequence[int]) -> ClozeRows:
    """The same questions with their options in another order."""
    options = [[options[place] for place in order] for options in questions.options]
    labels = np.array([list(order).index(label) for label in questions.labels.tolist()])
    return replace(questions, options=options, labels=labels)


def write(questions: ClozeRows, path: Path) -> str:
    """The questions as JSON lines of ReCAM's form."""
    columns = (questions.articles, questions.questions, questions.options, questions.labels.tolist(), questions.ids)
    with path.open("w", encoding="utf-8") as file:
        for article, question, options, label, identity in zip(*columns, strict=True):
            line = {"article": article, "question": question, "id": identity}
            line |= {f"option_{number}": option for number, option in enumerate(options)}
            file.write(json.dumps(line | ({"label": label} if questions.labelled else {})) + "\n")
    return str(path)


@cache
def tokenizer(marks: bool = False) -> PreTrainedTokenizerFast:
    """One token for each word."""
    return load_tokenizer("words", lambda: [" ".join(WORDS)], 100, marks)


def tokens(encode: str = "joint", questions: ClozeRows | None = None, **options: Any) -> ClozeTokens:
    marks = tokenizer(bool(options.get("mark_option")))
    return ClozeTokens(questions or rows(), marks, encode=encode, max_length=64, **options)


def whole(table: ClozeTokens) -> Any:
    """All questions as one batch."""
    return table[torch.arange(len(table))]


def batches(table: ClozeTokens, size: int = 4) -> list[Any]:
    return [table[part] for part in torch.arange(len(table)).split(size)]


_FILL = {"input_ids": 7, "passage_ids": 7, "summary_ids": 7, "question_ids": 7, "option_ids": 7, "token_type_ids": 1}
_NO_SEQUENCES = ("labels", "accepted", "rows", "sequence_of", "slot")


def padded(batch: Any, extra: int = 3, cloze: bool = False) -> Any:
    """The batch with more columns of padding, whose ids are those of a word."""
    fill = _FILL | ({"option_ids": -100} if cloze else {})
    return batch._replace(
        **{
            name: nn.functional.pad(field, (0, extra), value=fill.get(name, 0))
            for name, field in batch._asdict().items()
            if name not in _NO_SEQUENCES
        }
    )


def uneven(module: Any, scale: float = 0.2) -> Any:
    """Weights far from their first values, so that scores differ, and evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def gradients(module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch, and the gradients of all parameters that have one."""
    module.zero_grad()
    loss = module.loss(module(batch), batch.labels)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def trainer(folder: Path | str | None = None, **options: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": folder or tempfile.gettempdir(),
            **options,
        }
    )


def loader(parts: list[Any]) -> DataLoader[Any]:
    """Batches as they are."""
    return DataLoader(parts, batch_size=None)


def fit(module: Any, parts: list[Any], **options: Any) -> Trainer:
    """Train on batches, without a validation."""
    out = trainer(limit_val_batches=0, **options)
    out.fit(module, loader(parts), loader(parts))
    return out
