"""A catalogue's titles as pieces of a prompt: tokenised once, so that batches of prompts are gathered."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.text_attack.prompts import _SLOTS, Prompt, TokenTable
from zoo.text_attack.tokenizers import forbidden_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

# A letter or a quote that no piece of a prompt begins with; the first that the tokenizer does not join to a piece.
_OTHER_ANCHORS = ("a", "")
_FEWEST_USERS = 1024


class Piece(NamedTuple):
    """Tokens of a piece of a prompt.

    Attributes:
        ids: Its token ids.
        spans: First and last character of each.
    """

    ids: list[int]
    spans: list[tuple[int, int]]


class PieceEncoder:
    """Tokenises pieces as they would be inside a text, where special tokens are not read.

    Tokenizers put a mark of a word's start before whatever begins a text. So a piece is tokenised behind an anchor,
    the last character of what precedes it, whose tokens are cut off.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._forbidden = forbidden_ids(tokenizer)

    def __call__(self, texts: Sequence[str], before: str = "") -> list[Piece]:
        """Tokens of texts.

        Args:
            texts: Pieces.
            before: What precedes all of them; empty at the beginning of a prompt.

        Raises:
            ValueError: If a text yields a special token.
        """
        anchors = [before[-1:], *_OTHER_ANCHORS] if before else [""]
        out: list[Piece | None] = [None] * len(texts)
        left = list(range(len(texts)))
        for anchor in anchors:
            if left:
                found = self._behind(anchor, [texts[row] for row in left])
                for row, piece in zip(left, found, strict=True):
                    out[row] = piece
                left = [row for row in left if out[row] is None]
        pieces = [piece for piece in out if piece is not None]
        for text, piece in zip(texts, pieces, strict=True):
            found_ids = self._forbidden.intersection(piece.ids)
            if found_ids:
                names = ", ".join(map(str, self.tokenizer.convert_ids_to_tokens(sorted(found_ids))))
                raise ValueError(f"{text!r} yields the special token {names}: remove it from the text")
        return pieces

    def _behind(self, anchor: str, texts: list[str]) -> list[Piece | None]:
        """Pieces behind an anchor; None where a token holds the anchor and more."""
        encoded = self.tokenizer(
            [anchor + text for text in texts],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        width = len(anchor)
        out: list[Piece | None] = []
        for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            first = 0
            while first < len(spans) and spans[first][0] < width:
                first += 1
            if first and spans[first - 1][1] > width:
                out.append(None)
            else:
                out.append(Piece(ids[first:], [(start - width, end - width) for start, end in spans[first:]]))
        return out

    def around(
        self, template: str, titles: Sequence[str], limit: int, before: str
    ) -> tuple[list[list[int]], list[int]]:
        """Tokens of titles in a template, and how many characters of each were kept.

        Args:
            template: Text with `{title}`.
            titles: Titles.
            limit: Most tokens of a title.
            before: What precedes the template.
        """
        head, tail = template.split("{title}")
        plain = self([head + "a" + tail], before)[0]
        closing = [token for token, (start, _) in zip(*plain, strict=True) if start > len(head)]
        rows, kept = [], []
        for title, piece in zip(titles, self([head + title + tail for title in titles], before), strict=True):
            begin, end = len(head), len(head) + len(title)
            opening = sum(stop <= begin for _, stop in piece.spans)
            inner = sum(start < end and stop > begin for start, stop in piece.spans)
            if inner <= limit:
                rows.append(piece.ids)
                kept.append(len(title))
            else:
                rows.append([*piece.ids[: opening + limit], *closing])
                kept.append(min(piece.spans[opening + limit - 1][1] - begin, len(title)))
        return rows, kept


class PromptTables:
    """What prompts about a catalogue are gathered from.

    Args:
        prompt: The prompt.
        tokenizer: A fast tokenizer of transformers.
        titles: The catalogue's titles in histories, by item id.
        max_tokens: Most tokens of a prompt; histories are shortened to it, their oldest titles first.
        max_history: Most titles of a history.
        max_title_tokens: Most tokens of a title; the rest is cut off.
        item_titles: Titles of the items that are asked about, by item id; the same by default.
        first_id: Token that a prompt begins with, or None.
        closing: Tokens that every question ends with, beside those of its text.
        endings: Rows of tokens that may follow the prompt; the longest counts in `max_tokens`.

    Attributes:
        table: All pieces.

    Raises:
        ValueError: If a title does not fit into a prompt without a history.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: Any,
        titles: Sequence[str],
        *,
        max_tokens: int,
        max_history: int,
        max_title_tokens: int,
        item_titles: Sequence[str] | None = None,
        first_id: int | None = None,
        closing: Sequence[int] = (),
        endings: Sequence[Sequence[int]] = (),
    ) -> None:
        self.prompt, self.tokenizer, self.titles = prompt, tokenizer, list(titles)
        self.max_tokens, self.max_history, self.max_title_tokens = max_tokens, max_history, max_title_tokens
        self.first_id, self.closing = first_id, list(closing)
        self._encode = PieceEncoder(tokenizer)
        self._slot_ids = {slot: int(tokenizer.convert_tokens_to_ids(slot)) for slot in prompt.slots}
        # Row 0 stands for the header where it is the same for all users; the endings follow.
        self._by_user = "{user}" in prompt.header
        rows: list[list[int]] = [[] if self._by_user else self._header(prompt.header), *map(list, endings)]
        self._lists: list[dict[str, int]] = []
        self._kinds = [part for part in (prompt.liked, prompt.disliked) if part is not None]
        context = prompt.header
        for part in self._kinds:
            opening = prompt.without_slots(part.start, "a list")
            places = {"start": len(rows), "empty": len(rows) + 1}
            rows += [
                self._encode([opening], context)[0].ids,
                self._encode([part.empty + part.end], opening or context)[0].ids,
            ]
            for kind, end in (("inner", part.separator), ("last", part.end)):
                places[kind] = len(rows)
                before = opening or context
                rows += self._encode.around(part.item + end, self.titles, max_title_tokens, before)[0]
            self._lists.append(places)
            context = part.end or part.item.rpartition("}")[2] or part.empty
        self._footer = len(rows)
        rows.append(self._constant(prompt.footer, context))
        self._before_tail = prompt.footer or context
        self._tails = len(rows)
        self.item_titles = self.titles if item_titles is None else list(item_titles)
        own_tails, _ = self._tail_rows(self.item_titles, torch.arange(len(self.item_titles)))
        self.table = TokenTable.of([*rows, *own_tails])
        self._fixed_rows = len(self.table.lengths)
        self._num_users = 0
        blank, _ = self._tail_rows([""], torch.tensor([0]))
        self.reserve = len(blank[0]) + max_title_tokens + 2 + max(map(len, endings), default=0)
        fixed = [0, self._footer, *(places[kind] for places in self._lists for kind in ("start", "empty"))]
        self._fixed = sum(len(rows[row]) for row in fixed)
        self._check_fit(self._fixed + (len(self._header(prompt.header.replace("{user}", "0"))) if self._by_user else 0))

    def _check_fit(self, fixed: int) -> None:
        if fixed + self.reserve > self.max_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, but the prompt {self.prompt.name} takes {fixed} tokens without a "
                f"history and {self.reserve} with its question and a title of max_title_tokens="
                f"{self.max_title_tokens}: the title would be cut off; give max_tokens of at least "
                f"{fixed + self.reserve}, or fewer max_title_tokens"
            )

    def _header(self, text: str) -> list[int]:
        first = [] if self.first_id is None else [self.first_id]
        return first + self._constant(text, "")

    def _constant(self, text: str, before: str) -> list[int]:
        """Tokens of a text of the prompt, in which slots are their ids."""
        out: list[int] = []
        for part in _SLOTS.split(text):
            if part in self._slot_ids:
                out.append(self._slot_ids[part])
            elif part:
                out += self._encode([part], before)[0].ids
            before = part or before
        return out

    def _tail_rows(self, titles: Sequence[str], item_ids: Tensor | None) -> tuple[list[list[int]], list[int]]:
        before = self._before_tail
        if not self.prompt.reads_title:
            numbers = ["?"] * len(titles) if item_ids is None else item_ids.tolist()
            texts = [self.prompt.tail.replace("{item}", str(number)) for number in numbers]
            return [self._constant(text, before) + self.closing for text in texts], [0] * len(titles)
        # Slots are looked for around the title, never in it.
        head, tail = self.prompt.tail.split("{title}")
        ahead, behind = _SLOTS.split(head), _SLOTS.split(tail)
        opening = self._constant("".join(ahead[:-1]), before)
        closing = self._constant("".join(behind[1:]), behind[0] or "a")
        if len(ahead) > 1:
            before = ahead[-2]
        rows, kept = self._encode.around(ahead[-1] + "{title}" + behind[0], titles, self.max_title_tokens, before)
        return [opening + row + closing + self.closing for row in rows], kept

    def _users(self, user_ids: Tensor) -> Tensor:
        """Rows of the headers of users; those of new users are made."""
        lowest, highest = (int(bound) for bound in torch.aminmax(user_ids)) if len(user_ids) else (0, -1)
        if lowest < 0:
            raise ValueError(
                f"the prompt {self.prompt.name} holds {{user}}, and users of test_path who are not in the training "
                "data have no number: test on others, or give a prompt whose header lacks {user}"
            )
        needed = highest + 1
        if needed > self._num_users:
            count = max(needed, 2 * self._num_users, _FEWEST_USERS)
            texts = [self.prompt.header.replace("{user}", str(user)) for user in range(self._num_users, count)]
            first = [] if self.first_id is None else [self.first_id]
            rows = [first + piece.ids for piece in self._encode(texts)]
            self._check_fit(self._fixed + max(map(len, rows)))
            self.table = self.table.plus(TokenTable.of(rows))
            self._num_users = count
        return user_ids + self._fixed_rows

    def on(self, device: torch.device) -> PromptTables:
        """Itself, with its tokens on a device."""
        self.table = self.table.to(device)
        return self

    def prefixes(self, user_ids: Tensor, history: Tensor, liked: Tensor) -> tuple[Tensor, Tensor]:
        """What comes before the question.

        Args:
            user_ids: int64 `(batch,)`.
            history: int64 `(batch, length)`, newest first, -1 for none.
            liked: Bool `(batch, length)`.

        Returns:
            Pieces int64 `(batch, pieces)`, -1 for none; and how many titles of each history did not fit, `(batch,)`.

        Raises:
            ValueError: If the prompt holds the user's number and a user has none, or no title would fit behind it.
        """
        header = self._users(user_ids) if self._by_user else torch.zeros_like(user_ids)
        table = self.table
        history, liked = history[:, : self.max_history], liked[:, : self.max_history]
        valid = history >= 0
        members = [valid & (liked if not self.prompt.mixed else valid), valid & ~liked][: len(self._lists)]
        lists = []
        for places, member in zip(self._lists, members, strict=True):
            newest = member & (member.cumsum(1) == 1)
            first = torch.where(newest, places["last"], places["inner"])
            lists.append(torch.where(member, first + history, -1))
        batch = len(user_ids)
        # Tokens with the k newest of the history, k = 0, 1, ...
        total = (table.lengths_of(header) + self._fixed_length(table))[:, None].repeat(1, history.shape[1] + 1)
        for places, pieces in zip(self._lists, lists, strict=True):
            total[:, 1:] += table.lengths_of(pieces).cumsum(1)
            filled = torch.nn.functional.pad((pieces >= 0).cumsum(1) > 0, (1, 0))
            total += ~filled * table.lengths[places["empty"]]
        counts = torch.arange(history.shape[1] + 1, device=history.device)
        kept = torch.where(total + self.reserve <= self.max_tokens, counts, 0).amax(1)
        fits = counts[:-1] < kept[:, None]
        columns = [header[:, None]]
        for places, pieces in zip(self._lists, lists, strict=True):
            shown = torch.where(fits, pieces, -1)
            empty = torch.where((shown >= 0).any(1), -1, places["empty"])
            start = torch.full((batch, 1), places["start"], device=history.device)
            columns += [start, shown.flip(1), empty[:, None]]
        columns.append(torch.full((batch, 1), self._footer, device=history.device))
        return torch.cat(columns, dim=1), (valid & ~fits).sum(1) if self._lists else torch.zeros_like(user_ids)

    def _fixed_length(self, table: TokenTable) -> Tensor:
        rows = [self._footer, *(places["start"] for places in self._lists)]
        return table.lengths[rows].sum()

    def endings(self, numbers: Tensor) -> Tensor:
        """Pieces of the endings of these numbers."""
        return numbers + 1

    def tails(self, item_ids: Tensor) -> Tensor:
        """Pieces of the questions about items of the catalogue, of the shape of `item_ids`."""
        return item_ids + self._tails

    def with_texts(self, texts: Sequence[str], item_ids: Tensor | None = None) -> tuple[TokenTable, Tensor]:
        """The table with questions about other titles, and their pieces `(texts,)`."""
        rows, _ = self._tail_rows(texts, item_ids)
        table = self.table.plus(TokenTable.of(rows))
        return table, torch.arange(len(self.table.lengths), len(table.lengths), device=table.flat.device)

    def readable(self, text: str) -> int:
        """How many characters of a title are read."""
        return self._tail_rows([text], torch.tensor([0]))[1][0]

    def check_joint(self, count: int = 64) -> tuple[int, int]:
        """Compare prompts with what the tokenizer makes of their whole text.

        Pieces that meet inside a word give other tokens than the whole; training and scoring both use the pieces. A
        warning says how many prompts differ.

        Returns:
            The number of prompts that differ, and the number that were compared.
        """
        draw = random.Random(0)
        differ = 0
        sample = [draw.randrange(len(self.titles)) for _ in range(4 * count)]
        # A title that is cut has other tokens than the whole title, as it should.
        whole = [
            self._tail_rows([titles[item] for item in sample], torch.tensor(sample))[1]
            for titles in (self.titles, self.item_titles)
        ]
        short = [
            item
            for item, *kept in zip(sample, *whole, strict=True)
            if kept == [len(self.titles[item]), len(self.item_titles[item])] or not self.prompt.reads_title
        ]
        if not short:
            return 0, 0
        length = min(self.max_history, 3)
        for _ in range(count):
            items = torch.tensor([draw.choice(short) for _ in range(length)], dtype=torch.int64)
            liked = torch.tensor([draw.random() < 0.6 for _ in range(length)], dtype=torch.bool)
            item = draw.choice(short)
            pieces, dropped = self.prefixes(torch.tensor([0]), items[None], liked[None])
            row = torch.cat((pieces[0], self.tails(torch.tensor([item]))))
            rows = [self.table.flat[self.table.starts[p] :][: self.table.lengths[p]].tolist() for p in row[row >= 0]]
            ids = [token for tokens in rows for token in tokens][0 if self.first_id is None else 1 :]
            kept = length - int(dropped[0])
            text = self.text(0, items[:kept].tolist(), liked[:kept].tolist(), item)
            parts = [self._slot_ids.get(p, p) for p in _SLOTS.split(text) if p]
            joint: list[int] = []
            for part in parts:
                joint += [part] if isinstance(part, int) else self._encode([part], "a" if joint else "")[0].ids
            differ += joint + self.closing != ids
        if differ:
            log.warning(
                "%d of %d prompts have other tokens than their whole text has: their pieces are tokenised one by one, "
                "in training and in scoring alike",
                differ, count,
            )  # fmt: skip
        return differ, count

    def text(self, user: int, history: Sequence[int], liked: Sequence[bool], item: int) -> str:
        """A prompt as text, with `history` newest first."""
        shown = [list(zip(history, liked, strict=True))[::-1]] * 2
        out = self.prompt.header.replace("{user}", str(user))
        for place, part in enumerate(self._kinds):
            titles = [
                part.item.replace("{title}", self.titles[h])
                for h, like in shown[place]
                if self.prompt.mixed or like == (place == 0)
            ]
            out += part.start + (part.separator.join(titles) or part.empty) + part.end
        tail = self.prompt.tail.replace("{title}", self.item_titles[item]).replace("{item}", str(item))
        return out + self.prompt.footer + tail
