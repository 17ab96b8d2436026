"""A stream with a service in another process: same weights as with the network at hand, whatever the line does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.zoo.api_cl.failing_server import quick_services  # noqa: F401
from tests.zoo.api_cl.service_process import serve_counted, unreliable
from tests.zoo.api_cl.small_stream import (
    ITERATIONS,
    QUIET,
    SHAPE,
    TASKS,
    AtStep,
    apis,
    different,
    fit,
    network,
    stream,
    weights,
)
from zoo.api_cl import HTTPAPI, APIResponseError, ModuleAPI

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.zoo.api_cl.failing_server import Failure

pytestmark = [*QUIET, pytest.mark.usefixtures("quick_services")]
ROWS = 2 * 2 * 6 + 2 * 12
SERVED = 1
"""The task whose service is remote."""


@contextmanager
def another_process(port: int = 0, always: Callable[[int], Failure | None] | None = None) -> Iterator[Any]:
    """A service in a process of its own: its URL and the process."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Not forked: nothing of what other tests left behind is in a fresh process.
        arguments = (listener, network(SERVED), TASKS[SERVED], SHAPE, always)
        process = multiprocessing.get_context("spawn").Process(target=serve_counted, args=arguments, daemon=True)
        process.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        httpx.get(f"{url}/rows", timeout=30)
        yield url, process
    finally:
        process.kill()
        process.join(10)


def rows_and_posts(url: str) -> list[int]:
    return [int(number) for number in httpx.get(f"{url}/rows").text.split()]


def boxes(url: str | None, **options: Any) -> list[Any]:
    """The services of a stream, of which one is behind HTTP if there is a URL; all answer in pieces of 10."""
    found: list[Any] = apis(max_batch=10)
    if url is not None:
        found[SERVED] = HTTPAPI(
            url, "oip_binary", TASKS[SERVED], name=f"service{SERVED}", input_shape=SHAPE, max_batch=10, **options
        )
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stream with all networks at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.api_cl.APIStreamCL.on_fit_end", lambda self: None)
        model = stream(boxes(None))
        assert isinstance(model, torch.nn.Module)
        fit(tmp_path_factory.mktemp("local"), model)
    return model


def test_a_remote_service_teaches_what_the_same_network_at_hand_does(tmp_path, local):
    assert isinstance(local._apis[SERVED], ModuleAPI)
    with another_process(always=unreliable) as (url, _):
        remote = stream(boxes(url, rate_rows_per_s=2000, rate_requests_per_s=500))
        start = time.monotonic()
        fit(tmp_path, remote)
        assert time.monotonic() - start < 30
        rows, posts = rows_and_posts(url)
    assert not different(weights(local), weights(remote))
    assert not different(local.memory.export(), remote.memory.export())
    own = next(row for row in remote.ledger.summary() if row["api"] == f"service{SERVED}")
    # The probe of its precision is the one thing that a service at hand is not asked for.
    assert own["rows"] == rows == ITERATIONS * ROWS + own["probe"] and own["probe"] == 32
    assert own["retries"] == sum(unreliable(number).status == 503 for number in range(posts)) > 0
    assert own["requests"] == posts and own["bytes_sent"] > rows * 64 * 4
    for name in ("gen_base", "gen_dirs", "student"):
        assert own[name] == next(row for row in local.ledger.summary() if row["api"] == f"service{SERVED}")[name]


def test_a_stream_goes_on_after_its_service_died_and_came_back(tmp_path, local):
    saves = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with another_process() as (url, process):

        def kill(model: Any, batch: Any) -> None:
            if batch.task == SERVED and batch.step == 3:
                os.kill(process.pid, signal.SIGKILL)
                process.join(10)

        interrupted = stream(boxes(url, max_tries=2))
        options = {"callbacks": [AtStep(before=kill), saves], "enable_checkpointing": True}
        with pytest.raises(APIResponseError, match=rf"no answer from {url}.* after 2 tries \(last: connection refused"):
            fit(tmp_path, interrupted, **options)
    path: Path = tmp_path / "steps" / f"step={ITERATIONS + 2}.ckpt"
    assert path.exists() and not (tmp_path / "steps" / f"step={ITERATIONS + 4}.ckpt").exists()
    port = int(url.rsplit(":", 1)[1])
    with another_process(port) as (again, _):
        assert again == url
        resumed = stream(boxes(url))
        fit(tmp_path, resumed, ckpt_path=path)
        rows, _ = rows_and_posts(url)
    assert not different(weights(local), weights(resumed))
    # Two of the task's iterations were left, and its precision was known.
    assert rows == 2 * ROWS
    assert resumed.ledger.spent(f"service{SERVED}") == ITERATIONS * ROWS + 32
