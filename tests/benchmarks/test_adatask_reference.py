"""The plain reference and AdaTask compute the same: the benchmark compares like with like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.adatask import COMMAND, ConvTasks, Training, memory_record, mtan_shapes, step_case
from benchmarks.reference.adatask import PlainAdaTask, separate_backwards
from benchmarks.runner import report, run_case
from zoo.adatask import AdaTask, per_task_grads

TASKS = 3


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Toy(nn.Module):
    """A trunk that all tasks reach, a layer that two of them reach, and a head each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.pair = nn.Linear(4, 5), nn.Linear(5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(TASKS))

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        features = torch.tanh(self.trunk(x))
        deeper = torch.tanh(self.pair(features))
        seen = [features, deeper, deeper]
        return [10.0**k * (self.heads[k](seen[k])[:, 0] - y[:, k]).square().mean() for k in range(TASKS)]


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, TASKS, generator=generator)) for _ in range(steps)]


@pytest.mark.parametrize("rule", ["adam", "rmsprop", "adagrad"])
def test_plain_loop_and_adatask_walk_the_same_way(rule: str) -> None:
    plain, ours = toy(), toy()
    parameters = list(plain.parameters())
    reference = PlainAdaTask(parameters, TASKS, rule, lr=1e-2, eps=1e-8)
    optimizer = AdaTask(ours.parameters(), TASKS, rule=rule, lr=1e-2, eps=1e-8)
    for x, y in batches(25):
        for parameter in parameters:
            parameter.grad = None
        reference.step(separate_backwards(plain.losses(x, y), parameters))
        optimizer.zero_grad()
        optimizer.backward(ours.losses(x, y))
        optimizer.step()
        for expected, found in zip(parameters, ours.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    moved = max((a - b).abs().max().item() for a, b in zip(toy().parameters(), ours.parameters(), strict=True))
    assert moved > 0.05


def test_published_passes_give_the_gradients_of_per_task_grads() -> None:
    model, [(x, y)] = toy(), batches(1)
    parameters = list(model.parameters())
    expected = separate_backwards(model.losses(x, y), parameters)
    found = per_task_grads(model.losses(x, y), parameters)
    for row, own in zip(expected, found, strict=True):
        assert [g is None for g in row] == [g is None for g in own]
        for a, b in zip(row, own, strict=True):
            if a is not None:
                torch.testing.assert_close(b, a)
    # The layer of two tasks, and heads, have no gradient from the others.
    assert [[g is not None for g in row] for row in expected] == [
        [True, True, k > 0, k > 0, *(k == head for head in range(TASKS) for _ in "wb")] for k in range(TASKS)
    ]


def weights_after(step: Callable[[], None], steps: int) -> list[Tensor]:
    """Run a side of the benchmark and look into the model that it holds."""
    for _ in range(steps):
        step()
    [model] = [cell.cell_contents for cell in step.__closure__ or () if isinstance(cell.cell_contents, ConvTasks)]
    return [parameter.detach() for parameter in model.parameters()]


def test_all_sides_of_the_training_step_train_the_same_model() -> None:
    training = Training(TASKS, batch_size=2, image_size=6)
    sides = {mode: weights_after(training.ours(mode), 5) for mode in ("loop", "cut", "batched")}
    expected = weights_after(training.published(), 5)
    for found in sides.values():
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)
    base = weights_after(training.base(), 5)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, base, strict=True))


def test_large_step_has_the_shared_tensors_of_mtan() -> None:
    shapes = mtan_shapes()
    assert (len(shapes), sum(shape.numel() for shape in shapes)) == (144, 35_163_456)


def test_cases_name_their_floor_and_bound(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    shapes = [torch.Size([3, 4])] * 2
    case = step_case("toy", shapes, 2, at_once=2, at_most=3.2)
    [record] = report([case], tmp_path / "benchmark.json", command=COMMAND, data="none", threads=[1], repeats=1)
    assert (record["cost_floor"], record["required_cost_at_most"], record["required_ratio"]) == (2, 3.2, 3)
    [loop, cut, batched] = Training(2, batch_size=2, image_size=6).cases()
    assert loop.floor == pytest.approx(5 / 3)
    assert loop.at_most == cut.at_most == pytest.approx(5 / 3 * 1.1)
    assert batched.at_most is None
    assert run_case(loop, threads=1, repeats=1)["cost"] > 0


def test_memory_is_counted_in_copies_of_the_shared_parameters() -> None:
    shapes = [torch.Size([2**20])] * 8
    record = memory_record(shapes, 4, return_blocks=True)
    assert record["shared_bytes"] == 32 * 2**20
    assert record["default_copies"] == pytest.approx(record["default_peak_added_bytes"] / record["shared_bytes"])
    # Four gradients and their sum, against an update and at most one gradient.
    assert record["low_memory_copies"] < 3.5 < record["default_copies"]
