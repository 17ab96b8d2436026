"""RecFormer: four embeddings in one sum, sequences newest first, and published encoders from folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.zoo.text_attack.pairs import TITLES
from zoo.text_attack.recformer import KINDS, ItemSequence, RecFormer, item_sequences
from zoo.text_attack.recformer_rec import RecFormerRec
from zoo.text_attack.tokenizers import build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, KEY = 5, 2
SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "window": 4}


def network(kind: str, **options: Any) -> RecFormer:
    torch.manual_seed(0)
    made = RecFormer("tiny", {**SMALL, "kind": kind}, **{"vocab_size": 60, "max_items": 6, "max_tokens": 40, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def some_items(batch: int = 3, items: int = 4, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, 60, (batch, items, WIDTH), generator=draw)
    lengths = torch.randint(KEY, WIDTH + 1, (batch, items), generator=draw)
    for row in range(batch):
        lengths[row, items - row :] = 0
    return tokens.masked_fill(torch.arange(WIDTH) >= lengths[..., None], pad_id), lengths


def by_hand(tokens: Tensor, lengths: Tensor, max_tokens: int) -> tuple[list[int], list[int], list[int]]:
    """Ids, types and item positions of one row, by loops."""
    ids, types, positions = [1], [0], [0]
    for place, (row, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True), 1):
        ids += row[:length]
        types += [1 if column < KEY else 2 for column in range(length)]
        positions += [place] * length
    return ids[:max_tokens], types[:max_tokens], positions[:max_tokens]


@pytest.mark.parametrize("max_tokens", [40, 9, 2], ids=["whole", "cut", "least"])
@pytest.mark.parametrize("pad_id", [0, 7])
def test_sequences_are_newest_first_without_gaps_and_the_cut_drops_the_oldest(max_tokens: int, pad_id: int) -> None:
    tokens, lengths = some_items(4, 3, pad_id)
    found = item_sequences(tokens, lengths, KEY, max_tokens, 1, pad_id)
    assert found.input_ids.shape[1] <= max_tokens
    for row in range(4):
        ids, types, positions = by_hand(tokens[row], lengths[row], max_tokens)
        rest = found.input_ids.shape[1] - len(ids)
        assert found.input_ids[row].tolist() == ids + [pad_id] * rest
        assert found.attention_mask[row].tolist() == [1] * len(ids) + [0] * rest
        assert found.token_type_ids[row].tolist() == types + [3] * rest
        assert found.item_position_ids[row].tolist() == positions + [0] * rest
    assert found.attention_mask[3].sum() == 1, "an empty history is <s> alone"


def test_no_item_at_all_is_the_first_token_alone() -> None:
    found = item_sequences(torch.zeros(2, 0, WIDTH).long(), torch.zeros(2, 0).long(), KEY, 9, 1, 0)
    assert [part.tolist() for part in found] == [[[1], [1]], [[1], [1]], [[0], [0]], [[0], [0]]]


@pytest.mark.parametrize("pad_id", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_normalised_sum_of_word_position_type_and_item_position(kind: str, pad_id: int) -> None:
    made = network(kind, pad_id=pad_id)
    seen: list[Tensor] = []
    made.encoder.embeddings.LayerNorm.register_forward_hook(lambda module, args, out: seen.append(out))
    sequence = item_sequences(*some_items(pad_id=pad_id), KEY, 40, 1, pad_id)
    made(sequence)
    parts = made.encoder.embeddings
    for row, mask in enumerate(sequence.attention_mask.bool()):
        count = int(mask.sum())
        explicit = (
            parts.word_embeddings.weight[sequence.input_ids[row, :count]]
            + parts.position_embeddings.weight[torch.arange(count) + pad_id + 1]
            + parts.token_type_embeddings.weight[sequence.token_type_ids[row, :count]]
            + made.item_positions.weight[sequence.item_position_ids[row, :count]]
        )
        explicit = torch.nn.functional.layer_norm(explicit, (16,), parts.LayerNorm.weight, parts.LayerNorm.bias, 1e-5)
        torch.testing.assert_close(seen[-1][row, :count], explicit, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_batch_mates_and_padding(kind: str) -> None:
    made = network(kind)
    sequence = item_sequences(*some_items(), KEY, 40, 1, 0)
    together, states = made(sequence), made(sequence, all_states=True)
    torch.testing.assert_close(states[:, 0], together)
    for row in range(3):
        count = int(sequence.attention_mask[row].sum())
        alone = made(ItemSequence(*(part[row : row + 1, :count] for part in sequence)))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
    other = sequence._replace(input_ids=sequence.input_ids.masked_fill(sequence.attention_mask == 0, 33))
    torch.testing.assert_close(made(other), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_depends_on_the_order_of_the_items_and_on_their_last_token(kind: str) -> None:
    made = network(kind)
    tokens, lengths = some_items(1)
    vector = made(item_sequences(tokens, lengths, KEY, 40, 1, 0))
    turned = made(item_sequences(tokens.flip(1), lengths.flip(1), KEY, 40, 1, 0))
    assert (vector - turned).abs().max() > 1e-3
    last = tokens.clone()
    last[0, -1, int(lengths[0, -1]) - 1] = 42
    # Farther than the Longformer's window: only the global attention of <s> sees it.
    assert (vector - made(item_sequences(last, lengths, KEY, 40, 1, 0))).abs().max() > 1e-4


def test_only_the_first_token_of_a_longformer_attends_globally() -> None:
    made = network("longformer")
    seen: list[Any] = []
    made.encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    sequence = item_sequences(*some_items(), KEY, 40, 1, 0)
    made(sequence)
    wanted = torch.zeros_like(sequence.input_ids)
    wanted[:, 0] = 1
    assert torch.equal(seen[0]["global_attention_mask"], wanted)


def saved(kind: str, folder: Path, types: int = 1, head: bool = False, model_type: str | None = None) -> Any:
    """A tiny published encoder with its tokenizer, in a folder."""
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    tokenizer = build_tokenizer("train", TITLES, 300)
    tokenizer.save_pretrained(folder)
    sizes: dict[str, Any] = {"attention_window": [4]} if kind == "longformer" else {}
    config = AutoConfig.for_model(
        model_type or kind, vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=50, type_vocab_size=types, pad_token_id=0, **sizes,
    )  # fmt: skip
    torch.manual_seed(5)
    model = (AutoModelForMaskedLM if head else AutoModel).from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("head", [False, True], ids=["encoder", "masked-lm"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_encoder_is_loaded_with_four_types_of_token_and_its_tokenizer(
    kind: str, head: bool, tmp_path: Path
) -> None:
    model = saved(kind, tmp_path, head=head)
    inner = getattr(model, kind) if head else model
    made = RecFormerRec(backbone=str(tmp_path), max_tokens=40)
    parts = made.recformer.encoder.embeddings
    assert made.recformer.is_longformer == (kind == "longformer")
    assert torch.equal(parts.word_embeddings.weight, inner.embeddings.word_embeddings.weight)
    assert torch.equal(parts.token_type_embeddings.weight, inner.embeddings.token_type_embeddings.weight.expand(4, -1))
    assert made.recformer.encoder.config.type_vocab_size == 4
    assert made.recformer.encoder.training
    made.set_titles(TITLES)
    assert len(made.tokenizer) == 300
    torch.autograd.backward(made.loss(rows()))
    assert parts.token_type_embeddings.weight.grad[:3].abs().sum(1).min() > 0
    assert made.score(made.user_state(rows()), ["Mario"]).shape == (2, 1)


def rows() -> Any:
    from tests.zoo.text_attack.pairs import batch

    return batch(2, 3)


def test_types_that_an_encoder_has_are_kept_and_its_vocabulary_grows_where_needed(tmp_path: Path) -> None:
    model = saved("roberta", tmp_path, types=4)
    made = RecFormer(str(tmp_path), vocab_size=310, max_tokens=40)
    assert torch.equal(
        made.encoder.embeddings.token_type_embeddings.weight, model.embeddings.token_type_embeddings.weight
    )
    words = made.encoder.get_input_embeddings().weight
    assert len(words) == 310 and torch.equal(words[:300], model.embeddings.word_embeddings.weight)
    assert len(RecFormer(str(tmp_path), vocab_size=20, max_tokens=40).encoder.get_input_embeddings().weight) == 300


def test_a_backbone_of_another_kind_or_too_short_or_with_options_is_refused(tmp_path: Path) -> None:
    saved("roberta", tmp_path)
    with pytest.raises(ValueError, match=r"max_tokens is 50, but .* takes sequences of at most 49 tokens"):
        RecFormer(str(tmp_path), max_tokens=50)
    RecFormer(str(tmp_path), max_tokens=49)
    with pytest.raises(ValueError, match="hidden_size: for the 'tiny' backbone only"):
        RecFormer(str(tmp_path), {"hidden_size": 8}, max_tokens=40)
    saved("roberta", tmp_path / "bert", model_type="bert")
    with pytest.raises(ValueError, match=r"needs a Longformer or a RoBERTa, .* is a bert"):
        RecFormer(str(tmp_path / "bert"), max_tokens=40)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_items": 0}, "max_items must be at least 1"),
        ({"max_tokens": 1}, "max_tokens 2, got 50 and 1"),
        ({"options": {"depth": 3}}, "the tiny backbone has no depth; it has kind, hidden_size"),
        ({"options": {"kind": "bert"}}, "kind must be one of roberta, longformer, got 'bert'"),
        ({"options": {"hidden_size": 10}}, r"hidden_size \(10\) must be a multiple of num_heads \(4\)"),
        ({"options": {"num_layers": 0}}, "must be a multiple"),
        ({"options": {"dropout": 1.0}}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"options": {"kind": "longformer", "window": 5}}, "window must be even and at least 2, got 5"),
    ],
    ids=["items", "tokens", "unknown", "kind", "heads", "layers", "dropout", "window"],
)
def test_arguments_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecFormer(**values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_as_long_as_allowed_runs(kind: str) -> None:
    made = network(kind, max_tokens=6, pad_id=3)
    sequence = item_sequences(*some_items(), KEY, 6, 1, 3)
    assert sequence.input_ids.shape[1] == 6 and made(sequence).shape == (3, 16)
