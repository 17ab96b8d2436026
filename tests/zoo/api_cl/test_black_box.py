"""What every black box does alike: checks, chunks, the ledger and the cache."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from zoo.api_cl.black_box import APIResponseError, BlackBoxAPI
from zoo.api_cl.ledger import QueryBudgetExceeded, QueryLedger

IMAGES = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Brightness(BlackBoxAPI):
    """Two classes by mean brightness; keeps what it was sent, and fails on request."""

    def __init__(self, *, fail_at=None, **options):
        super().__init__(**{"classes": [3, 7], "name": "light", "output": "logits"} | options)
        self.sent = []
        self.fail_at = fail_at

    def _answer(self, images):
        if len(self.sent) == self.fail_at:
            raise OSError("gone")
        self.sent.append(images.clone())
        bright = images.mean(dim=(1, 2, 3))
        return torch.stack([bright, -bright], dim=1)


def expected(images):
    bright = images.mean(dim=(1, 2, 3))
    return torch.stack([bright, -bright], dim=1).softmax(1)


@pytest.mark.parametrize("max_batch", [1, 3, 10, 100])
def test_chunks_keep_the_order_of_the_images(max_batch):
    box = Brightness(max_batch=max_batch)
    torch.testing.assert_close(box.query(IMAGES, "student"), expected(IMAGES))
    assert [len(chunk) for chunk in box.sent] == [min(max_batch, 10 - row) for row in range(0, 10, max_batch)]


def test_each_row_and_request_is_counted_once():
    ledger = QueryLedger()
    box = Brightness(max_batch=4, ledger=ledger)
    box.query(IMAGES, "gen_dirs")
    box.query(IMAGES[:2], "student")
    (row,) = ledger.summary()
    assert (row["api"], row["rows"], row["gen_dirs"], row["student"], row["requests"]) == ("light", 12, 10, 2, 4)


def test_a_budget_that_ends_within_a_query_costs_nothing():
    box = Brightness(max_batch=4, ledger=QueryLedger(per_api=9))
    with pytest.raises(QueryBudgetExceeded, match="'light' was to be asked 10 rows, but 0 of the budget of 9"):
        box.query(IMAGES, "student")
    assert not box.sent and box.ledger.remaining("light") == 9
    box.query(IMAGES[:9], "student")
    assert box.ledger.remaining("light") == 0


def test_a_failure_spends_what_was_answered_only():
    box = Brightness(max_batch=4, ledger=QueryLedger(per_api=20), fail_at=1)
    with pytest.raises(OSError, match="gone"):
        box.query(IMAGES, "student")
    assert (box.ledger.spent("light"), box.ledger.remaining("light")) == (4, 16)


def test_queries_of_eight_threads_stay_within_the_budget():
    class Slow(Brightness):
        def _answer(self, images):
            time.sleep(0.001)
            return super()._answer(images)

    box = Slow(max_batch=2, ledger=QueryLedger(per_api=50))

    def ask(rows):
        try:
            torch.testing.assert_close(box.query(IMAGES[:rows], "student"), expected(IMAGES[:rows]))
        except QueryBudgetExceeded:
            return 0
        return rows

    with ThreadPoolExecutor(8) as pool:
        answered = sum(pool.map(ask, [3, 4, 5, 6] * 8))
    assert sum(len(chunk) for chunk in box.sent) == answered == box.ledger.spent()
    assert 48 <= answered <= 50


def test_no_image_is_no_query():
    box = Brightness(ledger=QueryLedger(), cache_rows=4)
    assert box.query(IMAGES[:0], "real").shape == (0, 2)
    assert not box.sent and box.ledger.summary() == []


def test_images_asked_again_for_real_cost_nothing():
    box = Brightness(cache_rows=10, ledger=QueryLedger(per_api=10))
    first = box.query(IMAGES[:6], "real")
    again = box.query(IMAGES[[5, 0, 7, 5, 7, 8]], "real")
    torch.testing.assert_close(again, expected(IMAGES[[5, 0, 7, 5, 7, 8]]))
    assert torch.equal(again[:2], first[[5, 0]])
    assert torch.equal(box.sent[1], IMAGES[[7, 8]])
    (row,) = box.ledger.summary()
    assert (row["rows"], row["cache_hits"]) == (8, 4)


def test_the_cache_forgets_what_was_not_used_for_longest():
    box = Brightness(cache_rows=2, ledger=QueryLedger())
    for rows in ([0], [1], [0], [2]):
        box.query(IMAGES[rows], "real")
    box.query(IMAGES[[0]], "real")
    assert box.ledger.spent() == 3
    box.query(IMAGES[[1]], "real")
    assert box.ledger.spent() == 4


def test_a_query_larger_than_the_cache_is_answered():
    box = Brightness(cache_rows=3)
    for _ in range(2):
        torch.testing.assert_close(box.query(IMAGES, "real"), expected(IMAGES))


def test_synthetic_images_are_not_cached():
    box = Brightness(cache_rows=10, ledger=QueryLedger())
    for purpose in ("real", "student", "student"):
        box.query(IMAGES, purpose)
    (row,) = box.ledger.summary()
    assert (row["rows"], row["student"], row["cache_hits"]) == (30, 20, 0)


def test_a_cached_answer_is_not_changed_by_its_user():
    box = Brightness(cache_rows=10)
    for _ in range(3):
        probs = box.query(IMAGES, "real")
        torch.testing.assert_close(probs, expected(IMAGES))
        probs.zero_()


@pytest.mark.parametrize("cache_rows", [0, 10])
def test_answers_asked_for_in_inference_mode_may_be_targets_of_a_loss(cache_rows):
    box = Brightness(cache_rows=cache_rows)
    with torch.inference_mode():
        probs = [box.query(IMAGES.clone(), "real") for _ in range(2)]
    logits = torch.zeros(10, 2, requires_grad=True)
    for target in probs:
        assert not target.is_inference() and not target.requires_grad
        F.kl_div(logits.log_softmax(1), target, reduction="batchmean").backward()
        (logits.softmax(1) * target).sum().backward()


def test_a_service_that_works_in_place_accepts_images_made_in_inference_mode():
    with torch.inference_mode():
        images = IMAGES.clone()
    box = Brightness(preprocess=lambda x: x.clamp_(min=0))
    torch.testing.assert_close(box.query(images, "student"), expected(IMAGES.clamp(min=0)))


def test_the_service_receives_preprocessed_images():
    box = Brightness(preprocess=lambda x: F.interpolate(x, scale_factor=2) * 3)
    box.query(IMAGES, "student")
    torch.testing.assert_close(box.sent[0], F.interpolate(IMAGES, scale_factor=2) * 3)


def test_a_preprocess_that_works_in_place_leaves_the_callers_images_alone():
    images = IMAGES.clone()
    Brightness(preprocess=lambda x: x.sub_(0.5).div_(0.5)).query(images, "student")
    assert torch.equal(images, IMAGES)


def test_eight_bit_services_see_grey_levels_only():
    box = Brightness(input_quantization="uint8")
    box.query(torch.cat([IMAGES, torch.full((1, 1, 4, 4), 1.0), torch.full((1, 1, 4, 4), -1.0)]), "student")
    levels = (box.sent[0].double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert (box.sent[0][:10] - IMAGES).abs().max() <= 1 / 255 + 1e-6
    assert box.sent[0][10].eq(1).all() and box.sent[0][11].eq(-1).all()
    # Images that are 8-bit already pass unchanged.
    exact = torch.arange(256).reshape(1, 1, 16, 16) / 127.5 - 1
    torch.testing.assert_close(box.prepared(exact), exact, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("given", "wanted"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_answers_are_single_precision_but_for_double_images(given, wanted):
    box = Brightness()
    assert box.query(IMAGES.to(given), "student").dtype == wanted
    assert box.sent[0].dtype == wanted


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES * 1.5, r"API 'light' must lie in \[-1, 1\], got values from -1.4"),
        (IMAGES.clone().fill_(float("nan")), r"must lie in \[-1, 1\], got values from nan"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"floating point in \[-1, 1\], got torch.uint8; .* x / 127.5 - 1"),
        (torch.zeros(2, 1, 4, 5), r"the shape \(2, 1, 4, 5\), expected \(N, 1, 4, 4\)"),
        (torch.zeros(1, 4, 4), r"the shape \(1, 4, 4\), expected \(N, 1, 4, 4\)"),
        (IMAGES.clone().requires_grad_(), r"gives no gradient, but the images require one: pass images.detach\(\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_sent(images, message):
    box = Brightness(input_shape=[1, 4, 4], ledger=QueryLedger())
    with pytest.raises(ValueError, match=message):
        box.query(images, "student")
    assert not box.sent and box.ledger.spent() == 0


def test_any_four_dimensional_images_pass_where_no_shape_is_declared():
    assert Brightness().query(torch.zeros(2, 3, 5, 7), "student").shape == (2, 2)
    with pytest.raises(ValueError, match=r"expected \(N, c, h, w\)"):
        Brightness().query(torch.zeros(2, 3), "student")


def test_an_unknown_purpose_is_refused_without_a_ledger_too():
    with pytest.raises(ValueError, match="purpose must be one of"):
        Brightness().query(IMAGES, "training")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: torch.zeros(n - 1, 2), r"API 'light' returned responses of shape \(9, 2\) for 10 images"),
        (lambda n: torch.tensor(0.0), r"shape \(\) for 10 images"),
        (lambda n: torch.zeros(n, 3), "API 'light' returned 3 columns for 2 declared classes"),
        (lambda n: torch.full((n, 2), float("nan")), r"API 'light' returned \[nan, nan\] in row 0"),
    ],
)
def test_an_answer_that_cannot_be_used_names_the_api_and_is_counted(answer, message):
    box = Brightness(ledger=QueryLedger())
    box._answer = lambda images: answer(len(images))
    with pytest.raises(APIResponseError, match=message):
        box.query(IMAGES, "student")
    assert box.ledger.spent() == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must not be empty"),
        ({"classes": [1, 2, 1]}, r"classes of API 'light' must be distinct .* got \[1, 2, 1\] with \[1\] repeated"),
        ({"classes": []}, r"distinct labels from 0 up, got \[\]"),
        ({"classes": [-1, 2]}, r"from 0 up, got \[-1, 2\]$"),
        ({"output": "scores"}, "output of API 'light' must be one of probs, logits, topk, label, got 'scores'"),
        ({"input_quantization": "int8"}, "input_quantization of API 'light' must be None or 'uint8', got 'int8'"),
        ({"decimals": 0}, "decimals of API 'light' must be at least 1, or None, got 0"),
        ({"max_batch": 0}, "max_batch=0, cache_rows=0"),
        ({"cache_rows": -1}, "max_batch=4096, cache_rows=-1"),
        ({"input_shape": [28, 28]}, r"input_shape of API 'light' must be \(c, h, w\), each at least 1, got \(28, 28\)"),
    ],
)
def test_a_box_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Brightness(**options)
