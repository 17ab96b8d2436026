"""When a request may be sent: limits of rows and requests per second, pauses that a service asks for, backoff."""

from __future__ import annotations

import math
import threading
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

MAX_BACKOFF = 30.0


class TokenBucket:
    """A rate that threads share: each takes tokens and is told how long to wait before it uses them.

    The bucket may be overdrawn by one request, which the next ones then wait for. So a request larger than what comes
    in a second passes, and in any T seconds at most `rate` T tokens and those of one request are used.

    Args:
        rate: Tokens that come in a second.
        clock: The time in seconds, never going back.

    Raises:
        ValueError: If the rate is not a positive number.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"a rate per second must be a positive number, or None for no limit; got {rate}")
        self.rate = float(rate)
        self._clock, self._lock = clock, threading.Lock()
        self._paid_at = -math.inf

    def take(self, amount: float) -> float:
        """Take tokens; the seconds to wait before they may be used."""
        with self._lock:
            now = self._clock()
            start = max(now, self._paid_at)
            self._paid_at = start + amount / self.rate
            return start - now


class Pacer:
    """Delays requests of all threads so that a service's limits hold.

    Args:
        rows_per_s: Rows that may be sent in a second; None for any number.
        requests_per_s: Requests likewise.
        clock: The time in seconds, never going back.
    """

    def __init__(
        self,
        rows_per_s: float | None = None,
        requests_per_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._limits = (rows_per_s, requests_per_s)
        self._closed_until = -math.inf
        self.share(1)

    def share(self, processes: int) -> None:
        """Take the part of the limits that is left to each of so many processes."""
        if processes < 1:
            raise ValueError(f"the limits can be shared by 1 process or more, got {processes}")
        rows, requests = (None if limit is None else limit / processes for limit in self._limits)
        self._rows = None if rows is None else TokenBucket(rows, self._clock)
        self._requests = None if requests is None else TokenBucket(requests, self._clock)

    def hold(self, seconds: float) -> None:
        """Let no thread send anything for so long, as a service has asked."""
        with self._lock:
            self._closed_until = max(self._closed_until, self._clock() + seconds)

    def wait(self, rows: int, stop: threading.Event) -> float:
        """Wait until a request with so many rows may be sent.

        Args:
            rows: Rows of the request.
            stop: Ends the wait when it is set.

        Returns:
            The seconds waited; 0 where there was nothing to wait for.
        """
        start = self._clock()
        delays = [bucket.take(n) for bucket, n in ((self._rows, rows), (self._requests, 1)) if bucket is not None]
        until = start + max(delays, default=0.0)
        # A pause may be asked for, or made longer, while this thread waits.
        waited = False
        while (left := max(until, self._closed_until) - self._clock()) > 0 and not stop.is_set():
            waited = True
            stop.wait(left)
        return self._clock() - start if waited else 0.0


def backoff(attempt: int, draw: random.Random) -> float:
    """Seconds before the next try: min(30, 0.5 * 2^n) * U(0, 1).

    Args:
        attempt: n, tries that failed before the last one.
        draw: Source of chance that is not the training's, or a busy service would change what is trained.
    """
    return min(MAX_BACKOFF, 0.5 * 2.0**attempt) * draw.random()


def retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a `Retry-After` header asks for, or None where it is missing or cannot be read.

    Args:
        header: A number of seconds, or a date of HTTP.
        now: The time; the machine's clock by default.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        seconds = (date - (now or datetime.now(timezone.utc))).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
