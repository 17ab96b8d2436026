from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from datamodules import TabularTaskBatch, TabularTaskData
from datamodules.sources.task_sample import NUM_OUTPUTS, task_weights

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules.loading import BatchLoader

DECLARED: dict[str, Any] = {
    "categorical_columns": ["shop", "day"],
    "numeric_columns": ["price", "age"],
    "binary_targets": ["click", "buy"],
    "multiclass_targets": ["stars"],
    "regression_targets": ["spent"],
    "user_column": "who",
}


def frame(size: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "row": np.arange(size),
            "shop": rng.choice(["a", "b", "c"], size),
            "day": rng.integers(0, 7, size),
            "price": rng.normal(size=size),
            "age": np.arange(size) * 1.0,
            "click": rng.integers(0, 2, size) * 1.0,
            "buy": rng.integers(0, 2, size),
            "stars": rng.permutation(np.arange(size) % 5),
            "spent": rng.normal(50, 20, size),
            "who": rng.integers(100, 110, size),
        }
    )
    table.loc[rng.choice(size, size // 4, replace=False), "click"] = np.nan
    return table


def made(**options: Any) -> TabularTaskData:
    return TabularTaskData.from_dataframe(frame(), **{**DECLARED, **options})


def joined(loader: BatchLoader) -> TabularTaskBatch:
    """All batches of a loader as one."""
    batches: list[TabularTaskBatch] = list(loader)
    users = [batch.user_ids for batch in batches if batch.user_ids is not None]
    return TabularTaskBatch(
        torch.cat([batch.categories for batch in batches]),
        torch.cat([batch.numbers for batch in batches]),
        {name: torch.cat([batch.targets[name] for batch in batches]) for name in batches[0].targets},
        {name: torch.cat([batch.masks[name] for batch in batches]) for name in batches[0].masks},
        torch.cat(users) if users else None,
    )


def parts(total: int, validation: int, test: int, seed: int = 0) -> list[list[int]]:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    train = total - validation - test
    return [order[:train], order[train : train + validation], order[train + validation :]]


def test_every_row_is_there_once_with_its_own_values_and_labels() -> None:
    table = frame()
    data = made(batch_size=32, eval_batch_size=7, validation_fraction=0.2, test_fraction=0.15)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    split = parts(200, 40, 30)
    train = table.iloc[split[0]]
    mean, std = train["age"].mean(), train["age"].std(ddof=0)
    for loader, rows in zip(loaders, split, strict=True):
        batch = joined(loader)
        found = (batch.numbers[:, 1].double() * std + mean).round().long().tolist()
        assert sorted(found) == sorted(rows)
        own = table.iloc[found]
        assert ["abc"[code - 1] for code in batch.categories[:, 0].tolist()] == own["shop"].tolist()
        assert (batch.categories[:, 1] - 1).tolist() == own["day"].tolist()
        assert batch.targets["buy"].tolist() == own["buy"].tolist()
        assert batch.targets["stars"].tolist() == own["stars"].tolist()
        np.testing.assert_allclose(batch.targets["spent"], own["spent"], rtol=1e-6)
        assert list(batch.masks) == ["click"]
        assert batch.masks["click"].tolist() == own["click"].notna().tolist()
        assert batch.targets["click"].tolist() == own["click"].fillna(0).tolist()
        assert batch.user_ids is not None
        assert len({*zip(own["who"], batch.user_ids.tolist(), strict=True)}) == own["who"].nunique()
    first = next(iter(data.train_dataloader()))
    assert isinstance(first, TabularTaskBatch)
    assert (first.categories.dtype, first.numbers.dtype) == (torch.int64, torch.float32)
    assert {name: values.dtype for name, values in first.targets.items()} == {
        "click": torch.float32,
        "buy": torch.float32,
        "stars": torch.int64,
        "spent": torch.float32,
    }
    assert first.masks["click"].dtype == torch.bool
    assert first.user_ids is not None and first.user_ids.dtype == torch.int64
    assert joined(data.predict_dataloader()).numbers.equal(joined(data.test_dataloader()).numbers)


def test_evaluation_keeps_the_order_of_the_table_and_training_has_a_new_one_each_epoch() -> None:
    data = made(seed=3)
    ages = joined(data.test_dataloader()).numbers[:, 1]
    assert torch.equal(ages, ages.sort().values)
    loader = data.train_dataloader()
    first = joined(loader).numbers
    assert torch.equal(joined(data.train_dataloader()).numbers, first)
    loader.sampler.set_epoch(1)
    second = joined(loader).numbers
    assert not torch.equal(second, first)
    assert torch.equal(second[:, 1].sort().values, first[:, 1].sort().values)
    assert not torch.equal(joined(made(seed=4).train_dataloader()).numbers, first)


def test_tasks_are_plain_values_with_the_statistics_of_the_training_labels() -> None:
    data = made()
    train = frame().iloc[parts(200, 20, 20)[0]]
    assert data.tasks == [
        {"name": "click", "kind": "binary", "num_outputs": 1, "target_mean": 0.0, "target_std": 1.0},
        {"name": "buy", "kind": "binary", "num_outputs": 1, "target_mean": 0.0, "target_std": 1.0},
        {"name": "stars", "kind": "multiclass", "num_outputs": 5, "target_mean": 0.0, "target_std": 1.0},
        {
            "name": "spent",
            "kind": "regression",
            "num_outputs": 1,
            "target_mean": pytest.approx(train["spent"].mean(), rel=1e-6),
            "target_std": pytest.approx(train["spent"].std(ddof=0), rel=1e-6),
        },
    ]
    assert all(type(value) in (str, int, float) for task in data.tasks for value in task.values())
    assert (data.task_names, data.cardinalities) == (["click", "buy", "stars", "spent"], [4, 8])
    assert data.num_numeric == 2
    plain = made(target_scaling=False).tasks[3]
    assert (plain["target_mean"], plain["target_std"]) == (0.0, 1.0)


def test_some_tasks_in_another_order() -> None:
    data, whole = made(tasks=["spent", "click"]), made()
    assert data.task_names == ["spent", "click"]
    batch = next(iter(data.train_dataloader()))
    assert (list(batch.targets), list(batch.masks)) == (["spent", "click"], ["click"])
    whole = made()
    assert torch.equal(
        joined(data.test_dataloader()).targets["spent"], joined(whole.test_dataloader()).targets["spent"]
    )


def test_the_sample_is_what_its_formula_says() -> None:
    data = TabularTaskData(sample_scales=[1.0, 100.0, 0.1])
    assert data.task_names == ["task_1", "task_2", "task_3"]
    assert data.tasks[1] == {
        "name": "task_2",
        "kind": "regression",
        "num_outputs": NUM_OUTPUTS,
        "target_mean": 0.0,
        "target_std": 1.0,
    }
    assert (data.cardinalities, data.num_numeric) == ([], 64)
    weights = task_weights([1.0, 100.0, 0.1])
    sizes = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        batch = joined(loader)
        sizes.append(len(batch.numbers))
        assert batch.categories.shape == (sizes[-1], 0)
        assert not batch.masks and batch.user_ids is None
        for k, scale in enumerate((1.0, 100.0, 0.1)):
            # 10.6 is the slope of tanh's argument in an input that is rounded to float32.
            expected = scale * torch.tanh(batch.numbers.double() @ weights[k].T)
            assert torch.allclose(batch.targets[f"task_{k + 1}"].double(), expected, atol=1e-5 * scale)
        assert batch.numbers.std().item() == pytest.approx(1 / 8, rel=0.02)
        assert batch.numbers.mean().item() == pytest.approx(0, abs=0.003)
    assert sizes == [3_072, 1_024, 1_024]
    common = torch.stack(weights).mean(0)
    assert (weights[0] - weights[1]).std().item() == pytest.approx(7**0.5, rel=0.1)
    assert common.std().item() == pytest.approx((10 + 3.5 / 3) ** 0.5, rel=0.1)
    assert not torch.equal(joined(data.val_dataloader()).numbers, joined(data.test_dataloader()).numbers)


def test_categories_of_the_sample_are_tenths_of_its_first_inputs() -> None:
    data = TabularTaskData(sample_categories=3)
    assert (data.cardinalities, data.num_numeric) == ([11] * 3, 64)
    batch = joined(data.train_dataloader())
    for column in range(3):
        counts = torch.bincount(batch.categories[:, column], minlength=11)
        assert counts[0] == 0 and len(counts) == 11
        assert counts[1:].min().item() > 3_072 / 10 * 0.75
        order = batch.numbers[:, column].argsort()
        assert bool((batch.categories[order, column].diff() >= 0).all())


def test_a_smaller_sample_is_the_beginning_of_a_larger_one_and_tasks_stay() -> None:
    large = TabularTaskData(sample_scales=[1.0, 100.0, 3.0])._prepared
    small = TabularTaskData(sample_rows=30, seed=5, split_seed=9)._prepared
    for part, size in (("train", 30), ("validation", 10), ("test", 10)):
        assert len(small.parts[part]) == size
        for name in ("task_1", "task_2"):
            one = small.tensors.targets[name][small.parts[part]]
            assert torch.equal(one, large.tensors.targets[name][large.parts[part][:size]])


def test_the_scales_of_the_sample_are_in_the_description_on_request() -> None:
    first, second = TabularTaskData(target_scaling=True).tasks
    assert second["target_std"] == pytest.approx(100 * first["target_std"], rel=0.02)
    assert 0.8 < first["target_std"] < 1


def test_a_share_of_the_training_labels_is_hidden_and_no_others() -> None:
    data, whole = made(missing_fraction=0.5), made()
    for name in data.task_names:
        share = joined(data.train_dataloader()).masks[name].float().mean().item()
        assert share == pytest.approx(0.375 if name == "click" else 0.5, abs=0.12)
        own, other = joined(data.val_dataloader()), joined(whole.val_dataloader())
        assert torch.equal(own.targets[name], other.targets[name])
        assert torch.equal(own.masks[name], other.masks.get(name, torch.ones(20, dtype=torch.bool)))
    batch = joined(data.train_dataloader())
    assert all(not batch.targets[name][~mask].any() for name, mask in batch.masks.items())
    hidden = {name: mask.tolist() for name, mask in batch.masks.items()}
    assert hidden["buy"] != hidden["stars"], "each task lacks other rows"
    assert {n: m.tolist() for n, m in joined(made(missing_fraction=0.5).train_dataloader()).masks.items()} == hidden
    other = joined(made(missing_fraction=0.5, split_seed=0, tasks=["buy"]).train_dataloader())
    assert other.masks["buy"].tolist() == hidden["buy"]
    visible = batch.targets["spent"][batch.masks["spent"]].double()
    assert data.tasks[3]["target_mean"] == pytest.approx(visible.mean().item())
    assert data.tasks[2]["num_outputs"] == 5


def test_the_split_column_says_which_rows_are_which() -> None:
    table = frame().assign(
        part=np.where(np.arange(200) < 120, "train", np.where(np.arange(200) < 150, "validation", "test"))
    )
    data = TabularTaskData.from_dataframe(table, **DECLARED, split_column="part")
    assert [len(joined(loader).numbers) for loader in (data.val_dataloader(), data.test_dataloader())] == [30, 50]
    assert joined(data.test_dataloader()).targets["stars"].tolist() == table["stars"][150:].tolist()
    table["part"] = np.where(np.arange(200) < 120, "train", "validation")
    with pytest.raises(ValueError, match="dataframe: the test part has none of the 200 rows: part never says so"):
        TabularTaskData.from_dataframe(table, **DECLARED, split_column="part").setup("fit")


@pytest.mark.parametrize("kind", ["csv", "tsv.gz", "parquet"])
def test_other_rows_are_tested_in_the_codes_of_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    train, other = tmp_path / f"train.{kind}", tmp_path / f"other.{kind}"
    table = frame(20, seed=1)
    table.loc[3, "shop"] = "unheard"
    table.loc[4, "day"] = 99
    for path, content in ((train, frame()), (other, table.drop(columns=["row"]))):
        if kind == "parquet":
            content.to_parquet(path)
        else:
            content.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    plain = TabularTaskData(path=str(train), **DECLARED)
    data = TabularTaskData(path=str(train), test_path=str(other), **DECLARED, test_fraction=0.0)
    assert data.source == "files"
    with caplog.at_level(logging.INFO):
        data.setup("test")
    assert "2 of 40 cells are unknown to training, or rare there, get code 0 (shop 1, day 1)" in caplog.text
    batch = joined(data.test_dataloader())
    assert [" abc"[code] for code in batch.categories[:, 0].tolist()] == [
        " " if shop == "unheard" else shop for shop in table["shop"]
    ]
    assert batch.categories[4, 1] == 0
    assert batch.targets["stars"].tolist() == table["stars"].tolist()
    assert torch.equal(joined(data.predict_dataloader()).numbers, batch.numbers)
    assert made().state_dict()["vocabulary"] == plain.state_dict()["vocabulary"]
    table["stars"] = np.arange(20) % 6
    table.to_csv(tmp_path / "six.csv", index=False)
    with pytest.raises(ValueError, match=r"six\.csv line 7: stars 5, expected a class below 5, as in training"):
        TabularTaskData(path=str(train), test_path=str(tmp_path / "six.csv"), **DECLARED).setup("test")
    with pytest.raises(FileNotFoundError, match=r"gone\.csv does not exist"):
        TabularTaskData(path=str(train), test_path=str(tmp_path / "gone.csv"), **DECLARED).setup("test")


def test_a_split_column_is_not_asked_of_rows_to_test_on(tmp_path: Path) -> None:
    table = frame().assign(part=np.where(np.arange(200) < 120, "train", "validation"))
    frame(20).to_csv(tmp_path / "other.csv", index=False)
    data = TabularTaskData.from_dataframe(table, **DECLARED, split_column="part", test_path=str(tmp_path / "other.csv"))
    assert len(joined(data.test_dataloader()).numbers) == 20


def test_a_task_without_training_labels_is_refused_and_one_of_a_single_class_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = frame()
    table["buy"] = 1
    data = TabularTaskData.from_dataframe(table, **DECLARED)
    data.setup("fit")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "all 160 training labels of task buy are 1.0" in warnings[0]
    table["click"] = np.nan
    with pytest.raises(ValueError, match="dataframe: task click has no label in any of the 160 training rows"):
        TabularTaskData.from_dataframe(table, **DECLARED).setup("fit")
    table = frame().assign(spent=0.1)
    constant = TabularTaskData.from_dataframe(table, **DECLARED).tasks[3]
    assert (constant["target_mean"], constant["target_std"]) == (pytest.approx(0.1), 1.0)


def test_a_checkpoint_of_another_table_is_refused() -> None:
    data = made()
    data.load_state_dict(made(split_seed=0).state_dict())
    other = frame()
    other["shop"] = other["shop"].replace({"c": "d"})
    changed = TabularTaskData.from_dataframe(other, **DECLARED)
    assert changed.cardinalities == data.cardinalities
    with pytest.raises(ValueError, match="trained on another table, its vocabulary differ"):
        changed.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match=r"its columns differ: .*'spent'\] of source='dataframe', here"):
        made(numeric_columns=["age"]).load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="its columns differ"):
        made(tasks=["buy"]).load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="its columns differ"):
        TabularTaskData().load_state_dict(data.state_dict())


