"""Options scored at mask tokens: the equation, every kind of network, and what must not change a score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.summary_mrc.encoders import TINY_KINDS, build_text_encoder
from zoo.summary_mrc.slot_scorer import MaskedSlotScorer

VOCABULARY = 23
MASK = 4
OPTION_IDS = torch.tensor([[[5, -100], [6, 7], [8, 9]], [[10, 11], [12, -100], [5, -100]]])
SEQUENCE_OF = torch.tensor([[0, 1, 1], [3, 2, 2]])
MASK_INDEX = torch.tensor([[4, 0], [4, 5], [2, 0], [2, 3]])


def network(kind: str = "bert", **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "max_length": 16, "dropout": 0.0, **options}
    built = build_text_encoder("tiny", vocab_size=VOCABULARY, options={"kind": kind, **sizes}, head="masked_lm")
    # Fresh weights are so small that all options would have nearly equal scores.
    for parameter in built.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return built.eval()


def sequences(padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two questions with one and two mask tokens each, padded to 8 places and more."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (4, 8), generator=generator)
    ids[:, 0] = 2
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[2:, 6:] = 0
    for row, places in enumerate(([4], [4, 5], [2], [2, 3])):
        ids[row, places] = MASK
    types = (torch.arange(8) > 3).long().expand(4, 8)
    more = (0, padding)
    pad = nn.functional.pad
    return pad(ids * mask, more), pad(mask, more), pad(types * mask, more)


@torch.no_grad()
def brute_force(model: Any, ids: Tensor, mask: Tensor, types: Tensor) -> Tensor:
    scores = torch.zeros(2, 3, dtype=torch.float64)
    several = getattr(model.config, "type_vocab_size", 0) > 1
    for question in range(2):
        for option in range(3):
            row = int(SEQUENCE_OF[question, option])
            kwargs = {"token_type_ids": types[row : row + 1]} if several else {}
            logits = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **kwargs).logits[0]
            tokens = [token for token in OPTION_IDS[question, option].tolist() if token != -100]
            values = [
                logits[MASK_INDEX[row, place]].double().softmax(-1)[token].log() for place, token in enumerate(tokens)
            ]
            scores[question, option] = sum(values) / len(values)
    return scores


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_scores_are_mean_log_probabilities_at_the_mask_tokens(kind: str) -> None:
    model = network(kind).double()
    scores = MaskedSlotScorer(model)(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
    expected = brute_force(model, *sequences())
    assert expected.std() > 0.05
    torch.testing.assert_close(scores, expected)


def test_an_embedding_of_another_width_than_the_states_fits() -> None:
    config = {
        "model_type": "electra",
        "hidden_size": 16,
        "embedding_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    model = build_text_encoder(config, vocab_size=VOCABULARY, head="masked_lm").double().eval()
    scores = MaskedSlotScorer(model)(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
    torch.testing.assert_close(scores, brute_force(model, *sequences()))


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_head_runs_at_the_mask_tokens_only(kind: str) -> None:
    model = network(kind)
    ids, mask, types = sequences()
    logits = MaskedSlotScorer(model).logits(ids, mask, types, MASK_INDEX)
    assert logits.shape == (4, 2, VOCABULARY)
    # The hook is gone afterwards.
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (4, 8, VOCABULARY)


def test_padding_changes_no_score() -> None:
    scorer = MaskedSlotScorer(network("roberta"))
    scores = scorer(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
    wide = nn.functional.pad(OPTION_IDS, (0, 1), value=-100)
    index = nn.functional.pad(MASK_INDEX, (0, 1))
    torch.testing.assert_close(scorer(*sequences(5), index, SEQUENCE_OF, wide), scores)


def test_permuted_options_have_permuted_scores() -> None:
    scorer = MaskedSlotScorer(network())
    scores = scorer(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
    order = torch.tensor([2, 0, 1])
    permuted = scorer(*sequences(), MASK_INDEX, SEQUENCE_OF[:, order], OPTION_IDS[:, order])
    torch.testing.assert_close(permuted, scores[:, order])


def test_one_mask_token_for_all_options_gives_log_probabilities_of_their_first_tokens() -> None:
    model = network()
    ids, mask, types = (field[[0, 2]] for field in sequences())
    firsts = OPTION_IDS[..., :1]
    of = torch.tensor([[0, 0, 0], [1, 1, 1]])
    scores = MaskedSlotScorer(model)(ids, mask, types, torch.tensor([[4], [2]]), of, firsts)
    logits = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    expected = torch.stack([logits[0, 4], logits[1, 2]]).log_softmax(-1).gather(1, firsts[..., 0])
    torch.testing.assert_close(scores, expected)
    assert bool((scores < 0).all())


def test_gradients_are_those_of_the_whole_logits() -> None:
    model = network("deberta-v2").double()
    MaskedSlotScorer(model)(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)[0, 1].backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    ids, mask, _ = sequences()
    logits = model(input_ids=ids, attention_mask=mask).logits[1].log_softmax(-1)
    ((logits[4, 6] + logits[5, 7]) / 2).backward()
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_autocast_leaves_the_head_in_float32_and_itself_as_it_was() -> None:
    scorer = MaskedSlotScorer(network())
    expected = scorer(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
    seen = []
    scorer.network.cls.register_forward_hook(lambda head, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.05)
    assert not torch.equal(scores, expected)


def test_a_network_in_bfloat16_gives_scores_in_float32() -> None:
    scorer = MaskedSlotScorer(network().bfloat16())
    assert scorer(*sequences(), MASK_INDEX, SEQUENCE_OF, OPTION_IDS).dtype == torch.float32


def test_a_failed_forward_leaves_no_hook_and_no_autocast_behind() -> None:
    model = network()
    ids, mask, types = sequences()
    with pytest.raises(IndexError):
        MaskedSlotScorer(model)(ids + VOCABULARY, mask, types, MASK_INDEX, SEQUENCE_OF, OPTION_IDS)
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (4, 8, VOCABULARY)


def test_a_network_without_a_head_is_refused() -> None:
    base = build_text_encoder("tiny", vocab_size=VOCABULARY)
    for wrong in (base, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"has no masked language model's head: build it with head='masked_lm'"):
            MaskedSlotScorer(wrong)
