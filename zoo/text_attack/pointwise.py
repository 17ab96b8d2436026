"""What the victims share that are asked about one user and one item: prompts, blocks of scores, metrics."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from zoo.common.evaluation import evaluation
from zoo.common.predictions import external_labels
from zoo.text_attack.answer_scores import Answers, answer_tokens
from zoo.text_attack.pair_metrics import PairMetrics
from zoo.text_attack.prompt_tables import PromptTables
from zoo.text_attack.victim import TextRecVictim, decay_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchmetrics import Metric

    from zoo.common.schedules import Schedule
    from zoo.text_attack.prompts import Prompt, TokenTable
    from zoo.text_attack.types import RecBatch

log = logging.getLogger(__name__)


@dataclass(eq=False)
class PromptUsers:
    """Users as beginnings of prompts.

    Attributes:
        tables: What their prompts are gathered from.
        user_ids: int64 `(users,)`.
        pieces: int64 `(users, pieces)`, rows of the table of tokens.
        order: int64 `(users,)`: the users by length, so that those of a chunk are alike.
    """

    tables: PromptTables
    user_ids: Tensor
    pieces: Tensor
    order: Tensor


class Block(NamedTuple):
    """Some users and some items, each user with each.

    Attributes:
        users: All users.
        chunk: Number of the chunk that the block's users are in.
        rows: int64, users of that chunk.
        part: Which of `rows` the block's users are.
        tails: int64 `(users, items)`, pieces of the questions.
        table: Tokens of all pieces.
        item_ids: int64 `(users, items)`, or None if they are not known.
    """

    users: PromptUsers
    chunk: int
    rows: Tensor
    part: slice
    tails: Tensor
    table: TokenTable
    item_ids: Tensor | None

    def prompts(self) -> Tensor:
        """Pieces `(users * items, pieces)` of whole prompts."""
        users, items = self.tails.shape
        prefixes = self.users.pieces[self.rows[self.part]].repeat_interleave(items, 0)
        return torch.cat((prefixes, self.tails.reshape(users * items, 1)), dim=1)


class PointwiseRec(TextRecVictim):
    """A recommender that is asked about a user and an item in words, and answers yes or no.

    A subclass has `loss`, `block_scores` and `network`.

    Args:
        prompt: The prompt.
        answers: What stands for yes and for no.
        tokenizer: See `TextRecVictim`.
        vocab_size: See `TextRecVictim`.
        schedule: See `TextRecVictim`.
        max_tokens: Most tokens of a prompt; histories are shortened to it, their oldest titles first.
        max_history: Most titles of a history.
        max_title_tokens: Most tokens of a title; the rest is cut off.
        score_batch: Prompts that go through the network at once where no gradient is needed.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on vectors.
        double_softmax: See `answer_probability`.
        extra_tokens: Special tokens that the tokenizer needs besides.

    Raises:
        ValueError: If an argument is out of its range.
    """

    kind = "pointwise"
    monitor = "val/auc"

    def __init__(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        tokenizer: str,
        vocab_size: int,
        schedule: Schedule,
        max_tokens: int,
        max_history: int,
        max_title_tokens: int,
        score_batch: int,
        lr: float,
        weight_decay: float,
        double_softmax: bool = False,
        extra_tokens: Sequence[str] = (),
    ) -> None:
        if len(answers) != 2:
            raise ValueError(f"answers must be two, for yes and for no, got {list(answers)}")
        counts = {
            "max_tokens": max_tokens,
            "max_title_tokens": max_title_tokens,
            "score_batch": score_batch,
            "max_history": max_history,
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not lr > 0 or weight_decay < 0:
            raise ValueError(f"lr must be positive and weight_decay at least 0, got {lr} and {weight_decay}")
        # Set first: the constructor of the base may build the tokenizer, which they are needed for.
        self._prompt_setting = (prompt, tuple(answers))
        said = [prompt.answer.replace("{answer}", answer) for answer in answers]
        super().__init__(
            tokenizer, vocab_size, schedule, extra_tokens=extra_tokens, extra_texts=[*prompt.fixed_texts(), *said]
        )
        self.max_tokens, self.max_history, self.max_title_tokens = max_tokens, max_history, max_title_tokens
        self.score_batch, self.lr, self.weight_decay = score_batch, lr, weight_decay
        self.double_softmax = double_softmax
        self._tables: PromptTables | None = None

    @property
    def prompt(self) -> Prompt:
        """The prompt."""
        return self._prompt_setting[0]

    @property
    def network(self) -> nn.Module:
        """The language model."""
        raise NotImplementedError

    # What follows the prompt in the same sequence, if anything; the answer's tokens depend on it.
    answer_follows = True

    def tokenizer_changed(self) -> None:
        """Cut the answers into tokens."""
        prompt, answers = self._prompt_setting
        if self.answer_follows:
            self.answers: Answers = answer_tokens(self.tokenizer, answers, prompt.answer, prompt.tail)
        else:
            self.answers = answer_tokens(self.tokenizer, answers, prompt.answer)

    def endings(self) -> list[list[int]]:
        """Rows of tokens that follow a prompt: yes and no, with the end; numbered 0 and 1."""
        end = self.tokenizer.eos_token_id
        return [[*row, *([] if end is None else [end])] for row in self.answers.rows]

    def first_id(self) -> int | None:
        """Token that prompts begin with."""
        return None

    def read_titles(self) -> None:
        """Cut the catalogue's titles into pieces of the prompt."""
        self._tables = PromptTables(
            self.prompt,
            self.tokenizer,
            self.defended(self.history_titles),
            item_titles=self.defended(self.item_titles),
            max_tokens=self.max_tokens,
            max_history=self.max_history,
            max_title_tokens=self.max_title_tokens,
            first_id=self.first_id(),
            closing=self.answers.lead if self.answer_follows else (),
            endings=self.endings(),
        )
        self._tables.check_joint()

    @property
    def tables(self) -> PromptTables:
        """What prompts are gathered from, on the module's device.

        Raises:
            RuntimeError: If no titles have come yet.
        """
        if self._tables is None:
            raise RuntimeError(f"{type(self).__name__} has no titles yet: call set_titles(titles)")
        return self._tables.on(self.device)

    @property
    def pad_id(self) -> int:
        """Token that short rows are filled with."""
        return int(self.tokenizer.pad_token_id)

    def readable(self, text: str) -> int:
        """Characters before the cut at `max_title_tokens` tokens; 0 for a prompt without titles."""
        return len(text) if self.defense is not None else self.tables.readable(text)

    def training_pieces(self, batch: RecBatch) -> Tensor:
        """Pieces of the prompts of a batch, without their answers: int64 `(batch, pieces)`."""
        tables = self.tables
        prefixes, _ = tables.prefixes(batch.user_ids, batch.history, batch.liked)
        return torch.cat((prefixes, tables.tails(batch.item_ids)[:, None]), dim=1)

    @torch.no_grad()
    def user_state(self, batch: RecBatch) -> PromptUsers:
        """Beginnings of the prompts of the users of a batch."""
        tables = self.tables
        user_ids, history, liked = (x.to(self.device) for x in (batch.user_ids, batch.history, batch.liked))
        pieces, dropped = tables.prefixes(user_ids, history, liked)
        shortened = int((dropped > 0).sum())
        if shortened:
            log.info(
                "%d of %d histories are shortened to max_tokens=%d: their oldest titles go",
                shortened, len(pieces), self.max_tokens,
            )  # fmt: skip
        order = tables.table.lengths_of(pieces).sum(1).argsort(stable=True)
        return PromptUsers(tables, user_ids, pieces, order)

    def score(self, users: PromptUsers, texts: list[str], item_ids: Tensor | None = None) -> Tensor:
        """Probabilities of yes `(users, texts)`; see `TextRecVictim`."""
        if item_ids is not None:
            item_ids = item_ids.to(self.device)
        table, tails = users.tables.on(self.device).with_texts(self.defended(texts), item_ids)
        shape = (len(users.user_ids), len(texts))
        items = None if item_ids is None else item_ids.expand(shape)
        return self._scores(users, table, tails.expand(shape), items, self.block_scores)

    def score_items(self, users: PromptUsers, item_ids: Tensor) -> Tensor:
        """Probabilities of yes `(users, M)` of items of the catalogue."""
        item_ids = item_ids.to(self.device)
        # With one item for each user there is nothing that a beginning could be shared by.
        scores = self.block_scores if item_ids.shape[1] > 1 else self.whole_block_scores
        tables = users.tables.on(self.device)
        return self._scores(users, tables.table, tables.tails(item_ids), item_ids, scores)

    @torch.no_grad()
    def _scores(
        self,
        users: PromptUsers,
        table: TokenTable,
        tails: Tensor,
        item_ids: Tensor | None,
        scores_of: Callable[[Block], Tensor],
    ) -> Tensor:
        out = torch.empty(tails.shape, device=self.device)
        if not out.numel():
            return out
        items = min(tails.shape[1], self.score_batch)
        width = max(1, self.score_batch // items)
        with evaluation(self), torch.autocast(self.device.type, enabled=False):
            for chunk, rows in enumerate(torch.split(users.order, self.chunk_size(users))):
                for start in range(0, len(rows), width):
                    part = slice(start, min(start + width, len(rows)))
                    own = rows[part]
                    for first in range(0, tails.shape[1], items):
                        columns = slice(first, min(first + items, tails.shape[1]))
                        known = None if item_ids is None else item_ids[own, columns]
                        block = Block(users, chunk, rows, part, tails[own, columns], table, known)
                        out[own, columns] = scores_of(block)
        return out

    def chunk_size(self, users: PromptUsers) -> int:
        """How many users make a chunk."""
        return self.score_batch

    def block_scores(self, block: Block) -> Tensor:
        """Probabilities of yes `(users, items)`."""
        return self.whole_block_scores(block)

    def whole_block_scores(self, block: Block) -> Tensor:
        """As `block_scores`, each prompt on its own."""
        raise NotImplementedError

    def new_metrics(self) -> dict[str, Metric]:
        """Metrics over pairs, and of rankings where there are candidates."""
        return {"pairs": PairMetrics()}

    def update_metrics(self, metrics: dict[str, Metric], batch: RecBatch) -> None:
        """Score the items that are asked about, and their candidates."""
        items = torch.cat((batch.item_ids[:, None], batch.candidate_ids), dim=1)
        metrics["pairs"].update(self.score_items(self.user_state(batch), items), batch.labels)

    def predict_step(self, batch: RecBatch, batch_idx: int) -> dict[str, Tensor]:
        """Probabilities of yes: `user_ids`, `item_ids` and `scores` `(batch,)`."""
        scores = self.score_items(self.user_state(batch), batch.item_ids[:, None])[:, 0]
        user, item = external_labels(self, "user_labels"), external_labels(self, "item_labels")
        rows = zip(batch.user_ids.tolist(), batch.item_ids.tolist(), scores.tolist(), strict=True)
        self._predictions.write({"user_id": user(u), "item_id": item(i), "score": score} for u, i, score in rows)
        return {"user_ids": batch.user_ids, "item_ids": batch.item_ids, "scores": scores}

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(decay_groups(list(self.named_parameters()), self.weight_decay), lr=self.lr)
