"""Surgery modules, their bank and their loss against closed forms; privacy of the tasks."""

from __future__ import annotations

import copy
import math
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.merging.heads import CosineHead
from zoo.merging.surgery import SurgeryBank, SurgeryModule, surgery_loss

TASKS = ["mnist", "dtd", "svhn"]


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def trained(module: nn.Module, seed: int = 1) -> nn.Module:
    """A module that does something: weights drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for p in module.parameters() for value in optimizer.state.get(p, {}).values()]
    return [tensor.detach().clone() for tensor in (*module.parameters(), *state)]


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"activation": "gelu"}, {"activation": "none"}])
@pytest.mark.parametrize("shape", [(5, 12), (5, 7, 12), (12,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_module_changes_nothing(options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z = 100 * features(*shape).to(dtype)
    repaired = SurgeryModule(12, 4, **options)(z)
    assert repaired.dtype == dtype and torch.equal(repaired, z)


def test_a_new_bank_leaves_every_prediction_as_it_was() -> None:
    z, head = features(500, 12, dtype=torch.float32), CosineHead(features(7, 12, seed=1, dtype=torch.float32), 100)
    assert torch.equal(head(SurgeryBank(TASKS, 12, 4)(z, "dtd")), head(z))


def test_the_first_step_moves_the_second_matrix_only() -> None:
    z, target = features(6, 12, dtype=torch.float32), features(6, 12, seed=1, dtype=torch.float32)
    module = SurgeryModule(12, 4)
    surgery_loss(module(z), target).backward()
    assert module.down.weight.grad is not None and module.up.weight.grad is not None
    assert not module.down.weight.grad.any() and module.up.weight.grad.abs().min() > 0


def test_the_first_matrix_starts_uniform_within_one_over_the_root_of_the_width() -> None:
    torch.manual_seed(0)
    weights = SurgeryModule(400, 100).down.weight.detach()
    bound = 1 / math.sqrt(400)
    assert weights.abs().max() <= bound
    assert float(weights.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("activation", ["relu", "gelu", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_repaired_features_follow_the_formula(activation: Any, bias: bool) -> None:
    module = trained(SurgeryModule(6, 3, bias, activation).double())
    assert isinstance(module, SurgeryModule)
    z = features(4, 6)
    for row, repaired in zip(z, module(z), strict=True):
        hidden = torch.stack([(weights * row).sum() for weights in module.down.weight])
        hidden = hidden + module.down.bias if bias else hidden
        if activation == "relu":
            hidden = hidden * (hidden > 0)
        elif activation == "gelu":
            hidden = hidden * torch.special.ndtr(hidden)
        drift = sum(hidden[i] * module.up.weight[:, i] for i in range(3))
        drift = drift + module.up.bias if bias else drift
        torch.testing.assert_close(repaired, row - drift)
    torch.testing.assert_close(module.bias_of(z), z - module(z))


@pytest.mark.parametrize(("channel_dim", "order"), [(1, (0, 3, 1, 2)), (-1, (0, 1, 2, 3)), (0, (3, 0, 1, 2))])
def test_dense_features_are_repaired_pixel_by_pixel(channel_dim: int, order: tuple[int, ...]) -> None:
    rows = features(2, 3, 5, 6)
    plain, dense = (trained(SurgeryModule(6, 3, channel_dim=dim).double()) for dim in (-1, channel_dim))
    torch.testing.assert_close(dense(rows.permute(order)), plain(rows).permute(order))


@pytest.mark.parametrize(("dim", "weights"), [(512, 16_384), (768, 24_576)])
def test_a_task_has_two_rank_times_width_weights(dim: int, weights: int) -> None:
    bank = SurgeryBank([str(task) for task in range(8)], dim)
    assert sum(p.numel() for p in bank["3"].parameters()) == weights
    assert sum(p.numel() for p in bank.parameters()) == 8 * weights


def test_wide_weights_repair_narrow_features_in_their_own_dtype() -> None:
    module = trained(SurgeryModule(12, 4))
    z = features(5, 12, dtype=torch.float32)
    assert module(z.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(module(z.bfloat16()).float(), module(z.bfloat16().float()), rtol=0.01, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(z)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, module(z), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("by_id", [False, True])
def test_a_step_on_some_tasks_leaves_the_others_and_their_optimizer_state_untouched(by_id: bool) -> None:
    bank = trained(SurgeryBank(TASKS, 12, 4))
    assert isinstance(bank, SurgeryBank)
    optimizer = torch.optim.Adam(bank.parameters(), lr=1e-3)

    def step(tasks: list[str], seed: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        z, target = features(8, 12, seed=seed).float(), features(8, 12, seed=seed + 1).float()
        if by_id:
            ids = torch.tensor([TASKS.index(tasks[row % len(tasks)]) for row in range(8)])
            surgery_loss(bank(z, task_ids=ids), target).backward()
        else:
            torch.stack([surgery_loss(bank(z, task), target) for task in tasks]).sum().backward()
        optimizer.step()

    step(TASKS, 0)
    step(TASKS, 2)
    for tasks in (["dtd"], ["svhn", "mnist"]):
        before = {task: snapshot(bank[task], optimizer) for task in TASKS}
        step(tasks, 4)
        after = {task: snapshot(bank[task], optimizer) for task in TASKS}
        for task in TASKS:
            same = [torch.equal(old, new) for old, new in zip(before[task], after[task], strict=True)]
            assert len(same) == 2 + 2 * 3
            assert not any(same) if task in tasks else all(same), task


def test_a_task_that_never_came_has_no_optimizer_state() -> None:
    bank = SurgeryBank(TASKS, 12, 4)
    optimizer = torch.optim.Adam(bank.parameters())
    surgery_loss(bank(features(8, 12).float(), "dtd"), features(8, 12, seed=1).float()).backward()
    optimizer.step()
    assert set(optimizer.state) == set(bank["dtd"].parameters())


def test_training_all_tasks_in_one_step_equals_training_each_alone() -> None:
    together = SurgeryBank(TASKS, 12, 4).double()
    alone = copy.deepcopy(together)
    batches = {task: (features(20, 9, 12, seed=i), features(20, 9, 12, seed=10 + i)) for i, task in enumerate(TASKS)}
    optimizer = torch.optim.Adam(together.parameters(), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        losses = [surgery_loss(together(z[step], task), z_ind[step]) for task, (z, z_ind) in batches.items()]
        torch.stack(losses).sum().backward()
        optimizer.step()
    for task, (z, z_ind) in batches.items():
        optimizer = torch.optim.Adam(alone[task].parameters(), lr=1e-2)
        for step in range(20):
            optimizer.zero_grad()
            surgery_loss(alone[task](z[step]), z_ind[step]).backward()
            optimizer.step()
    for name, weights in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], weights, rtol=0, atol=1e-6)


def test_a_planted_drift_is_removed_and_a_linear_map_cannot() -> None:
    torch.manual_seed(0)
    z = features(512, 32, dtype=torch.float32)
    down, up = features(4, 32, seed=1).float() / 32**0.5, features(32, 4, seed=2).float()
    z_ind = z - F.relu(z @ down.T) @ up.T

    def left(activation: Any) -> tuple[float, float]:
        module = SurgeryModule(32, 16, activation=activation)
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 800)
        first = float(surgery_loss(module(z), z_ind).detach())
        for _ in range(800):
            optimizer.zero_grad()
            surgery_loss(module(z), z_ind).backward()
            optimizer.step()
            schedule.step()
        return first, float(surgery_loss(module(z), z_ind).detach())

    first, last = left("relu")
    assert first > 0.4
    assert last < 0.01
    assert left("none")[1] > 0.1


@pytest.mark.parametrize("factor", [1e-3, 0.7, 50.0])
def test_the_length_of_repaired_features_does_not_change_predictions(factor: float) -> None:
    head = CosineHead(features(7, 12, seed=1), 100)
    z_hat = trained(SurgeryModule(12, 4).double())(features(500, 12))
    assert torch.equal(head(factor * z_hat).argmax(1), head(z_hat).argmax(1))


def test_a_mixed_batch_gets_the_module_of_each_row() -> None:
    bank = trained(SurgeryBank(TASKS, 6, 2).double())
    assert isinstance(bank, SurgeryBank)
    z, ids = features(9, 4, 6), torch.tensor([2, 0, 2, 0, 0, 2, 2, 0, 2])
    found = bank(z, task_ids=ids)
    for row, number in enumerate(ids.tolist()):
        torch.testing.assert_close(found[row], bank(z[row], TASKS[number]))
    found.sum().backward()
    assert all(p.grad is None for p in bank["dtd"].parameters())
    assert all(p.grad is not None for p in bank["svhn"].parameters())
    assert bank(z[:0], task_ids=ids[:0]).shape == (0, 4, 6)


def test_any_name_can_be_a_task() -> None:
    names = ["a.b", "a%2Eb", "a/b", "train", "keys", "type", "training", "_modules", "Größe 1", "%", "tasks", "0"]
    bank = trained(SurgeryBank(names, 6, 2))
    assert isinstance(bank, SurgeryBank)
    other = SurgeryBank(names, 6, 2)
    other.load_state_dict(bank.state_dict())
    z = features(3, 6).float()
    assert len({bank(z, name).sum().item() for name in names}) == len(names)
    assert all(torch.equal(bank(z, name), other(z, name)) for name in names)
    assert [unquote(key) for key in bank.tasks] == names == list(bank.task_names)
    assert "tasks.0.down.weight" in bank.state_dict()


def test_weights_go_to_their_task_whatever_the_order_of_the_names() -> None:
    bank, other = trained(SurgeryBank(TASKS, 6, 2)), SurgeryBank(TASKS[::-1], 6, 2)
    other.load_state_dict(bank.state_dict())
    z = features(3, 6).float()
    assert torch.equal(bank(z, "svhn"), other(z, "svhn"))
    assert not torch.equal(bank(z, "svhn"), other(z, "mnist"))


def test_a_bank_of_ready_modules_shares_them() -> None:
    modules = {"a": SurgeryModule(6, 2), "b.c": SurgeryModule(6, 3)}
    bank = SurgeryBank.from_modules(modules)
    assert bank["b.c"] is modules["b.c"] and bank.task_names == ("a", "b.c")
    assert len(list(bank.parameters())) == 4


def test_each_loss_follows_its_formula() -> None:
    a, b = features(4, 3, 6), features(4, 3, 6, seed=1)
    gap = a - b
    torch.testing.assert_close(surgery_loss(a, b), gap.abs().sum() / 72)
    torch.testing.assert_close(surgery_loss(a, b, "mse"), gap.square().sum() / 72)
    huber = torch.where(gap.abs() < 1, gap.square() / 2, gap.abs() - 0.5)
    torch.testing.assert_close(surgery_loss(a, b, "smooth_l1"), huber.sum() / 72)
    cosine = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    torch.testing.assert_close(surgery_loss(a, b, "cosine"), (1 - cosine).sum() / 12)
    long_a, long_b = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (a, b))
    torch.testing.assert_close(surgery_loss(a, b, match="normalized"), (long_a - long_b).abs().sum() / 72)
    for loss in ("l1", "cosine"):
        moved = surgery_loss(a.movedim(-1, 1), b.movedim(-1, 1), loss, "normalized", channel_dim=1)
        torch.testing.assert_close(moved, surgery_loss(a, b, loss, "normalized"))


@pytest.mark.parametrize("loss", ["l1", "mse", "smooth_l1", "cosine"])
def test_losses_of_narrow_features_are_float32(loss: Any) -> None:
    a, b = features(4, 6).bfloat16(), features(4, 6, seed=1)
    for other in (b.bfloat16(), b.half()):
        assert surgery_loss(a, other, loss).dtype == torch.float32
        torch.testing.assert_close(surgery_loss(a, other, loss), surgery_loss(a.float(), other.float(), loss))


@pytest.mark.parametrize("rank", [0, -1, 13])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must lie between 1 and the 12 channels.*got {rank}"):
        SurgeryBank(TASKS, 12, rank)


def test_a_rank_as_wide_as_the_features_warns() -> None:
    with pytest.warns(UserWarning, match="rank 12 is the full width"):
        SurgeryModule(12, 12)
    SurgeryModule(12, 12, activation="none")


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 7\) must have 6 channels in dimension -1; set dim"):
        SurgeryModule(6, 2)(torch.zeros(4, 7))
    with pytest.raises(ValueError, match=r"shape \(6,\) must have 6 channels in dimension 1"):
        SurgeryModule(6, 2, channel_dim=1)(torch.zeros(6))
    with pytest.raises(ValueError, match=r"floating point, got torch.int64"):
        SurgeryModule(6, 2)(torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(4, 6\), the expert's \(4, 1\)"):
        surgery_loss(torch.zeros(4, 6), torch.zeros(4, 1))


def test_a_call_without_a_task_lists_the_tasks() -> None:
    bank, z = SurgeryBank(TASKS, 6, 2), torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"needs the task.*\['mnist', 'dtd', 'svhn'\]"):
        bank(z)
    with pytest.raises(ValueError, match="needs the task"):
        bank(z, "dtd", torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"no surgery module for task 'cars'.*\['mnist', 'dtd', 'svhn'\]"):
        bank(z, "cars")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, 1, 3, 2]), r"\[3\], but ids run from 0 to 2: \['mnist'"),
        (torch.tensor([0, 1, -1, 2]), r"\[-1\], but ids run"),
        (
            torch.tensor([0, 1, 2]),
            r"of shape \(4,\) for features of shape \(4, 6\), got torch.int64 of shape \(3",
        ),
        (torch.zeros(4), r"got torch.float32"),
    ],
)
def test_task_ids_that_do_not_fit_are_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SurgeryBank(TASKS, 6, 2)(torch.zeros(4, 6), task_ids=ids)


@pytest.mark.parametrize("names", [[], ["a", "a"], [""], "mnist"])
def test_names_that_are_not_distinct_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"task_names must be a list of distinct, non-empty names, got"):
        SurgeryBank(names, 6, 2)


def test_unknown_options_are_refused() -> None:
    options: dict[str, Any] = {"activation": "swish", "loss": "l2", "match": "cosine"}
    with pytest.raises(ValueError, match=r"activation must be one of \['relu', 'gelu', 'none'\], got 'swish'"):
        SurgeryModule(6, 2, activation=options["activation"])
    with pytest.raises(ValueError, match=r"loss must be one of \['l1', .*got 'l2'"):
        surgery_loss(torch.zeros(1), torch.zeros(1), options["loss"])
    with pytest.raises(ValueError, match=r"match must be one of \['raw', 'normalized'\], got 'cosine'"):
        surgery_loss(torch.zeros(1), torch.zeros(1), match=options["match"])
