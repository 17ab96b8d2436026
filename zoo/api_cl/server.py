"""A classifier as a web service, in the protocols that `HTTPAPI` speaks: an example, and a double for tests.

It has no authentication and no encryption: other machines should reach it through a proxy that has.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from zoo.api_cl.black_box import APIResponseError, BlackBoxAPI
from zoo.api_cl.boxes import ModuleAPI
from zoo.api_cl.protocols import MalformedAnswer, read_json, read_tensors, write_tensors

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException as AnyHTTPException
except ImportError as _error:
    raise ImportError("to serve needs fastapi and uvicorn: pip install 'lightning-method-zoo[serve]'") from _error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from starlette.types import ASGIApp

    from zoo.api_cl.protocols import Array

INPUT, OUTPUT = "images", "probs"
# A number in JSON with its separator; float32 values written in full take up to 25.
_BYTES_PER_NUMBER = 32
_KEEPALIVE = 30


def classifier_app(
    classifier: nn.Module | BlackBoxAPI,
    classes: Sequence[int] | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    name: str = "model",
    decimals: int | None = None,
    max_rows: int = 4096,
) -> FastAPI:
    """A FastAPI app that answers images in [-1, 1] with probabilities.

    It speaks the Open Inference Protocol (`/v2/models/NAME/infer`), with and without its binary extension, and
    TensorFlow Serving's REST protocol (`/v1/models/NAME:predict`).

    Args:
        classifier: A network from images `(N, c, h, w)` to logits, which is set to eval mode and frozen; or any
            `BlackBoxAPI`.
        classes: Global labels of the network's columns.
        input_shape: `(c, h, w)` of an image; that of the `BlackBoxAPI` if None.
        name: Name of the model.
        decimals: Round the probabilities of a network to so many decimals.
        max_rows: Most images of a request.

    Raises:
        ValueError: If classes or shape are missing, or decimals are asked of a `BlackBoxAPI`, which has its own.
    """
    if isinstance(classifier, BlackBoxAPI):
        if classes is not None and tuple(classes) != classifier.classes:
            raise ValueError(f"classes {list(classes)} are not those of {classifier!r}")
        if decimals is not None:
            raise ValueError(f"decimals={decimals} does nothing with {classifier!r}, which has its own")
        api, shape = classifier, input_shape or classifier.input_shape
    else:
        if not classes:
            raise ValueError("classes must name the global label of each of the network's columns")
        shape = input_shape
        api = ModuleAPI(classifier, classes, name=name, input_shape=shape, decimals=decimals)
    if shape is None:
        raise ValueError("input_shape must be the (channels, height, width) of an image")
    service = _Service(api, tuple(shape), name, max_rows)
    app = FastAPI(title=f"{name}: classes {', '.join(map(str, api.classes))}")

    @app.exception_handler(AnyHTTPException)
    async def explain(_: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    @app.get("/v2/health/live")
    @app.get("/v2/health/ready")
    @app.get("/v2/models/{model}/ready")
    async def ready(model: str = name) -> dict[str, Any]:
        service.check_model(model)
        return {}

    @app.get("/v2/models/{model}")
    async def metadata(model: str) -> dict[str, Any]:
        service.check_model(model)
        return service.metadata()

    @app.get("/v1/models/{model}")
    async def status(model: str) -> dict[str, Any]:
        service.check_model(model)
        return {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK"}}]}

    @app.post("/v2/models/{model}/infer")
    async def infer(model: str, request: Request) -> Response:
        return await service.reply(model, request, service.infer)

    @app.post("/v1/models/{model}:predict")
    async def predict(model: str, request: Request) -> Response:
        return await service.reply(model, request, service.predict)

    return app


@contextmanager
def serving(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve an app in a thread of this process for the length of a `with` block.

    Args:
        app: Such as that of `classifier_app`.
        host: Address to listen on.
        port: Port to listen on; a free one if 0.

    Yields:
        The URL.

    Raises:
        OSError: If the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        # asyncio does so only for sockets that name their protocol; else the end of an answer waits for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The program's own loggers stay as they are.
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, log_level="warning", timeout_keep_alive=_KEEPALIVE, access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            if not server.started:
                raise OSError(f"the server on {host}, port {port}, did not start; its log says why")
            address = f"[{host}]" if family == socket.AF_INET6 else host
            yield f"http://{address}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def serve(app: ASGIApp, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve an app until the process is interrupted."""
    uvicorn.run(app, host=host, port=port, lifespan="off", timeout_keep_alive=_KEEPALIVE)


