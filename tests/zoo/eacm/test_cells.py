from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.eacm.attention import EmotionAttention
from zoo.eacm.cells import BiasedGRUCell, input_parts
from zoo.eacm.decoder import BLOCK, EmotionDecoder


def reference(cell: BiasedGRUCell, parts: Tensor, state: Tensor) -> Tensor:
    """The GRU of the spec, one row at a time."""
    size = cell.hidden_size
    out = []
    for x, s in zip(parts, state, strict=True):
        w_r, w_u = cell.gates.weight[:size], cell.gates.weight[size:]
        r = torch.sigmoid(x[:size] + w_r @ s)
        u = torch.sigmoid(x[size : 2 * size] + w_u @ s)
        if cell.kind == "ecm":
            k = torch.tanh(x[2 * size :] + cell.candidate.weight @ (r * s))
        else:
            k = torch.tanh(x[2 * size :] + r * (cell.candidate.weight @ s + cell.candidate.bias))
        out.append(u * s + (1 - u) * k)
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["ecm", "torch"])
def test_a_cell_is_the_equations_written_out(kind: str) -> None:
    cell = BiasedGRUCell(5, kind)
    parts, state = torch.randn(4, 15), torch.randn(4, 5)
    torch.testing.assert_close(cell(parts, state), reference(cell, parts, state))


def test_the_torch_cell_is_that_of_torch() -> None:
    cell, theirs = BiasedGRUCell(5, "torch"), torch.nn.GRUCell(3, 5)
    inputs = input_parts(3, 5)
    with torch.no_grad():
        theirs.weight_ih.copy_(inputs.weight)
        theirs.bias_ih.copy_(inputs.bias)
        theirs.weight_hh[:10].copy_(cell.gates.weight)
        theirs.weight_hh[10:].copy_(cell.candidate.weight)
        theirs.bias_hh.zero_()
        theirs.bias_hh[10:].copy_(cell.candidate.bias)
    x, state = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(cell(inputs(x), state), theirs(x, state))


def test_an_open_update_gate_keeps_the_old_state() -> None:
    cell = BiasedGRUCell(5)
    parts = torch.randn(4, 15)
    parts[:, 5:10] = 100
    state = torch.randn(4, 5)
    torch.testing.assert_close(cell(parts, state), state)


def test_gates_begin_open() -> None:
    layer = input_parts(3, 5)
    assert layer.bias[:10].eq(1).all()
    assert layer.bias[10:].eq(0).all()


def test_unknown_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="cell must be one of ecm, torch, got 'lstm'"):
        BiasedGRUCell(5, "lstm")


def test_attention_is_the_equation_with_the_emotion_after_each_state() -> None:
    attention = EmotionAttention(4, num_layers=2, emotion_size=3)
    memory, states, emotion = torch.randn(2, 5, 4), torch.randn(2, 2, 4), torch.randn(2, 3)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    context, weights = attention(states, memory, attention.keys(memory, emotion), mask)
    assert attention.emotion is not None
    half = attention.emotion.weight / 2
    # The published query is [s1; V; s2; V]: its matrix has two blocks for V, whose sum is what counts.
    u = torch.cat((attention.query.weight[:, :4], half, attention.query.weight[:, 4:], half), dim=1)
    for row in range(2):
        q = torch.cat((states[row, 0], emotion[row], states[row, 1], emotion[row]))
        scores = torch.stack(
            [attention.score.weight[0] @ torch.tanh(attention.memory(h) + u @ q) for h in memory[row, mask[row]]]
        )
        expected = scores.softmax(0)
        torch.testing.assert_close(weights[row, mask[row]], expected)
        torch.testing.assert_close(context[row], expected @ memory[row, mask[row]])
    assert weights[~mask].eq(0).all()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["ecm", "torch"])
def test_a_decoder_is_its_steps_with_one_projection_each(layers: int, cell: str) -> None:
    torch.manual_seed(0)
    decoder = EmotionDecoder(11, 6, 8, layers, emotion_size=3, cell=cell)
    memory, mask = torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([5, 3])[:, None]
    states, emotion, tokens = torch.randn(2, layers, 8), torch.randn(2, 3), torch.randint(0, 11, (2, 4))
    setting = decoder.setting(memory, mask, emotion)
    logits = decoder.logits(decoder(tokens, states, setting).outputs)
    context = decoder.first(states, setting)
    assert decoder.emotion_parts is not None
    for place in range(4):
        # [y; c] as one input, and the emotion's part beside the biases, as the spec has it.
        word = torch.cat((decoder.embedding(tokens[:, place]), context), dim=-1)
        weight = torch.cat((decoder.word_parts.weight, decoder.context_parts.weight), dim=1)
        parts = word @ weight.T + decoder.word_parts.bias + decoder.emotion_parts(emotion)
        new = []
        for layer, own in enumerate(decoder.cells):
            if layer:
                parts = decoder.layer_parts[layer - 1](new[-1])
            new.append(reference(own, parts, states[:, layer]))
        states = torch.stack(new, 1)
        context, _ = decoder.attention(states, memory, setting.keys, mask)
        now = decoder.vocabulary(decoder.readout(torch.cat((states[:, -1], context), -1)))
        torch.testing.assert_close(logits[:, place], now)


@pytest.mark.parametrize("biased", [True, False])
def test_replies_that_have_ended_take_no_part_and_change_nothing(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder, rows = EmotionDecoder(11, 6, 8, 2, emotion_size=3 if biased else 0), 2 * BLOCK + 3
    memory, post_mask = torch.randn(rows, 5, 8), torch.arange(5) < torch.randint(1, 6, (rows, 1))
    tokens, mask = torch.randint(0, 11, (rows, 7)), torch.arange(7) < torch.randint(1, 6, (rows, 1))
    mask[5] = torch.arange(7) < 6
    states, emotion = torch.randn(rows, 2, 8), torch.randn(rows, 3) if biased else None
    sizes = []
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda parts, *rest: sizes.append(len(parts)) or step(parts, *rest))
    found = []
    for given in (mask, None):
        decoder.zero_grad()
        inputs = [part.clone().requires_grad_() for part in (memory, states)]
        outputs, weights = decoder(tokens, inputs[1], decoder.setting(inputs[0], post_mask, emotion), given)
        (decoder.logits(outputs[mask]).square().sum() + (weights[mask] ** 2).sum()).backward()
        found.append([outputs[mask], weights[mask], *(one.grad for one in (*inputs, *decoder.parameters()))])
    assert sizes[0] == rows
    assert 0 < sizes[5] <= BLOCK
    assert sizes[6] == 0
    assert sizes[7:] == [rows] * 7
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
