import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from tests.toy import ToyData, ToyModel
from zoo.common.artifacts import log_figure, log_table, run_folder

PNG = b"\x89PNG\r\n\x1a\n"


class Illustrated(ToyModel):
    """Draws a figure and writes a table at the end of the test."""

    key = "test/curve"
    rows: Any = ((torch.tensor(1), "été"), (2.5, None))

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(num_classes)

    def on_test_epoch_end(self) -> None:
        from matplotlib import pyplot

        # Other tests of this process may have left figures open.
        before = set(pyplot.get_fignums())
        figure, axes = pyplot.subplots()
        axes.plot([0, 1], [1, 0])
        self.figure_path = log_figure(self, self.key, figure)
        self.open_figures = sorted(set(pyplot.get_fignums()) - before)
        self.table_path = log_table(self, "replies", ["id", "text"], self.rows)
        self.folder = run_folder(self.trainer)


class FakeRun:
    """Stands in for a W&B run: remembers what was logged."""

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}
        self.config = SimpleNamespace(update=lambda *_, **__: None)

    def log(self, content: dict[str, Any], **_: Any) -> None:
        self.logged.update(content)

    def define_metric(self, *_: Any, **__: Any) -> None: ...


def evaluate(model: LightningModule, folder: Path, loggers: list[Logger], **settings: Any) -> Trainer:
    trainer = Trainer(
        logger=loggers or False,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.test(model, ToyData(), verbose=False)
    return trainer


def test_figure_and_table_lie_in_the_folder_of_the_run(tmp_path: Path) -> None:
    model = Illustrated()
    evaluate(model, tmp_path, [CSVLogger(tmp_path, name="runs")])
    folder = tmp_path / "runs" / "version_0"
    assert model.folder == folder
    assert model.figure_path == folder / "figures" / "test" / "curve.png"
    assert model.figure_path.read_bytes().startswith(PNG)
    assert model.open_figures == []
    lines = (folder / "tables" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"id": 1, "text": "été"}', '{"id": 2.5, "text": null}']


def test_without_a_logger_they_lie_in_the_root_folder(tmp_path: Path) -> None:
    model = Illustrated()
    evaluate(model, tmp_path, [])
    assert model.figure_path == tmp_path / "figures" / "test" / "curve.png"
    assert model.figure_path.exists()


def test_wandb_gets_both_wherever_it_stands_among_the_loggers(tmp_path: Path) -> None:
    run = FakeRun()
    wandb = WandbLogger(experiment=run, save_dir=tmp_path)
    evaluate(Illustrated(), tmp_path, [CSVLogger(tmp_path, name="runs"), wandb])
    assert (tmp_path / "runs" / "version_0" / "figures" / "test" / "curve.png").exists()
    assert run.logged["test/curve"][0].format == "png"
    assert run.logged["replies"].columns == ["id", "text"]
    assert run.logged["replies"].data == [[1, "été"], [2.5, None]]
    assert run.logged["trainer/global_step"] == 0


def test_fast_dev_run_leaves_no_files(tmp_path: Path) -> None:
    model = Illustrated()
    evaluate(model, tmp_path, [], fast_dev_run=True)
    assert model.figure_path is None
    assert model.table_path is None
    assert model.open_figures == []
    assert list(tmp_path.iterdir()) == []


class _Ranked(Illustrated):
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        out = Path(self.trainer.default_root_dir) / f"rank-{self.global_rank}.json"
        out.write_text(json.dumps([str(self.figure_path), str(self.table_path), str(self.folder)]))


def test_only_the_first_process_writes_and_all_know_the_folder(tmp_path: Path) -> None:
    evaluate(
        _Ranked(),
        tmp_path,
        [CSVLogger(tmp_path, name="runs")],
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=False,
    )
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert Path(first[0]).read_bytes().startswith(PNG)
    assert second[:2] == ["None", "None"]
    assert first[2] == second[2] == str(tmp_path / "runs" / "version_0")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]


@pytest.mark.parametrize("key", ["../outside", "/absolute", "", "a/../../b"])
def test_key_that_leads_out_of_the_folder_is_refused(key: str, tmp_path: Path) -> None:
    model = Illustrated()
    model.key = key
    with pytest.raises(ValueError, match="names a file below the run's figures, got"):
        evaluate(model, tmp_path, [])


def test_row_of_another_length_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = Illustrated()
    model.rows = [(1, "a"), (2,)]
    with pytest.raises(ValueError, match="row 1 of table 'replies' has 1 values for 2 columns"):
        evaluate(model, tmp_path, [])
    assert not list(tmp_path.rglob("*.jsonl"))
