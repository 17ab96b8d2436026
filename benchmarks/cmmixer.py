"""CMMixer: mixing, encoding a quarter of the patches, attention, spectrograms from disk, and ranking of a gallery.

    python -m benchmarks.cmmixer [--quick] [--paths mixer encoder ...] [--repeats 3] [--threads 1]

- mixer: a batch of clips mixed at once, by each operation, against frame after frame; for "cutmix" also against the
  published code's copies and slices. "visible patches" is what the autoencoder does: only the visible quarter is
  gathered and mixed, against mixing all, cutting the mix into patches and gathering. The patches of both streams are
  the targets of the loss in any case, and neither side is charged for them. "copies" states what moving memory costs.
- encoder: forward and backward pass of the visible quarter of the patches, against all of them.
- attention: scaled-dot-product attention against a softmax over a matrix of all pairs, forward and backward.
- spectrograms: `SpectrogramCache` when everything is in it, against reading and transforming the sound each time.
- retrieval: `CrossModalRetrieval` on random vectors, against a sorted list for each query.
- memory: the peak of a training step of `MixerMAE`, in a process of its own.

Everything is random. `--quick` takes small sizes and leaves no files unless `--results` names a folder.
"""

from __future__ import annotations

import argparse
import tempfile
import wave
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference.cmmixer import (
    PlainMixer,
    mix_frames,
    paste_frames,
    plain_retrieval,
    plain_spectrograms,
    softmax_attention,
    visible_patches,
)
from benchmarks.runner import Case, Clock, PeakMemory, all_threads, report, show, timed, write_records
from benchmarks.sequence_scaling import resident_bytes
from datamodules.sources.log_mel import LogMel
from datamodules.sources.spectrogram_cache import SpectrogramCache
from zoo.cmmixer.masked_autoencoder import MaskedAutoencoder
from zoo.cmmixer.metrics import CrossModalRetrieval
from zoo.cmmixer.mixer import OPS, CrossModalMixer
from zoo.cmmixer.vit import Attention, ViTEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).resolve().parent.parent / "results" / "cmmixer"
COMMAND = "python -m benchmarks.cmmixer"
TIMED = ("mixer", "encoder", "attention", "spectrograms", "retrieval")
PATHS = (*TIMED, "memory")
KS = (1, 5, 10, 25)


@dataclass(frozen=True)
class Sizes:
    """What is worked on.

    Attributes:
        clips: Clips to mix.
        frames: Frames of a clip, 3 channels each.
        side: Rows and columns of a frame.
        patch_size: Side of a patch.
        batch: Clips for encoder and attention.
        trained: Clips of the training step whose memory is measured.
        hidden_size: Of encoder and attention, whose heads are 64 wide.
        num_layers: Of the encoder.
        sounds: Sound files.
        num_mels: Bands, and columns, of a spectrogram.
        pairs: Pairs of the gallery.
        encoder: Size of the encoder of `MixerMAE`, by name.
    """

    clips: int = 64
    frames: int = 4
    side: int = 224
    patch_size: int = 16
    batch: int = 2
    trained: int = 8
    hidden_size: int = 768
    num_layers: int = 4
    sounds: int = 16
    num_mels: int = 224
    pairs: int = 2000
    encoder: str = "base"


FULL = Sizes()
QUICK = Sizes(8, 4, 64, 16, 2, 2, 128, 1, 2, 64, 200, "tiny")


