"""Giving back memory that the C library holds on to."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


@cache
def _trim() -> Any:
    """Glibc's `malloc_trim`, or None where the C library is another one."""
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):
        return None


class TrimHeap(Callback):
    """Return free memory to the system after each training epoch.

    Batches of ever-changing sizes leave holes in glibc's heap, and on a CPU a long run grows by some megabytes an epoch
    without holding a single tensor more. Costs milliseconds; does nothing where the C library is not glibc.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trim."""
        if _trim() is not None:
            _trim()(0)
