"""Scores of yes against no."""

from __future__ import annotations

import pytest
import torch

from zoo.text_attack.answer_scores import Answers, answer_probability, answer_tokens, yes_probability
from zoo.text_attack.tokenizers import build_tokenizer

ANSWERS = Answers(([3], [5]), 3, 5)


def logits() -> torch.Tensor:
    return 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0))


def test_the_score_is_the_sigmoid_of_the_difference_and_the_softmax_of_the_two() -> None:
    z = logits()
    p = answer_probability(z, ANSWERS)
    torch.testing.assert_close(p, torch.sigmoid(z[:, 3] - z[:, 5]))
    torch.testing.assert_close(p, z[:, [3, 5]].softmax(1)[:, 0])
    assert p.dtype == answer_probability(z.bfloat16(), ANSWERS).dtype == torch.float32


def test_a_shift_of_all_logits_changes_nothing() -> None:
    torch.testing.assert_close(answer_probability(logits() + 7, ANSWERS), answer_probability(logits(), ANSWERS))


def test_two_softmaxes_squeeze_the_score() -> None:
    z = logits()
    probabilities = z.softmax(1)[:, [3, 5]]
    p = answer_probability(z, ANSWERS, double_softmax=True)
    torch.testing.assert_close(p, probabilities.softmax(1)[:, 0])
    sure = torch.full((1, 9), -50.0)
    sure[0, 3] = 50
    assert float(answer_probability(sure, ANSWERS, double_softmax=True)) == pytest.approx(0.7311, abs=1e-4)


def test_yes_alone_is_the_sigmoid_of_its_logit() -> None:
    torch.testing.assert_close(yes_probability(logits(), ANSWERS), torch.sigmoid(logits()[:, 3]))


def test_answers_are_tokenised_as_they_follow_the_prompt() -> None:
    tokenizer = build_tokenizer("train", ["Yes. No. Yes No Answer: Yes"] * 5, 300)
    glued = answer_tokens(tokenizer, ["Yes", "No"], "{answer}.", before="Response:\n")
    apart = answer_tokens(tokenizer, ["Yes", "No"], " {answer}", before="Answer:")
    assert tokenizer.decode(glued.rows[0]) == "Yes." and tokenizer.decode(apart.rows[1]) == " No"
    assert glued.yes_id == glued.rows[0][0] != apart.yes_id and glued.no_id == glued.rows[1][0]


def test_blanks_that_both_answers_begin_with_belong_to_the_prompt() -> None:
    tokenizer = build_tokenizer("train", ["nothing of the kind"], 261)
    answers = answer_tokens(tokenizer, ["Yes", "No"], " {answer}", before="Answer:")
    assert tokenizer.convert_ids_to_tokens(list(answers.lead)) == ["Ġ"]
    assert tokenizer.convert_ids_to_tokens([answers.yes_id, answers.no_id]) == ["Y", "N"]
    assert tokenizer.decode(answers.rows[0]) == "Yes"


@pytest.mark.parametrize("answers", [["maybe", "maybe not"], ["Yes"]], ids=["same_piece", "one"])
def test_answers_that_cannot_be_told_apart_are_refused(answers: list[str]) -> None:
    tokenizer = build_tokenizer("train", ["maybe not"] * 9, 300)
    with pytest.raises(ValueError, match=r"first piece.*\['Ġmaybe'\] and \['Ġmaybe'|must be two"):
        answer_tokens(tokenizer, answers)
