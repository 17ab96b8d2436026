from pathlib import Path

import pytest

from zoo.common.study_checks import Check, StudyError, evaluate_check, parse_check, summarise

SUMMARY = summarise(
    [
        {"variant": "a", "metrics": {"hr": 0.3, "nan": None}, "seconds": {}, "peak_rss_bytes": 1},
        {"variant": "b", "metrics": {"hr": 0.2, "nan": 0.1}, "seconds": {}, "peak_rss_bytes": 1},
    ]
)


def test_mean_over_some_of_the_seeds_is_no_mean() -> None:
    records = [{"variant": "a", "metrics": {"hr": value}, "seconds": {}, "peak_rss_bytes": 1} for value in (0.3, None)]
    assert summarise(records)["a"]["hr"] == {"mean": None, "std": None, "values": [0.3, None]}


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (Check("hr", "a", ">=", 1.5, "b"), True),
        (Check("hr", "a", ">", 1.6, "b"), False),
        (Check("hr", "b", "<", 1.0, "a"), True),
        (Check("hr", "a", "<=", 1.0, "b"), False),
        (Check("hr", "a", ">=", 1.0, "0.25"), True),
        (Check("hr", "b", ">=", 1.0, "0.25"), False),
        (Check("nan", "a", "<", 1.0, "b"), False),
        (Check("nan", "b", "<", 1.0, "a"), False),
    ],
)
def test_check_holds_only_where_the_numbers_say_so(check: Check, holds: bool) -> None:
    # Three times 0.1 is more than 0.3 in binary fractions: the first case must not hang on a rounding error.
    summary = {**SUMMARY, "a": {**SUMMARY["a"], "hr": {"mean": 0.31, "values": [0.31]}}}
    assert evaluate_check(check, summary)["holds"] is holds


def test_single_seed_has_no_spread() -> None:
    assert SUMMARY["a"]["hr"] == {"mean": 0.3, "std": None, "values": [0.3]}


def test_check_of_a_metric_that_was_not_measured_names_those_that_were() -> None:
    with pytest.raises(StudyError, match=r"a has no ndcg; it has hr, nan"):
        evaluate_check(Check("ndcg", "a", ">", 1.0, "b"), SUMMARY)


SEEDS = summarise(
    [
        {"variant": variant, "metrics": {"auc": value}, "seconds": {}, "peak_rss_bytes": 1}
        for variant, values in {"new": (0.9, 0.8), "old": (0.8, 0.78)}.items()
        for value in values
    ]
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("new >= old + 0.05", True),
        ("new >= old + 0.05 each seed", False),
        ("new >= old + 0.015 each seed", True),
        ("old >= new - 0.11 each seed", True),
        ("old >= new - 0.09 each seed", False),
        ("new >= 0.75 each seed", True),
        ("new >= 0.85 each seed", False),
        ("new < 1.2 * old - 0.01 each seed", True),
    ],
)
def test_a_check_may_have_an_offset_and_be_asked_of_every_seed(text: str, holds: bool) -> None:
    check = parse_check(Path("study.yaml"), "auc", text, ["new", "old"])
    assert str(check) == f"auc: {text}"
    assert evaluate_check(check, SEEDS)["holds"] is holds
