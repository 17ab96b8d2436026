"""Base and experts of a merge that runs them: a stream of their parameters, and their tensors in a network."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.merging.merged_model import find_prefix
from zoo.merging.stream import VectorStream, refuse_source
from zoo.merging.weights import open_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from typing_extensions import Unpack

    from zoo.merging.stream import Selection
    from zoo.merging.weights import Source


class ExpertSources:
    """Weights of a base and of its experts, and the network that runs them.

    Args:
        pretrained: Module, state dict, file or folder; see `open_weights`.
        experts: The same by task.
        model: The network of these weights, or a module around it.
        out: Where the stream writes: a safetensors file, or memory if None.
        selection: See `Selection`.

    Attributes:
        base: The base's weights.
        stream: The merged parameters of base and experts.
        parameters: By merged name that is a parameter of the network, its name there; of a parameter with two names,
            the first.

    Raises:
        FileNotFoundError: If a source is missing.
        ValueError: If the weights do not fit each other or the network, or an option is unknown.
    """

    def __init__(
        self,
        pretrained: Source,
        experts: Mapping[str, Source],
        model: nn.Module,
        out: str | Path | None,
        **selection: Unpack[Selection],
    ) -> None:
        key_map = selection.pop("key_map", "auto")
        # Only networks of transformers have other names in their folders than in memory. What is in memory keeps its
        # names, so that the result fits where it came from.
        library = next((module for module in model.modules() if hasattr(module, "from_pretrained")), None)
        self.base = open_weights(
            pretrained, "pretrained", key_map=key_map, model=library if isinstance(pretrained, str | Path) else None
        )
        self._experts = {
            task: open_weights(source, f"expert {task}", key_map=key_map, base=self.base, model=library)
            for task, source in experts.items()
        }
        if out is not None:
            refuse_source(Path(out), [pretrained, *experts.values()])
        selection["key_map"] = "none"
        self.stream = VectorStream(self.base, self._experts, out, **selection)
        self._model, self._prefix = model, find_prefix(model, self.stream.names)
        own = model.state_dict()
        for name in self.stream.names:
            shape = tuple(own[self._prefix + name].shape)
            if shape != self.base.shape(name):
                raise ValueError(
                    f"{name} has the shape {self.base.shape(name)} in the pretrained weights and {shape} in "
                    f"{type(model).__name__}: give the network that they are for"
                )
        first: dict[int, str] = {}
        # A source may hold a shared parameter twice; both copies must then become the same.
        known = {
            full: first.setdefault(id(parameter), full)
            for full, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.parameters = {
            name: known[self._prefix + name] for name in self.stream.names if self._prefix + name in known
        }

    @property
    def task_names(self) -> list[str]:
        """The tasks."""
        return list(self._experts)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """What the network runs with to be a task's expert, by the network's names and in its types and place.

        What an expert lacks, or has in another shape, is the base's; what the base lacks too is the network's own.

        Raises:
            ValueError: If a tensor is not finite.
        """
        found: dict[str, Tensor] = {}
        for full, own in chain(self._model.named_parameters(), self._model.named_buffers()):
            name = full.removeprefix(self._prefix)
            for weights in (self._experts[task], self.base):
                if full.startswith(self._prefix) and name in weights and weights.shape(name) == tuple(own.shape):
                    found[full] = weights.finite(name).to(own.device, own.dtype)
                    break
        return found

    def expert(self, task: str, name: str) -> Tensor:
        """One tensor of an expert, in its own type and place; not to be written to."""
        return self._experts[task][name]
