"""The demo shows the effect: a search raises exposure, random edits do not, and spelling repair undoes it."""

from __future__ import annotations

from tests.methods import COMMON, CONFIGS


def test_a_search_lifts_exposure_where_random_edits_do_not_and_repair_undoes_it(run):
    demo = ("--config", str(CONFIGS / "text_attack" / "demo.yaml"), *COMMON)
    cli = run(*demo)
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    # The lower bound of the interval over targets; seeds 0 to 2 have 1.15, 1.38 and 1.35.
    assert found["test/lift_low"] > 1 and found["test/win_rate"] >= 0.6
    assert abs(found["test/change/recall@10"]) <= 0.02
    assert found["test/defended/recovery"] >= 0.8
    random = run(
        "test", *demo, "--ckpt_path", str(cli.run_folder / "best.ckpt"), "--model.recipe", "random",
        "--model.defense", "null", "--model.adaptive", "false",
    )  # fmt: skip
    assert float(random.trainer.callback_metrics["test/lift"]) < found["test/lift"] - 0.15
