"""A classifier that can only be asked."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.api_cl.ledger import QueryLedger, check_purpose
from zoo.api_cl.responses import OUTPUTS, to_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoo.api_cl.ledger import Reservation

QUANTIZATIONS = (None, "uint8")


class APIResponseError(RuntimeError):
    """The answer of an API cannot be used: wrong rows or columns, no probabilities, or an error in its place."""


class BlackBoxAPI(ABC):
    """A classifier that answers images with responses and gives no gradient.

    It is a plain object, not an `nn.Module`: as an attribute of a module it enters neither the parameters, the
    checkpoint nor a move between devices.

    A subclass implements `_answer`, or overrides `_answer_all` to send the chunks of a query in a way of its own.

    Args:
        classes: Global labels, in the order of the response's columns.
        name: Names the API in errors and in the ledger.
        output: One of `OUTPUTS`, what the API returns.
        input_shape: `(c, h, w)` of an image; not checked if None.
        preprocess: From canonical images `(N, c, h, w)` to what the classifier was trained on.
        input_quantization: "uint8" for a service that takes 8-bit images: what is sent lies on the 256 grey levels.
        decimals: Number of decimals to which the API rounds its scores; None if it does not, or it is not known.
        max_batch: Most images of one request.
        cache_rows: Most answers kept for images asked again under the purpose "real", the least recently used
            leaving first. They cost no budget. Synthetic images never come twice and are not looked up.
        ledger: Counts the queries and holds the budget.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        classes: Sequence[int],
        *,
        name: str,
        output: str = "probs",
        input_shape: Sequence[int] | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        input_quantization: str | None = None,
        decimals: int | None = None,
        max_batch: int = 4096,
        cache_rows: int = 0,
        ledger: QueryLedger | None = None,
    ) -> None:
        if not name:
            raise ValueError("name must not be empty: it names the API in errors and in the ledger")
        self.name = name
        self.classes = tuple(int(label) for label in classes)
        repeated = sorted({label for label in self.classes if self.classes.count(label) > 1})
        if not self.classes or repeated or min(self.classes) < 0:
            raise ValueError(
                f"classes of API {name!r} must be distinct labels from 0 up, got {list(self.classes)}"
                + (f" with {repeated} repeated" if repeated else "")
            )
        if output not in OUTPUTS:
            raise ValueError(f"output of API {name!r} must be one of {', '.join(OUTPUTS)}, got {output!r}")
        if input_quantization not in QUANTIZATIONS:
            raise ValueError(f"input_quantization of API {name!r} must be None or 'uint8', got {input_quantization!r}")
        if decimals is not None and decimals < 1:
            raise ValueError(f"decimals of API {name!r} must be at least 1, or None, got {decimals}")
        if max_batch < 1 or cache_rows < 0:
            raise ValueError(
                f"API {name!r} needs max_batch >= 1 and cache_rows >= 0, got max_batch={max_batch}, "
                f"cache_rows={cache_rows}"
            )
        self.output = output
        self.input_shape = _shape(name, input_shape)
        self.preprocess = preprocess
        self.input_quantization = input_quantization
        self.decimals = decimals
        self.max_batch = max_batch
        self.cache_rows = cache_rows
        self.ledger = ledger
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_lock = threading.Lock()

    def query(self, images: Tensor, purpose: str) -> Tensor:
        """The API's probabilities for images.

        Args:
            images: Floating point `(N, c, h, w)` in [-1, 1], without a gradient.
            purpose: One of `ledger.PURPOSES`.

        Returns:
            float32 `(N, C)` over `classes` (float64 for float64 images), on the images' device. Without a gradient,
            and never an inference tensor, so that it may be the target of a loss.

        Raises:
            ValueError: If the images or the purpose do not fit.
            QueryBudgetExceeded: If the ledger has fewer rows left. Nothing was sent then.
            APIResponseError: If the answer cannot be used.
        """
        check_purpose(purpose)
        self._check(images)
        if images.requires_grad:
            raise ValueError(f"API {self.name!r} gives no gradient, but the images require one: pass images.detach()")
        # A caller in inference mode would make every tensor here one that autograd cannot save for backward.
        with torch.inference_mode(False), torch.no_grad():
            cached = self.cache_rows and purpose == "real" and len(images)
            return self._query_cached(images, purpose) if cached else self._query(images, purpose)

    def share_rate(self, processes: int) -> None:  # noqa: B027 - nothing to share where there is no limit
        """Keep to an equal part of the API's rate limits: those are of all processes together.

        Args:
            processes: How many ask.
        """

    def close(self) -> None:  # noqa: B027 - nothing to close where there is no connection
        """Close what is open; a later query opens it anew."""

    def prepared(self, images: Tensor) -> Tensor:
        """What the classifier receives for canonical images: on 8-bit levels if it takes those, then preprocessed."""
        # What works in place on its input must not change the caller's images.
        images = images.clone()
        if self.input_quantization == "uint8":
            images = torch.round((images + 1) * 127.5) / 127.5 - 1
        return images if self.preprocess is None else self.preprocess(images)

    @abstractmethod
    def _answer(self, images: Tensor) -> Tensor:
        """The raw responses of one chunk.

        Args:
            images: `(n, c, h, w)`, what `prepared` made of at most `max_batch` images.

        Returns:
            `(n, C)` scores, or int64 `(n,)` columns if `output` is "label", on any device.
        """

    def _answer_all(self, images: Tensor, purpose: str) -> Tensor:
        """The raw responses of all images, in their order, counted in the ledger.

        All rows are reserved before the first chunk is sent: a budget that ends within a query costs nothing.

        Args:
            images: `(N, c, h, w)` in the canonical domain, N >= 1.
            purpose: One of `ledger.PURPOSES`.
        """
        answers = []
        with self._reserve(purpose, len(images)) as reservation:
            for chunk in torch.split(images, self.max_batch):
                raw = self._answer(self.prepared(chunk))
                reservation.commit(len(chunk))
                self._count("requests", 1)
                self._check_rows(raw, len(chunk))
                answers.append(raw)
        return torch.cat(answers)

    def _reserve(self, purpose: str, rows: int) -> Reservation:
        """Rows of the ledger; of one without a budget if there is none."""
        return (QueryLedger() if self.ledger is None else self.ledger).reserve(self.name, purpose, rows)

    def _count(self, event: str, amount: float) -> None:
        """Add to an event of the ledger, if there is one."""
        if self.ledger is not None:
            self.ledger.add(self.name, event, amount)

    def __repr__(self) -> str:
        """Name, classes and output."""
        return f"{type(self).__name__}(name={self.name!r}, classes={list(self.classes)}, output={self.output!r})"

    def _check(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise ValueError(
                f"images for API {self.name!r} must be floating point in [-1, 1], got {images.dtype}; "
                "of uint8 images x, x / 127.5 - 1 is meant"
            )
        if images.ndim != 4 or (self.input_shape is not None and tuple(images.shape[1:]) != self.input_shape):
            shape = "c, h, w" if self.input_shape is None else ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"images for API {self.name!r} have the shape {tuple(images.shape)}, expected (N, {shape}); "
                "a preprocess of the API may resize them"
            )
        if not images.numel():
            return
        low, high = torch.stack(images.detach().aminmax()).tolist()
        if not (low >= -1 and high <= 1):
            raise ValueError(
                f"images for API {self.name!r} must lie in [-1, 1], got values from {low:.6g} to {high:.6g}; "
                "normalisation is the API's own, in its preprocess"
            )

    def _check_rows(self, raw: Tensor, rows: int) -> None:
        if not raw.ndim or len(raw) != rows:
            raise APIResponseError(
                f"API {self.name!r} returned responses of shape {tuple(raw.shape)} for {rows} images"
            )

    def _query(self, images: Tensor, purpose: str) -> Tensor:
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        if not len(images):
            return torch.zeros(0, len(self.classes), dtype=dtype, device=images.device)
        raw = self._answer_all(images.to(dtype), purpose)
        self._check_rows(raw, len(images))
        return self._probabilities(raw, self.output).to(images.device, dtype)

    def _probabilities(self, raw: Tensor, output: str) -> Tensor:
        try:
            return to_probabilities(raw, output, len(self.classes), name=self.name, decimals=self.decimals)
        except ValueError as error:
            raise APIResponseError(str(error)) from error

    def _query_cached(self, images: Tensor, purpose: str) -> Tensor:
        keys = content_keys(images)
        with self._cache_lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
            for key in known:
                self._cache.move_to_end(key)
        first: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, row)
        if first:
            asked = self._query(images[list(first.values())], purpose).cpu()
            # Clones: a view would keep the answers of the whole query in memory.
            new = {key: row.clone() for key, row in zip(first, asked, strict=True)}
            known |= new
            with self._cache_lock:
                self._cache.update(new)
                while len(self._cache) > self.cache_rows:
                    self._cache.popitem(last=False)
        self._count("cache_hits", len(keys) - len(first))
        return torch.stack([known[key] for key in keys]).to(images.device)


def _shape(name: str, input_shape: Sequence[int] | None) -> tuple[int, int, int] | None:
    if input_shape is None:
        return None
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape of API {name!r} must be (c, h, w), each at least 1, got {tuple(input_shape)}")
    c, h, w = (int(size) for size in input_shape)
    return c, h, w


def content_keys(images: Tensor) -> list[str]:
    """A digest of each image `(N, ...)`, by which it is known again."""
    rows = images.detach().cpu().contiguous().flatten(1).numpy()
    return [blake2b(row, digest_size=16).hexdigest() for row in rows]
