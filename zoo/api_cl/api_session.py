"""The API of the present task: its precision, its answers in the task's order, and what its budget still allows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from zoo.api_cl.boxes import CallableAPI, ModuleAPI
from zoo.api_cl.gaps import ResponseGap
from zoo.api_cl.ledger import QueryLedger
from zoo.api_cl.responses import grid_decimals
from zoo.api_cl.zeroth_order import ZerothOrderGradient, check_step_size, step_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from zoo.api_cl.black_box import BlackBoxAPI

_LOCAL = (ModuleAPI, CallableAPI)


class APISession:
    """Asks one API for the images of one task.

    Args:
        api: The API.
        columns: The task's global labels, in the order of the answers that are wanted.
        ledger: Counts and limits what is asked.
        image_size: Numbers in an image.
        estimator: Options of `ZerothOrderGradient`, of which `eps` may be "auto".
        gap: Kind of the generators' response gap.
        tau: Its temperature.
        gen_grad: How generators get a gradient.
        probe: Makes images to find the API's precision with, where it is not declared; they are counted.
        decimals: What a probe found earlier, -1 for an API that does not round; None to find out.
    """

    def __init__(
        self,
        api: BlackBoxAPI,
        columns: Sequence[int],
        ledger: QueryLedger,
        image_size: int,
        estimator: Mapping[str, Any],
        gap: str = "l1",
        tau: float = 1.0,
        gen_grad: str = "zo",
        probe: Callable[[], Tensor] | None = None,
        decimals: int | None = None,
    ) -> None:
        self.api, self.ledger = api, ledger
        api.ledger = ledger
        self._order = _order(api, columns)
        self.gen_grad, gap_kind = gen_grad, gap
        if api.output == "label" and gen_grad == "zo":
            self._say("tells labels only, of which differences are zero nearly everywhere: gen_grad=surrogate is used")
            self.gen_grad = "surrogate"
        self.decimals = api.decimals
        if self.decimals is None and not isinstance(api, _LOCAL) and self.gen_grad == "zo":
            if decimals is None and probe is not None:
                found = grid_decimals(self.ask(probe(), "probe"))
                decimals = -1 if found is None else found
            self.decimals = None if decimals in (None, -1) else decimals
        eps = estimator["eps"]
        if eps == "auto":
            eps = step_size(self.decimals, api.input_quantization, image_size)
        elif self.gen_grad == "zo":
            text = check_step_size(eps, self.decimals, api.input_quantization, image_size)
            if text is not None:
                self._say(text)
        self.estimator = ZerothOrderGradient(**{**estimator, "eps": float(eps)})
        if self.decimals is not None and self.decimals <= 3 and gap_kind == "l1" and self.gen_grad == "zo":
            self._say(f"rounds to {self.decimals} decimals, whose logarithms are noise: generator_gap=l1_prob is used")
            gap_kind = "l1_prob"
        self.gap = ResponseGap(gap_kind, tau if gap_kind == "kl" else 1.0)

    def _say(self, text: str) -> None:
        warnings.warn(f"API {self.api.name!r} {text}", stacklevel=4)

    @property
    def probed(self) -> int:
        """What a later session needs as `decimals` to ask nothing."""
        return -1 if self.decimals is None else self.decimals

    def ask(self, images: Tensor, purpose: str | Mapping[str, int]) -> Tensor:
        """Responses `(N, C)` in the order of the task's classes.

        Args:
            images: `(N, c, h, w)` in [-1, 1].
            purpose: What for; or how many of the rows are for what. They are sent together all the same.
        """
        if isinstance(purpose, str):
            return self.api.query(images, purpose)[:, self._order]
        main = max(purpose, key=lambda name: purpose[name])
        probs = self.api.query(images, main)[:, self._order]
        for name, rows in purpose.items():
            if name != main and rows:
                self.ledger.reassign(self.api.name, main, name, rows)
        return probs

    def differentiable(self, images: Tensor) -> Tensor:
        """Responses with their graph, of an API that exposes it; counted."""
        assert isinstance(self.api, ModuleAPI)
        return self.api.differentiable(images)[:, self._order]

    def allows(self, rows: int) -> bool:
        """Whether the budget has so many rows left."""
        remaining = self.ledger.remaining(self.api.name)
        return remaining is None or remaining >= rows


def look(api: BlackBoxAPI, columns: Sequence[int], images: Tensor) -> Tensor | None:
    """Responses of a local API outside the budget and uncounted, for measuring agreement; None of any other.

    Args:
        api: The API.
        columns: The task's global labels, in the order of the answers that are wanted.
        images: `(N, c, h, w)` in [-1, 1].
    """
    if not isinstance(api, _LOCAL):
        return None
    ledger, api.ledger = api.ledger, None
    try:
        return api.query(images, "probe")[:, _order(api, columns)]
    finally:
        api.ledger = ledger


def _order(api: BlackBoxAPI, columns: Sequence[int]) -> list[int]:
    place = {label: column for column, label in enumerate(api.classes)}
    return [place[label] for label in columns]


def shared_ledger(ledger: QueryLedger, world: int) -> QueryLedger:
    """The ledger of one of several processes: an equal part of the budgets."""
    if world == 1:
        return ledger
    parts = [None if budget is None else max(1, budget // world) for budget in (ledger.total, ledger.per_api)]
    own = QueryLedger(parts[0], parts[1], ledger.on_exhausted)
    own.load_state_dict(ledger.state_dict())
    return own
