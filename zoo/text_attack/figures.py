"""Pictures of attacks: exposure before and after, lift against the size of the edit, accuracy, queries, defence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from zoo.text_attack.attack import AttackResult

BEFORE, AFTER, NEUTRAL, REPAIRED = "#7a869a", "#c8442f", "#c9ced6", "#2c7a53"


def _axes(width: float = 6.4, height: float = 4.0) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def exposure_pairs(results: Sequence[AttackResult], recipe: str, most: int = 40) -> Figure:
    """Each target's exposure before and after, the largest rise at the top; at most `most` targets."""
    chosen = sorted(results, key=lambda r: (r.exposure_post or 0) - (r.exposure_pre or 0))[-most:]
    figure, axes = _axes(7.2, 1.4 + 0.26 * len(chosen))
    for row, result in enumerate(chosen):
        before, after = result.exposure_pre or 0.0, result.exposure_post or 0.0
        axes.plot([before, after], [row, row], color=NEUTRAL, linewidth=2, zorder=1)
    rows = range(len(chosen))
    axes.scatter([r.exposure_pre for r in chosen], rows, color=BEFORE, s=26, zorder=2, label="before")
    axes.scatter([r.exposure_post for r in chosen], rows, color=AFTER, s=26, zorder=2, label="after")
    axes.set_yticks(list(rows), [_short(r.perturbed) for r in chosen], fontsize=7)
    axes.set_xlabel("exposure: share of users who are shown the item")
    axes.set_title(f"{recipe}: exposure of {len(chosen)} attacked titles", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_xlim(left=0)
    return figure


def lift_by_edit(results: Sequence[AttackResult]) -> Figure:
    """Rise of exposure against the number of edited characters, a point a target."""
    figure, axes = _axes()
    axes.scatter(
        [r.edit_distance for r in results], [(r.exposure_post or 0) - (r.exposure_pre or 0) for r in results],
        color=AFTER, alpha=0.6, edgecolors="none",
    )  # fmt: skip
    axes.axhline(0, color=NEUTRAL, linewidth=1, zorder=0)
    axes.set_xlabel("characters edited (Levenshtein distance)")
    axes.set_ylabel("rise of exposure")
    axes.set_title("What an edit of a title brings", fontsize=10)
    return figure


def budget_curve(results: Sequence[AttackResult], goal: str) -> Figure:
    """Mean of the best goal value so far against the queries spent on each target."""
    traces = [r.trace for r in results if r.trace]
    last = max((int(r.n_queries) for r in results), default=1)
    figure, axes = _axes()
    if traces:
        steps = range(1, max(2, last + 1))
        means = []
        for step in steps:
            # The first entry is the title itself, at one query.
            reached = [
                max((value for queries, value in trace if queries <= step), default=trace[0][1]) for trace in traces
            ]
            means.append(sum(reached) / len(reached))
        axes.step(list(steps), means, where="post", color=AFTER)
    axes.set_xlabel("queries spent on a target")
    axes.set_ylabel(f"mean best {goal} on the anchor users")
    axes.set_title("What a query budget would have reached", fontsize=10)
    return figure


def accuracy(clean: Mapping[str, float], attacked: Mapping[str, float]) -> Figure:
    """Metrics of the recommender, clean and with all attacked titles at once."""
    names = [name for name in clean if name in attacked]
    figure, axes = _axes(max(4.8, 1.0 * len(names)), 3.6)
    places = list(range(len(names)))
    axes.bar([p - 0.2 for p in places], [clean[n] for n in names], 0.4, color=BEFORE, label="clean")
    axes.bar([p + 0.2 for p in places], [attacked[n] for n in names], 0.4, color=AFTER, label="attacked titles")
    axes.set_xticks(places, names, fontsize=8)
    axes.set_title("Accuracy over all users", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def defense(exposures: Mapping[str, float], targets: int) -> Figure:
    """Mean exposure: clean, attacked, behind the defence, and under an attack that knows it."""
    figure, axes = _axes(5.2, 3.6)
    colours = {"clean": BEFORE, "attacked": AFTER, "defended": REPAIRED}
    bars = axes.bar(list(exposures), list(exposures.values()), color=[colours.get(n, "#e08a3c") for n in exposures])
    axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_ylabel("mean exposure")
    axes.set_title(f"Defence, {targets} targets", fontsize=10)
    return figure


def recipes(lifts: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Lift (mean after / mean before) of several recipes, with its interval over targets.

    Args:
        lifts: By recipe: lift, and its lower and upper bound.
    """
    figure, axes = _axes(5.6, 3.6)
    names = list(lifts)
    values = [lifts[name][0] for name in names]
    spread = [[lifts[n][0] - lifts[n][1] for n in names], [lifts[n][2] - lifts[n][0] for n in names]]
    axes.bar(names, values, color=AFTER, yerr=spread, ecolor=BEFORE, capsize=3)
    axes.axhline(1, color=BEFORE, linewidth=1, linestyle="--")
    axes.set_ylabel("exposure after / before")
    axes.tick_params(axis="x", labelsize=8)
    return figure


def _short(text: str, most: int = 42) -> str:
    text = text.replace("$", r"\$")
    return text if len(text) <= most else f"{text[: most - 1]}…"
