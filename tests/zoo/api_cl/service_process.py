"""What a service in a process of its own runs: it imports little, and tells how many rows reached it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import uvicorn

from tests.zoo.api_cl.failing_server import FailingApp, Failure
from zoo.api_cl.server import classifier_app

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from torch import nn


class Told(FailingApp):
    """Tells how many rows and posts reached the app."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/rows":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": f"{self.rows} {self.posts}".encode()})
            return
        await super().__call__(scope, receive, send)


def unreliable(number: int) -> Failure | None:
    """One post in twenty is refused, the others wait a little."""
    draw = random.Random(number)
    if draw.random() < 0.05:
        return Failure(503)
    return Failure(delay=0.01 * draw.random())


def steady(number: int) -> Failure | None:
    """No post fails."""
    return None


def serve_counted(
    listener: socket.socket,
    network: nn.Module,
    classes: Sequence[int],
    shape: Sequence[int],
    always: Callable[[int], Failure | None] | None,
) -> None:
    """Serve a network on a socket until the process ends; errors of the app go to stderr."""
    app = Told(classifier_app(network, classes, shape), always=always or steady)
    config = uvicorn.Config(app, lifespan="off", log_level="error", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