def streams(clips: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Normal video and audio, `(clips, frames, 3, side, side)`."""
    generator = torch.Generator().manual_seed(0)
    shape = (clips, sizes.frames, 3, sizes.side, sizes.side)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def keys_of(count: int) -> Tensor:
    """A random key for each sample."""
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(1))


def new_autoencoder(sizes: Sizes, op: str) -> MaskedAutoencoder:
    """One with a tiny network: what is timed lies before it."""
    torch.manual_seed(0)
    encoder = ViTEncoder([3, sizes.side, sizes.side], sizes.frames, sizes.patch_size, 8, 1, 1)
    mixer = CrossModalMixer(op, patch_size=sizes.patch_size)
    return MaskedAutoencoder(encoder, mixer, hidden_size=8, num_layers=1, num_heads=1)


def mixer_cases(sizes: Sizes) -> list[Case]:
    """Mixing of a batch, of its visible patches, and what copies cost."""
    video, audio = streams(sizes.clips, sizes)
    side, keys = sizes.side, keys_of(sizes.clips)
    about = f"{sizes.clips} clips of {sizes.frames} x 3 x {side} x {side}"
    cases = [mix_case(op, video, audio, keys, sizes) for op in OPS]
    cut, boxes = CrossModalMixer("cutmix"), PlainMixer("cutmix")
    cases.append(
        Case(
            "mix, cutmix, against slices",
            timed(lambda: cut(video, audio, keys=keys)),
            timed(lambda: paste_frames(video, audio, lambda *_: boxes.box(side, side))),
            note=f"{about}; reference: boxes pasted into copies of the streams, as in the published code",
        )
    )
    cases += [visible_case(op, video, audio, keys, sizes) for op in OPS]
    reused = torch.empty_like(video)
    cases.append(
        Case(
            "copies",
            timed(lambda: reused.copy_(video)),
            timed(video.clone),
            note=f"{about}: one stream copied into memory in use, and (reference) into new memory: what any mixer that "
            "returns a new batch must take at the least",
        )
    )
    return cases


def mix_case(op: str, video: Tensor, audio: Tensor, keys: Tensor, sizes: Sizes) -> Case:
    """A batch checked and mixed, parameters of each frame drawn."""
    mixer, plain = CrossModalMixer(op, patch_size=sizes.patch_size), PlainMixer(op, 0, sizes.patch_size)
    side = sizes.side
    return Case(
        f"mix, {op}",
        timed(lambda: mixer(video, audio, keys=keys)),
        timed(lambda: mix_frames(video, audio, lambda *_: plain.mask(side, side))),
        10 if op == "cutmix" else None,
        f"{len(video)} clips of {sizes.frames} x 3 x {side} x {side}, checked, parameters of each frame drawn, mixed; "
        "reference: m V + (1 - m) A of one frame after the other, stacked",
    )


def visible_case(op: str, video: Tensor, audio: Tensor, keys: Tensor, sizes: Sizes) -> Case:
    """The visible patches of a mix."""
    model = new_autoencoder(sizes, op)
    plain, side = PlainMixer(op, 0, sizes.patch_size), sizes.side
    visible = model.random_order(keys, model.encoder.num_patches, video.device)[:, : model.num_visible]
    targets = torch.stack([model.encoder.patches(video), model.encoder.patches(audio)], 1)

    def reference() -> Tensor:
        mixed = mix_frames(video, audio, lambda *_: plain.mask(side, side))
        return visible_patches(mixed, visible, sizes.patch_size)

    return Case(
        f"visible patches, {op}",
        timed(lambda: mixed_patches(model, targets, visible, keys)),
        timed(reference),
        10 if op == "cutmix" else None,
        f"{len(video)} clips of {sizes.frames} x 3 x {side} x {side}, {model.num_visible} of "
        f"{model.encoder.num_patches} patches; parameters drawn, patches mixed; reference: all frames mixed one after "
        "the other, cut into patches, gathered; the patches of the targets are given",
    )


def mixed_patches(model: MaskedAutoencoder, targets: Tensor, visible: Tensor, keys: Tensor) -> Tensor:
    """What the autoencoder shows to its encoder, `(batch, visible, values)`."""
    info = model.draw_mix(keys, targets.device)
    assert info is not None
    return model._seen(targets, model._patch_weights(info, len(targets)), visible, None)


def new_encoder(sizes: Sizes) -> ViTEncoder:
    """The encoder to time."""
    torch.manual_seed(0)
    image = [3, sizes.side, sizes.side]
    return ViTEncoder(
        image, sizes.frames, sizes.patch_size, sizes.hidden_size, sizes.num_layers, sizes.hidden_size // 64
    )


def encoder_case(sizes: Sizes) -> Case:
    """Forward and backward pass of an encoder."""
    encoder = new_encoder(sizes)
    patches = encoder.patches(streams(sizes.batch, sizes)[0])
    order = torch.stack([torch.randperm(encoder.num_patches) for _ in range(sizes.batch)])
    visible = order[:, : encoder.num_patches // 4]
    seen = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))

    def step(shown: Tensor, index: Tensor | None) -> None:
        encoder.zero_grad()
        torch.autograd.backward(encoder.encode(encoder.embed(shown, index)).square().mean())

    return Case(
        f"encoder, {sizes.num_layers} x {sizes.hidden_size}",
        timed(lambda: step(seen, visible)),
        timed(lambda: step(patches, None)),
        1 / 0.45,
        f"{sizes.batch} clips of {sizes.frames} x 3 x {sizes.side} x {sizes.side}, forward and backward, CLS and "
        f"{visible.shape[1]} patches; reference: CLS and all {encoder.num_patches} patches",
    )


def attention_case(sizes: Sizes) -> Case:
    """Forward and backward pass of one attention."""
    torch.manual_seed(0)
    attention = Attention(sizes.hidden_size, sizes.hidden_size // 64)
    tokens = 1 + sizes.frames * (sizes.side // sizes.patch_size) ** 2
    states = torch.randn(sizes.batch, tokens, sizes.hidden_size)

    def step(attend: Callable[[Tensor], Tensor]) -> None:
        attention.zero_grad()
        torch.autograd.backward(attend(states).square().mean())

    return Case(
        f"attention, {tokens} tokens",
        timed(lambda: step(attention)),
        timed(lambda: step(lambda given: softmax_attention(attention, given))),
        note=f"batch of {sizes.batch}, {attention.num_heads} heads of 64, forward and backward, projections included; "
        "reference: a softmax over all pairs of tokens, kept for the backward pass",
    )


def write_sounds(folder: Path, count: int, seconds: float = 4.0, sample_rate: int = 44100) -> list[Path]:
    """So many files of noise, mono, 16 bit."""
    generator, files = np.random.default_rng(0), []
    for number in range(count):
        noise = generator.normal(0, 3000, round(seconds * sample_rate)).clip(-32768, 32767).astype("<i2")
        files.append(folder / f"{number}.wav")
        with wave.open(str(files[-1]), "wb") as opened:
            opened.setnchannels(1)
            opened.setsampwidth(2)
            opened.setframerate(sample_rate)
            opened.writeframes(noise.tobytes())
    return files


def spectrogram_case(sizes: Sizes, folder: Path) -> Case:
    """Spectrograms of all clips, kept in a folder and computed."""
    files, cache = write_sounds(folder, sizes.sounds), SpectrogramCache(folder / "kept")
    log_mel, window = LogMel(num_mels=sizes.num_mels, frames=sizes.num_mels), 2.6
    times = torch.linspace(0.5, 3.5, sizes.frames)
    for file in files:
        cache.load(file, times, log_mel, window)
    return Case(
        "spectrograms",
        timed(lambda: [cache.load(file, times, log_mel, window) for file in files]),
        timed(lambda: [plain_spectrograms(file, times, log_mel, window) for file in files]),
        20,
        f"{sizes.sounds} files of 4 s at 44.1 kHz, {sizes.frames} windows of {window} s, {sizes.num_mels} bands and "
        "columns; both read files that the system holds in memory; reference: `LogMel` each time",
    )


def retrieval_case(sizes: Sizes) -> Case:
    """Values of a gallery."""
    video, audio, pair_ids = gallery(sizes.pairs)
    ours = ours_retrieval(video, audio, pair_ids)
    plain = plain_retrieval(video, audio, pair_ids, KS)
    largest = max(abs(ours[name] - value) / max(1, abs(value)) for name, value in plain.items())
    return Case(
        f"retrieval, {sizes.pairs} pairs",
        timed(lambda: ours_retrieval(video, audio, pair_ids)),
        timed(lambda: plain_retrieval(video, audio, pair_ids, KS)),
        note=f"{video.shape[1]} numbers a vector, both directions; the values differ by {largest:.1e} at most; "
        "reference: a sorted list for each query",
    )


def gallery(pairs: int, hidden_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of both streams that are alike in a pair, and its ids."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(pairs, hidden_size, generator=generator)
    return video, video + 2 * torch.randn(pairs, hidden_size, generator=generator), torch.arange(pairs)


def ours_retrieval(video: Tensor, audio: Tensor, pair_ids: Tensor) -> dict[str, float]:
    """The values of the metric."""
    metric = CrossModalRetrieval(KS)
    metric.update(video, audio, pair_ids)
    return {name: float(value) for name, value in metric.compute().items()}


def training_peak(sizes: Sizes) -> dict[str, Any]:
    """Memory of two training steps, the model included; to be called in a new process.

    Returns:
        Resident bytes at the peak, of the whole process and beyond what it has before there are data or model; bytes of
        the parameters, and of the batch; the CPU seconds of the second step.
    """
    from zoo.cmmixer.module import MixerMAE

    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = resident_bytes()
    with PeakMemory(interval=0.001) as memory:
        video, audio = streams(sizes.trained, sizes)
        model = MixerMAE([3, sizes.side, sizes.side], sizes.frames, sizes.encoder, patch_size=sizes.patch_size)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            clock = Clock()
            optimizer.zero_grad()
            torch.autograd.backward(model(video, audio, keys_of(sizes.trained)).loss)
            optimizer.step()
            timing = clock.read()
    return {
        "peak_added_bytes": memory.added_bytes,
        "peak_bytes": before + memory.added_bytes,
        "parameter_bytes": sum(4 * parameter.numel() for parameter in model.parameters()),
        "batch_bytes": 8 * video.numel(),
        "cpu_seconds": timing.cpu,
    }


def memory_record(sizes: Sizes) -> dict[str, Any]:
    """The record of a training step in a process of its own."""
    # What others leave to the allocator would hide what is taken.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(training_peak, sizes).result()
    return {
        "name": f"training step, MixerMAE, {sizes.encoder}",
        "threads": 1,
        **found,
        "note": f"{sizes.trained} clips of {sizes.frames} x 3 x {sizes.side} x {sizes.side}, AdamW, cutmix, a quarter "
        "of the patches visible; resident memory of a process of its own, beyond the interpreter's and whole: "
        "parameters, gradients, twice the parameters for AdamW, both streams, their patches, and activations",
    }


def cases_of(path: str, sizes: Sizes, folder: Path) -> list[Case]:
    """The cases of a path but "memory"; files go to a folder."""
    if path == "mixer":
        return mixer_cases(sizes)
    if path == "spectrograms":
        return [spectrogram_case(sizes, folder)]
    return [{"encoder": encoder_case, "attention": attention_case, "retrieval": retrieval_case}[path](sizes)]


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, help="timed runs of each side; 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, help=f"folder of the JSON files, {RESULTS} without --quick")
    options = parser.parse_args()
    sizes, repeats = (QUICK if options.quick else FULL), options.repeats or (1 if options.quick else 3)
    about = {"command": f"{COMMAND} --quick" if options.quick else COMMAND, "data": "random"}
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as passing:
        folder = options.results or (Path(passing) / "results" if options.quick else RESULTS)
        for path in options.paths:
            file = folder / f"benchmark_{path}.json"
            if path == "memory":
                record = memory_record(sizes)
                write_records([record], file, **about)
                show_memory(record)
            else:
                cases = cases_of(path, sizes, Path(passing))
                records += report(cases, file, **about, threads=options.threads, repeats=repeats)
    if records:
        show(records, f"CMMixer, {all_threads()} cores")


def show_memory(record: dict[str, Any]) -> None:
    """Print the memory of a training step."""
    mib = 2**20
    print(
        f"{record['name']}: {record['peak_added_bytes'] / mib:,.0f} MiB added at the peak "
        f"({record['peak_bytes'] / mib:,.0f} of the process), of it parameters {record['parameter_bytes'] / mib:,.0f} "
        f"four times and the batch {record['batch_bytes'] / mib:,.0f}; {record['cpu_seconds']:.2f} CPU seconds a step",
        flush=True,
    )


if __name__ == "__main__":
    main()
