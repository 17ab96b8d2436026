"""One network out of a base and its experts, by the name of a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from zoo.merging.backbones import ImageEncoder, build_encoder
from zoo.merging.coefficient_files import load_coefficients
from zoo.merging.fisher import fisher_merge
from zoo.merging.one_shot import dare_merge, magnitude_merge, task_arithmetic, ties_merge, weight_average
from zoo.merging.regmean import regmean_merge
from zoo.merging.transforms import Ties

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from zoo.merging.merging_module import MergingModule

RULES: dict[str, tuple[str, ...]] = {
    "pretrained": (),
    "joint": (),
    "average": (),
    "task_arithmetic": ("coef",),
    "magnitude": ("density", "coef"),
    "ties": ("density", "coef", "merge_func"),
    "dare": ("drop", "coef", "seed"),
    "dare_ties": ("drop", "coef", "seed", "ties_density"),
    "fisher": ("num_examples", "eps", "normalize", "per_example", "max_classes", "seed"),
    "regmean": ("num_examples", "off_diagonal"),
    "adamerging": ("coef_path",),
}
"""Rules that give one network for all tasks, and the options of each."""

_STREAMED: dict[str, Callable[..., Any]] = {
    "average": weight_average,
    "task_arithmetic": task_arithmetic,
    "magnitude": magnitude_merge,
    "ties": ties_merge,
    "dare": dare_merge,
    "dare_ties": dare_merge,
}


def check_rule(rule: str, options: Mapping[str, Any]) -> None:
    """Refuse a rule that does not exist, or options that it does not have.

    Raises:
        ValueError: If so; the message lists what there is.
    """
    if rule not in RULES:
        raise ValueError(f"the rule must be one of {', '.join(RULES)}, got {rule!r}")
    unknown = [name for name in options if name not in RULES[rule]]
    if unknown:
        raise ValueError(f"{rule} has no option {unknown[0]!r}: it has {', '.join(RULES[rule]) or 'none'}")
    if rule == "adamerging" and not options.get("coef_path"):
        raise ValueError("adamerging needs coef_path: a checkpoint of AdaMerging, or a file of its coefficients")


def merge_by_rule(
    module: MergingModule,
    rule: str,
    options: Mapping[str, Any],
    batches: Callable[[], Mapping[str, Iterable[Any]]],
) -> dict[str, Tensor]:
    """The merged parameters by name, on the device and in the precision of the module's store.

    Args:
        module: Base, experts, heads and network; its experts must be open.
        rule: One of `RULES`.
        options: Of the rule.
        batches: Gives inputs by task; called by the rules that need some (Fisher, RegMean).

    Raises:
        ValueError: See `check_rule`; or the rule's own.
    """
    check_rule(rule, options)
    store = module.store
    if rule == "pretrained":
        return dict(store.merge(0.0))
    if rule == "joint":
        return _fitted(module, _joint(module))
    if rule == "adamerging":
        return _with_coefficients(module, options["coef_path"])
    base, experts = module.sources()
    selection = module.selection()
    if rule == "fisher":
        heads = {task: module.head(task) for task in module.merge_tasks}
        found = fisher_merge(
            base, experts, module.encoder, batches(), heads, features=module.feature_fn, **selection, **options
        )
        return _fitted(module, cast("Mapping[str, Tensor]", found))
    if rule == "regmean":
        found = regmean_merge(
            base, experts, module.encoder, batches(), features=module.feature_fn, **selection, **options
        )
        return _fitted(module, cast("Mapping[str, Tensor]", found))
    own = dict(options)
    if rule == "dare_ties":
        own.setdefault("ties_density", 0.2)
    opened, read = module.opened()
    return _fitted(module, _STREAMED[rule](opened, read, **{**selection, "key_map": "none"}, **own))


def _fitted(module: MergingModule, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged parameters alone, as views of one flat tensor."""
    flat = module.store.theta0.clone()
    views = module.store.views(flat)
    for name, view in views.items():
        view.copy_(state[name])
    return views


def _joint(module: MergingModule) -> Mapping[str, Tensor]:
    folder = module.folder
    if folder is None or folder.joint is None:
        raise ValueError(
            "there is no encoder trained on all tasks: the folder of experts has none (recipe: {joint_epochs: 10} "
            "trains one)"
        )
    encoder = build_encoder(folder.joint)
    assert isinstance(encoder, ImageEncoder)
    return encoder.backbone.state_dict()


def _with_coefficients(module: MergingModule, path: str) -> dict[str, Tensor]:
    saved = load_coefficients(path)
    granularity = saved.about.get("granularity", "layer")
    if not isinstance(granularity, str):
        raise ValueError(f"{path}: its layers were made by a function, which is not in the file; merge by the module")
    store = module.store.regrouped(granularity)
    if saved.about.get("preprocess") == "ties":
        store = store.transform(Ties(float(saved.about.get("density") or 0.2)))
    return store.merge(saved.select(store.layer_names, store.task_names))
