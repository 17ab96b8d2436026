"""Model merging: task vectors, AdaMerging, representation surgery, one-shot merges, and modules that use them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.merging.adamerging import AdaMerging
    from zoo.merging.backbones import ImageEncoder, build_encoder, save_encoder
    from zoo.merging.batch_norm import recalibrate_bn
    from zoo.merging.bias import RepresentationBias
    from zoo.merging.callbacks import CoefficientLogger, MergeOnFitEnd
    from zoo.merging.closed_form import LinearSurgery, ShiftSurgery
    from zoo.merging.constraints import MergingCoefficients
    from zoo.merging.deep_surgery import DeepSurgery
    from zoo.merging.experts import TaskExperts
    from zoo.merging.feature_cache import FeatureCache
    from zoo.merging.feature_callbacks import RepresentationBiasCallback, TSNECallback
    from zoo.merging.features import default_features
    from zoo.merging.fisher import fisher_information, fisher_merge
    from zoo.merging.heads import CosineHead, LinearHead, load_heads, save_heads
    from zoo.merging.merged_classifier import MergedClassifier
    from zoo.merging.merged_model import MergedModel
    from zoo.merging.mixins import EntropyAdaptation
    from zoo.merging.objectives import objective
    from zoo.merging.one_shot import dare_merge, magnitude_merge, task_arithmetic, ties_merge, weight_average
    from zoo.merging.regmean import regmean_merge
    from zoo.merging.representation_surgery import RepresentationSurgery
    from zoo.merging.surgery import SurgeryBank, SurgeryModule, surgery_loss
    from zoo.merging.task_model import TaskModel, task_model
    from zoo.merging.task_vectors import TaskVectorStore
    from zoo.merging.transforms import Dare, Magnitude, Ties
    from zoo.merging.weights import open_weights
    from zoo.merging.zero_shot import zero_shot_heads

_HOMES = {
    "AdaMerging": "adamerging",
    "CoefficientLogger": "callbacks",
    "CosineHead": "heads",
    "Dare": "transforms",
    "DeepSurgery": "deep_surgery",
    "EntropyAdaptation": "mixins",
    "FeatureCache": "feature_cache",
    "ImageEncoder": "backbones",
    "LinearHead": "heads",
    "LinearSurgery": "closed_form",
    "Magnitude": "transforms",
    "MergeOnFitEnd": "callbacks",
    "MergedClassifier": "merged_classifier",
    "MergedModel": "merged_model",
    "MergingCoefficients": "constraints",
    "RepresentationBias": "bias",
    "RepresentationBiasCallback": "feature_callbacks",
    "RepresentationSurgery": "representation_surgery",
    "ShiftSurgery": "closed_form",
    "SurgeryBank": "surgery",
    "SurgeryModule": "surgery",
    "TSNECallback": "feature_callbacks",
    "TaskExperts": "experts",
    "TaskModel": "task_model",
    "TaskVectorStore": "task_vectors",
    "Ties": "transforms",
    "build_encoder": "backbones",
    "dare_merge": "one_shot",
    "default_features": "features",
    "fisher_information": "fisher",
    "fisher_merge": "fisher",
    "load_heads": "heads",
    "magnitude_merge": "one_shot",
    "objective": "objectives",
    "open_weights": "weights",
    "recalibrate_bn": "batch_norm",
    "regmean_merge": "regmean",
    "save_encoder": "backbones",
    "save_heads": "heads",
    "surgery_loss": "surgery",
    "task_arithmetic": "one_shot",
    "task_model": "task_model",
    "ties_merge": "one_shot",
    "weight_average": "one_shot",
    "zero_shot_heads": "zero_shot",
}
__all__ = [
    "AdaMerging",
    "CoefficientLogger",
    "CosineHead",
    "Dare",
    "DeepSurgery",
    "EntropyAdaptation",
    "FeatureCache",
    "ImageEncoder",
    "LinearHead",
    "LinearSurgery",
    "Magnitude",
    "MergeOnFitEnd",
    "MergedClassifier",
    "MergedModel",
    "MergingCoefficients",
    "RepresentationBias",
    "RepresentationBiasCallback",
    "RepresentationSurgery",
    "ShiftSurgery",
    "SurgeryBank",
    "SurgeryModule",
    "TSNECallback",
    "TaskExperts",
    "TaskModel",
    "TaskVectorStore",
    "Ties",
    "build_encoder",
    "dare_merge",
    "default_features",
    "fisher_information",
    "fisher_merge",
    "load_heads",
    "magnitude_merge",
    "objective",
    "open_weights",
    "recalibrate_bn",
    "regmean_merge",
    "save_encoder",
    "save_heads",
    "surgery_loss",
    "task_arithmetic",
    "task_model",
    "ties_merge",
    "weight_average",
    "zero_shot_heads",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
