"""Options scored by a masked language model at mask tokens in the question's slot."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from zoo.summary_mrc.encoders import type_arguments
from zoo.summary_mrc.masked import at_least_float32


class MaskedSlotScorer(nn.Module):
    """Mean log-probability of an option's tokens at the mask tokens that stand for it.

    score_i = 1 / n_i * sum_j log p(o_ij | passage, question with n_i mask tokens in the slot), with o_i1 .. o_in the
    tokens of option i. With one mask token for all options, only the first token of each is scored.

    The language model's head runs at the mask tokens only, and in float32 under autocast: in bfloat16, logits of
    different options often are the same number.

    Args:
        network: A network of transformers with a masked language model's head, as `build_text_encoder` makes it with
            `head="masked_lm"`.

    Raises:
        ValueError: If the network has no such head.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        find: Any = getattr(network, "get_output_embeddings", lambda: None)
        if find() is None:
            raise ValueError(
                f"{type(network).__name__} has no masked language model's head: build it with head='masked_lm'"
            )
        self.network = network

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None,
        mask_index: Tensor,
        sequence_of: Tensor,
        option_ids: Tensor,
    ) -> Tensor:
        """Scores of the options.

        Args:
            input_ids: int64 `(sequences, length)`.
            attention_mask: int64 `(sequences, length)`, 1 for tokens.
            token_type_ids: int64 `(sequences, length)`; left out where the network has one type.
            mask_index: int64 `(sequences, pieces)`, places of the mask tokens; any place where there is none.
            sequence_of: int64 `(batch, options)`, the sequence that scores an option.
            option_ids: int64 `(batch, options, pieces)`, tokens of an option, at least one, and -100 after them.

        Returns:
            float32 `(batch, options)`, at most 0.
        """
        logits = self.logits(input_ids, attention_mask, token_type_ids, mask_index)
        pieces = torch.arange(option_ids.shape[-1], device=option_ids.device)
        # The whole distributions stay one per sequence; only single logits are picked per option.
        picked = logits[sequence_of[..., None], pieces, option_ids.clamp(min=0)]
        log_probabilities = picked - logits.logsumexp(-1)[sequence_of]
        kept = option_ids >= 0
        return log_probabilities.masked_fill(~kept, 0).sum(-1) / kept.sum(-1)

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None, mask_index: Tensor
    ) -> Tensor:
        """Logits `(sequences, pieces, vocabulary)` at the places `mask_index`, in float32 at least."""
        network: Any = self.network
        with ExitStack() as head:

            def keep_masks(base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                states = output.last_hidden_state
                places = mask_index[..., None].expand(-1, -1, states.shape[-1])
                output.last_hidden_state = states.gather(1, places).to(network.dtype)
                head.enter_context(torch.autocast(states.device.type, enabled=False))
                return output

            # Whatever the network does after its base is its head: the hook needs to know nothing of it.
            head.enter_context(network.base_model.register_forward_hook(keep_masks))
            types = type_arguments(network, token_type_ids)
            logits: Tensor = network(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return at_least_float32(logits)
