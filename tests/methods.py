"""The methods that every battery runs: a method joins by its line in `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIGS = Path(__file__).parent.parent / "configs"

COMMON = (
    "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false",
    "--trainer.log_every_n_steps", "1",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How the batteries run a method.

    Attributes:
        name: The model's class name.
        arguments: The command line that runs it, its demo config as a rule.
        small: What shortens that to a few seconds; must keep at least 6 batches of an even size and 2 epochs, and
            reach every phase of the method (warm-ups and refreshes included).
        exact: What makes processes and precisions comparable: no dropout, negatives of all processes.
        batch_size: Its batch size; two processes take half of it each.
        figures: Whether a run draws figures.
        tables: Whether a run logs text tables.
        needs_users: Whether a prediction is about the users of a datamodule, and not about its batches alone.
    """

    name: str
    arguments: tuple[str, ...]
    small: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    batch_size: int = 32
    figures: bool = False
    tables: bool = False
    needs_users: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of a short run."""
        batch = ("--data.batch_size", str(self.batch_size))
        return (*self.arguments, *COMMON, "--trainer.max_epochs", "2", *batch, *self.small)


TOY = Method(
    "ToyModel",
    ("--model", "tests.toy.ToyModel", "--data", "tests.toy.ToyData"),
    exact=("--model.dropout", "0"),
    batch_size=8,
)

SEQUENCES = ("--data.sample_users", "192", "--model.hidden_size", "32")
CONTRASTIVE = (*SEQUENCES, "--model.model_warm_up_epochs", "0", "--model.augmentation_warm_up_epochs", "0")
NO_DROPOUT = ("--model.hidden_dropout", "0", "--model.attn_dropout", "0")

TASKS = ("--data.sample_rows", "192")
MULTI_TASK = ("--model", "MultiTaskModule", "--data", "TabularTaskData")
MISSING = ("--data.missing_fraction", "0.3")

MERGING = (
    "--config", str(CONFIGS / "merging" / "demo.yaml"),
    "--model.recipe", "{pretrain_epochs: 2, pretrain_batch_size: 20, epochs: 2, batch_size: 32}",
    "--model.encoder_options", "{kind: mlp, image_size: 20, hidden_size: 16, num_layers: 1, output_size: 24}",
    "--data.steps_per_epoch", "6", "--data.max_images", "160",
)  # fmt: skip
"""Merges of five small experts, trained on the spot."""


def merging(model: str, *options: str) -> tuple[str, ...]:
    """Arguments of a short run of a module that merges the experts of the demo."""
    settings = ("--model.recipe", MERGING[3], "--model.encoder_options", MERGING[5])
    data = ("--data", "ClassificationTasksData", "--data.stream", "test", "--data.pretrain_images", "100")
    return ("--model", model, *settings, *data, *MERGING[6:], *options)


STREAM = (
    "--config", str(CONFIGS / "api_cl" / "demo.yaml"),
    "--model.api_epochs", "1", "--model.base_channels", "4", "--model.latent_dim", "8",
    "--model.student_steps", "2", "--model.student_batch_size", "16", "--model.generator_batch_size", "8",
    "--data.num_tasks", "2", "--data.iterations_per_task", "6",
)  # fmt: skip
"""A stream of two APIs, trained for an epoch on the spot."""

REAL = ("--data.real_fraction", "1")

TINY_TEXT = (
    "--model.encoder", "tiny",
    "--model.encoder_options",
    "{hidden_size: 32, num_layers: 1, num_heads: 2, intermediate_size: 32, max_length: 128, dropout: 0.0}",
)  # fmt: skip
CLOZE = ("--data.sample_rows", "192", "--data.tokenizer", "words", "--data.max_length", "128")


def cloze(model: str, encode: str, *options: str) -> tuple[str, ...]:
    """Arguments of a short run of a module that answers cloze questions."""
    return ("--model", model, "--data", "ClozeData", "--data.encode", encode, *CLOZE, *options)


INTERACTIONS = ("--data.sample_users", "40", "--trainer.check_val_every_n_epoch", "1")
"""Six batches of 32 an epoch."""


def recommender(model: str, *options: str) -> tuple[str, ...]:
    """Arguments of a short run of a recommender of the room `idsf`."""
    return ("--model", model, "--data", "InteractionData", *INTERACTIONS, "--model.hidden_size", "16", *options)


CLIPS = ("--data.num_pairs", "192", "--model.encoder_options", "{hidden_size: 16, num_layers: 1, num_heads: 2}")
"""Six batches of 32 an epoch, for a small encoder."""


TWO_FRAMES = ("--data.num_frames", "2")


def clips(model: str, *options: str) -> tuple[str, ...]:
    """Arguments of a short run of a module of the room `cmmixer`."""
    return ("--model", model, "--data", "VideoAudioData", *CLIPS, "--model.patch_size", "4", *options)


TITLES = ("--data.sample_users", "32", "--data.sample_items", "120", "--trainer.limit_train_batches", "6")
"""Six batches of 32 an epoch, of about 190 questions."""
RECFORMER = ("--model.max_attr_length", "12", "--model.max_items", "3", "--model.max_tokens", "40")
PROMPTS = ("--model.max_history", "2", "--model.max_title_tokens", "8", "--data.num_candidates", "20")
# What is masked is drawn by each process; the biases of keys have no gradient, but what rounding leaves of it, which a
# low temperature multiplies.
SOFT = ("--model.mlm_weight", "0", "--model.temperature", "1")
TINY_DECODER = ("--model.backbone_options", "{hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 32}")


def reader(model: str, *options: str) -> tuple[str, ...]:
    """Arguments of a short run of a recommender that reads titles, of the room `text_attack`."""
    retrieval = model == "RecFormerRec"
    own = RECFORMER if retrieval else (*PROMPTS, "--data.mode", "yesno")
    return ("--model", model, "--data", "TextRecData", *TITLES, *own, *options)


DIALOGUES = ("--data.sample_pairs", "250", "--trainer.limit_train_batches", "6", "--model.max_length", "8")
"""Six batches of 32 an epoch."""
SMALL_STATES = ("--model.hidden_size", "16", "--model.embedding_size", "12", "--model.num_layers", "1")


def talker(model: str, *options: str) -> tuple[str, ...]:
    """Arguments of a short run of a module that replies to posts."""
    rates = ("--model.optimizer", "adam", "--model.lr", "0.01")
    return ("--model", model, "--data", "DialogueData", *DIALOGUES, *SMALL_STATES, *rates, *options)


METHODS = [
    TOY,
    Method(
        "SASRec",
        ("--model", "SASRec", "--data", "SequenceData"),
        small=SEQUENCES,
        exact=NO_DROPOUT,
        figures=True,
        tables=True,
    ),
    Method(
        "TiCoSeRec",
        ("--config", str(CONFIGS / "ticoserec" / "demo.yaml")),
        small=CONTRASTIVE,
        exact=(*NO_DROPOUT, "--model.gather_negatives", "true"),
        figures=True,
        tables=True,
    ),
    Method(
        "MultiTaskModule",
        ("--config", str(CONFIGS / "adatask" / "demo.yaml")),
        small=TASKS,
        figures=True,
        tables=True,
    ),
    Method("AdaMerging", MERGING[:2], small=MERGING[2:], figures=True, tables=True),
    Method("RepresentationSurgery", merging("RepresentationSurgery"), figures=True, tables=True),
    Method(
        "TaskExperts",
        ("--model", "TaskExperts", "--model.mode", "separate", "--data", "ClassificationTasksData"),
        small=(*MERGING[4:], "--data.validation_fraction", "0.2"),
        tables=True,
    ),
    Method(
        "APIStreamCL",
        STREAM[:2],
        small=STREAM[2:],
        exact=(*REAL, "--model.method", "classic", "--model.model", "mlp", "--model.student_steps", "1"),
        figures=True,
        tables=True,
    ),
    Method(
        "SummaryMRC",
        ("--config", str(CONFIGS / "summary_mrc" / "demo.yaml")),
        small=(*CLOZE, *TINY_TEXT),
        exact=("--model.dropout", "0"),
        figures=True,
        tables=True,
    ),
    Method(
        "IDSF",
        ("--config", str(CONFIGS / "idsf" / "demo.yaml")),
        small=(
            *INTERACTIONS,
            "--model.hidden_size",
            "16",
            "--model.contrast_cap",
            "24",
            "--model.trainable_features",
            "true",
        ),
        figures=True,
        tables=True,
    ),
    Method("MixerMAE", clips("MixerMAE", "--model.decoder", "tiny"), figures=True),
    Method(
        "AVRetriever",
        ("--config", str(CONFIGS / "cmmixer" / "demo.yaml")),
        small=(
            *(*CLIPS, "--model.pretrain_epochs", "1", "--model.learnable_temperature", "true"),
            *("--trainer.check_val_every_n_epoch", "1"),
        ),
        # Each process normalises by its own half of the batch.
        exact=("--model.projector", "linear"),
        figures=True,
    ),
    Method("ActionHead", clips("ActionHead", "--model.freeze_encoder", "false")),
    Method("RecFormerRec", reader("RecFormerRec", "--model.mlm_weight", "0.1"), exact=SOFT),
    Method(
        "TextAttackModule",
        ("--config", str(CONFIGS / "text_attack" / "demo.yaml")),
        small=(
            *(
                *TITLES,
                "--data.num_targets",
                "4",
                "--model.adaptive",
                "false",
                "--model.k",
                "50",
                "--data.sample_items",
                "60",
            ),
            *("--model.victim_options", "{max_attr_length: 12, max_items: 3, max_tokens: 40}"),
        ),
        exact=("--model.victim_options", "{max_attr_length: 12, max_items: 3, max_tokens: 40, temperature: 1.0}"),
        figures=True,
        tables=True,
        needs_users=True,
    ),
    Method("P5Rec", reader("P5Rec")),
    Method("TALLRec", reader("TALLRec", "--model.max_tokens", "128", *TINY_DECODER)),
    Method("CoLLMRec", reader("CoLLMRec", "--model.cf_size", "8", "--model.cf_epochs", "2", *TINY_DECODER)),
    Method(
        "EACM",
        ("--config", str(CONFIGS / "eacm" / "demo.yaml")),
        small=(*DIALOGUES, *SMALL_STATES, "--model.emotion_size", "8"),
        figures=True,
        tables=True,
    ),
    Method(
        "EmotionTagger",
        ("--model", "EmotionTagger", "--data", "DialogueData"),
        small=(*DIALOGUES[:4], "--model.hidden_size", "16", "--model.embedding_size", "12"),
        exact=("--model.dropout", "0"),
    ),
    Method(
        "MaskedLM",
        ("--model", "MaskedLM", "--data", "PassageData"),
        small=("--data.sample_passages", "214", "--data.tokenizer", "words", "--data.max_length", "128", *TINY_TEXT),
    ),
]
"""The toy comes first: where it fails, the battery is at fault and not a method."""

VARIANTS = [
    *(
        Method(name, talker(name, "--model.emotion_size", "8", *more), figures=True, tables=True)
        for name, more in (
            ("Seq2Seq", ()),
            ("EmoEmb", ("--model.cell", "torch")),
            ("ECM", ("--model.memory_size", "8")),
        )
    ),
    Method("SteeredLM", talker("SteeredLM", "--model.backbone_options", TINY_DECODER[1]), figures=True, tables=True),
    *(
        Method(name, ("--model", name, "--data", "SequenceData"), small=CONTRASTIVE, exact=NO_DROPOUT)
        for name in ("CoSeRec", "CL4SRec")
    ),
    Method(
        "TiCoSeRec with GRU4Rec",
        ("--model", "TiCoSeRec", "--data", "SequenceData", "--model.encoder", "gru4rec"),
        small=CONTRASTIVE,
        exact=NO_DROPOUT,
    ),
    *(
        Method(name, MULTI_TASK, small=(*TASKS, *MISSING, *options))
        for name, options in (
            ("multi-task Adam", ("--model.optimizer", "adam")),
            ("AdaTask with PCGrad", ("--model.aggregator", "pcgrad")),
            ("AdaTask with Nash-MTL", ("--model.aggregator", "nash_mtl")),
            ("multi-task Adam with GradVac", ("--model.optimizer", "adam", "--model.aggregator", "gradvac")),
            ("MTAdam with MMoE", ("--model.optimizer", "mtadam", "--model.backbone", "mmoe")),
            ("AdaTask with UW and PLE", ("--model.weighting", "uncertainty", "--model.backbone", "ple")),
            ("AdaTask with RLW", ("--model.weighting", "rlw", "--model.rule", "rmsprop")),
            ("multi-task DWA", ("--model.weighting", "dwa", "--model.optimizer", "adagrad")),
            ("multi-task FAMO", ("--model.weighting", "famo", "--model.optimizer", "sgd", "--model.lr", "1e-5")),
            ("multi-task GradNorm", ("--model.weighting", "gradnorm", "--model.optimizer", "adamw")),
            ("AdaTask, cut", ("--model.backward_mode", "cut", "--trainer.gradient_clip_val", "10")),
            ("AdaTask, batched", ("--model.backward_mode", "batched", "--model.rule", "adagrad")),
        )
    ),
    *(
        Method(name, MERGING[:2], small=(*MERGING[2:], *options))
        for name, options in (
            ("AdaMerging++", ("--model.preprocess", "ties", "--model.batches_per_step", "2")),
            ("AdaMerging by task", ("--model.granularity", "task", "--model.constraint", "project")),
            ("AdaMerging to experts", ("--model.objective", "expert_kl", "--model.tau_dtype", "bfloat16")),
        )
    ),
    Method(
        "API stream with real images",
        STREAM[:2],
        small=(*STREAM[2:], "--data.real_fraction", "0.2", "--model.scenario", "cil"),
        exact=("--model.method", "real_only", "--model.model", "mlp", "--model.student_steps", "1"),
    ),
    Method(
        "continual learning by EWC",
        STREAM[:2],
        small=(*STREAM[2:], *REAL, "--model.method", "ewc", "--model.model", "mlp", "--model.student_steps", "1"),
    ),
    Method(
        "SummaryMRC, separate and marked",
        cloze("SummaryMRC", "separate", *TINY_TEXT, "--data.mark_option", "true", "--model.option_chunk", "2"),
        exact=("--model.dropout", "0"),
    ),
    Method(
        "SummaryMRC beside the question, by co-attention",
        cloze("SummaryMRC", "joint", *TINY_TEXT, "--data.mode", "concat", "--model.matcher", "duma"),
        exact=("--model.dropout", "0"),
    ),
    Method("ClozeScorer", cloze("ClozeScorer", "cloze", *TINY_TEXT), figures=True, tables=True),
    Method(
        "GAReader",
        cloze("GAReader", "reader", "--model.embedding_size", "16", "--model.hidden_size", "8"),
        exact=("--model.dropout", "0"),
        figures=True,
        tables=True,
    ),
    *(
        Method(name, recommender(name), figures=True, tables=True)
        for name in ("BPRMF", "LightGCN", "VBPR", "FREEDOM", "LATTICE")
    ),
    Method("BM3", recommender("BM3"), exact=("--model.dropout", "0"), figures=True, tables=True),
    Method(
        "IDSF over all items, by users",
        recommender("IDSF", "--model.contrast_scope", "all", "--model.readout", "mlp_ln", "--model.id_mode", "shared"),
        small=("--data.sampling", "user"),
        # The shift of the last layer moves all scores of a user alike: its gradient is what rounding leaves of zero.
        exact=("--model.readout", "sum_norm"),
    ),
    Method("IDSF without IDs", recommender("IDSF", "--model.id_mode", "none", "--model.norm", "sym")),
    *(
        Method(f"MixerMAE, {name}", clips("MixerMAE", "--model.decoder", "tiny", *options))
        for name, options in (
            ("by turns", ("--model.op", "alternate", "--model.norm_pix_loss", "true")),
            ("both streams as tokens", ("--model.op", "concat", "--model.layout", "interleave", *TWO_FRAMES)),
        )
    ),
    *(
        Method(f"AVRetriever, {name}", clips("AVRetriever", "--model.proj_dim", "32", *options))
        for name, options in (
            ("hardest negatives", ("--model.loss", "triplet", "--data.pairing", "fixed", "--model.pool", "cls")),
            ("one encoder", ("--model.loss", "infonce", "--model.share_encoder", "true", "--model.layer_decay", "0.7")),
        )
    ),
    Method(
        "RecFormerRec in two stages",
        reader("RecFormerRec", "--model.objective", "full_softmax", "--model.two_stage", "true"),
        exact=SOFT[2:],
    ),
    Method(
        "TALLRec with adapters",
        reader("TALLRec", "--model.max_tokens", "128", *TINY_DECODER, "--model.lora", "{r: 2, dropout: 0.0}"),
    ),
    Method(
        "CoLLMRec's second stage",
        reader("CoLLMRec", "--model.stage", "2", "--model.freeze_cf", "false", "--model.cf_size", "8", *TINY_DECODER),
    ),
    Method("Surgery at every block", merging("RepresentationSurgery", "--model.depth", "all", "--model.rank", "4")),
    Method("Surgery without a cache", merging("RepresentationSurgery", "--model.cache_features", "false")),
]
"""Other settings of the methods above, for the batteries where these may matter."""

UNTRAINED = [
    Method("Popularity", ("--model", "Popularity", "--data", "SequenceData"), small=SEQUENCES[:2]),
    Method("MergedClassifier", merging("MergedClassifier")),
]
"""Have no weights and no optimizer, so no gradients to compare and no step to resume from."""

EMBEDDED: dict[str, tuple[str, ...]] = {
    "SequenceData": ("--data.source", "embedded", "--data.order", "auto"),
    "TabularTaskData": ("--data.source", "embedded", "--data.sample_categories", "2"),
    "ImageTaskData": ("--data.source", "embedded"),
    "ClassStreamData": ("--data.source", "embedded", "--data.dataset", "digits"),
    "ClassificationTasksData": ("--data.source", "embedded", "--data.seen_tasks", "null"),
    "ImageTaskData of pixels": ("--data.source", "embedded_scenes"),
    "ClozeData": ("--data.source", "embedded", *CLOZE),
    "InteractionData": (
        *("--data.source", "embedded", "--data.modalities", "null", "--data.min_rating", "null"),
        *("--data.sample_users", "60", "--data.split", "official", "--data.min_user_interactions", "null"),
        *("--data.min_item_interactions", "null", "--data.cold_fraction", "0", "--data.keep_train_per_user", "null"),
    ),
    "VideoAudioData": (
        *("--data.source", "embedded", "--data.path", "null", "--data.image_size", "32", "--data.num_pairs", "64"),
        *("--data.num_workers", "0"),
    ),
    "TextRecData": (
        *("--data.source", "embedded", "--data.keep_items", "null", "--data.keep_users", "null"),
        *("--data.min_interactions", "null", "--data.sample_users", "60", "--data.num_targets", "3"),
    ),
    "DialogueData": (
        *("--data.source", "embedded", "--data.keep_per_class", "null", "--data.eval_per_class", "null"),
        *("--data.eval_from_train", "0", "--data.sample_pairs", "250", "--data.path", "null"),
    ),
    "PassageData": ("--data.source", "embedded", "--data.sample_passages", "200", *CLOZE[2:]),
}
"""For each data module, what puts its embedded sample in place of real data in a config."""


def embedded(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments that put the embedded sample in place of the data of a config."""
    kind = data["class_path"]
    if data["init_args"].get("source") in ("cityscapes", "nyuv2", "camvid"):
        kind += " of pixels"
    return EMBEDDED[kind]


