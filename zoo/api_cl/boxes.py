"""Black boxes without a network between: a module of one's own, and any NumPy function."""

from __future__ import annotations

import time
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from zoo.api_cl.black_box import APIResponseError, BlackBoxAPI
from zoo.api_cl.ledger import check_purpose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from zoo.api_cl.ledger import QueryLedger

__all__ = ["APIResponseError", "BlackBoxAPI", "CallableAPI", "ModuleAPI"]


class ModuleAPI(BlackBoxAPI):
    """A network of one's own as a black box, which can imitate the poverty of any service.

    The network is taken over: it is set to eval mode and frozen, and stays on its device and in its dtype. Pass a
    copy of one that goes on training.

    Args:
        module: From images `(N, c, h, w)` to scores `(N, C)`.
        classes: As in `BlackBoxAPI`, as are those that are not listed here.
        name: As in `BlackBoxAPI`.
        output: What the module returns: "logits" or "probs".
        decimals: Round the probabilities to so many decimals.
        topk: Tell only this many of the best probabilities; `output` of the API is "topk" then.
        label_only: Tell only the best class; `output` of the API is "label" then.
        latency: Seconds that each request takes more.
        expose_gradient: Allow `differentiable`, to measure what black-box access costs.
        input_shape: As in `BlackBoxAPI`.
        preprocess: As in `BlackBoxAPI`.
        input_quantization: As in `BlackBoxAPI`.
        max_batch: As in `BlackBoxAPI`.
        cache_rows: As in `BlackBoxAPI`.
        ledger: As in `BlackBoxAPI`.

    Raises:
        ValueError: If an argument is out of its range, or a gradient is to be exposed through an imitated poverty.
    """

    def __init__(
        self,
        module: nn.Module,
        classes: Sequence[int],
        *,
        name: str,
        output: str = "logits",
        decimals: int | None = None,
        topk: int | None = None,
        label_only: bool = False,
        latency: float = 0.0,
        expose_gradient: bool = False,
        input_shape: Sequence[int] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        input_quantization: str | None = None,
        max_batch: int = 4096,
        cache_rows: int = 0,
        ledger: QueryLedger | None = None,
    ) -> None:
        if output not in ("logits", "probs"):
            raise ValueError(
                f"output of ModuleAPI {name!r} is what the module returns, 'logits' or 'probs', got {output!r}; "
                "topk and label_only make it tell less"
            )
        if topk is not None and (label_only or not 1 <= topk <= len(classes)):
            raise ValueError(
                f"topk of ModuleAPI {name!r} must lie between 1 and its {len(classes)} classes, without label_only, "
                f"got {topk}"
            )
        if latency < 0:
            raise ValueError(f"latency of ModuleAPI {name!r} must be at least 0 s, got {latency}")
        poor = decimals is not None or topk is not None or label_only or input_quantization is not None
        if expose_gradient and poor:
            raise ValueError(
                f"ModuleAPI {name!r} with expose_gradient=True must have no decimals, topk, label_only or "
                "input_quantization: they have no gradient"
            )
        told = "label" if label_only else "topk" if topk is not None else output if decimals is None else "probs"
        super().__init__(
            classes,
            name=name,
            output=told,
            input_shape=input_shape,
            preprocess=preprocess,
            input_quantization=input_quantization,
            decimals=decimals,
            max_batch=max_batch,
            cache_rows=cache_rows,
            ledger=ledger,
        )
        self.module = module.eval().requires_grad_(False)
        self.topk, self.label_only, self.latency, self.expose_gradient = topk, label_only, latency, expose_gradient
        self._returned = output

    def differentiable(self, images: Tensor, purpose: str = "gen_base") -> Tensor:
        """Probabilities with a gradient in the images, which a black box does not give; its rows count as queries.

        Args:
            images: As in `query`; they may require a gradient.
            purpose: As in `query`.

        Returns:
            `(N, C)`, as in `query`.

        Raises:
            ValueError: If `expose_gradient` is False, or the images do not fit.
        """
        if not self.expose_gradient:
            raise ValueError(f"ModuleAPI {self.name!r} gives no gradient; build it with expose_gradient=True")
        check_purpose(purpose)
        self._check(images)
        return self._query(images, purpose)

    def prepared(self, images: Tensor) -> Tensor:
        """What the module receives, on its device and in its dtype."""
        weight = next(
            (w for w in chain(self.module.parameters(), self.module.buffers()) if w.is_floating_point()), None
        )
        images = images if weight is None else images.to(weight)
        # The caller's autocast is for its own network: differences of responses need all digits.
        with torch.autocast(images.device.type, enabled=False):
            return super().prepared(images)

    def _answer(self, images: Tensor) -> Tensor:
        if self.latency:
            time.sleep(self.latency)
        with torch.autocast(images.device.type, enabled=False):
            scores = self.module.eval()(images)
        if not isinstance(scores, Tensor):
            raise APIResponseError(f"the module of API {self.name!r} returned a {type(scores).__name__}, not a tensor")
        if not self.label_only and self.topk is None and self.decimals is None:
            return scores
        probs = self._probabilities(scores, self._returned)
        if self.label_only:
            return probs.argmax(dim=1)
        if self.topk is not None:
            best, columns = probs.topk(self.topk, dim=1)
            probs = torch.zeros_like(probs).scatter_(1, columns, best)
        return probs if self.decimals is None else torch.round(probs, decimals=self.decimals)


class CallableAPI(BlackBoxAPI):
    """A function from arrays to arrays as a black box: `predict_proba` of scikit-learn, an ONNX runtime, a stub.

    Args:
        fn: From float32 `(N, c, h, w)` to scores `(N, C)` in the order of `classes`, or to integer columns `(N,)` if
            `output` is "label". The order is that of `classes_` for a classifier of scikit-learn.
        classes: As in `BlackBoxAPI`, as are those that are not listed here.
        name: As in `BlackBoxAPI`.
        flatten: Give the function `(N, c * h * w)`.
        output: As in `BlackBoxAPI`.
        input_shape: As in `BlackBoxAPI`.
        preprocess: As in `BlackBoxAPI`.
        input_quantization: As in `BlackBoxAPI`.
        decimals: As in `BlackBoxAPI`.
        max_batch: As in `BlackBoxAPI`.
        cache_rows: As in `BlackBoxAPI`.
        ledger: As in `BlackBoxAPI`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        fn: Callable[[NDArray[np.float32]], ArrayLike],
        classes: Sequence[int],
        *,
        name: str,
        flatten: bool = False,
        output: str = "probs",
        input_shape: Sequence[int] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        input_quantization: str | None = None,
        decimals: int | None = None,
        max_batch: int = 4096,
        cache_rows: int = 0,
        ledger: QueryLedger | None = None,
    ) -> None:
        super().__init__(
            classes,
            name=name,
            output=output,
            input_shape=input_shape,
            preprocess=preprocess,
            input_quantization=input_quantization,
            decimals=decimals,
            max_batch=max_batch,
            cache_rows=cache_rows,
            ledger=ledger,
        )
        self.fn, self.flatten = fn, flatten

    def _answer(self, images: Tensor) -> Tensor:
        array = images.float().cpu().numpy()
        # A copy: the function may hand out the same array, or a read-only one, each time.
        answer = np.array(self.fn(array.reshape(len(array), -1) if self.flatten else array))
        if answer.dtype.kind not in "fiu":
            raise APIResponseError(f"API {self.name!r} returned an array of {answer.dtype}, expected numbers")
        return torch.from_numpy(answer)
