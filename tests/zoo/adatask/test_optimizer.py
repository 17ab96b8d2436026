"""What the update of AdaTask is, by properties and against the plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.reference.adatask import PlainAdaTask
from tests.zoo.adatask.problems import TwoHeads, batch, quadratic
from zoo.adatask import AdaTask, per_task_grads
from zoo.adatask.rules import DEFAULT_EPS, RULES

TORCH = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}


def train(model, optimizer, steps, scale=(1.0, 1.0, 1.0), start=0, **options):
    for step in range(start, start + steps):
        losses, features = model.losses(*batch(step, len(model.heads)))
        optimizer.zero_grad()
        if options.get("mode", "loop") != "loop":
            options["features"] = features
        optimizer.backward([loss * c for loss, c in zip(losses, scale, strict=True)], **options)
        optimizer.step()


def distance(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step_with(optimizer, vectors, p):
    optimizer.zero_grad()
    optimizer.backward(quadratic(torch.as_tensor(vectors, dtype=p.dtype), p))
    before = p.detach().clone()
    optimizer.step()
    return p.detach() - before


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:AdaTask with one task is plain")
def test_one_task_is_the_base_optimizer(rule):
    ours, theirs = TwoHeads(1), TwoHeads(1)
    optimizer = AdaTask(ours.parameters(), 1, rule=rule, lr=1e-2)
    reference = TORCH[rule](theirs.parameters(), lr=1e-2, eps=DEFAULT_EPS[rule])
    for step in range(20):
        train(ours, optimizer, 1, scale=[1.0], start=step)
        reference.zero_grad()
        theirs.losses(*batch(step, 1))[0][0].backward()
        reference.step()
    assert distance(ours, theirs) < 1e-14


@pytest.mark.parametrize("rule", RULES)
def test_constant_factors_of_the_losses_cancel(rule):
    plain, scaled = TwoHeads(), TwoHeads()
    train(plain, AdaTask(plain.parameters(), 3, rule=rule, lr=1e-2, eps=1e-30), 50)
    train(scaled, AdaTask(scaled.parameters(), 3, rule=rule, lr=1e-2, eps=1e-30), 50, scale=(1.0, 1e3, 1e-3))
    assert distance(plain, scaled) < 1e-10
    assert distance(plain, TwoHeads()) > 0.05


@pytest.mark.parametrize("steps", [1, 5])
def test_adam_under_constant_gradients_moves_by_the_votes_of_the_tasks(steps):
    p = parameter(0.0, 0.0, 0.0)
    optimizer = AdaTask([p], 2, lr=0.1, eps=1e-30)
    for _ in range(steps):
        moved = step_with(optimizer, [[3.0, -1e-3, 2.0], [1.0, -50.0, -7.0]], p)
        torch.testing.assert_close(moved, torch.tensor([-0.2, 0.2, 0.0], dtype=torch.float64))


def test_adagrad_under_constant_gradients_slows_with_the_root_of_the_step():
    p = parameter(0.0)
    optimizer = AdaTask([p], 2, rule="adagrad", lr=0.1, eps=1e-30)
    for t in range(1, 6):
        moved = step_with(optimizer, [[3.0], [500.0]], p)
        assert float(moved) == pytest.approx(-0.1 * 2 / t**0.5)


def test_the_sum_of_the_losses_may_increase():
    p = parameter(0.0)
    optimizer = AdaTask([p], 4, lr=0.1)
    assert float(step_with(optimizer, [[1.0], [1.0], [1.0], [-4.0]], p)) == pytest.approx(-0.2)


@pytest.mark.parametrize("rule", RULES)
def test_permuted_tasks_have_permuted_accumulators_and_the_same_weights(rule):
    one, other = TwoHeads(), TwoHeads()
    first, second = (AdaTask(model.trunk.parameters(), 3, rule=rule, lr=1e-2) for model in (one, other))
    order = [2, 0, 1]
    for step in range(5):
        for model, optimizer, permutation in ((one, first, [0, 1, 2]), (other, second, order)):
            losses, _ = model.losses(*batch(step))
            optimizer.zero_grad()
            optimizer.backward([losses[k] for k in permutation])
            optimizer.step()
    assert distance(one, other) < 1e-14
    for p, q in zip(one.trunk.parameters(), other.trunk.parameters(), strict=True):
        for name, value in first.state[p].items():
            torch.testing.assert_close(value[order], second.state[q][name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_identical_tasks_give_k_times_the_base_step_or_its_mean(rule, reduction):
    p, q = parameter(0.3, -2.0), parameter(0.3, -2.0)
    optimizer = AdaTask([p], 3, rule=rule, lr=1e-2, reduction=reduction)
    reference = TORCH[rule]([q], lr=1e-2, eps=DEFAULT_EPS[rule])
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        g = torch.randn(2, generator=generator, dtype=torch.float64)
        moved = step_with(optimizer, g.expand(3, 2), p)
        before, q.grad = q.detach().clone(), g.clone()
        reference.step()
        torch.testing.assert_close(moved, (q.detach() - before) * (3 if reduction == "sum" else 1))


VARIANTS = [
    {"fused": True},
    {"fused": False},
    {"low_memory": True},
    {"mode": "cut"},
    {"mode": "batched"},
    {"hook": True},
]


@pytest.mark.parametrize(
    ("rule", "variant"), [(r, v) for r in RULES for v in VARIANTS if r != "rmsprop" or "fused" not in v], ids=str
)
def test_every_way_to_compute_it_equals_the_plain_loop(rule, variant):
    variant = dict(variant)
    mode, hook = variant.pop("mode", "loop"), variant.pop("hook", False)
    ours, plain = TwoHeads(), TwoHeads()
    optimizer = AdaTask(ours.parameters(), 3, rule=rule, lr=1e-2, **variant)
    if hook:
        optimizer.add_update_hook(lambda parameter, updates, task_ids: None)
    reference = PlainAdaTask(list(plain.parameters()), 3, rule, lr=1e-2, eps=DEFAULT_EPS[rule])
    scale = (1.0, 30.0, 0.1)
    for step in range(20):
        train(ours, optimizer, 1, scale, step, mode=mode)
        losses, _ = plain.losses(*batch(step))
        losses = [loss * c for loss, c in zip(losses, scale, strict=True)]
        reference.step(per_task_grads(losses, reference.parameters))
    assert distance(ours, plain) < 1e-12
    assert distance(ours, TwoHeads()) > 0.01


def test_amsgrad_divides_by_the_largest_second_moment_of_each_task():
    p = parameter(0.0)
    optimizer = AdaTask([p], 2, lr=0.1, betas=(0.0, 0.5), eps=1e-30, amsgrad=True)
    step_with(optimizer, [[8.0], [1.0]], p)
    moved = step_with(optimizer, [[1.0], [1.0]], p)
    # Second moments 32 then 16.5: the larger stays, and is corrected by 1 - 0.25.
    assert float(moved) == pytest.approx(-0.1 * (1 / (32 / 0.75) ** 0.5 + 1))


def test_maximize_ascends():
    p = parameter(0.0)
    assert float(step_with(AdaTask([p], 2, lr=0.1, maximize=True), [[1.0], [1.0]], p)) == pytest.approx(0.2)


@pytest.mark.parametrize("low_memory", [False, True])
def test_weight_decay_is_applied_once(low_memory):
    p = parameter(2.0, -4.0)
    optimizer = AdaTask([p], 3, lr=0.1, weight_decay=0.5, low_memory=low_memory)
    step_with(optimizer, torch.zeros(3, 2), p)
    torch.testing.assert_close(p.detach(), torch.tensor([2.0, -4.0], dtype=torch.float64) * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_skipped_task_keeps_its_accumulators_and_clock_and_moves_nothing(low_memory):
    p = parameter(0.0)
    optimizer = AdaTask([p], 2, lr=0.1, missing="skip", low_memory=low_memory)
    step_with(optimizer, [[1.0], [2.0]], p)
    before = copy.deepcopy(optimizer.state[p])
    optimizer.zero_grad()
    optimizer.backward([p.sum() * 3, None])
    start = p.detach().clone()
    optimizer.step()
    state = optimizer.state[p]
    for name, value in state.items():
        assert torch.equal(value[1], before[name][1]), name
    assert state["step"].tolist() == [2, 1]
    one = (0.9 * 0.1 + 0.1 * 3) / (1 - 0.9**2)
    two = (0.999 * 0.001 + 0.001 * 9) / (1 - 0.999**2)
    assert float(p.detach() - start) == pytest.approx(-0.1 * one / two**0.5, rel=1e-6)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_zeroed_task_moves_by_its_old_momentum(low_memory):
    p = parameter(0.0)
    optimizer = AdaTask([p], 2, lr=0.1, missing="zero", low_memory=low_memory)
    step_with(optimizer, [[1.0], [2.0]], p)
    optimizer.zero_grad()
    optimizer.backward([p.sum() * 0, None])
    start = p.detach().clone()
    optimizer.step()
    mean = 0.9 * 0.1 / (1 - 0.9**2)
    square = 0.999 * 0.001 / (1 - 0.999**2)
    assert float(p.detach() - start) == pytest.approx(-0.1 * 2 * mean / square**0.5, rel=1e-6)
    assert optimizer.state[p]["step"].tolist() == [2, 2]


def test_a_task_that_comes_later_starts_with_a_clock_of_its_own():
    p = parameter(0.0)
    optimizer = AdaTask([p], 2, lr=0.1, eps=1e-30)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward([p.sum(), None])
        optimizer.step()
    moved = step_with(optimizer, [[1.0], [700.0]], p)
    assert float(moved) == pytest.approx(-0.2)
    assert optimizer.state[p]["step"].tolist() == [4, 1]


@pytest.mark.parametrize(
    ("rule", "options"),
    [*((rule, {}) for rule in RULES), ("adam", {"amsgrad": True}), ("adam", {"first_moment_dtype": torch.bfloat16})],
    ids=str,
)
def test_a_restored_state_continues_the_same_trajectory(tmp_path, rule, options):
    straight = TwoHeads()
    train(straight, optimizer := AdaTask(straight.parameters(), 3, rule=rule, lr=1e-2, **options), 6)
    saved = {"model": copy.deepcopy(straight.state_dict()), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    train(straight, optimizer, 6, start=6)

    resumed = TwoHeads(seed=1)
    optimizer = AdaTask(resumed.parameters(), 3, rule=rule, lr=0.5, **options)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 6, start=6)
    assert distance(straight, resumed) == 0


def test_groups_have_learning_rates_of_their_own_and_schedulers_change_them():
    p, q = parameter(0.0), parameter(0.0)
    optimizer = AdaTask([{"params": [p], "lr": 0.1}, {"params": [q]}], 2, lr=0.01, eps=1e-30)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for factor in (1.0, 0.5, 0.25):
        before = p.detach().clone(), q.detach().clone()
        optimizer.zero_grad()
        optimizer.backward([(p + q).sum(), 9 * (p + q).sum()])
        optimizer.step()
        assert float(p.detach() - before[0]) == pytest.approx(-0.2 * factor)
        assert float(q.detach() - before[1]) == pytest.approx(-0.02 * factor)
        scheduler.step()


@pytest.mark.parametrize("rule", RULES)
def test_what_one_task_alone_reaches_gets_the_base_rule_on_the_summed_loss(rule):
    ours, theirs = TwoHeads(), TwoHeads()
    optimizer = AdaTask(ours.parameters(), 3, rule=rule, lr=1e-2, reduction="mean", task_weights=[5.0, 2.0, 1.0])
    reference = TORCH[rule](theirs.heads.parameters(), lr=1e-2, eps=DEFAULT_EPS[rule])
    for step in range(10):
        theirs.trunk.load_state_dict(ours.trunk.state_dict())
        reference.zero_grad()
        sum(theirs.losses(*batch(step))[0]).backward()
        reference.step()
        train(ours, optimizer, 1, start=step)
    assert distance(ours.heads, theirs.heads) < 1e-14


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_group_that_is_not_shared_gets_one_accumulator_on_the_sum(low_memory):
    ours, theirs = TwoHeads(), TwoHeads()
    lower, upper = ours.trunk[0], ours.trunk[2]
    groups = [{"params": list(lower.parameters()), "shared": False}, {"params": list(upper.parameters())}]
    optimizer = AdaTask(groups, 3, lr=1e-2, low_memory=low_memory)
    reference = torch.optim.Adam(theirs.trunk[0].parameters(), lr=1e-2)
    for step in range(5):
        theirs.trunk[2].load_state_dict(upper.state_dict())
        reference.zero_grad()
        sum(theirs.losses(*batch(step))[0]).backward()
        reference.step()
        train(ours, optimizer, 1, start=step)
    assert distance(lower, theirs.trunk[0]) < 1e-14
    assert optimizer.state[lower.weight]["exp_avg"].shape == (1, 7, 5)
    assert optimizer.state[upper.weight]["exp_avg"].shape == (3, 4, 7)


def test_task_weights_scale_the_update_and_weights_in_the_loss_do_not():
    moves = []
    for weights, factor in (([1.0, 1.0], 1.0), ([2.0, 1.0], 1.0), ([1.0, 1.0], 2.0)):
        p = parameter(0.0, 0.0)
        optimizer = AdaTask([p], 2, lr=0.1, eps=1e-30, task_weights=weights)
        moves.append(step_with(optimizer, [[factor * 3.0, 0.0], [0.0, 5.0]], p))
    torch.testing.assert_close(moves[1], moves[0] * torch.tensor([2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(moves[2], moves[0])


def test_bf16_first_moments_take_half_the_memory_and_stay_close():
    exact, rounded = TwoHeads(), TwoHeads()
    train(exact, AdaTask(exact.parameters(), 3, lr=1e-2), 20)
    train(rounded, optimizer := AdaTask(rounded.parameters(), 3, lr=1e-2, first_moment_dtype=torch.bfloat16), 20)
    state = optimizer.state[rounded.trunk[0].weight]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].dtype == torch.float64
    assert 0 < distance(exact, rounded) < 0.02


def test_updates_given_to_a_hook_add_up_to_the_change_of_the_parameter():
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), 3, lr=1e-2)
    found = {}
    handle = optimizer.add_update_hook(lambda p, updates, ids: found.update({p: (updates.clone(), list(ids))}))
    before = {p: p.detach().clone() for p in model.parameters()}
    train(model, optimizer, 1)
    assert found.keys() == before.keys()
    for p, (updates, ids) in found.items():
        torch.testing.assert_close(updates.sum(0), p.detach() - before[p])
        assert len(ids) == len(updates)
    assert found[model.heads[1].weight][1] == [1]
    handle.remove()
    found.clear()
    train(model, optimizer, 1)
    assert not found


def test_a_closure_runs_with_gradients_and_its_result_is_returned():
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), 3)

    def closure():
        optimizer.zero_grad()
        losses, _ = model.losses(*batch(0))
        optimizer.backward(losses)
        return sum(losses)

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0


def test_several_backward_calls_add_up_as_in_torch():
    one, two = TwoHeads(), TwoHeads()
    inputs, targets = batch(0)
    first, second = (AdaTask(model.parameters(), 3, lr=1e-2) for model in (one, two))
    first.backward(one.losses(inputs, targets)[0])
    for half in (slice(0, 4), slice(4, 8)):
        second.backward([loss / 2 for loss in two.losses(inputs[half], targets[:, half])[0]])
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    first.step()
    second.step()
    assert distance(one, two) < 1e-12


@pytest.mark.parametrize("copy_option", ["zeros", "shared"])
def test_an_adam_checkpoint_can_be_continued(copy_option):
    model = TwoHeads()
    adam = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(3):
        adam.zero_grad()
        sum(model.losses(*batch(step))[0]).backward()
        adam.step()
    optimizer = AdaTask(model.parameters(), 3)
    optimizer.load_adam_state(adam.state_dict(), copy=copy_option)
    assert optimizer.param_groups[0]["lr"] == 0.03
    train(model, optimizer, 1, start=3)
    weight = model.trunk[0].weight
    state, old = optimizer.state[weight], adam.state[weight]
    steps = [1, 1, 1] if copy_option == "zeros" else [4, 4, 4]
    assert state["step"].tolist() == steps
    if copy_option == "shared":
        assert bool((state["exp_avg_sq"] >= 0.999 * old["exp_avg_sq"]).all())


def test_scaled_losses_leave_unscaled_moments_and_a_scaled_sum():
    plain, scaled = TwoHeads(), TwoHeads()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    first, second = (AdaTask(model.parameters(), 3, lr=1e-2) for model in (plain, scaled))
    for step in range(4):
        train(plain, first, 1, start=step)
        second.zero_grad()
        second.backward(scaled.losses(*batch(step))[0], scaler=scaler)
        scaler.unscale_(second)
        torch.testing.assert_close(scaled.trunk[0].weight.grad, plain.trunk[0].weight.grad)
        scaler.step(second)
        scaler.update()
    assert scaler.get_scale() == 1024.0 * 2**4
    assert distance(plain, scaled) < 1e-12
    before = copy.deepcopy(scaled.state_dict())
    losses, _ = scaled.losses(*batch(9))
    second.zero_grad()
    second.backward([losses[0] * torch.inf, *losses[1:]], scaler=scaler)
    scaler.step(second)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in scaled.state_dict().items())
    assert scaler.get_scale() == 1024.0 * 2**3


def test_an_aggregator_before_the_moments_changes_what_they_see():
    p, q = parameter(0.0, 0.0), parameter(0.0, 0.0)
    vectors = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    step_with(AdaTask([p], 2, lr=0.1, aggregator=lambda matrix: matrix.flip(0) * 2), vectors, p)
    step_with(AdaTask([q], 2, lr=0.1), vectors.flip(0) * 2, q)
    torch.testing.assert_close(p.detach(), q.detach())


def test_weights_after_the_preconditioning_share_out_the_step():
    p = parameter(0.0, 0.0)
    seen = []

    def weigh(matrix):
        seen.append(matrix.clone())
        return torch.tensor([0.003, 0.001])

    optimizer = AdaTask([p], 2, lr=0.1, eps=1e-30, aggregator=weigh, compose="post")
    moved = step_with(optimizer, [[5.0, 0.0], [0.0, -7.0]], p)
    torch.testing.assert_close(seen[0], torch.tensor([[-0.1, 0.0], [0.0, 0.1]], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([-0.15, 0.05], dtype=torch.float64))


def test_a_group_that_is_not_shared_is_left_alone_by_aggregators():
    p, q = parameter(0.0), parameter(0.0)
    shapes = []

    def record(matrix):
        shapes.append(tuple(matrix.shape))
        return matrix

    optimizer = AdaTask([{"params": [p]}, {"params": [q], "shared": False}], 2, aggregator=record)
    optimizer.backward([(p + q).sum(), 2 * (p + q).sum()])
    optimizer.step()
    assert shapes == [(2, 1)]


def test_the_state_of_an_aggregator_is_part_of_the_optimizers():
    class Counter:
        calls = 0

        def __call__(self, matrix):
            self.calls += 1
            return matrix

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    p = parameter(0.0)
    optimizer = AdaTask([p], 2, aggregator=Counter())
    step_with(optimizer, [[1.0], [2.0]], p)
    other = AdaTask([p], 2, aggregator=Counter())
    other.load_state_dict(optimizer.state_dict())
    assert other.aggregator.calls == 1
