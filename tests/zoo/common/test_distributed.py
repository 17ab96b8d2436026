from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.ranks import run_ranks
from zoo.common.distributed import count_per_process, global_mean, world_size

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
COUNTED = torch.tensor([[True, False, True], [False, True, False]])


def own_mean(rank: int) -> tuple[Tensor, Tensor, Tensor, int]:
    values = VALUES[rank].clone().requires_grad_()
    mean = global_mean(values, COUNTED[rank])
    mean.backward()
    assert values.grad is not None
    return mean.detach(), values.grad, count_per_process(COUNTED[rank].sum()), world_size()


def test_the_average_of_what_processes_find_is_the_mean_over_all(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, own_mean)
    assert sum(float(mean) for mean, *_ in found) / 2 == pytest.approx(float(VALUES[COUNTED].mean()))
    for rank, (_, grad, count, processes) in enumerate(found):
        assert processes == 2
        assert float(count) == 1.5
        torch.testing.assert_close(grad / 2, COUNTED[rank] / 3)


def test_one_process_has_the_plain_mean() -> None:
    assert world_size() == 1
    assert global_mean(VALUES[0], COUNTED[0]) == 2.5
    assert global_mean(VALUES[0], torch.tensor([2.0, 0.0, 1.0])) == 2
    count = torch.tensor(3)
    assert count_per_process(count).dtype == torch.float32
    assert count_per_process(count.double()).dtype == torch.float64
    weights = torch.tensor(3.0)
    count_per_process(weights).add_(1)
    assert weights == 3


def test_a_mean_of_nothing_is_zero_and_has_gradients() -> None:
    values = torch.ones(3, requires_grad=True)
    mean = global_mean(values, torch.zeros(3, dtype=torch.bool))
    assert mean == 0
    mean.backward()
    assert values.grad is not None
    assert values.grad.eq(0).all()
