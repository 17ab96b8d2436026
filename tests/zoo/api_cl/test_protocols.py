"""Bodies follow the published protocols, and what does not is refused with what was there instead."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo.api_cl.protocols import (
    HEADER_LENGTH,
    Custom,
    MalformedAnswer,
    OpenInference,
    SingleImage,
    TFServing,
    error_text,
    read_tensors,
    write_tensors,
)

IMAGES = np.array([[[[0.1, -1.0], [0.5, 1.0]]], [[[0.0, 0.25], [-0.5, 0.75]]]], dtype=np.float32)


def answer(*outputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"outputs": list(outputs), **more}).encode()


def test_json_of_the_open_inference_protocol_is_row_major_and_exact() -> None:
    body, headers = OpenInference("m", binary=False).encode(IMAGES)
    message = json.loads(body)
    assert headers == {"Content-Type": "application/json"}
    (entry,) = message["inputs"]
    assert (entry["name"], entry["shape"], entry["datatype"]) == ("images", [2, 1, 2, 2], "FP32")
    assert np.array_equal(np.array(entry["data"], dtype=np.float32), IMAGES.ravel())


def test_the_binary_extension_is_json_then_little_endian_bytes() -> None:
    body, headers = OpenInference("m").encode(IMAGES)
    size = int(headers[HEADER_LENGTH])
    message = json.loads(body[:size])
    assert headers["Content-Type"] == "application/octet-stream"
    assert message["parameters"] == {"binary_data_output": True}
    assert message["inputs"] == [
        {"name": "images", "shape": [2, 1, 2, 2], "datatype": "FP32", "parameters": {"binary_data_size": 32}}
    ]
    assert struct.unpack("<8f", body[size:]) == tuple(IMAGES.ravel())


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "<u1", "<i4"])
def test_arrays_come_back_in_value_type_and_order(binary: bool, dtype: str) -> None:
    first, second = np.arange(6, dtype=dtype).reshape(2, 3), np.arange(4, dtype=np.float32)[::-1]
    body, headers = write_tensors("outputs", {"a": first, "b": second}, binary)
    found = read_tensors("outputs", body, {name.lower(): value for name, value in headers.items()}).arrays
    assert np.array_equal(found["a"], first) and found["a"].dtype == np.dtype(dtype).newbyteorder("<")
    assert np.array_equal(found["b"], second)


def test_an_answer_may_mix_bytes_and_json() -> None:
    tail = struct.pack("<2f", 0.25, 0.75)
    header = answer(
        {"name": "n", "shape": [1], "datatype": "INT64", "data": [7]},
        {"name": "p", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
    )
    found = OpenInference("m", output_name="p").decode(header + tail, {HEADER_LENGTH: str(len(header))}, 1)
    assert found.tolist() == [[0.25, 0.75]]


def test_nested_data_are_read_too() -> None:
    body = answer({"name": "p", "shape": [2, 2], "datatype": "FP32", "data": [[0.5, 0.5], [1, 0]]})
    assert OpenInference("m").decode(body, {}, 2).tolist() == [[0.5, 0.5], [1, 0]]


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b"<html>", {}, "expected JSON, got '<html>'"),
        (b"", {}, "expected JSON, got nothing"),
        (b"[" * 100_000, {}, "expected JSON"),
        (b"[]", {}, "a list of 'outputs'"),
        (answer({"name": "p", "shape": [1], "datatype": "BYTES", "data": ["x"]}), {}, "datatype 'BYTES'"),
        (answer({"name": "p", "shape": [1, 3], "datatype": "FP32", "data": [1, 2]}), {}, r"2 numbers for the sha"),
        (answer({"name": "p", "shape": [-1], "datatype": "FP32", "data": [1]}), {}, r"the shape \[-1\]"),
        (answer({"name": "p", "shape": [10**30], "datatype": "FP32", "data": [1]}), {}, "1 numbers for the shape"),
        (answer({"name": "p", "shape": [2], "datatype": "FP32", "data": [[1], [1, 2]]}), {}, "numbers of one length"),
        (answer({"name": "p", "shape": [2], "datatype": "FP32", "data": ["a", "b"]}), {}, "numbers of one length"),
        (b"{}", {HEADER_LENGTH: "3"}, "'3', for a body of 2 bytes"),
        (b"{}", {HEADER_LENGTH: "-1"}, "'-1', for a body"),
        (answer({"name": "p", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}), {}, "4 by"),
        (answer() + b"abc", {HEADER_LENGTH: str(len(answer()))}, "3 bytes follow the JSON, but its outputs declare 0"),
        (
            answer({"name": "a", "shape": [1], "datatype": "FP32", "data": [1]},
                   {"name": "b", "shape": [1], "datatype": "FP32", "data": [1]}),
            {}, r"outputs \['a', 'b'\]; set output_name",
        ),
    ],
)  # fmt: skip
def test_what_does_not_follow_the_open_inference_protocol_is_refused(
    body: bytes, headers: dict[str, str], message: str
) -> None:
    with pytest.raises(MalformedAnswer, match=message):
        OpenInference("m").decode(body, headers, 1)


def metadata(**changes: Any) -> bytes:
    entry = {"name": "x", "datatype": "FP32", "shape": [-1, 1, 2, 2]} | changes.pop("input", {})
    return json.dumps({"name": "m", "inputs": [entry], "outputs": [{"name": "p"}]} | changes).encode()


def test_the_name_of_the_input_is_learned() -> None:
    protocol = OpenInference("m", binary=False)
    protocol.check(metadata(), (1, 2, 2))
    assert json.loads(protocol.encode(IMAGES)[0])["inputs"][0]["name"] == "x"
    for shape in ([1, 2, 2], [-1, -1, -1, -1], []):
        protocol.check(metadata(input={"shape": shape}), (1, 2, 2))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (metadata(name="other"), "asked for the model 'm', the service answers for 'other'"),
        (metadata(input={"datatype": "UINT8"}), "input 'x' of the model 'm' is UINT8; expected FP32"),
        (metadata(input={"shape": [-1, 2, 2, 1]}), r"shape \[-1, 2, 2, 1\], and these are \(N, 1, 2, 2\); set inp"),
        (metadata(input={"shape": [-1, 4]}), r"shape \[-1, 4\]"),
        (metadata(inputs=[{"name": "a"}, {"name": "b"}]), r"inputs \['a', 'b'\]; expected one"),
        (metadata(outputs=[{"name": "p"}]), "no output 'q'; it has"),
        (b"{}", "expected the metadata of a model"),
    ],
)  # fmt: skip
def test_a_model_that_is_another_one_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenInference("m", output_name="q" if "no output" in message else None).check(body, (1, 2, 2))


def test_tensorflow_serving_takes_instances_and_gives_predictions() -> None:
    protocol = TFServing("a b")
    assert protocol.path == "/v1/models/a%20b:predict"
    assert np.array_equal(np.array(json.loads(protocol.encode(IMAGES)[0])["instances"], dtype=np.float32), IMAGES)
    assert protocol.decode(b'{"predictions": [[0.5, 0.5]]}', {}, 1).tolist() == [[0.5, 0.5]]
    several = b'{"predictions": [{"p": [0.5, 0.5], "q": 1}]}'
    assert TFServing("m", "p").decode(several, {}, 1).tolist() == [[0.5, 0.5]]
    ragged = b'{"predictions": [[1], []]}'
    refused = [(several, r"\['p', 'q'\]; set output_name"), (b"[]", "predictions"), (ragged, "of one length")]
    for body, message in refused:
        with pytest.raises(MalformedAnswer, match=message):
            protocol.decode(body, {}, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_grey_levels(channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (channels, 4, 5))
    image = (levels / 127.5 - 1).astype(np.float32)[None]
    body, headers = SingleImage("m", {}, 2).encode(image)
    found = np.asarray(Image.open(io.BytesIO(body)))
    assert headers == {"Content-Type": "image/png"}
    assert np.array_equal(found if channels == 1 else found.transpose(2, 0, 1), levels[0] if channels == 1 else levels)
    with pytest.raises(ValueError, match=r"1 or 3 channels, got images of the shape \(1, 2, 4, 4\)"):
        SingleImage("m", {}, 2).encode(np.zeros((1, 2, 4, 4), np.float32))


def test_scores_by_label_go_to_their_columns() -> None:
    protocol = SingleImage("m", {"cat": 1, "dog": 0, "eel": 2}, 3)
    for body in (b'{"cat": 0.7, "eel": 0.2}', b'[{"label": "eel", "score": 0.2}, {"label": "cat", "score": 0.7}]'):
        assert protocol.decode(body, {}, 1).tolist() == [[0, 0.7, 0.2]]
    assert protocol.decode(b"[0.1, 0.2, 0.7]", {}, 1).tolist() == [[0.1, 0.2, 0.7]]
    labels = SingleImage("m", {"cat": 1, "7": 2}, 3, label_only=True)
    for body, column in ((b'"cat"', 1), (b"7", 2), (b'{"cat": 0.2, "7": 0.8}', 2)):
        found = labels.decode(body, {}, 1)
        assert found.tolist() == [column] and found.dtype == np.int64
    refused = [
        (b'{"cow": 1}', r"'cow' is not in label_map, which has \['cat', 'dog', 'eel'\]"),
        (b"{}", "scores by label"),
        (b'{"cat": "x"}', "score of 'cat', got 'x'"),
    ]
    for body, message in refused:
        with pytest.raises(MalformedAnswer, match=message):
            protocol.decode(body, {}, 1)


def test_a_format_of_ones_own_is_two_functions() -> None:
    protocol = Custom(lambda images: (images.tobytes(), {"X-Rows": str(len(images))}), lambda body, n: np.zeros((n, 3)))
    assert protocol.encode(IMAGES) == (IMAGES.tobytes(), {"X-Rows": "2"})
    assert protocol.decode(b"", {}, 2).shape == (2, 3)


def test_an_error_is_the_service_s_words_cut_short() -> None:
    assert error_text(b'{"error": "no such\\n model"}') == "no such model"
    assert error_text(b"<p>" + b"x" * 1000) == "<p>" + "x" * 297
    assert error_text(b"\xff\xfe") == "\ufffd\ufffd"
