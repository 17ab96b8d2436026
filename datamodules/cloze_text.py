"""Text of cloze questions: options put into the slot or beside the question."""

from __future__ import annotations

import re

PLACEHOLDER = "@placeholder"
MARKS = ("[OPTION]", "[/OPTION]")
MODES = ("fill", "concat", "concat_sep", "summary_only", "option_only")
FILLED_MODES = ("fill", "summary_only")

Span = tuple[int, int]


def split_question(question: str, token: str = PLACEHOLDER) -> tuple[str, str]:
    """What stands before and after the slot of a question.

    Raises:
        ValueError: If the question has no slot, or more than one.
    """
    parts = question.split(token)
    if len(parts) != 2:
        raise ValueError(f"expected exactly one {token} in the question, found {len(parts) - 1}: {question!r}")
    return parts[0], parts[1]


def fill_placeholder(
    question: str,
    option: str,
    token: str = PLACEHOLDER,
    *,
    capitalize_initial: bool = False,
    marks: tuple[str, str] | None = None,
) -> tuple[str, Span]:
    """Put an option into the slot of a question, section 1 of the paper: S_i = fill(Q, O_i).

    Args:
        question: Text with exactly one `token`.
        option: What to put in its place.
        token: The slot.
        capitalize_initial: Whether the option gets a capital where the slot begins the question.
        marks: Texts to stand before and after the option.

    Returns:
        The summary, and the characters `[start, end)` of the option in it: `text[start:end]` is the option.

    Raises:
        ValueError: If the question has no slot, or more than one.
    """
    before, after = split_question(question, token)
    if capitalize_initial and begins(before):
        option = option[:1].upper() + option[1:]
    text, (start, end) = marked(option, marks)
    return before + text + after, (len(before) + start, len(before) + end)


def begins(before: str) -> bool:
    """Whether a slot after the text `before` begins the question: nothing but marks and spaces precede it."""
    return not any(character.isalnum() for character in before)


def marked(option: str, marks: tuple[str, str] | None) -> tuple[str, Span]:
    """An option between its marks, if any, and its own characters in that text."""
    if marks is None:
        return option, (0, len(option))
    start = len(marks[0]) + 1
    return f"{marks[0]} {option} {marks[1]}", (start, start + len(option))


def second_segment(
    mode: str,
    question: str,
    option: str,
    *,
    mask_token: str | None = None,
    sep_token: str | None = None,
    capitalize_initial: bool = False,
    marks: tuple[str, str] | None = None,
) -> tuple[str, Span]:
    """What the encoder reads beside the passage for one option.

    Args:
        mode: "fill" or "summary_only": the option in the slot. "concat": the question with `mask_token` in the slot,
            then the option. "concat_sep": the same with `sep_token` between the two. "option_only": the option.
        question: Text with exactly one `@placeholder`.
        option: One of its options.
        mask_token: Needed by "concat" and "concat_sep".
        sep_token: Needed by "concat_sep".
        capitalize_initial: Whether an option that is filled in at the start of the question gets a capital.
        marks: Texts to stand before and after the option.

    Returns:
        The text, and the characters `[start, end)` of the option in it.

    Raises:
        ValueError: If the question has no slot or more than one, or the mode is unknown or lacks its token.
    """
    if mode in FILLED_MODES:
        return fill_placeholder(question, option, capitalize_initial=capitalize_initial, marks=marks)
    before, after = split_question(question)
    text, (start, end) = marked(option, marks)
    if mode == "option_only":
        return text, (start, end)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mask_token is None:
        raise ValueError(f"mode={mode!r} writes a mask token into the slot: give mask_token")
    beside = before + mask_token + after
    if mode == "concat_sep":
        if sep_token is None:
            raise ValueError("mode='concat_sep' needs sep_token")
        # No space before the separator: byte-level vocabularies would make a token of it.
        beside = beside.rstrip() + sep_token
    shift = len(beside) + 1
    return f"{beside} {text}", (shift + start, shift + end)


# In this order: marks inside quotation marks are met after the quotation marks have closed up.
_JOINS = (
    (re.compile(r'(?<!\S)"\s+([^"]*[^"\s])\s+"(?!\S)'), r'"\1"'),
    (re.compile(r"([(\[])\s+"), r"\1"),
    (re.compile(r"([£$€])\s+(?=\d)"), r"\1"),
    (re.compile(r"(?<=\d)\s+-\s+(?=\d)"), "-"),
    (re.compile(r"\s+('(?:s|re|ve|ll|m|d)\b|n't\b)", re.IGNORECASE), r"\1"),
    (re.compile(r'\s+([.,;:?!%)\]]+)(?=[\s"]|$)'), r"\1"),
)


def detokenize(question: str) -> str:
    """Undo the spaces that tokenised text has round its punctuation.

    Left alone is what may have been written with spaces: single quotes, and dashes except between numbers.
    """
    for pattern, replacement in _JOINS:
        question = pattern.sub(replacement, question)
    return question
