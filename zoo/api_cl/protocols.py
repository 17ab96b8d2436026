"""Wire formats of classifiers behind HTTP: images to the body of a request, the body of an answer to responses.

Images are float32 arrays `(N, ...)` as the service wants them. Answers are arrays `(N, C)` in the order of the
service's classes, or integer columns `(N,)` from services that give labels only.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias
from urllib.parse import quote

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

PROTOCOLS = ("oip", "oip_binary", "tfserving", "image", "custom")
HEADER_LENGTH = "Inference-Header-Content-Length"
_JSON = {"Content-Type": "application/json"}
# Of the Open Inference Protocol; in the binary extension all are little-endian.
DATATYPES = {
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "BOOL": "<u1",
}  # fmt: skip

Array: TypeAlias = "NDArray[Any]"
Headers: TypeAlias = "Mapping[str, str]"


class MalformedAnswer(ValueError):  # noqa: N818 - a ValueError by name and nature
    """A body that does not follow its protocol."""


class Tensors(NamedTuple):
    """Named arrays of a message, and the message's JSON."""

    arrays: dict[str, Array]
    header: dict[str, Any]


def write_tensors(
    kind: str, arrays: Mapping[str, Array], binary: bool, more: Mapping[str, Any] | None = None
) -> tuple[bytes, dict[str, str]]:
    """A message of the Open Inference Protocol; its body and headers.

    Args:
        kind: "inputs" or "outputs".
        arrays: What to write, by name.
        binary: Write the numbers as bytes behind the JSON, in the way of the binary tensor extension.
        more: Further entries of the JSON.
    """
    entries, tails = [], []
    for name, array in arrays.items():
        datatype, little = _datatype(array)
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype}
        if binary:
            tails.append(little.tobytes())
            entry["parameters"] = {"binary_data_size": len(tails[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    header = json.dumps({**(more or {}), kind: entries}, separators=(",", ":")).encode()
    if not binary:
        return header, dict(_JSON)
    return b"".join([header, *tails]), {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(header)),
    }


def read_tensors(kind: str, body: bytes, headers: Headers) -> Tensors:
    """The arrays of a message of the Open Inference Protocol, with or without binary tensors.

    Args:
        kind: "inputs" or "outputs".
        body: Of the message.
        headers: Of the message, found whatever their case.

    Raises:
        MalformedAnswer: If it does not follow the protocol.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    header, tail = _split(body, lower.get(HEADER_LENGTH.lower()))
    message = read_json(header)
    entries = message.get(kind) if isinstance(message, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MalformedAnswer(f"expected a JSON object with a list of {kind!r}, got {_start(header)}")
    arrays, offset = {}, 0
    for entry in entries:
        name, array, size = _read_entry(entry, tail, offset)
        arrays[name] = array
        offset += size
    if offset != len(tail):
        raise MalformedAnswer(f"{len(tail)} bytes follow the JSON, but its {kind} declare {offset}")
    return Tensors(arrays, message)


def read_json(body: bytes) -> Any:
    """What JSON says.

    Raises:
        MalformedAnswer: If it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswer(f"expected JSON, got {_start(body)} ({error})") from error


def error_text(body: bytes, length: int = 300) -> str:
    """The words of an error's body: `error` of a JSON object where there is one, at most so many characters."""
    text = body[: 16 * length].decode("utf-8", "replace")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        message = None
    if isinstance(message, dict) and isinstance(message.get("error"), str):
        text = message["error"]
    return " ".join(text.split())[:length]


class WireFormat(Protocol):
    """What a protocol has to say.

    Attributes:
        path: Where to post, behind the service's URL.
    """

    path: str

    def encode(self, images: Array) -> tuple[bytes, Headers]:
        """The body and headers that ask for some images `(n, ...)`."""

    def decode(self, body: bytes, headers: Headers, rows: int) -> Array:
        """The responses in an answer."""


class OpenInference:
    """The Open Inference Protocol of KServe, Triton and MLServer.

    Args:
        model: Name of the model.
        binary: Send and ask for raw bytes in place of JSON's numbers.
        output_name: The output to read; None where the model has one only.
    """

    def __init__(self, model: str, binary: bool = True, output_name: str | None = None) -> None:
        self.model, self.binary, self.output_name = model, binary, output_name
        self.ready_path, self.model_path = "/v2/health/ready", f"/v2/models/{quote(model, safe='')}"
        self.path = f"{self.model_path}/infer"
        self.input_name = "images"

    def check(self, body: bytes, shape: Sequence[int] | None) -> None:
        """Compare the model with its metadata, and learn the name of its input.

        Args:
            body: The metadata.
            shape: Of one image as it will be sent; None where that is not known yet.

        Raises:
            ValueError: If the name, the datatype or the shape differ.
        """
        found = read_json(body)
        if not isinstance(found, dict) or not isinstance(found.get("inputs"), list):
            raise MalformedAnswer(f"expected the metadata of a model, got {_start(body)}")
        if found.get("name") != self.model:
            raise ValueError(f"asked for the model {self.model!r}, the service answers for {found.get('name')!r}")
        inputs, outputs = found["inputs"], found.get("outputs") or []
        if len(inputs) != 1 or not isinstance(inputs[0], dict):
            names = [entry.get("name") if isinstance(entry, dict) else entry for entry in inputs]
            raise ValueError(f"the model {self.model!r} has the inputs {names}; expected one, for images")
        name, datatype, declared = (inputs[0].get(key) for key in ("name", "datatype", "shape"))
        if datatype != "FP32":
            raise ValueError(f"the input {name!r} of the model {self.model!r} is {datatype}; expected FP32")
        if shape is not None and declared:
            fits = any(
                len(sizes) == len(declared)
                and all(want in (-1, None, size) for want, size in zip(declared, sizes, strict=True))
                for sizes in ((None, *shape), tuple(shape))
            )
            if not fits:
                raise ValueError(
                    f"the model {self.model!r} takes images of the shape {declared}, and these are (N, "
                    f"{', '.join(map(str, shape))}); set input_shape, channels_last or preprocess"
                )
        listed = [entry.get("name") for entry in outputs if isinstance(entry, dict)]
        if listed and self.output_name is not None and self.output_name not in listed:
            raise ValueError(f"the model {self.model!r} has no output {self.output_name!r}; it has {listed}")
        if isinstance(name, str):
            self.input_name = name

    def encode(self, images: Array) -> tuple[bytes, Headers]:
        """The body and headers that ask for images `(n, ...)`."""
        more: dict[str, Any] = {}
        if self.output_name is not None:
            more["outputs"] = [{"name": self.output_name}]
        if self.binary:
            more["parameters"] = {"binary_data_output": True}
        return write_tensors("inputs", {self.input_name: images}, self.binary, more)

    def decode(self, body: bytes, headers: Headers, rows: int) -> Array:
        """The responses: whatever form the answer has, as a service may ignore the wish for bytes."""
        arrays = read_tensors("outputs", body, headers).arrays
        if self.output_name is None and len(arrays) == 1:
            return next(iter(arrays.values()))
        if self.output_name not in arrays:
            raise MalformedAnswer(f"the answer has the outputs {sorted(arrays)}; set output_name to one of them")
        return arrays[self.output_name]


class TFServing:
    """The REST protocol of TensorFlow Serving.

    Args:
        model: Name of the model.
        output_name: The output to read of a model that has several.
    """

    def __init__(self, model: str, output_name: str | None = None) -> None:
        self.output_name = output_name
        self.path = f"/v1/models/{quote(model, safe='')}:predict"

    def encode(self, images: Array) -> tuple[bytes, Headers]:
        """The body and headers that ask for images `(n, ...)`."""
        return json.dumps({"instances": images.tolist()}, separators=(",", ":")).encode(), _JSON

    def decode(self, body: bytes, headers: Headers, rows: int) -> Array:
        """The responses."""
        message = read_json(body)
        predictions = message.get("predictions") if isinstance(message, dict) else None
        if not isinstance(predictions, list):
            raise MalformedAnswer(f"expected a JSON object with a list of 'predictions', got {_start(body)}")
        if predictions and isinstance(predictions[0], dict):
            if self.output_name is None or not all(
                isinstance(row, dict) and self.output_name in row for row in predictions
            ):
                raise MalformedAnswer(f"the answer has the outputs {sorted(predictions[0])}; set output_name to one")
            predictions = [row[self.output_name] for row in predictions]
        return _array(predictions)


class SingleImage:
    """One PNG per request, as TorchServe's image classifiers take it.

    Args:
        model: Name of the model.
        columns: Column of each label that the service may name.
        num_classes: C.
        label_only: Whether the service gives labels without scores.
    """

    def __init__(self, model: str, columns: Mapping[str, int], num_classes: int, label_only: bool = False) -> None:
        self.path = f"/predictions/{quote(model, safe='')}"
        self.columns, self.num_classes, self.label_only = dict(columns), num_classes, label_only

    def encode(self, images: Array) -> tuple[bytes, Headers]:
        """The PNG of an image `(1, c, h, w)` in [-1, 1], rounded to 256 levels.

        Raises:
            ValueError: If it is neither grey nor colour.
            ImportError: If pillow is not installed.
        """
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("protocol='image' needs pillow: pip install 'lightning-method-zoo[serve]'") from error
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"protocol='image' sends 1 or 3 channels, got images of the shape {images.shape}")
        pixels = np.rint((images[0] + 1) * 127.5).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(stream, "PNG")
        return stream.getvalue(), {"Content-Type": "image/png"}

    def decode(self, body: bytes, headers: Headers, rows: int) -> Array:
        """The responses, from {label: score}, [{"label": ..., "score": ...}], [score, ...] or a label alone."""
        found = read_json(body)
        if isinstance(found, list) and found and all(isinstance(entry, dict) for entry in found):
            found = {str(entry.get("label")): entry.get("score") for entry in found}
        if isinstance(found, list) and not self.label_only:
            return _array([found])
        if isinstance(found, str | int) and self.label_only:
            return np.asarray([self._column(str(found))], dtype=np.int64)
        if not isinstance(found, dict) or not found:
            raise MalformedAnswer(f"expected scores by label, got {_start(body)}")
        scores = np.zeros((1, self.num_classes))
        for label, score in found.items():
            column = self._column(label)
            if not isinstance(score, int | float):
                raise MalformedAnswer(f"expected a number as the score of {label!r}, got {score!r}")
            scores[0, column] = score
        return scores.argmax(1) if self.label_only else scores

    def _column(self, label: str) -> int:
        if label not in self.columns:
            raise MalformedAnswer(f"the label {label!r} is not in label_map, which has {sorted(self.columns)}")
        return self.columns[label]


class Custom:
    """A service's own format, in two functions.

    Args:
        encode: Images `(n, c, h, w)` to the body and headers of a request to the URL itself.
        decode: The body of the answer and n to responses.
    """

    path = ""

    def __init__(self, encode: Callable[[Array], tuple[bytes, Headers]], decode: Callable[[bytes, int], Array]) -> None:
        self.encode, self._decode = encode, decode

    def decode(self, body: bytes, headers: Headers, rows: int) -> Array:
        """The responses."""
        return np.asarray(self._decode(body, rows))


def _datatype(array: Array) -> tuple[str, Array]:
    for name, kind in DATATYPES.items():
        if array.dtype.newbyteorder("<") == np.dtype(kind) and name != "BOOL":
            return name, np.ascontiguousarray(array, dtype=kind)
    raise ValueError(f"arrays of {array.dtype} have no datatype in the Open Inference Protocol")


def _split(body: bytes, length: str | None) -> tuple[bytes, bytes]:
    if length is None:
        return body, b""
    if not (length.isascii() and length.isdigit()) or int(length) > len(body):
        raise MalformedAnswer(f"{HEADER_LENGTH} is {length!r}, for a body of {len(body)} bytes")
    return body[: int(length)], body[int(length) :]


def _read_entry(entry: Mapping[str, Any], tail: bytes, offset: int) -> tuple[str, Array, int]:
    """Name, array and number of bytes of one tensor."""
    name, datatype, shape = str(entry.get("name")), entry.get("datatype"), entry.get("shape")
    kind = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if kind is None:
        raise MalformedAnswer(f"{name!r} has the datatype {datatype!r}; expected one of {', '.join(DATATYPES)}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise MalformedAnswer(f"{name!r} has the shape {shape!r}; expected a list of sizes")
    parameters = entry.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        # JSON writes numbers that float32 cannot hold; whoever reads the array refuses what is not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            array, used = _array(entry.get("data")).astype(kind), 0
    else:
        part = tail[offset : offset + size] if isinstance(size, int) and size >= 0 else b""
        if len(part) != size or size % np.dtype(kind).itemsize:
            raise MalformedAnswer(f"{name!r} declares {size!r} bytes of {datatype}, and {len(tail) - offset} are left")
        array, used = np.frombuffer(part, dtype=kind), size
    try:
        return name, array.reshape(shape), used
    except ValueError:
        raise MalformedAnswer(f"{name!r} has {array.size} numbers for the shape {shape}") from None


def _array(data: Any) -> Array:
    try:
        array = np.asarray(data)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "fiub":
        raise MalformedAnswer(f"expected rows of numbers of one length, got {_start(json.dumps(data).encode())}")
    return array


def _start(body: bytes, length: int = 100) -> str:
    text = body[: 4 * length].decode("utf-8", "replace")
    return repr(text[:length] + ("..." if len(text) > length else "")) if body else "nothing"
