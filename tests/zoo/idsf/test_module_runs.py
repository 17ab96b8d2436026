"""IDSF in a Trainer: its features, its checkpoints, its predictions and its precision."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from datamodules.interaction import InteractionData
from zoo.idsf.graph import BipartiteGraph
from zoo.idsf.module import IDSF

if TYPE_CHECKING:
    from pathlib import Path


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=2,
        num_sanity_val_steps=0, default_root_dir=folder, **{"enable_checkpointing": False, **options},
    )  # fmt: skip


def new_data(**options: Any) -> InteractionData:
    return InteractionData(**{"sample_users": 40, "batch_size": 64, **options})


def model_for(data: InteractionData, **options: Any) -> IDSF:
    seed_everything(0, verbose=False)
    return IDSF(
        data.num_users, data.num_items, data.modalities, data.feature_sizes, hidden_size=8, ks=[5], top_k=5, **options
    )


class Trained(NamedTuple):
    model: IDSF
    path: Path
    results: dict[str, float]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that has trained features, its checkpoint, and its test."""
    folder, data = tmp_path_factory.mktemp("trained"), new_data()
    model = model_for(data, trainable_features=True, lr=0.01)
    saver = ModelCheckpoint(folder / "checkpoints", save_last=True)
    running = trainer(folder, enable_checkpointing=True, callbacks=[saver])
    running.fit(model, datamodule=data)
    (results,) = running.test(model, datamodule=data, verbose=False)
    return Trained(model, folder / "checkpoints" / "last.ckpt", dict(results))


def test_trained_features_start_from_the_data_and_are_trained(trained: Trained) -> None:
    data = new_data()
    model = model_for(data, trainable_features=True)
    trainer(trained.path.parent, fast_dev_run=True).validate(model, datamodule=data, verbose=False)
    for name, values in zip(data.modalities, model.feature_list(), strict=True):
        assert values.requires_grad and values.detach().equal(data.features[name])
    for name, values in zip(data.modalities, trained.model.feature_list(), strict=True):
        assert float((values.detach() - data.features[name]).abs().max()) > 0.01
    frozen = model_for(data)
    trainer(trained.path.parent, fast_dev_run=True).validate(frozen, datamodule=data, verbose=False)
    assert all(not values.requires_grad for values in frozen.feature_list())


def test_a_checkpoint_tested_with_its_data_keeps_its_trained_features(trained: Trained, tmp_path: Path) -> None:
    model = IDSF.load_from_checkpoint(trained.path)
    (results,) = trainer(tmp_path).test(model, datamodule=new_data(), verbose=False)
    assert results == pytest.approx(trained.results)
    for found, wanted in zip(model.feature_list(), trained.model.feature_list(), strict=True):
        assert found.equal(wanted)


def test_a_checkpoint_without_data_recommends_the_same(trained: Trained) -> None:
    model, users = IDSF.load_from_checkpoint(trained.path), torch.tensor([3, 0, 11])
    (items, scores), (wanted, wanted_scores) = (m.recommend(users, 4) for m in (model, trained.model))
    assert items.equal(wanted)
    torch.testing.assert_close(scores, wanted_scores)
    torch.testing.assert_close(model(users, items[:, 0]), scores[:, 0])


def test_other_features_than_those_of_the_checkpoint_are_refused(trained: Trained, tmp_path: Path) -> None:
    data, pattern = (
        new_data(feature_norm="l2"),
        r"other features \(.*image [\d.]+/.*\) than those given \(image [\d.]+/",
    )
    with pytest.raises(ValueError, match=pattern):
        trainer(tmp_path).test(IDSF.load_from_checkpoint(trained.path), datamodule=data, verbose=False)
    model = model_for(data, trainable_features=True)
    trainer(tmp_path, fast_dev_run=True).validate(model, datamodule=data, verbose=False)
    with pytest.raises(ValueError, match=pattern):
        model.on_load_checkpoint(torch.load(trained.path, weights_only=True))
    model = model_for(new_data())
    trainer(tmp_path, fast_dev_run=True).validate(model, datamodule=new_data(), verbose=False)
    with pytest.raises(ValueError, match=pattern):
        trainer(tmp_path).test(model, datamodule=data, verbose=False)


