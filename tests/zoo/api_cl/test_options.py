"""What a user sets: the price of an iteration, schedules, refusals."""

from __future__ import annotations

import itertools
import math

import pytest

from zoo.api_cl.options import at_least, check_memory, learning_rate_factor, one_of, queries_per_iteration


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("reuse_base", [False, True])
def test_an_iteration_costs_what_the_formula_says(central, reuse_base):
    for g_iter, m, b_g, d_iter in itertools.product((1, 2, 3), (1, 4), (8, 16), (1, 5)):
        b_s = 2 * b_g if reuse_base else 24
        per_sample = (2 * m if central else m) + 1
        found = queries_per_iteration(2, g_iter, b_g, per_sample, d_iter, b_s, reuse_base)
        # The base points of one round fit into one batch of the learner, however many rounds there are.
        saved = min(2 * g_iter * b_g, b_s) if reuse_base else 0
        assert sum(found.values()) == 2 * g_iter * per_sample * b_g + d_iter * b_s - saved
        assert found["gen_base"] == 2 * g_iter * b_g and found["gen_dirs"] == (per_sample - 1) * found["gen_base"]


def test_purposes_without_rows_are_left_out():
    assert queries_per_iteration(0, 1, 64, 2, 5, 128, True) == {"student": 640}
    assert queries_per_iteration(2, 0, 64, 2, 5, 128, True) == {"student": 640}
    assert queries_per_iteration(1, 1, 64, 1, 1, 64, True) == {"gen_base": 64}
    assert queries_per_iteration(2, 1, 64, 1, 2, 128, False) == {"gen_base": 128, "student": 256}


def test_the_proof_of_the_sheet_costs_what_it_says():
    # 2 tasks of 100 iterations: B_g = B_s = 64, m = 1, four steps of the learner.
    assert 200 * sum(queries_per_iteration(2, 1, 64, 2, 4, 64, False).values()) == 102_400


def test_multistep_falls_at_a_tenth_three_tenths_and_a_half():
    found = [learning_rate_factor("multistep", step, 20) for step in range(20)]
    wanted = [1.0] * 2 + [0.3] * 4 + [0.09] * 4 + [0.027] * 10
    assert found == pytest.approx(wanted)


def test_cosine_starts_at_one_and_falls_towards_zero():
    found = [learning_rate_factor("cosine", step, 10) for step in range(10)]
    assert found == pytest.approx([math.cos(math.pi * step / 20) ** 2 for step in range(10)])
    assert [learning_rate_factor("none", step, 10) for step in (0, 9)] == [1.0, 1.0]
    assert learning_rate_factor("multistep", 0, 1) == learning_rate_factor("cosine", 0, 1) == 1.0


def test_values_out_of_range_are_named():
    one_of("method", "ours", ("ours", "noise"))
    with pytest.raises(ValueError, match="method must be one of ours, noise, got 'mine'"):
        one_of("method", "mine", ("ours", "noise"))
    at_least(1, latent_dim=1, generator_batch_size=2)
    with pytest.raises(ValueError, match="generator_batch_size must be at least 1, got 0"):
        at_least(1, latent_dim=1, generator_batch_size=0)
    with pytest.raises(ValueError, match="lr must be at least 0, got nan"):
        at_least(0, lr=float("nan"))


def test_a_memory_that_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="memory_size=9 is smaller than the 10 classes"):
        check_memory(9, 10, "none", False, 0)
    with pytest.raises(ValueError, match=r"similarity=cka compares .* memory_size is 0"):
        check_memory(0, 10, "cka", True, 8)
    with pytest.raises(ValueError, match=r"similarity=cka needs 4 remembered images a step, but .* is 3"):
        check_memory(10, 10, "cka", True, 3)


@pytest.mark.parametrize(
    "arguments",
    [(10, 10, "cka", True, 4), (0, 10, "none", True, 4), (0, 10, "cka", False, 4), (10, 10, "cosine", True, 1)],
)
def test_a_memory_that_serves_is_not(arguments):
    check_memory(*arguments)
