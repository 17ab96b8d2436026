"""What ID embeddings hold: `python -m studies.idsf.semantics` (MovieLens small, all of its training set, 3 seeds).

For the IDs of BPR-MF, LightGCN and IDSF, and for features: the AUC with which the cosine of two items tells pairs that
at least three users like in the held-out interactions, and its rank correlation with content and with co-occurrence in
training. Settings as in the other runs on this set (`configs/idsf/sparse_*.yaml`), but with all training interactions.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

import zoo
from datamodules.interaction import InteractionData
from zoo.common.results import environment, peak_memory, write_json
from zoo.idsf.semantics import measure_id_semantics

SEEDS = (0, 1, 2)
EPOCHS = 40
DATA: dict[str, Any] = {
    "source": "movielens", "modalities": ["facts", "genre"], "min_rating": 4.0, "min_user_interactions": 5,
    "min_item_interactions": 5, "split": "mmrec", "feature_norm": "standardize", "batch_size": 512,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "BPRMF": {"reg_weight": 1e-5},
    "LightGCN": {"reg_weight": 1e-3},
    "IDSF": {"hidden_size": 64, "norm": "sym", "id_weight": 1.0, "cl_weight": 0.1, "contrast_cap": 256,
             "reg_weight": 1e-3, "lr": 1e-3, "lr_decay": 1.0},
}  # fmt: skip
RESULT = Path(__file__).resolve().parents[2] / "results" / "idsf" / "semantics.json"


def representations(seed: int, data: InteractionData, epochs: int = EPOCHS) -> dict[str, torch.Tensor]:
    """Item vectors by name: IDs of each model after training, features, and IDs before training."""
    found: dict[str, torch.Tensor] = {}
    for name, settings in MODELS.items():
        seed_everything(seed, verbose=False)
        arguments: dict[str, Any] = {"num_users": data.num_users, "num_items": data.num_items, **settings}
        if name == "IDSF":
            arguments |= {"modalities": data.modalities, "feature_sizes": data.feature_sizes}
        model = getattr(zoo, name)(**arguments)
        if name == "BPRMF":
            found["untrained"] = model.item_id.detach().clone()
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(model, data)
        if name == "IDSF":
            found |= {f"idsf {kind}": part for kind, part in model.representations().items()}
        else:
            found[name.lower()] = model.item_id.detach()
    return found


def measure(seed: int, data: InteractionData, epochs: int = EPOCHS) -> dict[str, dict[str, float]]:
    """Figures of one seed by representation and measure."""
    report = measure_id_semantics(
        representations(seed, data, epochs), data.held_out_edges, data.train_edges, data.num_users, data.num_items,
        dict(data.features),
    )  # fmt: skip
    return report.scores


def main() -> None:
    """Measure, and write the means over the seeds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = InteractionData(**DATA)
    started = time.perf_counter()
    found = [measure(seed, data) for seed in SEEDS]
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name in found[0]:
        summary[name] = {}
        for key in found[0][name]:
            values = [one[name][key] for one in found]
            summary[name][key] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
        shown = ", ".join(f"{key} {cell['mean']:.3f} +- {cell['std']:.3f}" for key, cell in summary[name].items())
        print(f"{name:24}{shown}")
    record = {
        "summary": summary, "seeds": list(SEEDS), "command": "python -m studies.idsf.semantics",
        "config": {"data": DATA, "models": MODELS, "epochs": EPOCHS},
        "seconds": {"all": round(time.perf_counter() - started, 1)}, **peak_memory(), **environment(),
    }  # fmt: skip
    write_json(RESULT, record)
    print(f"Results in {RESULT}")


if __name__ == "__main__":
    main()
