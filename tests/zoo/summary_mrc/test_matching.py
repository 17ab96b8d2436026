"""Matchers against their equations written as loops, and what must not matter to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from zoo.summary_mrc.matching import KINDS, SummaryMatcher

ATTENDING = ("comatch", "duma")
WIDTH = 8


def matcher(kind, width=WIDTH, **sizes):
    torch.manual_seed(0)
    network = SummaryMatcher(kind, width, **sizes).double()
    with torch.no_grad():
        # far from the initial values, so that attention is uneven and no bias is zero
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return network


def texts(options=3, passages=2, summary_length=4, passage_length=7, width=WIDTH):
    """States and masks with holes; the first summary and the last passage have no padding."""
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    summary = torch.randn(passages * options, summary_length, width, **draw)
    passage = torch.randn(passages, passage_length, width, **draw)
    summary_mask = torch.rand(summary.shape[:2], **draw) < 0.6
    passage_mask = torch.rand(passage.shape[:2], **draw) < 0.6
    summary_mask[:, 1:2] = passage_mask[:, 3:4] = True
    summary_mask[0] = passage_mask[-1] = True
    return summary, summary_mask, passage, passage_mask


def shown(network, inputs):
    return network(*inputs, first=inputs[0][:, 0])


def literal_comatch(network, summary, passage):
    """Steps 1 to 5 for one pair without padding, token by token."""
    parts = network.two_way
    align, width = parts.align.weight.T, summary.shape[-1]
    alignment = torch.stack([torch.stack([s @ align @ p for p in passage]) for s in summary]) / math.sqrt(width)

    def compared(side, own, other, scores):
        tokens = []
        for token, row in zip(own, scores, strict=True):
            weights = row.exp() / row.exp().sum()
            found = sum(weight * state for weight, state in zip(weights, other, strict=True))
            joined = torch.cat([token, found, token - found, token * found])
            tokens.append(layer_norm(side.linear(joined), (parts.out_dim,), side.norm.weight, side.norm.bias).relu())
        return torch.stack(tokens).max(0).values

    from_summary = compared(parts.compare_summary, summary, passage, alignment)
    from_passage = compared(parts.compare_passage, passage, summary, alignment.T)
    gate = parts.gate(torch.cat([from_summary, from_passage])).sigmoid()
    return gate * from_summary + (1 - gate) * from_passage


def literal_duma(network, summary, passage):
    """Both directions of the shared block for one pair without padding, head by head."""
    parts, width = network.two_way, summary.shape[-1]
    size = width // parts.num_heads

    def side(own, other):
        tokens = []
        for token in own:
            mixed = []
            for head in range(parts.num_heads):
                cut = slice(head * size, (head + 1) * size)
                query = parts.query(token)[cut]
                weights = torch.stack([query @ parts.key(state)[cut] / math.sqrt(size) for state in other]).softmax(0)
                mixed.append(sum(w * parts.value(state)[cut] for w, state in zip(weights, other, strict=True)))
            total = token + parts.output(torch.cat(mixed))
            tokens.append(layer_norm(total, (width,), parts.norm.weight, parts.norm.bias))
        return torch.stack(tokens).mean(0)

    return torch.cat([side(summary, passage), side(passage, summary)])


@pytest.mark.parametrize(
    ("literal", "kind", "sizes"),
    [
        (literal_comatch, "comatch", {}),
        (literal_comatch, "comatch", {"match_dim": 5}),
        (literal_duma, "duma", {"num_heads": 2}),
    ],
)
def test_result_is_that_of_the_equations_on_real_tokens_only(literal, kind, sizes):
    network, inputs = matcher(kind, **sizes), texts()
    summary, summary_mask, passage, passage_mask = inputs
    result = network(*inputs)
    assert result.shape == (6, network.out_dim)
    for row in range(6):
        own, other = summary[row][summary_mask[row]], passage[row // 3][passage_mask[row // 3]]
        assert torch.allclose(result[row], literal(network, own, other), atol=1e-12)


def test_without_matching_the_result_is_a_dense_first_state_or_a_mean():
    summary, summary_mask, passage, passage_mask = texts()
    network, first = matcher("cls"), summary[:, 0]
    dense = network.first_state.dense
    assert torch.allclose(network(summary, summary_mask, first=first), (first @ dense.weight.T + dense.bias).tanh())
    means = torch.stack([states[mask].mean(0) for states, mask in zip(summary, summary_mask, strict=True)])
    for rest in ((), (passage, torch.zeros_like(passage_mask))):
        assert torch.allclose(matcher("mean")(summary, summary_mask, *rest), means)


def test_one_token_on_each_side_finds_the_other_and_a_zero_gate_takes_the_mean():
    network = matcher("comatch")
    parts = network.two_way
    summary, _, passage, _ = texts(options=1, summary_length=1, passage_length=1)
    mask = torch.ones(2, 1, dtype=torch.bool)
    torch.nn.init.zeros_(parts.gate.weight)
    torch.nn.init.zeros_(parts.gate.bias)
    assert (network.attention(summary, mask, passage, mask) == 1).all()
    sides = []
    for side, h, m in ((parts.compare_summary, summary, passage), (parts.compare_passage, passage, summary)):
        joined = side.linear(torch.cat([h, m, h - m, h * m], -1))
        sides.append(layer_norm(joined, (WIDTH,), side.norm.weight, side.norm.bias).relu()[:, 0])
    assert torch.allclose(network(summary, mask, passage, mask), (sides[0] + sides[1]) / 2, atol=1e-12)


def spans(summary_mask):
    """Some real tokens of each summary: the last one, and every other one before it."""
    last = summary_mask.flip(1).cumsum(1).flip(1)
    return summary_mask & (last % 2 == 1)


def span_tail(network, inputs, span):
    return network(*inputs, span=span)[:, network.out_dim :]


@pytest.mark.parametrize(
    ("kind", "sizes"), [("comatch", {}), ("comatch", {"match_dim": 5}), ("duma", {"num_heads": 2})]
)
def test_a_span_adds_the_mean_of_what_its_own_tokens_found(kind, sizes):
    network, inputs = matcher(kind, **sizes), texts()
    summary, summary_mask, passage, passage_mask = inputs
    span, parts = spans(summary_mask), network.two_way
    result = network(*inputs, span=span)
    assert result.shape == (6, network.out_dim + network.span_dim)
    assert torch.equal(result[:, : network.out_dim], network(*inputs))
    for row in range(6):
        other, tokens = passage[row // 3][passage_mask[row // 3]], []
        for token in summary[row][span[row]]:
            if kind == "comatch":
                found = (token @ parts.align.weight.T @ other.T / math.sqrt(WIDTH)).softmax(-1) @ other
                side = parts.compare_summary
                joined = side.linear(torch.cat([token, found, token - found, token * found]))
                tokens.append(layer_norm(joined, (parts.out_dim,), side.norm.weight, side.norm.bias).relu())
            else:
                # One token beside itself has the mean over one token on its side.
                tokens.append(literal_duma(network, token[None], other)[:WIDTH])
        expected = torch.stack(tokens).mean(0)
        assert torch.allclose(result[row, network.out_dim :], expected, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENDING)
def test_masked_places_and_other_tokens_have_no_effect_on_a_span(kind):
    network, (summary, summary_mask, passage, passage_mask) = matcher(kind), texts()
    span = spans(summary_mask)
    expected = span_tail(network, (summary, summary_mask, passage, passage_mask), span)
    outside = summary.masked_fill(~span[..., None], 50.0), summary_mask
    hidden = passage.masked_fill(~passage_mask[..., None], -50.0), passage_mask
    assert torch.allclose(span_tail(network, (*outside, *hidden), span), expected, atol=1e-12)
    pad = torch.nn.functional.pad
    wide = (pad(outside[0], (0, 0, 0, 3), value=9.0), pad(summary_mask, (0, 3)), *hidden)
    assert torch.allclose(span_tail(network, wide, pad(span, (0, 3))), expected, atol=1e-12)
    changed = summary.masked_fill(span[..., None], 50.0)
    assert not torch.allclose(span_tail(network, (changed, *outside[1:], *hidden), span), expected)


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_span_of_a_shared_passage_equals_that_of_copies_and_trains_its_tokens_only(kind):
    network, (summary, summary_mask, passage, passage_mask) = matcher(kind), texts()
    span, summary = spans(summary_mask), summary.requires_grad_()
    once = span_tail(network, (summary, summary_mask, passage, passage_mask), span)
    copies = (summary, summary_mask, passage.repeat_interleave(3, 0), passage_mask.repeat_interleave(3, 0))
    assert torch.allclose(once, span_tail(network, copies, span), atol=1e-12)
    once.square().sum().backward()
    assert torch.equal(summary.grad.abs().sum(-1) > 0, span)


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_a_span_changes_nothing_where_nothing_is_matched(kind):
    network, inputs = matcher(kind), texts()
    first = inputs[0][:, 0]
    assert torch.equal(network(*inputs, first=first, span=spans(inputs[1])), network(*inputs, first=first))
    assert network.span_dim == 0


def test_equal_tokens_attend_to_each_other_before_any_training():
    tokens = layer_norm(torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0)), (64,))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 12, dtype=torch.bool)
    weights = SummaryMatcher("comatch", 64).attention(tokens[:, order[:5]], mask[:, :5], tokens, mask)
    assert torch.equal(weights[0].argmax(-1), order[:5]) and weights[0].amax(-1).min() > 0.9


@pytest.mark.parametrize("kind", ATTENDING)
def test_attention_is_a_distribution_over_real_passage_tokens(kind):
    network, inputs = matcher(kind), texts()
    summary, summary_mask, passage, passage_mask = inputs
    weights = network.attention(*inputs)
    assert weights.shape == (6, 4, 7)
    assert (weights.movedim(2, 1)[~passage_mask.repeat_interleave(3, 0)] == 0).all()
    assert (weights[~summary_mask] == 0).all()
    assert torch.allclose(weights.sum(-1)[summary_mask], torch.ones((), dtype=weights.dtype))
    row, token = 4, 1
    other = passage[1][passage_mask[1]]
    if kind == "comatch":
        expected = (summary[row, token] @ network.two_way.align.weight.T @ other.T / math.sqrt(WIDTH)).softmax(-1)
    else:
        query, keys = network.two_way.query(summary[row, token]), network.two_way.key(other)
        expected = (keys @ query / math.sqrt(WIDTH)).softmax(-1)
    assert torch.allclose(weights[row, token][passage_mask[1]], expected, atol=1e-12)


def test_attention_of_several_heads_is_their_mean():
    network, (summary, summary_mask, passage, passage_mask) = matcher("duma", num_heads=4), texts()
    query, key = network.two_way.query(summary[0]), network.two_way.key(passage[0][passage_mask[0]])
    heads = [(query[:, cut : cut + 2] @ key[:, cut : cut + 2].T / math.sqrt(2)).softmax(-1) for cut in (0, 2, 4, 6)]
    weights = network.attention(summary, summary_mask, passage, passage_mask)[0][:, passage_mask[0]]
    assert torch.allclose(weights, sum(heads) / 4, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_result_nor_gradients(kind):
    network, (summary, summary_mask, passage, passage_mask) = matcher(kind), texts()
    outcomes = []
    for extra in (0, 5):
        states = [summary.clone(), passage.clone()]
        masks = [summary_mask, passage_mask]
        for i in range(2):
            garbage = torch.randn(len(states[i]), extra, WIDTH, dtype=torch.float64) * 100
            hidden = ~masks[i][..., None]
            hidden[:, 0] = False  # "cls" reads the first state
            states[i] = torch.cat([states[i].masked_fill(hidden, -7.0 * extra), garbage], 1).requires_grad_()
            masks[i] = torch.nn.functional.pad(masks[i], (0, extra))
        network.zero_grad()
        result = shown(network, (states[0], masks[0], states[1], masks[1]))
        (result * torch.arange(result.numel()).view_as(result).cos()).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        if states[1].grad is not None:
            assert (states[1].grad[~masks[1]] == 0).all()
            gradients.append(states[1].grad[:, :7])
        outcomes.append([result, states[0].grad[:, :4], *gradients])
    for short, padded in zip(*outcomes, strict=True):
        assert torch.allclose(short, padded, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_passage_shared_by_its_options_equals_one_copy_for_each(kind):
    network, (summary, summary_mask, passage, passage_mask) = matcher(kind), texts()
    shared, copies = passage.clone().requires_grad_(), passage.repeat_interleave(3, 0).requires_grad_()
    once = network(summary, summary_mask, shared, passage_mask)
    each = network(summary, summary_mask, copies, passage_mask.repeat_interleave(3, 0))
    assert torch.allclose(once, each, atol=1e-12)
    for result in (once, each):
        result.square().sum().backward()
    assert torch.allclose(shared.grad, copies.grad.view(2, 3, 7, WIDTH).sum(1), atol=1e-12)


def test_a_shared_passage_costs_one_product_per_option_and_token_in_place_of_four():
    network, options, tokens, words, width = SummaryMatcher("comatch", 64), 5, 60, 6, 64
    summary, passage = torch.randn(options, words, width), torch.randn(1, tokens, width)
    masks = torch.ones(options, words, dtype=torch.bool), torch.ones(1, tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(summary, masks[0], passage, masks[1])
    square, pairs = width * width, options * tokens * words * width
    of_passage = tokens * square + options * tokens * square
    of_summary = options * words * square * 5  # alignment, three terms of the summary's side, one of the passage's
    of_attention = 2 * pairs + 2 * pairs
    assert counter.get_total_flops() == 2 * (of_passage + of_summary + of_attention + options * 2 * square)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_options_and_of_tokens_does_not_matter(kind):
    network, inputs = matcher(kind), texts()
    summary, summary_mask, passage, passage_mask = inputs
    first, order = summary[:, 0], torch.tensor([2, 0, 1, 4, 3, 5])
    result = network(*inputs, first=first)
    options = network(summary[order], summary_mask[order], passage, passage_mask, first=first[order])
    assert torch.allclose(options, result[order], atol=1e-12)
    tokens = network(summary.flip(1), summary_mask.flip(1), passage.roll(2, 1), passage_mask.roll(2, 1), first=first)
    assert torch.allclose(tokens, result, atol=1e-12)


@pytest.mark.parametrize("kind", ATTENDING)
def test_gradients_are_those_of_finite_differences(kind):
    network = matcher(kind, width=4)
    summary, summary_mask, passage, passage_mask = texts(options=2, summary_length=2, passage_length=4, width=4)
    names = [name for name, _ in network.named_parameters()]

    def run(summary, passage, *values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(network, weights, (summary, summary_mask, passage, passage_mask))

    values = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    assert torch.autograd.gradcheck(run, (summary.requires_grad_(), passage.requires_grad_(), *values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "weights"])
def test_bfloat16_gives_nearly_the_float32_result(kind, whole):
    network, inputs = matcher(kind).float(), [x.float() if x.is_floating_point() else x for x in texts()]
    inputs[0].requires_grad_()
    exact = shown(network, inputs).detach()
    if whole:
        inputs = [x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x for x in inputs]
        result = shown(network.bfloat16(), inputs)
        assert result.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", torch.bfloat16):
            result = shown(network, inputs)
        if kind in ATTENDING:
            assert result.dtype == torch.float32
    result.float().square().sum().backward()
    assert all(values.grad.isfinite().all() for values in (inputs[0], *network.parameters()))
    assert (result.float() - exact).abs().max() < 0.06 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_result_has_the_stated_width_and_every_weight_a_gradient(kind):
    network, inputs = matcher(kind), texts()
    inputs[0].requires_grad_()
    result = shown(network, inputs)
    assert result.shape == (6, network.out_dim)
    result.square().sum().backward()
    assert all(values.grad.abs().sum() > 0 for values in (inputs[0], *network.parameters()))


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (64, 1), (128, 2), (200, 2), (768, 12), (4096, 64)])
def test_heads_are_about_64_wide_unless_given(width, heads):
    with torch.device("meta"):
        assert SummaryMatcher("duma", width).two_way.num_heads == heads


@pytest.mark.parametrize("kind", [*ATTENDING, "mean"])
def test_a_summary_without_tokens_is_refused_by_its_row(kind):
    network, (summary, summary_mask, passage, passage_mask) = matcher(kind), texts()
    summary_mask[4] = False
    with pytest.raises(ValueError, match=r"summary_mask keeps no token in 1 of 6 rows \(row 4\)"):
        network(summary, summary_mask, passage, passage_mask)


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_passage_without_tokens_is_refused_by_its_row(kind):
    network, (summary, summary_mask, passage, passage_mask) = matcher(kind), texts()
    passage_mask[1] = False
    for call in (network, network.attention):
        with pytest.raises(ValueError, match=r"passage_mask keeps no token in 1 of 2 rows \(row 1\)"):
            call(summary, summary_mask, passage, passage_mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dual"}, "comatch, duma, cls, mean, got 'dual'"),
        ({"kind": "duma", "match_dim": 4}, "match_dim is for matcher 'comatch' only"),
        ({"kind": "comatch", "num_heads": 2}, "num_heads is for matcher 'duma' only"),
        ({"kind": "comatch", "match_dim": 0}, "match_dim must be at least 1, got 0"),
        ({"kind": "duma", "num_heads": 3}, r"num_heads must divide hidden_size \(8\), got 3"),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SummaryMatcher(hidden_size=WIDTH, **options)


def test_inputs_that_do_not_fit_are_refused():
    network, (summary, summary_mask, passage, passage_mask) = matcher("comatch"), texts()
    for inputs, message in (
        ((summary, summary_mask), "needs a passage"),
        ((summary[:5], summary_mask[:5], passage, passage_mask), "multiple of passage's 2, got 5"),
        ((summary[..., :3], summary_mask, passage, passage_mask), r"summary must have shape \(rows, length, 8\)"),
        ((summary, summary_mask.long(), passage, passage_mask), r"summary_mask must be bool .* got torch.int64"),
        ((summary, summary_mask, passage, passage_mask[:, :2]), r"passage_mask must be bool of shape \(2, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network(*inputs)
    with pytest.raises(ValueError, match="needs first="):
        matcher("cls")(summary, summary_mask, passage, passage_mask)
    with pytest.raises(ValueError, match="no attention to show"):
        matcher("mean").attention(summary, summary_mask, passage, passage_mask)
