"""Posts and replies with emotions: batches for models that answer, and choose the emotion of their answer."""

from __future__ import annotations

import logging
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule

from datamodules.dialogue_checks import check_options, implied_source, names_in
from datamodules.dialogue_rows import (
    EVALUATION_KEY,
    DialogueBatch,
    DialogueRows,
    TurnTokens,
    emotion_targets,
    labels_of,
    turn_tokens,
)
from datamodules.dialogue_sampling import BalancedSampler
from datamodules.dialogue_split import Pairs, Rules, Split, fewer, pairs_of, split
from datamodules.dialogue_vocabulary import learn_tokenizer
from datamodules.loading import BatchLoader, Draw, KeyedSampler, LoaderMixin, follow, run_seed, training_sampler
from datamodules.options import one_of
from datamodules.sources.dialogue_files import read_file, read_posts
from datamodules.sources.dialogue_sets import SETS, SEVEN, Parts, read_dailydialog, read_set
from datamodules.sources.interactions import return_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from torch import Tensor

    from datamodules.sources.dialogue_turns import Dialogues

__all__ = ["DialogueBatch", "DialogueData", "emotion_targets"]

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test", "predict")


class DialogueData(LoaderMixin, LightningDataModule):
    """Posts and the replies to them, each side with its emotion where it is known.

    Every turn of a dialogue but the first is a reply, and the `context_turns` before it are its post, whose emotion is
    that of the last of them. In EmoContext only the third turn is a reply, and emotions of posts are unknown. In
    EmpatheticDialogues all turns have the emotion of their dialogue.

    A published set has a training file and one or two held-out files. Where there are two they are for validation and
    test. Where there is one, as in `$ZOO_DATA` (dailydialog: `validation`, emocontext: `valid`, meld: `dev`), it is for
    test, and a seeded slice of the training file's dialogues is for validation. Where there is none, a second slice is
    for test. Pairs with the same post are in one slice. The vocabulary comes from what is left for training.

    Args:
        source: "embedded" (default), "dailydialog", "emocontext", "meld", "reccon", "empathetic", "dailydialog_zip"
            (the original zip file or folder), "eacm_json" (implied by a `path` to `.json`), or "tsv" (implied by a
            `path` to `.tsv` or `.txt`): `post<TAB>reply[<TAB>post emotion<TAB>reply emotion]`. `.gz` is fine, too.
        path: Training file, or the folder of a set; for sets by default in `data_dir`.
        val_path: File for validation in place of the set's own or of the slice, in any of the formats.
        test_path: File to test on, in any of the formats. What is for training does not depend on it, so that a trained
            model can be tested on it: with `path` alone, set `test_share=0` to keep the test slice for training.
        predict_path: Posts to answer: a file of one a line (`.txt`), or of any of the formats; by default those of the
            test part. `[SEP]` stands between the turns of a post.
        data_dir: Folder of the published sets; `$ZOO_DATA` by default, or else the user's cache.
        num_emotions: Number of emotions of a file whose emotions are numbers; by default 6 for eacm_json, and for a
            TSV as many as its largest asks for.
        label_names: Names of the emotions by id, for eacm_json and tsv; by default those of the official files, and
            the names or numbers in the TSV.
        context_turns: Turns before the reply that make the post; 2 for emocontext and 1 otherwise by default.
        max_post_length: Longest post; the last words are kept.
        max_reply_length: Longest reply with its EOS; the first words are kept.
        vocab_size: Largest vocabulary, special tokens included.
        reply_vocab_size: That of replies; by default that of posts.
        share_vocab: Whether posts and replies have one vocabulary.
        min_count: Rarer words of the training part become `[UNK]`.
        keep_per_class: Only so many training pairs of each reply emotion, drawn by `subset_seed`.
        eval_per_class: The same for validation and for test.
        eval_from_train: Where the set's own test file has fewer than `eval_per_class` pairs of a reply emotion, up to
            so many of the training file fill it up. They, and their dialogues, are left out of training and validation.
        subset_seed: Of these draws and of the slices.
        val_share: Share of the dialogues in the validation slice.
        test_share: Share of the dialogues in the test slice; that of `val_share` by default, 0 for no slice.
        balance: "none"; "class": each training batch has one reply emotion, all equally likely (the paper); "mixed":
            that of each row is drawn. Emotions without a training pair are left out.
        balance_power: Emotions are drawn in proportion to this power of their training pairs: 0 for all equally often,
            1 as often as they are; 0.5 keeps frequent ones frequent, and rare ones do not vanish.
        bucketed: Whether training batches have posts and replies of about one length.
        sample_pairs: Pairs of the embedded sample.
        batch_size: Training batch of one process.
        eval_batch_size: Batch of one process in validation, test and prediction.
        num_workers: Worker processes; 0 is the fastest, as a batch is one gather.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the order of training; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        data_dir: str | None = None,
        num_emotions: int | None = None,
        label_names: list[str] | None = None,
        context_turns: int | None = None,
        max_post_length: int = 30,
        max_reply_length: int = 30,
        vocab_size: int = 10_000,
        reply_vocab_size: int | None = None,
        share_vocab: bool = True,
        min_count: int = 1,
        keep_per_class: int | None = None,
        eval_per_class: int | None = None,
        eval_from_train: int = 0,
        subset_seed: int = 0,
        val_share: float = 0.1,
        test_share: float | None = None,
        balance: str = "none",
        balance_power: float = 0.0,
        bucketed: bool = True,
        sample_pairs: int = 2_000,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source or implied_source(path)
        self.path, self.val_path, self.test_path, self.predict_path = path, val_path, test_path, predict_path
        self.data_dir, self.given_number, self.given_names = data_dir, num_emotions, label_names
        self.context_turns = (2 if self.source == "emocontext" else 1) if context_turns is None else context_turns
        self.max_post_length, self.max_reply_length = max_post_length, max_reply_length
        self.vocab_size, self.given_reply_size = vocab_size, reply_vocab_size
        self.share_vocab, self.min_count = share_vocab, min_count
        test_share = val_share if test_share is None else test_share
        self.rules = Rules(val_share, test_share, keep_per_class, eval_per_class, eval_from_train, subset_seed)
        self.balance, self.balance_power, self.bucketed = balance, balance_power, bucketed
        self.sample_pairs = sample_pairs
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._parts: dict[str, DialogueRows] = {}
        self._tokens: dict[tuple[int, int], TurnTokens] = {}
        self._warned = False
        check_options(self)

    @cached_property
    def _files(self) -> Parts:
        """The set's own files."""
        if self.source == "embedded":
            from datamodules.sources.dialogue_sample import dialogue_sample

            found = dialogue_sample(self.sample_pairs)
        elif self.source in SETS:
            found = read_set(self.source, self.path, self.data_dir)
        else:
            assert self.path is not None
            path = Path(self.path)
            found = read_dailydialog(path) if self.source == "dailydialog_zip" else Parts(read_file(path))
        return found._replace(val=read_file(Path(self.val_path))) if self.val_path else found

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the emotions by id."""
        if self.given_names is not None:
            return list(self.given_names)
        if self.source == "embedded":
            from datamodules.sources.dialogue_sample import NAMES

            return list(NAMES)
        if self.source in SETS:
            return list(SETS[self.source].label_names)
        if self.source == "dailydialog_zip":
            return list(SEVEN)
        return names_in(self._files.train, self.given_number)

    @property
    def _fixed(self) -> bool:
        """Whether the names do not come from the training file."""
        return self.source != "tsv" or self.given_names is not None

    @property
    def num_emotions(self) -> int:
        """Number of emotions."""
        return len(self.label_names)

    @cached_property
    def _split(self) -> Split:
        return split(self._files, self.label_names, self.context_turns, self._fixed, self.rules)

    @cached_property
    def _tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        train = self._split.train
        texts = train.dialogues.texts
        said, asked = np.zeros((2, len(texts)), dtype=bool)
        said[train.reply] = True
        for back in range(1, self.context_turns + 1):
            before = train.reply - back
            asked[before[before >= train.first]] = True

        def learn(marks: NDArray[np.bool_], size: int) -> Tokenizer:
            return learn_tokenizer([texts[row] for row in np.flatnonzero(marks)], size, self.min_count)

        if self.share_vocab:
            both = learn(said | asked, self.vocab_size)
            return both, both
        return learn(asked, self.vocab_size), learn(said, self.given_reply_size or self.vocab_size)

    @property
    def post_tokenizer(self) -> Tokenizer:
        """Words of posts; the special tokens are `[PAD]`, `[UNK]`, `[EOS]`, `[GO]` and `[SEP]`, at 0 to 4."""
        return self._tokenizers[0]

    @property
    def reply_tokenizer(self) -> Tokenizer:
        """Words of replies; the very tokenizer of posts with `share_vocab`."""
        return self._tokenizers[1]

    @property
    def post_vocab_size(self) -> int:
        """Words of posts, special tokens included."""
        return self.post_tokenizer.get_vocab_size()

    @property
    def reply_vocab_size(self) -> int:
        """Words of replies, special tokens included."""
        return self.reply_tokenizer.get_vocab_size()

    def _encoded(self, dialogues: Dialogues, side: int) -> TurnTokens:
        key = (id(dialogues), 0 if self.share_vocab else side)
        if key not in self._tokens:
            self._tokens[key] = turn_tokens(self._tokenizers[side], dialogues.texts)
        return self._tokens[key]

    def _other(self, path: str, replies: bool = True) -> Pairs:
        """Pairs of a file that is not of the set itself."""
        place = Path(path)
        plain = not replies and place.name.removesuffix(".gz").endswith(".txt")
        found = read_posts(place) if plain else read_file(place)
        context = 1 if plain else self.context_turns
        return pairs_of(found, self.label_names, context, self._fixed, replies)

    def _pairs(self, part: str) -> Pairs:
        if part == "predict" and self.predict_path:
            return self._other(self.predict_path, replies=False)
        if part in ("test", "predict") and self.test_path:
            found = self._other(self.test_path)
            most = self.rules.eval_per_class
            return found if most is None else fewer(found, most, self.rules.seed)
        pairs = self._split.test if part == "predict" else getattr(self._split, part)
        if pairs is None:
            raise ValueError(f"source={self.source!r} has nothing for {part}: give test_path, or a test_share above 0")
        return pairs

    def _rows(self, part: str) -> DialogueRows:
        if part == "predict" and not self.predict_path:
            part = "test"
        if part in self._parts:
            return self._parts[part]
        pairs = self._pairs(part)
        dialogues = pairs.dialogues
        posts, replies = pairs.reply - 1, pairs.reply
        rows = DialogueRows(
            f"{dialogues.name} ({part})",
            dialogues.texts,
            self._encoded(dialogues, 0),
            self._encoded(dialogues, 1),
            pairs.first,
            pairs.reply,
            labels_of(pairs.primary[posts], pairs.secondary[posts], self.num_emotions),
            labels_of(pairs.primary[replies], pairs.secondary[replies], self.num_emotions),
            self.max_post_length,
            self.max_reply_length,
        )
        self._parts[part] = rows
        return rows

    def whole(self, part: str) -> DialogueBatch:
        """All rows of a part as one batch, in the order of the file.

        Args:
            part: "train", "val", "test" or "predict".

        Raises:
            ValueError: If there is no such part.
        """
        one_of(("part", part, PARTS))
        rows = self._rows(part)
        return rows[Draw(torch.arange(len(rows)), EVALUATION_KEY)]

    @cached_property
    def emotion_counts(self) -> Tensor:
        """Training pairs of each reply emotion, int64 `(num_emotions,)`; the primary one counts."""
        classes = self._rows("train").reply_labels.classes
        return torch.bincount(classes[classes >= 0], minlength=self.num_emotions)

    def transitions(self, part: str) -> Tensor:
        """How often each emotion answers each: int64 `(num_emotions, num_emotions)`, post by reply.

        Rows with an unknown emotion do not count.

        Args:
            part: "train", "val", "test" or "predict".
        """
        one_of(("part", part, PARTS))
        rows = self._rows(part)
        posts, replies = rows.post_labels.classes, rows.reply_labels.classes
        known = (posts >= 0) & (replies >= 0)
        size = self.num_emotions
        return torch.bincount(posts[known] * size + replies[known], minlength=size * size).view(size, size)

    def state_dict(self) -> dict[str, Any]:
        """Words and emotions: a checkpoint's ids mean nothing with others."""
        return {
            "source": self.source,
            "label_names": self.label_names,
            "post_tokenizer": self.post_tokenizer.to_str(),
            "reply_tokenizer": None if self.share_vocab else self.reply_tokenizer.to_str(),
            "words": [zlib.crc32(tokenizer.to_str().encode()) for tokenizer in self._tokenizers],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the words and emotions of a checkpoint with these.

        Raises:
            ValueError: If they differ.
        """
        own = self.state_dict()
        for what, name in (("label_names", "emotions"), ("words", "words")):
            if own[what] != state_dict[what]:
                raise ValueError(
                    f"the checkpoint was trained with other {name}: {_brief(state_dict)} of source="
                    f"{state_dict['source']!r}, here {_brief(own)} of source={own['source']!r}. Use the data options "
                    "of the training, and test_path or predict_path for other dialogues"
                )

    def setup(self, stage: str) -> None:
        """Read the data; later calls cost nothing."""
        if stage == "fit":
            self._rows("train")
            self._warn_of_absent()
        if stage in ("fit", "validate"):
            self._rows("val")
        else:
            # Stages are an enumeration, whose members print another name.
            self._rows("test" if stage == "test" else "predict")
        return_memory()

    def _warn_of_absent(self) -> None:
        absent = [name for name, count in zip(self.label_names, self.emotion_counts.tolist(), strict=True) if not count]
        if self.balance != "none" and absent and not self._warned:
            self._warned = True
            log.warning("%s: no training reply has the emotions %s: balance=%r leaves them out",
                        self._split.train.dialogues.name, ", ".join(absent), self.balance)  # fmt: skip

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        rows = self._rows("train")
        lengths = rows.lengths if self.bucketed else None
        if self.balance == "none":
            plain = training_sampler(len(rows), self.batch_size, self.seed, self.trainer, "pairs", lengths)
            return self._loader(rows, plain)
        self._warn_of_absent()
        classes, whole = rows.reply_labels.classes, self.balance == "class"
        seed = run_seed(self.seed)
        sampler = BalancedSampler(
            classes, self.batch_size, whole_batches=whole, power=self.balance_power, lengths=lengths, seed=seed
        )
        if self.trainer is not None:
            follow(sampler, self.trainer)
        return self._loader(rows, sampler)

    def _eval_loader(self, part: str) -> BatchLoader:
        rows = self._rows(part)
        return self._loader(rows, KeyedSampler(len(rows), self.eval_batch_size, order=rows.by_length()))

    def val_dataloader(self) -> BatchLoader:
        """The validation part, in the order of length."""
        return self._eval_loader("val")

    def test_dataloader(self) -> BatchLoader:
        """The test part, or the file `test_path`, in the order of length."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """The posts of `predict_path`, or those of the test part, in the order of length."""
        return self._eval_loader("predict")


def _brief(state: dict[str, Any]) -> str:
    names = state["label_names"]
    return f"{len(names)} emotions ({', '.join(names)}) and words with the checksums {state['words']}"
