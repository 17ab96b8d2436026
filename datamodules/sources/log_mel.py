"""Log-mel spectrograms of waveforms by torch alone."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

LOGS = ("db", "natural", "none")
MEL_SCALES = ("slaney", "htk")
# Slaney's scale is linear up to 1 kHz, 15 mels there, and logarithmic above: 27 mels for a factor of 6.4.
_HERTZ_PER_MEL = 200 / 3
_BREAK_HERTZ = 1000.0
_BREAK_MEL = _BREAK_HERTZ / _HERTZ_PER_MEL
_LOG_STEP = math.log(6.4) / 27


def hertz_to_mel(hertz: Tensor, mel_scale: str = "slaney") -> Tensor:
    """Frequencies in Hz on the mel scale, "slaney" (linear up to 1 kHz) or "htk" (2595 log10(1 + f / 700))."""
    if mel_scale == "htk":
        return 2595 * torch.log10(1 + hertz / 700)
    above = _BREAK_MEL + torch.log(hertz.clamp(min=_BREAK_HERTZ) / _BREAK_HERTZ) / _LOG_STEP
    return torch.where(hertz < _BREAK_HERTZ, hertz / _HERTZ_PER_MEL, above)


def mel_to_hertz(mels: Tensor, mel_scale: str = "slaney") -> Tensor:
    """The inverse of `hertz_to_mel`."""
    if mel_scale == "htk":
        return 700 * (10 ** (mels / 2595) - 1)
    above = _BREAK_HERTZ * torch.exp((mels - _BREAK_MEL).clamp(min=0) * _LOG_STEP)
    return torch.where(mels < _BREAK_MEL, mels * _HERTZ_PER_MEL, above)


def mel_filter_bank(
    sample_rate: int,
    n_fft: int,
    num_mels: int,
    f_min: float = 0.0,
    f_max: float | None = None,
    mel_scale: str = "slaney",
    norm: str | None = "slaney",
) -> Tensor:
    """Triangular filters, evenly spaced on the mel scale, that take a power spectrum to mel bands.

    A band without any frequency of the transform is zero throughout; their number is logged as a warning.

    Args:
        sample_rate: Hz.
        n_fft: Samples of a transform.
        num_mels: Bands.
        f_min: Lower edge of the lowest band in Hz.
        f_max: Upper edge of the highest band in Hz; half the sample rate by default.
        mel_scale: "slaney" or "htk".
        norm: "slaney" for triangles of unit area over Hz, None for triangles of height 1.

    Returns:
        float32 `(num_mels, n_fft // 2 + 1)`.

    Raises:
        ValueError: If a setting is out of range.
    """
    for name, value, least in (("sample_rate", sample_rate, 1), ("n_fft", n_fft, 2), ("num_mels", num_mels, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    top = sample_rate / 2 if f_max is None else f_max
    if not 0 <= f_min < top <= sample_rate / 2:
        raise ValueError(f"expected 0 <= f_min < f_max <= {sample_rate / 2} (half the sample rate), got f_min={f_min} "
                         f"and f_max={f_max}")  # fmt: skip
    if mel_scale not in MEL_SCALES:
        raise ValueError(f"mel_scale is {mel_scale!r}: expected one of {', '.join(MEL_SCALES)}")
    if norm not in ("slaney", None):
        raise ValueError(f"norm is {norm!r}: expected 'slaney' or None")
    edges_mel = hertz_to_mel(torch.tensor([f_min, top], dtype=torch.float64), mel_scale)
    steps = torch.linspace(0, 1, num_mels + 2, dtype=torch.float64)
    edges = mel_to_hertz(edges_mel[0] + steps * (edges_mel[1] - edges_mel[0]), mel_scale)
    frequencies = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sample_rate / n_fft)
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - lower) / (centre - lower)
    falling = (upper - frequencies) / (upper - centre)
    bank = torch.minimum(rising, falling).clamp(min=0)
    if norm == "slaney":
        bank = bank * (2 / (upper - lower))
    empty = torch.nonzero(bank.sum(1) == 0).flatten().tolist()
    if empty:
        log.warning(
            "%d of %d mel bands hold no frequency of the transform, the first is band %d (n_fft=%d, sample_rate=%d): "
            "use a larger n_fft or fewer bands", len(empty), num_mels, empty[0], n_fft, sample_rate,
        )  # fmt: skip
    return bank.float()


class LogMel(nn.Module):
    """Waveform to log-mel spectrogram: power of a centred Hann-window transform, mel bands, logarithm.

    Column t is centred on sample `t * hop_length`, with zeros before the first sample and behind the last one. Values
    are absolute: no reference, no limit of the range below the loudest value. Computed in float32, also under autocast.

    Args:
        sample_rate: Hz, that of the waveforms to come.
        n_fft: Samples of a transform and of its window.
        hop_length: Samples between columns.
        num_mels: Bands.
        frames: Columns kept, from the first; a shorter waveform is continued by zeros. None keeps all.
        log: "db" (10 log10, in dB), "natural" (ln) or "none" (the power itself).
        pre_emphasis: a in y[t] = x[t] - a x[t - 1], in [0, 1); 0 leaves the waveform as it is.
        f_min: Lower edge of the lowest band in Hz.
        f_max: Upper edge of the highest band in Hz; half the sample rate by default.
        mel_scale: "slaney" or "htk".
        norm: "slaney" for triangles of unit area over Hz, None for triangles of height 1.
        floor: The least power that the logarithm sees.

    Raises:
        ValueError: If a setting is out of range.
    """

    window: Tensor
    filter_bank: Tensor

    def __init__(
        self,
        sample_rate: int = 44100,
        n_fft: int = 2048,
        hop_length: int = 512,
        num_mels: int = 224,
        frames: int | None = 224,
        log: str = "db",
        pre_emphasis: float = 0.0,
        f_min: float = 0.0,
        f_max: float | None = None,
        mel_scale: str = "slaney",
        norm: str | None = "slaney",
        floor: float = 1e-10,
    ) -> None:
        super().__init__()
        if hop_length < 1:
            raise ValueError(f"hop_length must be at least 1, got {hop_length}")
        if frames is not None and frames < 1:
            raise ValueError(f"frames must be at least 1 or None, got {frames}")
        if log not in LOGS:
            raise ValueError(f"log is {log!r}: expected one of {', '.join(LOGS)}")
        if not 0 <= pre_emphasis < 1:
            raise ValueError(f"pre_emphasis must be in [0, 1), got {pre_emphasis}")
        # Smaller numbers vanish in float32.
        if not 1e-30 <= floor < math.inf:
            raise ValueError(f"floor must be a power of at least 1e-30, got {floor}")
        self.sample_rate, self.n_fft, self.hop_length, self.num_mels = sample_rate, n_fft, hop_length, num_mels
        self.frames, self.log, self.pre_emphasis, self.floor = frames, log, pre_emphasis, floor
        self.f_min, self.f_max, self.mel_scale, self.norm = f_min, f_max, mel_scale, norm
        bank = mel_filter_bank(sample_rate, n_fft, num_mels, f_min, f_max, mel_scale, norm)
        self.register_buffer("filter_bank", bank, persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    @property
    def settings(self) -> dict[str, int | float | str | None]:
        """All arguments by name: two modules of equal settings give equal spectrograms."""
        return {
            "sample_rate": self.sample_rate, "n_fft": self.n_fft, "hop_length": self.hop_length,
            "num_mels": self.num_mels, "frames": self.frames, "log": self.log, "pre_emphasis": self.pre_emphasis,
            "f_min": self.f_min, "f_max": self.f_max, "mel_scale": self.mel_scale, "norm": self.norm,
            "floor": self.floor,
        }  # fmt: skip

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def columns(self, samples: int) -> int:
        """Columns of the spectrogram of a waveform of so many samples."""
        return 1 + samples // self.hop_length if self.frames is None else self.frames

    def forward(self, waveform: Tensor) -> Tensor:
        """Log-mel spectrograms.

        Args:
            waveform: `(batch, samples)`, floating point, one sample or more.

        Returns:
            float32 `(batch, num_mels, frames)`.

        Raises:
            ValueError: If the waveform has another shape or type, or holds a number that is not finite.
        """
        if waveform.ndim != 2 or not waveform.shape[1]:
            raise ValueError(f"the waveform is {tuple(waveform.shape)}: expected (batch, samples), 1 sample or more")
        if not waveform.is_floating_point():
            raise ValueError(f"the waveform is {waveform.dtype}: expected floating point; divide integer samples by "
                             "their full scale first")  # fmt: skip
        finite = torch.isfinite(waveform).all(1)
        if not finite.all():
            wrong = torch.nonzero(~finite).flatten().tolist()
            raise ValueError(f"{len(wrong)} of {len(waveform)} waveforms hold NaN or infinity, the first is row "
                             f"{wrong[0]}: audio must be finite")  # fmt: skip
        with torch.autocast(waveform.device.type, enabled=False):
            return self._spectrogram(waveform.float())

    def _spectrogram(self, samples: Tensor) -> Tensor:
        if not len(samples):
            # torch.stft fails on an empty batch.
            return samples.new_zeros(0, self.num_mels, self.columns(samples.shape[1]))
        if self.pre_emphasis:
            samples = torch.cat((samples[:, :1], samples[:, 1:] - self.pre_emphasis * samples[:, :-1]), dim=1)
        if self.frames is not None:
            # No kept column reaches beyond; a negative number of zeros cuts what is behind.
            needed = (self.frames - 1) * self.hop_length + self.n_fft - self.n_fft // 2
            samples = nn.functional.pad(samples, (0, needed - samples.shape[1]))
        spectrum = torch.stft(
            samples, self.n_fft, self.hop_length, window=self.window.float(), pad_mode="constant", return_complex=True
        )
        columns = spectrum[..., : self.frames]
        power = self.filter_bank.float() @ (columns.real.square() + columns.imag.square())
        if self.log == "none":
            return power
        logarithm = torch.log(power.clamp(min=self.floor))
        return logarithm * (10 / math.log(10)) if self.log == "db" else logarithm
