"""Yes or no: the first tokens of the two answers, and how likely the first is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zoo.text_attack.prompt_tables import PieceEncoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Answers(NamedTuple):
    """Two answers as tokens.

    Attributes:
        rows: Token ids of yes and of no, without `lead`.
        yes_id: First token of yes.
        no_id: First token of no.
        lead: Blanks that both begin with, where the tokenizer makes pieces of them: they belong to the prompt.
    """

    rows: tuple[list[int], list[int]]
    yes_id: int
    no_id: int
    lead: tuple[int, ...] = ()


def answer_tokens(tokenizer: Any, answers: Sequence[str], template: str = "{answer}", before: str = "") -> Answers:
    """Tokens of the answers yes and no.

    Args:
        tokenizer: A fast tokenizer of transformers.
        answers: Yes, then no.
        template: What an answer is written in, with `{answer}`.
        before: What precedes the answer in the same text; empty if it begins one.

    Raises:
        ValueError: If there are not two, or both begin with the same piece.
    """
    if len(answers) != 2:
        raise ValueError(f"answers must be two, for yes and for no, got {list(answers)}")
    yes, no = (
        piece.ids for piece in PieceEncoder(tokenizer)([template.replace("{answer}", text) for text in answers], before)
    )
    lead: list[int] = []
    while yes and no and yes[0] == no[0] and not tokenizer.decode([yes[0]]).strip():
        lead.append(yes[0])
        yes, no = yes[1:], no[1:]
    if not yes or not no or yes[0] == no[0]:
        pieces = [tokenizer.convert_ids_to_tokens(row) for row in (yes, no)]
        raise ValueError(
            f"the answers {answers[0]!r} and {answers[1]!r} must differ in their first piece, the tokenizer makes "
            f"{pieces[0]} and {pieces[1]} of them"
        )
    return Answers((yes, no), yes[0], no[0], tuple(lead))


def answer_probability(logits: Tensor, answers: Answers, double_softmax: bool = False) -> Tensor:
    """Probability of yes against no: `sigmoid(z_yes - z_no)`, float32.

    Args:
        logits: `(..., vocabulary)` at the place of the answer's first token.
        answers: The two answers.
        double_softmax: As TALLRec's published script does: a softmax over the vocabulary, then one over the two
            probabilities, which squeezes the result into 0.27 to 0.73.

    Returns:
        Float32 of the shape of `logits` without its last dimension.
    """
    logits = logits.float()
    if double_softmax:
        logits = logits.softmax(-1)
    return torch.sigmoid(logits[..., answers.yes_id] - logits[..., answers.no_id])


def yes_probability(logits: Tensor, answers: Answers) -> Tensor:
    """`sigmoid(z_yes)`, float32: what CoLLM is trained with, from logits `(..., vocabulary)`."""
    return torch.sigmoid(logits[..., answers.yes_id].float())
