"""Checks of the options of `DialogueData`, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.dialogue_vocabulary import SPECIAL_TOKENS
from datamodules.options import at_least, one_of
from datamodules.sources.dialogue_sets import SETS
from datamodules.sources.dialogue_turns import known_names, largest_id

if TYPE_CHECKING:
    from datamodules.dialogue import DialogueData
    from datamodules.sources.dialogue_turns import Dialogues

FILES = ("dailydialog_zip", "eacm_json", "tsv")
SOURCES = ("embedded", *SETS, *FILES)


def implied_source(path: str | None) -> str:
    """The source that a path alone implies.

    Raises:
        ValueError: If its name says nothing.
    """
    if not path:
        return "embedded"
    name = path.removesuffix(".gz")
    if name.endswith(".json"):
        return "eacm_json"
    if name.endswith((".tsv", ".txt")):
        return "tsv"
    raise ValueError(f"path={path}: say what it is in source, one of {', '.join(SOURCES[1:])}")


def check_options(data: DialogueData) -> None:
    """Check the options.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """
    rules = data.rules
    one_of(("source", data.source, SOURCES), ("balance", data.balance, ("none", "class", "mixed")))
    at_least(
        ("num_emotions", data.given_number, 2),
        ("context_turns", data.context_turns, 1),
        ("max_post_length", data.max_post_length, 1),
        ("max_reply_length", data.max_reply_length, 1),
        ("vocab_size", data.vocab_size, len(SPECIAL_TOKENS) + 1),
        ("reply_vocab_size", data.given_reply_size, len(SPECIAL_TOKENS) + 1),
        ("min_count", data.min_count, 1),
        ("keep_per_class", rules.keep_per_class, 1),
        ("eval_per_class", rules.eval_per_class, 1),
        ("eval_from_train", rules.eval_from_train, 0),
        ("subset_seed", rules.seed, 0),
        ("batch_size", data.batch_size, 1),
        ("eval_batch_size", data.eval_batch_size, 1),
        ("num_workers", data.num_workers, 0),
    )
    if not 0 <= data.balance_power <= 1:
        raise ValueError(f"balance_power must be from 0 to 1, got {data.balance_power}")
    if data.balance_power and data.balance == "none":
        raise ValueError(f"balance_power={data.balance_power} needs balance='mixed' or 'class'")
    if not 0 < rules.val_share < 1:
        raise ValueError(f"val_share must be between 0 and 1, got {rules.val_share}")
    if not 0 <= rules.test_share < 1:
        raise ValueError(f"test_share must be at least 0 and below 1, got {rules.test_share}")
    if data.path and data.source == "embedded":
        raise ValueError(f"path={data.path} and source='embedded' contradict each other: say what it is in source, "
                         f"one of {', '.join(SOURCES[1:])}")  # fmt: skip
    if data.source in FILES and not data.path:
        raise ValueError(f"source={data.source!r} needs path: its file, or the folder of DailyDialog")
    if data.data_dir and (data.path or data.source not in SETS):
        raise ValueError(f"data_dir holds published sets, but path={data.path} and source={data.source!r}: "
                         "use path for a file")  # fmt: skip
    if data.share_vocab and data.given_reply_size is not None:
        raise ValueError(f"reply_vocab_size={data.given_reply_size} needs share_vocab=False")
    if rules.eval_from_train and rules.eval_per_class is None:
        raise ValueError(f"eval_from_train={rules.eval_from_train} fills up to eval_per_class: set that")
    names, number = data.given_names, data.given_number
    if data.source not in ("eacm_json", "tsv") and (names is not None or number is not None):
        raise ValueError(f"label_names and num_emotions are for eacm_json and tsv, source={data.source!r} has its "
                         "own emotions")  # fmt: skip
    if names is not None and (len(set(names)) < max(len(names), 2) or number not in (None, len(names))):
        raise ValueError(f"label_names={names}, num_emotions={number}: expected different names, at least two, as "
                         "many as emotions")  # fmt: skip


def names_in(train: Dialogues, number: int | None) -> list[str]:
    """Names of the emotions of a training file.

    Args:
        train: Its dialogues.
        number: How many emotions there are; by default those of the format, or as many as the largest id asks for.

    Raises:
        ValueError: If the file does not tell.
    """
    names = known_names(train)
    if names is not None:
        if largest_id(train) >= 0:
            raise ValueError(f"{train.name} has emotions by name and by number: set label_names")
        if number is not None and number != len(names):
            raise ValueError(f"num_emotions={number}, but {train.name} has {len(names)}: {', '.join(names)}")
        return names
    if number is None:
        number = len(train.names) or largest_id(train) + 1
    if number < 2:
        raise ValueError(f"{train.name} has no emotions to tell how many there are: set label_names")
    return list(train.names) if len(train.names) == number else [str(value) for value in range(number)]
