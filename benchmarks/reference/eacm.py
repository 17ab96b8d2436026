"""The published EACM in plain form: beam search of one post, and a decoder that does all of a step's work in the step.

Besides, a GRU encoder-decoder of torch's own, without attention and emotion, as a measure of speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.eacm.cells import BiasedGRUCell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoo.eacm.decoder import EmotionDecoder


class PlainReply(NamedTuple):
    """A reply to one post.

    Attributes:
        tokens: Its words, and EOS if it ended.
        log_prob: Sum of their log-probabilities.
    """

    tokens: list[int]
    log_prob: float


def plain_beam(
    step: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
    state: dict[str, Tensor],
    *,
    go_id: int,
    eos_id: int,
    banned: Sequence[int],
    max_length: int,
    beam_size: int,
) -> PlainReply:
    """Beam search for one post (section 2.3 of the method); it ends when no hypothesis can beat the best reply.

    Args:
        step: Logits `(hypotheses, vocab_size)` and the new state, from the last words `(hypotheses,)` and the state.
        state: Before the first word, `(1, ...)` each.
        go_id: What every reply is begun with.
        eos_id: The end of a reply.
        banned: Words that are never said.
        max_length: Most words of a reply, EOS counted.
        beam_size: Hypotheses at a time.
    """
    going = [PlainReply([], 0.0)]
    best = PlainReply([], -float("inf"))
    words = torch.tensor([go_id])
    for length in range(1, max_length + 1):
        logits, state = step(words, state)
        log_probs = logits.log_softmax(-1)
        log_probs[:, list(banned)] = -float("inf")
        totals = log_probs + torch.tensor([one.log_prob for one in going])[:, None]
        values, places = totals.flatten().topk(beam_size)
        parents, next_going = list[int](), list[PlainReply]()
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            parent, word = divmod(place, totals.shape[1])
            reply = PlainReply([*going[parent].tokens, word], value)
            if word == eos_id or length == max_length:
                best = max(best, reply, key=lambda one: one.log_prob)
            else:
                parents.append(parent)
                next_going.append(reply)
        if not any(one.log_prob > best.log_prob for one in next_going):
            break
        going = next_going
        state = {name: value[parents] for name, value in state.items()}
        words = torch.tensor([one.tokens[-1] for one in going])
    return best


class PlainDecoder(nn.Module):
    """The weights of an `EmotionDecoder`, laid out and used as in the published code.

    In each step the word is looked up, `[word; context]` and the emotion are multiplied with the gates' weights, the
    whole query `[s^1; V_e; s^2; V_e]` with the attention's, and the word's logits and loss follow. Only the memory's
    part of the attention is there before the first step.

    Args:
        decoder: Whose weights are copied; with the cell "ecm", both emotion biases and without dropout.
    """

    def __init__(self, decoder: EmotionDecoder) -> None:
        super().__init__()
        attention, emotion_parts = decoder.attention, decoder.emotion_parts
        assert attention.emotion is not None
        assert emotion_parts is not None
        states = attention.query.weight.chunk(len(decoder.cells), dim=1)
        # The emotion stands in the query once a layer; ours has the sum of these products' weights.
        share = attention.emotion.weight / len(states)

        def own(*weights: Tensor) -> nn.Parameter:
            return nn.Parameter(torch.cat(weights, dim=1).detach().clone())

        self.embedding = own(decoder.embedding.weight)
        self.inputs = nn.ParameterList([own(decoder.word_parts.weight, decoder.context_parts.weight)])
        self.biases = nn.ParameterList([nn.Parameter(decoder.word_parts.bias.detach().clone())])
        for layer in decoder.layer_parts:
            assert isinstance(layer, nn.Linear)
            self.inputs.append(own(layer.weight))
            self.biases.append(nn.Parameter(layer.bias.detach().clone()))
        self.emotion = own(emotion_parts.weight)
        cells = [cell for cell in decoder.cells if isinstance(cell, BiasedGRUCell)]
        self.gates = nn.ParameterList(own(cell.gates.weight) for cell in cells)
        self.candidates = nn.ParameterList(own(cell.candidate.weight) for cell in cells)
        self.memory = own(attention.memory.weight)
        self.memory_bias = nn.Parameter(attention.memory.bias.detach().clone())
        self.query = own(*(part for state in states for part in (state, share)))
        self.score = own(attention.score.weight)
        self.readout = own(decoder.readout.weight)
        self.readout_bias = nn.Parameter(decoder.readout.bias.detach().clone())
        self.vocabulary = own(decoder.vocabulary.weight)
        self.vocabulary_bias = nn.Parameter(decoder.vocabulary.bias.detach().clone())

    def attend(self, states: Sequence[Tensor], emotion: Tensor, memory: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """The context `(batch, hidden_size)`; see `nll`, with states `(batch, hidden_size)` of each layer."""
        query = F.linear(torch.cat([part for state in states for part in (state, emotion)], dim=1), self.query)
        scores = F.linear(torch.tanh(keys + query[:, None]), self.score).squeeze(-1)
        weights = scores.masked_fill(~mask, -float("inf")).softmax(-1)
        return (weights[..., None] * memory).sum(1)

    def cell(self, layer: int, value: Tensor, state: Tensor, shift: Tensor | None) -> Tensor:
        """A GRU cell's new state `(batch, hidden_size)` from its input and what the emotion adds to its gates."""
        parts = F.linear(value, self.inputs[layer], self.biases[layer])
        if shift is not None:
            parts = parts + shift
        of_gates, of_candidate = torch.split(parts, [2 * state.shape[1], state.shape[1]], dim=1)
        reset, update = torch.sigmoid(of_gates + F.linear(state, self.gates[layer])).chunk(2, dim=1)
        candidate = torch.tanh(of_candidate + F.linear(reset * state, self.candidates[layer]))
        return update * state + (1 - update) * candidate

    def nll(
        self,
        tokens: Tensor,
        labels: Tensor,
        reply_mask: Tensor,
        states: Tensor,
        emotion: Tensor,
        memory: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Negative log-likelihood of replies `(batch,)`, a word at a time.

        Args:
            tokens: int64 `(batch, reply length)`, GO first.
            labels: int64 `(batch, reply length)`.
            reply_mask: bool `(batch, reply length)`.
            states: `(batch, num_layers, hidden_size)`.
            emotion: `(batch, emotion_size)`.
            memory: `(batch, length, hidden_size)`.
            mask: bool `(batch, length)`.
        """
        keys = F.linear(memory, self.memory, self.memory_bias)
        now = list(states.unbind(1))
        context = self.attend(now, emotion, memory, keys, mask)
        losses = []
        for token, label, counted in zip(tokens.unbind(1), labels.unbind(1), reply_mask.unbind(1), strict=True):
            value = torch.cat([F.embedding(token, self.embedding), context], dim=1)
            for layer, state in enumerate(now):
                shift = None if layer else F.linear(emotion, self.emotion)
                now[layer] = value = self.cell(layer, value, state, shift)
            context = self.attend(now, emotion, memory, keys, mask)
            output = F.linear(torch.cat([now[-1], context], dim=1), self.readout, self.readout_bias)
            logits = F.linear(output, self.vocabulary, self.vocabulary_bias)
            losses.append(F.cross_entropy(logits, label, reduction="none") * counted)
        return torch.stack(losses, dim=1).sum(1)


class PlainSeq2Seq(nn.Module):
    """An encoder and a decoder of `nn.GRU`, and an output layer: no attention, no emotion.

    Args:
        vocab_size: Words of posts, and of replies.
        embedding_size: Size of word vectors.
        hidden_size: Size of all states.
        num_layers: Layers of each.
    """

    def __init__(self, vocab_size: int, embedding_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.post_embedding = nn.Embedding(vocab_size, embedding_size)
        self.reply_embedding = nn.Embedding(vocab_size, embedding_size)
        self.encoder = nn.GRU(embedding_size, hidden_size, num_layers, batch_first=True)
        self.decoder = nn.GRU(embedding_size, hidden_size, num_layers, batch_first=True)
        self.vocabulary = nn.Linear(hidden_size, vocab_size)

    def forward(self, post_ids: Tensor, tokens: Tensor) -> Tensor:
        """Logits `(batch, reply length, vocab_size)` from posts and replies, int64 `(batch, length)` each."""
        _, state = self.encoder(self.post_embedding(post_ids))
        states, _ = self.decoder(self.reply_embedding(tokens), state)
        logits: Tensor = self.vocabulary(states)
        return logits

    def loss(self, post_ids: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of `labels` int64 `(batch, reply length)`."""
        return F.cross_entropy(self(post_ids, tokens).flatten(0, 1), labels.flatten())
