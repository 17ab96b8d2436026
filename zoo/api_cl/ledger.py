"""What was asked of which API, and the budget that no query may exceed."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any

PURPOSES = ("gen_base", "gen_dirs", "student", "real", "probe")
EVENTS = (
    "requests",
    "retries",
    "cache_hits",
    "rows_unanswered",
    "bytes_sent",
    "bytes_received",
    "seconds_waiting",
)
ON_EXHAUSTED = ("stop_task", "raise")


class QueryBudgetExceeded(RuntimeError):  # noqa: N818 - the name says what happened, as users of the ledger read it
    """A reservation would exceed the budget; nothing was sent.

    Attributes:
        api: Name of the API.
        asked: Rows of the refused reservation.
        budget: Rows of the limit that it would exceed.
        spent: Rows already spent under that limit, with those in flight.
        limit: "per_api" or "total", the limit's argument in `QueryLedger`.
    """

    def __init__(self, api: str, asked: int, budget: int, spent: int, limit: str) -> None:
        super().__init__(api, asked, budget, spent, limit)
        self.api, self.asked, self.budget, self.spent, self.limit = api, asked, budget, spent, limit

    def __str__(self) -> str:
        """The message."""
        return (
            f"API {self.api!r} was to be asked {self.asked} rows, but {self.spent} of the budget of {self.budget} rows "
            f"({self.limit} of the QueryLedger) are spent or in flight; nothing was sent. Raise {self.limit}, or ask "
            "for fewer rows"
        )


class Reservation:
    """Rows set aside for one query, until each is committed, spent or refunded.

    As a context manager it refunds what is undecided when an exception ends the block. A block that ends without one
    must have decided about every row.
    """

    def __init__(self, ledger: QueryLedger, api: str, purpose: str, rows: int) -> None:
        self._ledger = ledger
        self.api, self.purpose, self.open_rows = api, purpose, rows

    def commit(self, rows: int | None = None) -> None:
        """Count rows as answered.

        Args:
            rows: All undecided ones if None.

        Raises:
            ValueError: If fewer are undecided.
        """
        self._ledger._settle(self, rows, spent=True)

    def spend(self, rows: int | None = None) -> None:
        """Count rows as spent without an answer: they were sent and the service may have charged for them.

        Args:
            rows: All undecided ones if None.

        Raises:
            ValueError: If fewer are undecided.
        """
        self._ledger._settle(self, rows, spent=True, answered=False)

    def refund(self, rows: int | None = None) -> None:
        """Give rows back to the budget: they were refused or never sent.

        Args:
            rows: All undecided ones if None.

        Raises:
            ValueError: If fewer are undecided.
        """
        self._ledger._settle(self, rows, spent=False)

    def __enter__(self) -> Reservation:
        """The reservation itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Refund what is undecided.

        Raises:
            RuntimeError: If no exception ended the block and rows are undecided.
        """
        undecided = self.open_rows
        self.refund()
        if kind is None and undecided:
            raise RuntimeError(
                f"{undecided} rows reserved for API {self.api!r} were neither committed, spent nor refunded"
            )


class QueryLedger:
    """Rows asked of each API, by purpose, and a budget for them.

    Rows are reserved before they are sent, so that requests in flight at the same time cannot overshoot the budget.
    All methods may be called from several threads.

    Args:
        total: Most rows over all APIs; None for no limit.
        per_api: Most rows of each API; None for no limit.
        on_exhausted: What the training does when a budget ends within a task: "stop_task" goes on with the next one,
            "raise" lets the error through. The ledger itself always raises.

    Raises:
        ValueError: If a budget is below 1 or `on_exhausted` is unknown.
    """

    def __init__(self, total: int | None = None, per_api: int | None = None, on_exhausted: str = "stop_task") -> None:
        for flag, budget in (("total", total), ("per_api", per_api)):
            if budget is not None and budget < 1:
                raise ValueError(f"{flag} must be at least 1 row, or None for no limit, got {budget}")
        if on_exhausted not in ON_EXHAUSTED:
            raise ValueError(f"on_exhausted must be one of {', '.join(ON_EXHAUSTED)}, got {on_exhausted!r}")
        self.total, self.per_api, self.on_exhausted = total, per_api, on_exhausted
        self._rows: dict[str, dict[str, int]] = {}
        self._events: dict[str, dict[str, float]] = {}
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    def reserve(self, api: str, purpose: str, rows: int) -> Reservation:
        """Set rows aside before they are sent.

        Args:
            api: Name of the API.
            purpose: One of `PURPOSES`.
            rows: Number of images.

        Raises:
            QueryBudgetExceeded: If fewer rows are left. Nothing is set aside then.
            ValueError: If the purpose is unknown or `rows` below 1.
        """
        check_purpose(purpose)
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        with self._lock:
            for limit, budget, taken in self._limits(api):
                if taken + rows > budget:
                    raise QueryBudgetExceeded(api, rows, budget, taken, limit)
            self._held[api] = self._held.get(api, 0) + rows
        return Reservation(self, api, purpose, rows)

    def remaining(self, api: str) -> int | None:
        """Rows that may still be reserved for an API; None where there is no limit."""
        with self._lock:
            return min((max(0, budget - taken) for _, budget, taken in self._limits(api)), default=None)

    def spent(self, api: str | None = None) -> int:
        """Rows spent, answered or not; over all APIs if None. Rows in flight do not count yet."""
        with self._lock:
            return self._spent(api)

    def reassign(self, api: str, source: str, target: str, rows: int) -> None:
        """Count rows that were spent for one purpose under another: what was asked together may serve two.

        Args:
            api: Name of the API.
            source: Purpose under which they were spent.
            target: The other one.
            rows: How many.

        Raises:
            ValueError: If a purpose is unknown, or fewer rows were spent for `source`.
        """
        check_purpose(source)
        check_purpose(target)
        with self._lock:
            counts = self._rows.get(api, {})
            if not 0 <= rows <= counts.get(source, 0):
                raise ValueError(f"{rows} rows cannot move from {source!r}: {counts.get(source, 0)} were spent on it")
            counts[source] -= rows
            counts[target] = counts.get(target, 0) + rows

    def add(self, api: str, event: str, amount: float) -> None:
        """Count what is not a row.

        Args:
            api: Name of the API.
            event: One of `EVENTS`.
            amount: How much: a count, bytes, or seconds.

        Raises:
            ValueError: If the event is unknown.
        """
        if event not in EVENTS:
            raise ValueError(f"event must be one of {', '.join(EVENTS)}, got {event!r}")
        with self._lock:
            self._add(api, event, amount)

    def summary(self) -> list[dict[str, int | float | str]]:
        """One row an API, in the order of their first use.

        Returns:
            Dictionaries of "api", "rows" (spent in all), one entry per purpose (rows spent) and one per event.
        """
        with self._lock:
            return [
                {
                    "api": api,
                    "rows": self._spent(api),
                    **{purpose: self._rows.get(api, {}).get(purpose, 0) for purpose in PURPOSES},
                    **{event: self._events.get(api, {}).get(event, 0) for event in EVENTS},
                }
                for api in dict.fromkeys([*self._rows, *self._events])
            ]

    def state_dict(self) -> dict[str, Any]:
        """What was spent and counted, as plain values. The budgets and rows in flight are no part of it."""
        with self._lock:
            return {
                "rows": {api: dict(counts) for api, counts in self._rows.items()},
                "events": {api: dict(counts) for api, counts in self._events.items()},
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another ledger had spent and counted. The own budgets stay.

        Args:
            state: Of `state_dict`.

        Raises:
            ValueError: If a part is missing or a purpose or event unknown.
        """
        loaded: list[dict[str, dict[str, Any]]] = []
        for part, names in (("rows", PURPOSES), ("events", EVENTS)):
            if part not in state:
                raise ValueError(f"the state of a QueryLedger must have 'rows' and 'events', got {sorted(state)}")
            counts = {str(api): dict(own) for api, own in state[part].items()}
            strangers = sorted({name for own in counts.values() for name in own} - set(names))
            if strangers:
                raise ValueError(f"the state of a QueryLedger has unknown {part} {strangers}, expected {list(names)}")
            loaded.append(counts)
        with self._lock:
            self._rows, self._events = loaded

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, which cannot be copied or sent to another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _limits(self, api: str) -> list[tuple[str, int, int]]:
        """Name, budget and rows taken (spent or in flight) of each limit; the caller holds the lock."""
        limits = []
        if self.per_api is not None:
            limits.append(("per_api", self.per_api, self._spent(api) + self._held.get(api, 0)))
        if self.total is not None:
            limits.append(("total", self.total, self._spent(None) + sum(self._held.values())))
        return limits

    def _spent(self, api: str | None) -> int:
        if api is not None:
            return sum(self._rows.get(api, {}).values())
        return sum(sum(counts.values()) for counts in self._rows.values())

    def _add(self, api: str, event: str, amount: float) -> None:
        counts = self._events.setdefault(api, {})
        counts[event] = counts.get(event, 0) + amount

    def _settle(self, reservation: Reservation, rows: int | None, *, spent: bool, answered: bool = True) -> None:
        api, purpose = reservation.api, reservation.purpose
        with self._lock:
            rows = reservation.open_rows if rows is None else rows
            if not 0 <= rows <= reservation.open_rows:
                raise ValueError(
                    f"{rows} rows cannot be decided on: {reservation.open_rows} of the reservation for API {api!r} are "
                    "undecided"
                )
            reservation.open_rows -= rows
            self._held[api] -= rows
            if spent and rows:
                counts = self._rows.setdefault(api, {})
                counts[purpose] = counts.get(purpose, 0) + rows
                if not answered:
                    self._add(api, "rows_unanswered", rows)


def check_purpose(purpose: str) -> None:
    """Refuse an unknown purpose.

    Args:
        purpose: What a query is for.

    Raises:
        ValueError: If it is none of `PURPOSES`.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}")
