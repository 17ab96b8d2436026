"""The server speaks the published protocols, to any client, and says what is wrong with a request."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch
from torch import nn

from zoo.api_cl.__main__ import main
from zoo.api_cl.boxes import CallableAPI, ModuleAPI
from zoo.api_cl.http_box import HTTPAPI
from zoo.api_cl.networks import build_classifier
from zoo.api_cl.protocols import HEADER_LENGTH, write_tensors
from zoo.api_cl.server import classifier_app, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHAPE = (1, 4, 4)
X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, *SHAPE)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def network() -> nn.Module:
    torch.manual_seed(0)
    # BatchNorm shows whether the server is in eval mode.
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))


def wanted() -> np.ndarray[Any, Any]:
    with torch.no_grad():
        probs: np.ndarray[Any, Any] = network().eval()(torch.from_numpy(X)).softmax(1).numpy()
    return probs


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(classifier_app(network().train(), (0, 1, 2), SHAPE, max_rows=8)) as address:
        yield address


def post(url: str, body: Any, path: str = "/v2/models/model/infer", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url + path, content=content, headers=headers, verify=False, trust_env=False)


def message(**changes: Any) -> dict[str, Any]:
    entry = {"name": "images", "shape": [2, *SHAPE], "datatype": "FP32", "data": X.ravel().tolist()} | changes
    return {"inputs": [entry], "id": "42"}


def test_metadata_say_what_the_model_takes_and_gives(url: str) -> None:
    with httpx.Client(verify=False, trust_env=False) as client:
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/model/ready"):
            assert client.get(url + path).status_code == 200
        found = client.get(f"{url}/v2/models/model").json()
        assert found["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 1, 4, 4]}]
        assert found["outputs"] == [{"name": "probs", "datatype": "FP32", "shape": [-1, 3]}]
        assert client.get(f"{url}/v1/models/model").json()["model_version_status"][0]["state"] == "AVAILABLE"
        for path in ("/v2/models/other", "/v2/models/other/ready", "/v1/models/other", "/nowhere"):
            answer = client.get(url + path)
            assert answer.status_code == 404 and isinstance(answer.json()["error"], str)


def test_json_is_answered_with_json_and_the_request_s_id(url: str) -> None:
    found = post(url, message()).json()
    (output,) = found["outputs"]
    assert (found["model_name"], found["id"]) == ("model", "42")
    assert (output["name"], output["datatype"], output["shape"]) == ("probs", "FP32", [2, 3])
    np.testing.assert_allclose(np.array(output["data"]).reshape(2, 3), wanted(), rtol=1e-6)


@pytest.mark.parametrize(
    "wish",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "probs", "parameters": {"binary_data": True}}]},
    ],
)
def test_bytes_are_sent_to_those_who_ask_for_them(url: str, wish: dict[str, Any]) -> None:
    answer = post(url, message() | wish)
    size = int(answer.headers[HEADER_LENGTH])
    assert json.loads(answer.content[:size])["outputs"][0]["parameters"] == {"binary_data_size": 24}
    found = np.frombuffer(answer.content[size:], "<f4").reshape(2, 3)
    np.testing.assert_allclose(found, wanted(), rtol=1e-6)


def test_bytes_may_be_sent_and_json_taken(url: str) -> None:
    body, headers = write_tensors("inputs", {"images": X}, binary=True)
    found = post(url, body, **headers).json()["outputs"][0]["data"]
    np.testing.assert_allclose(np.array(found).reshape(2, 3), wanted(), rtol=1e-6)


def test_tensorflow_s_protocol_gives_rows(url: str) -> None:
    found = post(url, {"instances": X.tolist()}, "/v1/models/model:predict").json()["predictions"]
    np.testing.assert_allclose(found, wanted(), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "expected JSON"),
        (message(name="x"), 400, "expected one input, 'images', got ['x']"),
        (message(shape=[2, 16]), 400, "the shape [2, 16]; expected (N, 1, 4, 4)"),
        (message(datatype="FP64"), 400, "float64; expected FP32"),
        (message(data=[1.0]), 400, "1 numbers for the shape"),
        (message(data=(1.5 * X).ravel().tolist()), 400, "must lie in [-1, 1]"),
        (message(shape=[0, *SHAPE], data=[]), 400, "1 to 8 images, got 0"),
        (message(shape=[9, *SHAPE], data=[0.0] * 144), 400, "1 to 8 images, got 9"),
        (b" " * 100_000, 413, "8 images"),
    ],
)
def test_wrong_requests_are_explained(url: str, body: Any, status: int, words: str) -> None:
    answer = post(url, body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_instances_of_two_sizes_are_refused(url: str) -> None:
    answer = post(url, {"instances": [[[[0.0]]], [[[0.0, 1.0]]]]}, "/v1/models/model:predict")
    assert answer.status_code == 400 and "no images of one size" in answer.json()["error"]
    assert post(url, {}, "/v1/models/model:predict").status_code == 400


def test_rounded_answers_are_short_in_json() -> None:
    with serving(classifier_app(network(), (0, 1, 2), SHAPE, decimals=2)) as url:
        found = post(url, message()).json()["outputs"][0]["data"]
    assert all(len(str(value)) <= 4 for value in found)
    np.testing.assert_allclose(np.array(found).reshape(2, 3), wanted().round(2), atol=1e-6)


def test_any_black_box_can_be_served_and_its_failures_are_errors_of_the_server() -> None:
    api = CallableAPI(
        lambda x: np.full((len(x), 2), np.nan if x[0].mean() > 0 else 0.5), (4, 6), name="fn", input_shape=SHAPE
    )
    with serving(classifier_app(api)) as url:
        assert post(url, message(data=[-0.5] * 32)).json()["outputs"][0]["data"] == [0.5] * 4
        answer = post(url, message(data=[0.5] * 32))
        assert answer.status_code == 500 and "row 0" in answer.json()["error"]


def test_what_is_missing_to_serve_is_said() -> None:
    api = ModuleAPI(network(), (0, 1, 2), name="api")
    with pytest.raises(ValueError, match="input_shape must be"):
        classifier_app(api)
    with pytest.raises(ValueError, match=r"classes \[0, 1\] are not those of ModuleAPI"):
        classifier_app(api, (0, 1), SHAPE)
    with pytest.raises(ValueError, match="decimals=3 does nothing with ModuleAPI"):
        classifier_app(api, input_shape=SHAPE, decimals=3)
    with pytest.raises(ValueError, match="classes must name"):
        classifier_app(network(), input_shape=SHAPE)


def test_a_port_that_is_taken_is_an_error() -> None:
    app = classifier_app(network(), (0, 1, 2), SHAPE)
    with serving(app) as url, pytest.raises(OSError, match="ddress already in use"), serving(app, port=int(url[-5:])):
        pass


@pytest.fixture
def weights(tmp_path: Path) -> str:
    from safetensors.torch import save_file

    torch.manual_seed(1)
    path = tmp_path / "api.safetensors"
    save_file(build_classifier("logistic", (1, 8, 8), 2).state_dict(), path)
    return str(path)


def test_the_command_serves_weights_of_a_file(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def instead(app: Any, host: str, port: int) -> None:
        torch.manual_seed(1)
        module = build_classifier("logistic", (1, 8, 8), 2)
        x = torch.rand(5, 1, 8, 8)
        with serving(app) as url, HTTPAPI(url, classes=(4, 9), model="digits", decimals=3) as api:
            torch.testing.assert_close(api.query(x, "probe"), module(x).softmax(1).detach(), rtol=0, atol=6e-4)
        served.append((host, port))

    monkeypatch.setattr("zoo.api_cl.server.serve", instead)
    line = ["--classes", "4,9", "--input_shape", "1,8,8", "--name", "digits", "--decimals", "3", "--port", "8123"]
    main(["serve", "--weights", weights, "--arch", "logistic", *line])
    assert served == [("127.0.0.1", 8123)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--arch", "vit"], "arch must be one of"),
        (["--classes", "a"], "'a': expected whole numbers with commas"),
        (["--classes", "1,1"], "distinct labels"),
        (["--classes", "1,2,3"], "api.safetensors"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--decimals", "0"], "decimals"),
    ],
)
def test_mistakes_of_the_command_line_are_one_paragraph(
    weights: str, changes: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--weights", weights, "--arch", "logistic", "--classes", "0,1", "--input_shape", "1,8,8", *changes]
    with pytest.raises(SystemExit) as error:
        main(["serve", *line])
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and words in text and text.count("\n") == 1


def test_help_needs_no_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "zoo.api_cl.server", None)
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert "--input_shape" in capsys.readouterr().out
