"""MaskedTitles: what is hidden, how often, by what, and the loss of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.text_attack.pairs import batch, victim
from zoo.text_attack.masked_titles import MaskedTitles
from zoo.text_attack.recformer import ItemSequence
from zoo.text_attack.recformer_rec import RecFormerRec


@pytest.fixture
def made() -> Any:
    return victim(RecFormerRec, mlm_weight=0.1, vocab_size=280)


def sequences(made: Any, repeat: int = 1) -> ItemSequence:
    found: ItemSequence = made.history_sequences(batch(6, 5).history.repeat(repeat, 1))
    return found


def words_of(made: Any, sequence: ItemSequence) -> list[list[list[int]]]:
    """For each row the places of the pieces of each word of a value, by a loop over the pieces' names."""
    found = []
    for ids, types in zip(sequence.input_ids.tolist(), sequence.token_type_ids.tolist(), strict=True):
        words: list[list[int]] = []
        for place, name in enumerate(made.tokenizer.convert_ids_to_tokens(ids)):
            if types[place] == 2:
                if name.startswith("Ġ") or types[place - 1] != 2:
                    words.append([])
                words[-1].append(place)
        found.append(words)
    return found


def test_whole_words_of_values_are_hidden_and_nothing_else(made: Any) -> None:
    torch.manual_seed(0)
    sequence = sequences(made, 20)
    made.masked_titles.probability = 0.4
    hidden, chosen = made.masked_titles.hide(sequence, made.tokenizer)
    split, long = 0, 0
    for row, words in zip(chosen.tolist(), words_of(made, sequence), strict=True):
        for word in words:
            marks = {row[place] for place in word}
            assert len(marks) == 1
            split += marks == {True}
            long += len(word) > 1
        assert sum(row) == sum(row[place] for word in words for place in word)
    assert split and long > 20
    assert torch.equal(hidden.input_ids[~chosen], sequence.input_ids[~chosen])
    assert all(torch.equal(a, b) for a, b in zip(hidden[1:], sequence[1:], strict=True))
    assert not chosen[sequence.token_type_ids != 2].any()


def test_a_value_that_begins_inside_a_word_is_a_word_of_its_own(made: Any) -> None:
    torch.manual_seed(0)
    inner = next(i for i in range(5, 280) if not made.tokenizer.convert_ids_to_tokens(i).startswith("Ġ"))
    ids = torch.full((200, 9), inner)
    types = torch.tensor([[0, 1, 2, 2, 1, 2, 2, 3, 3]]).expand(200, 9)
    sequence = ItemSequence(ids, (types != 3).long(), types, torch.zeros_like(ids))
    _, chosen = made.masked_titles.hide(sequence, made.tokenizer)
    assert torch.equal(chosen[:, 2], chosen[:, 3]) and torch.equal(chosen[:, 5], chosen[:, 6])
    assert not torch.equal(chosen[:, 2], chosen[:, 5])


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_words_are_hidden_with_the_probability_that_was_asked_for(made: Any, probability: float) -> None:
    torch.manual_seed(1)
    sequence = sequences(made, 300)
    masked = MaskedTitles(made.recformer, probability)
    hidden, chosen = masked.hide(sequence, made.tokenizer)
    firsts = [row[word[0]] for row, words in zip(chosen.tolist(), words_of(made, sequence), strict=True)
              for word in words]  # fmt: skip
    assert sum(firsts) / len(firsts) == pytest.approx(probability, abs=0.02)
    old, new = sequence.input_ids[chosen], hidden.input_ids[chosen]
    mask = float((new == made.tokenizer.mask_token_id).double().mean())
    same = float((new == old).double().mean())
    assert mask == pytest.approx(0.8, abs=0.03) and same == pytest.approx(0.1, abs=0.03)
    assert new.min() >= 4


def test_the_loss_is_the_mean_cross_entropy_of_hidden_pieces_under_the_tied_output(made: Any) -> None:
    sequence = sequences(made)
    torch.manual_seed(4)
    hidden, chosen = made.masked_titles.hide(sequence, made.tokenizer)
    assert chosen.sum() > 3
    torch.manual_seed(4)
    loss = made.masked_titles(sequence, made.tokenizer)
    states = made.recformer(hidden, all_states=True)
    words = made.recformer.encoder.embeddings.word_embeddings.weight
    parts = [
        F.cross_entropy(made.masked_titles.transform(states[row, place]) @ words.T, sequence.input_ids[row, place])
        for row, place in chosen.nonzero().tolist()
    ]
    torch.testing.assert_close(loss, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)


def test_a_batch_without_hidden_words_has_loss_zero_and_gradients_of_zero(made: Any) -> None:
    empty = made.history_sequences(torch.full((2, 3), -1))
    loss = made.masked_titles(empty, made.tokenizer)
    assert float(loss.detach()) == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in made.masked_titles.parameters())


def test_the_network_is_not_registered_twice_and_another_tokenizer_is_noticed(made: Any) -> None:
    assert not any("network" in name for name in made.masked_titles.state_dict())
    made.masked_titles.hide(sequences(made), made.tokenizer)
    other = victim(RecFormerRec, titles=["Zzz yyy", "yyyy zz"], mlm_weight=0.1, vocab_size=280)
    made.masked_titles.hide(sequences(made), other.tokenizer)
    fresh = MaskedTitles(made.recformer, 0.5)
    fresh.hide(sequences(made), other.tokenizer)
    assert fresh._starts is not None and torch.equal(made.masked_titles._starts, fresh._starts)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1])
def test_a_probability_that_is_none_is_refused(made: Any, probability: float) -> None:
    with pytest.raises(ValueError, match="mlm_probability must be between 0 and 1"):
        MaskedTitles(made.recformer, probability)
