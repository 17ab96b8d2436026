"""Prompts about a user and an item: their text, and their tokens, gathered from tables that are made once.

A prompt is cut into pieces where its parts meet. Each piece is tokenised once, in its surroundings, and a batch of
prompts is one gather. What comes before the title that is asked about (the prefix) is the same whatever the title is.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

USER_SLOT, ITEM_SLOT = "<UserID>", "<TargetItemID>"
_SLOTS = re.compile(f"({USER_SLOT}|{ITEM_SLOT})")


@dataclass(frozen=True)
class ListTemplate:
    """How a list of titles is written: `start item separator item ... item end`, or `start empty end`.

    Attributes:
        start: What comes before.
        item: A title, as `{title}`. Should begin with a blank: tokenizers cut there.
        separator: What follows every title but the last.
        end: What comes after.
        empty: What stands for the titles if there is none.
    """

    start: str = ""
    item: str = ' "{title}"'
    separator: str = ","
    end: str = ""
    empty: str = " None."


@dataclass(frozen=True)
class Prompt:
    """A question about a user and an item.

    Attributes:
        name: What it is called.
        header: What it begins with; `{user}` is the user's number.
        tail: What it ends with, from the title `{title}` (or the item's number `{item}`) on.
        footer: What stands before `tail`.
        liked: The list of titles that the user liked, oldest first; None for a prompt without a history.
        disliked: The list of the others; None if they are left out.
        mixed: Whether `liked` lists all titles of the history, liked or not.
        answer: What follows `tail`, with `{answer}`.
    """

    name: str
    header: str
    tail: str
    footer: str = ""
    liked: ListTemplate | None = None
    disliked: ListTemplate | None = None
    mixed: bool = False
    answer: str = "{answer}"

    def __post_init__(self) -> None:
        """Check its marks."""
        if sum(self.tail.count(mark) for mark in ("{title}", "{item}")) != 1:
            raise ValueError(
                f"the tail of the prompt {self.name} must hold {{title}} (or {{item}}) once, it is {self.tail!r}"
            )
        for part in (self.liked, self.disliked):
            if part is not None and part.item.count("{title}") != 1:
                raise ValueError(f"a list of the prompt {self.name} must hold {{title}} once, it has {part.item!r}")
        if self.answer.count("{answer}") != 1:
            raise ValueError(f"the answer of the prompt {self.name} must hold {{answer}} once, it is {self.answer!r}")

    @property
    def reads_title(self) -> bool:
        """Whether the title of the item is in the prompt at all."""
        return "{title}" in self.tail

    @property
    def slots(self) -> tuple[str, ...]:
        """Places for vectors, in order."""
        return tuple(_SLOTS.findall("".join((self.header, self.footer, self.tail))))

    def fixed_texts(self) -> list[str]:
        """Its own words, for a tokenizer to learn from."""
        lists = [part for part in (self.liked, self.disliked) if part is not None]
        texts = [self.header, self.footer, self.tail, self.answer]
        texts += [text for part in lists for text in (part.start, part.item + part.separator, part.end, part.empty)]
        return [re.sub(r"\{\w+\}", " ", _SLOTS.sub(" ", text)) for text in texts]

    def without_slots(self, text: str, name: str) -> str:
        """A text of the prompt; refused if it has a slot where none can be."""
        if _SLOTS.search(text):
            raise ValueError(f"{name} of the prompt {self.name} cannot hold {USER_SLOT} or {ITEM_SLOT}")
        return text


def alpaca_prompt(noun: str = "movie") -> Prompt:
    """TALLRec's (Bao et al. 2023, arXiv 2305.00447), in the form of Stanford Alpaca.

    Args:
        noun: What the items are, such as "movie" or "book".
    """
    return Prompt(
        name="alpaca",
        header=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\n"
            "Given the user's preference and unpreference, identify whether the user will like the target "
            f'{noun} by answering "Yes." or "No.".\n\n### Input:'
        ),
        liked=ListTemplate(start="\nUser Preference:"),
        disliked=ListTemplate(start="\nUser Unpreference:"),
        tail=f'\nWhether the user will like the target {noun} "{{title}}"?\n\n### Response:\n',
        answer="{answer}.",
    )


def collm_prompt(noun: str = "book", features: bool = True) -> Prompt:
    """CoLLM's (Zhang et al. 2023, arXiv 2310.19488).

    Args:
        noun: What the items are.
        features: Whether it holds the places for the vectors of user and item.
    """
    feature = " with the feature " + ITEM_SLOT if features else ""
    user = (
        " Additionally, we have information about the user's preferences encoded in the feature " + USER_SLOT + "."
        if features
        else ""
    )
    return Prompt(
        name="collm",
        header=f"#Question: A user has given high ratings to the following {noun}s:",
        liked=ListTemplate(item=" {title}", separator=",", end=".", empty=" None"),
        footer=user
        + " Using all available information, make a prediction about whether the user would enjoy the "
        + f"{noun} titled",
        tail=f' {{title}}{feature}? Answer with "Yes" or "No". \n#Answer:',
        answer=" {answer}",
    )


def p5_prompts() -> dict[str, Prompt]:
    """P5's (Geng et al. 2022, arXiv 2203.13366) that ask for yes or no, and `p5_history`, which tells the history.

    `p5_direct` is its prompt 5-4, `p5_recommend` 5-3, and `p5_ids` 5-1, which reads no title.
    """
    prompts = (
        Prompt(
            name="p5_history",
            header="Here is the purchase history list of user_{user} : \n",
            liked=ListTemplate(item=" {title}", separator=" ,", empty=" none"),
            mixed=True,
            footer=" \n Is the following item a good choice ? \n",
            tail=" {title}",
        ),
        Prompt(
            name="p5_direct",
            header="I would like to recommend some items for user_{user} . Is the following item a good choice ? \n",
            tail=" {title}",
        ),
        Prompt(
            name="p5_recommend",
            header="For user_{user}, do you think it is good to recommend",
            tail=" {title} ?",
        ),
        Prompt(name="p5_ids", header="Will user_{user} likely to interact with", tail=" item_{item} ?"),
    )
    return {prompt.name: prompt for prompt in prompts}


def prompt_of(spec: str | Mapping[str, Any], known: Mapping[str, Prompt]) -> Prompt:
    """A known prompt by name, or one of a user's own.

    Args:
        spec: A name, or the attributes of a `Prompt`, with `liked` and `disliked` as those of a `ListTemplate`.
        known: Prompts by name.

    Raises:
        ValueError: If it is not known, or an attribute is not.
    """
    if isinstance(spec, str):
        if spec not in known:
            raise ValueError(f"prompt must be {', '.join(known)}, or the parts of one, got {spec!r}")
        return known[spec]
    values = {"name": "own", **spec}
    for name in ("liked", "disliked"):
        if values.get(name) is not None:
            _check_names(values[name], ListTemplate, f"the list {name} of a prompt")
            values[name] = ListTemplate(**values[name])
    _check_names(values, Prompt, "a prompt")
    missing = [name for name in ("header", "tail") if name not in values]
    if missing:
        raise ValueError(f"a prompt needs {' and '.join(missing)}")
    return Prompt(**values)


def _check_names(values: Mapping[str, Any], kind: type[Any], what: str) -> None:
    known = [field.name for field in fields(kind)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ValueError(f"{what} has no {', '.join(unknown)}; it has {', '.join(known)}")


class TokenTable(NamedTuple):
    """Rows of token ids of different lengths.

    Attributes:
        flat: int64, all tokens.
        starts: int64 `(rows,)`, where each begins.
        lengths: int64 `(rows,)`.
    """

    flat: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TokenTable:
        """A table of rows."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        flat = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        return cls(flat, lengths.cumsum(0) - lengths, lengths)

    def to(self, device: torch.device) -> TokenTable:
        """The same on a device."""
        return self if self.flat.device == device else TokenTable(*(part.to(device) for part in self))

    def plus(self, other: TokenTable) -> TokenTable:
        """This one's rows, then the other's."""
        other = other.to(self.flat.device)
        return TokenTable(
            torch.cat((self.flat, other.flat)),
            torch.cat((self.starts, other.starts + len(self.flat))),
            torch.cat((self.lengths, other.lengths)),
        )

    def lengths_of(self, pieces: Tensor) -> Tensor:
        """Lengths of rows; 0 for -1."""
        return self.lengths[pieces.clamp(min=0)].masked_fill(pieces < 0, 0)


def assemble(table: TokenTable, pieces: Tensor, pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Put pieces behind each other.

    Args:
        table: Rows of tokens.
        pieces: int64 `(batch, pieces)`: rows of the table, -1 for none.
        pad_id: What shorter rows are filled with.
        left: Whether they are filled on the left.

    Returns:
        Ids int64 and mask int64, both `(batch, length)`.
    """
    batch, width = pieces.shape
    device = pieces.device
    flat = pieces.flatten()
    lengths = table.lengths_of(flat)
    totals = lengths.view(batch, width).sum(1)
    length, count = (int(x) for x in torch.stack((totals.amax(), totals.sum())))
    piece = torch.repeat_interleave(torch.arange(len(flat), device=device), lengths, output_size=count)
    place = torch.arange(count, device=device)
    source = table.starts[flat.clamp(min=0)] - (lengths.cumsum(0) - lengths)
    begins = totals.cumsum(0) - totals
    # Each token's place in its row is its place among all, moved by what is known of the row.
    shift = torch.arange(batch, device=device) * length - begins + ((length - totals) if left else 0)
    target = place + shift[piece // width]
    ids = torch.full((batch * length,), pad_id, dtype=torch.int64, device=device)
    mask = torch.zeros(batch * length, dtype=torch.int64, device=device)
    ids[target] = table.flat[source[piece] + place]
    mask[target] = 1
    return ids.view(batch, length), mask.view(batch, length)
