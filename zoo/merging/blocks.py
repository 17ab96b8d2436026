"""The blocks of an encoder: found by their path or by themselves, and visited by forward hooks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from zoo.merging.merged_model import MergedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

Blocks: TypeAlias = "str | Sequence[str] | None"
"""Path of a list of blocks; paths of single layers, in the order in which they run; or None for the one list."""


def find_blocks(model: nn.Module, blocks: Blocks = None) -> dict[str, nn.Module]:
    """Blocks of an encoder by their paths, in order.

    Args:
        model: The encoder, or a `MergedModel`, whose skeleton is searched.
        blocks: Path of an `nn.ModuleList` or `nn.Sequential`, or the paths of single layers. None finds the one
            `nn.ModuleList` that holds modules of one class and lies in no other such list.

    Raises:
        ValueError: If there is no such path, the list is empty, a module would be visited twice, or not exactly one
            list can be found.
    """
    network = model.skeleton if isinstance(model, MergedModel) else model
    modules: dict[str, nn.Module] = dict(network.named_modules(remove_duplicate=False))
    if blocks is None:
        blocks = _only_list(network, modules)
    paths = [blocks] if isinstance(blocks, str) else list(blocks)
    for path in paths:
        if path not in modules:
            raise ValueError(
                f"{type(network).__name__} has no module {path!r}; its lists of modules are {_lists(modules) or 'none'}"
            )
    if isinstance(blocks, str):
        chosen = modules[blocks]
        if not isinstance(chosen, nn.ModuleList | nn.Sequential):
            raise ValueError(
                f"blocks={blocks!r} is a {type(chosen).__name__}, not an nn.ModuleList or nn.Sequential; "
                "give a list of paths to name single layers"
            )
        paths = [f"{blocks}.{name}" if blocks else name for name, _ in chosen.named_children()]
    found = {path: modules[path] for path in paths}
    if not found or len({id(module) for module in found.values()}) < len(paths):
        raise ValueError(f"blocks={blocks!r} must name at least one module, and each only once, got {paths}")
    return found


def visit_blocks(blocks: Iterable[nn.Module], visit: Callable[[int, Tensor], Tensor]) -> list[RemovableHandle]:
    """Call `visit(place, output)` after each block and put what it returns in the place of the output.

    Args:
        blocks: Modules that return a tensor, or a tuple or list that begins with one.
        visit: Function of the block's place and its output tensor.

    Returns:
        Handles to remove the hooks with.
    """
    return [block.register_forward_hook(partial(_visited, visit, place)) for place, block in enumerate(blocks)]


def _visited(
    visit: Callable[[int, Tensor], Tensor], place: int, block: nn.Module, _: tuple[Any, ...], output: Any
) -> Any:
    if isinstance(output, Tensor):
        return visit(place, output)
    if not isinstance(output, tuple | list) or not output or not isinstance(output[0], Tensor):
        raise ValueError(
            f"block {place} ({type(block).__name__}) returned a {type(output).__name__}; "
            "known are a tensor, and a tuple or list that begins with one"
        )
    changed = visit(place, output[0])
    if hasattr(output, "_replace"):
        return type(output)(changed, *output[1:])
    return type(output)([changed, *output[1:]])


def _lists(modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]


def _only_list(network: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    alike = [path for path in _lists(modules) if len({type(module) for module in modules[path].children()}) == 1]
    outer = [path for path in alike if not any(path.startswith(f"{other}.") for other in alike)]
    if len(outer) != 1:
        raise ValueError(
            f"the blocks of {type(network).__name__} cannot be told (lists of like modules: {outer or 'none'}); "
            "name them, such as blocks='encoder.layers'"
        )
    return outer[0]
