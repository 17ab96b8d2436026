"""Feature vectors of items from a pre-trained encoder of texts or images, computed once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from datamodules.sources.download import default_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from numpy.typing import NDArray
    from torch import Tensor

log = logging.getLogger(__name__)

KINDS = ("text", "image")
_VERSION = "1"  # of what is computed here, in the fingerprint
_LONGEST = 512  # tokens, where the encoder sets no limit of its own
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model", "sentencepiece.bpe.model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# What sentence-transformers puts beside a network of transformers.
_SENTENCE_FILES = ("sentence_bert_config.json", "modules.json", "1_Pooling/config.json")


class _Sentence(NamedTuple):
    """How a folder of sentence-transformers wants texts encoded."""

    longest: int | None = None
    cls: bool = False
    unit: bool = False


def encoded_features(
    kind: str,
    payload: list[str] | NDArray[np.uint8],
    encoder: str,
    cache_dir: str | None = None,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Features of texts or images from an encoder of transformers, which is not trained.

    Texts: the mean of the last hidden states of a text's tokens, or what files of sentence-transformers beside the
    encoder say (state of the first token, rows of unit length, limit of the length); of CLIP its own text features.
    Images: of CLIP its own image features; otherwise the pooled state of the network, or the state of the first token
    where it has no trained pooling, or the mean over places. Long texts are cut.

    The features are kept in `features-<fingerprint>.safetensors`. The fingerprint is a SHA-256 over the kind, the
    encoder (name and config of one of the hub, all files of a folder) and the texts or images.

    Args:
        kind: "text" or "image".
        payload: Texts, or images as uint8 `(items, height, width, 3)`.
        encoder: Folder of `save_pretrained` or of sentence-transformers, or a hub id.
        cache_dir: Where features are kept; a folder of the user's cache by default.
        batch_size: Texts or images at a time. Results do not depend on it, up to rounding.

    Returns:
        float32 `(items, size)`.

    Raises:
        FileNotFoundError: If the encoder or a file of it is missing, or the cache cannot be written.
        ImportError: If transformers is not installed.
        ValueError: If the payload is of another kind, or the encoder is damaged or gives numbers that are not finite.
    """
    _check(kind, payload, batch_size)
    library = _library()
    folder = _local_folder(kind, encoder)
    config = _loaded(library.AutoConfig, folder, encoder)
    sentence = _sentence(folder, encoder) if kind == "text" else _Sentence()
    fingerprint = _fingerprint(kind, payload, folder, encoder, config, sentence)
    cache = Path(cache_dir).expanduser() if cache_dir else default_folder() / "features"
    path = cache / f"features-{fingerprint}.safetensors"
    features: NDArray[np.float32] | None
    with _locked(cache, fingerprint):
        features = _read(path, fingerprint, len(payload))
        if features is not None:
            log.info("%s features of %d items by %s are read from %s", kind, len(payload), encoder, path)
            return features
        network, pools = _network(library, folder, encoder)
        if kind == "text":
            tokenizer = _loaded(library.AutoTokenizer, folder, encoder)
            features = _encode_texts(payload, network, tokenizer, sentence, encoder, batch_size)
        else:
            processor = _loaded(library.AutoImageProcessor, folder, encoder)
            features = _encode_images(np.asarray(payload), network, processor, pools, encoder, batch_size)
        wrong = np.flatnonzero(~np.isfinite(features).all(1))
        if len(wrong):
            raise ValueError(f"{encoder} gives {len(wrong)} items features that are not finite, the first is item "
                             f"{wrong[0]}: use another encoder")  # fmt: skip
        _write(path, features, {"fingerprint": fingerprint, "kind": kind, "encoder": encoder, "version": _VERSION})
    log.info("%s features of %d items by %s are kept in %s", kind, len(payload), encoder, path)
    return features


