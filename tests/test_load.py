"""A checkpoint is a model by itself: no data is needed to load it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils._pytree import tree_flatten

from tests.methods import METHODS, UNTRAINED, VARIANTS, Method


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS, *UNTRAINED], ids=lambda method: method.name)
def test_a_model_loaded_without_data_predicts_the_same(run, tmp_path, method: Method):
    cli = run("fit", *method.command, "--trainer.max_epochs", "1")
    loaded = type(cli.model).load_from_checkpoint(cli.run_folder / "last.ckpt")

    def predict(model, folder):
        trainer = Trainer(
            accelerator="cpu", default_root_dir=tmp_path / folder, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        # The loaders alone: nothing may come from the data module, unless the method says so.
        source = cli.datamodule if method.needs_users else None
        loaders = None if method.needs_users else cli.datamodule.predict_dataloader()
        return tree_flatten(trainer.predict(model, datamodule=source, dataloaders=loaders))[0]

    expected, actual = predict(cli.model, "trained"), predict(loaded, "loaded")
    assert len(expected) == len(actual) > 0
    for left, right in zip(expected, actual, strict=True):
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
