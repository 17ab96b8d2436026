"""Large tensors in files, mapped into memory: read when used, dropped by the system when memory is short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_BITS = {torch.float64: np.uint64, torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


class VectorFile:
    """Tensors whose values lie in a file."""

    @staticmethod
    def create(path: str | Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A new file of zeros as a tensor; what is written to the tensor is in the file.

        Args:
            path: The file; one that is there is replaced. It must stay as long as the tensor is used.
            shape: Rows and columns.
            dtype: float64, float32, bfloat16 or float16.

        Raises:
            ValueError: If the type is another one.
            FileNotFoundError: If the folder is missing.
        """
        if dtype not in _BITS:
            raise ValueError(f"a mapped tensor is float64, float32, bfloat16 or float16, got {dtype}")
        target = Path(path).expanduser()
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target.parent} is not a folder: make it, or map to another one than {path}")
        # numpy has no bfloat16: the bits travel as integers.
        bits = np.memmap(target, dtype=_BITS[dtype], mode="w+", shape=shape)
        return torch.from_numpy(bits).view(dtype)
