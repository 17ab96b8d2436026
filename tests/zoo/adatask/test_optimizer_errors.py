"""Mistakes in the use of the optimizer, each with its message."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.zoo.adatask.problems import TwoHeads, batch
from zoo.adatask import AdaTask


@pytest.fixture
def model():
    return TwoHeads()


@pytest.fixture
def losses(model):
    return model.losses(*batch(0))[0]


@pytest.fixture
def optimizer(model):
    return AdaTask(model.parameters(), ["a", "b", "c"])


def test_a_summed_loss_is_refused(optimizer, losses):
    with pytest.raises(ValueError, match=r"expected 3 losses \(a, b, c\), got one tensor of shape \(\).*unsummed"):
        optimizer.backward(sum(losses))


def test_a_wrong_number_of_losses_is_refused(optimizer, losses):
    with pytest.raises(ValueError, match=r"expected 3 losses \(a, b, c\), got 2"):
        optimizer.backward(losses[:2])


def test_missing_and_unknown_names_are_named(optimizer, losses):
    with pytest.raises(ValueError, match=r"missing: c; unknown: d.*the tasks are a, b, c"):
        optimizer.backward(dict(zip("abd", losses, strict=True)))


def test_a_loss_that_is_no_scalar_is_named(optimizer, losses):
    with pytest.raises(ValueError, match=r"loss of task b has shape \(2,\), expected a scalar"):
        optimizer.backward([losses[0], losses[1].expand(2), losses[2]])


def test_a_detached_loss_is_named(optimizer, losses):
    with pytest.raises(ValueError, match="loss of task c does not require a gradient"):
        optimizer.backward([*losses[:2], losses[2].detach()])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(optimizer, losses, value):
    with pytest.raises(ValueError, match=f"loss of task b is {value}.*nonfinite='skip'"):
        optimizer.backward([losses[0], losses[1] * value, losses[2]])


def test_a_loss_that_is_not_finite_can_be_skipped(model, losses):
    optimizer = AdaTask(model.parameters(), 3, nonfinite="skip")
    optimizer.backward([losses[0], losses[1] * float("nan"), losses[2]])
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert model.heads[1].weight not in optimizer.state


def test_no_loss_at_all_is_refused(optimizer):
    with pytest.raises(ValueError, match="no task has a loss"):
        optimizer.backward([None, None, None])


def test_a_missing_loss_can_be_an_error(model, losses):
    optimizer = AdaTask(model.parameters(), ["a", "b", "c"], missing="error")
    with pytest.raises(ValueError, match="no loss for b, and missing='error'"):
        optimizer.backward([losses[0], None, losses[2]])


def test_a_step_without_backward_is_refused(optimizer):
    with pytest.raises(RuntimeError, match=r"no task gradients on shared parameters; call optimizer.backward"):
        optimizer.step()


def test_a_joint_backward_is_explained(optimizer, losses):
    sum(losses).backward()
    with pytest.raises(RuntimeError, match="a joint gradient cannot be split"):
        optimizer.step()


def test_a_parameter_that_no_loss_reaches_is_named_once(model):
    spare = nn.Linear(2, 2).double()
    named = [*model.named_parameters(), *spare.named_parameters(prefix="spare")]
    optimizer = AdaTask(named, 3)
    for step in range(2):
        optimizer.zero_grad()
        optimizer.backward(model.losses(*batch(step))[0])
        if step == 0:
            with pytest.warns(UserWarning, match=r"no loss reaches spare.weight, spare.bias \(2 in all\)"):
                optimizer.step()
        else:
            optimizer.step()


def test_tasks_that_share_nothing_are_refused(model, losses):
    optimizer = AdaTask(model.heads.parameters(), 3)
    optimizer.backward(losses)
    with pytest.raises(ValueError, match=r"no parameter is shared by two or more tasks.*use the base optimizer"):
        optimizer.step()


def test_a_parameter_in_two_groups_is_refused(model):
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdaTask([{"params": model.trunk.parameters()}, {"params": model.parameters()}], 3)


def test_a_group_added_later_is_inferred_at_the_next_step(model, losses):
    optimizer = AdaTask(model.trunk.parameters(), 3)
    optimizer.backward(losses)
    with pytest.raises(RuntimeError, match=r"added between backward\(\) and step\(\)"):
        optimizer.add_param_group({"params": list(model.heads.parameters())})
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": list(model.heads[0].parameters())})
    optimizer.backward(model.losses(*batch(1))[0])
    optimizer.step()
    assert optimizer.param_groups[1]["task_ids"] == [[0], [0]]


def test_one_task_warns(model):
    with pytest.warns(UserWarning, match="AdaTask with one task is plain rmsprop"):
        AdaTask(model.parameters(), 1, rule="rmsprop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0 and below inf, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1, got 1.0"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] must be at least 0"),
        ({"alpha": 1.5}, "alpha must be at least 0 and below 1, got 1.5"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"rule": "sgd"}, "rule must be one of adam, rmsprop, adagrad, got 'sgd'"),
        ({"reduction": "max"}, "reduction must be one of sum, mean"),
        ({"missing": "ignore"}, "missing must be one of skip, zero, error"),
        ({"nonfinite": "drop"}, "nonfinite must be one of"),
        ({"compose": "both"}, "compose must be one of pre, post"),
        ({"task_weights": [1.0, 2.0]}, "task_weights has 2 values for 3 tasks"),
        ({"task_weights": [1.0, 0.0, 1.0]}, r"task_weights must be positive, got \[1.0, 0.0, 1.0\]"),
        ({"rule": "adagrad", "amsgrad": True}, "amsgrad belongs to rule='adam'"),
        ({"low_memory": True, "aggregator": torch.clone}, "no aggregator can see both"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value(model, options, message):
    with pytest.raises(ValueError, match=message):
        AdaTask(model.parameters(), 3, **options)


@pytest.mark.parametrize(("tasks", "message"), [(0, "positive number"), ("ab", "list of names"), (["a", "a"], "twice")])
def test_tasks_must_be_a_number_or_distinct_names(model, tasks, message):
    with pytest.raises(ValueError, match=message):
        AdaTask(model.parameters(), tasks)


def test_a_fused_kernel_that_does_not_exist_is_refused(model):
    with pytest.raises(RuntimeError, match=r"torch has fused rmsprop kernels on no device.*leave fused out"):
        AdaTask(model.parameters(), 3, rule="rmsprop", fused=True)


def test_integer_parameters_are_refused():
    with pytest.raises(ValueError, match=r"real numbers, got one of type torch\.complex64"):
        AdaTask([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], 2)


@pytest.mark.parametrize("low_memory", [False, True])
def test_sparse_gradients_are_refused_with_the_alternative(low_memory):
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = AdaTask(table.named_parameters(), 2, low_memory=low_memory)
    rows = table(torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match=r"gradient of weight is sparse.*sparse=False"):
        optimizer.backward([rows.sum(), rows.square().sum()])


def test_a_change_in_place_is_explained(model, optimizer, losses):
    with torch.no_grad():
        model.trunk[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"(?s)inplace operation.*call\s+step\(\) once"):
        optimizer.backward(losses)


def test_an_adam_checkpoint_is_refused_with_the_way_out(model, optimizer, losses):
    adam = torch.optim.Adam(model.parameters())
    sum(losses).backward()
    adam.step()
    with pytest.raises(ValueError, match=r"load_adam_state\(state_dict, copy='zeros'\)"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="copy must be 'zeros' or 'shared', got 'mean'"):
        optimizer.load_adam_state(adam.state_dict(), copy="mean")
    with pytest.raises(ValueError, match=r"groups of \[10\] parameters, this optimizer of \[4\]"):
        AdaTask(model.trunk.parameters(), 3).load_adam_state(adam.state_dict())


def test_a_state_of_other_tasks_or_another_rule_is_refused(model, optimizer, losses):
    optimizer.backward(losses)
    optimizer.step()
    with pytest.raises(ValueError, match="the state has the tasks a, b, c, this optimizer x, y, z"):
        AdaTask(model.parameters(), ["x", "y", "z"]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="rule='adagrad' needs step, sum"):
        AdaTask(model.parameters(), ["a", "b", "c"], rule="adagrad").load_state_dict(optimizer.state_dict())


def test_an_aggregator_of_another_shape_is_refused(model, losses):
    optimizer = AdaTask(model.parameters(), 3, aggregator=lambda matrix: matrix[0])
    optimizer.backward(losses)
    with pytest.raises(ValueError, match=r"the aggregator returned \(74,\) for \(3, 74\)"):
        optimizer.step()


def test_weights_before_the_normalisation_warn_once(model, losses):
    optimizer = AdaTask(model.parameters(), 3, aggregator=lambda matrix: matrix.new_ones(3), compose="pre")
    optimizer.backward(losses)
    with pytest.warns(UserWarning, match="use compose='post'"):
        optimizer.step()
    optimizer.step()


def test_low_memory_refuses_what_needs_all_gradients(model, losses):
    optimizer = AdaTask(model.parameters(), 3, low_memory=True)
    with pytest.raises(RuntimeError, match="no GradScaler, no counts"):
        optimizer.backward(losses, counts=torch.ones(3))
    with pytest.raises(RuntimeError, match="does not keep the update of each task"):
        optimizer.add_update_hook(lambda *arguments: None)
    optimizer.backward(losses)
    with pytest.raises(RuntimeError, match="cannot be accumulated before a step"):
        optimizer.backward(model.losses(*batch(1))[0])


def test_counts_in_one_call_and_not_in_another_are_refused(model, optimizer, losses):
    optimizer.backward(losses, counts=torch.ones(3))
    with pytest.raises(ValueError, match="counts were given for one of several backward calls"):
        optimizer.backward(model.losses(*batch(1))[0])
