"""Two processes learn one stream together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tests.zoo.api_cl.small_stream import ITERATIONS, QUIET, apis, counted, data, different, fit, stream

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:task . ends after")]
ROWS = 2 * 2 * 6 + 2 * 12
TWO = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}


class Witness(Callback):
    """Writes down what each process has at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.last:
            self.done.append(pl_module.done)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        seen = {
            "weights": pl_module.state_dict(), "done": self.done, "ledger": pl_module.ledger.summary(),
            "rows": counted(pl_module._apis), "memory": pl_module.memory.export(), "asked": pl_module.asked(),
            "matrices": {kind: metrics.matrix for kind, metrics in pl_module.matrices.items()},
        }  # fmt: skip
        torch.save(seen, self.folder / f"{pl_module.global_rank}.pt")


def both(folder: Path, source: Any = None, **options: Any) -> list[dict[str, Any]]:
    model = stream(apis(), model="lenet", model_options={"width": 2}, **options)
    fit(folder, model, source, callbacks=[Witness(folder)], limit_val_batches=1.0, **TWO)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_end_with_the_same_networks_and_halves_of_the_memory(tmp_path):
    first, second = both(tmp_path)
    assert not different(first["weights"], second["weights"])
    assert first["done"] == second["done"] == [ITERATIONS] * 3
    for one in (first, second):
        assert [row["rows"] for row in one["ledger"]] == [ITERATIONS * ROWS] * 3
        assert sum(len(rows) for name, rows in one["memory"].items() if name.endswith("images")) == 12
        assert one["asked"] == 2 * 3 * ITERATIONS * ROWS
    # Each drew and asked for images of its own.
    assert different(first["memory"], second["memory"])
    for kind in ("til", "cil"):
        assert first["matrices"][kind].isfinite().all()
        assert torch.equal(first["matrices"][kind], second["matrices"][kind])


def test_two_processes_stop_together_before_their_budget_is_exceeded(tmp_path):
    # The batches hold 8 real images for each process, of 24 in a task.
    budget = 2 * (2 * ROWS + 20)
    source = data(real_fraction=0.9, batch_size=4)
    first, second = both(tmp_path, source, budget_per_api=budget)
    assert not different(first["weights"], second["weights"])
    assert first["done"] == second["done"] == [2, 2, 2]
    for one, other in zip(first["ledger"], second["ledger"], strict=True):
        assert 4 * ROWS < one["rows"] + other["rows"] <= budget
        assert one["real"] > 0 and other["real"] > 0


def test_real_images_that_do_not_fit_stop_two_processes_together_as_well(tmp_path):
    source = data(real_fraction=0.9, batch_size=4)
    first, second = both(tmp_path, source, budget_per_api=2 * (2 * ROWS + 5))
    assert not different(first["weights"], second["weights"])
    assert first["done"] == second["done"] == [1, 1, 1]


def test_a_stream_of_two_processes_goes_on_where_it_was(tmp_path):
    straight = both(tmp_path)
    folder = tmp_path / "resumed"
    folder.mkdir()
    options = {"model": "lenet", "model_options": {"width": 2}}
    fit(folder, stream(apis(), **options), max_steps=6, limit_val_batches=1.0, callbacks=[Saves(folder)], **TWO)
    model = stream(apis(), **options)
    path = folder / "middle.ckpt"
    fit(folder, model, callbacks=[Witness(folder)], limit_val_batches=1.0, ckpt_path=path, **TWO)
    for rank, expected in enumerate(straight):
        found = torch.load(folder / f"{rank}.pt", weights_only=True)
        assert not different(expected["weights"], found["weights"])
        assert not different(expected["memory"], found["memory"])
        assert expected["ledger"] == found["ledger"]


class Saves(Callback):
    """Saves in the middle of the second task."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.folder / "middle.ckpt")
