"""Deep surgery (Yang et al., 2024, arXiv 2410.14389): repair after every block of a merged encoder, and at its end.

The modules sit on the blocks as forward hooks, so that any encoder with a list of blocks serves, unchanged:

    deep = DeepSurgery.for_model(merged, batch, ["mnist", "dtd"])
    with deep.attach(merged), deep.task("mnist"):
        z_hat = deep(feature_fn(merged, batch))
        loss = deep.loss(z_hat, deep.targets(expert, batch))
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zoo.merging.blocks import find_blocks, visit_blocks
from zoo.merging.features import default_features
from zoo.merging.surgery import SurgeryBank, surgery_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle

    from zoo.merging.blocks import Blocks
    from zoo.merging.features import FeatureFn


class DeepSurgery(nn.Module):
    """A bank of surgery modules for each block and one for the final features.

    Block b's output X_b becomes X_b - B_b(X_b) for all its tokens, and block b + 1 sees the repaired one. Gradients
    flow through the whole encoder, whose own parameters may be frozen.

    Args:
        task_names: Any distinct, non-empty names.
        widths: Channels of each block's output.
        dim: Channels of the final features.
        rank: As in `SurgeryModule`, as are the next two. The paper's code has 16 for ViT-B and 4 for ViT-L.
        bias: As in `SurgeryModule`.
        activation: As in `SurgeryModule`.
        channel_dim: Dimension of the channels in a block's output: -1 for tokens `(batch, tokens, width)`, 1 for maps
            `(batch, width, height, width)`. The final features have them last.
        batch_dim: Dimension of the batch in a block's output: 1 for `(tokens, batch, width)`.

    Raises:
        ValueError: If there is no block or an argument does not suit `SurgeryModule`.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        widths: Sequence[int],
        dim: int,
        rank: int = 16,
        bias: bool = False,
        activation: Literal["relu", "gelu", "none"] = "relu",
        channel_dim: int = -1,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths must have the width of at least one block")
        self.blocks = nn.ModuleList(
            SurgeryBank(task_names, width, rank, bias, activation, channel_dim) for width in widths
        )
        self.final = SurgeryBank(task_names, dim, rank, bias, activation)
        self._start(tuple(widths), dim, channel_dim, batch_dim)

    def _start(self, widths: tuple[int, ...], dim: int, channel_dim: int, batch_dim: int) -> None:
        self.widths, self.dim, self.channel_dim, self.batch_dim = widths, dim, channel_dim, batch_dim
        self.found_at: tuple[str, ...] = ()
        self._handles: list[RemovableHandle] = []
        self._task: str | None = None
        self._paused = False
        self._means: dict[int, Tensor] = {}

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        batch: Any,
        task_names: Sequence[str],
        rank: int = 16,
        bias: bool = False,
        activation: Literal["relu", "gelu", "none"] = "relu",
        channel_dim: int = -1,
        batch_dim: int = 0,
        *,
        blocks: Blocks = None,
        feature_fn: FeatureFn = default_features,
    ) -> DeepSurgery:
        """Modules of the widths that one forward pass of a batch shows; the model is left as it was.

        Args:
            model: The merged encoder.
            batch: What `feature_fn` takes.
            task_names: As in the class, as are the others.
            rank: As in the class.
            bias: As in the class.
            activation: As in the class.
            channel_dim: As in the class.
            batch_dim: As in the class.
            blocks: As in `attach`.
            feature_fn: Function (model, batch) -> features `(batch, dim)`.

        Raises:
            ValueError: If no blocks are found, or one of them was not run.
        """
        outputs, final = _observe(model, batch, feature_fn, find_blocks(model, blocks), _itself)
        widths = [output.shape[channel_dim] for output in outputs]
        return cls(task_names, widths, final.shape[-1], rank, bias, activation, channel_dim, batch_dim)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks."""
        return self.final.task_names

    def only(self, task: str) -> DeepSurgery:
        """The modules of one task, shared with this object, without its hooks.

        Raises:
            ValueError: If there is no such task.
        """
        part = type(self).__new__(type(self))
        nn.Module.__init__(part)
        part.blocks = nn.ModuleList(
            SurgeryBank.from_modules({task: self._bank(place)[task]}) for place in range(len(self.widths))
        )
        part.final = SurgeryBank.from_modules({task: self.final[task]})
        part._start(self.widths, self.dim, self.channel_dim, self.batch_dim)
        return part

    def attach(self, model: nn.Module, blocks: Blocks = None) -> DeepSurgery:
        """Repair the blocks' outputs of a model in every forward pass, until `detach` or the end of a `with`.

        Args:
            model: The merged encoder; it, too, is run with `functional_call` or as the skeleton of a `MergedModel`.
            blocks: Path of the list of blocks, such as "encoder.layers", or the paths of single layers in the order in
                which they run. None finds the one list of like modules that lies in no other.

        Returns:
            This object.

        Raises:
            ValueError: If it is attached already, no blocks are found, or their number is another one.
        """
        if self._handles:
            raise ValueError("deep surgery is attached to a model already; call detach() first")
        found = self._found(model, blocks)
        self.found_at = tuple(found)
        self._handles = visit_blocks(found.values(), self._repair)
        return self

    def detach(self) -> None:
        """Leave the model as it was before `attach`; nothing happens if there was none."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._means.clear()

    def __enter__(self) -> DeepSurgery:
        """This object, for `with deep.attach(model):`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()

    @contextmanager
    def task(self, task: str) -> Iterator[DeepSurgery]:
        """Within this `with`, the encoder is repaired for a task.

        Raises:
            ValueError: If there is no such task.
        """
        self.final[task]
        before, self._task = self._task, task
        self._means.clear()
        try:
            yield self
        finally:
            self._task = before

    def forward(self, z: Tensor) -> Tensor:
        """Repaired final features `(..., dim)` of the current task.

        Raises:
            ValueError: If there is no current task.
        """
        repaired: Tensor = self.final(z, self._current())
        return repaired

    @property
    def token_means(self) -> list[Tensor]:
        """Repaired outputs `(batch, width)` of the blocks in the last forward pass, each averaged over its tokens.

        Raises:
            ValueError: If a block was not run within the current task.
        """
        missing = [place for place in range(len(self.widths)) if place not in self._means]
        if missing:
            raise ValueError(
                f"blocks {missing} of {len(self.widths)} have not run since task() was entered: attach the modules to "
                "the merged encoder, then call it within task()"
            )
        return [self._means[place] for place in range(len(self.widths))]

    def targets(
        self, expert: nn.Module, batch: Any, feature_fn: FeatureFn = default_features, blocks: Blocks = None
    ) -> tuple[Tensor, ...]:
        """What an expert gives in place of the merged encoder: its block outputs averaged over tokens, its features.

        Args:
            expert: The expert of the batch's task, in evaluation mode.
            batch: What `feature_fn` takes.
            feature_fn: Function (model, batch) -> features `(batch, dim)`.
            blocks: As in `attach`; None means the paths of the attached model, if there is one.

        Returns:
            `(batch, width)` of each block, then `(batch, dim)`; without gradients.

        Raises:
            ValueError: If blocks are missing, were not run, or an output has another width.
        """
        found = self._found(expert, self.found_at or None if blocks is None else blocks)
        # The expert may run in the very module that is attached, with weights of its own.
        before, self._paused = self._paused, True
        try:
            means, final = _observe(expert, batch, feature_fn, found, self._token_mean)
        finally:
            self._paused = before
        for name, width, output in zip(
            [*found, "final features"], [*self.widths, self.dim], [*means, final], strict=True
        ):
            if output.shape[-1] != width:
                raise ValueError(
                    f"{name}: the expert has {output.shape[-1]} channels (mean over tokens of shape "
                    f"{tuple(output.shape)}), the merged encoder {width}; give a feature_fn and blocks that suit both"
                )
        return (*means, final)

    def loss(
        self,
        z_hat: Tensor,
        targets: Sequence[Tensor],
        loss: Literal["l1", "mse", "cosine", "smooth_l1"] = "l1",
        match: Literal["raw", "normalized"] = "raw",
    ) -> Tensor:
        """Sum over blocks of the distance of repaired token means from the targets, plus that of the final features.

        Args:
            z_hat: Repaired final features `(batch, dim)` of the last forward pass.
            targets: What `targets` or the cache of them gives for the same images.
            loss: As in `surgery_loss`.
            match: As in `surgery_loss`.

        Returns:
            A scalar; every term is a mean over the batch and dimensions.

        Raises:
            ValueError: If there is another number of targets, a shape differs, or a block was not run.
        """
        found = [*self.token_means, z_hat]
        if len(targets) != len(found):
            raise ValueError(
                f"there are {len(targets)} targets for {len(self.widths)} blocks and the final features: "
                f"{len(found)} are needed"
            )
        return torch.stack([surgery_loss(*pair, loss, match) for pair in zip(found, targets, strict=True)]).sum()

    def __getstate__(self) -> dict[str, Any]:
        """All but the outputs of the last forward pass, which belong to its graph and cannot be copied."""
        return {**self.__dict__, "_means": {}}

    def _found(self, model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
        found = find_blocks(model, blocks)
        if len(found) != len(self.widths):
            raise ValueError(
                f"{type(model).__name__} has {len(found)} blocks ({', '.join(found)}), but there are surgery modules "
                f"for {len(self.widths)}; name the right ones with blocks="
            )
        return found

    def _current(self) -> str:
        if self._task is None:
            raise ValueError(
                "deep surgery must know the task of its images: run the encoder within task(); "
                f"the tasks are {list(self.task_names)}"
            )
        return self._task

    def _bank(self, place: int) -> SurgeryBank:
        bank = self.blocks[place]
        assert isinstance(bank, SurgeryBank)
        return bank

    def _repair(self, place: int, output: Tensor) -> Tensor:
        if self._paused:
            return output
        repaired: Tensor = self._bank(place)(output, self._current())
        self._means[place] = self._token_mean(repaired)
        return repaired

    def _token_mean(self, output: Tensor) -> Tensor:
        """`(batch, width)` in float32 or wider."""
        channel_dim, batch_dim = self.channel_dim % output.ndim, self.batch_dim % output.ndim
        rows = output.movedim((batch_dim, channel_dim), (0, -1)).flatten(1, -2) if output.ndim > 2 else output
        wide = torch.promote_types(output.dtype, torch.float32)
        return rows.mean(1, dtype=wide) if output.ndim > 2 else rows.to(wide)


def _itself(output: Tensor) -> Tensor:
    return output


@torch.no_grad()
def _observe(
    model: nn.Module,
    batch: Any,
    feature_fn: FeatureFn,
    blocks: dict[str, nn.Module],
    reduce: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], Tensor]:
    """What `reduce` makes of each block's output in one forward pass, and the features."""
    seen: dict[int, Tensor] = {}

    def look(place: int, output: Tensor) -> Tensor:
        seen[place] = reduce(output)
        return output

    handles = visit_blocks(blocks.values(), look)
    try:
        final = feature_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for place, name in enumerate(blocks) if place not in seen]
    if missing:
        raise ValueError(
            f"{type(model).__name__} did not run its blocks {missing} for this batch; name the right ones with blocks="
        )
    return [seen[place] for place in range(len(blocks))], final
