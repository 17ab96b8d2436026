from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.adatask.losses import task_loss
from zoo.adatask.tasks import KINDS, TaskSpec

SPECS = {
    "binary": TaskSpec("task", "binary"),
    "multiclass": TaskSpec("task", "multiclass", 4),
    "regression": TaskSpec("task", "regression", 2, target_mean=40.0, target_std=12.0),
    "segmentation": TaskSpec("task", "segmentation", 3),
    "depth": TaskSpec("task", "depth"),
    "normals": TaskSpec("task", "normals", 3),
}
BATCH, HEIGHT, WIDTH = 6, 3, 4


def example(kind: str, seed: int = 0, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Output, target with missing pixels, and a mask that leaves out about a third."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, generator=g) < 0.67
    if kind == "binary":
        return torch.randn(batch, 1, generator=g), (torch.rand(batch, generator=g) < 0.4).float(), mask
    if kind == "multiclass":
        return torch.randn(batch, 4, generator=g), torch.randint(0, 4, (batch,), generator=g), mask
    if kind == "regression":
        return torch.randn(batch, 2, generator=g), 40 + 12 * torch.randn(batch, 2, generator=g), mask
    size = (HEIGHT, WIDTH)
    if kind == "segmentation":
        return torch.randn(batch, 3, *size, generator=g), torch.randint(-1, 3, (batch, *size), generator=g), mask
    channels = 1 if kind == "depth" else 3
    defined = torch.rand(batch, 1, *size, generator=g) < 0.7
    target = torch.rand(batch, channels, *size, generator=g) + 0.1
    if kind == "normals":
        target = target - 0.6
    return torch.randn(batch, channels, *size, generator=g), target * defined, mask


def label_losses(spec: TaskSpec, output: Tensor, target: Tensor, mask: Tensor | None) -> list[float]:
    """The loss of every label that is there, from the definitions, in Python floats."""
    losses: list[float] = []
    for row in range(len(output)):
        if mask is not None and not mask[row]:
            continue
        if spec.kind == "binary":
            p = 1 / (1 + math.exp(-float(output[row])))
            losses.append(-math.log(p if target[row] == 1 else 1 - p))
        elif spec.kind == "multiclass":
            losses.append(cross_entropy(output[row].tolist(), int(target[row])))
        elif spec.kind == "regression":
            errors = [
                (z * spec.target_std + spec.target_mean - y) ** 2
                for z, y in zip(output[row].tolist(), target[row].tolist(), strict=True)
            ]
            losses.append(sum(errors) / len(errors))
        else:
            for i in range(output.shape[2]):
                for j in range(output.shape[3]):
                    o = output[row, :, i, j].tolist()
                    t = target[row, i, j].tolist() if spec.kind == "segmentation" else target[row, :, i, j].tolist()
                    if spec.kind == "segmentation" and t != -1:
                        losses.append(cross_entropy(o, t))
                    elif spec.kind == "depth" and t[0] > 0:
                        losses.append(abs(o[0] - t[0]))
                    elif spec.kind == "normals" and any(t):
                        dot = sum(a * b for a, b in zip(o, t, strict=True))
                        losses.append(1 - dot / (math.hypot(*o) * math.hypot(*t)))
    return losses


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(x) for x in logits)) - logits[label]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_count_equal_a_loop_over_the_labels(kind: str, masked: bool) -> None:
    for seed in range(3):
        output, target, mask = example(kind, seed)
        used = mask if masked else None
        expected = label_losses(SPECS[kind], output.double(), target, used)
        loss, count = task_loss(SPECS[kind], output, target, used)
        assert loss.dtype == count.dtype == torch.float32 and loss.shape == count.shape == ()
        assert int(count) == len(expected)
        assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_hand_computed_values() -> None:
    loss, _ = task_loss(TaskSpec("t", "binary"), torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]))
    assert float(loss) == pytest.approx(math.log(2))
    loss, _ = task_loss(TaskSpec("t", "multiclass", 4), torch.zeros(2, 4), torch.tensor([0, 3]))
    assert float(loss) == pytest.approx(math.log(4))
    hours = TaskSpec("t", "regression", target_mean=40.0, target_std=10.0)
    # Predictions 50 and 35 against 48 and 38: (4 + 9) / 2.
    loss, _ = task_loss(hours, torch.tensor([[1.0], [-0.5]]), torch.tensor([48.0, 38.0]))
    assert float(loss) == pytest.approx(6.5)
    depth = torch.tensor([[[[1.0, 2.0, 0.0]]]])
    loss, count = task_loss(TaskSpec("t", "depth"), torch.tensor([[[[1.5, 1.0, 9.0]]]]), depth)
    assert (float(loss), float(count)) == (0.75, 2.0)
    normals = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).T.view(1, 3, 1, 3)
    outputs = torch.tensor([[0.0, 0.0, 7.0], [0.0, 2.0, 0.0], [1.0, 1.0, 1.0]]).T.view(1, 3, 1, 3)
    loss, count = task_loss(TaskSpec("t", "normals", 3), outputs, normals)
    assert (float(loss), float(count)) == (0.5, 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_without_labels_is_zero_with_zero_gradients(kind: str) -> None:
    output, target, _ = example(kind)
    output.requires_grad_()
    if target.is_floating_point():
        target = torch.full_like(target, torch.nan)
    loss, count = task_loss(SPECS[kind], output, target, torch.zeros(BATCH, dtype=torch.bool))
    assert loss.requires_grad and float(loss.detach()) == 0.0 and float(count) == 0.0
    (gradient,) = torch.autograd.grad(loss, output)
    assert torch.equal(gradient, torch.zeros_like(output))


@pytest.mark.parametrize(
    ("kind", "nothing"), [("segmentation", -1), ("multiclass", -1), ("depth", 0), ("normals", 0), ("depth", -2)]
)
def test_targets_without_any_defined_label_give_zero_without_a_mask(kind: str, nothing: int) -> None:
    output, target, _ = example(kind)
    output.requires_grad_()
    loss, count = task_loss(SPECS[kind], output, torch.full_like(target, nothing))
    (gradient,) = torch.autograd.grad(loss, output)
    assert float(loss.detach()) == float(count) == 0.0 and not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_row_changes_neither_loss_nor_gradient(kind: str) -> None:
    output, target, mask = example(kind)
    mask[0], mask[1] = False, True
    changed = target.clone()
    changed[~mask] = torch.nan if target.is_floating_point() else 10**6
    results = []
    for labels, rows in ((target, mask), (changed, mask), (target[mask], None)):
        z = (output if rows is not None else output[mask]).clone().requires_grad_()
        loss, count = task_loss(SPECS[kind], z, labels, rows)
        (gradient,) = torch.autograd.grad(loss, z)
        results.append((loss.detach(), count, gradient if rows is None else gradient[mask]))
        assert rows is None or not gradient[~mask].any()
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_a_batch_is_the_count_weighted_mean_of_its_parts(kind: str) -> None:
    output, target, _ = example(kind, seed=2, batch=9)
    mask = torch.tensor([True, False, False, False, True, True, False, True, True])
    loss, count = task_loss(SPECS[kind], output, target, mask)
    parts = [task_loss(SPECS[kind], output[p], target[p], mask[p]) for p in (slice(0, 4), slice(4, 9))]
    assert len({float(n) for _, n in parts}) == 2, "parts of one size would not tell the weights"
    assert float(count) == sum(float(n) for _, n in parts)
    assert float(loss) == pytest.approx(sum(float(n * part) for part, n in parts) / float(count), rel=1e-5)


def test_standardised_loss_is_the_natural_one_in_units_of_the_deviation() -> None:
    output, target, mask = example("regression")
    natural, _ = task_loss(SPECS["regression"], output, target, mask)
    standardised, _ = task_loss(SPECS["regression"], output, target, mask, scale="standardised")
    assert float(standardised) == pytest.approx(float(natural) / 12.0**2, rel=1e-6)
    z_target = (target - 40.0) / 12.0
    assert float(standardised) == pytest.approx(float((output - z_target)[mask].square().mean()), rel=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "regression"])
