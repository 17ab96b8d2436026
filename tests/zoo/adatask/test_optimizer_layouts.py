"""AdaTask on gradients and parameters that lie in memory as they please, and in lives that are not straight."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.zoo.adatask.problems import TwoHeads, batch
from tests.zoo.adatask.test_optimizer import distance, parameter, step_with, train
from zoo.adatask import AdaTask, MTAdam
from zoo.adatask.task_gradients import TaskGradients


@pytest.mark.parametrize("rule", ["adam", "adagrad"])
@pytest.mark.filterwarnings("ignore:AdaTask with one task is plain")
def test_a_permuted_gradient_moves_the_weights_that_it_belongs_to(rule):
    torch.manual_seed(0)
    start, inputs = torch.randn(6, 5, 4), torch.randn(3, 6)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = AdaTask([p], 1, rule=rule, lr=0.1)
    theirs = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}[rule]([q], lr=0.1)
    for _ in range(3):
        ours.zero_grad()
        ours.backward([torch.einsum("bi,ijk->bkj", inputs, p).square().mean()])
        ours.step()
        theirs.zero_grad()
        torch.einsum("bi,ijk->bkj", inputs, q).square().mean().backward()
        theirs.step()
    torch.testing.assert_close(p, q)


def test_an_expanded_gradient_is_read_within_its_bounds():
    for _ in range(3):
        p = nn.Parameter(torch.zeros(6))
        optimizer = AdaTask([p], 2, lr=0.1)
        optimizer.backward([p.sum(), 2 * p.sum()])
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((6,), -0.2))


@pytest.mark.parametrize(
    "options",
    [{}, {"hook": True}, {"aggregator": torch.clone}, {"low_memory": True}],
    ids=["plain", "hook", "aggregator", "low_memory"],
)
@pytest.mark.parametrize("last", [False, True])
def test_channels_last_weights_follow_the_contiguous_ones(options, last):
    options = dict(options)
    hook = options.pop("hook", False)

    def run(memory_format):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3).double()
        if last:
            conv = conv.to(memory_format=memory_format)
        images = torch.randn(2, 3, 6, 6, dtype=torch.float64).to(memory_format=memory_format)
        optimizer = AdaTask(conv.parameters(), 2, lr=0.1, **options)
        if hook:
            optimizer.add_update_hook(lambda *arguments: None)
        for _ in range(4):
            maps = conv(images)
            optimizer.zero_grad()
            optimizer.backward([maps.square().mean(), 50 * maps.sin().mean()])
            optimizer.step()
        return conv

    assert distance(run(torch.contiguous_format), run(torch.channels_last)) < 1e-10


def average(rank):
    gradients = TaskGradients([torch.zeros(2)], ["a", "b"])
    own = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])]]
    if rank == 0:
        gradients.accumulate(own, [True, True], torch.tensor([8.0, 8.0]))
    gradients.all_reduce()
    return [row[0] for row in gradients.rows]


def test_a_process_without_any_loss_takes_the_averages_of_the_others(tmp_path):
    ranks = run_ranks(tmp_path, average)
    for found in ranks:
        torch.testing.assert_close(found[0], torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(found[1], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_mtadam_keeps_its_scale_while_a_task_is_missing(absent):
    p = parameter(0.0, 0.0)
    optimizer = MTAdam([p], 3, lr=0.1)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1000.0], [10.0, 10.0]], dtype=torch.float64)
    for _ in range(3):
        step_with(optimizer, vectors, p)
    before = optimizer.state[p]["exp_avg_sq"].clone()
    optimizer.zero_grad()
    optimizer.backward([None if k == absent else (v * p).sum() for k, v in enumerate(vectors)])
    optimizer.step()
    after = optimizer.state[p]["exp_avg_sq"]
    assert torch.equal(after[absent], before[absent])
    # All gradients have the norm of the first task's, 1.
    assert float(after.sum(1).max()) < 0.01


def test_mtadam_takes_a_parameter_without_dimensions_and_ascends_on_demand():
    p = nn.Parameter(torch.tensor(0.0))
    optimizer = MTAdam([{"params": [p], "maximize": True}], 2, lr=0.1)
    optimizer.backward([p * 2, p * 300])
    optimizer.step()
    assert float(p.detach()) == pytest.approx(0.2, rel=1e-4)


def test_a_loaded_state_decides_which_groups_are_joint():
    p, q = parameter(0.0), parameter(0.0)
    saved = AdaTask([{"params": [p]}, {"params": [q], "shared": False}], 2)
    saved.backward([(p + q).sum(), 3 * (p + q).sum()])
    saved.step()
    shapes = []
    other = AdaTask([{"params": [p]}, {"params": [q]}], 2, aggregator=lambda m: (shapes.append(m.shape), m)[1])
    other.load_state_dict(saved.state_dict())
    other.backward([(p + q).sum(), 3 * (p + q).sum()])
    other.step()
    assert shapes == [(2, 1)]


@pytest.mark.parametrize("shared", [True, False])
def test_a_zeroed_task_means_the_same_with_and_without_low_memory(shared):
    moved = []
    for low_memory in (False, True):
        p, q, frozen = parameter(1.0), parameter(2.0), parameter(3.0)
        groups = [{"params": [p, frozen], "shared": shared}, {"params": [q]}]
        optimizer = AdaTask(groups, 2, lr=0.1, missing="zero", low_memory=low_memory)
        optimizer.backward([(p * q * frozen).sum(), (p + q + frozen).sum()])
        optimizer.step()
        frozen.requires_grad_(False)
        kept = frozen.detach().clone()
        optimizer.zero_grad()
        # The present task does not reach p this time.
        optimizer.backward([q.sum(), None])
        optimizer.step()
        assert torch.equal(frozen, kept)
        moved.append(torch.cat([p.detach(), q.detach()]))
    torch.testing.assert_close(*moved)


def test_a_model_can_be_unfrozen_layer_by_layer():
    model = TwoHeads()
    model.trunk[0].requires_grad_(False)
    optimizer = AdaTask([*model.trunk[2].parameters(), *model.heads.parameters()], 3, lr=1e-2)
    train(model, optimizer, 2)
    model.trunk[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.trunk[0].parameters())})
    before = model.trunk[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert not torch.equal(before, model.trunk[0].weight)
    assert optimizer.param_groups[1]["task_ids"] == [[0, 1, 2]] * 2


def test_an_overflow_in_the_first_step_says_nothing_about_what_is_shared():
    p, q = parameter(1.0), parameter(1.0)
    optimizer = AdaTask([p, q], 2)
    optimizer.backward([p.sum(), None])
    optimizer.zero_grad()  # a scaler skipped the step
    optimizer.backward([None, (q * p).sum()])
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward([p.sum(), None])
    optimizer.step()
    assert sorted(optimizer.param_groups[0]["task_ids"][0]) == [0, 1]


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_step_in_which_all_losses_are_skipped_does_nothing(low_memory):
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), 3, nonfinite="skip", low_memory=low_memory)
    before = copy.deepcopy(model.state_dict())
    optimizer.backward([loss * torch.nan for loss in model.losses(*batch(0))[0]])
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, optimizer, 1)


def test_a_scaler_passes_over_a_step_in_which_all_losses_are_skipped():
    model = TwoHeads()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AdaTask(model.parameters(), 3, nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    optimizer.backward([loss * torch.nan for loss in model.losses(*batch(0))[0]], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_model_and_optimizer_goes_on_alike(low_memory, duplicate):
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), ["a", "b", "c"], lr=1e-2, low_memory=low_memory, task_weights=[1, 2, 3])
    train(model, optimizer, 3)
    other_model, other = duplicate((model, optimizer))
    train(model, optimizer, 3, start=3)
    train(other_model, other, 3, start=3)
    assert distance(model, other_model) == 0
    assert other.tasks == ("a", "b", "c")


def test_first_moments_of_their_own_type_beside_parameters_of_two_types():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    q = nn.Parameter(torch.ones(3))
    optimizer = AdaTask([p, q], 2, lr=0.1, first_moment_dtype=torch.bfloat16)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([(p.float() + q).sum(), 7 * (p.float() * q).sum()])
        optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.6), rtol=2e-2, atol=0)
    torch.testing.assert_close(p.detach().float(), torch.full((3,), 0.6), rtol=3e-2, atol=0)


def test_a_learning_rate_in_a_tensor_is_taken_without_a_fused_kernel():
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = AdaTask([p], 2, lr=torch.tensor(0.25))
    optimizer.backward([p.sum(), 5 * p.sum()])
    optimizer.step()
    assert p.detach().tolist() == [-0.5, -0.5]


def test_groups_can_be_used_again_and_a_cleared_state_starts_anew():
    p = parameter(0.0)
    groups = [{"params": [p]}]
    for _ in range(2):
        optimizer = AdaTask(groups, 2, lr=0.1)
        assert float(step_with(optimizer, [[1.0], [1.0]], p)) == pytest.approx(-0.2)
    optimizer.state = defaultdict(dict)
    step_with(optimizer, [[1.0], [1.0]], p)
    assert optimizer.state[p]["step"].tolist() == [1, 1]


class Nothing(torch.autograd.Function):
    """Passes no gradient."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_function_without_a_gradient_leaves_its_parameter_alone(low_memory):
    p, q = parameter(1.0), parameter(1.0)
    optimizer = AdaTask([p, q], 2, low_memory=low_memory)
    optimizer.backward([(Nothing.apply(p) + q).sum(), (q * 2 + Nothing.apply(p)).sum()])
    if low_memory:
        optimizer.step()
    else:
        with pytest.warns(UserWarning, match="no loss reaches parameter 0"):
            optimizer.step()
    assert float(p.detach()) == 1.0
    assert float(q.detach()) != 1.0


