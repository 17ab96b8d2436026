"""Connections go where the user said and nowhere else, secrets are shown nowhere, and reasons are given."""

from __future__ import annotations

import logging
import pickle
import socket
import ssl
import sys
from typing import Any

import httpx
import pytest
import torch

from tests.zoo.api_cl.failing_server import (
    CLASSES,
    SHAPE,
    Failure,
    expected,
    images,
    network,
    quick_services,
    service,
)
from zoo.api_cl.black_box import APIResponseError
from zoo.api_cl.http_box import HTTPAPI
from zoo.api_cl.ledger import QueryLedger
from zoo.api_cl.server import classifier_app, serving

pytestmark = pytest.mark.usefixtures(quick_services.__name__)


def test_nobody_listening_is_said_with_the_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ledger = QueryLedger(total=4)
    words = rf"no answer from http://127.0.0.1:{port}/.* after 5 tries \(last: connection refused\)"
    api = HTTPAPI(f"http://127.0.0.1:{port}", "tfserving", CLASSES, ledger=ledger)
    with api, pytest.raises(APIResponseError, match=words):
        api.query(images(4), "student")
    assert ledger.spent() == 0 and ledger.remaining(api.name) == 4


def test_a_service_that_dies_is_found_again() -> None:
    x = images(4)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    app = classifier_app(network(), CLASSES, SHAPE)
    with HTTPAPI(f"http://127.0.0.1:{port}", classes=CLASSES) as api:
        with serving(app, port=port):
            first = api.query(x, "student")
        with pytest.raises(APIResponseError, match="after 5 tries"):
            api.query(x, "student")
        with serving(app, port=port):
            assert torch.equal(api.query(x, "student"), first)


@pytest.mark.parametrize(
    ("status", "target"), [(307, "http://localhost:1/"), (302, "/elsewhere"), (308, "https://example.org/")]
)
def test_images_are_not_sent_on_to_another_place(status: int, target: str) -> None:
    with service(Failure(status, {"Location": target}), protocol="tfserving") as (app, api):
        words = "redirects to another place" if "//" in target else "answered 302, by which nothing can be posted"
        with pytest.raises(APIResponseError, match=words):
            api.query(images(4), "student")
        assert app.posts == 1


def test_a_redirect_on_the_same_host_is_followed_and_an_endless_one_is_not() -> None:
    again = Failure(307, {"Location": "/v1/models/model:predict"})
    x = images(4)
    with service(again, protocol="tfserving") as (app, api):
        torch.testing.assert_close(api.query(x, "student"), expected(x), rtol=1e-6, atol=1e-6)
        assert (app.posts, app.rows) == (2, 4)
    endless = service(always=lambda number: again, protocol="tfserving")
    with endless as (_, api), pytest.raises(APIResponseError, match="redirects more than 3 times"):
        api.query(x, "student")


def test_the_token_is_sent_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    secret = "s3cr3t-token"
    monkeypatch.setenv("ZOO_TOKEN", secret)
    refused = Failure(401, body=b"the token s3cr3t-token has expired")
    with caplog.at_level(logging.DEBUG), service(None, refused, Failure(403), auth_env="ZOO_TOKEN") as (app, api):
        api.query(images(4), "student")
        assert app.tokens == [f"Bearer {secret}"]
        words = r"answered 401: the token \*\*\* has expired; the token in the environment variable ZOO_TOKEN was not"
        with pytest.raises(APIResponseError, match=words) as error:
            api.query(images(4), "student")
        with pytest.raises(APIResponseError, match=r"answered 403.*ZOO_TOKEN"):
            api.query(images(4), "student")
        assert secret not in repr(api) + str(error.value) + caplog.text + repr(api.__dict__) + repr(
            api._service.__dict__
        )
        assert api.ledger is not None
        assert secret.encode() not in pickle.dumps(api.ledger.state_dict())
        monkeypatch.setenv("ZOO_TOKEN", "new")
        api.query(images(4), "student")
        assert app.tokens[-1] == "Bearer new"
    assert "HTTP Request" in caplog.text


def test_a_service_that_wants_a_token_says_how_to_give_one() -> None:
    with service(Failure(401)) as (_, api), pytest.raises(APIResponseError, match=r"401.*in auth_env"):
        api.query(images(4), "student")


@pytest.mark.parametrize("token", ["", " ", "two\nlines", "grün"])
def test_a_variable_without_a_token_is_named_but_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_TOKEN", token)
    with pytest.raises(ValueError, match="environment variable ZOO_TOKEN") as error:
        HTTPAPI("https://example.org", classes=CLASSES, auth_env="ZOO_TOKEN")
    assert not token.strip() or token not in str(error.value)


def test_a_token_in_the_open_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_TOKEN", "t")
    with pytest.warns(UserWarning, match="token of ZOO_TOKEN goes to http://example.org without encryption"):
        HTTPAPI("http://example.org", classes=CLASSES, auth_env="ZOO_TOKEN")
    HTTPAPI("http://127.0.0.1:1", classes=CLASSES, auth_env="ZOO_TOKEN")


def test_a_password_in_the_url_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match=r"user or password for example.org.*auth_env") as error:
        HTTPAPI("https://me:hunter2@example.org", classes=CLASSES)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("url", ["localhost:8000", "example.org/x", "ftp://example.org", "http://", ""])
def test_a_url_without_scheme_or_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"no scheme or host; expected something like http://127.0.0.1:8000"):
        HTTPAPI(url, classes=CLASSES)


def test_a_certificate_of_nobody_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        try:
            raise ssl.SSLCertVerificationError(1, "self-signed certificate")
        except ssl.SSLError as error:
            raise httpx.ConnectError("[SSL] failed") from error

    calls = []
    with HTTPAPI("https://127.0.0.1:1", "tfserving", CLASSES) as api:
        monkeypatch.setattr(httpx.Client, "request", lambda *a, **k: calls.append(1) or refuse())
        with pytest.raises(APIResponseError, match=r"no certificate that can be verified.*SSL_CERT_FILE"):
            api.query(images(2), "student")
    assert len(calls) == 1


def test_without_httpx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-method-zoo\[serve\]'"):
        HTTPAPI("http://127.0.0.1:1", classes=CLASSES)
