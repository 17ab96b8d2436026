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
    from zoo.api_cl.boxes import ModuleAPI as ModuleAPI
    from zoo.api_cl.continual_metrics import ContinualMetrics as ContinualMetrics
    from zoo.api_cl.http_box import HTTPAPI as HTTPAPI
    from zoo.api_cl.ledger import QueryLedger as QueryLedger
    from zoo.api_cl.memory import ReplayMemory as ReplayMemory
    from zoo.api_cl.module import APIStreamCL as APIStreamCL
    from zoo.api_cl.similarity import DebiasedCKA as DebiasedCKA
    from zoo.api_cl.zeroth_order import ZerothOrderGradient as ZerothOrderGradient
    from zoo.cmmixer.action_head import ActionHead as ActionHead
    from zoo.cmmixer.masked_autoencoder import MaskedAutoencoder as MaskedAutoencoder
    from zoo.cmmixer.metrics import CrossModalRetrieval as CrossModalRetrieval
    from zoo.cmmixer.mixer import CrossModalMixer as CrossModalMixer
    from zoo.cmmixer.module import MixerMAE as MixerMAE
    from zoo.cmmixer.retriever import AVRetriever as AVRetriever
    from zoo.cmmixer.vit import ViTEncoder as ViTEncoder
    from zoo.common.contrastive import info_nce as info_nce
    from zoo.common.contrastive import nt_xent as nt_xent
    from zoo.common.negatives import NegativeSampler as NegativeSampler
    from zoo.common.ranking import FullRankingMetrics as FullRankingMetrics
    from zoo.eacm.decoder import EmotionDecoder as EmotionDecoder
    from zoo.eacm.eacm import EACM as EACM
    from zoo.eacm.eacm import EmoEmb as EmoEmb
    from zoo.eacm.eacm import Seq2Seq as Seq2Seq
    from zoo.eacm.ecm import ECM as ECM
    from zoo.eacm.emotion_metrics import EmotionMetrics as EmotionMetrics
    from zoo.eacm.emotion_metrics import SelectorMetrics as SelectorMetrics
    from zoo.eacm.lexicon import EmotionLexicon as EmotionLexicon
    from zoo.eacm.reply_metrics import CorpusPerplexity as CorpusPerplexity
    from zoo.eacm.reply_metrics import DialogueMetrics as DialogueMetrics
    from zoo.eacm.selector import EmotionSelector as EmotionSelector
    from zoo.eacm.steered import SteeredLM as SteeredLM
    from zoo.eacm.tagger import EmotionTagger as EmotionTagger
    from zoo.idsf.attention import AttentionFusion as AttentionFusion
    from zoo.idsf.bm3 import BM3 as BM3
    from zoo.idsf.bprmf import BPRMF as BPRMF
    from zoo.idsf.contrast import multi_view_nce as multi_view_nce
    from zoo.idsf.freedom import FREEDOM as FREEDOM
    from zoo.idsf.graph import BipartiteGraph as BipartiteGraph
    from zoo.idsf.lattice import LATTICE as LATTICE
    from zoo.idsf.lightgcn import LightGCN as LightGCN
    from zoo.idsf.module import IDSF as IDSF
    from zoo.idsf.sparse import SparseMatrix as SparseMatrix
    from zoo.idsf.vbpr import VBPR as VBPR
    from zoo.merging.adamerging import AdaMerging as AdaMerging
    from zoo.merging.deep_surgery import DeepSurgery as DeepSurgery
    from zoo.merging.experts import TaskExperts as TaskExperts
    from zoo.merging.fisher import fisher_merge as fisher_merge
    from zoo.merging.merged_classifier import MergedClassifier as MergedClassifier
    from zoo.merging.merged_model import MergedModel as MergedModel
    from zoo.merging.mixins import EntropyAdaptation as EntropyAdaptation
    from zoo.merging.one_shot import dare_merge as dare_merge
    from zoo.merging.one_shot import task_arithmetic as task_arithmetic
    from zoo.merging.one_shot import ties_merge as ties_merge
    from zoo.merging.one_shot import weight_average as weight_average
    from zoo.merging.regmean import regmean_merge as regmean_merge
    from zoo.merging.representation_surgery import RepresentationSurgery as RepresentationSurgery
    from zoo.merging.surgery import SurgeryBank as SurgeryBank
    from zoo.merging.surgery import SurgeryModule as SurgeryModule
    from zoo.merging.task_vectors import TaskVectorStore as TaskVectorStore
    from zoo.merging.transforms import Ties as Ties
    from zoo.summary_mrc.cloze_scorer import ClozeScorer as ClozeScorer
    from zoo.summary_mrc.ga_reader import GAReader as GAReader
    from zoo.summary_mrc.masked_lm import MaskedLM as MaskedLM
    from zoo.summary_mrc.matching import SummaryMatcher as SummaryMatcher
    from zoo.summary_mrc.metrics import ChoiceAccuracy as ChoiceAccuracy
    from zoo.summary_mrc.module import SummaryMRC as SummaryMRC
    from zoo.summary_mrc.reader import GatedAttentionReader as GatedAttentionReader
    from zoo.summary_mrc.slot_scorer import MaskedSlotScorer as MaskedSlotScorer
    from zoo.text_attack.attack import AttackResult as AttackResult
    from zoo.text_attack.attack import TextAttack as TextAttack
    from zoo.text_attack.attack_module import TextAttackModule as TextAttackModule
    from zoo.text_attack.collm import CoLLMRec as CoLLMRec
    from zoo.text_attack.defenses import SpellDefense as SpellDefense
    from zoo.text_attack.detector import PerplexityDetector as PerplexityDetector
    from zoo.text_attack.exposure import ExposureRate as ExposureRate
    from zoo.text_attack.goals import ExposureGoal as ExposureGoal
    from zoo.text_attack.goals import PropensityGoal as PropensityGoal
    from zoo.text_attack.goals import SoftExposureGoal as SoftExposureGoal
    from zoo.text_attack.p5 import P5Rec as P5Rec
    from zoo.text_attack.recformer_rec import RecFormerRec as RecFormerRec
    from zoo.text_attack.recipes import build_attack as build_attack
    from zoo.text_attack.rewriting import LMRewriteDefense as LMRewriteDefense
    from zoo.text_attack.stealth import TextStealth as TextStealth
    from zoo.text_attack.tallrec import TALLRec as TALLRec
    from zoo.text_attack.transfer import TransferStudy as TransferStudy
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
    "APIStreamCL": "zoo.api_cl.module",
    "AVRetriever": "zoo.cmmixer.retriever",
    "ActionHead": "zoo.cmmixer.action_head",
    "AdaMerging": "zoo.merging.adamerging",
    "BM3": "zoo.idsf.bm3",
    "BPRMF": "zoo.idsf.bprmf",
    "CL4SRec": "zoo.ticoserec.siblings",
    "ClozeScorer": "zoo.summary_mrc.cloze_scorer",
    "CoLLMRec": "zoo.text_attack.collm",
    "CoSeRec": "zoo.ticoserec.siblings",
    "EACM": "zoo.eacm.eacm",
    "ECM": "zoo.eacm.ecm",
    "EmoEmb": "zoo.eacm.eacm",
    "EmotionTagger": "zoo.eacm.tagger",
    "FREEDOM": "zoo.idsf.freedom",
    "GAReader": "zoo.summary_mrc.ga_reader",
    "IDSF": "zoo.idsf.module",
    "LATTICE": "zoo.idsf.lattice",
    "LightGCN": "zoo.idsf.lightgcn",
    "MaskedLM": "zoo.summary_mrc.masked_lm",
    "MergedClassifier": "zoo.merging.merged_classifier",
    "MixerMAE": "zoo.cmmixer.module",
    "MultiTaskModule": "zoo.adatask.module",
    "P5Rec": "zoo.text_attack.p5",
    "Popularity": "zoo.ticoserec.popularity",
    "RecFormerRec": "zoo.text_attack.recformer_rec",
    "RepresentationSurgery": "zoo.merging.representation_surgery",
    "SASRec": "zoo.ticoserec.sasrec",
    "Seq2Seq": "zoo.eacm.eacm",
    "SteeredLM": "zoo.eacm.steered",
    "SummaryMRC": "zoo.summary_mrc.module",
    "TALLRec": "zoo.text_attack.tallrec",
    "TaskExperts": "zoo.merging.experts",
    "TextAttackModule": "zoo.text_attack.attack_module",
    "TiCoSeRec": "zoo.ticoserec.module",
    "VBPR": "zoo.idsf.vbpr",
}
"""The LightningModules, what `train.py --model` takes, and where each is defined."""

