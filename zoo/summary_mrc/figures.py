"""Pictures of a test: accuracy by kind of question, and the words of a passage that a filled option attends to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two-sided 95 % of the normal distribution.
_Z = 1.959964
_COLUMNS = 84
_FONT_SIZE = 8.0
# Of the monospaced font that matplotlib brings: width of a character, and distance of two lines, in inches.
_CHARACTER = 0.6021 * _FONT_SIZE / 72
_LINE = 1.75 * _FONT_SIZE / 72
_MARGIN = 0.15


def length_groups(lengths: Tensor, bins: int = 5) -> tuple[list[str], Tensor]:
    """Groups of about equal size by length, the shortest first; equal lengths are never parted.

    Args:
        lengths: int64 `(n,)`, such as the words of each passage.
        bins: Groups to make; there are fewer where many lengths are equal.

    Returns:
        The name of each group, such as "12-85" (with a dash), and the group of each length, int64 `(n,)`.

    Raises:
        ValueError: If there is no length, or no group to make.
    """
    if lengths.ndim != 1 or len(lengths) == 0 or lengths.is_floating_point() or bins < 1:
        raise ValueError(
            f"expected at least one length, whole numbers of shape (n,), and at least one group; "
            f"got {lengths.dtype} {tuple(lengths.shape)} and {bins} groups"
        )
    ordered = lengths.cpu().sort().values
    bins = min(bins, len(ordered))
    # The longest of each group; groups whose longest are equal are one.
    ends = torch.unique_consecutive(ordered[torch.arange(1, bins + 1) * len(ordered) // bins - 1])
    group = torch.bucketize(lengths.cpu(), ends)
    starts = ordered[torch.searchsorted(torch.bucketize(ordered, ends), torch.arange(len(ends)))]
    names = [
        str(start) if start == end else f"{start}\N{EN DASH}{end}"
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return names, group


def plot_accuracy_by(
    groups: Sequence[str],
    values: Sequence[float],
    counts: Sequence[int],
    chance: float,
    priors: Mapping[str, float],
    xlabel: str,
    title: str,
) -> Figure:
    """A bar of the accuracy of each group with its 95 % interval (Wilson), beside what needs no reading.

    Args:
        groups: Names, in the order of drawing.
        values: Accuracy of each group, in [0, 1]; without meaning where the group has no question.
        counts: Questions of each group.
        chance: Accuracy of a blind guess, dotted.
        priors: Accuracy on all questions of answers without reading by name, such as "rarest", dashed.
        xlabel: What the groups are.
        title: Above the picture.

    Raises:
        ValueError: If there is no group, if sizes do not fit, or if an accuracy lies outside [0, 1].
    """
    from matplotlib.figure import Figure

    if not groups or not len(groups) == len(values) == len(counts):
        raise ValueError(
            f"expected an accuracy and a count for each of at least one group; "
            f"got {len(groups)} groups, {len(values)} accuracies and {len(counts)} counts"
        )
    for name, value, count in zip(groups, values, counts, strict=True):
        if count and not 0 <= value <= 1:
            raise ValueError(f"the accuracy of group {name!r} is {value}; expected a fraction in [0, 1]")
    slanted = max(map(len, groups)) > 12
    figure = Figure(figsize=(max(3.6, 0.85 * len(groups) + 0.8) + 1.5, 3.2), layout="constrained")
    axis: Axes = figure.subplots()
    shown = [place for place, count in enumerate(counts) if count]
    heights = [values[place] for place in shown]
    axis.bar(shown, heights, width=0.68, color="#8fb3d9", zorder=1)
    ends = [_wilson(values[place], counts[place]) for place in shown]
    below = [height - low for height, (low, _) in zip(heights, ends, strict=True)]
    above = [high - height for height, (_, high) in zip(heights, ends, strict=True)]
    axis.errorbar(shown, heights, yerr=[below, above], fmt="none", ecolor="0.25", elinewidth=1, capsize=3, zorder=3)
    for place, height in zip(shown, heights, strict=True):
        # At the foot of the bar, where neither the interval nor the lines of the priors pass.
        axis.annotate(f"{height:.2f}", (place, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axis.axhline(chance, color="0.2", linewidth=1, linestyle=":", label=f"chance {chance:.2f}", zorder=2)
    for number, (name, value) in enumerate(priors.items()):
        # The bars' interval is the message: these lines stay thin.
        colour = f"C{1 + number % 9}"
        axis.axhline(value, color=colour, linewidth=1, linestyle="--", label=f"{name} {value:.2f}", zorder=2)
    labels = [f"{name}\n({count:,})" for name, count in zip(groups, counts, strict=True)]
    axis.set_xticks(range(len(groups)), labels, fontsize=7, rotation=25 if slanted else 0)
    highest = max([chance, *priors.values(), *(high for _, high in ends)])
    axis.set_ylim(0, min(1.02, 1.1 * highest))
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_xlabel(f"{xlabel} (number of questions)", fontsize=8)
    axis.set_ylabel("accuracy, 95 % interval", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_attention(
    summary_tokens: Sequence[str],
    passage_tokens: Sequence[str],
    weights: Tensor,
    option_places: Sequence[int],
    title: str,
) -> Figure:
    """The filled sentence, and below it the passage as text, shaded by the attention of the option's tokens.

    Args:
        summary_tokens: Tokens of the filled sentence; wordpieces ("##ing", "\u0120ing", "\u2581ing") are joined.
        passage_tokens: Tokens of the passage.
        weights: `(summary, passage)`, attention of the sentence's tokens over the passage.
        option_places: Places of the option's tokens in the sentence; their weights are averaged.
        title: Above the picture.

    Raises:
        ValueError: If there is no token, if sizes do not fit, or if a weight is negative or not finite.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    if not passage_tokens or weights.shape != (len(summary_tokens), len(passage_tokens)):
        raise ValueError(
            f"{len(summary_tokens)} tokens of the sentence and {len(passage_tokens)} of the passage need weights of "
            f"that shape, got {tuple(weights.shape)}"
        )
    if not option_places or not all(0 <= place < len(summary_tokens) for place in option_places):
        raise ValueError(
            f"expected places of the option in a sentence of {len(summary_tokens)} tokens, got {list(option_places)}"
        )
    attention = weights.detach().double().cpu()[list(option_places)].mean(0)
    if not bool((attention.isfinite() & (attention >= 0)).all()):
        raise ValueError("weights of attention must be finite and not negative")
    # Without any attention the scale is that of shares.
    top = float(attention.max()) or 1.0
    sentence, passage = _lay_out(summary_tokens), _lay_out(passage_tokens)
    # A blank line keeps the sentence and the passage apart.
    first = sentence[-1][1] + 2
    lines = first + passage[-1][1] + 1
    width = _COLUMNS * _CHARACTER + 2 * _MARGIN
    head, foot = 0.4, 0.55
    height = head + lines * _LINE + foot
    # Widths of characters are rounded to whole pixels; at this resolution they are so already.
    figure = Figure(figsize=(width, height), dpi=150)
    # One unit of the axes is a character, or a line.
    axis: Axes = figure.add_axes((_MARGIN / width, foot / height, 1 - 2 * _MARGIN / width, lines * _LINE / height))
    axis.set_xlim(0, _COLUMNS)
    axis.set_ylim(lines, 0)
    axis.set_axis_off()
    option = set(option_places)
    for place, (column, line, text) in enumerate(sentence):
        _draw_token(axis, column, line, text, "0.15", "#ffd08a" if place in option else "none")
    axis.axhline(first - 0.5, color="0.8", linewidth=0.8)
    colours = colormaps["Blues"]
    shades = Normalize(0, top)
    for (column, line, text), weight in zip(passage, attention.tolist(), strict=True):
        # The darkest blue hides even white letters less than black ones.
        colour = "white" if shades(weight) > 0.6 else "0.15"
        _draw_token(axis, column, first + line, text, colour, colours(float(shades(weight))))
    bar = figure.add_axes((0.62, 0.34 / height, 0.38 - _MARGIN / width, 0.1 / height))
    bar.imshow(torch.linspace(0, 1, 256)[None].numpy(), cmap=colours, aspect="auto", extent=(0, top, 0, 1))
    bar.set_yticks([])
    bar.locator_params("x", nbins=5)
    bar.tick_params(labelsize=6, length=2, pad=1)
    bar.spines[:].set_visible(False)
    note = f"attention of the option; spread evenly over {len(attention)} tokens: {1 / len(attention):.3f}"
    figure.text(_MARGIN / width, 0.39 / height, note, fontsize=7, va="center")
    figure.text(0.5, 1 - 0.2 / height, title, fontsize=10, ha="center", va="center", parse_math=False)
    return figure


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a binomial share (Wilson's), which never leaves [0, 1]."""
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    centre = share + _Z**2 / (2 * count)
    scale = 1 + _Z**2 / count
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def _lay_out(tokens: Sequence[str]) -> list[tuple[int, int, str]]:
    """Column, line and text of each token; words are kept whole where a line has the room."""
    pieces = _pieces(tokens)
    words: list[list[str]] = []
    for text, joined in pieces:
        if joined and words:
            words[-1].append(text)
        else:
            words.append([text])
    placed: list[tuple[int, int, str]] = []
    column = line = 0
    for word in words:
        if column and column + sum(map(len, word)) > _COLUMNS:
            column, line = 0, line + 1
        for text in word:
            # A word longer than a line is broken between its tokens, and a token longer than a line is cut.
            if column and column + len(text) > _COLUMNS:
                column, line = 0, line + 1
            text = text if len(text) <= _COLUMNS else text[: _COLUMNS - 1] + "\N{HORIZONTAL ELLIPSIS}"
            placed.append((column, line, text))
            column += len(text)
        column += 1
    return placed


def _pieces(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Text of each token without its marks, and whether it continues the word before it."""
    # Byte-level BPE and SentencePiece mark where words begin, WordPiece where they go on.
    starts = ("\u0120", "\u2581")
    if any(token.startswith(starts) for token in tokens):
        return [(token.lstrip("".join(starts)), not token.startswith(starts)) for token in tokens]
    return [(token[2:], True) if token.startswith("##") and len(token) > 2 else (token, False) for token in tokens]


def _draw_token(axis: Axes, column: int, line: int, text: str, colour: str, shade: Any) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column - 0.1, line + 0.06), len(text) + 0.2, 0.88, facecolor=shade, linewidth=0))
    # Texts may hold dollar signs, which are no formulas.
    axis.text(
        column,
        line + 0.5,
        text,
        color=colour,
        family="monospace",
        fontsize=_FONT_SIZE,
        va="center_baseline",
        parse_math=False,
    )
