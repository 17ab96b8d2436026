from __future__ import annotations

import copy
import math
import statistics
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_ranks
from zoo.adatask.metrics import TaskMetrics, primary, score
from zoo.adatask.tasks import KINDS, TaskSpec

if TYPE_CHECKING:
    from pathlib import Path

SPECS = {
    "binary": TaskSpec("task", "binary"),
    "multiclass": TaskSpec("task", "multiclass", 4),
    "regression": TaskSpec("task", "regression", 2, target_mean=1000.0, target_std=12.0),
    "segmentation": TaskSpec("task", "segmentation", 3),
    "depth": TaskSpec("task", "depth"),
    "normals": TaskSpec("task", "normals", 3),
}
Values = dict[str, float]


def example(kind: str, seed: int = 0, batch: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (with ties where they matter), target with missing pixels, mask, user ids."""
    g = torch.Generator().manual_seed(seed)
    mask, users = torch.rand(batch, generator=g) < 0.8, torch.randint(0, 9, (batch,), generator=g) * 1000
    size = (batch, 3, 4)
    if kind == "binary":
        logits = torch.randint(-4, 5, (batch, 1), generator=g) / 2
        return logits, (torch.rand(batch, generator=g) < 0.4).float(), mask, users
    if kind in ("multiclass", "segmentation"):
        classes, size = (4, (batch,)) if kind == "multiclass" else (3, size)
        logits = torch.randint(-2, 3, (batch, classes, *size[1:]), generator=g).float()
        return logits, torch.randint(-1, classes, size, generator=g), mask, users
    if kind == "regression":
        target = 1000 + 12 * torch.randn(batch, 2, generator=g)
        return (target - 1000) / 12 + torch.randn(batch, 2, generator=g) / 2, target, mask, users
    channels = 1 if kind == "depth" else 3
    target = torch.rand(batch, channels, *size[1:], generator=g) + (0.1 if kind == "depth" else -0.5)
    output = target + torch.randn(batch, channels, *size[1:], generator=g) / 5
    return output, target * (torch.rand(batch, 1, *size[1:], generator=g) < 0.7), mask, users


def evaluate(spec: TaskSpec, *batches: tuple[Tensor | None, ...]) -> Values:
    metrics = TaskMetrics(spec)
    for batch in batches:
        metrics.update(*batch)  # type: ignore[arg-type]
    return {name: float(value) for name, value in metrics.compute().items()}


def pair_auc(scores: list[float], labels: list[float]) -> float:
    """Share of (positive, negative) pairs in the right order, a tie counting one half."""
    positives = [s for s, y in zip(scores, labels, strict=True) if y == 1]
    negatives = [s for s, y in zip(scores, labels, strict=True) if y == 0]
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives)) if positives and negatives else math.nan


def predicted(logits: list[float], label: int) -> int:
    """The class of the largest logit; where the label ties with others, one of those."""
    rivals = [c for c in range(len(logits)) if c != label]
    best = max(rivals, key=lambda c: logits[c])
    return label if logits[label] > logits[best] else best


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(x) for x in logits)) - logits[label]


def brute_force(spec: TaskSpec, output: Tensor, target: Tensor, mask: Tensor, users: Tensor) -> Values:
    """All metrics of a split from their definitions, in Python floats."""
    output, target, users = output[mask].double(), target[mask], users[mask]
    if spec.kind == "binary":
        logits, labels = output[:, 0].tolist(), target.tolist()
        by_user: list[tuple[float, int]] = []
        for user in set(users.tolist()):
            rows = [i for i, u in enumerate(users.tolist()) if u == user]
            by_user.append((pair_auc([logits[i] for i in rows], [labels[i] for i in rows]), len(rows)))
        by_user = [(auc, n) for auc, n in by_user if not math.isnan(auc)]
        sides = [(x > 0 and y == 1) or (x < 0 and y == 0) for x, y in zip(logits, labels, strict=True)]
        return {
            "auc": pair_auc(logits, labels),
            "logloss": statistics.fmean(
                math.log(1 + math.exp(-x if y == 1 else x)) for x, y in zip(logits, labels, strict=True)
            ),
            "accuracy": statistics.fmean(sides),
            "user_auc": sum(auc * n for auc, n in by_user) / sum(n for _, n in by_user),
        }
    if spec.kind == "regression":
        predictions = (output * spec.target_std + spec.target_mean).tolist()
        columns = list(zip(zip(*predictions, strict=True), zip(*target.double().tolist(), strict=True), strict=True))
        squared = [[(p - y) ** 2 for p, y in zip(ps, ys, strict=True)] for ps, ys in columns]
        spread = [sum((y - statistics.fmean(ys)) ** 2 for y in ys) for _, ys in columns]
        return {
            "r2": statistics.fmean(1 - sum(errors) / s for errors, s in zip(squared, spread, strict=True)),
            "mse": statistics.fmean(e for errors in squared for e in errors),
            "mae": statistics.fmean(math.sqrt(e) for errors in squared for e in errors),
        }
    channels = output.shape[1]
    outputs = output.movedim(1, -1).reshape(-1, channels).tolist()
    targets = target.movedim(1, -1).reshape(-1, channels).tolist() if target.is_floating_point() else target.flatten()
    pairs = list(zip(outputs, targets if isinstance(targets, list) else targets.tolist(), strict=True))
    if spec.kind == "depth":
        errors = [(abs(o[0] - t[0]), t[0]) for o, t in pairs if t[0] > 0]
        return {
            "abs_err": statistics.fmean(e for e, _ in errors),
            "rel_err": statistics.fmean(e / t for e, t in errors),
        }
    if spec.kind == "normals":
        angles = [
            math.degrees(math.acos(sum(map(float.__mul__, o, t)) / (math.hypot(*o) * math.hypot(*t))))
            for o, t in pairs
            if any(t)
        ]
        within = {f"within_{x:g}": statistics.fmean(a < x for a in angles) for x in (11.25, 22.5, 30.0)}
        return {"mean_angle": statistics.fmean(angles), "median_angle": statistics.median(angles), **within}
    pairs = [(o, t) for o, t in pairs if t != -1]
    hits = [(predicted(o, t), t) for o, t in pairs]
    accuracy = statistics.fmean(p == t for p, t in hits)
    if spec.kind == "multiclass":
        return {"accuracy": accuracy, "logloss": statistics.fmean(cross_entropy(o, t) for o, t in pairs)}
    ratios = []
    for c in range(spec.num_outputs):
        union = sum(p == c or t == c for p, t in hits)
        if union:
            ratios.append(sum(p == t == c for p, t in hits) / union)
    return {"miou": statistics.fmean(ratios), "pixel_accuracy": accuracy}


def tolerance(name: str) -> float:
    return 0.5001e-3 if name == "median_angle" else 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_a_loop_over_the_labels(kind: str) -> None:
    for seed in range(3):
        batch = example(kind, seed)
        values, expected = evaluate(SPECS[kind], batch), brute_force(SPECS[kind], *batch)
        assert list(values) == list(expected)
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, abs=tolerance(name), rel=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_size_add_up_and_reset_forgets(kind: str) -> None:
    batch = example(kind)
    metrics = TaskMetrics(SPECS[kind])
    metrics.update(*example(kind, seed=7))
    metrics.compute()
    metrics.reset()
    for part in (slice(0, 3), slice(3, 3), slice(3, 30), slice(30, None)):
        metrics.update(*(x[part] for x in batch))
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx(evaluate(SPECS[kind], batch), rel=1e-9)


def _evaluate_share(rank: int, kind: str, cut: int) -> Values:
    share = slice(0, cut) if rank == 0 else slice(cut, None)
    tensors = [x[share] for x in example(kind)]
    with warnings.catch_warnings():
        # The library warns where a process computes without a batch.
        warnings.simplefilter("ignore")
        return evaluate(SPECS[kind], *([tensors] if len(tensors[0]) else []))


@pytest.mark.parametrize("cut", [11, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_unequal_shares_equal_one(tmp_path: Path, kind: str, cut: int) -> None:
    expected = evaluate(SPECS[kind], example(kind))
    for values in run_ranks(tmp_path, _evaluate_share, kind, cut):
        assert values == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_output_scores_worst(kind: str) -> None:
    output, target, mask, users = example(kind)
    values = evaluate(SPECS[kind], (torch.full_like(output, torch.nan), target, mask, users))
    worst = {"auc": 0.0, "user_auc": 0.0, "accuracy": 0.0, "r2": -math.inf, "miou": 0.0, "pixel_accuracy": 0.0}
    worst |= {"mean_angle": 180.0, "median_angle": 180.0, "within_11.25": 0.0, "within_22.5": 0.0, "within_30": 0.0}
    for name, value in values.items():
        assert value == pytest.approx(worst.get(name, math.inf), abs=1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_one_nan_output_never_improves_a_metric(kind: str) -> None:
    output, target, mask, users = example(kind)
    before = evaluate(SPECS[kind], (output, target, mask, users))
    lower = ("logloss", "mse", "mae", "abs_err", "rel_err", "mean_angle", "median_angle")
    for row in range(0, len(output), 3):
        broken = output.clone()
        broken[row] = torch.nan
        for name, value in evaluate(SPECS[kind], (broken, target, mask, users)).items():
            # A wrong prediction of a class in place of another one may raise a third class's ratio.
            if name != "miou":
                assert value >= before[name] if name in lower else value <= before[name], (name, row)


@pytest.mark.parametrize("kind", ["multiclass", "segmentation"])
def test_constant_logits_hit_no_class(kind: str) -> None:
    output, target, mask, users = example(kind)
    for constant in (0.0, 5.0, -torch.inf, torch.inf):
        values = evaluate(SPECS[kind], (torch.full_like(output, constant), target, mask, users))
        assert {v for name, v in values.items() if name != "logloss"} == {0.0}


def test_a_constant_output_has_no_skill() -> None:
    output, target, mask, users = example("binary")
    values = evaluate(SPECS["binary"], (torch.full_like(output, 0.3), target, mask, users))
    assert values["auc"] == values["user_auc"] == 0.5
    assert evaluate(SPECS["binary"], (torch.zeros_like(output), target))["accuracy"] == 0.0
    output, target, *_ = example("regression")
    mean = (target.mean(0) - 1000) / 12
    values = evaluate(SPECS["regression"], (mean.expand_as(output), target))
    assert values["r2"] == pytest.approx(0.0, abs=1e-6)
    output, target, *_ = example("normals")
    values = evaluate(SPECS["normals"], (torch.zeros_like(output), target))
    assert values["mean_angle"] == 180.0 and values["within_30"] == 0.0


def test_auc_counts_ties_one_half() -> None:
    # Pairs of (positive, negative): 2 > 1, 2 > 0, 1 = 1, 1 > 0.
    values = evaluate(SPECS["binary"], (torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert values["auc"] == 3.5 / 4
    assert list(values) == ["auc", "logloss", "accuracy"], "no metric within users without user ids"


def test_auc_tells_logits_apart_whose_probabilities_are_equal() -> None:
    logits = torch.tensor([40.0, 60.0, 50.0, 70.0])
    assert torch.sigmoid(logits).unique().numel() == 1
    assert evaluate(SPECS["binary"], (logits, torch.tensor([0.0, 1.0, 0.0, 1.0])))["auc"] == 1.0


def test_user_auc_weighs_users_by_rows_and_leaves_out_those_of_one_class() -> None:
    users = torch.tensor([7, 7, 3, 3, 3, 3, 9, 9])
    target = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    logits = torch.tensor([-5.0, -6.0, 1.0, 2.0, 0.0, -1.0, 0.0, 9.0])
    # User 7: 1 over 2 rows; user 3: 2/3 over 4 rows; user 9 has one class.
    values = evaluate(SPECS["binary"], (logits, target, None, users))
    assert values["user_auc"] == pytest.approx((1 * 2 + 2 / 3 * 4) / 6)


def test_user_ids_in_some_batches_only_are_refused() -> None:
    output, target, mask, users = example("binary")
    metrics = TaskMetrics(SPECS["binary"])
    metrics.update(output, target, mask, users)
    metrics.update(output, target, mask)
    with pytest.raises(ValueError, match="'task': all batches need user_ids, or none"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"user_ids must have shape \(40,\), got \(39,\)"):
        metrics.update(output, target, mask, users[1:])


def test_a_split_of_one_class_has_no_auc_and_warns_once_with_the_task_name() -> None:
    metrics = TaskMetrics(TaskSpec("clicks", "binary"))
    metrics.update(torch.randn(5), torch.ones(5))
    with pytest.warns(UserWarning, match="'clicks': auc is NaN .* both classes") as caught:
        values = metrics.compute()
    assert len(caught) == 1
    assert values["auc"].isnan() and values["logloss"].isfinite()
    metrics.reset()
    metrics.update(torch.randn(5), torch.zeros(5))
    assert metrics.compute()["auc"].isnan()  # a second warning would be an error


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_without_labels_is_nan_and_warns_once(kind: str) -> None:
    output, target, mask, users = example(kind)
    metrics = TaskMetrics(SPECS[kind])
    metrics.update(output, target, torch.zeros_like(mask), users)
    with pytest.warns(UserWarning, match="'task': .* is NaN over this split") as caught:
        values = metrics.compute()
    assert len(caught) == 1 and all(value.isnan() for value in values.values())


def test_r2_of_equal_labels_is_undefined_also_far_from_the_mean() -> None:
    metrics = TaskMetrics(TaskSpec("age", "regression"))
    metrics.update(torch.randn(1000), torch.full((1000,), 98765.43))
    with pytest.warns(UserWarning, match="'age': r2 is NaN"):
        assert metrics.compute()["r2"].isnan()


def test_miou_of_a_hand_computed_matrix() -> None:
    spec = TaskSpec("t", "segmentation", 5)
    target = torch.tensor([[[0, 0, 1, 1, -1, 2]]])
    classes = torch.tensor([[[0, 1, 1, 1, 3, 0]]])
    logits = nn.functional.one_hot(classes, 5).movedim(-1, 1).float()
    values = evaluate(spec, (logits, target))
    # Class 0: 1 / 3, class 1: 2 / 3, class 2: 0 / 1; class 3 stands on an ignored pixel alone, class 4 nowhere.
    assert values == pytest.approx({"miou": (1 / 3 + 2 / 3 + 0) / 3, "pixel_accuracy": 3 / 5})


def test_miou_comes_from_one_matrix_not_from_means_of_batches() -> None:
    output, target, *_ = example("segmentation")
    parts = [(output[:1], target[:1]), (output[1:], target[1:])]
    means = statistics.fmean(evaluate(SPECS["segmentation"], part)["miou"] for part in parts)
    together = evaluate(SPECS["segmentation"], *parts)["miou"]
    assert together == pytest.approx(evaluate(SPECS["segmentation"], (output, target))["miou"])
    assert abs(together - means) > 1e-3


def test_depth_errors_weigh_pixels_not_batches() -> None:
    first = (torch.full((1, 1, 1, 4), 3.0), torch.tensor([[[[2.0, 2.0, 2.0, 0.0]]]]))
    second = (torch.full((1, 1, 1, 4), 9.0), torch.tensor([[[[4.0, 0.0, 0.0, 0.0]]]]))
    values = evaluate(SPECS["depth"], first, second)
    assert values == pytest.approx({"abs_err": (1 + 1 + 1 + 5) / 4, "rel_err": (0.5 * 3 + 1.25) / 4})


@pytest.mark.parametrize("degrees", [0.001, 0.02, 11.2, 90.0, 179.9])
def test_small_and_large_angles_keep_their_digits(degrees: float) -> None:
    angle = math.radians(degrees)
    output = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64).view(1, 3, 1, 1) * 5
    target = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    values = evaluate(SPECS["normals"], (output, target))
    assert values["mean_angle"] == pytest.approx(degrees, rel=1e-6)
    assert values["median_angle"] == pytest.approx(degrees, abs=0.5001e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_outputs_score_as_their_float32_copies(kind: str) -> None:
    output, *rest = example(kind)
    half = output.bfloat16()
    assert evaluate(SPECS[kind], (half, *rest)) == evaluate(SPECS[kind], (half.float(), *rest))


@pytest.mark.parametrize("kind", ["multiclass", "segmentation"])
def test_a_target_beyond_the_classes_is_refused_by_its_value(kind: str) -> None:
    output, target, *_ = example(kind)
    for wrong in (9, -2):
        target.view(-1)[3] = wrong
        with pytest.raises(ValueError, match=f"'task': target must lie in .* found {wrong}"):
            TaskMetrics(SPECS[kind]).update(output, target)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_targets_are_never_looked_at(kind: str) -> None:
    output, target, mask, users = example(kind)
    changed = target.clone()
    changed[~mask] = torch.nan if target.is_floating_point() else 10**6
    assert evaluate(SPECS[kind], (output, changed, mask, users)) == evaluate(SPECS[kind], (output, target, mask, users))


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_copied_and_moved_with_the_module_that_holds_them(kind: str) -> None:
    holder = nn.Module()
    holder.metrics = nn.ModuleDict({"task": TaskMetrics(SPECS[kind])})
    twin = copy.deepcopy(holder)
    assert not holder.state_dict()
    holder.metrics["task"].update(*example(kind))
    holder.to("meta")
    states = holder.metrics["task"].metric.metric_state.values()
    tensors = [tensor for state in states for tensor in (state if isinstance(state, list) else [state])]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    twin.metrics["task"].update(*example(kind))
    values = {name: float(value) for name, value in twin.metrics["task"].compute().items()}
    assert values == evaluate(SPECS[kind], example(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_primary_metric_comes_first_and_its_direction_is_right(kind: str) -> None:
    output, target, mask, users = example(kind, seed=1)
    name, higher_is_better = primary(kind)
    values = evaluate(SPECS[kind], (output, target, mask, users))
    assert next(iter(values)) == name
    worst = evaluate(SPECS[kind], (torch.full_like(output, torch.nan), target, mask, users))
    assert (values[name] > worst[name]) is higher_is_better


def test_an_unknown_kind_has_no_primary_metric() -> None:
    with pytest.raises(ValueError, match="'ranking'"):
        primary("ranking")


def test_score_is_the_mean_of_primary_metrics_where_all_rise() -> None:
    specs = [TaskSpec("income", "binary"), TaskSpec("age", "regression")]
    values = {"auc/income": torch.tensor(0.9), "logloss/income": torch.tensor(5.0), "r2/age": torch.tensor(0.3)}
    mean = score(values, specs)
    assert mean is not None and float(mean) == pytest.approx(0.6)
    assert score(values, [*specs, TaskSpec("far", "depth")]) is None
    with pytest.raises(ValueError, match="'r2/hours' is missing"):
        score(values, [TaskSpec("hours", "regression")])
