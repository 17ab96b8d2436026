"""The plain references compute what merging and surgery compute: the benchmark compares like with like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.merging import (
    ONE_SHOT,
    MergeStep,
    SurgerySteps,
    clip_shapes,
    memory_record,
    new_store,
    numbers_in,
    streaming_peak,
    write_checkpoints,
)
from benchmarks.reference.merging import PlainLayerwiseMerge
from benchmarks.runner import run_case

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPES = {"stem": (7, 5), "norm": (5,), "head": (3, 5, 2)}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_merge_and_differentiate_alike(dtype: torch.dtype) -> None:
    step = MergeStep(SHAPES, dtype, num_tasks=4)
    merged, expected = step.plain()
    assert expected.shape == (3, 4)
    assert expected.abs().min() > 0
    for side in (step.ours, step.ours_adding_up):
        flat, found = side()
        torch.testing.assert_close(flat, torch.cat([tensor.flatten() for tensor in merged]), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_backward_pass_per_task_gives_the_gradient_of_the_sum() -> None:
    store = new_store(SHAPES, num_tasks=3)
    base = list(store.views(store.theta0.double()).values())
    vectors = [list(store.views(row.double()).values()) for row in store.tau]
    gradients = torch.randn(3, store.num_parameters, generator=torch.Generator().manual_seed(1))
    coef = torch.rand(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = [list(store.views(row.double()).values()) for row in gradients]
    merged, expected = PlainLayerwiseMerge(base, vectors).gradient(coef, rows)
    for name, tensor in zip(SHAPES, merged, strict=True):
        torch.testing.assert_close(store.merge(coef)[name], tensor.float())
    torch.testing.assert_close(store.coef_grad(gradients.sum(0)), expected.float(), rtol=1e-4, atol=1e-6)


def test_merge_cases_name_their_floor_and_bound() -> None:
    for dtype, floor in ((torch.float32, 19 / 16), (torch.bfloat16, 44 / 32)):
        alone, adding = MergeStep(SHAPES, dtype).cases()
        assert (alone.floor, alone.at_most) == (pytest.approx(floor), 2)
        assert alone.required == adding.required == 10
        assert adding.base is None
    assert run_case(alone, threads=1, repeats=1)["cost"] > 0


def test_shapes_are_those_of_clips_image_tower() -> None:
    pytest.importorskip("transformers")
    shapes = clip_shapes()
    assert (len(shapes), numbers_in(shapes)) == (199, 87_456_000)
    some = clip_shapes(20_000_000)
    assert 15_000_000 < numbers_in(some) <= 20_000_000
    assert max(some.values()) == max(shapes.values())


def test_surgery_learns_the_same_from_stored_features_and_from_images() -> None:
    pytest.importorskip("transformers")
    steps = SurgerySteps(num_tasks=2, batch_size=4, pool=8, rank=3, image_size=16, patch_size=8, hidden_size=16)
    first = steps.bank["task0"].down.weight.detach().clone()
    found, expected = ([side().item() for _ in range(20)] for side in (steps.ours, steps.plain))
    assert found == pytest.approx(expected, rel=1e-4)
    for task, (down, up) in zip(steps.experts, steps.reference.weights, strict=True):
        torch.testing.assert_close(steps.bank[task].down.weight, down, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(steps.bank[task].up.weight, up, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(steps.bank["task0"].down.weight, first, atol=1e-3)
    assert run_case(steps.case(), threads=1, repeats=1)["required_ratio"] == 20


def test_memory_is_counted_in_float32_copies_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.merging._in_new_process", lambda function, *args: function(*args))
    shapes = {"a": (2**22,), "b": (2, 2**21)}
    record = memory_record(shapes, torch.bfloat16, num_tasks=4)
    assert record["copy_bytes"] == 4 * 2**23
    assert record["required_copies_at_most"] == pytest.approx(5.2)
    # Two copies of vectors, the base, the merged parameters and the gradient are there at the same time.
    assert 4.9 < record["copies"] < 5.5


@pytest.mark.parametrize("merge", list(ONE_SHOT))
def test_streamed_merges_write_a_file_of_the_bases_size(merge: str, tmp_path: Path) -> None:
    base, experts = write_checkpoints(tmp_path, SHAPES, num_tasks=3)
    peak, seconds = streaming_peak(merge, base, experts, tmp_path / "out.safetensors")
    assert peak >= 0
    assert seconds > 0
    assert (tmp_path / "out.safetensors").stat().st_size >= 4 * numbers_in(SHAPES)
