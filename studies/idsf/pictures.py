"""Pictures of the card that results files hold: `python -m studies.idsf.pictures`."""

from __future__ import annotations

import json
from pathlib import Path

from zoo.idsf.figures import plot_ablation

ROOT = Path(__file__).resolve().parents[2]
METRIC = "test/recall@20"


def ablation(study: Path, target: Path) -> None:
    """Bars of the variants of a study, with the spread over its seeds.

    Args:
        study: Results file of a study.
        target: PNG to write.
    """
    summary = json.loads(study.read_text(encoding="utf-8"))["summary"]
    bars = {name: (row[METRIC]["mean"], row[METRIC]["std"] or 0.0) for name, row in summary.items()}
    plot_ablation(bars, "Recall@20").savefig(target, dpi=120)


if __name__ == "__main__":
    ablation(ROOT / "results" / "idsf" / "sparse.json", ROOT / "docs" / "idsf_ablation.png")
