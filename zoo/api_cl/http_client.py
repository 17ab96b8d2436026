"""Requests to one service over HTTP: kept connections, retries, limits and a token that is kept nowhere."""

from __future__ import annotations

import logging
import os
import random
import ssl
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

from zoo.api_cl.black_box import APIResponseError
from zoo.api_cl.protocols import error_text
from zoo.api_cl.rate_limit import Pacer, backoff, retry_after

if TYPE_CHECKING:
    from types import ModuleType

    import httpx

    from zoo.api_cl.protocols import Headers

RETRIED = (429, 502, 503, 504)
_LOCAL = ("localhost", "127.0.0.1", "::1")
_MAX_REDIRECTS = 3
# Below the 5 s after which common servers close a silent connection, so that few requests meet a closed one.
_KEEPALIVE = 4.0
_LONG_WAIT = 10.0

_logger = logging.getLogger(__name__)


class CalledOff(Exception):  # noqa: N818 - no error of its own: another request failed
    """A request was given up because another one of the same query failed."""


class Account(Protocol):
    """What a request reports on its way.

    Attributes:
        rows: Images in the request.
    """

    rows: int

    def begin(self, attempt: int, waited: float) -> None:
        """A try is about to be sent, after so many seconds of waiting; an exception calls it off."""

    def transferred(self, sent: int, received: int) -> None:
        """A try has reached the service: bytes of the bodies."""

    def unanswered(self) -> None:
        """A try has reached the service, and nobody knows whether it was worked on."""

    def answered(self) -> None:
        """The request succeeded."""


class _Outcome(NamedTuple):
    answer: httpx.Response | None
    reason: str
    arrived: bool


