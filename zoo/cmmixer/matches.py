"""What a retriever finds, as pictures and as lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.common.artifacts import log_figure
from zoo.common.predictions import PredictionFile, external_labels

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from zoo.cmmixer.types import VideoAudioBatch

_SHOWN = 200
"""Pairs that pictures are made of: all clips of a large set would not fit into memory."""
_CHUNK = 1024


class Matches:
    """Collects embeddings of a run, draws them, and writes lists.

    Args:
        module: The module whose Trainer is running.
    """

    def __init__(self, module: LightningModule) -> None:
        # Not an attribute of a module: modules find modules in their attributes, but not in those of other objects.
        self._module = module
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._pictures: list[tuple[Tensor, Tensor]] = []
        self._vectors: list[tuple[Tensor, Tensor, Tensor]] = []

    def show(self, batch: VideoAudioBatch, video: Tensor, audio: Tensor, ids: Tensor) -> None:
        """Keep the first pairs of a test for the pictures, of each the first frame.

        Args:
            batch: The batch.
            video: Its embeddings `(batch, d)`.
            audio: Likewise.
            ids: int64 `(batch,)`; items of one id are relevant for each other.
        """
        if not self._module.trainer.is_global_zero:
            return
        room = max(0, _SHOWN - sum(len(kept) for kept, _ in self._pictures))
        if room:
            self._pictures.append((batch.video[:room, 0].float().cpu(), batch.audio[:room, 0].float().cpu()))
            self.add(video[:room], audio[:room], ids[:room])

    def add(self, video: Tensor, audio: Tensor, ids: Tensor) -> None:
        """Keep embeddings `(batch, d)` of both streams and the ids `(batch,)`, on the CPU."""
        self._vectors.append((video.detach().float().cpu(), audio.detach().float().cpu(), ids.cpu()))

    def draw(self) -> None:
        """Draw and forget what `show` kept: similarities, and what is found for some queries."""
        if self._pictures:
            from zoo.cmmixer.figures import draw_retrieval, draw_similarity

            video, audio, ids = (torch.cat(parts) for parts in zip(*self._vectors, strict=True))
            pictures = tuple(torch.cat(parts) for parts in zip(*self._pictures, strict=True))
            similarity = video @ audio.T
            log_figure(self._module, "test/similarity", draw_similarity(similarity, ids))
            log_figure(self._module, "test/retrieval", draw_retrieval(pictures[0], pictures[1], similarity, ids))
        self.clear()

    def write(self, top_k: int) -> None:
        """Write `predictions.jsonl` over the gallery of all processes, and forget it. All processes must call it.

        A line is `{"query": "video" or "audio", "pair_id": ..., "found": [pair ids, best first], "scores": [...]}`;
        pairs have the datamodule's names, where it has such.

        Args:
            top_k: Length of the lists.
        """
        parts: list[Any] = [self._vectors]
        if self._module.trainer.world_size > 1:
            parts = [None] * self._module.trainer.world_size
            torch.distributed.all_gather_object(parts, self._vectors)
        self.clear()
        vectors = [kept for part in parts for kept in part]
        file = PredictionFile(self._module)
        file.open()
        # One gallery, one file with lists: those of the other processes stay empty.
        if not vectors or not self._module.trainer.is_global_zero:
            file.close()
            return
        video, audio, ids = (torch.cat(kept) for kept in zip(*vectors, strict=True))
        label = external_labels(self._module, "pair_names")
        names = [label(number) for number in ids.tolist()]
        for name, queries, gallery in (("video", video, audio), ("audio", audio, video)):
            for start in range(0, len(queries), _CHUNK):
                best = (queries[start : start + _CHUNK] @ gallery.T).topk(min(top_k, len(gallery)), dim=1)
                own = names[start : start + _CHUNK]
                found = [[names[place] for place in places] for places in best.indices.tolist()]
                lines = zip(own, found, best.values.tolist(), strict=True)
                file.write({"query": name, "pair_id": i, "found": f, "scores": s} for i, f, s in lines)
        file.close()
