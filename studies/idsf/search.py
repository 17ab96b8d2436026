"""One search for the settings of IDSF and its siblings: `python -m studies.idsf.search --data tiktok`.

Every model has the same number of trials on one seed, drawn at random from the ranges of `SPACES`, the same number of
epochs, the same early stopping, and is chosen by the best validation Recall@20. The test part is not looked at. The
trials of each model go to `results/idsf/search_<data>_<model>.json`; `--write` puts the chosen settings into
`configs/idsf/<data>_<model>.yaml`.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping

import zoo
from datamodules.interaction import InteractionData
from zoo.common.results import write_result

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
EVERY, PATIENCE = 5, 5  # epochs between validations; validations without progress before the end

DATA: dict[str, dict[str, Any]] = {
    "movielens": {"source": "movielens", "modalities": ["poster", "text"], "min_rating": 4.0, "batch_size": 1024},
    "tiktok": {"source": "tiktok", "batch_size": 2048},
}
EPOCHS = {"movielens": 80, "tiktok": 50}

SHARED = {"lr": [5e-4, 1e-3, 2e-3, 5e-3], "reg_weight": [1e-5, 1e-4, 1e-3, 1e-2]}
SPACES: dict[str, dict[str, list[Any]]] = {
    "IDSF": {
        **SHARED,
        "num_layers": [2, 3],
        "id_weight": [0.1, 0.3, 1.0],
        "cl_weight": [0.03, 0.1, 0.3],
        "norm": ["rw_self", "sym"],
        "readout": ["sum_norm", "mlp_ln"],
    },
    "BPRMF": SHARED,
    "LightGCN": {**SHARED, "num_layers": [1, 2, 3]},
    "VBPR": SHARED,
    "FREEDOM": {**SHARED, "num_layers": [1, 2], "dropout": [0.5, 0.8, 0.9], "reg_weight": [0.0, 1e-5, 1e-4, 1e-3]},
    "BM3": {**SHARED, "num_layers": [1, 2], "dropout": [0.3, 0.5], "reg_weight": [1e-2, 1e-1], "cl_weight": [0.5, 2.0]},
    "LATTICE": {**SHARED, "num_layers": [1, 2], "skip_weight": [0.5, 0.7, 0.9]},
}
FIXED: dict[str, dict[str, Any]] = {
    "IDSF": {"hidden_size": 64, "lr_decay": 1.0, "contrast_cap": 512},
    "LATTICE": {"lr_decay": 1.0},
}


class BestRecall(Callback):
    """Keeps the best validation Recall@20 and the epoch of it."""

    def __init__(self) -> None:
        self.value, self.epoch = -1.0, -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare."""
        value = float(trainer.callback_metrics["val/recall@20"])
        if value > self.value:
            self.value, self.epoch = value, trainer.current_epoch


def trials(model: str, number: int) -> list[dict[str, Any]]:
    """Settings to try, distinct, the same in every run."""
    draw = random.Random(f"{model} {SEED}")
    space = SPACES[model]
    found: list[dict[str, Any]] = []
    while len(found) < number:
        settings = {name: draw.choice(values) for name, values in space.items()}
        if settings not in found:
            found.append(settings)
    return found


def run(model: str, settings: dict[str, Any], data: InteractionData, epochs: int) -> dict[str, Any]:
    """One training; its best validation Recall@20."""
    seed_everything(SEED, verbose=False)
    arguments: dict[str, Any] = {"num_users": data.num_users, "num_items": data.num_items}
    if model not in ("BPRMF", "LightGCN"):
        arguments |= {"modalities": data.modalities, "feature_sizes": data.feature_sizes}
    module = getattr(zoo, model)(**arguments, **FIXED.get(model, {}), **settings)
    best = BestRecall()
    stop = EarlyStopping("val/recall@20", mode="max", patience=PATIENCE)
    started = time.process_time()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, check_val_every_n_epoch=EVERY, num_sanity_val_steps=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[best, stop],
    )  # fmt: skip
    trainer.fit(module, data)
    return {"settings": settings, "val/recall@20": best.value, "epoch": best.epoch,
            "cpu_seconds": round(time.process_time() - started, 1)}  # fmt: skip


def write_config(name: str, model: str, settings: dict[str, Any], epochs: int) -> Path:
    """The chosen settings as a config of `train.py`."""
    config = {
        "seed_everything": SEED,
        "model": {"class_path": model, "init_args": {**FIXED.get(model, {}), **settings}},
        "data": {"class_path": "InteractionData", "init_args": DATA[name]},
        "trainer": {
            "max_epochs": epochs,
            "check_val_every_n_epoch": EVERY,
            "callbacks": [
                {
                    "class_path": "EarlyStopping",
                    "init_args": {"monitor": "val/recall@20", "mode": "max", "patience": PATIENCE},
                }
            ],
        },
    }
    path = ROOT / "configs" / "idsf" / f"{name}_{model.lower()}.yaml"
    text = f"# {model} on {name}, the settings that `python -m studies.idsf.search --data {name}` chose.\n"
    path.write_text(text + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    """Search, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True, help="set to search on")
    parser.add_argument("--models", nargs="+", default=list(SPACES), choices=SPACES, help="models to search for")
    parser.add_argument("--trials", type=int, default=8, help="settings tried for each model (default: 8)")
    parser.add_argument("--epochs", type=int, default=None, help="most epochs of a trial")
    parser.add_argument("--write", action="store_true", help="write the configs of the chosen settings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    epochs = arguments.epochs or EPOCHS[arguments.data]
    data = InteractionData(**DATA[arguments.data])
    for model in arguments.models:
        done = []
        for settings in trials(model, arguments.trials):
            done.append(run(model, settings, data, epochs))
            print(f"{model:9}{done[-1]['val/recall@20']:.4f} @ {done[-1]['epoch']:3d}, "
                  f"{done[-1]['cpu_seconds']:6.1f} CPU s  {settings}", flush=True)  # fmt: skip
        chosen = max(done, key=lambda trial: trial["val/recall@20"])
        print(f"{model}: {chosen}", flush=True)
        write_result(
            ROOT / "results" / "idsf" / f"search_{arguments.data}_{model.lower()}.json",
            config={"data": DATA[arguments.data], "model": model, "epochs": epochs, "space": SPACES[model],
                    "fixed": FIXED.get(model, {}), "trials": done, "chosen": chosen["settings"]},
            seed=SEED,
            metrics={"val/recall@20": chosen["val/recall@20"]},
            seconds={"all": sum(trial["cpu_seconds"] for trial in done)},
        )  # fmt: skip
        if arguments.write:
            write_config(arguments.data, model, chosen["settings"], epochs)


if __name__ == "__main__":
    main()