class ServiceClient:
    """Sends requests to a service and tries again where that may help.

    Tried again are the statuses 429, 502, 503 and 504, connections that cannot be made or break, and answers that do
    not come in time. In between it waits as `Retry-After` says, all threads together, or for a growing random time.

    Args:
        url: Where the service is.
        pacer: The limits of the service.
        max_connections: Most connections, and so most requests at the same time.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for an answer.
        max_tries: Most tries of a request.
        auth_env: Name of the environment variable with the bearer token, read for each request.

    Raises:
        ValueError: If an argument is out of its range, or the environment variable is not set.
        ImportError: If httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        pacer: Pacer,
        max_connections: int = 4,
        connect_timeout: float = 3.0,
        read_timeout: float = 30.0,
        max_tries: int = 5,
        auth_env: str | None = None,
    ) -> None:
        if max_connections < 1 or max_tries < 1 or not connect_timeout > 0 or not read_timeout > 0:
            raise ValueError(
                f"max_inflight and max_tries must be at least 1, connect_timeout and read_timeout above 0 s; got "
                f"{max_connections}, {max_tries}, {connect_timeout} and {read_timeout}"
            )
        httpx_library()
        self.url, self.pacer, self.auth_env = _checked_url(url), pacer, auth_env
        self.max_connections, self.max_tries = max_connections, max_tries
        self.connect_timeout, self.read_timeout = connect_timeout, read_timeout
        # A source of its own: how often a service was busy must not change what is drawn in training.
        self._draw = random.Random()
        self._client: httpx.Client | None = None
        self._process, self._lock = 0, threading.Lock()
        parts = urlsplit(self.url)
        if self._token() and parts.scheme == "http" and parts.hostname not in _LOCAL:
            warnings.warn(f"the token of {auth_env} goes to {self.url} without encryption; use https", stacklevel=3)

    def send(
        self,
        method: str,
        path: str,
        stop: threading.Event,
        body: bytes | None = None,
        headers: Headers | None = None,
        account: Account | None = None,
    ) -> httpx.Response:
        """One request, tried again where that may help; its successful answer.

        Args:
            method: Of HTTP.
            path: Behind the URL.
            stop: Calls it off before the next try.
            body: To post.
            headers: Of the body.
            account: Hears what becomes of the rows; None for a request without any.

        Raises:
            APIResponseError: If there is no answer, or an error in its place.
            CalledOff: If `stop` was set.
        """
        pause, reason = 0.0, ""
        for attempt in range(self.max_tries):
            stop.wait(pause)
            waited = self.pacer.wait(account.rows, stop) if account else 0.0
            if stop.is_set():
                raise CalledOff
            if account:
                account.begin(attempt, pause + waited)
            answer, reason, arrived = self._try(method, path, body, headers)
            if account and arrived:
                received = 0 if answer is None else answer.num_bytes_downloaded
                account.transferred(len(body or b""), received)
            if answer is not None and answer.status_code not in RETRIED:
                self._check_status(answer)
                if account:
                    account.answered()
                return answer
            if account and answer is None and arrived:
                account.unanswered()
            asked = None if answer is None else retry_after(answer.headers.get("Retry-After"))
            pause = 0.0 if asked is not None else backoff(attempt, self._draw)
            if asked is not None:
                self._hold(asked)
        raise APIResponseError(
            f"no answer from {self.url}{path} after {self.max_tries} tries (last: {self.hidden(reason)})"
        )

    def hidden(self, text: str) -> str:
        """A service's words without the token, which some services repeat."""
        token = os.environ.get(self.auth_env, "").strip() if self.auth_env else ""
        return text.replace(token, "***") if token else text

    def close(self) -> None:
        """Close the connections; a later request opens new ones."""
        with self._lock:
            if self._client is not None and self._process == os.getpid():
                self._client.close()
            self._client = None

    def _try(self, method: str, path: str, body: bytes | None, headers: Headers | None) -> _Outcome:
        library = httpx_library()
        url: httpx.URL = library.URL(self.url + path)
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                answer: httpx.Response = self._connections().request(method, url, content=body, headers=headers)
                if not answer.has_redirect_location:
                    words = error_text(answer.content) if answer.is_error else ""
                    return _Outcome(answer, f"{answer.status_code} {words or answer.reason_phrase}", True)
                url = _redirected(answer, method)
        except (library.ReadTimeout, library.ReadError, library.RemoteProtocolError) as error:
            return _Outcome(None, _words(error, self._late(error)), True)
        except (library.ConnectError, library.TimeoutException, library.WriteError) as error:
            if refusal := _certificate_error(error):
                raise APIResponseError(
                    f"{self.url} shows no certificate that can be verified ({refusal}); name the file of a private "
                    "authority in the environment variable SSL_CERT_FILE"
                ) from error
            # A request that was not sent to its end cannot have been worked on.
            return _Outcome(None, _words(error, self._late(error)), False)
        except (library.HTTPError, library.InvalidURL) as error:
            raise APIResponseError(f"{self.url}{path} cannot be asked: {self.hidden(str(error))}") from error
        raise APIResponseError(f"{self.url}{path} redirects more than {_MAX_REDIRECTS} times, last to {url}")

    def _late(self, error: Exception) -> str:
        library = httpx_library()
        if isinstance(error, library.ConnectTimeout):
            return f"no connection within {self.connect_timeout:g} s"
        what = "images not taken" if isinstance(error, library.WriteTimeout) else "no answer"
        return f"{what} within {self.read_timeout:g} s"

    def _check_status(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        text = f"{answer.url} answered {answer.status_code}: {self.hidden(error_text(answer.content))}"
        if answer.status_code in (401, 403):
            text += (
                "; name the environment variable that holds a token in auth_env"
                if self.auth_env is None
                else f"; the token in the environment variable {self.auth_env} was not accepted"
            )
        raise APIResponseError(text)

    def _hold(self, seconds: float) -> None:
        if seconds >= _LONG_WAIT:
            _logger.warning("%s asks to wait %.0f s before the next request", self.url, seconds)
        self.pacer.hold(seconds)

    def _connections(self) -> httpx.Client:
        with self._lock:
            # Connections that a forked process has inherited are its parent's.
            if self._client is None or self._process != os.getpid():
                library = httpx_library()
                client: httpx.Client = library.Client(
                    auth=self._authorize if self.auth_env else None,
                    timeout=library.Timeout(self.read_timeout, connect=self.connect_timeout, pool=None),
                    limits=library.Limits(max_connections=self.max_connections, keepalive_expiry=_KEEPALIVE),
                    follow_redirects=False,
                )
                self._client, self._process = client, os.getpid()
                weakref.finalize(self, client.close)
            return self._client

    def _authorize(self, request: httpx.Request) -> httpx.Request:
        request.headers["Authorization"] = f"Bearer {self._token()}"
        return request

    def _token(self) -> str:
        """The token; empty where none is asked for."""
        if self.auth_env is None:
            return ""
        token = os.environ.get(self.auth_env, "").strip()
        if not token:
            raise ValueError(f"auth_env names the environment variable {self.auth_env}, which is not set")
        # Libraries show a header that they refuse.
        if not (token.isascii() and token.isprintable()):
            raise ValueError(f"the environment variable {self.auth_env} holds characters that no token has")
        return token


def httpx_library() -> ModuleType:
    """The module `httpx`, which only services behind HTTP need.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import httpx
    except ImportError as error:
        raise ImportError("services behind HTTP need httpx: pip install 'lightning-method-zoo[serve]'") from error
    module: ModuleType = httpx
    return module


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        # The URL itself would show the password.
        raise ValueError(
            f"url holds a user or password for {parts.hostname}; put a token in an environment variable and its name "
            "in auth_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url {url!r} has no scheme or host; expected something like http://127.0.0.1:8000")
    return url.rstrip("/")


def _redirected(answer: httpx.Response, method: str) -> httpx.URL:
    old, new = answer.url, answer.url.join(answer.headers["Location"])
    safer = (old.scheme, new.scheme) == ("http", "https")
    if new.host != old.host or not (safer or (new.scheme, new.port) == (old.scheme, old.port)):
        raise APIResponseError(
            f"{old} redirects to another place, {new.scheme}://{new.netloc.decode()}; nothing was sent there. Set url "
            "to where the service is"
        )
    if method != "GET" and answer.status_code not in (307, 308):
        raise APIResponseError(f"{old} answered {answer.status_code}, by which nothing can be posted to {new}")
    return new


def _certificate_error(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return str(getattr(error, "verify_message", None) or error)
        error = error.__cause__ or error.__context__
    return ""


def _words(error: Exception, late: str) -> str:
    library = httpx_library()
    if isinstance(error, library.TimeoutException):
        return late
    text = str(error).partition("] ")[2] or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