class _Service:
    def __init__(self, api: BlackBoxAPI, input_shape: tuple[int, ...], name: str, max_rows: int) -> None:
        self.api, self.input_shape, self.name, self.max_rows = api, input_shape, name, max_rows
        self.max_bytes = max_rows * math.prod(input_shape) * _BYTES_PER_NUMBER + 2**16

    def check_model(self, model: str) -> None:
        if model != self.name:
            raise HTTPException(404, f"there is no model {model!r} here, only {self.name!r}")

    def metadata(self) -> dict[str, Any]:
        shape = [-1, *self.input_shape]
        return {
            "name": self.name,
            "platform": "pytorch",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": shape}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(self.api.classes)]}],
        }

    async def reply(
        self, model: str, request: Request, work: Callable[[bytes, Request], tuple[bytes, dict[str, str]]]
    ) -> Response:
        self.check_model(model)
        body = await self._body(request)
        try:
            content, headers = await run_in_threadpool(work, body, request)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except APIResponseError as error:
            raise HTTPException(500, str(error)) from error
        return Response(content, headers=headers)

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.max_bytes:
                raise HTTPException(413, f"a request may have {self.max_rows} images, and {self.max_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    def infer(self, body: bytes, request: Request) -> tuple[bytes, dict[str, str]]:
        arrays, header = read_tensors("inputs", body, request.headers)
        if set(arrays) != {INPUT}:
            raise ValueError(f"expected one input, {INPUT!r}, got {sorted(arrays)}")
        probs = self._probs(arrays[INPUT])
        more = {"model_name": self.name, **({"id": header["id"]} if "id" in header else {})}
        return write_tensors("outputs", {OUTPUT: probs}, _wants_bytes(header), more)

    def predict(self, body: bytes, request: Request) -> tuple[bytes, dict[str, str]]:
        message = read_json(body)
        if not isinstance(message, dict) or not isinstance(message.get("instances"), list):
            raise MalformedAnswer("expected a JSON object with a list of 'instances'")
        try:
            images = np.asarray(message["instances"], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise MalformedAnswer(f"instances are no images of one size: {error}") from error
        response = JSONResponse({"predictions": self._probs(images).tolist()})
        return bytes(response.body), {"Content-Type": "application/json"}

    def _probs(self, images: Array) -> Array:
        if images.dtype != np.float32:
            raise ValueError(f"the images are {images.dtype}; expected FP32")
        if images.ndim != 4 or images.shape[1:] != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            raise ValueError(f"the images have the shape {list(images.shape)}; expected (N, {shape})")
        if not 1 <= len(images) <= self.max_rows:
            raise ValueError(f"a request may have 1 to {self.max_rows} images, got {len(images)}")
        # A copy: what was read from the body cannot be written to, which torch does not like.
        probs: Array = self.api.query(torch.from_numpy(images.copy()), "probe").cpu().numpy()
        if self.api.decimals is None:
            return probs
        # In JSON a float64 such as 0.1 stays short, and float32 has the same value.
        return np.round(probs.astype(np.float64), self.api.decimals)


def _wants_bytes(header: dict[str, Any]) -> bool:
    parameters = header.get("parameters")
    if isinstance(parameters, dict) and parameters.get("binary_data_output") is True:
        return True
    outputs = header.get("outputs")
    entries = [entry for entry in outputs if isinstance(entry, dict)] if isinstance(outputs, list) else []
    wishes = [entry.get("parameters") for entry in entries]
    return any(isinstance(wish, dict) and wish.get("binary_data") is True for wish in wishes)
