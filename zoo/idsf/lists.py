"""Recommendations as people read them: with names, and with pictures where there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zoo.common.artifacts import log_figure, log_table
from zoo.common.predictions import external_labels
from zoo.idsf.figures import ItemCard, RecommendationRow, plot_recommendations

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from zoo.idsf.types import RankingBatch

_SHOWN = 20  # users in the table
_PICTURED = 4  # and in the picture
_LISTED = 5  # items of each


def show_recommendations(module: LightningModule, batch: RankingBatch, scores: Tensor) -> None:
    """A table, and a picture, of recommendations."""
    users, data = external_labels(module, "user_labels"), getattr(module.trainer, "datamodule", None)
    names = external_labels(module, "item_labels" if getattr(data, "item_names", None) is None else "item_names")
    images = getattr(data, "images", None)

    def cards(item_ids: list[int]) -> list[ItemCard]:
        return [ItemCard(names(i), None if images is None else images[i]) for i in item_ids]

    table: list[list[Any]] = []
    pictured: list[RecommendationRow] = []
    # Users of a batch come in the order of their number of targets: from the fewest to the most.
    for row in torch.linspace(0, len(scores) - 1, min(_SHOWN, len(scores))).long().tolist():
        top = scores[row].topk(min(_LISTED, scores.shape[1]))
        # What is not ranked ends a list of fewer candidates.
        best = top.indices[top.values > -torch.inf].tolist()
        seen = batch.seen_ids[batch.seen_rows == row][:_LISTED].tolist()
        targets = {item for item in batch.target_ids[row].tolist() if item >= 0}
        hits = [item in targets for item in best]
        user = users(int(batch.user_ids[row]))
        table.append([user, [names(i) for i in seen], [names(i) for i in best], sum(hits)])
        if best and (len(table) - 1) % (_SHOWN // _PICTURED) == 0:
            pictured.append(RecommendationRow(user, cards(seen), cards(best), hits))
    log_table(module, "test/recommendations", ["user", "trained on", "recommended", "hits"], table)
    if pictured:
        log_figure(module, "test/recommendations", plot_recommendations(pictured))
