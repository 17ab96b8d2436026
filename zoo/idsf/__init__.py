"""IDSF: ID embeddings as subtle features of content and structure, and its siblings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.idsf.attention import AttentionFusion, MeanFusion
    from zoo.idsf.bm3 import BM3
    from zoo.idsf.bprmf import BPRMF
    from zoo.idsf.contrast import multi_view_nce
    from zoo.idsf.freedom import FREEDOM
    from zoo.idsf.graph import BipartiteGraph, nearest_items
    from zoo.idsf.lattice import LATTICE
    from zoo.idsf.lightgcn import LightGCN, light_convolution
    from zoo.idsf.losses import bpr_loss
    from zoo.idsf.module import IDSF
    from zoo.idsf.network import ContentViews, IDSFNetwork
    from zoo.idsf.recommender import TopNRecommender
    from zoo.idsf.semantics import id_semantics_report
    from zoo.idsf.sparse import SparseMatrix
    from zoo.idsf.vbpr import VBPR

_HOMES = {
    "AttentionFusion": "attention",
    "BM3": "bm3",
    "BPRMF": "bprmf",
    "BipartiteGraph": "graph",
    "ContentViews": "network",
    "FREEDOM": "freedom",
    "IDSF": "module",
    "IDSFNetwork": "network",
    "LATTICE": "lattice",
    "LightGCN": "lightgcn",
    "MeanFusion": "attention",
    "SparseMatrix": "sparse",
    "TopNRecommender": "recommender",
    "VBPR": "vbpr",
    "bpr_loss": "losses",
    "id_semantics_report": "semantics",
    "light_convolution": "lightgcn",
    "multi_view_nce": "contrast",
    "nearest_items": "graph",
}
__all__ = [
    "BM3",
    "BPRMF",
    "FREEDOM",
    "IDSF",
    "LATTICE",
    "VBPR",
    "AttentionFusion",
    "BipartiteGraph",
    "ContentViews",
    "IDSFNetwork",
    "LightGCN",
    "MeanFusion",
    "SparseMatrix",
    "TopNRecommender",
    "bpr_loss",
    "id_semantics_report",
    "light_convolution",
    "multi_view_nce",
    "nearest_items",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
