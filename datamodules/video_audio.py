"""Clips and their sounds, both as pictures of one shape: pairs for masked autoencoders and for retrieval."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, training_sampler
from datamodules.options import at_least, one_of
from datamodules.sources.download import data_folder, default_folder
from datamodules.video_audio_rows import PAIRINGS, VideoAudioBatch, compare_standardization

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from datamodules.sources.av_csv import ClipFiles, ClipSettings
    from datamodules.video_audio_rows import Clips

__all__ = ["VideoAudioBatch", "VideoAudioData"]

SOURCES = ("embedded", "av_mnist", "pairs", "csv")
DIGITS = ("embedded", "av_mnist")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "embedded": {"num_frames": 1, "image_size": 16, "channels": 1, "num_pairs": 1000, "n_fft": 256, "hop_length": 128},
    "av_mnist": {"num_frames": 1, "image_size": 32, "channels": 1, "num_pairs": 4000, "n_fft": 256, "hop_length": 128},
    "pairs": {},
    "csv": {
        "num_frames": 4, "image_size": 224, "channels": 3, "n_fft": 2048, "hop_length": 512, "sample_rate": 44100,
        "window": 2.6,
    },
}  # fmt: skip
_FIXED_PAIRS = 1000
_LONGEST_STRING = 9  # digits of a label
# Which sources an option is for; the others refuse it.
_BELONGS: dict[str, tuple[str, ...]] = {
    "data_dir": ("av_mnist",),
    "num_pairs": DIGITS,
    "sample_rate": ("csv",),
    "window": ("csv",),
    "n_fft": (*DIGITS, "csv"),
    "hop_length": (*DIGITS, "csv"),
    "num_mels": (*DIGITS, "csv"),
    "pre_emphasis": (*DIGITS, "csv"),
    "clip_seconds": ("csv",),
    "cache_dir": ("csv",),
}


class VideoAudioData(LoaderMixin, LightningDataModule):
    """Clips of frames, and for each frame the log-mel picture of the sound around it.

    Sources:

    - "embedded": scikit-learn's digits and melodies of a generator, one for each digit. No file.
    - "av_mnist": MNIST and the Free Spoken Digit Dataset, `mnist/mnist.npz` and `spoken_digits/spoken_digits.npz` in
      `data_dir`. As in the embedded sample, the pools of pictures and of recordings are split before any pair is drawn,
      frame t shows a digit that window t speaks, and labels are strings of digits read as a number.
    - "pairs": a folder of ready tensors `video` and `audio`, `(clips, frames, channels, height, width)`, with `label`
      and `pair_id` if wanted, as `.pt`, `.npy` or in `pairs.safetensors`.
    - "csv": a table of files: columns `video` (folder of frames, or video file), `audio` (WAV; empty: the sound of the
      video file), and if wanted `label`, `pair_id`, `split` (train, validation, test) and `fps` (of frame folders, 25
      by default). Paths are relative to the table. Files are read batch by batch, spectrograms once.

    Both streams are standardised by mean and standard deviation of the training part (of files, of 256 of its clips).
    In audio, row 0 is the lowest band.

    Args:
        source: "embedded", "av_mnist", "pairs" or "csv"; by default what `path` is, or else "embedded".
        path: Folder of "pairs", or file of "csv".
        test_path: Other pairs to test on: a folder of tensors of the same shape, or, for "csv", another table. Without
            it the test of "pairs", and of a table without test rows, is another part that is held out, as large as that
            of the validation.
        data_dir: Folder of AV-MNIST; `$ZOO_DATA` by default, or else the user's cache.
        num_frames: Frames of a clip; 1 by default, 4 for "csv", and that of the file for "pairs".
        image_size: Rows and columns; 16, 32 or 224 by default, or those of the file for "pairs".
        channels: 1 by default, 3 for "csv" and that of the file for "pairs". Sounds have equal copies.
        pairing: Training pairs of digits: "redrawn" in each epoch, the same digit in both; "fixed", the same pairs in
            all epochs; or "unpaired", redrawn without regard for the digit, a control.
        num_pairs: Training pairs of digits in an epoch; by default 1,000, or 4,000 of AV-MNIST unless fixed.
        pair_seed: Draws fixed pairs and validation pairs of digits; of files, which rows are held out.
        validation_fraction: Share of the training part, by picture and by recording (AV-MNIST: whole takes), or by pair
            of files, that is held out for validation.
        standardize: Whether to standardise; ready tensors may come standardised.
        sample_rate: Hz that sounds are brought to, 44,100 by default.
        window: Seconds of sound around a frame, 2.6 by default.
        n_fft: Samples of a transform; 256 for digits, 2,048 for files.
        hop_length: Samples between columns; 128 for digits, 512 for files.
        num_mels: Bands; `image_size` by default. Others are brought to `image_size` by interpolation.
        pre_emphasis: Weight of the sample before, 0 for none.
        clip_seconds: Length of the clip, from the middle of the video, that frames are spread over; the whole video by
            default.
        pad_short: Whether clips with fewer frames than `num_frames` repeat the last one; refused otherwise.
        cache_dir: Folder for spectrograms of files; in the user's cache by default.
        batch_size: Training batch of one process. A last batch that is not full is left out.
        eval_batch_size: Batch of evaluation, of one process.
        num_workers: Worker processes.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the order and of the redrawn pairs; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | None = None,
        test_path: str | None = None,
        data_dir: str | None = None,
        num_frames: int | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        pairing: str = "redrawn",
        num_pairs: int | None = None,
        pair_seed: int = 0,
        validation_fraction: float = 0.1,
        standardize: bool = True,
        sample_rate: int | None = None,
        window: float | None = None,
        n_fft: int | None = None,
        hop_length: int | None = None,
        num_mels: int | None = None,
        pre_emphasis: float | None = None,
        pad_short: bool = False,
        clip_seconds: float | None = None,
        cache_dir: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        table = path is not None and not Path(path).expanduser().is_dir()
        self.source = source or (("csv" if table else "pairs") if path else "embedded")
        self.path, self.test_path, self.data_dir = path, test_path, data_dir
        self.image_size, self.channels, self.pairing, self.num_pairs = image_size, channels, pairing, num_pairs
        self.pair_seed, self.validation_fraction, self.standardize = pair_seed, validation_fraction, standardize
        self.sample_rate, self.window, self.n_fft, self.hop_length = sample_rate, window, n_fft, hop_length
        self.num_mels, self.pre_emphasis, self.pad_short, self.cache_dir = num_mels, pre_emphasis, pad_short, cache_dir
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.clip_seconds, self.seed = clip_seconds, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._num_frames = num_frames
        self._check_options()

    def _check_options(self) -> None:
        one_of(("source", self.source, SOURCES), ("pairing", self.pairing, PAIRINGS), ("channels", self.channels,
               (None, 1, 3) if self.source != "pairs" else (self.channels,)))  # fmt: skip
        at_least(
            ("num_frames", self._num_frames, 1),
            ("image_size", self.image_size, 4),
            ("num_pairs", self.num_pairs, 1),
            ("sample_rate", self.sample_rate, 1),
            ("n_fft", self.n_fft, 2),
            ("hop_length", self.hop_length, 1),
            ("num_mels", self.num_mels, 1),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
        )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be above 0 and below 1, got {self.validation_fraction}")
        for name, seconds in (("window", self.window), ("clip_seconds", self.clip_seconds)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {seconds}")
        if self.pre_emphasis is not None and not 0 <= self.pre_emphasis < 1:
            raise ValueError(f"pre_emphasis must be at least 0 and below 1, got {self.pre_emphasis}")
        if bool(self.path) != (self.source in ("pairs", "csv")):
            way_out = "give its path" if not self.path else "leave one of the two out"
            raise ValueError(f"path={self.path} and source={self.source!r} do not go together: {way_out}")
        for name, sources in _BELONGS.items():
            if getattr(self, name) is not None and self.source not in sources:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no meaning for source={self.source!r}: only for "
                    f"{', '.join(sources)}"
                )
        if self.pad_short and self.source != "csv":
            raise ValueError(f"pad_short has no meaning for source={self.source!r}: only for csv")
        if self.pairing != "redrawn" and self.source not in DIGITS:
            raise ValueError(
                f"pairing={self.pairing!r} has no meaning for source={self.source!r}: its pairs are those of the files"
            )
        if not self.standardize and self.source != "pairs":
            raise ValueError(
                f"standardize=False is for ready tensors, source={self.source!r} has sounds in dB: expected pairs"
            )
        if self.source in DIGITS and (self._num_frames or 1) > _LONGEST_STRING:
            raise ValueError(
                f"num_frames={self._num_frames}: labels are strings of digits as a number, of {_LONGEST_STRING} at most"
            )

    def _value(self, name: str) -> Any:
        given = self._num_frames if name == "num_frames" else getattr(self, name)
        return _DEFAULTS[self.source].get(name) if given is None else given

    @cached_property
    def _clips(self) -> Clips:
        if self.source in DIGITS:
            return self._read_digits()
        assert self.path is not None
        path = Path(self.path).expanduser()
        hold_out_test = self.test_path is None
        if self.source == "csv":
            return self._files(path, hold_out_test)
        from datamodules.sources.av_files import TensorClips

        clips = TensorClips(path, self.validation_fraction, self.pair_seed, self.standardize, hold_out_test)
        channels, height, width = clips.image_shape
        for name, wanted, found in (
            ("num_frames", self._num_frames, (clips.num_frames,)),
            ("channels", self.channels, (channels,)),
            ("image_size", self.image_size, (height, width)),
        ):
            if wanted is not None and any(wanted != number for number in found):
                raise ValueError(f"{name}={wanted}, but clips of {path} have {' x '.join(map(str, found))}")
        return clips

    def _read_digits(self) -> Clips:
        from datamodules.sources.av_digits import DigitClips
        from datamodules.sources.log_mel import LogMel

        if self.source == "embedded":
            from datamodules.sources.av_sample import sample_parts, sample_pictures

            parts, to_pictures = sample_parts(self.validation_fraction), sample_pictures
        else:
            from datamodules.sources.av_mnist import padded_pictures, read_av_mnist

            parts, to_pictures = read_av_mnist(data_folder(self.data_dir), self.validation_fraction), padded_pictures
        log_mel = LogMel(
            parts.parts["train"].recordings.sample_rate,
            self._value("n_fft"),
            self._value("hop_length"),
            self.num_mels or self._value("image_size"),
            frames=None,
            pre_emphasis=self.pre_emphasis or 0.0,
        )
        fixed = _FIXED_PAIRS if self.pairing == "fixed" else None
        return DigitClips(
            parts,
            to_pictures,
            log_mel,
            self._value("num_frames"),
            self._value("image_size"),
            self._value("channels"),
            self.pairing,
            self.num_pairs or fixed or self._value("num_pairs"),
            self.pair_seed,
        )

    def _files(self, path: Path, hold_out_test: bool) -> ClipFiles:
        from datamodules.sources.av_csv import ClipFiles

        return ClipFiles(path, self._settings, self.validation_fraction, self.pair_seed, hold_out_test)

    @cached_property
    def _settings(self) -> ClipSettings:
        from datamodules.sources.av_csv import ClipSettings

        size = self._value("image_size")
        return ClipSettings(
            num_frames=self._value("num_frames"),
            image_size=size,
            channels=self._value("channels"),
            sample_rate=self._value("sample_rate"),
            window=self._value("window"),
            n_fft=self._value("n_fft"),
            hop_length=self._value("hop_length"),
            num_mels=self.num_mels or size,
            pre_emphasis=self.pre_emphasis or 0.0,
            pad_short=self.pad_short,
            clip_seconds=self.clip_seconds,
            cache_dir=Path(self.cache_dir).expanduser() if self.cache_dir else default_folder() / "spectrograms",
        )

    @cached_property
    def _test_rows(self) -> Dataset[VideoAudioBatch]:
        if self.test_path is None:
            return self._clips.rows("test")
        path = Path(self.test_path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"test_path={path} is missing: expected a folder of pairs, or a CSV file")
        if path.is_dir():
            from datamodules.sources.av_files import other_rows

            shape = [self.num_frames, *self.image_shape]
            return other_rows(path, self.standardize, shape, self.standardization)
        if self.source != "csv":
            raise ValueError(
                f"test_path={path} is a file, but source={self.source!r} is tested on a folder of pairs (video.pt, "
                "audio.pt)"
            )
        from datamodules.sources.av_csv import ClipFiles

        assert isinstance(self._clips, ClipFiles)
        return self._clips.other(path)

    @cached_property
    def image_shape(self) -> list[int]:
        """Channels, height and width of a frame."""
        return self._clips.image_shape

    @cached_property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self._clips.num_frames

    @cached_property
    def num_classes(self) -> int:
        """Largest label + 1, of digits the number of their strings; 0 where there are no labels."""
        return self._clips.num_classes

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes; None where there are none."""
        return self._clips.label_names

    @property
    def pair_names(self) -> dict[int, str] | None:
        """Names of the test's pairs by `pair_ids`; None where they have none."""
        return getattr(self._test_rows, "pair_names", None)

    @property
    def standardization(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of the training part that "video" and "audio" were standardised with."""
        return self._clips.standardization

    def state_dict(self) -> dict[str, Any]:
        """What the training data were standardised with, as weights mean nothing with pictures scaled otherwise."""
        numbers = {stream: list(pair) for stream, pair in self.standardization.items()}
        return {"source": self.source, "standardization": numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the standardisation of a checkpoint with the one here; pairing may differ.

        Raises:
            ValueError: If they differ.
        """
        compare_standardization(self.state_dict(), state_dict)

    def prepare_data(self) -> None:
        """Read the data once, so that errors come from one process, and what is measured on files is there for all."""
        self._clips  # noqa: B018 - read on first use

    def setup(self, stage: str) -> None:
        """Read what the stage needs; later calls cost nothing."""
        self._clips  # noqa: B018 - read on first use
        if stage in ("test", "predict"):
            self._test_rows  # noqa: B018 - read on first use

    def train_dataloader(self) -> BatchLoader:
        """Full batches of training pairs in an order keyed by seed and epoch."""
        rows = self._clips.rows("train")
        size = len(rows)  # type: ignore[arg-type]
        return self._loader(
            rows, training_sampler(size, self.batch_size, self.seed, self.trainer, "pairs", drop_last=True)
        )

    def _eval_loader(self, rows: Dataset[VideoAudioBatch]) -> BatchLoader:
        return self._loader(rows, KeyedSampler(rows, self.eval_batch_size))  # type: ignore[arg-type]

    def val_dataloader(self) -> BatchLoader:
        """The validation pairs, in order."""
        return self._eval_loader(self._clips.rows("validate"))

    def test_dataloader(self) -> BatchLoader:
        """The test pairs, or those of `test_path`, in order."""
        return self._eval_loader(self._test_rows)

    def predict_dataloader(self) -> BatchLoader:
        """The test pairs."""
        return self.test_dataloader()
