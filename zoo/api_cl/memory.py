"""Memory of past tasks: synthetic images with the responses of their service, and real ones with labels.

The paper's text beyond its abstract could not be read; this is a documented reconstruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class MemoryRows(NamedTuple):
    """Stored rows of one task.

    Attributes:
        task: The task.
        images: `(n, c, h, w)`, float32 in [-1, 1].
        responses: Probabilities over the classes of the task, `(n, C_task)`, float32; `(n, 0)` where real images were
            stored without.
        labels: Global labels of real images, int64 `(n,)`; -1 of synthetic ones.
        real: Whether the images are real.
    """

    task: int
    images: Tensor
    responses: Tensor
    labels: Tensor
    real: bool


class ReplayMemory:
    """Images of past tasks, the same number of each, chosen at random.

    While a task is open its candidates fill a reservoir; closing it cuts every task to `size // closed tasks` rows.
    Every row has a random priority of its own, and a task keeps the first of them in turn: what is kept does not depend
    on how the candidates came in batches, and cutting drops at random.

    Only closed tasks count and are sampled from; the open task may hold as many rows again as one closed task.

    Args:
        size: Rows of all tasks together, real ones included; 0 stores nothing.
        balanced: Keep the same number of each class, by the highest response; real images always are balanced.
        max_real_share: Largest part of a task's rows that real images may take; 1 where there are no others.

    Raises:
        ValueError: If the size is negative, or the share lies outside of [0, 1].
    """

    def __init__(self, size: int, balanced: bool = True, max_real_share: float = 0.5) -> None:
        if size < 0:
            raise ValueError(f"the size of the memory must not be negative, got memory_size={size}")
        if not 0 <= max_real_share <= 1:
            raise ValueError(f"max_real_share must lie between 0 and 1, got {max_real_share}")
        self.size = size
        self.balanced = balanced
        self.max_real_share = max_real_share
        self.device = torch.device("cpu")
        self._closed: list[int] = []
        self._stores: dict[tuple[int, bool], _Store] = {}

    @property
    def tasks(self) -> list[int]:
        """The closed tasks, in the order of closing."""
        return list(self._closed)

    def __len__(self) -> int:
        """Rows of the closed tasks."""
        return sum(store.filled for _, store in self._of_closed())

    def count(self, task: int, real: bool) -> int:
        """Rows of one task that are stored now, open or closed."""
        store = self._stores.get((task, real))
        return 0 if store is None else store.filled

    @torch.no_grad()
    def offer(self, images: Tensor, responses: Tensor, task: int, generator: torch.Generator | None = None) -> None:
        """Offer synthetic images of the open task; all offered so far have the same chance of being kept.

        No value is read back from the device.

        Args:
            images: `(n, c, h, w)` in [-1, 1].
            responses: Probabilities over the classes of the task, `(n, C_task)`.
            task: The open task.
            generator: Source of the priorities, on any device.

        Raises:
            ValueError: If the task is closed or another one is open, or shapes do not fit.
        """
        labels = torch.full((len(images),), -1, device=responses.device)
        groups = responses.argmax(1) if self.balanced else torch.zeros_like(labels)
        self._add((task, False), images, responses, labels, groups, generator)

    @torch.no_grad()
    def add_real(
        self,
        images: Tensor,
        labels: Tensor,
        task: int,
        generator: torch.Generator | None = None,
        responses: Tensor | None = None,
    ) -> None:
        """Offer real images of the open task; at most `max_real_share` of its rows are kept, the same of each class.

        Args:
            images: `(n, c, h, w)` in [-1, 1].
            labels: Global labels, int64 `(n,)`.
            task: The open task.
            generator: Source of the priorities, on any device.
            responses: Probabilities over the classes of the task, `(n, C_task)`, if the service was asked.

        Raises:
            ValueError: If the task is closed or another one is open, or shapes do not fit.
        """
        if responses is None:
            responses = images.new_zeros(len(images), 0)
        self._add((task, True), images, responses, labels, labels, generator)

    @torch.no_grad()
    def close_task(self, task: int) -> None:
        """End the open task, and cut all tasks to the same share of the memory.

        Args:
            task: The open task; one without any row is fine.

        Raises:
            ValueError: If it is closed already, another one is open, or the size leaves no row for each task.
        """
        self._check_open(task)
        quota = self.size // (len(self._closed) + 1)
        if self.size and not quota:
            raise ValueError(
                f"memory_size={self.size} leaves no row for each of {len(self._closed) + 1} tasks; set a larger one"
            )
        self._closed.append(task)
        for (own, real), store in list(self._stores.items()):
            if not real:
                store.shrink(quota - min(self._real_quota(quota), self.count(own, True)))
        for (_, real), store in self._stores.items():
            if real:
                store.shrink(self._real_quota(quota))

    def sample(self, n: int, generator: torch.Generator | None = None, real: bool = False) -> list[MemoryRows]:
        """Draw rows of the closed tasks, uniformly over what is stored.

        None is drawn twice before all were drawn once.

        Args:
            n: Number of rows in all.
            generator: Source of the draw; one on the CPU never waits for the device.
            real: Draw real images, or synthetic ones.

        Returns:
            Rows by task, without the tasks of which none was drawn; nothing if nothing is stored.
        """
        stores = [(task, store) for (task, own), store in self._of_closed() if own == real and store.filled]
        stored = sum(store.filled for _, store in stores)
        if not stored or n < 1:
            return []
        device = generator.device if generator is not None else torch.device("cpu")
        rounds = [torch.randperm(stored, generator=generator, device=device) for _ in range(-(-n // stored))]
        drawn = torch.cat(rounds)[:n].cpu().sort().values
        ends = torch.tensor([store.filled for _, store in stores]).cumsum(0)
        bounds = [0, *torch.searchsorted(drawn, ends).tolist()]
        rows = []
        for position, (task, store) in enumerate(stores):
            own = drawn[bounds[position] : bounds[position + 1]] - (ends[position] - store.filled)
            if len(own):
                index = own.to(self.device)
                images, labels = store.images[index].float(), store.labels[index]
                rows.append(MemoryRows(task, images, store.responses[index], labels, real))
        return rows

    def export(self) -> dict[str, Tensor]:
        """The rows of the closed tasks, by names such as "task_0.synthetic.images"; safetensors can write them.

        Images are float16 `(n, c, h, w)` in [-1, 1], responses float32 `(n, C_task)`, labels int64 `(n,)`.
        """
        tensors: dict[str, Tensor] = {}
        for (task, real), store in self._of_closed():
            for name in ("images", "responses", "labels"):
                rows: Tensor = getattr(store, name)[: store.filled]
                tensors[f"task_{task}.{'real' if real else 'synthetic'}.{name}"] = rows.clone()
        return tensors

    def to(self, device: torch.device | str) -> ReplayMemory:
        """Move all rows to a device, where later ones go too."""
        self.device = torch.device(device)
        for store in self._stores.values():
            store.move(self.device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """All rows, those of the open task included, as plain values and tensors of their own."""
        stores = [{"task": task, "real": real, **store.state()} for (task, real), store in self._stores.items()]
        return {"size": self.size, "closed": list(self._closed), "stores": stores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows of `state_dict`, onto this memory's device.

        Raises:
            ValueError: If they come from a memory of another size.
        """
        size = int(state["size"])
        if size != self.size:
            raise ValueError(
                f"the state holds a memory of {size} rows, this one has {self.size}: set memory_size={size}"
            )
        self._closed = [int(task) for task in state["closed"]]
        self._stores = {}
        for own in state["stores"]:
            store = _Store.of_state(own)
            store.move(self.device)
            self._stores[int(own["task"]), bool(own["real"])] = store

    def _of_closed(self) -> Iterator[tuple[tuple[int, bool], _Store]]:
        closed = set(self._closed)
        return ((key, store) for key, store in self._stores.items() if key[0] in closed)

    def _real_quota(self, quota: int) -> int:
        return int(self.max_real_share * quota)

    def _check_open(self, task: int) -> None:
        if task in self._closed:
            raise ValueError(f"task {task} is closed: its rows are final")
        other = next((own for own, _ in self._stores if own != task and own not in self._closed), None)
        if other is not None:
            raise ValueError(f"task {other} is still open: close_task({other}) comes before task {task}")

    def _add(
        self,
        key: tuple[int, bool],
        images: Tensor,
        responses: Tensor,
        labels: Tensor,
        groups: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        task, real = key
        self._check_open(task)
        quota = self.size // (len(self._closed) + 1)
        capacity = self._real_quota(quota) if real else quota
        if images.ndim != 4 or responses.ndim != 2 or not len(images) == len(responses) == len(labels):
            raise ValueError(
                "expected images (n, c, h, w), responses (n, classes) and labels (n,), got "
                f"{tuple(images.shape)}, {tuple(responses.shape)} and {tuple(labels.shape)}"
            )
        if not capacity or not len(images):
            return
        store = self._stores.get(key)
        if store is None:
            store = _Store(capacity, images.shape[1:], responses.shape[1], self.device)
            self._stores[key] = store
        if images.shape[1:] != store.images.shape[1:] or responses.shape[1] != store.responses.shape[1]:
            raise ValueError(
                f"task {task} holds images {tuple(store.images.shape[1:])} with {store.responses.shape[1]} responses, "
                f"got {tuple(images.shape[1:])} with {responses.shape[1]}"
            )
        source = generator.device if generator is not None else torch.device("cpu")
        priorities = torch.rand(len(images), dtype=torch.float64, generator=generator, device=source)
        store.insert(images, responses, labels, groups, priorities)


class _Store:
    """A reservoir of fixed capacity: the rows first in turn, by rank within their group, then by priority."""

    _FIELDS = ("images", "responses", "labels", "groups", "priorities")

    def __init__(self, capacity: int, image_shape: torch.Size, classes: int, device: torch.device) -> None:
        self.images = torch.zeros(capacity, *image_shape, dtype=torch.float16, device=device)
        self.responses = torch.zeros(capacity, classes, device=device)
        self.labels = torch.full((capacity,), -1, device=device)
        self.groups = torch.full((capacity,), -1, device=device)
        # Empty slots are last in turn, so that a reservoir that is not full needs no case of its own.
        self.priorities = torch.full((capacity,), torch.inf, dtype=torch.float64, device=device)
        self.filled = 0

    def insert(self, images: Tensor, responses: Tensor, labels: Tensor, groups: Tensor, priorities: Tensor) -> None:
        device = self.images.device
        priorities, groups = priorities.to(device), groups.to(device)
        capacity, offered = len(self.priorities), len(images)
        turn = _turn(torch.cat([self.groups, groups]), torch.cat([self.priorities, priorities]))
        kept = torch.zeros(capacity + offered, dtype=torch.bool, device=device)
        kept[turn[:capacity]] = True
        # As many rows leave as come in: the i-th that comes takes the slot of the i-th that leaves. Beyond them pairs
        # of a slot that stays and a row that is refused write the slot onto itself, so that all shapes are fixed.
        pairs = min(capacity, offered)
        slots = kept[:capacity].long().argsort(stable=True)[:pairs]
        incoming = (~kept[capacity:]).long().argsort(stable=True)[:pairs]
        taken = kept[capacity:][incoming]
        for name, new in zip(self._FIELDS, (images, responses, labels, groups, priorities), strict=True):
            old: Tensor = getattr(self, name)
            values = new.to(device)[incoming].to(old.dtype)
            old[slots] = torch.where(taken.view(-1, *[1] * (old.ndim - 1)), values, old[slots])
        self.filled = min(capacity, self.filled + offered)

    def shrink(self, capacity: int) -> None:
        """Keep the first rows in turn, and give the rest of the space back."""
        self.filled = min(self.filled, capacity)
        first = _turn(self.groups, self.priorities)[: self.filled]
        for name in self._FIELDS:
            setattr(self, name, getattr(self, name)[first])

    def move(self, device: torch.device) -> None:
        for name in self._FIELDS:
            setattr(self, name, getattr(self, name).to(device))

    def state(self) -> dict[str, Any]:
        return {"filled": self.filled, **{name: getattr(self, name).clone() for name in self._FIELDS}}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> _Store:
        store = cls.__new__(cls)
        store.filled = int(state["filled"])
        for name in cls._FIELDS:
            setattr(store, name, state[name].clone())
        return store


def _turn(groups: Tensor, priorities: Tensor) -> Tensor:
    """Order in which rows are kept `(n,)`: the first of every group, then the second of every group, and so on."""
    by_priority = priorities.argsort(stable=True)
    order = by_priority[groups[by_priority].argsort(stable=True)]
    grouped = groups[order]
    rank = torch.arange(len(groups), device=groups.device) - torch.searchsorted(grouped, grouped)
    # Priorities lie in [0, 1): the rank decides first. Those of empty slots are infinite.
    place = torch.empty_like(priorities)
    place[order] = rank + priorities[order]
    return place.argsort(stable=True)
