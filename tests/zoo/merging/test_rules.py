"""Rules by name; what each computes is tested with `MergedClassifier`."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.zoo.merging.small_experts import QUIET, TASKS, equal, net, states, weights
from zoo.merging import AdaMerging, MergedClassifier
from zoo.merging.coefficient_files import save_coefficients
from zoo.merging.fisher import fisher_merge
from zoo.merging.merged_classifier import METHODS
from zoo.merging.one_shot import dare_merge, magnitude_merge, task_arithmetic, ties_merge, weight_average
from zoo.merging.regmean import regmean_merge
from zoo.merging.rules import RULES, check_rule, merge_by_rule

pytestmark = QUIET

FUNCTIONS = {
    "average": weight_average,
    "task_arithmetic": task_arithmetic,
    "magnitude": magnitude_merge,
    "ties": ties_merge,
    "dare": dare_merge,
    "dare_ties": dare_merge,
    "fisher": fisher_merge,
    "regmean": regmean_merge,
}


def module(**options):
    made = MergedClassifier(TASKS, experts=states(net()), pretrained=net(), heads=weights(), **options)
    made.open_experts()
    return made


def unasked():
    raise AssertionError("this rule needs no data")


@pytest.mark.parametrize("rule", FUNCTIONS)
def test_the_options_of_a_rule_are_arguments_of_its_function(rule):
    arguments = inspect.signature(FUNCTIONS[rule]).parameters
    assert set(RULES[rule]) <= set(arguments)
    plain = {"pretrained", "experts", "out", "selection", "model", "inputs", "batches", "heads", "features", "progress"}
    own = {name for name in arguments if name not in plain and not name.startswith("_")}
    # What only trades time for memory is no option of a rule.
    assert own - set(RULES[rule]) <= {"dare": {"ties_density"}, "fisher": {"chunk_size"}, "regmean": {"dtype"}}.get(
        rule, set()
    )


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("mean", {}, "the rule must be one of pretrained, joint, average, task_arithmetic, .*, got 'mean'"),
        ("individual", {}, "the rule must be one of"),
        ("ties", {"coef": 1, "p": 0.5}, "ties has no option 'p': it has density, coef, merge_func"),
        ("pretrained", {"coef": 1}, "pretrained has no option 'coef': it has none"),
        ("adamerging", {"coef_path": ""}, "adamerging needs coef_path: a checkpoint of AdaMerging, or a file"),
    ],
)
def test_unknown_rules_and_options_are_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        check_rule(rule, options)
    with pytest.raises(ValueError, match=message):
        merge_by_rule(module(), rule, options, unasked)


def test_every_rule_is_a_method_of_the_classifier():
    assert set(METHODS) == {"individual", *RULES}


@pytest.mark.parametrize("rule", ["pretrained", "average", "task_arithmetic", "magnitude", "ties", "dare", "dare_ties"])
def test_a_merge_has_the_names_and_shapes_of_the_store_and_leaves_it_alone(rule):
    made = module()
    theta0, tau = made.store.theta0.clone(), made.store.tau.clone()
    merged = merge_by_rule(made, rule, {}, unasked)
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == made.store.shapes
    for tensor in merged.values():
        tensor.zero_()
    assert torch.equal(made.store.theta0, theta0) and torch.equal(made.store.tau, tau)


def test_coefficients_belong_to_the_granularity_that_they_were_learnt_with(tmp_path):
    path = tmp_path / "coef.safetensors"
    made = module()
    for granularity, count in (("task", 1), ("module", 2), ("layer", 4)):
        other = AdaMerging(
            TASKS, experts=states(net()), pretrained=net(), heads=weights(), granularity=granularity, init=0.6
        )
        other.coefficients_.raw.data += 0.1 * torch.rand(count, 3)
        other.open_experts()
        other.export_coefficients(path)
        merged = merge_by_rule(made, "adamerging", {"coef_path": str(path)}, unasked)
        expected = other.export()
        assert all(torch.allclose(tensor, expected[name]) for name, tensor in merged.items())
    save_coefficients(path, torch.ones(4, 3), made.store.layer_names, made.store.task_names)
    assert equal(
        merge_by_rule(made, "adamerging", {"coef_path": str(path)}, unasked), made.store.merge(torch.ones(4, 3))
    )


def test_coefficients_of_layers_made_by_a_function_are_refused(tmp_path):
    path = tmp_path / "coef.safetensors"
    save_coefficients(path, torch.ones(1, 3), ["all"], ["a.b", "keys", "c"], {"granularity": ["?"]})
    with pytest.raises(ValueError, match=r"coef.safetensors: its layers were made by a function"):
        merge_by_rule(module(), "adamerging", {"coef_path": str(path)}, unasked)
    made = AdaMerging(
        TASKS, experts=states(net()), pretrained=net(), heads=weights(), granularity=lambda name: name.split(".")[0]
    )
    made.export_coefficients(path)
    with pytest.raises(ValueError, match="made by a function"):
        merge_by_rule(module(), "adamerging", {"coef_path": str(path)}, unasked)
