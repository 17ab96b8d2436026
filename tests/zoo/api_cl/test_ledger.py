"""No query exceeds its budget, and every row is counted once."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from zoo.api_cl.ledger import EVENTS, PURPOSES, QueryBudgetExceeded, QueryLedger


def spend(ledger, api, purpose, rows):
    ledger.reserve(api, purpose, rows).commit()


def test_rows_are_counted_by_api_and_purpose():
    ledger = QueryLedger()
    for api, purpose, rows in (("a", "student", 3), ("b", "real", 5), ("a", "student", 4), ("a", "gen_dirs", 2)):
        spend(ledger, api, purpose, rows)
    assert (ledger.spent(), ledger.spent("a"), ledger.spent("b"), ledger.spent("c")) == (14, 9, 5, 0)
    first, second = ledger.summary()
    assert {name: value for name, value in first.items() if value} == {
        "api": "a",
        "rows": 9,
        "gen_dirs": 2,
        "student": 7,
    }
    assert second["api"] == "b" and second["real"] == second["rows"] == 5
    assert list(first) == ["api", "rows", *PURPOSES, *EVENTS]


@pytest.mark.parametrize(("limit", "others"), [("per_api", 10), ("total", 3)])
def test_rows_in_flight_count_against_the_budget_but_are_not_spent(limit, others):
    ledger = QueryLedger(**{limit: 10})
    flight = ledger.reserve("a", "student", 7)
    assert (ledger.spent("a"), ledger.remaining("a"), ledger.remaining("b")) == (0, 3, others)
    with pytest.raises(QueryBudgetExceeded):
        ledger.reserve("a", "student", 4)
    flight.refund()
    assert (ledger.spent("a"), ledger.remaining("a")) == (0, 10)


def test_the_total_is_shared_and_each_api_has_its_own_limit():
    ledger = QueryLedger(total=10, per_api=8)
    spend(ledger, "a", "student", 6)
    assert (ledger.remaining("a"), ledger.remaining("b")) == (2, 4)
    spend(ledger, "b", "student", 4)
    assert ledger.remaining("a") == 0
    assert QueryLedger().remaining("a") is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"per_api": 10}, "API 'a' was to be asked 4 rows, but 7 of the budget of 10 rows .per_api of"),
        ({"total": 10}, "but 7 of the budget of 10 rows .total of .*Raise total"),
    ],
)
def test_a_query_over_budget_is_refused_and_sets_nothing_aside(limits, message):
    ledger = QueryLedger(**limits)
    spend(ledger, "a", "student", 7)
    with pytest.raises(QueryBudgetExceeded, match=message) as caught:
        ledger.reserve("a", "gen_base", 4)
    assert (caught.value.asked, caught.value.spent, caught.value.budget) == (4, 7, 10)
    assert ledger.remaining("a") == 3
    spend(ledger, "a", "student", 3)
    assert ledger.spent() == 10


def test_the_budget_error_survives_a_trip_between_processes():
    error = QueryBudgetExceeded("a", 4, 10, 7, "total")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.budget == 10


def test_a_reservation_may_be_decided_in_parts():
    ledger = QueryLedger(per_api=10)
    with ledger.reserve("a", "student", 10) as reservation:
        reservation.commit(4)
        reservation.spend(3)
        reservation.refund(2)
        assert reservation.open_rows == 1
        with pytest.raises(ValueError, match="2 rows cannot be decided on: 1 of the reservation for API 'a'"):
            reservation.commit(2)
        with pytest.raises(ValueError, match="-1 rows"):
            reservation.refund(-1)
        reservation.commit()
    assert (ledger.spent("a"), ledger.remaining("a")) == (8, 2)
    assert ledger.summary()[0]["rows_unanswered"] == 3


def test_an_exception_refunds_what_is_undecided_only():
    ledger = QueryLedger(per_api=10)

    def failing():
        with ledger.reserve("a", "student", 10) as reservation:
            reservation.commit(4)
            reservation.spend(1)
            raise OSError("no answer")

    with pytest.raises(OSError, match="no answer"):
        failing()
    assert (ledger.spent("a"), ledger.remaining("a")) == (5, 5)


def test_a_block_that_forgets_rows_is_an_error():
    ledger = QueryLedger(per_api=10)
    with (
        pytest.raises(RuntimeError, match="6 rows reserved for API 'a' were neither"),
        ledger.reserve("a", "student", 10) as reservation,
    ):
        reservation.commit(4)
    assert ledger.remaining("a") == 6


def test_eight_threads_never_overshoot_the_budget():
    ledger = QueryLedger(total=1000, per_api=600)
    answered, refused = [], []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for rows, fate in zip(*torch.randint(1, 10, (2, 200), generator=generator).tolist(), strict=True):
            api = "ab"[fate % 2]
            try:
                with ledger.reserve(api, "student", rows) as reservation:
                    if fate < 3:
                        reservation.refund()
                    else:
                        answered.append((api, rows))
                        reservation.commit()
            except QueryBudgetExceeded as error:
                refused.append(error)
            ledger.add(api, "requests", 1)

    # Threads take turns as often as Python can, so that a missing lock shows.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert refused and all(error.spent + error.asked > error.budget for error in refused)
    sums = {api: sum(rows for own, rows in answered if own == api) for api in "ab"}
    assert {api: ledger.spent(api) for api in "ab"} == sums
    assert max(sums.values()) <= 600 and 980 < sum(sums.values()) <= 1000
    assert sum(row["requests"] for row in ledger.summary()) == 1600
    assert ledger.remaining("a") == min(600 - sums["a"], 1000 - sum(sums.values()))


def test_two_threads_cannot_both_take_the_last_rows():
    class Slow(QueryLedger):
        def _limits(self, api):
            limits = super()._limits(api)
            time.sleep(0.02)
            return limits

    ledger = Slow(per_api=10)

    def reserve(rows):
        try:
            return ledger.reserve("a", "student", rows).open_rows
        except QueryBudgetExceeded:
            return 0

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(reserve, [6] * 4)) == 6


def test_events_add_up_also_for_an_api_without_a_row():
    ledger = QueryLedger()
    for amount in (0.25, 0.5):
        ledger.add("a", "seconds_waiting", amount)
    ledger.add("a", "cache_hits", 3)
    (row,) = ledger.summary()
    assert (row["api"], row["rows"], row["seconds_waiting"], row["cache_hits"]) == ("a", 0, 0.75, 3)


def test_a_restored_ledger_goes_on_where_the_other_stood():
    ledger = QueryLedger(per_api=10)
    spend(ledger, "a", "student", 7)
    ledger.add("a", "seconds_waiting", 0.5)
    file = io.BytesIO()
    torch.save(ledger.state_dict(), file)
    file.seek(0)
    again = QueryLedger(per_api=10)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.summary() == ledger.summary()
    spend(again, "a", "student", 3)
    assert (again.remaining("a"), ledger.remaining("a")) == (0, 3)


def test_a_budget_lowered_below_what_is_spent_leaves_nothing():
    ledger = QueryLedger()
    spend(ledger, "a", "student", 7)
    lower = QueryLedger(per_api=5)
    lower.load_state_dict(ledger.state_dict())
    assert lower.remaining("a") == 0
    with pytest.raises(QueryBudgetExceeded):
        lower.reserve("a", "student", 1)


def test_a_state_is_a_copy():
    ledger = QueryLedger()
    spend(ledger, "a", "student", 7)
    state = ledger.state_dict()
    spend(ledger, "a", "student", 1)
    assert state["rows"] == {"a": {"student": 7}}
    again = QueryLedger()
    again.load_state_dict(state)
    spend(again, "a", "student", 1)
    assert state["rows"] == {"a": {"student": 7}}


def test_a_copied_ledger_counts_for_itself():
    ledger = QueryLedger(per_api=10)
    spend(ledger, "a", "student", 7)
    other = copy.deepcopy(ledger)
    spend(other, "a", "student", 1)
    assert (ledger.spent(), other.spent()) == (7, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QueryLedger(total=0), "total must be at least 1 row, or None for no limit, got 0"),
        (lambda: QueryLedger(per_api=-5), "per_api must be at least 1 row"),
        (lambda: QueryLedger(on_exhausted="stop"), "on_exhausted must be one of stop_task, raise, got 'stop'"),
        (lambda: QueryLedger().reserve("a", "training", 1), "purpose must be one of gen_base, .* got 'training'"),
        (lambda: QueryLedger().reserve("a", "student", 0), "rows must be at least 1, got 0"),
        (lambda: QueryLedger().add("a", "tries", 1), "event must be one of requests, .* got 'tries'"),
        (lambda: QueryLedger().load_state_dict({"rows": {}}), r"must have 'rows' and 'events', got \['rows'\]"),
        (
            lambda: QueryLedger().load_state_dict({"rows": {"a": {"x": 1}}, "events": {}}),
            r"has unknown rows \['x'\], expected",
        ),
    ],
)
def test_what_a_ledger_cannot_count_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_asked_together_may_be_counted_under_two_purposes():
    ledger = QueryLedger(per_api=30)
    spend(ledger, "a", "gen_dirs", 12)
    spend(ledger, "a", "student", 3)
    spend(ledger, "b", "gen_dirs", 5)
    ledger.reassign("a", "gen_dirs", "gen_base", 4)
    ledger.reassign("a", "gen_dirs", "student", 0)
    first, second = ledger.summary()
    assert {name: first[name] for name in PURPOSES} == {
        "gen_base": 4, "gen_dirs": 8, "student": 3, "real": 0, "probe": 0,
    }  # fmt: skip
    assert (second["gen_dirs"], second["gen_base"]) == (5, 0)
    assert (ledger.spent("a"), ledger.spent(), ledger.remaining("a")) == (15, 20, 15)
    ledger.reassign("a", "gen_dirs", "gen_base", 8)
    assert ledger.summary()[0]["gen_dirs"] == 0 and ledger.spent("a") == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "gen_dirs", "gen_base", 13), "13 rows cannot move from 'gen_dirs': 12 were spent on it"),
        (("a", "gen_dirs", "gen_base", -1), "-1 rows cannot move"),
        (("b", "gen_dirs", "gen_base", 1), "1 rows cannot move from 'gen_dirs': 0 were"),
        (("a", "gen_dir", "gen_base", 1), "purpose must be one of .* got 'gen_dir'"),
        (("a", "gen_dirs", "base", 1), "purpose must be one of .* got 'base'"),
    ],
)
def test_rows_that_were_not_spent_cannot_be_reassigned(arguments, message):
    ledger = QueryLedger()
    spend(ledger, "a", "gen_dirs", 12)
    before = ledger.summary()
    with pytest.raises(ValueError, match=message):
        ledger.reassign(*arguments)
    assert ledger.summary() == before
