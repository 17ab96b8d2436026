"""A classifier behind HTTP as a black box: several requests in flight, and every row accounted for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from zoo.api_cl.black_box import APIResponseError, BlackBoxAPI
from zoo.api_cl.http_client import CalledOff, ServiceClient
from zoo.api_cl.ledger import QueryLedger
from zoo.api_cl.protocols import (
    PROTOCOLS,
    Custom,
    MalformedAnswer,
    OpenInference,
    SingleImage,
    TFServing,
    WireFormat,
)
from zoo.api_cl.rate_limit import Pacer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zoo.api_cl.ledger import Reservation
    from zoo.api_cl.protocols import Array, Headers

_OWN_OPTIONS = {
    "oip": {"output_name"},
    "oip_binary": {"output_name"},
    "tfserving": {"output_name"},
    "image": {"label_map"},
    "custom": {"encode", "decode"},
}


class HTTPAPI(BlackBoxAPI):
    """A classifier behind HTTP.

    Query only services whose owner permits distillation.

    A query is cut into requests of `max_batch` images, up to `max_inflight` of them at the same time; responses keep
    the order of the images. Tried again are the statuses 429, 502, 503 and 504, connections that cannot be made or
    break, and answers that do not come in time; `Retry-After` holds back all requests. Any other status is an error.

    All rows of a query are reserved in the ledger before the first is sent. Those of an answer are spent, those of a
    refusal or of a connection that was never made are not. Rows without an answer in time, or on a connection that
    broke after they were sent, are spent, and trying them again needs as many more.

    Args:
        url: Where the service is, such as `http://127.0.0.1:8000`; for "custom", where to post.
        protocol: One of `PROTOCOLS`: "oip_binary" and "oip" are the Open Inference Protocol of KServe, Triton and
            MLServer, with and without its binary extension; "tfserving" TensorFlow Serving's REST protocol; "image"
            one PNG per request (TorchServe); "custom" two functions.
        classes: As in `BlackBoxAPI`, as are those that are not listed here.
        name: As in `BlackBoxAPI`; the model and the host by default.
        model: Name of the model at the service.
        output: As in `BlackBoxAPI`.
        input_shape: As in `BlackBoxAPI`.
        preprocess: As in `BlackBoxAPI`.
        channels_last: Send `(N, h, w, c)`, as most models of TensorFlow take it.
        input_quantization: As in `BlackBoxAPI`; "uint8" with "image".
        decimals: As in `BlackBoxAPI`.
        max_batch: Most images of a request; 1 with "image".
        cache_rows: As in `BlackBoxAPI`.
        ledger: As in `BlackBoxAPI`.
        output_name: The output to read of a model that has several ("oip", "oip_binary", "tfserving").
        label_map: Global label of each of the service's labels ("image").
        encode: Images `(n, c, h, w)` as a NumPy array to a body and headers ("custom").
        decode: The body of an answer and n to an array `(n, C)` ("custom").
        max_inflight: Most requests at the same time.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for an answer.
        max_tries: Most tries of a request.
        rate_rows_per_s: Most rows to send in a second.
        rate_requests_per_s: Most requests to send in a second.
        auth_env: Name of the environment variable that holds the bearer token, which is read for each request and
            kept nowhere.

    Raises:
        ValueError: If an argument is out of its range, or the environment variable is not set.
        ImportError: If httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        protocol: str = "oip_binary",
        classes: Sequence[int] = (),
        *,
        name: str | None = None,
        model: str = "model",
        output: str = "probs",
        input_shape: Sequence[int] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        channels_last: bool = False,
        input_quantization: str | None = None,
        decimals: int | None = None,
        max_batch: int = 256,
        cache_rows: int = 0,
        ledger: QueryLedger | None = None,
        output_name: str | None = None,
        label_map: Mapping[str, int] | None = None,
        encode: Callable[[Array], tuple[bytes, Headers]] | None = None,
        decode: Callable[[bytes, int], Array] | None = None,
        max_inflight: int = 4,
        connect_timeout: float = 3.0,
        read_timeout: float = 30.0,
        max_tries: int = 5,
        rate_rows_per_s: float | None = None,
        rate_requests_per_s: float | None = None,
        auth_env: str | None = None,
    ) -> None:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        pacer = Pacer(rate_rows_per_s, rate_requests_per_s)
        self._service = ServiceClient(url, pacer, max_inflight, connect_timeout, read_timeout, max_tries, auth_env)
        self.url, self.protocol = self._service.url, protocol
        super().__init__(
            classes,
            name=f"{model}@{urlsplit(self.url).netloc}" if name is None else name,
            output=output,
            input_shape=input_shape,
            preprocess=preprocess,
            input_quantization="uint8" if protocol == "image" else input_quantization,
            decimals=decimals,
            max_batch=1 if protocol == "image" else max_batch,
            cache_rows=cache_rows,
            ledger=ledger,
        )
        if channels_last and protocol == "image":
            raise ValueError(f"API {self.name!r}: channels_last does nothing with protocol='image', which sends PNGs")
        self.channels_last, self.max_inflight = channels_last, max_inflight
        own = {"output_name": output_name, "label_map": label_map, "encode": encode, "decode": decode}
        self._format = self._wire_format(model, own)
        self._connected, self._connect_lock = False, threading.Lock()

    def connect(self, shape: Sequence[int] | None = None) -> None:
        """Ask whether the service is ready and has the model; the first query does so by itself.

        Only the Open Inference Protocol can tell. With the others it shows at the first query.

        Args:
            shape: Of an image as it is sent, where it is not `input_shape`.

        Raises:
            APIResponseError: If there is no service, or not this model.
            ValueError: If the model has another name, datatype or shape.
        """
        with self._connect_lock:
            if self._connected or not isinstance(self._format, OpenInference):
                return
            if shape is None and self.preprocess is None and self.input_shape is not None:
                channels, *size = self.input_shape
                shape = (*size, channels) if self.channels_last else self.input_shape
            stop = threading.Event()
            self._service.send("GET", self._format.ready_path, stop)
            answer = self._service.send("GET", self._format.model_path, stop)
            try:
                self._format.check(answer.content, shape)
            except MalformedAnswer as error:
                raise APIResponseError(f"API {self.name!r} at {answer.url}: {error}") from error
            except ValueError as error:
                raise ValueError(f"API {self.name!r} at {self.url}: {error}") from error
            self._connected = True

    def share_rate(self, processes: int) -> None:
        """Divide the limits of rows and requests by the number of processes that query the same service."""
        self._service.pacer.share(processes)

    def close(self) -> None:
        """Close the connections; a later query opens new ones."""
        self._service.close()

    def __enter__(self) -> HTTPAPI:
        """The API itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def __repr__(self) -> str:
        """Place, protocol, name, classes and output."""
        return (
            f"HTTPAPI({self.url!r}, {self.protocol!r}, name={self.name!r}, classes={list(self.classes)}, "
            f"output={self.output!r})"
        )

    def _answer_all(self, images: Tensor, purpose: str) -> Tensor:
        arrays = [self._array(self.prepared(chunk)) for chunk in torch.split(images, self.max_batch)]
        self.connect(arrays[0].shape[1:])
        with self._reserve(purpose, len(images)) as reservation:
            return self._ask_all(arrays, reservation)

    def _answer(self, images: Tensor) -> Tensor:
        # Nothing but a subclass calls this: `_answer_all` sends the chunks of a query together.
        with QueryLedger().reserve(self.name, "probe", len(images)) as reservation:
            return self._ask_all([self._array(images)], reservation)

    def _array(self, images: Tensor) -> Array:
        array: Array = images.detach().to("cpu", torch.float32).numpy()
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1) if self.channels_last else array)

    def _ask_all(self, arrays: Sequence[Array], reservation: Reservation) -> Tensor:
        stop = threading.Event()

        def ask(array: Array) -> Array:
            try:
                return self._ask(array, reservation, stop)
            except BaseException:
                stop.set()
                raise

        if len(arrays) == 1:
            return self._tensor([ask(arrays[0])])
        with ThreadPoolExecutor(min(self.max_inflight, len(arrays))) as pool:
            futures = [pool.submit(ask, array) for array in arrays]
            try:
                wait(futures)
            except BaseException:
                stop.set()
                raise
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            # One that was called off because another request failed does not say why.
            raise next((error for error in errors if not isinstance(error, CalledOff)), errors[0])
        return self._tensor([future.result() for future in futures])

    def _ask(self, array: Array, reservation: Reservation, stop: threading.Event) -> Array:
        body, headers = self._format.encode(array)
        with _Rows(self, reservation, len(array)) as rows:
            answer = self._service.send("POST", self._format.path, stop, body, headers, rows)
        try:
            found = self._format.decode(answer.content, answer.headers, len(array))
        except MalformedAnswer as error:
            raise APIResponseError(f"API {self.name!r} at {answer.url}: {self._service.hidden(str(error))}") from error
        if self.output == "label" and found.ndim == 2 and found.shape[1] == 1:
            found = found[:, 0]
        if found.ndim not in (1, 2) or len(found) != len(array):
            raise APIResponseError(
                f"API {self.name!r} at {answer.url} returned responses of shape {found.shape} for {len(array)} images"
            )
        return found

    def _tensor(self, answers: Sequence[Array]) -> Tensor:
        try:
            joined = np.concatenate(answers)
        except ValueError as error:
            raise APIResponseError(f"API {self.name!r} changes the shape of its answers: {error}") from error
        if self.output == "label":
            return torch.from_numpy(joined if joined.dtype.kind == "f" else joined.astype(np.int64))
        return torch.from_numpy(joined.astype(np.float64 if joined.dtype.itemsize == 8 else np.float32))

    def _wire_format(self, model: str, options: Mapping[str, Any]) -> WireFormat:
        given = {name for name, value in options.items() if value is not None}
        if unused := sorted(given - _OWN_OPTIONS[self.protocol]):
            raise ValueError(f"API {self.name!r}: {', '.join(unused)} does nothing with protocol={self.protocol!r}")
        if self.protocol == "tfserving":
            return TFServing(model, options["output_name"])
        if self.protocol == "image":
            return SingleImage(model, self._columns(options["label_map"]), len(self.classes), self.output == "label")
        if self.protocol == "custom":
            if given != {"encode", "decode"}:
                raise ValueError(f"API {self.name!r}: protocol='custom' needs both encode and decode")
            return Custom(options["encode"], options["decode"])
        return OpenInference(model, self.protocol == "oip_binary", options["output_name"])

    def _columns(self, label_map: Mapping[str, int] | None) -> dict[str, int]:
        if label_map is None:
            raise ValueError(f"API {self.name!r}: protocol='image' needs label_map, {{service's label: global label}}")
        if sorted(label_map.values()) != sorted(self.classes):
            raise ValueError(
                f"label_map of API {self.name!r} must name each of its classes {list(self.classes)} once, got the "
                f"labels {sorted(label_map.values())}"
            )
        return {str(label): self.classes.index(value) for label, value in label_map.items()}


class _Rows:
    """Accounts for the rows of one request in the ledger."""

    def __init__(self, api: HTTPAPI, reservation: Reservation, rows: int) -> None:
        self.rows = rows
        self._api, self._purpose, self._further = api, reservation.purpose, ExitStack()
        self._reservation: Reservation | None = reservation

    def begin(self, attempt: int, waited: float) -> None:
        if self._reservation is None:
            self._reservation = self._further.enter_context(self._api._reserve(self._purpose, self.rows))
        if attempt:
            self._api._count("retries", 1)
        if waited:
            self._api._count("seconds_waiting", waited)

    def transferred(self, sent: int, received: int) -> None:
        for event, amount in (("requests", 1), ("bytes_sent", sent), ("bytes_received", received)):
            self._api._count(event, amount)

    def unanswered(self) -> None:
        if self._reservation is not None:
            self._reservation.spend(self.rows)
        # To try them again takes as many more.
        self._reservation = None

    def answered(self) -> None:
        if self._reservation is not None:
            self._reservation.commit(self.rows)

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *error: Any) -> None:
        self._further.__exit__(*error)
