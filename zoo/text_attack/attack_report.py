"""What a test of `TextAttackModule` says: numbers, pictures and tables of an attack and of a defence against it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from zoo.common.artifacts import log_figure, log_table
from zoo.text_attack.attack_options import defense_of
from zoo.text_attack.attack_views import ExposureView, rows_of
from zoo.text_attack.defenses import recovery
from zoo.text_attack.detector import PerplexityDetector
from zoo.text_attack.marked_edits import marked
from zoo.text_attack.stealth import TextStealth

if TYPE_CHECKING:
    from zoo.text_attack.attack import AttackResult
    from zoo.text_attack.attack_module import TextAttackModule

log = logging.getLogger(__name__)

TABLE = ("item", "original", "attacked", "marked", "exposure_pre", "exposure_post", "queries", "edit_distance", "stop")


class AttackReport:
    """Writes the report of a module's attack.

    Args:
        module: The module whose Trainer tests.
    """

    def __init__(self, module: TextAttackModule) -> None:
        # In a tuple, and this is no module: no module finds itself among its parts.
        self._module = (module,)

    def write(self, results: list[AttackResult], clean: dict[str, float]) -> None:
        """Log everything under `test/`; all processes must call it.

        Args:
            results: One a target, in the order of the targets, of all processes.
            clean: Metrics of the clean victim.
        """
        module = self._module[0]
        summary = module.summary(results)
        self._log(summary)
        attacked = self._at_once(results) if module.at_once else None
        if attacked is not None:
            self._log({f"attacked/{name}": value for name, value in attacked.items()})
            shared = [name for name in attacked if name in clean]
            self._log({f"change/{name}": attacked[name] - clean[name] for name in shared})
        self._fifths(summary)
        self._stealth(results)
        defended = self._defended(results, clean, summary) if module.defense_name is not None else None
        self._draw(results, summary, clean, attacked, defended)
        label = getattr(module.trainer, "datamodule", None)
        names = getattr(label, "item_labels", None)
        log_table(
            module, "test/titles", TABLE,
            [
                (names[r.item_id] if names else r.item_id, r.original, r.perturbed, marked(r.original, r.perturbed),
                 r.exposure_pre, r.exposure_post, r.n_queries, r.edit_distance, r.stop)
                for r in results
            ],
        )  # fmt: skip

    def _log(self, values: dict[str, float]) -> None:
        # The fifths are a table of their own.
        named = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in values.items() if "/fifth" not in name
        }
        self._module[0].log_metrics("test", named)

    def _fifths(self, summary: dict[str, float]) -> None:
        """A table by popularity of the target."""
        columns = ("targets", "exposure/pre", "exposure/post", "lift", "win_rate")
        present = [group for group in range(1, 6) if f"targets/fifth{group}" in summary]
        rows = [[group, *(summary[f"{name}/fifth{group}"] for name in columns)] for group in present]
        log_table(self._module[0], "test/popularity", ("fifth", *columns), rows)

    def _share(self) -> Any:
        """The users that this process evaluates, in parts."""
        module = self._module[0]
        rows = torch.arange(len(module.users.item_ids))[module.global_rank :: module.trainer.world_size]
        size = int(getattr(getattr(module.trainer, "datamodule", None), "eval_batch_size", 512))
        for part in torch.split(rows, size):
            yield module.transfer_batch_to_device(rows_of(module.users, part), module.device, 0)

    def _evaluate(self) -> dict[str, float]:
        victim = self._module[0].victim
        victim.begin_evaluation("attacked")
        for batch in self._share():
            victim.evaluate(batch)
        return {name: float(value) for name, value in victim.end_evaluation().items()}

    def _at_once(self, results: list[AttackResult]) -> dict[str, float]:
        """Metrics with all attacked titles in the catalogue."""
        module = self._module[0]
        module.victim.put_titles({r.item_id: r.perturbed for r in results}, module.propagate_to_history)
        try:
            return self._evaluate()
        finally:
            module.victim.put_titles(None)

    def _stealth(self, results: list[AttackResult]) -> None:
        module = self._module[0]
        metric = TextStealth()

        def column(name: str) -> torch.Tensor | None:
            values = [getattr(result, name) for result in results]
            if any(value is None for value in values):
                return None
            return torch.tensor(values, dtype=torch.float64)

        before, after = column("ppl_pre"), column("ppl_post")
        both = before is not None and after is not None
        metric.update(
            [r.original for r in results], [r.perturbed for r in results], cosine=column("cosine"),
            ppl_pre=before if both else None, ppl_post=after if both else None,
        )  # fmt: skip
        # Every process holds all results: nothing is to be exchanged.
        metric.sync_on_compute = False
        self._log({f"text/{name}": float(value) for name, value in metric.compute().items()})
        if module.language_model is not None:
            detector = PerplexityDetector(module.language_model).fit(module.victim.titles)
            attacked = [r.perturbed for r in results if r.perturbed != r.original]
            if attacked:
                self._log({"text/detector_auroc": detector.auroc(attacked, [r.original for r in results])})

    def _defended(
        self, results: list[AttackResult], clean: dict[str, float], summary: dict[str, float]
    ) -> dict[str, float]:
        """Exposure behind the defence, what it recovers and costs, and the attack that knows it."""
        module = self._module[0]
        defense = defense_of(module.defense_name, module.defense_options, module.victim.titles)
        assert defense is not None
        everything = module.defend == "all"
        values: dict[str, float] = {}
        if everything:
            module.victim.with_defense(defense)
        try:
            view = ExposureView(
                module.victim, module.attack_users, **module.view_options, repair=None if everything else defense
            )
            pairs = torch.stack([view.exposures(r.item_id, [r.original, r.perturbed]) for r in results]).mean(0)
            values["exposure/pre"], values["exposure/post"] = (float(value) for value in pairs)
            before, after = summary["exposure/pre"], summary["exposure/post"]
            if after != before:
                values["recovery"] = float(recovery(before, after, values["exposure/post"]))
            if everything:
                damaged = self._evaluate()
                values |= {f"change/{name}": damaged[name] - clean[name] for name in damaged if name in clean}
            if module.adaptive:
                values |= {f"adaptive/{name}": value for name, value in self._adaptive(view).items()}
        finally:
            if everything:
                module.victim.with_defense(None)
        self._log({f"defended/{name}": value for name, value in values.items()})
        return values

    def _adaptive(self, view: ExposureView) -> dict[str, float]:
        """The attack on the defended victim, each process on its share of the targets."""
        from zoo.text_attack.attack_module import gathered

        module = self._module[0]
        file = module.attack_log("adaptive")
        done = {} if file is None else file.completed()
        own = module.targets[module.global_rank :: module.trainer.world_size]
        found = []
        for number, item in enumerate(own):
            found.append(module.attack_one(item, module.victim.titles[item], view, file, done))
            if number % 10 == 9:
                log.info("adaptive attack: %d of %d targets", number + 1, len(own))
        results = gathered(found)
        module.trainer.strategy.barrier()
        if file is not None and module.global_rank == 0:
            file.merge(module.targets)
        module.trainer.strategy.barrier()
        return module.summary(results)

    def _draw(
        self,
        results: list[AttackResult],
        summary: dict[str, float],
        clean: dict[str, float],
        attacked: dict[str, float] | None,
        defended: dict[str, float] | None,
    ) -> None:
        from zoo.text_attack import figures

        module = self._module[0]
        if getattr(module.trainer, "fast_dev_run", False) or module.global_rank:
            return
        log_figure(module, "test/exposure", figures.exposure_pairs(results, module.options.recipe))
        log_figure(module, "test/lift_by_edit", figures.lift_by_edit(results))
        log_figure(module, "test/budget", figures.budget_curve(results, type(module.goal).__name__))
        if attacked is not None:
            log_figure(module, "test/accuracy", figures.accuracy(clean, attacked))
        if defended is not None:
            names = {"clean": summary["exposure/pre"], "attacked": summary["exposure/post"],
                     "defended": defended["exposure/post"]}  # fmt: skip
            if "adaptive/exposure/post" in defended:
                names["adaptive attack"] = defended["adaptive/exposure/post"]
            log_figure(module, "test/defense", figures.defense(names, len(results)))