PARTS: dict[str, str] = {
    "AdaTask": "zoo.adatask.optimizer",
    "AttackResult": "zoo.text_attack.attack",
    "AttentionFusion": "zoo.idsf.attention",
    "BipartiteGraph": "zoo.idsf.graph",
    "ChoiceAccuracy": "zoo.summary_mrc.metrics",
    "ContinualMetrics": "zoo.api_cl.continual_metrics",
    "CorpusPerplexity": "zoo.eacm.reply_metrics",
    "CrossModalMixer": "zoo.cmmixer.mixer",
    "CrossModalRetrieval": "zoo.cmmixer.metrics",
    "DebiasedCKA": "zoo.api_cl.similarity",
    "DeepSurgery": "zoo.merging.deep_surgery",
    "DialogueMetrics": "zoo.eacm.reply_metrics",
    "EmotionDecoder": "zoo.eacm.decoder",
    "EmotionLexicon": "zoo.eacm.lexicon",
    "EmotionMetrics": "zoo.eacm.emotion_metrics",
    "EmotionSelector": "zoo.eacm.selector",
    "EntropyAdaptation": "zoo.merging.mixins",
    "ExposureGoal": "zoo.text_attack.goals",
    "ExposureRate": "zoo.text_attack.exposure",
    "FullRankingMetrics": "zoo.common.ranking",
    "GatedAttentionReader": "zoo.summary_mrc.reader",
    "HTTPAPI": "zoo.api_cl.http_box",
    "ItemSimilarity": "zoo.ticoserec.similarity",
    "LMRewriteDefense": "zoo.text_attack.rewriting",
    "MTAdam": "zoo.adatask.mtadam",
    "MaskedAutoencoder": "zoo.cmmixer.masked_autoencoder",
    "MaskedSlotScorer": "zoo.summary_mrc.slot_scorer",
    "MergedModel": "zoo.merging.merged_model",
    "ModuleAPI": "zoo.api_cl.boxes",
    "NegativeSampler": "zoo.common.negatives",
    "PerplexityDetector": "zoo.text_attack.detector",
    "PropensityGoal": "zoo.text_attack.goals",
    "QueryLedger": "zoo.api_cl.ledger",
    "ReplayMemory": "zoo.api_cl.memory",
    "SASRecEncoder": "zoo.ticoserec.encoder",
    "SelectorMetrics": "zoo.eacm.emotion_metrics",
    "SoftExposureGoal": "zoo.text_attack.goals",
    "SparseMatrix": "zoo.idsf.sparse",
    "SpellDefense": "zoo.text_attack.defenses",
    "SummaryMatcher": "zoo.summary_mrc.matching",
    "SurgeryBank": "zoo.merging.surgery",
    "SurgeryModule": "zoo.merging.surgery",
    "TaskDominanceMonitor": "zoo.adatask.callbacks",
    "TaskGradMixin": "zoo.adatask.hooks",
    "TaskVectorStore": "zoo.merging.task_vectors",
    "TextAttack": "zoo.text_attack.attack",
    "TextStealth": "zoo.text_attack.stealth",
    "TiAugmenter": "zoo.ticoserec.augment",
    "Ties": "zoo.merging.transforms",
    "TransferStudy": "zoo.text_attack.transfer",
    "ViTEncoder": "zoo.cmmixer.vit",
    "ViewPolicy": "zoo.ticoserec.augment",
    "ZerothOrderGradient": "zoo.api_cl.zeroth_order",
    "aggregator": "zoo.adatask.aggregators",
    "build_attack": "zoo.text_attack.recipes",
    "dare_merge": "zoo.merging.one_shot",
    "delta_m": "zoo.adatask.delta_m",
    "fisher_merge": "zoo.merging.fisher",
    "info_nce": "zoo.common.contrastive",
    "multi_view_nce": "zoo.idsf.contrast",
    "nt_xent": "zoo.common.contrastive",
    "regmean_merge": "zoo.merging.regmean",
    "task_arithmetic": "zoo.merging.one_shot",
    "ties_merge": "zoo.merging.one_shot",
    "weight_average": "zoo.merging.one_shot",
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
