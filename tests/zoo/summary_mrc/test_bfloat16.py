"""Scores under autocast are as fine as those without it, so that rounding makes no ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.zoo.summary_mrc.choices import TINY, tokenizer, tokens, whole
from zoo.summary_mrc.cloze_scorer import ClozeScorer
from zoo.summary_mrc.ga_reader import GAReader
from zoo.summary_mrc.module import SummaryMRC

SETTINGS = {"encoder": "tiny", "encoder_options": TINY}


@pytest.mark.parametrize(
    ("kind", "encode", "settings"),
    [
        (SummaryMRC, "joint", SETTINGS),
        (SummaryMRC, "separate", SETTINGS),
        (ClozeScorer, "cloze", SETTINGS),
        (GAReader, "reader", {"embedding_size": 8, "hidden_size": 8}),
    ],
)
def test_scores_in_bfloat16_precision_are_float32(kind: Any, encode: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = kind(vocab_size=len(tokenizer()), encode=encode, **settings).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = module(whole(tokens(encode)))
    assert scores.dtype == torch.float32
    # Numbers that a bfloat16 holds would all stay what they are.
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9
