"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes

import psutil
import pytest
import torch

from zoo.common.memory import TrimHeap


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_free_blocks_between_used_ones_are_returned():
    # Blocks below glibc's threshold for mapped memory lie in its heap; every second one stays in use.
    blocks = [torch.ones(15_000) for _ in range(4_000)]
    del blocks[1::2]
    before = psutil.Process().memory_info().rss
    TrimHeap().on_train_epoch_end(None, None)
    assert before - psutil.Process().memory_info().rss > 60 * 2**20
    assert all(float(block.sum()) == 15_000 for block in blocks[::100])
