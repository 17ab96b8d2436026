"""Limits hold whatever the threads do, and waiting times are those that services ask for."""

from __future__ import annotations

import math
import random
import threading
import time
from datetime import datetime, timezone

import pytest

from zoo.api_cl.rate_limit import Pacer, TokenBucket, backoff, retry_after


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_request_waits_until_those_before_it_are_paid() -> None:
    clock = Clock()
    bucket = TokenBucket(10, clock)
    assert [bucket.take(n) for n in (5, 5, 20, 1)] == pytest.approx([0, 0.5, 1.0, 3.0])
    clock.now += 3.05
    assert bucket.take(1) == pytest.approx(0.05)


def test_silence_saves_nothing_up() -> None:
    clock = Clock()
    bucket = TokenBucket(10, clock)
    clock.now += 1000
    assert [bucket.take(5) for _ in range(3)] == pytest.approx([0, 0.5, 1.0])


def test_threads_together_stay_below_the_rate() -> None:
    pacer, sent, lock = Pacer(rows_per_s=200), [], threading.Lock()

    def work() -> None:
        for _ in range(3):
            pacer.wait(4, threading.Event())
            with lock:
                sent.append(time.monotonic())

    start = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # 12 requests of 4 rows: the last one starts when 11 are paid.
    assert max(sent) - start >= 11 * 4 / 200 - 0.01
    assert len(sent) == 12


def test_the_stricter_limit_counts() -> None:
    clock, stop = Clock(), threading.Event()
    stop.set()
    pacer = Pacer(rows_per_s=100, requests_per_s=2, clock=clock)
    pacer.wait(1, stop)
    assert pacer._requests is not None and pacer._requests.take(1) == pytest.approx(0.5)
    assert pacer._rows is not None and pacer._rows.take(1) == pytest.approx(0.01)


def test_processes_share_the_limits() -> None:
    clock = Clock()
    pacer = Pacer(100, 8, clock)
    pacer.share(4)
    assert pacer._rows is not None and pacer._rows.rate == 25
    assert pacer._requests is not None and pacer._requests.rate == 2
    pacer.share(2)
    assert pacer._rows.rate == 50
    with pytest.raises(ValueError, match="1 process or more, got 0"):
        pacer.share(0)


def test_a_pause_holds_all_threads_and_can_grow_meanwhile() -> None:
    pacer, stop = Pacer(), threading.Event()
    assert pacer.wait(1, stop) == 0
    pacer.hold(0.1)
    timer = threading.Timer(0.03, pacer.hold, [0.2])
    timer.start()
    start = time.monotonic()
    waited = pacer.wait(1, stop)
    # A busy machine makes it longer only.
    assert time.monotonic() - start >= waited - 0.01
    assert waited >= 0.22
    timer.join()


def test_a_wait_that_is_called_off_ends_at_once() -> None:
    pacer, stop = Pacer(), threading.Event()
    pacer.hold(60)
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    assert pacer.wait(1, stop) < 5
    timer.join()


@pytest.mark.parametrize(("attempt", "most"), [(0, 0.5), (1, 1.0), (3, 4.0), (6, 30.0), (1000, 30.0)])
def test_backoff_doubles_up_to_half_a_minute(attempt: int, most: float) -> None:
    draws = [backoff(attempt, random.Random(seed)) for seed in range(300)]
    assert 0 <= min(draws) < 0.05 * most
    assert 0.95 * most < max(draws) <= most


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("2", 2), ("0.5", 0.5), ("-3", 0), ("soon", None), ("nan", None), ("inf", None),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30), ("Wed, 21 Oct 2015 07:27:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after_is_read_as_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, datetime(2015, 10, 21, 7, 28, tzinfo=timezone.utc)) == seconds


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="must be a positive number, or None"):
        Pacer(rows_per_s=rate)
