"""One LightningDataModule per kind of data, with the batches it yields.

Names load on first use, so that `import datamodules` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # For readers and type checkers.
    from datamodules.class_stream import ClassStreamData  # noqa: F401
    from datamodules.class_stream_batches import EvalBatch, StreamBatch  # noqa: F401
    from datamodules.classification_batches import ClassificationBatch  # noqa: F401
    from datamodules.classification_tasks import ClassificationTasksData  # noqa: F401
    from datamodules.cloze import ClozeData, ClozeRows, PairBatch, ReaderBatch, SeparateBatch, SlotBatch  # noqa: F401
    from datamodules.cloze_text import fill_placeholder  # noqa: F401
    from datamodules.dialogue import DialogueData  # noqa: F401
    from datamodules.dialogue_rows import DialogueBatch, emotion_targets  # noqa: F401
    from datamodules.image_tasks import ImageTaskData  # noqa: F401
    from datamodules.interaction import InteractionData  # noqa: F401
    from datamodules.interaction_rows import InteractionBatch, InteractionTable, RankingBatch  # noqa: F401
    from datamodules.passages import PassageBatch, PassageData  # noqa: F401
    from datamodules.sequence import SequenceBatch, SequenceData, SequenceTable  # noqa: F401
    from datamodules.shilling import ShillingInjector  # noqa: F401
    from datamodules.sources.log_mel import LogMel  # noqa: F401
    from datamodules.tabular_tasks import TabularTaskData  # noqa: F401
    from datamodules.task_batches import ImageTaskBatch, TabularTaskBatch  # noqa: F401
    from datamodules.text_rec import TextRecData  # noqa: F401
    from datamodules.text_rec_rows import TargetBatch, TextRecBatch  # noqa: F401
    from datamodules.video_audio import VideoAudioData  # noqa: F401
    from datamodules.video_audio_rows import VideoAudioBatch  # noqa: F401

DATAMODULES: dict[str, str] = {
    "ClassStreamData": "datamodules.class_stream",
    "ClassificationTasksData": "datamodules.classification_tasks",
    "ClozeData": "datamodules.cloze",
    "DialogueData": "datamodules.dialogue",
    "ImageTaskData": "datamodules.image_tasks",
    "InteractionData": "datamodules.interaction",
    "PassageData": "datamodules.passages",
    "SequenceData": "datamodules.sequence",
    "TabularTaskData": "datamodules.tabular_tasks",
    "TextRecData": "datamodules.text_rec",
    "VideoAudioData": "datamodules.video_audio",
}
"""The LightningDataModules, what `train.py --data` takes, and where each is defined."""

BATCHES: dict[str, str] = {
    "ClassificationBatch": "datamodules.classification_batches",
    "ClozeRows": "datamodules.cloze",
    "DialogueBatch": "datamodules.dialogue_rows",
    "EvalBatch": "datamodules.class_stream_batches",
    "ImageTaskBatch": "datamodules.task_batches",
    "InteractionBatch": "datamodules.interaction_rows",
    "InteractionTable": "datamodules.interaction_rows",
    "PairBatch": "datamodules.cloze",
    "PassageBatch": "datamodules.passages",
    "RankingBatch": "datamodules.interaction_rows",
    "ReaderBatch": "datamodules.cloze",
    "SeparateBatch": "datamodules.cloze",
    "SequenceBatch": "datamodules.sequence",
    "SequenceTable": "datamodules.sequence",
    "SlotBatch": "datamodules.cloze",
    "StreamBatch": "datamodules.class_stream_batches",
    "TabularTaskBatch": "datamodules.task_batches",
    "TargetBatch": "datamodules.text_rec_rows",
    "TextRecBatch": "datamodules.text_rec_rows",
    "VideoAudioBatch": "datamodules.video_audio_rows",
}
"""What they hand to a model, and where each is defined."""

PARTS: dict[str, str] = {
    "LogMel": "datamodules.sources.log_mel",
    "ShillingInjector": "datamodules.shilling",
    "emotion_targets": "datamodules.dialogue_rows",
    "fill_placeholder": "datamodules.cloze_text",
}
"""Parts for use in any project, and where each is defined."""

__all__ = [  # noqa: PLE0604, RUF100  (the tables above are the list)
    *DATAMODULES,
    *BATCHES,
    *PARTS,
]


def __getattr__(name: str) -> Any:
    path = DATAMODULES.get(name) or BATCHES.get(name) or PARTS.get(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(import_module(path), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