def test_two_ranks_share_what_one_process_sees() -> None:
    from datamodules.loading import BatchLoader, KeyedSampler
    from datamodules.task_rows import TaskRows

    prepared = made()._prepared
    rows = TaskRows(prepared.tensors, prepared.parts["train"])

    def batches(size: int, world: int, rank: int) -> list[TabularTaskBatch]:
        sampler = KeyedSampler(len(rows), size, shuffle=True, equal=True, seed=1, num_replicas=world, rank=rank)
        return list(BatchLoader(rows, sampler=sampler))

    for whole, first, second in zip(batches(20, 1, 0), batches(10, 2, 0), batches(10, 2, 1), strict=True):
        assert torch.equal(whole.numbers, torch.cat([first.numbers, second.numbers]))
        assert torch.equal(whole.targets["stars"], torch.cat([first.targets["stars"], second.targets["stars"]]))


class Recorder(LightningModule):
    """Counts what a Trainer hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.seen: dict[str, list[Tensor]] = {}

    def training_step(self, batch: TabularTaskBatch, batch_idx: int) -> Tensor:
        self.seen.setdefault(f"train {self.current_epoch}", []).append(batch.numbers[:, 1])
        return (batch.numbers @ self.weight).square().mean()

    def validation_step(self, batch: TabularTaskBatch, batch_idx: int) -> None:
        self.seen.setdefault("validation", []).append(batch.numbers[:, 1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_gets_every_row_in_every_epoch_in_another_order() -> None:
    data, model = made(batch_size=50, seed=1), Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    first, second = torch.cat(model.seen["train 0"]), torch.cat(model.seen["train 1"])
    assert len(first) == 160
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.cat(model.seen["validation"]).shape == (40,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "adlut"}, "source must be one of embedded, adult, .* got 'adlut'"),
        ({"source": "files"}, "source='files' needs path"),
        ({"path": "x.csv", "source": "adult"}, "path=x.csv and source='adult' contradict"),
        ({"data_dir": "d"}, "data_dir holds known sets, but source='embedded'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"min_category_count": 0}, "min_category_count must be at least 1, got 0"),
        ({"sample_rows": 2}, "sample_rows must be at least 3, got 2"),
        ({"sample_scales": []}, r"sample_scales must be numbers above 0, one a task, got \[\]"),
        ({"sample_scales": [1.0, -1.0]}, "sample_scales must be numbers above 0"),
        ({"missing_fraction": 1.0}, r"missing_fraction must be below 1, got 1\.0"),
        ({"missing_fraction": -0.1}, r"missing_fraction must be at least 0, got -0\.1"),
        ({"path": "x.csv", "validation_fraction": 0.5, "test_fraction": 0.5}, "leave no rows for training"),
        ({"path": "x.csv", "binary_targets": ["y"]}, "a table needs an input"),
        ({"path": "x.csv", "numeric_columns": ["x"]}, "a table needs a target"),
        ({"path": "x.csv", "numeric_columns": ["x"], "binary_targets": ["x"]}, "column 'x' is used twice"),
        (
            {"path": "x.csv", "binary_targets": ["y"], "multiclass_targets": ["y"], "numeric_columns": ["x"]},
            "column 'y' is used twice: in binary_targets and in multiclass_targets",
        ),
        ({"path": "x.csv", **DECLARED, "tasks": ["buy", "by"]}, "tasks must be some of click, .* got 'by'"),
        ({"path": "x.csv", **DECLARED, "tasks": ["buy", "buy"]}, "tasks must name at least one task, each once"),
        ({"path": "x.csv", **DECLARED, "tasks": []}, "tasks must name at least one task"),
        (
            {"path": "x.csv", **DECLARED, "split_column": "s", "test_fraction": 0.1},
            "split_column='s' and test_f",
        ),
        ({"source": "adult", "tasks": ["like"]}, "tasks must be some of income, hours, age, got 'like'"),
        ({"source": "adult", "binary_targets": ["y"]}, "the known set has its own: source='adult'"),
        ({"source": "adult", "user_column": "y"}, "user_column=y declares columns of your own file"),
        ({"tasks": ["task_3"]}, "tasks must be some of task_1, task_2, got 'task_3'"),
        (
            {"numeric_columns": ["x"]},
            r"numeric_columns=\['x'\] declares columns of your own file, but there is",
        ),
        ({"test_path": "x.csv"}, "test_path=x.csv does not apply to the embedded sample"),
        ({"test_fraction": 0.1}, r"test_fraction=0\.1 does not apply to the embedded sample"),
    ],
)
def test_contradictory_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabularTaskData(**options)


def test_a_frame_is_the_only_source_of_its_module() -> None:
    with pytest.raises(ValueError, match="from_dataframe reads df: remove path="):
        TabularTaskData.from_dataframe(frame(), path="x.csv", **DECLARED)
    with pytest.raises(ValueError, match="from_dataframe reads df: remove source="):
        TabularTaskData.from_dataframe(frame(), source="adult", **DECLARED)
    with pytest.raises(ValueError, match=r"a table in memory is given by TabularTaskData\.from_dataframe"):
        TabularTaskData(source="dataframe", **DECLARED).setup("fit")


def test_a_part_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="dataframe: the validation part has none of the 3 rows"):
        TabularTaskData.from_dataframe(frame(3).fillna(1.0), **{**DECLARED, "multiclass_targets": []}).setup("fit")
    with pytest.raises(ValueError, match="the test part has none of the 200 rows: give it a larger fraction"):
        made(test_fraction=0.0).setup("fit")


def test_fractions_replace_the_sizes_of_a_known_set_only_when_given() -> None:
    assert TabularTaskData(source="adult")._sizes(32_561) == [20_000, 5_000, 7_561]
    assert TabularTaskData(source="adult", test_fraction=0.2)._sizes(100) == [70, 10, 20]
    assert TabularTaskData(source="tiktok")._sizes(1_000) == [810, 90, 100]


def _csv(path, rows: int = 40, scale: float = 1.0, labelled: bool = True) -> str:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, 2, generator=generator)
    header = "a,b" + (",click" if labelled else "")
    lines = [f"{scale * a:.6f},{b:.6f}" + (f",{int(a > 0)}" if labelled else "") for a, b in values.tolist()]
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


def _own(path: str, **options: Any) -> TabularTaskData:
    return TabularTaskData(path=path, numeric_columns=["a", "b"], binary_targets=["click"], **options)


def test_a_checkpoint_is_refused_under_another_split_or_scale(tmp_path: Path) -> None:
    path = _csv(tmp_path / "own.csv")
    trained = _own(path).state_dict()
    _own(path).load_state_dict(trained)
    with pytest.raises(ValueError, match="trained on another table, its split differ"):
        _own(path, split_seed=5).load_state_dict(trained)
    with pytest.raises(ValueError, match="trained on another table, its statistics differ"):
        _own(_csv(tmp_path / "other.csv", scale=3.0)).load_state_dict(trained)


def test_rows_to_predict_for_need_no_labels(tmp_path: Path) -> None:
    data = _own(_csv(tmp_path / "own.csv"), test_path=_csv(tmp_path / "new.csv", rows=7, labelled=False))
    batch = next(iter(data.predict_dataloader()))
    assert batch.numbers.shape == (7, 2)
    assert batch.rows is not None and batch.rows.tolist() == list(range(7))
    assert not batch.targets
    with pytest.raises(ValueError, match="has no column 'click'"):
        data.test_dataloader()
