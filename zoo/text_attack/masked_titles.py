"""Masked language modelling on item sequences: whole words of titles are hidden and predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.text_attack.tokenizers import word_start_ids

if TYPE_CHECKING:
    from zoo.text_attack.recformer import ItemSequence, RecFormer


class MaskedTitles(nn.Module):
    """Cross-entropy of hidden pieces, the output layer tied to the word embedding.

    Args:
        network: Reads the sequences; shared with the recommender, and not registered here.
        probability: Share of words that are hidden: 80 % by the mask token, 10 % by a random piece, 10 % by themselves.

    Raises:
        ValueError: If the probability is not between 0 and 1.
    """

    def __init__(self, network: RecFormer, probability: float = 0.15) -> None:
        super().__init__()
        if not 0 < probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, got {probability}")
        self.probability = probability
        size = network.hidden_size
        self.transform = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size))
        # In a tuple it is no submodule: its weights are those of the recommender.
        self._network = (network,)
        self._starts: Tensor | None = None
        self._tokenizer: Any = None

    def forward(self, sequence: ItemSequence, tokenizer: Any) -> Tensor:
        """The loss of a batch of sequences; 0 if no word was drawn."""
        network = self._network[0]
        hidden, chosen = self.hide(sequence, tokenizer)
        states = self.transform(network(hidden, all_states=True)[chosen])
        logits = states @ network.encoder.get_input_embeddings().weight.T
        # A sum over a clamped count: a batch without hidden words has the loss 0, and gradients of zero.
        total = F.cross_entropy(logits.float(), sequence.input_ids[chosen], reduction="sum")
        return total / chosen.sum().clamp(min=1)

    def hide(self, sequence: ItemSequence, tokenizer: Any) -> tuple[ItemSequence, Tensor]:
        """Hide whole words of attribute values.

        Returns:
            The sequences with pieces replaced, and bool `(batch, length)`: which pieces are to be predicted.
        """
        ids = sequence.input_ids
        if self._starts is None or self._starts.device != ids.device or self._tokenizer is not tokenizer:
            size = self._network[0].encoder.get_input_embeddings().num_embeddings
            self._starts = torch.zeros(size, dtype=torch.bool, device=ids.device)
            self._starts[word_start_ids(tokenizer)] = True
            self._tokenizer = tokenizer
        value = sequence.token_type_ids == 2
        # A word goes from a piece that starts one (or the first piece of a value) to the next such piece.
        before = F.pad(value[:, :-1], (1, 0))
        word = (self._starts[ids] | ~before | ~value).cumsum(1)
        drawn = torch.rand(ids.shape, device=ids.device) < self.probability
        chosen = drawn.gather(1, (word - 1).clamp(min=0)) & value
        how = torch.rand(ids.shape, device=ids.device)
        other = torch.randint(5, len(self._starts), ids.shape, device=ids.device)
        replaced = torch.where(how < 0.8, torch.full_like(ids, int(tokenizer.mask_token_id)), ids)
        replaced = torch.where(how > 0.9, other, replaced)
        return sequence._replace(input_ids=torch.where(chosen, replaced, ids)), chosen