def test_scale_leaves_kinds_without_a_unit_alone(kind: str) -> None:
    output, target, mask = example(kind)
    natural, standardised = (
        task_loss(SPECS[kind], output, target, mask, scale)[0] for scale in ("natural", "standardised")
    )
    assert torch.equal(natural, standardised)


@pytest.mark.parametrize("shape", [(BATCH, 1), (BATCH,)])
@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_one_column_and_no_column_mean_the_same(kind: str, shape: tuple[int, ...]) -> None:
    output, target, mask = torch.randn(BATCH, 1), torch.randint(0, 2, (BATCH,)).float(), torch.rand(BATCH) < 0.5
    spec = TaskSpec("t", kind)  # type: ignore[arg-type]
    assert torch.equal(task_loss(spec, output, target, mask)[0], task_loss(spec, output.view(shape), target, mask)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_gives_a_float32_loss_of_the_rounded_output(kind: str) -> None:
    output, target, mask = example(kind)
    half = output.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, count = task_loss(SPECS[kind], half, target, mask)
    assert loss.dtype == count.dtype == torch.float32
    assert torch.allclose(loss, task_loss(SPECS[kind], half.float(), target, mask)[0], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(kind: str) -> None:
    output, target, mask = example(kind)
    target = target.double() if target.is_floating_point() else target
    z = output.double().requires_grad_()
    assert task_loss(SPECS[kind], z, target, mask)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: task_loss(SPECS[kind], x, target, mask)[0], z)


def test_an_output_of_no_direction_has_a_bounded_gradient() -> None:
    output = torch.zeros(1, 3, 2, 2, requires_grad=True)
    loss, _ = task_loss(SPECS["normals"], output, torch.ones(1, 3, 2, 2))
    (gradient,) = torch.autograd.grad(loss, output)
    assert float(loss.detach()) == 1.0 and gradient.isfinite().all() and float(gradient.abs().max()) < 1e4


@pytest.mark.parametrize(
    ("kind", "output", "target", "mask", "message"),
    [
        ("binary", (6, 1), (6, 1), None, r"'task' \(binary.*target must have shape \(6,\), got \(6, 1\)"),
        ("binary", (6, 2), (6,), None, r"output must have shape \(6, 1\) or \(6,\), got"),
        ("multiclass", (6, 5), (6,), None, r"output must have shape \(6, 4\)"),
        ("regression", (6, 2), (6,), None, r"target must have shape \(6, 2\)"),
        ("segmentation", (6, 3, 8, 8), (6, 4, 4), None, r"target must have shape \(6, 8, 8\)"),
        ("depth", (6, 8, 8), (6, 1, 8, 8), None, r"output must have shape \(6, 1, height, width\)"),
        ("normals", (6, 3, 8, 8), (6, 1, 8, 8), None, r"target must have shape \(6, 3, 8, 8\)"),
        ("depth", (6, 1, 8, 8), (6, 1, 8, 8), (6, 1), r"mask must be bool of shape \(6,\)"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(
    kind: str, output: tuple[int, ...], target: tuple[int, ...], mask: tuple[int, ...] | None, message: str
) -> None:
    classes = kind in ("multiclass", "segmentation")
    labels = torch.zeros(target, dtype=torch.long if classes else torch.float)
    rows = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        task_loss(SPECS[kind], torch.zeros(output), labels, rows)


def test_wrong_types_and_an_unknown_scale_are_refused() -> None:
    output, target, mask = example("multiclass")
    with pytest.raises(ValueError, match=r"integer classes, got torch\.float32"):
        task_loss(SPECS["multiclass"], output, target.float())
    with pytest.raises(ValueError, match=r"floating point, got torch\.int64"):
        task_loss(SPECS["multiclass"], output.long(), target)
    with pytest.raises(ValueError, match=r"mask must be bool .* got torch\.int64"):
        task_loss(SPECS["multiclass"], output, target, mask.long())
    with pytest.raises(ValueError, match="'unit'"):
        task_loss(SPECS["multiclass"], output, target, scale="unit")  # type: ignore[arg-type]
