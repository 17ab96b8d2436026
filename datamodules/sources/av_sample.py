"""Pictures and sounds of digits without a file: scikit-learn's digits, and melodies that a generator plays."""

from __future__ import annotations

import numpy as np
import torch

from datamodules.sources.av_mnist import DigitPart, DigitParts, Recordings, hold_out_share, resized

SAMPLE_RATE = 8000
DIGIT_SIZE, DIGIT_WHITE = 8, 16
TAKES = {"train": 30, "validate": 15, "test": 30}
"""Recordings of each digit in each part."""

MELODIES = (
    (0, 4, 7), (7, 4, 0), (0, 7, 0), (7, 0, 7), (4, 4, 12),
    (12, 4, 4), (0, 12, 5), (5, 12, 0), (9, 2, 9), (2, 9, 2),
)  # fmt: skip
"""Three notes for each digit, in semitones above `BASE`. Most notes occur in several melodies, so that their order
counts."""
BASE = 330.0  # Hz
_NOTE, _LONGEST = 0.11, 0.55  # seconds
_TEST_SHARE = 1 / 6  # of scikit-learn's pictures


def sample_recordings(part: str, seed: int = 0) -> Recordings:
    """Melodies played by a generator: the digit is the melody, and nothing else tells it.

    Each recording has a pitch of its own (0.5 semitones standard deviation), tempo (0.8 to 1.25), onset (up to 80 ms of
    silence), loudness (0.1 to 0.6), timbre (the strengths of three partials), time at the end (up to 80 ms), and white
    noise (10 to 30 dB below the tone). Notes begin within 10 ms and die away.

    Args:
        part: "train", "validate" or "test": each has recordings of its own.
        seed: Of the generator.
    """
    takes, number = TAKES[part], list(TAKES).index(part)
    rng = np.random.default_rng([seed, number])
    digits = np.tile(np.arange(len(MELODIES)), takes)
    shape = (len(digits), 1)
    pitch, tempo = rng.normal(0, 0.5, shape), rng.uniform(0.8, 1.25, shape)
    onset, end = rng.uniform(0, 0.08, shape), rng.uniform(0, 0.08, shape)
    loudness, noise = rng.uniform(0.1, 0.6, shape), 10 ** (-rng.uniform(10, 30, shape) / 20)
    partials = np.concatenate([np.ones(shape), rng.uniform(0.1, 0.8, shape), rng.uniform(0.0, 0.5, shape)], axis=1)
    partials /= partials.sum(axis=1, keepdims=True)
    duration = _NOTE / tempo
    seconds = np.arange(round(_LONGEST * SAMPLE_RATE), dtype=np.float32)[None] / SAMPLE_RATE
    sound = np.zeros((len(digits), seconds.shape[1]), dtype=np.float32)
    for note, semitones in enumerate(np.array(MELODIES).T):
        frequency = BASE * 2 ** ((semitones[digits][:, None] + pitch) / 12)
        since = seconds - (onset + note * duration)
        playing = (since >= 0) & (since < duration)
        rows, columns = np.nonzero(playing)
        after, turns = since[rows, columns], 2 * np.pi * frequency[rows, 0]
        envelope = np.minimum(after / 0.01, 1) * np.exp(-after / (0.7 * duration[rows, 0]))
        tones = sum(partials[rows, k] * np.sin((k + 1) * turns * after) for k in range(3))
        sound[rows, columns] = envelope * tones
    lengths = np.rint((onset + 3 * duration + end)[:, 0] * SAMPLE_RATE).astype(np.int64)
    lengths = np.minimum(lengths, sound.shape[1])
    loud = np.sqrt((sound**2).sum(axis=1, keepdims=True) / lengths[:, None])
    sound += rng.standard_normal(sound.shape, dtype=np.float32) * (noise * loud)
    sound *= loudness / np.abs(sound).max(axis=1, keepdims=True)
    inside = np.arange(sound.shape[1]) < lengths[:, None]
    return Recordings(
        torch.from_numpy(sound[inside]),
        torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        torch.from_numpy(digits),
        torch.arange(len(digits)) + 1_000_000 * number,
        SAMPLE_RATE,
    )


def sample_parts(validation_fraction: float) -> DigitParts:
    """scikit-learn's 1,797 pictures (8 x 8) and `sample_recordings`.

    Args:
        validation_fraction: Share of the training pictures of each digit that is for validation; the recordings of the
            parts are played for each.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pictures = torch.from_numpy((images.reshape(-1, DIGIT_SIZE, DIGIT_SIZE) / DIGIT_WHITE).astype(np.float32))
    digits = torch.from_numpy(labels.astype(np.int64))
    rest, test = hold_out_share(digits, _TEST_SHARE, seed=0)
    kept, held_out = hold_out_share(digits[rest], validation_fraction, seed=1)
    rows = {"train": rest[kept], "validate": rest[held_out], "test": test}
    parts = {
        part: DigitPart(pictures[chosen], digits[chosen], chosen, sample_recordings(part))
        for part, chosen in rows.items()
    }
    return DigitParts(parts, None)


def sample_pictures(pictures: torch.Tensor, image_size: int) -> torch.Tensor:
    """Bring `(pictures, 8, 8)` to `(pictures, 1, image_size, image_size)` by bilinear interpolation."""
    return resized(pictures[:, None], image_size)
