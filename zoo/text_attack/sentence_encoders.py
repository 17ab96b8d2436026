"""Vectors of titles, by which an edit's change of meaning is measured."""

from __future__ import annotations

import inspect
import json
import math
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.text_attack.token_batches import device_of, frame, load_network, longest_input, padded_batches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

_WAY_OUT = 'The encoder "tfidf" (sentence_encoder="tfidf") needs no file and no network'


@runtime_checkable
class SentenceEncoder(Protocol):
    """Turns texts into vectors."""

    @property
    def name(self) -> str:
        """What result files call the encoder."""
        ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(texts, dimensions)`, float32."""
        ...


def angular_similarity(a: Tensor, b: Tensor) -> Tensor:
    """1 - arccos(cos(a, b)) / pi: 1 for equal directions, 0.5 for orthogonal, 0 for opposite ones.

    The angle is 2 atan2(|a - b|, |a + b|) of the unit vectors, which unlike arccos is accurate at small angles, and
    exact at equal vectors.

    Args:
        a: Vectors `(..., dimensions)`.
        b: Vectors of a shape that broadcasts with that of `a`.

    Returns:
        float64 `(...)`; 0.5 where one vector is zero.
    """
    a, b = F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    # Two zero vectors have no angle: atan2(0, 0) would call them equal.
    zero = (a == 0).all(-1) | (b == 0).all(-1)
    return torch.where(zero, 0.5, 1 - angle / math.pi)


class TfidfEncoder:
    """Weighted words and character n-grams, hashed to a fixed number of columns: no network, no file.

    The cosine of two texts is the mean of that of their words and that of their character n-grams (2 to 4 characters
    within words). Hashing keeps n-grams that no title has, so that a misspelt word lowers the similarity. Weights are
    the smoothed inverse document frequencies of the columns among the titles.

    Args:
        titles: The catalogue, for the weights; None for equal weights.
        num_features: Columns of the words, and as many of the n-grams; a text of neither has a column of its own.
    """

    def __init__(self, titles: Sequence[str] | None = None, num_features: int = 4096) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

        if num_features < 1:
            raise ValueError(f"num_features={num_features}, expected a positive number")
        if titles is not None and not len(titles):
            raise ValueError("no titles to weigh words by: give a catalogue, or None for equal weights")
        self.name = "tfidf" if titles is not None else "hashed"
        self._num_features = num_features
        shared: dict[str, Any] = {"n_features": num_features, "alternate_sign": False, "norm": None}
        self._parts: list[tuple[Any, Any]] = []
        for options in ({"token_pattern": r"\w+"}, {"analyzer": "char_wb", "ngram_range": (2, 4)}):
            counter = HashingVectorizer(**shared, **options)
            weights = TfidfTransformer(use_idf=titles is not None)
            weights.fit(counter.transform(titles if titles is not None else [""]))
            self._parts.append((counter, weights))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(texts, 2 num_features + 1)`, float32."""
        vectors = torch.zeros(len(texts), 2 * self._num_features + 1)
        if not len(texts):
            return vectors
        for part, (counter, weights) in enumerate(self._parts):
            # The transformer gives rows of length 1, or 0 for a text without words.
            block = weights.transform(counter.transform(texts)).toarray()
            vectors[:, part * self._num_features : (part + 1) * self._num_features] = torch.from_numpy(block)
        vectors[:, -1] = (vectors == 0).all(-1)
        return F.normalize(vectors, dim=-1)


class TransformerEncoder:
    """The mean of a network's last hidden states over a text's tokens, as unit vectors.

    Args:
        name: A folder of `save_pretrained`, or a hub id, of an encoder. What a sentence-transformers folder does
            besides (other pooling, dense layers) is not done: such a folder is refused.
        batch_size: Texts of a forward pass.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the checkpoint is damaged, or wants more than a mean.
    """

    def __init__(self, name: str | Path, *, batch_size: int = 64) -> None:
        from zoo.common.pretrained import load_pretrained, transformers_library

        self.name = str(name)
        self._batch_size = batch_size
        _check_pooling(Path(name).expanduser())
        library = transformers_library()
        try:
            config = load_pretrained(name, library.AutoConfig, weights=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. {_WAY_OUT}") from error
        if config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder and decoder ({config.model_type}), expected an encoder. {_WAY_OUT}")
        options = {"add_pooling_layer": False} if _has_pooler(library, config) else {}
        self._network, self._tokenizer = load_network(name, library.AutoModel, _WAY_OUT, **options)
        self._before, self._after = frame(self._tokenizer)
        self._longest = longest_input(self._network, self._tokenizer)

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self._network.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(texts, hidden_size)`, float32, on the network's device; texts too long for it are cut.

        Raises:
            ValueError: If a text has no tokens.
        """
        device = device_of(self._network)
        vectors = torch.zeros(len(texts), self._network.config.hidden_size, device=device)
        if not len(texts):
            return vectors
        room = None if self._longest is None else self._longest - len(self._before) - len(self._after)
        inner = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [[*self._before, *ids[:room], *self._after] for ids in inner]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"the title {text!r} has no tokens for {self.name}")
        for places, ids, mask in padded_batches(rows, self._batch_size, device):
            hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].to(hidden.dtype)
            vectors[places] = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
        return vectors


