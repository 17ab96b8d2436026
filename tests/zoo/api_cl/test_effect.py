"""Memory and similarity keep what earlier APIs taught, in the demo's setting, shortened to three tasks."""

from __future__ import annotations

from tests.methods import COMMON, CONFIGS

# The study has, over all tasks, -0.01 for the method and -0.40 without memory and similarity; here 0.03 and -0.30.
DEMO = (
    "--config", str(CONFIGS / "api_cl" / "demo.yaml"), *COMMON,
    "--trainer.max_epochs", "3", "--data.num_tasks", "3", "--data.classes_per_task", "2",
    "--data.iterations_per_task", "30", "--model.student_steps", "3", "--model.api_epochs", "10",
)  # fmt: skip


def test_a_data_free_stream_is_learnt_and_not_forgotten(run):
    def means(*options: str) -> dict[str, float]:
        found = []
        for seed in (1, 2):
            metrics = run(*DEMO, "--seed_everything", str(seed), *options).trainer.callback_metrics
            assert metrics["test/queries"] == 3 * 30 * (2 * 2 * 64 + 3 * 64)
            found.append({name: float(metrics[f"test/til/{name}"]) for name in ("acc", "bwt")})
        return {name: (found[0][name] + found[1][name]) / 2 for name in ("acc", "bwt")}

    ours, sequential = means(), means("--model.method", "sequential")
    assert ours["acc"] > 0.9 and ours["bwt"] > -0.06
    assert sequential["bwt"] < ours["bwt"] - 0.1
