"""TextAttackModule: attacks on the titles of one's own recommender, measured under `trainer.test` and `predict`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from zoo.common.artifacts import run_folder
from zoo.text_attack.aggregate import summarise
from zoo.text_attack.attack_log import AttackLog
from zoo.text_attack.attack_options import (
    LIST_LENGTHS,
    AttackOptions,
    attack_of,
    defense_of,
    fingerprint,
    goal_of,
    results_file,
)
from zoo.text_attack.attack_report import AttackReport
from zoo.text_attack.attack_views import ExposureView, choose, rows_of
from zoo.text_attack.perplexity import language_model as language_model_of
from zoo.text_attack.sentence_encoders import sentence_encoder as sentence_encoder_of
from zoo.text_attack.victim import RecommenderModule, TextRecVictim
from zoo.text_attack.victims import build_victim, load_victim

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.text_attack.attack import AttackResult
    from zoo.text_attack.types import RecBatch, Targets

log = logging.getLogger(__name__)


class TextAttackModule(RecommenderModule):
    """How exposed a recommender is to whoever writes an item's title (Zhang et al. 2024, arXiv 2402.14836).

    A robustness study of a model in memory: the attacked title of one item at a time is scored by the victim, at test
    time; weights, users and other items stay as they are. `fit` trains the victim, unless it comes from a checkpoint;
    `test` measures it clean, attacks each target alone, and measures all attacked titles at once; `predict` attacks
    alone.

    Args:
        victim: Class of the victim: "RecFormerRec", "P5Rec", "TALLRec" or "CoLLMRec".
        victim_options: Its arguments.
        victim_checkpoint: A checkpoint that `train.py --model <victim>` left, in place of `victim` and its options, and
            of training one here.
        num_items: Items of the catalogue, for victims that need the number.
        num_users: Users, for victims that need the number.
        recipe: "deepwordbug", "punc", "textfooler", "bae", "bertattack", "textbugger", "random", "trivial", "rewrite"
            or "identity" (see `build_attack`).
        recipe_options: Options of the recipe.
        parity: Whether the official code's settings apply, faults included.
        goal: "exposure", "soft_exposure", "propensity" (pointwise victims), or "auto": exposure of retrieval victims,
            propensity of pointwise ones.
        k: Length of a user's list in exposure; by default 50 for retrieval and 10 for pointwise victims.
        ties: "pessimistic" (a tie with the K-th best item does not count) or "optimistic".
        mask_seen: Whether items that a user has had are not ranked (retrieval).
        soft_temperature: Of "soft_exposure".
        delta: Rise of the goal at which the attack on an item succeeds and ends; None to try every word.
        budget: Most queries for an item; None for no limit.
        anchor_share: Share of users whose scores the search sees; reports are on all users.
        max_users: At most so many users, drawn at random, in the attack; all by default.
        num_candidates: Items that each user of a pointwise victim ranks the target against; 0 for the whole catalogue.
        synonyms: Of word swaps: "ppdb", "wordnet", "ppdb+wordnet", "nltk", or a file of synonyms or word vectors.
        masked_lm: Of masked word swaps: folder or hub id.
        part_of_speech: Tagger of "textfooler": "nltk", "wordnet", or None to leave that check out.
        rewrites: Of "rewrite": a file of lines `{"item_id": 3, "text": "..."}`, or a folder or hub id of a language
            model that writes them.
        similarity_encoder: Of the recipes' similarity constraints: a folder or hub id; None to leave these out, which
            is logged. "tfidf" is possible, but it compares letters and so forbids most edits of letters.
        sentence_encoder: Of the report's cosine: "tfidf", a folder or hub id; None for none.
        language_model: Of the report's perplexity: "ngram" (fitted on the catalogue), a folder or hub id; None for
            none.
        defense: What titles pass through in a second evaluation: "spell", "rewrite" (a language model, in
            `defense_options` by `model`), or None.
        defense_options: Its options.
        defend: What is defended: "all" titles, or the "targets" alone.
        adaptive: Whether to attack the defended victim as well: a static defence looks better than it is.
        at_once: Whether to measure all attacked titles at once.
        propagate_to_history: Whether users whose history holds a target read its attacked title there.
        results: JSON lines of results, which an interrupted run goes on with; by default in the run's folder.
        seed: Of all chance of the attack.

    Raises:
        ValueError: If an argument is out of its range or unknown.
        FileNotFoundError: If a checkpoint, list or model is missing.
    """

    attacks_items = True

    def __init__(
        self,
        victim: str = "RecFormerRec",
        victim_options: dict[str, Any] | None = None,
        victim_checkpoint: str | None = None,
        num_items: int | None = None,
        num_users: int | None = None,
        recipe: str = "deepwordbug",
        recipe_options: dict[str, Any] | None = None,
        parity: bool = False,
        goal: str = "auto",
        k: int | None = None,
        ties: str = "pessimistic",
        mask_seen: bool = False,
        soft_temperature: float = 0.05,
        delta: float | None = 0.05,
        budget: int | None = None,
        anchor_share: float = 0.4,
        max_users: int | None = None,
        num_candidates: int = 99,
        synonyms: str | None = None,
        masked_lm: str | None = None,
        part_of_speech: str | None = None,
        rewrites: str | None = None,
        similarity_encoder: str | None = None,
        sentence_encoder: str | None = "tfidf",
        language_model: str | None = "ngram",
        defense: str | None = None,
        defense_options: dict[str, Any] | None = None,
        defend: str = "all",
        adaptive: bool = False,
        at_once: bool = True,
        propagate_to_history: bool = False,
        results: str | None = None,
        seed: int = 42,
    ) -> None:
        super().__init__()
        # The others say how a test attacks, not what was trained: one checkpoint serves for every attack.
        self.save_hyperparameters("victim", "victim_options", "num_items", "num_users")
        if victim_checkpoint is not None:
            self.victim = load_victim(victim_checkpoint)
            log.info("%s of %s: victim and victim_options are not used", type(self.victim).__name__, victim_checkpoint)
        else:
            self.victim = build_victim(victim, victim_options or {}, num_items=num_items, num_users=num_users)
        self.answers_untrained = self.is_trained = victim_checkpoint is not None
        kind = self.victim.kind
        self.options = AttackOptions(
            recipe,
            dict(recipe_options or {}),
            parity,
            synonyms,
            masked_lm,
            part_of_speech,
            rewrites,
            delta,
            budget,
            seed,
        )
        self.goal = goal_of(goal, kind, k, ties, mask_seen, soft_temperature, delta)
        self.view_options: dict[str, Any] = {
            "anchor_share": anchor_share,
            "k": k or LIST_LENGTHS[kind],
            "ties": ties,
            "mask_seen": mask_seen,
            "num_candidates": num_candidates,
            "seed": seed,
        }
        choose(1, anchor_share, seed)
        if max_users is not None and max_users < 1:
            raise ValueError(f"max_users must be at least 1, got {max_users}")
        if num_candidates < 0:
            raise ValueError(f"num_candidates must be at least 0, got {num_candidates}")
        if defend not in ("all", "targets"):
            raise ValueError(f"defend must be all or targets, got {defend!r}")
        if adaptive and defense is None:
            raise ValueError("adaptive attacks the defended victim: choose a defense")
        defense_of(defense, defense_options, None)
        self.max_users, self.defend, self.adaptive = max_users, defend, adaptive
        self.defense_name, self.defense_options = defense, defense_options
        self.encoder_name, self.language_model_name = sentence_encoder, language_model
        self.similarity_name = similarity_encoder
        self.at_once, self.propagate_to_history = at_once, propagate_to_history
        self.results_path = results
        if self.is_trained:
            # There is nothing to optimize, and Lightning need not warn about it in every step.
            self.automatic_optimization = False
        self.report = AttackReport(self)
        self._own: list[AttackResult] = []

    @property
    def recommender(self) -> TextRecVictim:
        """The victim."""
        return self.victim

    @property
    def monitor(self) -> str | None:
        """What the training of the victim is to improve; None where it was trained before."""
        return None if self.is_trained else self.victim.monitor

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training."""
        if not self.is_trained:
            super().on_train_start()

    def training_step(self, batch: RecBatch, batch_idx: int) -> Any:
        """The victim's loss; for a victim from a checkpoint, the end of the training."""
        if self.is_trained:
            self.trainer.should_stop = True
            return None
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The victim's optimizer, if it is trained here."""
        return None if self.is_trained else super().configure_optimizers()

    def on_test_start(self) -> None:
        """Compute what all attacks share."""
        self._begin()

    def on_test_epoch_start(self) -> None:
        """Begin to measure the clean victim."""
        self.victim.begin_evaluation("test")

    def test_step(self, batch: RecBatch | Targets, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch of users, or attack a target."""
        if dataloader_idx == 0 and not hasattr(batch, "texts"):
            self.victim.evaluate(batch)
        else:
            self._attack(batch)  # type: ignore[arg-type]

    def predict_step(self, batch: Targets, batch_idx: int, dataloader_idx: int = 0) -> list[AttackResult]:
        """Attack a target; results are also lines of the results' file."""
        return [self._attack(batch)]

    def on_predict_start(self) -> None:
        """Compute what all attacks share."""
        self._begin()

    def on_predict_epoch_end(self) -> None:
        """Write the results in the order of the targets."""
        self._merge()

    def _begin(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        for name in ("titles", "target_ids", "whole", "item_counts"):
            if not hasattr(data, name):
                raise ValueError(
                    f"an attack needs a datamodule with titles, target_ids, item_counts and whole(part), such as "
                    f"TextRecData; {type(data).__name__} has no {name}"
                )
        assert data is not None
        self.victim.begin_evaluation("test")
        self.users = data.whole("test")
        rows = None
        if self.max_users is not None and self.max_users < len(self.users.item_ids):
            generator = torch.Generator().manual_seed(self.options.seed)
            rows = torch.randperm(len(self.users.item_ids), generator=generator)[: self.max_users].sort().values
        self.attack_users = self.users if rows is None else rows_of(self.users, rows)
        self.targets = [int(item) for item in data.target_ids]
        self.popularity = data.item_counts
        titles = self.victim.titles
        encoder, model = self.encoder_name, self.language_model_name
        self.encoder = None if encoder is None else sentence_encoder_of(encoder, titles)
        self.language_model = None if model is None else language_model_of(model, titles)
        self.view = ExposureView(self.victim, self.attack_users, **self.view_options)
        similar = None if self.similarity_name is None else self.encoder
        if self.similarity_name is not None and self.similarity_name != encoder:
            similar = sentence_encoder_of(self.similarity_name, titles)
        self.attack = attack_of(self.options, similar)
        self._own = []
        self.log_file = self.attack_log("attacks")
        self._done = {} if self.log_file is None else self.log_file.completed()
        if self._done:
            log.info("%d targets were attacked before, by an interrupted run", len(self._done))

    def attack_log(self, name: str) -> AttackLog | None:
        """The file of results, or None under `fast_dev_run`, which leaves no traces."""
        if getattr(self.trainer, "fast_dev_run", False):
            return None
        path = results_file(self.results_path, run_folder(self.trainer), name)
        return AttackLog(path, self.settings(name), self.global_rank)

    def settings(self, name: str = "attacks") -> dict[str, Any]:
        """What results depend on."""
        return {
            "attack": name,
            "victim": type(self.victim).__name__,
            "weights": fingerprint(self.victim, self.victim.titles),
            "users": len(self.attack_users.item_ids),
            **self.options.plain(),
            "goal": type(self.goal).__name__,
            **{f"goal_{key}": value for key, value in vars(self.goal).items()},
            **{key: value for key, value in self.view_options.items() if key != "seed"},
            "similarity_encoder": self.similarity_name,
            "sentence_encoder": self.encoder_name,
            "language_model": self.language_model_name,
            **({} if name == "attacks" else {"defense": self.defense_name, "defend": self.defend}),
        }

    def _attack(self, batch: Targets) -> AttackResult:
        result = self.attack_one(int(batch.item_ids[0]), batch.texts[0], self.view, self.log_file, self._done)
        self._own.append(result)
        return result

    def attack_one(
        self,
        item_id: int,
        text: str,
        view: ExposureView,
        log_file: AttackLog | None,
        done: Mapping[int, AttackResult],
    ) -> AttackResult:
        """Attack an item, unless that was done before, and measure what came of it."""
        result = done.get(item_id)
        if result is not None:
            return result
        goal = view.goal(self.goal, item_id)
        result = self.attack.attack(text, goal, item_id=item_id, readable=self.victim.readable)
        titles = [result.original, result.perturbed]
        before, after = view.exposures(item_id, titles).tolist()
        result.exposure_pre, result.exposure_post = before, after
        if self.encoder is not None:
            first, second = self.encoder.encode(titles)
            result.cosine = float((first * second).sum())
        if self.language_model is not None:
            result.ppl_pre, result.ppl_post = self.language_model.perplexity(titles).tolist()
        if log_file is not None:
            log_file.append(result)
        return result

    def _merge(self) -> list[AttackResult]:
        """Results of all processes, in the order of the targets."""
        results = gathered(self._own)
        self.trainer.strategy.barrier()
        if self.log_file is not None and self.global_rank == 0:
            self.log_file.merge([item for item in self.targets if any(r.item_id == item for r in results)])
        self.trainer.strategy.barrier()
        place = {item: index for index, item in enumerate(self.targets)}
        return sorted(results, key=lambda result: place[result.item_id])

    def on_test_epoch_end(self) -> None:
        """Log `test/*`: the clean victim, the attack, all attacked titles at once, the defence; draw and write."""
        values = self.victim.end_evaluation()
        self.log_metrics("test", values)
        results = self._merge()
        if not results:
            log.warning("no target was attacked")
            return
        self.report.write(results, {name: float(value) for name, value in values.items()})

    def summary(self, results: list[AttackResult]) -> dict[str, float]:
        """Aggregates over targets (see `summarise`), and the goal's means on the anchor users."""
        delta = 0.05 if self.options.delta is None else self.options.delta
        goal = summarise(results, measure="goal", delta=delta)
        return {
            **summarise(results, self.popularity, delta=delta),
            **{name: goal[name] for name in ("goal/pre", "goal/post", "goal/gain")},
            "goal/lift": goal["lift"],
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the victim's tokenizer."""
        self.victim.on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the victim's tokenizer."""
        self.victim.on_load_checkpoint(checkpoint)


def gathered(own: list[AttackResult]) -> list[AttackResult]:
    """The results of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(own)
    parts: list[list[AttackResult] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return [result for part in parts for result in part or []]
