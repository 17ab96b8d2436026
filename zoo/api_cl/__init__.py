"""API-CL: continual learning from a stream of black-box APIs, and its parts for other projects."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.api_cl.apis import APIBuilder, train_api
    from zoo.api_cl.black_box import APIResponseError, BlackBoxAPI
    from zoo.api_cl.boxes import CallableAPI, ModuleAPI
    from zoo.api_cl.continual_metrics import ContinualMetrics
    from zoo.api_cl.gaps import ResponseGap
    from zoo.api_cl.generator_objective import GeneratorObjective
    from zoo.api_cl.generators import DCGANGenerator, DFGenerator
    from zoo.api_cl.http_box import HTTPAPI
    from zoo.api_cl.ledger import QueryBudgetExceeded, QueryLedger
    from zoo.api_cl.memory import ReplayMemory
    from zoo.api_cl.module import APIStreamCL
    from zoo.api_cl.networks import Classifier, build_classifier
    from zoo.api_cl.responses import to_probabilities
    from zoo.api_cl.server import classifier_app
    from zoo.api_cl.similarity import BiasedCKA, DebiasedCKA, similarity_loss
    from zoo.api_cl.zeroth_order import ZerothOrderGradient, step_size

_HOMES = {
    "APIBuilder": "apis",
    "APIResponseError": "black_box",
    "APIStreamCL": "module",
    "BiasedCKA": "similarity",
    "BlackBoxAPI": "black_box",
    "CallableAPI": "boxes",
    "Classifier": "networks",
    "ContinualMetrics": "continual_metrics",
    "DCGANGenerator": "generators",
    "DFGenerator": "generators",
    "DebiasedCKA": "similarity",
    "GeneratorObjective": "generator_objective",
    "HTTPAPI": "http_box",
    "ModuleAPI": "boxes",
    "QueryBudgetExceeded": "ledger",
    "QueryLedger": "ledger",
    "ReplayMemory": "memory",
    "ResponseGap": "gaps",
    "ZerothOrderGradient": "zeroth_order",
    "build_classifier": "networks",
    "classifier_app": "server",
    "similarity_loss": "similarity",
    "step_size": "zeroth_order",
    "to_probabilities": "responses",
    "train_api": "apis",
}
__all__ = [
    "HTTPAPI",
    "APIBuilder",
    "APIResponseError",
    "APIStreamCL",
    "BiasedCKA",
    "BlackBoxAPI",
    "CallableAPI",
    "Classifier",
    "ContinualMetrics",
    "DCGANGenerator",
    "DFGenerator",
    "DebiasedCKA",
    "GeneratorObjective",
    "ModuleAPI",
    "QueryBudgetExceeded",
    "QueryLedger",
    "ReplayMemory",
    "ResponseGap",
    "ZerothOrderGradient",
    "build_classifier",
    "classifier_app",
    "similarity_loss",
    "step_size",
    "to_probabilities",
    "train_api",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