def _check(kind: str, payload: Any, batch_size: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(payload):
        raise ValueError(f"there is no {kind} to encode")
    if kind == "text":
        for row, text in enumerate(payload):
            if not isinstance(text, str):
                raise ValueError(f"item {row} is {text!r}: expected a text")
        empty = sum(not text.strip() for text in payload)
        if empty:
            log.info("%d of %d texts are empty: they are encoded as they are", empty, len(payload))
    elif (
        not isinstance(payload, np.ndarray) or payload.ndim != 4 or payload.shape[-1] != 3 or payload.dtype != np.uint8
    ):
        found = f"{payload.dtype} {payload.shape}" if isinstance(payload, np.ndarray) else f"a {type(payload).__name__}"
        raise ValueError(f"images are {found}: expected uint8 (items, height, width, 3)")


def _library() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("encoding items needs transformers: pip install 'lightning-method-zoo[hub]'") from error
    module: ModuleType = transformers
    return module


def _local_folder(kind: str, encoder: str) -> Path | None:
    """The folder that a name means, or None for one of the hub."""
    folder = Path(encoder).expanduser()
    reader, files = ("tokenizer", _TOKENIZERS) if kind == "text" else ("image processor", _PROCESSORS)
    needed = (
        f"config.json, model.safetensors and {files[0]}, as save_pretrained of a network and its {reader} writes them"
    )
    if not folder.is_dir():
        if encoder.startswith((".", "/", "~")) or encoder.count("/") > 1 or folder.exists():
            raise FileNotFoundError(f"{encoder} is not a folder; give a folder with {needed}, or a hub id")
        return None
    for what, choices in (("config.json", ("config.json",)), ("weights", _WEIGHTS), (reader, files)):
        if not any((folder / file).is_file() for file in choices):
            raise FileNotFoundError(f"the folder {encoder} has no {what}: put {needed} there")
    return folder


def _loaded(loader: Any, folder: Path | None, encoder: str, **options: Any) -> Any:
    """`loader.from_pretrained`, with errors that say what to do."""
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(folder or encoder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        if folder or not isinstance(error, OSError):
            raise ValueError(f"the encoder {encoder} cannot be read, {loader.__name__} says: {reason}") from error
        raise FileNotFoundError(
            f"{encoder} is no local folder, and the hub did not give it ({reason}). Check the name, or run `hf "
            f"download {encoder} --local-dir FOLDER` where there is a network, and give that folder"
        ) from error


def _network(library: ModuleType, folder: Path | None, encoder: str) -> tuple[Any, bool]:
    """The network on its device, and whether its pooling comes from the checkpoint."""
    network, report = _loaded(library.AutoModel, folder, encoder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(f"the encoder {encoder} lacks {len(missing)} weights of {type(network).__name__}, which would "
                         f"be random: {', '.join(missing[:10])}")  # fmt: skip
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.eval().to(device), not report["missing_keys"]


def _sentence(folder: Path | None, encoder: str) -> _Sentence:
    """What the files of sentence-transformers say, where there are any."""
    from transformers.utils import cached_file

    found: list[Any] = []
    for name in _SENTENCE_FILES:
        if folder:
            file = str(folder / name) if (folder / name).is_file() else None
        else:
            file = cached_file(
                encoder,
                name,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        try:
            found.append({} if file is None else json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON ({error})") from error
    settings, modules, pooling = found
    steps = {str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules}
    modes = {key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True}
    if isinstance(pooling.get("pooling_mode"), str):
        modes = {f"pooling_mode_{pooling['pooling_mode']}"}
    cls = modes in ({"pooling_mode_cls_token"}, {"pooling_mode_cls"})
    mean = modes <= {"pooling_mode_mean_tokens", "pooling_mode_mean"}
    left_out = sorted((steps - {"Transformer", "Pooling", "Normalize"}) | (set() if cls or mean else modes))
    if left_out:
        log.warning("%s: %s of sentence-transformers is not applied here, the features are other ones", encoder,
                    ", ".join(left_out))  # fmt: skip
    return _Sentence(settings.get("max_seq_length"), cls, "Normalize" in steps)


def _fingerprint(kind: str, payload: Any, folder: Path | None, encoder: str, config: Any, sentence: _Sentence) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, kind, sentence]).encode())
    if folder:
        # A folder may be trained further under its name, or be moved: its content says what it is.
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
                digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
                with file.open("rb") as opened:
                    while chunk := opened.read(1 << 20):
                        digest.update(chunk)
    else:
        known = [encoder, getattr(config, "_commit_hash", None), config.to_dict()]
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    if kind == "text":
        for text in payload:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d\n" % len(encoded) + encoded)
    else:
        digest.update(str(payload.shape).encode())
        digest.update(np.ascontiguousarray(payload).data)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(cache: Path, fingerprint: str) -> Iterator[None]:
    lock = FileLock(cache / f".features-{fingerprint}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unwritable(cache, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(cache: Path, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(f"{cache}: features cannot be kept there ({error}); name a folder in cache_dir")


def _read(path: Path, fingerprint: str, rows: int) -> NDArray[np.float32] | None:
    """What is kept, or None if there is nothing, or nothing that can be used."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            features: NDArray[Any] = file.get_tensor("features") if "features" in file.keys() else np.zeros(0)  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = str(error)
    else:
        usable: NDArray[np.float32] = features
        if about.get("fingerprint") != fingerprint:
            reason = f"its fingerprint is {about.get('fingerprint')}"
        elif features.ndim != 2 or len(features) != rows or features.dtype != np.float32:
            reason = f"it holds {features.dtype} {features.shape}, expected float32 ({rows}, size)"
        elif not np.isfinite(features).all():
            reason = "it holds numbers that are not finite"
        else:
            return usable
    log.warning("%s is damaged (%s): the features are computed again", path, reason)
    return None


def _write(path: Path, features: NDArray[np.float32], about: dict[str, str]) -> None:
    from safetensors.numpy import save

    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(save({"features": np.ascontiguousarray(features)}, metadata=about))
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _token_limit(network: Any, tokenizer: Any, sentence: _Sentence) -> int:
    limits = [limit for limit in (sentence.longest, tokenizer.model_max_length) if limit and limit < 1_000_000]
    for name, module in network.named_modules():
        table = name.rsplit(".", 1)[-1]
        named = table in ("position_embeddings", "position_embedding", "wpe") and "vision" not in name
        if named and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from behind its padding token's number.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(limits, default=_LONGEST)


def _encode_texts(
    texts: Any, network: Any, tokenizer: Any, sentence: _Sentence, encoder: str, batch_size: int
) -> NDArray[np.float32]:
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {encoder} has no padding token: set one (tokenizer.pad_token = "
                         "tokenizer.eos_token), save it with save_pretrained, and give that folder")  # fmt: skip
    limit = _token_limit(network, tokenizer, sentence)
    device = next(network.parameters()).device
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]]
    # Texts of similar length share a batch and the longest come first: little padding, and memory fails early or never.
    order = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
    if len(order) < len(texts):
        log.warning("%d of %d texts have no token for %s: their features are zeros", len(texts) - len(order),
                    len(texts), encoder)  # fmt: skip
    if not order:
        raise ValueError(f"none of {len(texts)} texts has a token for {encoder}: there is nothing to encode")

    def encode(rows: list[int]) -> Tensor:
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(device)
        pooled: Tensor
        if hasattr(network, "get_text_features"):
            pooled = network.get_text_features(**batch).pooler_output
            return pooled
        states = network(**batch).last_hidden_state
        pooled = states[:, 0] if sentence.cls else mean_pooling(states, batch["attention_mask"])
        return torch.nn.functional.normalize(pooled, dim=-1) if sentence.unit else pooled

    return _in_batches(encode, order, len(texts), batch_size, f"Texts by {encoder}")


def mean_pooling(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the states that are not padding.

    Args:
        states: `(batch, length, hidden_size)`.
        attention_mask: `(batch, length)`, 0 at padding.

    Returns:
        `(batch, hidden_size)`.
    """
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)


def _encode_images(
    images: NDArray[np.uint8], network: Any, processor: Any, pools: bool, encoder: str, batch_size: int
) -> NDArray[np.float32]:
    from PIL import Image

    device = next(network.parameters()).device

    def encode(rows: list[int]) -> Tensor:
        pictures = [Image.fromarray(images[row]) for row in rows]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"].to(device)
        if hasattr(network, "get_image_features"):
            projected: Tensor = network.get_image_features(pixel_values=pixels).pooler_output
            return projected
        output = network(pixel_values=pixels)
        pooled: Tensor | None = output.get("pooler_output")
        if pooled is not None and pools:
            return pooled.flatten(1)
        states: Tensor = output.last_hidden_state
        return states[:, 0] if states.ndim == 3 else states.flatten(2).mean(-1)

    return _in_batches(encode, list(range(len(images))), len(images), batch_size, f"Images by {encoder}")


@torch.inference_mode()
def _in_batches(
    encode: Callable[[list[int]], Tensor], order: list[int], items: int, batch_size: int, what: str
) -> NDArray[np.float32]:
    """Features by the batch, in the order given; rows that are not in it are zeros."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    features = np.zeros((0, 0), dtype=np.float32)
    for rows in track(batches, escape(what), console=Console(stderr=True), disable=not sys.stderr.isatty()):
        encoded = encode(rows).float().cpu().numpy()
        if not features.size:
            features = np.zeros((items, encoded.shape[1]), dtype=np.float32)
        features[rows] = encoded
    return features
