"""AU and rAU: the tasks' updates add up to the step, and the averages are those of the definition."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from tests.zoo.adatask.problems import TwoHeads, batch, quadratic
from zoo.adatask import AdaTask, TaskDominance, per_task_grads
from zoo.adatask.mtadam import MTAdam
from zoo.adatask.task_gradients import TaskGradients

TASKS = ["0", "1", "2"]
LR = 1e-2


class Recorded(TaskDominance):
    """Keeps the updates of the last step."""

    def observe(self, parameter, updates, task_ids):
        self.__dict__.setdefault("last", {})[parameter] = (updates.clone(), list(task_ids))
        super().observe(parameter, updates, task_ids)


def gradients_of(model, step, gradients, absent=()):
    losses, _ = model.losses(*batch(step, len(model.heads)))
    kept = [None if k in absent else loss * 10.0**k for k, loss in enumerate(losses)]
    gradients.clear()
    gradients.accumulate(per_task_grads(kept, gradients.parameters), [loss is not None for loss in kept])
    gradients.write_grad()


def make_step(model, optimizer, gradients, step, absent=(), alter=None):
    if isinstance(optimizer, AdaTask):
        losses, _ = model.losses(*batch(step, len(model.heads)))
        optimizer.zero_grad()
        optimizer.backward([None if k in absent else loss * 10.0**k for k, loss in enumerate(losses)])
    else:
        gradients_of(model, step, gradients, absent)
    if alter is not None:
        alter(list(model.parameters()))
    optimizer.step()


def plain(optimizer, model, kind=TaskDominance, **options):
    gradients = TaskGradients(model.parameters(), TASKS)
    return gradients, kind(optimizer, gradients, {p: n for n, p in model.named_parameters()}, **options)


PLAIN = {
    "adam": lambda p: Adam(p, lr=LR),
    "adam without momentum": lambda p: Adam(p, lr=LR, betas=(0.0, 0.9)),
    "adam, maximised": lambda p: Adam(p, lr=LR, maximize=True),
    "adam, foreach": lambda p: Adam(p, lr=LR, foreach=True),
    "adam, fused": lambda p: Adam(p, lr=LR, fused=True),
    "adam, tensor lr": lambda p: Adam(p, lr=torch.tensor(LR, dtype=torch.float64)),
    "amsgrad": lambda p: Adam(p, lr=LR, amsgrad=True, betas=(0.9, 0.5)),
    "adamw": lambda p: AdamW(p, lr=LR, weight_decay=0.0),
    "rmsprop": lambda p: RMSprop(p, lr=LR),
    "rmsprop, centered": lambda p: RMSprop(p, lr=LR, centered=True, alpha=0.9),
    "rmsprop, momentum": lambda p: RMSprop(p, lr=LR, momentum=0.8, centered=True, alpha=0.9),
    "rmsprop, foreach": lambda p: RMSprop(p, lr=LR, momentum=0.8, foreach=True, maximize=True),
    "adagrad": lambda p: Adagrad(p, lr=LR, lr_decay=0.1),
    "adagrad, fused": lambda p: Adagrad(p, lr=LR, fused=True),
    "sgd": lambda p: SGD(p, lr=LR),
    "sgd, momentum": lambda p: SGD(p, lr=LR, momentum=0.9),
    "sgd, dampened": lambda p: SGD(p, lr=LR, momentum=0.9, dampening=0.3, maximize=True),
    "sgd, nesterov": lambda p: SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "sgd, nesterov, foreach": lambda p: SGD(p, lr=LR, momentum=0.9, nesterov=True, foreach=True),
    "sgd, nesterov, fused": lambda p: SGD(p, lr=LR, momentum=0.9, nesterov=True, fused=True),
}


def clip_by_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.05)


def clip_by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.5)


def assert_adds_up(dominance, before):
    seen = 0
    for parameter, start in before.items():
        if parameter in dominance.last:
            updates, _ = dominance.last[parameter]
            torch.testing.assert_close(
                updates.sum(0), (parameter - start).detach().flatten().to(updates.dtype), rtol=1e-11, atol=1e-12
            )
            seen += 1
    return seen


@pytest.mark.parametrize("alter", [None, clip_by_norm, clip_by_value])
@pytest.mark.parametrize("name", PLAIN)
def test_updates_of_the_tasks_add_up_to_the_step_of_a_plain_optimizer(name, alter):
    model = TwoHeads()
    optimizer = PLAIN[name](model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    gradients, dominance = plain(optimizer, model, Recorded)
    for step in range(10):
        before = {p: p.detach().clone() for p in model.parameters()}
        # A task without labels still moves the weights by its momentum.
        make_step(model, optimizer, gradients, step, (1,) if step in (3, 4) else (), alter)
        assert assert_adds_up(dominance, before) == 4
        schedule.step()


@pytest.mark.parametrize(
    "build",
    [
        lambda p: AdaTask(p, TASKS, lr=LR, weight_decay=0.0),
        lambda p: AdaTask(p, TASKS, lr=LR, rule="rmsprop", task_weights=[1, 2, 3]),
        lambda p: AdaTask(p, TASKS, lr=LR, rule="adagrad", reduction="mean", missing="zero"),
        lambda p: MTAdam(p, TASKS, lr=LR),
    ],
    ids=["adam", "rmsprop", "adagrad", "mtadam"],
)
def test_updates_of_the_tasks_add_up_to_the_step_of_adatask(build):
    model = TwoHeads()
    optimizer = build(model.parameters())
    dominance = Recorded(optimizer)
    for step in range(10):
        before = {p: p.detach().clone() for p in model.parameters()}
        make_step(model, optimizer, None, step, (1,) if step in (3, 4) else ())
        assert assert_adds_up(dominance, before) == 4


def test_weight_decay_goes_to_no_task():
    vector = torch.tensor([[3.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
    for build, decayed in ((AdamW, 1 - LR * 0.5), (SGD, 1 - LR * 0.5)):
        p = nn.Parameter(torch.tensor([2.0, 5.0], dtype=torch.float64))
        optimizer = build([p], lr=LR, weight_decay=0.5)
        gradients = TaskGradients([p], TASKS[:2])
        dominance = Recorded(optimizer, gradients)
        before = p.detach().clone()
        gradients.accumulate(per_task_grads(quadratic(vector, p), [p]), [True, True])
        gradients.write_grad()
        optimizer.step()
        torch.testing.assert_close(p.detach() - before * decayed, dominance.last[p][0].sum(0))


@pytest.mark.parametrize(("adatask", "expected"), [(False, [0.9999, 0.0001]), (True, [0.5, 0.5])])
def test_a_hundredfold_gradient_owns_adams_first_step_and_half_of_adatasks(adatask, expected):
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    vector = torch.tensor([[100.0, -100.0, 100.0], [1.0, 1.0, -1.0]], dtype=torch.float64)
    if adatask:
        optimizer = AdaTask([p], TASKS[:2], lr=LR)
        dominance = TaskDominance(optimizer)
        optimizer.backward(quadratic(vector, p))
    else:
        optimizer, gradients = Adam([p], lr=LR), TaskGradients([p], TASKS[:2])
        dominance = TaskDominance(optimizer, gradients)
        gradients.accumulate(per_task_grads(quadratic(vector, p), [p]), [True, True])
        gradients.write_grad()
    optimizer.step()
    torch.testing.assert_close(
        dominance.rau(p), torch.tensor(expected)[:, None].expand(2, 3).double(), atol=1e-7, rtol=0
    )
    assert [row["mean"] for row in dominance.table()] == pytest.approx(expected, abs=1e-7)


def brute_force_adam(history, decay):
    """AU of Adam from the gradients by step, task and element, in plain Python."""
    tasks, size = len(history[0]), len(history[0][0])
    result = [[0.0] * size for _ in range(tasks)]
    for e in range(size):
        moments, square = [0.0] * tasks, 0.0
        for t, step in enumerate(history, start=1):
            g = [float(step[k][e]) for k in range(tasks)]
            square = 0.999 * square + 0.001 * sum(g) ** 2
            for k in range(tasks):
                moments[k] = 0.9 * moments[k] + 0.1 * g[k]
                u = -LR * moments[k] / (1 - 0.9**t) / (math.sqrt(square / (1 - 0.999**t)) + 1e-8)
                result[k][e] = decay * result[k][e] + (1 - decay) * u**2
    return torch.tensor(result, dtype=torch.float64)


def test_averages_equal_those_of_a_plain_loop():
    model = TwoHeads()
    optimizer = Adam(model.parameters(), lr=LR)
    gradients, dominance = plain(optimizer, model, decay=0.8)
    weight, history = model.trunk[0].weight, []
    for step in range(6):
        make_step(model, optimizer, gradients, step)
        history.append([row[0].flatten() for row in gradients.rows])
    expected = brute_force_adam(history, 0.8)
    torch.testing.assert_close(dominance.rau(weight).flatten(1), expected / expected.sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(dominance.state_dict()["records"][0]["averages"], expected, rtol=1e-9, atol=0)


def test_the_moments_are_followed_between_sampled_steps():
    averages = []
    for every in (1, 3):
        model = TwoHeads()
        optimizer = Adam(model.parameters(), lr=LR)
        gradients, dominance = plain(optimizer, model, Recorded, decay=0.0, every_n_steps=every)
        for step in range(7):
            make_step(model, optimizer, gradients, step)
        averages.append(dominance.rau(model.trunk[2].weight))
    torch.testing.assert_close(*averages, rtol=1e-12, atol=0)


def test_adatask_keeps_its_updates_only_in_sampled_steps():
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), TASKS, lr=LR)
    dominance = Recorded(optimizer, every_n_steps=3)
    seen = []
    for step in range(7):
        dominance.last = {}
        make_step(model, optimizer, None, step)
        seen.append(bool(dominance.last))
    assert seen == [True, False, False, True, False, False, True]


def test_instant_mode_takes_the_present_gradient_over_adams_denominator():
    model = TwoHeads()
    optimizer = Adam(model.parameters(), lr=LR)
    gradients, dominance = plain(optimizer, model, Recorded, mode="instant", every_n_steps=2)
    for step in range(5):
        make_step(model, optimizer, gradients, step)
    weight = model.trunk[0].weight
    denominator = (optimizer.state[weight]["exp_avg_sq"] / (1 - 0.999**5)).sqrt() + 1e-8
    for k, row in enumerate(gradients.rows):
        torch.testing.assert_close(dominance.last[weight][0][k], (-LR * row[0] / denominator).flatten())
    assert all(record["moments"] is None for record in dominance.state_dict()["records"].values())


def test_an_absent_task_does_not_move_adatask_and_its_average_decays():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaTask([p], TASKS[:2], lr=LR, eps=1e-30)
    dominance = TaskDominance(optimizer, decay=0.75)
    ones = torch.ones(2, 2, dtype=torch.float64)
    optimizer.backward(quadratic(ones, p))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward([quadratic(ones, p)[0], None])
    optimizer.step()
    average = dominance.state_dict()["records"][0]["averages"]
    u = LR**2
    assert average[1].tolist() == pytest.approx([0.75 * 0.25 * u] * 2)
    assert average[0].tolist() == pytest.approx([0.75 * 0.25 * u + 0.25 * u] * 2)


@pytest.mark.parametrize("adatask", [True, False])
def test_shares_add_up_to_one_and_nothing_but_shared_parameters_is_watched(adatask):
    model = TwoHeads()
    if adatask:
        optimizer = AdaTask(model.parameters(), TASKS, lr=LR)
        gradients, dominance = None, TaskDominance(optimizer, names={p: n for n, p in model.named_parameters()})
    else:
        optimizer = Adam(model.parameters(), lr=LR)
        gradients, dominance = plain(optimizer, model)
    assert dominance.table() == [] and dominance.histograms() == {}
    for step in range(5):
        make_step(model, optimizer, gradients, step)
    for parameter in model.trunk.parameters():
        shares = dominance.rau(parameter)
        assert shares.shape == (3, *parameter.shape)
        torch.testing.assert_close(shares.sum(0), torch.ones_like(parameter))
    with pytest.raises(ValueError, match=r"heads.0.weight has not been moved by two tasks"):
        dominance.rau(model.heads[0].weight)
    rows = dominance.table()
    assert [(row["layer"], row["task"]) for row in rows] == [(n, t) for n in ("trunk.0", "trunk.2") for t in TASKS]
    for start in (0, 3):
        assert sum(row["mean"] for row in rows[start : start + 3]) == pytest.approx(1)
    shares = torch.cat([dominance.rau(p).flatten(1) for p in model.trunk[0].parameters()], 1)
    row = rows[2]
    assert row["elements"] == 42
    assert row["mean"] == pytest.approx(float(shares[2].mean()))
    assert row["median"] == pytest.approx(float(shares[2].quantile(0.5)))
    assert row["dominated"] == pytest.approx(float((shares.max(0).values > 0.9).double().mean()))
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum(0) / math.log(3)
    assert row["entropy"] == pytest.approx(float(entropy.mean()))
    counts = dominance.histograms()["trunk.0"]
    edges = torch.histogram(shares.max(0).values, bins=20, range=(0.0, 1.0)).hist
    assert counts == edges.long().tolist() and sum(counts) == 42


def test_two_tasks_have_the_histogram_of_the_first_ones_share():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer, gradients = SGD([p], lr=LR), TaskGradients([p], TASKS[:2])
    dominance = TaskDominance(optimizer, gradients)
    vector = torch.tensor([[1.0, 1.0, 0.0, 3.0], [0.0, 3.0, 1.0, 1.0]], dtype=torch.float64)
    gradients.accumulate(per_task_grads(quadratic(vector, p), [p]), [True, True])
    gradients.write_grad()
    optimizer.step()
    counts = dominance.histograms()["parameter 0"]
    assert [b for b, count in enumerate(counts) if count] == [0, 2, 18, 19] and sum(counts) == 4


def test_elements_that_nothing_moves_are_left_out():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer, gradients = SGD([p], lr=LR), TaskGradients([p], TASKS[:2])
    dominance = TaskDominance(optimizer, gradients)
    vector = torch.tensor([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    gradients.accumulate(per_task_grads(quadratic(vector, p), [p]), [True, True])
    gradients.write_grad()
    optimizer.step()
    assert dominance.rau(p)[:, 1].isnan().all()
    first, second = dominance.table()
    assert first["elements"] == 2 and first["mean"] == pytest.approx(0.75) and second["mean"] == pytest.approx(0.25)
    assert first["dominated"] == pytest.approx(0.5) and first["entropy"] == pytest.approx(0.5)


def test_layers_are_modules_parameters_or_what_a_function_says():
    model = TwoHeads()
    optimizer = Adam(model.named_parameters(), lr=LR)
    gradients = TaskGradients(model.parameters(), TASKS)
    views = [TaskDominance(optimizer, gradients, groups=g) for g in ("module", "parameter", lambda n: n.split(".")[0])]
    make_step(model, optimizer, gradients, 0)
    layers = [list(dict.fromkeys(row["layer"] for row in view.table())) for view in views]
    names = ["trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"]
    assert layers == [["trunk.0", "trunk.2"], names, ["trunk"]]
    assert views[2].table()[0]["elements"] == sum(p.numel() for p in model.trunk.parameters())


def test_a_subsample_has_the_shares_of_the_whole():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.zeros(100, 20)), nn.Parameter(torch.zeros(3))
    optimizer, gradients = Adam([p, q], lr=LR), TaskGradients([p, q], TASKS[:2])
    whole, part = TaskDominance(optimizer, gradients), TaskDominance(optimizer, gradients, subsample=0.1, device="cpu")
    for _ in range(3):
        rows = [[torch.randn_like(p), torch.randn_like(q)] for _ in range(2)]
        gradients.clear()
        gradients.accumulate(rows, [True, True])
        gradients.write_grad()
        optimizer.step()
    assert part.rau(p).shape == (2, 200) and part.rau(q).shape == (2, 3)
    everything = {tuple(pair) for pair in whole.rau(p).flatten(1).T.tolist()}
    assert {tuple(pair) for pair in part.rau(p).T.tolist()} <= everything
    assert part.table()[0]["mean"] == pytest.approx(whole.table()[0]["mean"], abs=0.1)


@pytest.mark.parametrize("name", ["adam", "sgd, dampened", "adatask"])
def test_a_resumed_run_has_the_averages_of_one_that_was_never_stopped(name):
    def start():
        model = TwoHeads()
        if name == "adatask":
            optimizer = AdaTask(model.parameters(), TASKS, lr=LR)
            return model, optimizer, None, TaskDominance(optimizer, every_n_steps=2)
        optimizer = PLAIN[name](model.parameters())
        return model, optimizer, *plain(optimizer, model, every_n_steps=2)

    model, optimizer, gradients, whole = start()
    for step in range(5):
        make_step(model, optimizer, gradients, step)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), whole.state_dict()])
    resumed, other, fresh, dominance = start()
    for part, state in zip((resumed, other, dominance), saved, strict=True):
        part.load_state_dict(state)
    for step in range(5, 10):
        make_step(model, optimizer, gradients, step)
        make_step(resumed, other, fresh, step)
    for p, q in zip(model.trunk.parameters(), resumed.trunk.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(whole.rau(p), dominance.rau(q))
    assert dominance.table() == whole.table()


@pytest.mark.parametrize("name", ["adam", "sgd, dampened", "sgd, nesterov, foreach"])
def test_a_task_that_comes_late_joins_the_averages(name):
    model = TwoHeads()
    optimizer = PLAIN[name](model.parameters())
    gradients, dominance = plain(optimizer, model, Recorded)
    for step, absent in enumerate([(0, 1), (0, 1), (1,), (), ()]):
        before = {p: p.detach().clone() for p in model.parameters()}
        make_step(model, optimizer, gradients, step, absent)
        assert hasattr(dominance, "last") is (step >= 2)
        assert step < 2 or assert_adds_up(dominance, before) == 4
    assert dominance.last[model.trunk[0].weight][1] == [2, 0, 1]
    assert [row["task"] for row in dominance.table()[:3]] == TASKS


def fill(gradients, rows):
    gradients.clear()
    gradients.accumulate([[row] for row in rows], [row is not None for row in rows])
    gradients.write_grad()


def test_a_kernel_that_overwrites_the_gradient_does_not_spoil_the_first_tasks_momentum():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer, gradients = SGD([p], lr=LR, momentum=0.9, nesterov=True, foreach=True), TaskGradients([p], TASKS[:2])
    dominance = Recorded(optimizer, gradients)
    for first, second in (([1.0, 2.0], None), ([-0.5, 0.1], None), ([0.2, -0.3], [1.0, 1.0])):
        fill(gradients, [None if g is None else torch.tensor(g, dtype=torch.float64) for g in (first, second)])
        optimizer.step()
    moments = [0.9 * (0.9 * a + b) + c for a, b, c in ((1.0, -0.5, 0.2), (2.0, 0.1, -0.3))]
    expected = [[-LR * (c + 0.9 * m) for c, m in zip((0.2, -0.3), moments, strict=True)], [-LR * 1.9] * 2]
    torch.testing.assert_close(dominance.last[p][0], torch.tensor(expected, dtype=torch.float64))


def test_a_layer_that_two_of_three_tasks_reach_is_balanced_between_these():
    p = nn.Parameter(torch.zeros(2))
    optimizer, gradients = SGD([p], lr=LR), TaskGradients([p], TASKS)
    dominance = TaskDominance(optimizer, gradients)
    fill(gradients, [None, torch.ones(2), torch.ones(2)])
    optimizer.step()
    assert dominance.rau(p)[:, 0].tolist() == [0.0, 0.5, 0.5]
    rows = dominance.table()
    assert [(row["task"], row["mean"], row["median"]) for row in rows] == [("1", 0.5, 0.5), ("2", 0.5, 0.5)]
    assert rows[0]["entropy"] == pytest.approx(1)


def test_momentum_from_before_the_first_step_that_was_seen_goes_to_no_task():
    model = TwoHeads()
    optimizer = SGD(model.parameters(), lr=LR, momentum=0.5, dampening=0.3)
    gradients = TaskGradients(model.parameters(), TASKS)
    for step in range(3):
        make_step(model, optimizer, gradients, step)
    dominance = Recorded(optimizer, gradients)
    weight = model.trunk[0].weight
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    make_step(model, optimizer, gradients, 3)
    unseen = weight.detach() - before + LR * 0.5 * momentum
    torch.testing.assert_close(dominance.last[weight][0].sum(0).view_as(weight), unseen)


def test_a_step_that_a_fused_kernel_leaves_out_changes_nothing():
    model = TwoHeads().float()
    optimizer = Adam(model.parameters(), lr=LR, fused=True)
    gradients, dominance = plain(optimizer, model)
    scaler, averages = torch.amp.GradScaler("cpu", init_scale=4.0), torch.empty(0)
    for bad in (False, True):
        losses, _ = model.losses(*(t.float() for t in batch(0)))
        losses = [scaler.scale(loss) * (math.inf if bad else 1.0) for loss in losses]
        gradients.clear()
        gradients.accumulate(per_task_grads(losses, gradients.parameters), [True] * 3, factor=0.25)
        gradients.write_grad(4.0)
        scaler.step(optimizer)
        scaler.update()
        found = dominance.state_dict()
        averages = found["records"][0]["averages"].clone() if not bad else averages
        assert found["steps"] == 1 and torch.equal(found["records"][0]["averages"], averages)


def test_sums_that_nearly_cancel_are_not_blown_up_by_rounding():
    p = nn.Parameter(torch.zeros(3))
    optimizer, gradients = SGD([p], lr=1.0), TaskGradients([p], TASKS[:2])
    dominance = Recorded(optimizer, gradients)
    rows = [[torch.tensor([1.0, 1.0, 0.25])], [torch.tensor([-1.0 + 2**-23, 2.0, 0.5])]]
    gradients.accumulate(rows, [True, True])
    p.grad = torch.tensor([2**-24, 1.5, 0.75])  # the second element was clipped
    optimizer.step()
    torch.testing.assert_close(dominance.last[p][0], torch.tensor([[-1.0, -0.5, -0.25], [1.0, -1.0, -0.5]]))


def test_after_close_nothing_is_noted_any_more():
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), TASKS, lr=LR)
    dominance = TaskDominance(optimizer)
    make_step(model, optimizer, None, 0)
    table = dominance.table()
    dominance.close()
    make_step(model, optimizer, None, 1)
    assert dominance.table() == table and not optimizer._hooks


class OwnAdam(Adam):
    pass


@pytest.mark.parametrize("build", [torch.optim.LBFGS, torch.optim.Adadelta, OwnAdam])
def test_optimizers_whose_step_cannot_be_split_are_named(build):
    p = nn.Parameter(torch.zeros(2))
    message = f"step of {build.__name__} cannot be split by task: use AdaTask, or one of torch's SGD, RMSprop, Adagrad"
    with pytest.raises(RuntimeError, match=message):
        TaskDominance(build([p]), TaskGradients([p], TASKS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"mode": "exakt"}, "mode must be one of exact, instant, got 'exakt'"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"subsample": 0.0}, r"subsample must be in \(0, 1\], got 0.0"),
        ({"groups": "layer"}, "groups must be 'module', 'parameter' or a function of a name, got 'layer'"),
        ({"gradients": None}, "step of Adam is split with the tasks' gradients: pass gradients"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        TaskDominance(Adam([p]), **{"gradients": TaskGradients([p], TASKS), **options})


def test_what_does_not_go_with_adatask_is_refused():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="mode='instant' is for plain optimizers"):
        TaskDominance(AdaTask([p], TASKS), mode="instant")
    with pytest.raises(RuntimeError, match="low_memory=True does not keep the update of each task"):
        TaskDominance(AdaTask([p], TASKS, low_memory=True))
    with pytest.raises(RuntimeError, match="complex parameters"):
        TaskDominance(Adam([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]), TaskGradients([p], TASKS))


def test_a_step_without_gradients_by_task_is_explained():
    model = TwoHeads()
    optimizer = Adam(model.parameters(), lr=LR)
    _, dominance = plain(optimizer, model)
    optimizer.step()
    model.losses(*batch(0))[0][0].backward()
    with pytest.raises(RuntimeError, match=r"without gradients by task: call accumulate\(\) before step"):
        optimizer.step()
    other = Adam(model.named_parameters(), lr=LR)
    part = TaskGradients(list(model.parameters())[1:], TASKS)
    gradients_of(model, 0, part)
    _ = TaskDominance(other, part)
    model.trunk[0].weight.grad = torch.ones_like(model.trunk[0].weight)
    dominance.close()
    with pytest.raises(RuntimeError, match=r"leave out trunk.0.weight"):
        other.step()


def test_a_state_of_another_setting_is_refused():
    model = TwoHeads()
    optimizer = Adam(model.parameters(), lr=LR)
    gradients, dominance = plain(optimizer, model)
    make_step(model, optimizer, gradients, 0)
    state = dominance.state_dict()
    with pytest.raises(ValueError, match=r"made with decay=0.99, not 0.5; subsample=1.0, not 0.5"):
        plain(optimizer, model, decay=0.5, subsample=0.5)[1].load_state_dict(state)
    with pytest.raises(ValueError, match="averages are of the tasks a, b, c, not of 0, 1, 2"):
        TaskDominance(AdaTask(model.parameters(), ["a", "b", "c"])).load_state_dict(state)
    with pytest.raises(ValueError, match="hold a parameter 0 that this optimizer does not have so"):
        TaskDominance(AdaTask(model.trunk[2].parameters(), TASKS)).load_state_dict(state)
