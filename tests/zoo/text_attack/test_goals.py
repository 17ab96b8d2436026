"""Goals against their formulas, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.text_attack.exposure import exposure
from zoo.text_attack.goals import ExposureGoal, PropensityGoal, SoftExposureGoal, check_goal, goal_function

SCORES = torch.tensor([[0.1, 0.9], [0.4, 0.5], [0.6, 0.2]])
TAU = torch.tensor([0.3, 0.4, 0.5])


def test_the_exposure_goal_is_the_exposure_with_its_rule_for_ties():
    for ties in ("pessimistic", "optimistic"):
        value = ExposureGoal(k=2, ties=ties).value(SCORES, TAU)
        assert torch.equal(value, exposure(SCORES, TAU, ties))
    assert ExposureGoal(ties="optimistic").value(SCORES, TAU).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert ExposureGoal().value(SCORES, TAU).tolist() == pytest.approx([1 / 3, 2 / 3])


def test_the_soft_goal_is_the_mean_sigmoid_of_the_margin():
    expected = [
        sum(1 / (1 + math.exp(-(float(SCORES[u, c]) - float(TAU[u])) / 0.1)) for u in range(3)) / 3 for c in range(2)
    ]
    assert SoftExposureGoal(temperature=0.1).value(SCORES, TAU).tolist() == pytest.approx(expected, abs=1e-9)


def test_the_soft_goal_nears_the_exposure_as_the_temperature_falls():
    value = SoftExposureGoal(temperature=1e-5).value(SCORES[[0, 2]], TAU[[0, 2]])
    torch.testing.assert_close(value, exposure(SCORES[[0, 2]], TAU[[0, 2]]))


def test_users_who_have_seen_the_item_count_in_neither_goal():
    tau = torch.tensor([0.3, torch.nan, 0.5])
    for goal in (ExposureGoal(), SoftExposureGoal()):
        torch.testing.assert_close(goal.value(SCORES, tau), goal.value(SCORES[[0, 2]], tau[[0, 2]]))


def test_users_without_enough_other_items_always_see_the_item():
    tau = torch.full((3,), -torch.inf)
    assert SoftExposureGoal().value(SCORES, tau).tolist() == [1, 1]
    assert ExposureGoal().value(SCORES, tau).tolist() == [1, 1]


def test_propensity_is_the_mean_probability():
    assert PropensityGoal().value(SCORES).tolist() == pytest.approx([1.1 / 3, 1.6 / 3])


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_propensity_refuses_what_is_no_probability(value):
    with pytest.raises(ValueError, match=f"{value:g} is outside"):
        PropensityGoal().value(torch.tensor([[0.5, value]]))


GOALS = [ExposureGoal(), SoftExposureGoal()]


@pytest.mark.parametrize("goal", GOALS, ids=["exposure", "soft"])
def test_ranking_goals_need_candidates_with_a_pointwise_victim(goal):
    check_goal(goal, "retrieval")
    check_goal(goal, "pointwise", has_candidates=True)
    with pytest.raises(ValueError, match=f"{type(goal).__name__}.*candidate items.*PropensityGoal"):
        check_goal(goal, "pointwise")


def test_propensity_has_no_meaning_for_a_retrieval_victim():
    check_goal(PropensityGoal(), "pointwise")
    for has_candidates in (False, True):
        with pytest.raises(ValueError, match="ExposureGoal"):
            check_goal(PropensityGoal(), "retrieval", has_candidates)
    with pytest.raises(ValueError, match="'listwise'"):
        check_goal(PropensityGoal(), "listwise")


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExposureGoal(k=0),
        lambda: ExposureGoal(delta=-0.1),
        lambda: ExposureGoal(delta=math.nan),
        lambda: ExposureGoal(ties="none"),
        lambda: SoftExposureGoal(k=0),
        lambda: SoftExposureGoal(temperature=0),
        lambda: SoftExposureGoal(delta=-1),
        lambda: PropensityGoal(delta=-1),
    ],
    ids=["k", "delta", "nan", "ties", "soft-k", "temperature", "soft-delta", "propensity-delta"],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_no_delta_is_allowed():
    assert ExposureGoal(delta=None).delta is None


def test_a_goal_function_gives_one_value_a_title_and_asks_once():
    calls = []

    def score(titles):
        calls.append(list(titles))
        return torch.tensor([[len(title) / 10 for title in titles]] * 2)

    goal = goal_function(ExposureGoal(), score, torch.tensor([0.25, 0.45]))
    assert goal(["ab", "abc", "abcde"]).tolist() == [0, 0.5, 1]
    assert goal([]).shape == (0,)
    assert calls == [["ab", "abc", "abcde"]]


def test_a_score_that_is_no_number_is_refused_with_its_title():
    goal = goal_function(PropensityGoal(), lambda titles: torch.tensor([[0.5, math.nan], [0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"'Super Mario' .* 1 of 2 users"):
        goal(["Zelda", "Super Mario"])


def test_a_goal_function_needs_thresholds_and_a_column_a_title():
    with pytest.raises(ValueError, match="thresholds"):
        goal_function(ExposureGoal(), lambda titles: torch.zeros(2, 1))
    with pytest.raises(ValueError, match="none of the 2 users"):
        goal_function(SoftExposureGoal(), lambda titles: torch.zeros(2, 1), torch.full((2,), torch.nan))
    goal = goal_function(PropensityGoal(), lambda titles: torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"\(users, 2\)"):
        goal(["a", "b"])