def test_an_aggregator_may_return_another_type():
    p = nn.Parameter(torch.zeros(2))
    optimizer = AdaTask([p], 2, lr=0.1, aggregator=lambda matrix: matrix.double())
    optimizer.backward([p.sum(), 2 * p.sum()])
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), -0.2))


def test_clipping_grad_in_a_bare_loop_leaves_the_tasks_gradients_alone():
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), 3)
    optimizer.backward(model.losses(*batch(0))[0])
    before = optimizer.gradients.rows[0][4].clone()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert torch.equal(optimizer.gradients.rows[0][4], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "rmsprop", "first_moment_dtype": torch.bfloat16}, "'rmsprop' has no first moments"),
        ({"task_weights": []}, "task_weights has 0 values for 3 tasks"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaTask(TwoHeads().parameters(), 3, **options)


def test_amsgrad_of_a_group_needs_adam_and_a_number_is_no_loss():
    model = TwoHeads()
    with pytest.raises(ValueError, match="amsgrad belongs to rule='adam', not to 'rmsprop'"):
        AdaTask([{"params": list(model.parameters()), "amsgrad": True}], 3, rule="rmsprop")
    with pytest.raises(ValueError, match=r"the loss of task task 1 is 0.5, expected a tensor"):
        AdaTask(model.parameters(), 3).backward([model.losses(*batch(0))[0][0], 0.5, None])


def test_an_adam_state_is_for_an_optimizer_that_has_not_stepped():
    model = TwoHeads()
    optimizer = AdaTask(model.parameters(), 3)
    train(model, optimizer, 1)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="has not made a step yet"):
        optimizer.load_adam_state(adam.state_dict())
