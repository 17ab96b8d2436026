"""The encoder: causality, independence of padding and buckets, masked ends, dropout."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.ticoserec import GRU4RecEncoder, SASRecEncoder
from zoo.ticoserec.buckets import plan_buckets
from zoo.ticoserec.dropout import FastDropout, dropout_mask
from zoo.ticoserec.jagged import keep_last, pad_left, unpad_left


def build(cuts=(1, 2, 3, 5, 8), **kwargs):
    torch.manual_seed(0)
    encoder = SASRecEncoder(30, 12, 16, 2, 2, 32, cuts=cuts, **kwargs).double().eval()
    with torch.no_grad():
        # larger weights than the initial ones, so that attention is far from uniform
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        encoder.item_embedding.weight[0] = 0
    return encoder


def rows(seed=0, lengths=(3, 12, 1, 5, 7, 2)):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    return torch.randint(1, 31, (int(lengths.sum()),), generator=generator), lengths


def plain_forward(encoder, item_ids):
    """The block equations for one row without padding, as loops over heads, queries and keys."""
    n, width = len(item_ids), encoder.hidden_size
    x = encoder.item_embedding.weight[item_ids] + encoder.position_embedding.weight[encoder.max_length - n :]
    x = encoder.input_norm(x)
    for block in encoder.blocks:
        query, key, value = block.query_key_value(x).split(width, -1)
        size = width // block.num_heads
        mixed = torch.zeros_like(x)
        for head in range(block.num_heads):
            cut = slice(head * size, (head + 1) * size)
            for i in range(n):
                keys = [j for j in range(i + 1) if item_ids[j] != 0] or [i]
                logits = torch.stack([query[i, cut] @ key[j, cut] / math.sqrt(size) for j in keys])
                mixed[i, cut] = sum(w * value[j, cut] for w, j in zip(logits.softmax(0), keys, strict=True))
        x = block.attention_norm(x + block.attention_output(mixed))
        x = block.output_norm(x + block.outer(torch.nn.functional.gelu(block.inner(x))))
    return x


@pytest.mark.parametrize("masked", [[], [0], [0, 1, 4]])
def test_states_equal_the_block_equations_written_as_loops(masked):
    encoder = build()
    item_ids, _ = rows(lengths=(7,))
    item_ids[masked] = 0
    states, _ = encoder.encode(item_ids, torch.tensor([7]))
    assert torch.allclose(states, plain_forward(encoder, item_ids), atol=1e-12)


def test_a_change_of_an_item_changes_no_earlier_state():
    encoder = build()
    item_ids, lengths = rows(lengths=(9,))
    before, _ = encoder.encode(item_ids, lengths)
    item_ids[5] = item_ids[5] % 30 + 1
    after, _ = encoder.encode(item_ids, lengths)
    assert torch.equal(before[:5], after[:5]) and (before[5:] - after[5:]).abs().amin(0).max() > 1e-3


def test_padding_and_buckets_change_neither_states_nor_gradients():
    item_ids, lengths = rows()
    item_ids[[0, 3, 20]] = 0  # the first item of two rows is masked, and one inside
    outputs, gradients = [], []
    for cuts in ((1, 2, 3, 5, 8), (4,), None):
        encoder = build(cuts)
        states, _ = encoder.encode(item_ids, lengths)
        (states * torch.arange(states.numel()).view_as(states).cos()).sum().backward()
        outputs.append(states)
        gradients.append(encoder.item_embedding.weight.grad)
    for states, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.allclose(states, outputs[0], atol=1e-10)
        assert torch.allclose(gradient, gradients[0], atol=1e-10)
    assert gradients[0][0].abs().max() == 0


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec"])
def test_padded_rows_of_any_width_give_the_same_states(kind):
    torch.manual_seed(0)
    encoder = build() if kind == "sasrec" else GRU4RecEncoder(30, 12, 16).double().eval()
    item_ids, lengths = rows(lengths=(3, 6, 1))
    expected, _ = encoder.encode(item_ids, lengths)
    for width in (6, 9, 12):
        states = encoder(pad_left(item_ids, lengths, width), lengths)
        assert states.shape == (3, width, 16)
        assert torch.allclose(unpad_left(states, lengths), expected, atol=1e-10)
        assert states[0, : width - 3].abs().max() == 0


def test_official_padding_agrees_on_real_places_and_attends_to_the_whole_row_elsewhere():
    encoder = build()
    item_ids, lengths = rows(lengths=(4, 12))
    real, _ = encoder.encode(item_ids, lengths)
    full, _ = encoder.encode(item_ids, lengths, pad_rows="official")
    assert full.shape == (2, 12, 16)
    assert torch.allclose(unpad_left(full, lengths), real, atol=1e-10)
    item_ids[3] = item_ids[3] % 30 + 1  # the newest item of the first row
    changed, _ = encoder.encode(item_ids, lengths, pad_rows="official")
    assert (changed[0, 0] - full[0, 0]).abs().max() > 1e-6


def test_extra_ids_come_from_the_same_table_and_empty_rows_are_skipped():
    encoder = build()
    item_ids, lengths = rows(lengths=(2, 0, 3))
    states, vectors = encoder.encode(item_ids, lengths, torch.tensor([4, 9]))
    assert states.shape == (5, 16) and torch.equal(vectors, encoder.item_embedding.weight[[4, 9]])


def test_a_plan_gives_every_value_a_place_of_its_own_and_right_aligned_positions():
    lengths = torch.tensor([3, 12, 1, 5, 7, 2, 0, 4])
    plan = plan_buckets(lengths, 12, (2, 4, 8))
    assert len(plan.slots.unique()) == int(lengths.sum()) <= plan.size
    positions = [plan.positions[part].tolist() for part in plan.slots.split(lengths.tolist())]
    assert positions == [list(range(12 - n, 12)) for n in lengths.tolist()]
    with pytest.raises(ValueError, match="a row has 12 items, more than max_length=11"):
        plan_buckets(lengths, 11)


def test_jagged_rows_survive_padding_and_keep_their_newest_items():
    item_ids, lengths = rows()
    assert torch.equal(unpad_left(pad_left(item_ids, lengths, 15), lengths), item_ids)
    kept, kept_lengths = keep_last(item_ids, lengths, 4)
    expected = [row[-4:].tolist() for row in item_ids.split(lengths.tolist())]
    assert [row.tolist() for row in kept.split(kept_lengths.tolist())] == expected


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_has_its_rate_and_keeps_the_mean(p):
    torch.manual_seed(0)
    mask = dropout_mask(torch.Size([400_001]), p, torch.zeros(1))
    assert abs(float((mask == 0).float().mean()) - p) < 0.005
    assert abs(float(mask.mean()) - 1) < 0.01
    assert len(mask.unique()) == 2


def test_dropout_passes_gradients_through_kept_places_only_and_rests_in_evaluation():
    layer = FastDropout(0.5)
    x = torch.ones(1000, requires_grad=True)
    y = layer(x, torch.ones(1000))
    y.sum().backward()
    assert torch.equal(x.grad, (y - 1).detach())
    assert torch.equal(layer.eval()(x), x)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="hidden_size=10 is not a multiple of num_heads=4"):
        SASRecEncoder(5, hidden_size=10, num_heads=4)


def test_beauty_has_the_published_number_of_parameters_but_for_the_unused_mask_row():
    encoder = SASRecEncoder(12_101, 50, 128)
    assert sum(p.numel() for p in encoder.parameters()) == 1_820_800 - 128
