"""Accumulation, clipping and exchange of gradients by task."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from zoo.adatask.task_gradients import TaskGradients

SHAPES = ((3, 2), (4,), ())


def parameters(dtype=torch.float64):
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def rows(seed, missing=()):
    generator = torch.Generator().manual_seed(seed)
    full = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES] for _ in range(2)]
    return [[None if (k, i) in missing else g for i, g in enumerate(row)] for k, row in enumerate(full)]


def collect(*batches, counts=None):
    gradients = TaskGradients(parameters(), ["a", "b"])
    for number, batch in enumerate(batches):
        gradients.accumulate(batch, [True, True], None if counts is None else torch.tensor(counts[number]))
    return gradients


def test_without_counts_batches_are_summed():
    gradients = collect(rows(0), rows(1), rows(2))
    for k in range(2):
        for i in range(3):
            torch.testing.assert_close(gradients.rows[k][i], sum(rows(s)[k][i] for s in range(3)))


def test_with_counts_each_task_is_averaged_over_its_labels():
    counts = [[1.0, 4.0], [3.0, 0.0], [2.0, 4.0]]
    gradients = collect(rows(0), rows(1), rows(2), counts=counts)
    weights = torch.tensor(counts, dtype=torch.float64)
    for k in range(2):
        for i in range(3):
            expected = sum(weights[s, k] * rows(s)[k][i] for s in range(3)) / weights[:, k].sum()
            torch.testing.assert_close(gradients.rows[k][i], expected)
    assert gradients.counts.tolist() == [6.0, 8.0]


def test_a_parameter_out_of_reach_in_one_batch_counts_as_zero_there():
    gradients = collect(rows(0, missing=[(0, 1)]), rows(1), counts=[[1.0, 1.0], [3.0, 1.0]])
    torch.testing.assert_close(gradients.rows[0][1], rows(1)[0][1] * 0.75)


def test_accumulation_leaves_the_tensors_of_autograd_alone():
    first, second = rows(0), rows(1)
    collect(first, second)
    torch.testing.assert_close(first[0][0], rows(0)[0][0])
    torch.testing.assert_close(second[0][0], rows(1)[0][0])


def norm(tensors):
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def test_clipping_bounds_the_whole_gradient_of_each_task():
    batch = rows(0)
    batch[1] = [g * 1e-3 for g in batch[1]]
    gradients = collect(batch)
    gradients.clip(0.5, "task")
    assert norm(gradients.rows[0]) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(gradients.rows[0][0], batch[0][0] * 0.5 / norm(batch[0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients.rows[1], batch[1])


def test_joint_clipping_bounds_all_tasks_by_one_factor():
    gradients = collect(rows(0))
    gradients.clip(0.5, "joint")
    assert norm([*gradients.rows[0], *gradients.rows[1]]) == pytest.approx(0.5, rel=1e-5)
    ratio = gradients.rows[0][0] / rows(0)[0][0]
    torch.testing.assert_close(gradients.rows[1][1], rows(0)[1][1] * ratio[0, 0])


def test_clipping_the_sum_bounds_what_another_optimizer_steps_with():
    gradients = collect(rows(0))
    gradients.clip(0.5, "sum")
    assert norm(gradients.joint()) == pytest.approx(0.5, rel=1e-5)


def test_clipping_by_value_bounds_each_number():
    gradients = collect(rows(0))
    gradients.clip_value(0.3)
    assert max(float(g.abs().max()) for row in gradients.rows for g in row) == 0.3
    torch.testing.assert_close(gradients.rows[0][0], rows(0)[0][0].clamp(-0.3, 0.3))


def test_a_matrix_goes_out_and_back_where_there_was_a_gradient():
    gradients = collect(rows(0, missing=[(1, 0)]))
    assert gradients.shared() == [1, 2]
    matrix = gradients.matrix([0, 1])
    assert matrix.shape == (2, 10)
    assert not matrix[1, :6].any()
    gradients.replace([0, 1], matrix + 1)
    torch.testing.assert_close(gradients.rows[0][0], rows(0)[0][0] + 1)
    assert gradients.rows[1][0] is None


def test_the_sum_is_written_to_grad_and_not_shared_with_the_rows():
    gradients = collect(rows(0, missing=[(1, 0)]))
    gradients.write_grad(factor=2.0)
    torch.testing.assert_close(gradients.parameters[1].grad, 2 * (rows(0)[0][1] + rows(0)[1][1]))
    torch.testing.assert_close(gradients.parameters[0].grad, 2 * rows(0)[0][0])
    torch.testing.assert_close(gradients.rows[0][0], rows(0)[0][0])


def exchange(rank, with_counts):
    gradients = TaskGradients(parameters(), ["a", "b"])
    calls = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *arguments, **options: (calls.append(1), real(*arguments, **options))[1]
    found = []
    for step in range(3):
        gradients.clear()
        # Rank 1 has no label of task b in step 1; nobody reaches b's last parameter in step 2.
        absent = rank == 1 and step == 1
        batch = rows(10 * step + rank, missing=[(1, 2)] if step == 2 else [])
        if absent:
            batch[1] = [None] * 3
        counts = torch.tensor([1.0 + rank, 3.0]) if with_counts else None
        gradients.accumulate(batch, [True, not absent], counts)
        before = len(calls)
        gradients.all_reduce()
        flat = [g if g is not None else torch.tensor(torch.nan) for row in gradients.rows for g in row]
        found.append({"gradients": flat, "calls": len(calls) - before, "present": list(gradients.present)})
    return found


@pytest.mark.parametrize("with_counts", [False, True])
def test_processes_average_gradients_by_task_with_one_collective_call(tmp_path, with_counts):
    ranks = run_ranks(tmp_path, exchange, with_counts)
    for left, right in zip(*ranks, strict=True):
        assert all(
            torch.equal(a, b) or bool(a.isnan().all())
            for a, b in zip(left["gradients"], right["gradients"], strict=True)
        )
    # The first step also agrees on who reaches what.
    assert [step["calls"] for step in ranks[0]] == [3, 1, 1]
    assert [step["present"] for step in ranks[0]] == [[True, True]] * 3
    for step, found in enumerate(ranks[0]):
        batches = [rows(10 * step + rank) for rank in range(2)]
        weights = [(1 / 3, 0.5), (2 / 3, 0.5)] if with_counts else [(0.5, 0.5), (0.5, 0.5)]
        if step == 1:
            weights = [(weights[0][0], 1.0 if with_counts else 0.5), (weights[1][0], 0.0)]
        for k in range(2):
            for i in range(3):
                actual = found["gradients"][3 * k + i]
                if step == 2 and (k, i) == (1, 2):
                    assert bool(actual.isnan())
                    continue
                expected = sum(weights[rank][k] * batches[rank][k][i] for rank in range(2))
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
