"""Beginning and end of a task: fresh head rows and generators, the task's API, and what its budget allows."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zoo.api_cl.api_session import APISession
from zoo.api_cl.networks import reset_head_rows
from zoo.api_cl.options import queries_per_iteration
from zoo.api_cl.stream_training import StreamTraining
from zoo.common.reproducibility import mix, run_seed

if TYPE_CHECKING:
    from zoo.api_cl.black_box import BlackBoxAPI

_PROBED = 32
"""Images with which an API's precision is found."""


class StreamTasks(StreamTraining):
    """Opens tasks and ends them early; `APIStreamCL` sets what is declared here.

    Attributes:
        reset_generators: Whether each task starts with fresh generators.
        gen_grad: How generators get a gradient.
    """

    reset_generators: bool
    gen_grad: str
    _apis: list[BlackBoxAPI]
    _estimator: dict[str, Any]
    _gap_name: str
    _tau: float

    def _open_task(self, task: int) -> None:
        if self.task is not None and self.resumed:
            self.fill_row(self.task)
        self.resumed = False
        if self.task is not None:
            self.previous.load_state_dict(self.learner.state_dict())
        fresh = self.sets.task_classes[task]
        seed = mix(run_seed(self.seed), task)
        reset_head_rows(self.learner.head, fresh, torch.Generator().manual_seed(seed))
        if self.task is not None and self.reset_generators:
            # All processes draw the same weights, and nothing that is drawn elsewhere shifts.
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                for module in self.generators.modules():
                    reset = getattr(module, "reset_parameters", None)
                    if reset is not None:
                        reset()
        for optimizer in self._optimizers():
            optimizer.state.clear()
        self.task, self.done, self.exhausted, self.decimals, self.session = task, 0, False, None, None
        self.real.clear()
        self.iterations = self._length()
        self.history.setdefault("start", []).append(torch.tensor(float(len(self.history.get("loss", ())))))

    def _length(self) -> int:
        """Iterations of the task: batches of an epoch."""
        count = self.trainer.num_training_batches
        return int(count) if math.isfinite(count) else 1

    def _open_session(self, task: int, batch: Any) -> None:
        self.session = APISession(
            self._apis[task], self.sets.task_classes[task], self.ledger, math.prod(self.image_shape), self._estimator,
            self._gap_name, self._tau, self.gen_grad, partial(self._probe_images, task, batch), self.decimals,
        )  # fmt: skip
        self.decimals = self.precisions[task] = self.session.probed
        self._columns = self.sets.columns(task, self.device)
        self._check_budget(self._apis[task].name, self._rows(batch))

    def _check_budget(self, api: str, rows: dict[str, int]) -> None:
        """Refuse a budget that does not last for one iteration; later on a budget that has ended is no mistake."""
        remaining = self.ledger.remaining(api)
        if self.ledger.spent() or remaining is None or remaining >= sum(rows.values()):
            return
        parts = " + ".join(f"{count} {purpose}" for purpose, count in rows.items())
        raise ValueError(
            f"an iteration asks API {api!r} for {sum(rows.values())} rows ({parts}), but only {remaining} are left: "
            "raise budget or budget_per_api, or lower num_directions, student_steps or the batch sizes"
        )

    def _probe_images(self, task: int, batch: Any) -> Tensor:
        self._check_budget(self._apis[task].name, {"probe": _PROBED, **self._rows(batch)})
        rng = torch.Generator(self.device).manual_seed(mix(run_seed(self.seed), task))
        return torch.randn(_PROBED, *self.image_shape, generator=rng, device=self.device).tanh()

    def _rows(self, batch: Any) -> dict[str, int]:
        """Rows that an iteration on a batch asks for, by purpose; real images only where there is a budget."""
        rows = self.queries()
        if self.distill_real and batch.images is not None and (self.ledger.total or self.ledger.per_api):
            rows["real"] = self.real.unseen(batch.images.float())
        return rows

    def queries(self) -> dict[str, int]:
        """Rows that an iteration asks for, by purpose, per process; real images come on top, once each."""
        if not self.asks:
            return {}
        trained = 0 if self.method == "frozen_generator" else len(self.generators)
        mode = self.gen_grad if self.session is None else self.session.gen_grad
        m = int(self._estimator["num_directions"])
        rows = (2 if self._estimator["central"] else 1) * m + 1 if mode == "zo" else 1
        return queries_per_iteration(
            trained, self.generator_steps, self.generator_batch_size, rows, self.student_steps,
            self.student_batch_size, self.reuse_base,
        )  # fmt: skip

    def _may_go_on(self, batch: Any) -> bool:
        if not self.asks or self.exhausted or self.ledger.on_exhausted == "raise":
            return not self.exhausted
        assert self.session is not None
        short = not self.session.allows(sum(self._rows(batch).values()))
        if self.world > 1 and (self.ledger.total or self.ledger.per_api):
            # All processes stop together.
            flag = torch.tensor(float(short), device=self.device)
            short = bool(self.trainer.strategy.reduce(flag, reduce_op="sum") > 0)
        if short:
            self._stop_task(f"{self.ledger.remaining(self.session.api.name)} rows are left")
        return not short

    def _stop_task(self, why: str) -> None:
        self.exhausted = True
        rank_zero_warn(f"task {self.task} ends after {self.done} iterations, as the budget of queries does: {why}")
