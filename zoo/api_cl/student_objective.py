"""What the continual learner minimises: the gap to the present API, replay, real labels, similarity to its past self.

The paper's text beyond its abstract could not be read; this is a documented reconstruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zoo.api_cl.gaps import ResponseGap
    from zoo.api_cl.memory import MemoryRows

SCENARIOS = ("til", "cil")
CIL_TARGETS = ("masked", "padded")


class ClassSets:
    """The classes of the tasks, as the masks that losses and predictions need.

    Args:
        task_classes: By task, its global labels.
        num_classes: K, the learner's outputs; by default the largest label and one. Classes of no task are never seen.

    Raises:
        ValueError: If a class is in two tasks, or a label is out of range.
    """

    def __init__(self, task_classes: Sequence[Sequence[int]], num_classes: int | None = None) -> None:
        self.task_classes = [[int(label) for label in classes] for classes in task_classes]
        if not self.task_classes or not all(self.task_classes):
            raise ValueError(f"task_classes must give each task at least one class, got {self.task_classes}")
        owner: dict[int, int] = {}
        for task, classes in enumerate(self.task_classes):
            for label in classes:
                if label in owner:
                    raise ValueError(f"class {label} is in task {owner[label]} and in task {task}: expected in one")
                owner[label] = task
        self.num_classes = max(owner) + 1 if num_classes is None else num_classes
        outside = sorted(label for label in owner if not 0 <= label < self.num_classes)
        if outside:
            raise ValueError(f"task_classes has the label {outside[0]}: expected 0 to {self.num_classes - 1}")
        self._owner = [owner.get(label, len(self.task_classes)) for label in range(self.num_classes)]

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.task_classes)

    def columns(self, task: int, device: torch.device | str | None = None) -> Tensor:
        """Global labels of a task, int64 `(C,)`."""
        return torch.tensor(self.task_classes[task], device=device)

    def seen(self, task: int, device: torch.device | str | None = None) -> Tensor:
        """Whether a class belongs to one of the tasks up to this one, bool `(K,)`."""
        return torch.tensor([owner <= task for owner in self._owner], device=device)

    def of_task(self, task: int, device: torch.device | str | None = None) -> Tensor:
        """Whether a class belongs to a task, bool `(K,)`."""
        return torch.tensor([owner == task for owner in self._owner], device=device)

    def task_of(self, labels: Tensor) -> Tensor:
        """The tasks of labels."""
        return torch.tensor(self._owner, device=labels.device)[labels]

    def allowed(self, labels: Tensor, scenario: str, task: int) -> Tensor:
        """The classes that a label competes with: bool `(B, K)`.

        Args:
            labels: int64 `(B,)`, global.
            scenario: "til", the classes of the label's own task; "cil", all up to `task`.
            task: The present task.
        """
        if scenario == "cil":
            return self.seen(task, labels.device).expand(len(labels), -1)
        owners = torch.tensor(self._owner, device=labels.device)
        return owners == owners[labels].unsqueeze(1)


def masked_cross_entropy(logits: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
    """Mean cross-entropy over the allowed classes; the others get no gradient.

    Args:
        logits: `(B, K)`.
        labels: int64 `(B,)`.
        allowed: bool `(B, K)`.
    """
    return F.cross_entropy(logits.float().masked_fill(~allowed, -torch.inf), labels)


def distillation(
    probs: Tensor,
    logits: Tensor,
    sets: ClassSets,
    task: int,
    gap: ResponseGap,
    target: str = "masked",
    decimals: int | None = None,
) -> Tensor:
    """Mean response gap of a batch of the task's API, L_new.

    Args:
        probs: Responses `(B, C)`.
        logits: Of the learner, `(B, K)`.
        sets: Classes of the tasks.
        task: The task.
        gap: The gap.
        target: "masked", over the API's own classes; "padded" (an ablation): the response says 0 for all earlier
            classes, which asserts of an image that it is none of them.
        decimals: To which the API rounds.
    """
    columns = sets.columns(task, logits.device)
    if target == "masked":
        return gap(probs, logits[:, columns], decimals).mean()
    seen = sets.seen(task, logits.device)
    padded = probs.new_zeros(len(probs), sets.num_classes)
    padded[:, columns] = probs
    return gap(padded[:, seen], logits[:, seen], decimals).mean()


def replay(
    rows: Sequence[MemoryRows],
    logits: Sequence[Tensor],
    sets: ClassSets,
    task: int,
    gap: ResponseGap,
    scenario: str = "til",
    decimals: Callable[[int], int | None] | None = None,
) -> Tensor:
    """Mean loss over remembered images, L_mem: stored responses are imitated, labels of real images are learnt.

    Args:
        rows: Remembered rows, each of one task and one kind.
        logits: Of the learner for each, `(n, K)`.
        sets: Classes of the tasks.
        task: The present task.
        gap: The gap.
        scenario: What real images compete with, see `ClassSets.allowed`.
        decimals: By task, to which its API rounds.
    """
    total, count = logits[0].new_zeros((), dtype=torch.float32), 0
    for group, scores in zip(rows, logits, strict=True):
        if group.real:
            loss = masked_cross_entropy(scores, group.labels, sets.allowed(group.labels, scenario, task))
        else:
            columns = sets.columns(group.task, scores.device)
            rounded = None if decimals is None else decimals(group.task)
            loss = gap(group.responses, scores[:, columns], rounded).mean()
        total, count = total + loss * len(scores), count + len(scores)
    return total / count


def learning_without_forgetting(logits: Tensor, old_logits: Tensor, sets: ClassSets, task: int) -> Tensor:
    """Mean KL divergence to the former network's answers, one softmax for each earlier task.

    Args:
        logits: Of the learner on the present task's images, `(B, K)`.
        old_logits: Of its frozen copy.
        sets: Classes of the tasks.
        task: The present task, at least 1.
    """
    losses = []
    for earlier in range(task):
        columns = sets.columns(earlier, logits.device)
        old = old_logits[:, columns].float().log_softmax(-1)
        new = logits[:, columns].float().log_softmax(-1)
        losses.append((old.exp() * (old - new)).sum(-1).mean())
    return torch.stack(losses).sum()


def fisher_diagonal(
    model: torch.nn.Module, images: Tensor, labels: Tensor, allowed: Tensor, chunk: int = 32
) -> dict[str, Tensor]:
    """Mean squared gradient of each image's own loss, by parameter.

    Args:
        model: Images to logits; evaluated as in eval mode is left to the caller.
        images: `(n, ...)`.
        labels: int64 `(n,)`.
        allowed: bool `(n, K)`.
        chunk: Images at a time.
    """
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    buffers = {name: tensor.detach() for name, tensor in model.named_buffers()}

    def loss(weights: Mapping[str, Tensor], image: Tensor, label: Tensor, mask: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (dict(weights), buffers), (image[None],))
        return masked_cross_entropy(logits, label[None], mask[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        for name, gradients in each(parameters, images[part], labels[part], allowed[part]).items():
            total[name] += gradients.square().sum(0) / len(images)
    return total
