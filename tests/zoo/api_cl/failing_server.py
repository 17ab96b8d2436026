"""Services on this machine that fail as real ones do, with a counter of rows of their own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pytest
import torch
from torch import Tensor, nn

from zoo.api_cl.boxes import ModuleAPI
from zoo.api_cl.http_box import HTTPAPI
from zoo.api_cl.ledger import QueryLedger
from zoo.api_cl.server import classifier_app, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


CLASSES = (3, 7, 5)
SHAPE = (1, 4, 4)


class Failure(NamedTuple):
    """What becomes of one post in place of an answer, or before it."""

    status: int | None = None
    """Answer this; None for the app's own answer."""
    headers: Mapping[str, str] = {}
    body: bytes = b'{"error": "injected"}'
    delay: float = 0.0
    """Seconds before the answer, during which the app has worked already."""
    drop: bool = False
    """Close the connection without an answer."""


class FailingApp:
    """Counts the rows of posts that reach the app; each post takes the next failure of the plan.

    Args:
        app: An ASGI app.
        plan: What happens to the first posts; None for no failure.
        always: What happens to those after them, by number.
    """

    def __init__(
        self,
        app: Any,
        plan: Sequence[Failure | None] = (),
        always: Callable[[int], Failure | None] = lambda number: None,
    ) -> None:
        self.app, self.plan, self.always = app, list(plan), always
        self.rows = self.posts = self.in_flight = self.most_in_flight = 0
        self.times: list[float] = []
        self.tokens: list[str] = []
        self._lock = threading.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode().lower(): value.decode() for name, value in scope["headers"]}
        with self._lock:
            number = self.posts
            self.posts += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.times.append(time.monotonic())
            self.tokens.append(headers.get("authorization", ""))
        try:
            await self._answer(number, scope, body, headers, send)
        finally:
            with self._lock:
                self.in_flight -= 1

    async def _answer(self, number: int, scope: Any, body: bytes, headers: dict[str, str], send: Any) -> None:
        failure = self.plan[number] if number < len(self.plan) else self.always(number)
        failure = failure or Failure()
        if failure.status is not None:
            await asyncio.sleep(failure.delay)
            names = [(name.lower().encode(), value.encode()) for name, value in failure.headers.items()]
            await send({"type": "http.response.start", "status": failure.status, "headers": names})
            await send({"type": "http.response.body", "body": failure.body})
            return
        length = headers.get("inference-header-content-length")
        message = json.loads(body if length is None else body[: int(length)])
        with self._lock:
            self.rows += len(message["instances"]) if "instances" in message else message["inputs"][0]["shape"][0]
        if failure.drop:
            # uvicorn closes a connection whose answer ends before the length that it was to have.
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
            return
        held = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return held.pop() if held else {"type": "http.disconnect"}

        await asyncio.sleep(failure.delay)
        await self.app(scope, again, send)


_CONTEXT = httpx.create_ssl_context()


@pytest.fixture
def quick_services(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, hardly any backoff, and certificates read once."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("zoo.api_cl.http_client.backoff", lambda attempt, draw: 0.001)
    # Reading the authorities of the machine takes longer than a test, and no test needs them.
    monkeypatch.setattr("httpx._transports.default.create_ssl_context", lambda **_: _CONTEXT)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def images(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(seed)) - 1


def expected(x: Tensor, **options: Any) -> Tensor:
    return ModuleAPI(network(), CLASSES, name="local", **options).query(x, "probe")


@contextmanager
def service(
    *plan: Failure | None, protocol: str = "oip_binary", **options: Any
) -> Iterator[tuple[FailingApp, HTTPAPI]]:
    always = options.pop("always", lambda number: None)
    app = FailingApp(classifier_app(network(), CLASSES, SHAPE), plan, always)
    options = {"ledger": QueryLedger(), "max_batch": 4, "input_shape": SHAPE, "name": "remote"} | options
    with serving(app) as url, HTTPAPI(url, protocol, CLASSES, **options) as api:
        yield app, api


def events(api: HTTPAPI) -> dict[str, Any]:
    assert api.ledger is not None
    return api.ledger.summary()[0]
