"""Whatever an API returns becomes probabilities, and their logarithms give back what softmax kept."""

from __future__ import annotations

import warnings

import pytest
import torch

from zoo.api_cl.responses import centred, grid_decimals, log_responses, to_probabilities

LOGITS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))


def test_logits_become_their_softmax():
    torch.testing.assert_close(to_probabilities(LOGITS, "logits", 5), LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True))


def test_exact_probabilities_are_left_bitwise_as_they_are():
    probs = LOGITS.softmax(1)
    assert torch.equal(to_probabilities(probs, "probs", 5), probs)


def test_rows_near_a_sum_of_one_are_renormalised_with_a_warning_that_python_shows_once():
    raw = torch.tensor([[0.6031, 0.4024], [0.25, 0.75]])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            probs = to_probabilities(raw + 1e-7, "probs", 2, name="a")
    torch.testing.assert_close(probs, raw / torch.tensor([[1.0055], [1.0]]))
    assert [str(one.message) for one in seen] == [
        "API 'a': rows of its probabilities sum to 1 only within 0.01; they are renormalised"
    ]


def test_small_negative_probabilities_are_clamped():
    assert to_probabilities(torch.tensor([[-1e-7, 1.0]]), "probs", 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(("decimals", "declared"), [(2, True), (3, True), (3, False), (4, False), (6, False)])
def test_rounded_probabilities_stay_on_their_grid(decimals, declared):
    # Renormalised, they would look like those of an API that does not round.
    raw = torch.round(LOGITS.softmax(1), decimals=decimals)
    assert (raw.sum(1) - 1).abs().max() > 0.4 * 10**-decimals
    probs = to_probabilities(raw, "probs", 5, decimals=decimals if declared else None)
    assert torch.equal(probs, raw) and grid_decimals(probs) == decimals


def test_declared_decimals_allow_the_rounding_error_of_many_classes():
    raw = torch.round(torch.full((1, 100), 0.01) * 1.3, decimals=2)
    raw[0, :5] = 0.03
    assert to_probabilities(raw, "probs", 100, decimals=2).sum() == pytest.approx(1.1)
    with pytest.raises(ValueError, match=r"row 0 does not sum to 1 \(min 0.01, row sum 1.1\); set decimals"):
        to_probabilities(raw, "probs", 100)


def test_the_mass_that_topk_leaves_out_is_spread_over_the_unlisted_classes():
    raw = torch.tensor([[0.5, 0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.2, 0.2]])
    expected = torch.tensor([[0.5, 0.1, 0.2, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.2, 0.2]])
    torch.testing.assert_close(to_probabilities(raw, "topk", 5), expected)


def test_topk_scores_a_little_above_one_are_scaled_down():
    torch.testing.assert_close(
        to_probabilities(torch.tensor([[0.905, 0.1, 0.0]]), "topk", 3), torch.tensor([[0.905, 0.1, 0]]) / 1.005
    )
    with pytest.raises(ValueError, match="looks like logits"):
        to_probabilities(torch.tensor([[0.95, 0.1, 0.0]]), "topk", 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_become_smoothed_columns(dtype):
    probs = to_probabilities(torch.tensor([2, 0], dtype=dtype), "label", 3, label_smoothing=0.2)
    torch.testing.assert_close(probs, torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]))


def test_the_only_class_is_certain():
    assert to_probabilities(torch.tensor([0, 0]), "label", 1).tolist() == [[1], [1]]


