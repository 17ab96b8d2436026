"""Representation bias against the mean absolute difference of whole sets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from zoo.merging.bias import RepresentationBias, TaskRepresentationBias, warn_nothing_to_repair

if TYPE_CHECKING:
    from pathlib import Path


def pair(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 7, generator=generator), torch.randn(rows, 7, generator=generator)


@pytest.mark.parametrize("sizes", [(50,), (16, 16, 16, 2), (1,) * 50, (49, 1)])
def test_the_bias_is_the_l1_loss_of_all_images_whatever_the_batches(sizes: tuple[int, ...]) -> None:
    z, z_ind = pair(50)
    metric = RepresentationBias()
    for batch in zip(z.split(sizes), z_ind.split(sizes), strict=True):
        metric.update(*batch)
    torch.testing.assert_close(metric.compute(), F.l1_loss(z.double(), z_ind.double()), rtol=1e-12, atol=0)


def test_the_bias_of_a_model_against_itself_is_zero() -> None:
    metric = RepresentationBias()
    metric.update(pair(9)[0], pair(9)[0])
    assert float(metric.compute()) == 0


def test_sums_do_not_lose_small_batches() -> None:
    metric = RepresentationBias()
    metric.update(torch.full((1, 1), 2.0**24), torch.zeros(1, 1))
    metric.update(torch.full((1, 1), 1.0), torch.zeros(1, 1))
    assert float(metric.total) == 2**24 + 1


def test_token_features_count_every_number() -> None:
    z, z_ind = (part.reshape(5, 2, 7) for part in pair(10))
    metric = RepresentationBias()
    metric.update(z, z_ind)
    torch.testing.assert_close(metric.compute().float(), F.l1_loss(z, z_ind))


def test_differences_of_half_precision_features_are_not_rounded() -> None:
    z, z_ind = (100 * part.half() for part in pair(50))
    metric = RepresentationBias()
    metric.update(z, z_ind)
    torch.testing.assert_close(metric.compute(), F.l1_loss(z.double(), z_ind.double()))


def test_a_broken_feature_is_infinitely_far() -> None:
    metric = RepresentationBias()
    z, z_ind = pair(9)
    z[3, 2] = torch.nan
    metric.update(z, z_ind)
    assert float(metric.compute()) == math.inf


def test_a_bias_keeps_no_graph() -> None:
    metric = RepresentationBias()
    z, z_ind = pair(9)
    metric.update(z.requires_grad_(), z_ind)
    assert not metric.total.requires_grad


def test_tasks_are_counted_apart_and_averaged_alike() -> None:
    metric = TaskRepresentationBias(["a.b", "c", "never"])
    batches = [("a.b", 30, 0), ("c", 4, 1), ("a.b", 1, 2)]
    for task, rows, seed in batches:
        metric.update(*pair(rows, seed), task)
    whole = {
        name: [torch.cat([pair(rows, seed)[side] for task, rows, seed in batches if task == name]) for side in (0, 1)]
        for name in ("a.b", "c")
    }
    expected = {name: F.l1_loss(z.double(), z_ind.double()) for name, (z, z_ind) in whole.items()}
    values = metric.compute()
    assert list(values) == ["a.b", "c", "never", "mean"]
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value)
    assert values["never"].isnan()
    torch.testing.assert_close(values["mean"], (expected["a.b"] + expected["c"]) / 2)
    metric.reset()
    metric.update(*pair(4, 1), "c")
    torch.testing.assert_close(metric.compute()["c"], expected["c"])
    assert metric.compute()["a.b"].isnan()


def _rank(rank: int) -> list[Tensor]:
    single, tasks = RepresentationBias(), TaskRepresentationBias(["a", "b"])
    for seed, rows in ((rank, 3 + rank), (rank + 2, 1)):
        single.update(*pair(rows, seed))
        tasks.update(*pair(rows, seed), "ab"[rank])
    return [single.compute(), *tasks.compute().values()]


def test_processes_add_up(tmp_path: Path) -> None:
    parts = [pair(3 + rank, rank) for rank in range(2)], [pair(1, rank + 2) for rank in range(2)]
    own = [torch.cat([(z - z_ind).double() for z, z_ind in (parts[0][r], parts[1][r])]).abs() for r in range(2)]
    expected = [torch.cat(own).mean(), own[0].mean(), own[1].mean(), (own[0].mean() + own[1].mean()) / 2]
    for found in run_ranks(tmp_path, _rank):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 7\), the expert's \(4, 1\)"):
        RepresentationBias().update(torch.zeros(4, 7), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"unknown task 'c'; the tasks are \['a', 'b'\]"):
        TaskRepresentationBias(["a", "b"]).update(*pair(2), "c")


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a", "mean"]])
def test_task_names_that_would_hide_a_value_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="task_names must be distinct, and none may be 'mean'"):
        TaskRepresentationBias(names)


def test_a_merged_model_that_is_an_expert_warns() -> None:
    assert warn_nothing_to_repair({"a": 2e-6, "b": torch.tensor(0.3)}) == []
    with pytest.warns(UserWarning, match=r"\['a', 'c'\] are the expert's own.*nothing to repair"):
        assert warn_nothing_to_repair({"a": 0.0, "b": 0.3, "c": torch.tensor(9e-7)}) == ["a", "c"]
