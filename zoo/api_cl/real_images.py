"""The real images of the present task, each kept once however often batches bring it, with the API's responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.api_cl.black_box import content_keys

if TYPE_CHECKING:
    from collections.abc import Callable


class RealImages:
    """Distinct real images of a task, their labels, and responses that were asked for once.

    An image is known by its content, so that any loader will do. The state goes into checkpoints: a resumed run asks
    nothing twice.
    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._responses: list[Tensor] = []

    def __len__(self) -> int:
        """Number of distinct images."""
        return len(self._places)

    def clear(self) -> None:
        """Forget all: a new task begins."""
        self._places.clear()
        for rows in (self._images, self._labels, self._responses):
            rows.clear()

    def unseen(self, images: Tensor) -> int:
        """How many distinct images of a batch `(b, c, h, w)` were not there before: what `add` would ask for."""
        return len(set(content_keys(images)) - self._places.keys())

    @torch.no_grad()
    def add(self, images: Tensor, labels: Tensor, ask: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """Take in a batch.

        Args:
            images: float32 `(b, c, h, w)`.
            labels: int64 `(b,)`.
            ask: Called with the images that were not there before; gives their responses `(n, C)`.

        Returns:
            The responses of the whole batch, `(b, C)` on its device, or None without `ask`.
        """
        rows = images.detach().cpu().contiguous()
        keys = content_keys(rows)
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._places}
        if new:
            index = sorted(new.values())
            # Asked before anything is noted: a query that fails leaves no trace.
            answers = None if ask is None else ask(images[index]).cpu()
            for place, row in enumerate(index):
                self._places[keys[row]] = len(self._images)
                self._images.append(rows[row].clone())
                self._labels.append(labels[row].detach().cpu().clone())
                if answers is not None:
                    self._responses.append(answers[place].clone())
        if ask is None:
            return None
        return torch.stack([self._responses[self._places[key]] for key in keys]).to(images.device)

    def tensors(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images `(n, c, h, w)`, labels `(n,)`, and responses `(n, C)` or None, in the order in which they came.

        Args:
            device: Where to.

        Raises:
            ValueError: If there is none.
        """
        if not self._images:
            raise ValueError("there is no real image of this task")
        responses = torch.stack(self._responses).to(device) if self._responses else None
        return torch.stack(self._images).to(device), torch.stack(self._labels).to(device), responses

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        if not self._images:
            return {"keys": []}
        images, labels, responses = self.tensors()
        return {"keys": list(self._places), "images": images, "labels": labels, "responses": responses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.clear()
        if state["keys"]:
            self._places = {key: place for place, key in enumerate(state["keys"])}
            self._images, self._labels = list(state["images"]), list(state["labels"])
            self._responses = [] if state["responses"] is None else list(state["responses"])
