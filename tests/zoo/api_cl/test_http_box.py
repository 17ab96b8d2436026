"""A service on this machine is the module behind it: same answers, same count of rows, whatever fails on the way."""

from __future__ import annotations

import copy
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.zoo.api_cl.failing_server import (
    CLASSES,
    SHAPE,
    Failure,
    events,
    expected,
    images,
    network,
    quick_services,
    service,
)
from zoo.api_cl.black_box import APIResponseError
from zoo.api_cl.http_box import HTTPAPI
from zoo.api_cl.ledger import QueryBudgetExceeded, QueryLedger
from zoo.api_cl.server import classifier_app, serving

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures(quick_services.__name__)
BUSY = Failure(503)
LATE = Failure(delay=0.4)


@pytest.mark.parametrize("protocol", ["oip", "oip_binary", "tfserving"])
@pytest.mark.parametrize("rows", [1, 4, 23])
def test_a_service_answers_as_the_module_behind_it(protocol: str, rows: int) -> None:
    x = images(rows)
    with service(protocol=protocol) as (app, api):
        found = api.query(x, "student")
        torch.testing.assert_close(found, expected(x), rtol=1e-6, atol=1e-6)
        row = events(api)
        assert found.dtype == torch.float32 and not found.requires_grad
        assert (row["rows"], row["student"], app.rows, row["requests"]) == (rows, rows, rows, -(-rows // 4))
        assert row["bytes_sent"] > 4 * 16 * rows and row["bytes_received"] > 0 and row["retries"] == 0


def test_rows_keep_their_order_with_four_requests_in_flight() -> None:
    x = images(64)
    delays = [0.06, 0.0, 0.03, 0.01, 0.05, 0.02]
    with service(always=lambda number: Failure(delay=delays[number % 6])) as (app, api):
        torch.testing.assert_close(api.query(x, "student"), expected(x), rtol=1e-6, atol=1e-6)
        assert app.most_in_flight == 4
        assert app.rows == 64


def test_one_request_at_a_time_where_that_is_asked_for() -> None:
    with service(max_inflight=1, always=lambda number: Failure(delay=0.01)) as (app, api):
        api.query(images(16), "student")
        assert (app.most_in_flight, app.posts) == (1, 4)


def test_rounded_answers_arrive_as_they_left() -> None:
    x = images(6)
    with serving(classifier_app(network(), CLASSES, SHAPE, decimals=3)) as url:
        for protocol in ("oip", "oip_binary", "tfserving"):
            with HTTPAPI(url, protocol, CLASSES, decimals=3) as api:
                found = api.query(x, "student")
            assert torch.equal(found, (found.double() * 1000).round().div(1000).float())
            torch.testing.assert_close(found, expected(x, decimals=3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_service_is_asked_again_and_refusals_cost_nothing(status: int) -> None:
    x = images(4)
    with service(Failure(status), Failure(status), ledger=QueryLedger(total=4)) as (app, api):
        torch.testing.assert_close(api.query(x, "student"), expected(x), rtol=1e-6, atol=1e-6)
        row = events(api)
        assert (app.posts, app.rows, row["rows"], row["retries"], row["requests"]) == (3, 4, 4, 2, 3)


def test_a_service_that_stays_busy_is_given_up_after_five_tries() -> None:
    with service(always=lambda number: BUSY) as (app, api):
        with pytest.raises(
            APIResponseError, match=r"no answer from http://.*/infer after 5 tries \(last: 503 injected\)"
        ):
            api.query(images(4), "student")
        assert app.posts == 5
        assert api.ledger is not None and api.ledger.spent() == 0


@pytest.mark.parametrize("status", [400, 404, 413, 500, 501])
def test_other_errors_are_not_tried_again(status: int) -> None:
    words = b'{"error": "' + b"w" * 500 + b'"}'
    with service(Failure(status, body=words)) as (app, api):
        with pytest.raises(APIResponseError, match=f"answered {status}: w{{300}}$"):
            api.query(images(4), "student")
        assert app.posts == 1
        assert api.ledger is not None and api.ledger.spent() == 0


def test_retry_after_is_obeyed_by_all_requests() -> None:
    first = Failure(429, {"Retry-After": "0.5"})
    with service(first, max_inflight=2, max_batch=2) as (app, api):
        api.connect()
        start = time.monotonic()
        api.query(images(12), "student")
        late = [moment - start for moment in app.times if moment - start > 0.3]
        # The requests that were under way with the first one may be through; nothing else is sent before time.
        assert app.posts == 7 and app.rows == 12
        assert len(late) >= 4 and min(late) >= 0.49
        assert events(api)["seconds_waiting"] >= 0.45


def test_an_answer_that_comes_too_late_is_paid_for_twice() -> None:
    x = images(4)
    with service(LATE, read_timeout=0.2) as (app, api):
        torch.testing.assert_close(api.query(x, "student"), expected(x), rtol=1e-6, atol=1e-6)
        row = events(api)
        assert app.rows == row["rows"] == 8
        assert (row["rows_unanswered"], row["retries"]) == (4, 1)


@pytest.mark.parametrize("failure", [LATE, Failure(drop=True)])
def test_a_retry_of_spent_rows_needs_room_in_the_budget(failure: Failure) -> None:
    with service(failure, read_timeout=0.2, ledger=QueryLedger(total=7)) as (app, api):
        with pytest.raises(QueryBudgetExceeded, match="asked 4 rows, but 4 of the budget of 7"):
            api.query(images(4), "student")
        assert app.rows == events(api)["rows"] == 4
        api.query(images(3), "student")
        assert app.rows == events(api)["rows"] == 7


def test_a_connection_that_breaks_is_made_again() -> None:
    x = images(4)
    with service(Failure(drop=True)) as (app, api):
        torch.testing.assert_close(api.query(x, "student"), expected(x), rtol=1e-6, atol=1e-6)
        assert app.rows == events(api)["rows"] == 8


def test_a_budget_that_is_too_small_sends_nothing() -> None:
    with service(ledger=QueryLedger(total=10)) as (app, api):
        with pytest.raises(QueryBudgetExceeded):
            api.query(images(11), "student")
        assert (app.posts, app.rows) == (0, 0)
        api.query(images(10), "student")
        assert app.rows == 10


def test_eight_threads_never_send_more_than_the_budget() -> None:
    plan = {3: BUSY, 5: LATE, 11: Failure(drop=True), 13: Failure(502)}
    with service(ledger=QueryLedger(per_api=100), always=plan.get, read_timeout=0.2, max_inflight=2) as (app, api):
        answered, lock = [0], threading.Lock()

        def work(seed: int) -> None:
            for turn in range(4):
                try:
                    api.query(images(7, 10 * seed + turn), "gen_dirs")
                except QueryBudgetExceeded:
                    continue
                with lock:
                    answered[0] += 7

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert api.ledger is not None
        assert app.rows == api.ledger.spent() <= 100
        assert 60 < answered[0] <= app.rows and api.ledger.remaining("remote") == 100 - app.rows


def test_images_asked_again_come_from_the_cache_for_nothing() -> None:
    x = images(6)
    with service(cache_rows=100) as (app, api):
        first, again = api.query(x, "real"), api.query(x, "real")
        assert torch.equal(first, again)
        assert (app.rows, events(api)["rows"], events(api)["cache_hits"]) == (6, 6, 6)


def test_the_first_failure_calls_the_other_requests_off() -> None:
    def fail_one(number: int) -> Failure:
        return Failure(400) if number == 1 else Failure(delay=0.05)

    with service(always=fail_one, max_inflight=2) as (app, api):
        with pytest.raises(APIResponseError, match="answered 400"):
            api.query(images(400), "student")
        assert app.posts <= 4
        assert api.ledger is not None and api.ledger.spent() == app.rows
        assert api.ledger.remaining("remote") is None


def test_limits_of_rows_hold() -> None:
    def seconds(rows: int) -> float:
        # Seen from here: a busy machine makes it longer only.
        start = time.monotonic()
        api.query(images(rows), "student")
        return time.monotonic() - start

    with service(rate_rows_per_s=100) as (app, api):
        # Six requests of 4 rows: the last one is sent when 20 rows are paid.
        assert seconds(24) >= 0.18
        api.share_rate(2)
        assert seconds(8) >= 0.07
        assert app.rows == 32


def test_the_model_at_the_service_must_be_the_one_that_is_asked_for() -> None:
    with service(model="other") as (app, api):
        with pytest.raises(APIResponseError, match="answered 404: there is no model 'other' here, only 'model'"):
            api.connect()
        assert app.posts == 0
    with service(input_shape=(1, 2, 8)) as (app, api):
        with pytest.raises(ValueError, match=r"of the shape \[-1, 1, 4, 4\], and these are \(N, 1, 2, 8\)"):
            api.query(torch.zeros(2, 1, 2, 8), "student")
        assert app.posts == 0
        assert api.ledger is not None and api.ledger.spent() == 0


def test_what_is_prepared_is_what_is_sent() -> None:
    x = images(5)
    double = nn.Parameter(torch.tensor(2.0))
    with service(preprocess=lambda small: (double * small).clamp(-1, 1)) as (_, api):
        torch.testing.assert_close(api.query(x, "student"), expected((2 * x).clamp(-1, 1)), rtol=1e-6, atol=1e-6)


def own_format(answers: Any, **options: Any) -> tuple[Any, Callable[[str], HTTPAPI]]:
    """A service that takes any bytes; what `answers` makes of n images is its answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def api(url: str) -> HTTPAPI:
        encode = options.pop("encode", lambda array: (array.tobytes(), {}))
        return HTTPAPI(url, "custom", CLASSES, name="own", encode=encode, decode=lambda body, n: answers(n), **options)

    return app, api


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda n: np.full((n, 10), 0.1), "API 'own' returned 10 columns for 3 declared classes"),
        (lambda n: np.full((n - 1, 3), 1 / 3), r"shape \(4, 3\) for 5 images"),
        (lambda n: np.full((n, 3), np.nan), "API 'own' returned .*nan.* in row 0"),
        (lambda n: np.array([[-7.2, 5.3, 5.0]] * n), "looks like logits .*set output='logits'"),
        (lambda n: np.zeros(()), r"shape \(\) for 5 images"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(answers: Any, message: str) -> None:
    app, make = own_format(answers)
    with serving(app) as url, make(url) as api, pytest.raises(APIResponseError, match=message):
        api.query(images(5), "student")


@pytest.mark.parametrize("column", [True, False])
def test_labels_become_smoothed_probabilities(column: bool) -> None:
    app, make = own_format(lambda n: np.arange(n).reshape((n, 1) if column else n) % 3, output="label", max_batch=6)
    with serving(app) as url, make(url) as api:
        assert api.query(images(6), "student").argmax(1).tolist() == [0, 1, 2, 0, 1, 2]


def test_channels_last_is_what_the_service_gets() -> None:
    seen = []
    app, make = own_format(
        lambda n: np.full((n, 3), 1 / 3), channels_last=True, encode=lambda a: (seen.append(a) or b"", {})
    )
    x = torch.rand(2, 3, 4, 5)
    with serving(app) as url, make(url) as api:
        api.query(x, "student")
    assert np.array_equal(seen[0], x.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "grpc"}, "protocol must be one of oip, oip_binary, tfserving, image, custom, got 'grpc'"),
        ({"protocol": "image"}, "protocol='image' needs label_map"),
        ({"protocol": "image", "label_map": {"a": 3, "b": 9, "c": 5}}, r"\[3, 7, 5\] once, got the labels \[3, 5, 9"),
        ({"label_map": {"a": 3}}, "label_map does nothing with protocol='oip_binary'"),
        ({"protocol": "custom", "encode": lambda a: (b"", {})}, "needs both encode and decode"),
        ({"max_inflight": 0}, "max_inflight and max_tries must be at least 1"),
        ({"read_timeout": 0}, "read_timeout above 0 s"),
        ({"rate_rows_per_s": 0}, "rate per second must be a positive number"),
        ({"classes": ()}, "must be distinct labels"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HTTPAPI("http://127.0.0.1:1", **{"classes": CLASSES, **options})


def test_png_services_get_one_image_per_request_and_say_that_they_take_eight_bits() -> None:
    names = {"three": 3, "five": 5, "seven": 7}
    api = HTTPAPI("http://127.0.0.1:1", "image", CLASSES, label_map=names, max_batch=64)
    assert (api.max_batch, api.input_quantization) == (1, "uint8")
    assert api._format.columns == {"three": 0, "five": 2, "seven": 1}  # type: ignore[attr-defined]


def test_answers_do_not_touch_the_training_s_random_numbers() -> None:
    with service(BUSY) as (_, api):
        state = torch.get_rng_state()
        api.query(images(4), "student")
        assert torch.equal(state, torch.get_rng_state())


def test_an_api_can_be_closed_and_used_again_and_copied_ledgers_count_on() -> None:
    with service() as (app, api):
        api.query(images(4), "student")
        api.close()
        api.ledger = copy.deepcopy(api.ledger)
        api.query(images(4), "student")
        assert app.rows == events(api)["rows"] == 8