class SentenceTransformerEncoder:
    """A model of the package sentence-transformers, with its own pooling.

    Args:
        name: A folder or hub id, such as sentence-transformers/stsb-mpnet-base-v2.
        batch_size: Texts of a forward pass.

    Raises:
        ImportError: If the package is not installed.
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
    """

    def __init__(self, name: str | Path, *, batch_size: int = 64) -> None:
        self.name = str(name)
        self._batch_size = batch_size
        try:
            library = import_module("sentence_transformers")
        except ImportError as error:
            raise ImportError(
                f"this encoder needs sentence-transformers: pip install sentence-transformers. {_WAY_OUT}"
            ) from error
        try:
            self._network = library.SentenceTransformer(str(name), device="cpu")
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise FileNotFoundError(f"{name} cannot be read ({reason}). {_WAY_OUT}") from error

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self._network.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `(texts, dimensions)`, float32."""
        vectors: Tensor = self._network.encode(
            list(texts), batch_size=self._batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return F.normalize(vectors.float(), dim=-1)


def sentence_encoder(
    name: str | Path,
    titles: Sequence[str] | None = None,
    library: Literal["transformers", "sentence-transformers"] = "transformers",
) -> SentenceEncoder:
    """An encoder by name.

    Args:
        name: "tfidf", weighted by `titles`; or a folder or hub id of a network.
        titles: The catalogue.
        library: What reads a network: transformers, with the mean over tokens, or sentence-transformers.

    Raises:
        FileNotFoundError: If a network is not on disk, and the hub cannot be reached.
        ValueError: If the library is unknown, or a checkpoint damaged.
    """
    if library not in ("transformers", "sentence-transformers"):
        raise ValueError(f"library={library!r}, expected 'transformers' or 'sentence-transformers'")
    if str(name) == "tfidf":
        return TfidfEncoder(titles)
    return TransformerEncoder(name) if library == "transformers" else SentenceTransformerEncoder(name)


def _has_pooler(library: Any, config: Any) -> bool:
    network = library.MODEL_MAPPING.get(type(config), None)
    network = network[0] if isinstance(network, tuple) else network
    return network is not None and "add_pooling_layer" in inspect.signature(network.__init__).parameters


def _check_pooling(folder: Path) -> None:
    pooling = folder / "1_Pooling" / "config.json"
    extra = [path.name for path in folder.glob("[2-9]_*") if not path.name.endswith("_Normalize")]
    modes: dict[str, Any] = json.loads(pooling.read_text(encoding="utf-8")) if pooling.is_file() else {}
    wrong = [key for key, value in modes.items() if key.startswith("pooling_mode_") and value is True]
    if extra or wrong not in ([], ["pooling_mode_mean_tokens"]):
        raise ValueError(
            f"{folder} wants more than the mean over tokens ({', '.join(wrong + extra)}): read it with "
            'library="sentence-transformers"'
        )