def test_the_last_digits_of_features_do_not_matter_to_a_checkpoint(trained: Trained, tmp_path: Path) -> None:
    data = new_data()
    data.features = {name: part * (1 + 1e-6) for name, part in data.features.items()}
    (found,) = trainer(tmp_path).test(IDSF.load_from_checkpoint(trained.path), datamodule=data, verbose=False)
    assert found == pytest.approx(trained.results, abs=0.02)


def test_other_training_interactions_are_refused_by_a_model_that_is_set_up(trained: Trained, tmp_path: Path) -> None:
    model = model_for(new_data())
    trainer(tmp_path, fast_dev_run=True).validate(model, datamodule=new_data(), verbose=False)
    with pytest.raises(ValueError, match=r"set up with other training interactions .* test_path"):
        trainer(tmp_path).test(model, datamodule=new_data(split_seed=5), verbose=False)


def test_sharding_of_weights_is_refused(tmp_path: Path) -> None:
    class FSDPStrategy(SingleDeviceStrategy):
        pass

    running = trainer(tmp_path, strategy=FSDPStrategy("cpu"))
    with pytest.raises(ValueError, match=r"fsdp would split .* use ddp"):
        running.fit(model_for(new_data()), datamodule=new_data())


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_as_such_is_refused(precision: str, tmp_path: Path) -> None:
    data = new_data()
    with pytest.raises(ValueError, match=f"precision {precision} .* use bf16-mixed"):
        trainer(tmp_path, precision=precision).fit(model_for(data), datamodule=data)


def test_another_number_of_items_is_refused_naming_both(trained: Trained, tmp_path: Path) -> None:
    model, data = IDSF.load_from_checkpoint(trained.path), new_data(sample_users=90)
    with pytest.raises(ValueError, match=r"built for num_users=40, .* has num_users=90"):
        trainer(tmp_path).test(model, datamodule=data, verbose=False)
    data.num_users = 40
    pattern = f"built for num_items={model.num_items}, but InteractionData .* has num_items={data.num_items}"
    with pytest.raises(ValueError, match=pattern):
        trainer(tmp_path).test(model, datamodule=data, verbose=False)


def test_predictions_have_external_ids_and_nothing_of_the_training(trained: Trained, tmp_path: Path) -> None:
    data, running = new_data(), trainer(tmp_path)
    (found,) = running.predict(IDSF.load_from_checkpoint(trained.path), datamodule=data)  # type: ignore[misc]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["user"] for line in lines] == data.user_labels
    seen = set(zip(*data.train_edges.tolist(), strict=True))
    for user, (line, items) in enumerate(zip(lines, found["item_ids"].tolist(), strict=True)):  # type: ignore[call-overload]
        assert line["items"] == [data.item_labels[item] for item in items] and len(items) == 5
        assert not seen & {(user, item) for item in items}


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_under_mixed_precision_the_graph_stays_float32_which_is_told_once(
    precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    data, dtypes, convolve = new_data(), set(), BipartiteGraph.convolve

    def watched(graph: BipartiteGraph, x: Tensor, num_layers: int, added: Tensor | None = None) -> Tensor:
        found = convolve(graph, x, num_layers, added)
        dtypes.update({x.dtype, found.dtype})
        return found

    monkeypatch.setattr(BipartiteGraph, "convolve", watched)
    running = trainer(tmp_path, precision=precision)
    model = model_for(data)
    with caplog.at_level(logging.INFO, "zoo.idsf.module"):
        running.fit(model, datamodule=data)
        running.validate(model, datamodule=data, verbose=False)
    assert dtypes == {torch.float32}
    told = [record for record in caplog.records if "the steps along the graph stay float32" in record.getMessage()]
    assert len(told) == (precision == "bf16-mixed")


def test_lists_of_few_candidates_name_nothing_else(tmp_path: Path) -> None:
    data = new_data(cold_fraction=4)
    model, running = model_for(data, cl_weight=0.0), trainer(tmp_path)
    running.fit(model, datamodule=data)
    running.test(model, datamodule=data, verbose=False)
    (path,) = tmp_path.rglob("recommendations.jsonl")
    names = [data.item_names[item] for item in next(iter(data.test_dataloader())).candidate_ids.tolist()]
    for line in path.read_text().splitlines():
        assert sorted(json.loads(line)["recommended"]) == sorted(names)