@pytest.mark.parametrize(("given", "wanted"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_probabilities_have_at_least_single_precision(given, wanted):
    probs = to_probabilities(LOGITS.to(given), "logits", 5)
    assert probs.dtype == wanted
    torch.testing.assert_close(probs.sum(1), torch.ones(64, dtype=wanted))


@pytest.mark.parametrize("output", ["logits", "probs"])
def test_probabilities_keep_the_gradient_of_what_they_came_from(output):
    raw = LOGITS.softmax(1).clone().requires_grad_()
    to_probabilities(raw, output, 5)[:, 0].sum().backward()
    assert raw.grad is not None and raw.grad[:, 0].min() > 0


@pytest.mark.parametrize("output", ["probs", "logits", "topk"])
def test_no_row_gives_no_row(output):
    assert to_probabilities(torch.zeros(0, 3), output, 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("raw", "output", "message"),
    [
        (torch.zeros(2, 10), "probs", "API 'x' returned 10 columns for 2 declared classes"),
        (torch.zeros(4), "logits", r"API 'x' returned responses of shape \(4,\), expected \(N, 2\)"),
        (
            torch.tensor([[0.5, 0.5], [-7.2, 10.3]]),
            "probs",
            r"row 1 looks like logits \(min -7.2, row sum 3.1\); set output='logits'$",
        ),
        (torch.tensor([[-1.0, 2.0]]), "probs", r"min -1, row sum 1\)"),
        (torch.tensor([[0.5, 0.5], [0.6, 0.3]]), "probs", "row 1 does not sum to 1 .*output='topk' if it lists only"),
        (torch.tensor([[0.5, 0.5], [float("nan"), 1.0]]), "probs", r"API 'x' returned \[nan, 1.0\] in row 1"),
        (torch.tensor([[0.5, 0.5], [float("inf"), 1.0]]), "logits", r"\[inf, 1.0\] in row 1"),
        (torch.tensor([[0.5, 0.5], [float("-inf"), 1.0]]), "topk", r"\[-inf, 1.0\] in row 1"),
        (torch.tensor([0, 1, 2]), "label", "returned label 2 in row 2, expected a column from 0 to 1 of its 2"),
        (torch.tensor([0, -1]), "label", "returned label -1 in row 1"),
        (torch.tensor([0.0, 1.0]), "label", "torch.float32 of shape .* as integers"),
        (torch.zeros(2, 2, dtype=torch.int64), "label", r"shape \(2, 2\)"),
        (torch.zeros(2, 2), "softmax", "output must be one of probs, logits, topk, label, got 'softmax'"),
    ],
)
def test_what_is_no_response_is_refused(raw, output, message):
    with pytest.raises(ValueError, match=message):
        to_probabilities(raw, output, 2, name="x")


def test_a_smoothing_that_leaves_nothing_for_the_label_is_refused():
    with pytest.raises(ValueError, match="label_smoothing must lie from 0 to below 1, got 1"):
        to_probabilities(torch.tensor([0]), "label", 2, label_smoothing=1.0)


def test_centred_log_responses_are_the_centred_logits():
    logits = 2 * LOGITS.double()
    found = centred(log_responses(logits.softmax(1)))
    torch.testing.assert_close(found, logits - logits.mean(1, keepdim=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("decimals", "floor"), [(None, 1e-6), (3, 1e-3)])
def test_the_logarithm_ends_at_the_smallest_probability_the_api_can_tell(decimals, floor):
    found = log_responses(torch.tensor([0.0, 0.5]), decimals).exp()
    torch.testing.assert_close(found, torch.tensor([floor, 0.5]))


@pytest.mark.parametrize("decimals", range(1, 8))
def test_the_grid_of_rounded_responses_is_found(decimals):
    # From text, as a service sends it.
    parsed = torch.tensor([[float(f"{value:.{decimals}f}") for value in row] for row in LOGITS.softmax(1).tolist()])
    assert grid_decimals(parsed) == decimals
    # And from torch's own rounding in single precision.
    assert grid_decimals(torch.round(LOGITS.softmax(1), decimals=decimals)) == decimals


def test_unrounded_responses_lie_on_no_grid():
    assert grid_decimals(LOGITS.softmax(1)) is None
    assert grid_decimals(LOGITS.double().softmax(1)) is None
    assert grid_decimals(torch.zeros(0, 3)) is None


def test_no_more_decimals_are_tried_than_asked():
    assert grid_decimals(torch.tensor([0.1234]), most=3) is None
    assert grid_decimals(torch.tensor([0.1234]), most=4) == 4
