"""TALLRec (Bao et al. 2023, arXiv 2305.00447): a decoder that is told what a user likes, and says Yes or No."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common.distributed import count_per_process
from zoo.common.schedules import WarmupLinear
from zoo.text_attack.answer_scores import answer_probability
from zoo.text_attack.language_models import build_decoder, num_tokens
from zoo.text_attack.lora import add_lora, export_adapter
from zoo.text_attack.pointwise import Block, PointwiseRec, PromptUsers
from zoo.text_attack.prefix_cache import (
    PrefixCache,
    positions,
    read_prefix,
    read_tails,
    read_whole,
    weight_version,
)
from zoo.text_attack.prompts import Prompt, alpaca_prompt, assemble, collm_prompt, prompt_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zoo.common.schedules import Schedule
    from zoo.text_attack.prefix_cache import Prefix
    from zoo.text_attack.types import RecBatch

LOSSES = ("all", "answer")


class DecoderRec(PointwiseRec):
    """A decoder that answers prompts; the base of `TALLRec` and `CoLLMRec`, whose arguments it takes.

    Args:
        prompt: The prompt.
        answers: What stands for yes and for no.
        backbone: See `TALLRec`.
        backbone_options: See `TALLRec`.
        lora: See `TALLRec`.
        adapter: See `TALLRec`.
        tokenizer: See `TALLRec`.
        vocab_size: See `TALLRec`.
        schedule: Factor of the learning rate at a step.
        use_prefix_cache: See `TALLRec`.
        cache_bytes: See `TALLRec`.
        extra_tokens: Special tokens that the tokenizer needs besides, and that vectors take the place of.
        **options: More of `PointwiseRec`.

    Raises:
        ValueError: If an argument is out of its range, or the backbone has fewer tokens than the tokenizer.
    """

    def __init__(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        backbone: str,
        backbone_options: dict[str, Any] | None,
        lora: dict[str, Any] | None,
        adapter: str | None,
        tokenizer: str | None,
        vocab_size: int,
        schedule: Schedule,
        use_prefix_cache: bool,
        cache_bytes: int,
        extra_tokens: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if tokenizer is None:
            tokenizer = "train" if backbone == "tiny" else backbone
        super().__init__(prompt, answers, tokenizer, vocab_size, schedule, extra_tokens=extra_tokens, **options)
        self.use_prefix_cache = use_prefix_cache
        self._cache = PrefixCache(cache_bytes)
        self._no_prefix = False
        size = vocab_size if tokenizer == "train" else len(self.tokenizer)
        network = build_decoder(backbone, backbone_options, size)
        self._check_size(network, tokenizer, size, backbone)
        self.has_lora = lora is not None or adapter is not None
        self.decoder = add_lora(network, lora or {}, adapter) if self.has_lora else network

    def _check_size(self, network: nn.Module, tokenizer: str, size: int, backbone: str) -> None:
        needed = size if tokenizer == "train" else max(
            index for token, index in self.tokenizer.get_vocab().items() if token not in self.extra_tokens
        ) + 1  # fmt: skip
        limit = getattr(network.config, "max_position_embeddings", None)
        if needed > num_tokens(network):
            raise ValueError(
                f"the tokenizer {tokenizer} has {needed} tokens, {backbone} has {num_tokens(network)}: give the one "
                "that belongs to it, or a smaller vocab_size"
            )
        if limit is not None and self.max_tokens > int(limit):
            raise ValueError(f"max_tokens is {self.max_tokens}, {backbone} takes {limit}: lower it")

    @property
    def network(self) -> nn.Module:
        """The decoder."""
        return self.decoder

    def export_adapter(self, folder: str | Path) -> Path:
        """Write the adapter in peft's format; raises ValueError if there is none."""
        return export_adapter(self.decoder, folder)

    def first_id(self) -> int | None:
        """The tokenizer's first token, where it has one."""
        first = self.tokenizer.bos_token_id
        return None if first is None else int(first)

    def read_titles(self) -> None:
        """Cut the catalogue's titles into pieces of the prompt."""
        super().read_titles()
        self._cache.clear()

    def inputs(self, ids: Tensor, user_ids: Tensor | None, item_ids: Tensor | None) -> dict[str, Tensor]:
        """What the decoder is given for tokens `(batch, length)` about users and items `(batch,)`."""
        return {"input_ids": ids}

    def probability(self, logits: Tensor) -> Tensor:
        """Probability of yes from logits `(..., vocabulary)`."""
        return answer_probability(logits, self.answers, self.double_softmax)

    def answer_logits(self, batch: RecBatch) -> Tensor:
        """Logits `(batch, vocabulary)` at the place of the answer, with gradients."""
        ids, mask = assemble(self.tables.table, self.training_pieces(batch), self.pad_id, left=True)
        return read_whole(self.decoder, self.inputs(ids, batch.user_ids, batch.item_ids), mask)

    def text_loss(self, batch: RecBatch, loss_on: str) -> Tensor:
        """Mean cross-entropy of the tokens of prompts and answers, or of the answers alone."""
        pieces = self.training_pieces(batch)
        tables = self.tables
        ending = tables.endings((batch.labels <= 0.5).long())
        ids, mask = assemble(tables.table, torch.cat((pieces, ending[:, None]), 1), self.pad_id, left=True)
        # Filled on the left, all answers end in the last column.
        keep = 0 if loss_on == "all" else max(map(len, self.endings())) + 1
        logits = self.decoder(
            **self.inputs(ids, batch.user_ids, batch.item_ids),
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
            logits_to_keep=keep,
        ).logits.float()
        # The first token follows none.
        counts = (mask[:, 1:] * mask[:, :-1]).bool()
        if loss_on == "answer":
            place = torch.arange(ids.shape[1] - 1, 0, -1, device=ids.device)
            counts = counts & (place <= tables.table.lengths[ending][:, None])
        labels = torch.where(counts, ids[:, 1:], -100)[:, -(logits.shape[1] - 1) :]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return losses / count_per_process((labels >= 0).sum()).clamp(min=1)

    def whole_block_scores(self, block: Block) -> Tensor:
        """Probabilities of yes, each prompt on its own."""
        users, items = block.tails.shape
        ids, mask = assemble(block.table, block.prompts(), self.pad_id, left=True)
        owners = block.users.user_ids[block.rows[block.part]].repeat_interleave(items)
        asked = None if block.item_ids is None else block.item_ids.flatten()
        return self.probability(read_whole(self.decoder, self.inputs(ids, owners, asked), mask)).view(users, items)

    def chunk_size(self, users: PromptUsers) -> int:
        """So many users that what the decoder keeps of their beginnings fits `cache_bytes`."""
        config: Any = self.decoder.config
        longest = int(users.tables.table.lengths_of(users.pieces).sum(1).max())
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = 2 * 4 * config.num_hidden_layers * heads * width * max(longest, 1)
        return max(1, min(self.score_batch, self._cache.max_bytes // int(each)))

    def block_scores(self, block: Block) -> Tensor:
        """Probabilities of yes; the users' beginnings are read once."""
        if not self.use_prefix_cache or self._no_prefix:
            return self.whole_block_scores(block)

        def read() -> Prefix | None:
            pieces = block.users.pieces[block.rows]
            ids, mask = assemble(block.table, pieces, self.pad_id, left=True)
            return read_prefix(self.decoder, self.inputs(ids, block.users.user_ids[block.rows], None), mask)

        prefix = self._cache.get(block.users, block.chunk, weight_version(self), read)
        if prefix is None:
            self._no_prefix = True
            return self.whole_block_scores(block)
        users, items = block.tails.shape
        ids, mask = assemble(block.table, block.tails.reshape(-1, 1), self.pad_id, left=True)
        asked = None if block.item_ids is None else block.item_ids.flatten()
        inputs = self.inputs(ids, None, asked)
        return self.probability(read_tails(self.decoder, prefix.users(block.part), inputs, mask)).view(users, items)


class TALLRec(DecoderRec):
    """TALLRec: likes and dislikes in words; the decoder is trained to answer, and asked for its first token.

    Args:
        backbone: "tiny" (a small Llama with fresh weights), or a folder or hub id of a causal language model.
        backbone_options: Of "tiny" (see `build_decoder`).
        prompt: "alpaca" or "collm" (without its features), or the attributes of a `Prompt`.
        noun: What the items are, such as "movie" or "book".
        answers: What stands for yes and for no.
        lora: `r`, `alpha`, `dropout` and `targets` of low-rank adapters, which alone are trained then; None trains
            all weights.
        adapter: Folder of an adapter in peft's format to begin with.
        loss_on: "all" tokens, as published, or the "answer" alone.
        double_softmax: Score as the published script does (see `answer_probability`).
        tokenizer: "train" for byte pairs learnt from the titles, or a folder or hub id; by default the backbone's,
            for "tiny" a learnt one.
        vocab_size: Most tokens of a learnt tokenizer.
        max_tokens: Most tokens of a prompt with its answer; histories are shortened to it, their oldest titles first.
        max_history: Most titles of a history.
        max_title_tokens: Most tokens of a title; the rest is cut off.
        score_batch: Prompts that go through the network at once where no gradient is needed.
        use_prefix_cache: Whether what comes before the title is read once for all titles.
        cache_bytes: Most memory of what is kept of it from call to call.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on vectors.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.

    Raises:
        FileNotFoundError: If a folder lacks files.
        ImportError: If transformers is missing, or peft with `lora`.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        backbone: str = "tiny",
        backbone_options: dict[str, Any] | None = None,
        prompt: str | dict[str, Any] = "alpaca",
        noun: str = "movie",
        answers: list[str] = ["Yes", "No"],  # noqa: B006 - a plain value, never changed
        lora: dict[str, Any] | None = None,
        adapter: str | None = None,
        loss_on: str = "all",
        double_softmax: bool = False,
        tokenizer: str | None = None,
        vocab_size: int = 2000,
        max_tokens: int = 512,
        max_history: int = 10,
        max_title_tokens: int = 32,
        score_batch: int = 256,
        use_prefix_cache: bool = True,
        cache_bytes: int = 2**30,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.05,
    ) -> None:
        if loss_on not in LOSSES:
            raise ValueError(f"loss_on must be one of {', '.join(LOSSES)}, got {loss_on!r}")
        known = {"alpaca": alpaca_prompt(noun), "collm": collm_prompt(noun, features=False)}
        chosen = prompt_of(prompt, known)
        if chosen.slots:
            raise ValueError(f"the prompt {chosen.name} has places for vectors, which TALLRec has not: use CoLLMRec")
        super().__init__(
            chosen, answers, backbone, backbone_options, lora, adapter, tokenizer, vocab_size,
            WarmupLinear(warmup_ratio), use_prefix_cache, cache_bytes, max_tokens=max_tokens, max_history=max_history,
            max_title_tokens=max_title_tokens, score_batch=score_batch, lr=lr, weight_decay=weight_decay,
            double_softmax=double_softmax,
        )  # fmt: skip
        self.save_hyperparameters()
        self.loss_on = loss_on

    def loss(self, batch: RecBatch) -> Tensor:
        """Mean cross-entropy of tokens."""
        return self.text_loss(batch, self.loss_on)
