"""The two memories of the ECM: an emotion that is used up while it is said, and words that say it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.eacm.cells import input_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.eacm.lexicon import EmotionLexicon

log = logging.getLogger(__name__)


class InternalMemory(nn.Module):
    """A state of the emotion that each word reads, and uses up (ECM, internal memory).

    It begins with a vector of the emotion, `M_0 = e W_m`. Before a word the decoder reads `g_r * M` with
    `g_r = sigmoid(W_r [y; s; c])`, from the previous word, state and context; after it `M` becomes `g_w * M` with
    `g_w = sigmoid(W_w s)`. An emotion that has been said is gone: the squared norm of what is left at the end is a
    penalty.

    Args:
        num_emotions: Number of classes.
        memory_size: Size of the state.
        embedding_size: Of word vectors.
        hidden_size: Of the decoder's states.
    """

    def __init__(self, num_emotions: int, memory_size: int, embedding_size: int, hidden_size: int) -> None:
        super().__init__()
        self.emotions = nn.Linear(num_emotions, memory_size, bias=False)
        # Rows of unit size in the mean, as those of an embedding.
        nn.init.normal_(self.emotions.weight, std=memory_size**-0.5)
        self.read_word = nn.Linear(embedding_size, memory_size)
        self.read_state = nn.Linear(2 * hidden_size, memory_size, bias=False)
        self.write_gate = nn.Linear(hidden_size, memory_size)
        self.parts = input_parts(memory_size, hidden_size, bias=False)

    def begin(self, emotion: Tensor) -> Tensor:
        """The memory before the first word `(batch, memory_size)`, of a distribution `(batch, num_emotions)`."""
        memory: Tensor = self.emotions(emotion)
        return memory

    def words(self, vectors: Tensor) -> Tensor:
        """What previous words `(..., embedding_size)` add to the read gate's argument, `(..., memory_size)`."""
        gates: Tensor = self.read_word(vectors)
        return gates

    def read(self, words: Tensor, state: Tensor, context: Tensor, memory: Tensor) -> Tensor:
        """What the memory adds to the decoder's first layer.

        Args:
            words: `(batch, memory_size)` of `words`.
            state: `(batch, hidden_size)`, the previous one of the last layer.
            context: `(batch, hidden_size)`, the previous one.
            memory: `(batch, memory_size)`.

        Returns:
            `(batch, 3 * hidden_size)`.
        """
        gate = torch.sigmoid(words + self.read_state(torch.cat((state, context), dim=-1)))
        parts: Tensor = self.parts(gate * memory)
        return parts

    def write(self, state: Tensor, memory: Tensor) -> Tensor:
        """The memory after a word, `(batch, memory_size)`.

        Args:
            state: `(batch, hidden_size)`, the new one of the last layer.
            memory: `(batch, memory_size)`.
        """
        return torch.sigmoid(self.write_gate(state)) * memory


class ExternalMemory(nn.Module):
    """Words of emotions, and the choice between them and all others (ECM, external memory).

    With `a = sigmoid(v . s)` a word of the reply's emotion has the probability `a softmax(o)` over the words of that
    emotion, any other `(1 - a) softmax(o)` over the others: the generic words, and for a finite likelihood of every
    reply also the words of other emotions. Each row has the words of its own emotion. A row whose emotion has no words,
    or that has no emotion, has `a = 0`: the plain softmax.

    Args:
        num_emotions: Number of classes.
        vocab_size: Number of words of replies.
        hidden_size: Of the decoder's states.
    """

    emotion_words: Tensor

    def __init__(self, num_emotions: int, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.choice = nn.Linear(hidden_size, 1, bias=False)
        self.register_buffer("emotion_words", torch.zeros(num_emotions, vocab_size, dtype=torch.bool))

    @property
    def is_filled(self) -> bool:
        """Whether any emotion has words."""
        return bool(self.emotion_words.any())

    def fill(self, lexicon: EmotionLexicon, words: Sequence[str | None], first: int) -> None:
        """Take the words of each emotion; how many there are is logged.

        Args:
            lexicon: Words by class.
            words: The vocabulary by id.
            first: Id of the first ordinary word.

        Raises:
            ValueError: If the vocabulary has another size, or none of the words.
        """
        if len(words) > self.emotion_words.shape[1]:
            raise ValueError(f"the vocabulary has {len(words)} words, the model {self.emotion_words.shape[1]}")
        table = torch.zeros_like(self.emotion_words, device="cpu")
        for label in range(len(table)):
            own = lexicon.words_of(label)
            table[label, first : len(words)] = torch.tensor([word in own for word in words[first:]], dtype=torch.bool)
        counts = table.sum(1).tolist()
        if not sum(counts):
            raise ValueError("none of the emotions' words is in the vocabulary of the replies: give another lexicon")
        names = lexicon.label_names
        found = [f"{names[label]} {count} of {len(lexicon.words_of(label))}" for label, count in enumerate(counts)]
        log.info("emotion words in the vocabulary: %s", ", ".join(found))
        missing = [names[label] for label, count in enumerate(counts) if not count]
        if missing:
            log.info("%d emotions have no words, so that none is chosen: %s", len(missing), ", ".join(missing))
        self.emotion_words.copy_(table)

    def labels(self, emotion: Tensor) -> Tensor:
        """The class whose words a row has: the likeliest of its distribution, the first of equal ones; -1 for none.

        Args:
            emotion: `(batch, num_emotions)`.

        Returns:
            int64 `(batch,)`.
        """
        return torch.where(emotion.amax(-1) > 0, emotion.argmax(-1), -1)

    def own(self, labels: Tensor) -> Tensor:
        """Words of classes, bool `(batch, vocab_size)`; none for -1."""
        return self.emotion_words[labels.clamp(min=0)] & (labels >= 0)[:, None]

    def choices(self, states: Tensor) -> Tensor:
        """Log-odds of a word of the emotion, float32 `(...)`, from states of the last layer `(..., hidden_size)`."""
        out: Tensor = self.choice(states).squeeze(-1).float()
        return out

    def log_probabilities(self, logits: Tensor, states: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities of words, float32 `(batch, ..., vocab_size)`.

        Args:
            logits: `(batch, ..., vocab_size)`, the output layer's.
            states: `(batch, ..., hidden_size)`, those of the last layer.
            labels: int64 `(batch,)`, the class of each row, -1 for none.
        """
        between = (1,) * (logits.dim() - 2)
        own = self.own(labels)
        some = own.any(-1)
        own, some = own.view(len(own), *between, -1), some.view(-1, *between)
        logits = logits.float()
        odds = self.choices(states)
        rest = torch.where(some, F.logsigmoid(-odds), 0.0) - _log_total(logits, ~own)
        # Rows without words never use what is computed for them here: all words keep it finite, and its gradient.
        chosen = F.logsigmoid(odds) - _log_total(logits, own | ~some[..., None])
        return logits + torch.where(own, chosen[..., None], rest[..., None])

    def choice_losses(self, states: Tensor, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """How well the choice fits given words, `-log P(choice)`.

        Args:
            states: `(batch, length, hidden_size)`.
            tokens: int64 `(batch, length)`.
            labels: int64 `(batch,)`.

        Returns:
            float32 `(batch, length)`, and bool `(batch,)`: whether a row has a choice.
        """
        own = self.own(labels)
        target = own.gather(1, tokens).float()
        return F.binary_cross_entropy_with_logits(self.choices(states), target, reduction="none"), own.any(-1)


def _log_total(logits: Tensor, counted: Tensor) -> Tensor:
    return logits.masked_fill(~counted, -torch.inf).logsumexp(-1)
