"""Which weights can be merged, and what is said where they cannot."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from zoo.merging.weights import Weights, is_statistic, match_weights, open_weights


def base(**changes: Tensor) -> dict[str, Tensor]:
    plain = {"body.weight": torch.ones(3, 2), "body.bias": torch.ones(3), "head.weight": torch.ones(5, 3)}
    return {**plain, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def opened(tensors: dict[str, Tensor], label: str = "pretrained") -> Weights:
    return open_weights(tensors, label, key_map="none")


def match(pretrained: dict[str, Tensor], *experts: dict[str, Tensor], **options: str | list[str]) -> list[str]:
    tasks = ("mnist", "dtd", "cars")
    pairs = zip(tasks, experts, strict=False)
    return match_weights(opened(pretrained), {task: opened(e, f"expert {task}") for task, e in pairs}, **options)


def test_names_come_in_the_order_of_the_base_whatever_that_of_the_experts() -> None:
    shuffled = dict(reversed(base().items()))
    assert match(base(), shuffled, base()) == list(base())


def test_include_and_exclude_are_searched_in_names() -> None:
    assert match(base(), base(), include="body") == ["body.weight", "body.bias"]
    assert match(base(), base(), include=["bias$", "^head"]) == ["body.bias", "head.weight"]
    assert match(base(), base(), exclude="^head") == ["body.weight", "body.bias"]
    assert match(base(), base(), include="weight", exclude=["head", "bias"]) == ["body.weight"]


def test_heads_may_differ_once_they_are_excluded() -> None:
    expert = without(base(head__weight=torch.ones(9, 3), classifier__bias=torch.ones(9)), "body.bias")
    assert match(base(), expert, exclude=["^head", "^classifier", "bias"]) == ["body.weight"]


def test_a_misfit_lists_missing_and_extra_keys_and_both_shapes() -> None:
    expert = without(base(head__weight=torch.ones(9, 3), head__scale=torch.ones(1)), "body.bias")
    with pytest.raises(ValueError, match="expert dtd does not fit pretrained in 3 keys") as caught:
        match(base(), base(), expert)
    for part in (
        "body.bias (3,) is missing",
        "head.weight is (9, 3), (5, 3) in pretrained",
        "head.scale (1,) is not in pretrained",
    ):
        assert part in str(caught.value)


def test_the_proposed_exclude_works() -> None:
    expert = base(head__weight=torch.ones(9, 3), fc__1__bias=torch.ones(1))
    with pytest.raises(ValueError, match="Leave heads and other parts of single tasks out") as caught:
        match(base(), expert)
    found = re.search(r'exclude="(.*)"\.', str(caught.value))
    assert found is not None and found[1] == r"^(head|fc\.1)"
    assert match(base(), expert, exclude=found[1]) == ["body.weight", "body.bias"]
    with pytest.raises(ValueError, match=r'with exclude="\^head"'):
        match(base(), base(head__weight=torch.ones(9, 3)))


def test_at_most_ten_keys_are_listed() -> None:
    extra = {f"extra.{number}": torch.ones(1) for number in range(13)}
    with pytest.raises(ValueError, match=r"in 13 keys: extra.0 .*extra.9 \(1,\) is not in pretrained; and 3 more"):
        match(base(), {**base(), **extra})


def test_without_a_common_name_another_architecture_is_suspected() -> None:
    with pytest.raises(ValueError, match="No name fits: is it another architecture"):
        match(base(), {"x": torch.ones(1)})


def test_integers_and_flags_may_differ_or_be_absent() -> None:
    ours = base(position_ids=torch.arange(4), mask=torch.tensor([True]))
    assert match(ours, base(position_ids=torch.arange(9)), base(other_ids=torch.arange(3))) == list(base())


def test_a_number_type_that_cannot_be_merged_is_reported() -> None:
    with pytest.raises(ValueError, match=r"body.bias is torch.int64, torch.float32 in pretrained"):
        match(base(), base(body__bias=torch.ones(3).long()))
    with pytest.raises(ValueError, match="'rotation' is complex"):
        match(base(rotation=torch.ones(2).cfloat()), base())


def test_mixed_types_are_reported_once() -> None:
    half = {name: tensor.half() for name, tensor in base().items()}
    with pytest.warns(UserWarning, match="tensors come in several types") as caught:
        match(base(), half, base(), half)
    text = str(caught[0].message)
    assert len(caught) == 1
    assert (
        text.startswith("3 of 3 tensors")
        and "float32 (pretrained, expert dtd), float16 (expert mnist, expert c" in text
    )
    assert match(half, half) == list(half)
    # A model may be mixed in itself.
    own = base(body__bias=torch.ones(3).half())
    assert match(own, own) == list(own)


def test_running_statistics_are_returned_and_can_be_told_apart() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    names = match(model.state_dict(), model.state_dict())
    assert [name for name in names if is_statistic(name)] == ["1.running_mean", "1.running_var"]
    assert is_statistic("num_batches_tracked")
    assert not is_statistic("running_mean_head.weight") and not is_statistic("my_running_mean")


def test_no_experts_and_nothing_to_merge_are_errors() -> None:
    with pytest.raises(ValueError, match="no experts were given"):
        match(base())
    with pytest.raises(ValueError, match=r"pretrained: nothing is left to merge of 3 tensors .*exclude='.'"):
        match(base(), base(), exclude=".")


def test_patterns_that_are_wrong_or_find_nothing_are_reported() -> None:
    with pytest.raises(ValueError, match=r"exclude='\[': expected regular expressions"):
        match(base(), base(), exclude="[")
    with pytest.raises(ValueError, match=r"include='visual' finds no name of pretrained, which has body.weight"):
        match(base(), base(), include="visual")
    with pytest.warns(UserWarning, match="exclude='classifer' finds no name in any of the weights"):
        match(base(), base(), exclude="classifer")
    assert match(base(), base(classifier=torch.ones(2)), exclude="classifier") == list(base())


def tied(value: float = 1.0, first: str = "embed", second: str = "head") -> dict[str, Tensor]:
    shared = torch.full((4, 2), value)
    return {first: shared, "body": torch.ones(2), second: shared}


def test_tied_weights_are_merged_once_under_the_first_name() -> None:
    assert match(tied(), tied(2.0), tied(3.0, "head", "embed")) == ["embed", "body"]


def test_copies_and_single_names_of_tied_weights_fit() -> None:
    copies = {name: tensor.clone() for name, tensor in tied(2.0).items()}
    assert match(tied(), copies) == ["embed", "body"]
    assert match(tied(), without(tied(2.0), "head")) == ["embed", "body"]
    assert match(without(tied(), "head"), tied(2.0)) == ["embed", "body"]
    assert match(without(tied(), "head"), tied(2.0, "head", "embed")) == ["embed", "body"]


def test_an_expert_that_untied_its_weights_does_not_fit_tied_ones() -> None:
    untied = {**tied(2.0), "head": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match="expert mnist has different values for embed and head, which are one tensor"):
        match(tied(), untied)
    assert match(tied(), untied, exclude=["embed", "head"]) == ["body"]
    # Where the base has two tensors, an expert's one serves for both.
    assert match(untied, tied(3.0)) == ["embed", "body", "head"]
