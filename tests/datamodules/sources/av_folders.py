"""Small folders of pairs and tables of files for tests."""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (40, 2, 1, 8, 12)


def write_pairs(folder: Path, **changes: torch.Tensor | None) -> Path:
    """40 clips of two frames; `name=None` leaves a tensor out."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor | None] = {
        "video": torch.randint(0, 256, SHAPE, generator=generator, dtype=torch.uint8),
        "audio": torch.randn(SHAPE, generator=generator) * 9 - 40,
        "label": torch.arange(40) % 4,
        "pair_id": torch.arange(40),
    }
    folder.mkdir(exist_ok=True)
    for name, tensor in (tensors | changes).items():
        if tensor is not None:
            torch.save(tensor, folder / f"{name}.pt")
    return folder


def write_clip(folder: Path, name: str, shade: int, frames: int = 6, click: float | None = None) -> None:
    """A folder of pictures and a second of sound at 8 kHz; of noise, or silent but for a click at that second."""
    from PIL import Image

    rng = np.random.default_rng(shade)
    (folder / name).mkdir(parents=True)
    for number in range(frames):
        pixels = rng.integers(shade, shade + 40, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    samples = rng.normal(0, 3000, 8000).astype("<i2")
    if click is not None:
        samples[:] = 0
        samples[int(click * 8000)] = 30_000
    with wave.open(str(folder / f"{name}.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def write_table(folder: Path, lines: list[str] | None = None, clips: int = 12) -> Path:
    """A table of clips, with labels, splits and fps."""
    folder.mkdir(exist_ok=True)
    for number in range(clips):
        write_clip(folder, f"clip{number}", 5 * number)
    if lines is None:
        lines = ["video,audio,label,pair_id,split,fps"]
        for number in range(clips):
            split = {0: "validation", 1: "test"}.get(number % 6, "train")
            lines.append(f"clip{number},clip{number}.wav,{'cat' if number % 2 else 'bird'},p{number // 2},{split},6")
    path = folder / "clips.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
