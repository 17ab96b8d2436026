"""The ledger against rows counted at the services, and what happens as a budget ends."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.zoo.api_cl.small_stream import ITERATIONS, QUIET, SHAPE, apis, counted, data, fit, network, stream, weights
from zoo.api_cl import BlackBoxAPI, QueryBudgetExceeded

pytestmark = QUIET
B_G, B_S, STEPS = 6, 12, 2


def formula(m: int, *, central: bool = False, reuse: bool = False, rounds: int = 1, generators: int = 2) -> int:
    """Rows of an iteration."""
    points = 2 * m + 1 if central else m + 1
    return generators * rounds * points * B_G + STEPS * B_S - (generators * B_G if reuse else 0)


CASES: list[tuple[dict[str, Any], int]] = [
    ({}, formula(1)),
    ({"num_directions": 3}, formula(3)),
    ({"num_directions": 3, "central": True}, formula(3, central=True)),
    ({"num_directions": 3, "reuse_base": True}, formula(3, reuse=True)),
    ({"num_directions": 3, "reuse_base": True, "generator_steps": 2}, formula(3, reuse=True, rounds=2)),
    ({"generator_steps": 0, "reuse_base": True}, STEPS * B_S),
    ({"method": "single_generator", "num_directions": 3}, formula(3, generators=1)),
    ({"method": "frozen_generator"}, STEPS * B_S),
    ({"method": "frozen_generator", "reuse_base": True}, STEPS * B_S),
    ({"method": "noise"}, STEPS * B_S),
    ({"method": "sequential"}, formula(1)),
    ({"gen_grad": "surrogate"}, formula(0)),
    ({"gen_grad": "whitebox", "api": {"expose_gradient": True}}, formula(0)),
    ({"gen_grad": "surrogate", "api": {"label_only": True}}, formula(0)),
    ({"api": {"max_batch": 5}}, formula(1)),
]


@pytest.mark.parametrize(("options", "rows"), CASES, ids=lambda value: str(value))
def test_the_ledger_counts_what_reaches_the_services_and_that_is_the_formula(tmp_path, options, rows: int):
    options = dict(options)
    boxes = apis(**options.pop("api", {}))
    model = stream(boxes, **options)
    assert sum(model.queries().values()) == rows
    fit(tmp_path, model, data(iterations_per_task=2), limit_val_batches=1.0)
    measured = 20  # Validation asks a local service for its agreement, outside of the ledger.
    seen = [3 * measured] * 3
    assert counted(boxes) == [2 * rows + extra for extra in seen]
    assert [model.ledger.spent(box.name) for box in boxes] == [2 * rows] * 3
    for row in model.ledger.summary():
        for purpose, asked in model.queries().items():
            assert row[purpose] == 2 * asked
        assert row["rows"] == sum(row[purpose] for purpose in ("gen_base", "gen_dirs", "student", "real", "probe"))
    requests = model.ledger.summary()[0]["requests"]
    if boxes[0].max_batch == 5:
        # A round asks for all points at once, a step of the learner for its images.
        assert requests == 2 * (-(-2 * 2 * B_G // 5) + STEPS * -(-B_S // 5))


@pytest.mark.parametrize("distill", [True, False])
def test_every_real_image_is_asked_for_once(tmp_path, distill: bool):
    boxes = apis()
    model, source = stream(boxes, distill_real=distill), data(real_fraction=0.5)
    fit(tmp_path, model, source)
    extra = [len(source.real(task)[1]) * distill for task in range(3)]
    assert ITERATIONS * 8 >= 10 and extra == [10 * distill] * 3
    assert counted(boxes) == [ITERATIONS * formula(1) + rows for rows in extra]
    assert [row["real"] for row in model.ledger.summary()] == extra
    assert [model.ledger.spent(box.name) for box in boxes] == counted(boxes)


@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_budget_ends_a_task_before_it_is_exceeded(tmp_path, iterations: int, distill: bool):
    boxes, q = apis(), formula(1)
    # A batch has 8 of the 10 real images of a task.
    real = min(10, 8 * iterations) * distill
    budget = iterations * q + real + q // 2
    model = stream(boxes, budget_per_api=budget, distill_real=distill)
    source = data(real_fraction=0.5 if distill else 0.0)
    with pytest.warns(UserWarning, match="ends after") as caught:
        fit(tmp_path, model, source)
    said = [str(warning.message) for warning in caught if "ends after" in str(warning.message)]
    assert len(said) == 3
    for task, text in enumerate(said):
        assert text.startswith(f"task {task} ends after {iterations} iterations")
    assert all(rows == model.ledger.spent(box.name) <= budget for rows, box in zip(counted(boxes), boxes, strict=True))
    assert counted(boxes) == [iterations * q + real] * 3
    # The memory still holds each task; the next one goes on as usual.
    assert set(model.memory.tasks) == {0, 1, 2} and model.exhausted


def test_real_images_that_do_not_fit_end_a_task_before_anything_else_is_asked(tmp_path):
    boxes, q = apis(), formula(1)
    model = stream(boxes, budget_per_api=2 * q + 9)
    with pytest.warns(UserWarning, match="ends after 1 iterations"):
        fit(tmp_path, model, data(real_fraction=0.5))
    assert counted(boxes) == [q + 8] * 3
    with pytest.raises(ValueError, match=re.escape("24 student + 8 real")):
        fit(tmp_path, stream(budget_per_api=q + 7), data(real_fraction=0.5))


def test_after_the_end_of_a_budget_for_all_services_later_tasks_are_not_learnt(tmp_path):
    boxes, q = apis(), formula(1)
    model = stream(boxes, budget=(ITERATIONS + 1) * q + 1)
    with pytest.warns(UserWarning, match="ends after") as caught:
        fit(tmp_path, model, limit_val_batches=1.0)
    said = [str(warning.message) for warning in caught if "ends after" in str(warning.message)]
    assert [text[:26] for text in said] == ["task 1 ends after 1 iterat", "task 2 ends after 0 iterat"]
    assert [model.ledger.spent(box.name) for box in boxes] == [ITERATIONS * q, q, 0]
    assert model.matrices["til"].matrix.isfinite().all()


def test_a_budget_of_just_the_stream_ends_nothing(tmp_path):
    boxes = apis()
    model = stream(boxes, budget=3 * ITERATIONS * formula(1), budget_per_api=ITERATIONS * formula(1))
    fit(tmp_path, model)
    assert model.ledger.remaining(boxes[0].name) == 0 and not model.exhausted and model.done == ITERATIONS


def test_a_budget_may_end_the_run(tmp_path):
    boxes = apis()
    model = stream(boxes, budget_per_api=100, on_exhausted="raise")
    with pytest.raises(QueryBudgetExceeded, match=r"'service0'.*budget of 100 rows"):
        fit(tmp_path, model)
    assert counted(boxes) == [model.ledger.spent(), 0, 0] and 48 <= counted(boxes)[0] <= 100


@pytest.mark.parametrize("limit", ["budget", "budget_per_api"])
@pytest.mark.parametrize("on_exhausted", ["stop_task", "raise"])
def test_less_than_an_iteration_is_refused_before_anything_is_asked(tmp_path, limit: str, on_exhausted: str):
    boxes, before = apis(), None
    model = stream(boxes, num_directions=3, on_exhausted=on_exhausted, **{limit: formula(3) - 1})
    before = weights(model.generators)
    with pytest.raises(ValueError, match=re.escape(f"{formula(3)} rows (12 gen_base + 36 gen_dirs + 24 student)")):
        fit(tmp_path, model)
    assert counted(boxes) == [0, 0, 0] and not model.ledger.summary()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model.generators).items())


class Stranger(BlackBoxAPI):
    """A service of which nothing is known: its precision is found out."""

    def __init__(self, task: int, classes: tuple[int, ...], decimals: int) -> None:
        super().__init__(classes, name=f"stranger{task}", input_shape=SHAPE)
        self.network, self.rounds, self.rows = network(task).eval(), decimals, 0

    @torch.no_grad()
    def _answer(self, images: torch.Tensor) -> torch.Tensor:
        self.rows += len(images)
        return torch.round(self.network(images).softmax(1), decimals=self.rounds)


def strangers(decimals: int) -> list[Stranger]:
    return [Stranger(task, classes, decimals) for task, classes in enumerate(((0, 1), (2, 3), (4, 5)))]


def test_the_probe_of_a_services_precision_is_counted(tmp_path):
    boxes = strangers(4)
    model = stream(boxes)
    fit(tmp_path, model)
    assert [box.rows for box in boxes] == [ITERATIONS * formula(1) + 32] * 3
    assert [row["probe"] for row in model.ledger.summary()] == [32] * 3
    assert model.decimals == 4


def test_a_service_that_rounds_coarsely_changes_the_gap(tmp_path):
    with pytest.warns(UserWarning, match="rounds to 2 decimals.*generator_gap=l1_prob"):
        fit(tmp_path, stream(strangers(2)))


def test_not_even_the_probe_is_sent_where_the_budget_is_too_small(tmp_path):
    boxes = strangers(4)
    model = stream(boxes, budget_per_api=formula(1) + 31)
    with pytest.raises(ValueError, match=re.escape("32 probe")):
        fit(tmp_path, model)
    assert [box.rows for box in boxes] == [0, 0, 0]


def test_a_probe_that_the_budget_has_no_rows_for_ends_the_task(tmp_path):
    boxes = strangers(4)
    model = stream(boxes, budget=ITERATIONS * formula(1) + 32 + 20)
    with pytest.warns(UserWarning, match=r"task [12] ends after 0 iterations"):
        fit(tmp_path, model)
    assert [box.rows for box in boxes] == [ITERATIONS * formula(1) + 32, 0, 0]
