"""Published methods as Lightning modules, and the parts they are made of.

Names load on first use, so that `import zoo` costs nothing and one part does not pull in another's dependencies:

>>> import zoo
>>> zoo.MODELS["SASRec"]
'zoo.ticoserec.sasrec'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # `as` marks a name as public for type checkers; a test holds these lines and the tables together.
    from zoo.adatask.aggregators import aggregator as aggregator
    from zoo.adatask.callbacks import TaskDominanceMonitor as TaskDominanceMonitor
    from zoo.adatask.delta_m import delta_m as delta_m
    from zoo.adatask.hooks import TaskGradMixin as TaskGradMixin
    from zoo.adatask.module import MultiTaskModule as MultiTaskModule
    from zoo.adatask.mtadam import MTAdam as MTAdam
    from zoo.adatask.optimizer import AdaTask as AdaTask
    from zoo.adatask.weightings import weighting as weighting
    from zoo.common.contrastive import info_nce as info_nce
    from zoo.common.contrastive import nt_xent as nt_xent
    from zoo.common.ranking import FullRankingMetrics as FullRankingMetrics
    from zoo.ticoserec.augment import TiAugmenter as TiAugmenter
    from zoo.ticoserec.augment import ViewPolicy as ViewPolicy
    from zoo.ticoserec.encoder import SASRecEncoder as SASRecEncoder
    from zoo.ticoserec.module import TiCoSeRec as TiCoSeRec
    from zoo.ticoserec.popularity import Popularity as Popularity
    from zoo.ticoserec.sasrec import SASRec as SASRec
    from zoo.ticoserec.siblings import CL4SRec as CL4SRec
    from zoo.ticoserec.siblings import CoSeRec as CoSeRec
    from zoo.ticoserec.similarity import ItemSimilarity as ItemSimilarity

MODELS: dict[str, str] = {
    "CL4SRec": "zoo.ticoserec.siblings",
    "CoSeRec": "zoo.ticoserec.siblings",
    "MultiTaskModule": "zoo.adatask.module",
    "Popularity": "zoo.ticoserec.popularity",
    "SASRec": "zoo.ticoserec.sasrec",
    "TiCoSeRec": "zoo.ticoserec.module",
}
"""The LightningModules, what `train.py --model` takes, and where each is defined."""

PARTS: dict[str, str] = {
    "AdaTask": "zoo.adatask.optimizer",
    "FullRankingMetrics": "zoo.common.ranking",
    "ItemSimilarity": "zoo.ticoserec.similarity",
    "MTAdam": "zoo.adatask.mtadam",
    "SASRecEncoder": "zoo.ticoserec.encoder",
    "TaskDominanceMonitor": "zoo.adatask.callbacks",
    "TaskGradMixin": "zoo.adatask.hooks",
    "TiAugmenter": "zoo.ticoserec.augment",
    "ViewPolicy": "zoo.ticoserec.augment",
    "aggregator": "zoo.adatask.aggregators",
    "delta_m": "zoo.adatask.delta_m",
    "info_nce": "zoo.common.contrastive",
    "nt_xent": "zoo.common.contrastive",
    "weighting": "zoo.adatask.weightings",
}
"""Parts for use in any project, and where each is defined: plain torch, but for a mixin and a callback."""

__version__ = "0.1.0"
__all__ = [*MODELS, *PARTS]


def __getattr__(name: str) -> Any:
    path = MODELS.get(name) or PARTS.get(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(import_module(path), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