SYNONYMS = ("--model.synonyms", str(Path(__file__).parent / "synonyms.tsv"))

# Forty million weights say no more about a config than some thousand.
_SMALL_BACKBONES = {"mtan": ("--model.backbone_options", "{filters: [4, 8, 8, 16, 16]}")}


def shortened(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Arguments that put something small in place of what a config's model would train or download."""
    settings = model.get("init_args", {})
    if model["class_path"] == "APIStreamCL":
        return ("--model.api_archs", "[mlp]", "--model.api_epochs", "1", "--model.api_folder", "null")
    if model["class_path"] in ("SummaryMRC", "ClozeScorer", "MaskedLM"):
        return (*TINY_TEXT, *(("--model.export", "null") if model["class_path"] == "MaskedLM" else ()))
    if model["class_path"] in ("MixerMAE", "AVRetriever", "ActionHead"):
        return ("--model.encoder", "tiny", "--model.encoder_options", "null")
    if model["class_path"] == "TextAttackModule":
        # The networks of these recipes are on the hub, the synonyms in no repository.
        own = SYNONYMS if settings.get("synonyms") else ()
        if settings.get("masked_lm") or settings.get("rewrites"):
            own = ("--model.recipe", "random", "--model.masked_lm", "null", "--model.rewrites", "null")
        return (*own, "--model.similarity_encoder", "tfidf") if settings.get("similarity_encoder") else own
    if model["class_path"] in ("RecFormerRec", "P5Rec", "TALLRec", "CoLLMRec"):
        return ("--model.backbone", "tiny", *(("--model.lora", "null") if settings.get("lora") else ()))
    if model["class_path"] == "SteeredLM":
        return ("--model.backbone", "tiny")
    if model["class_path"] == "TaskExperts":
        return MERGING[4:6]
    if model["class_path"] in ("AdaMerging", "RepresentationSurgery"):
        none = (f"--model.{key}=null" for key in ("experts", "pretrained", "heads", "merge_tasks"))
        return (*MERGING[2:6], "--data.pretrain_images", "100", *none)
    return _SMALL_BACKBONES.get(settings.get("backbone"), ())
