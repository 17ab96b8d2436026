"""Attacks under a Trainer: what they measure, what they leave alone, how they are resumed and shared."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import TextRecData
from zoo import AttackResult, RecFormerRec, TextAttackModule
from zoo.text_attack.attack_views import choose
from zoo.text_attack.exposure import exposure
from zoo.text_attack.victims import load_victim

VICTIM = {"max_attr_length": 12, "max_items": 3, "max_tokens": 40}


def data(**options):
    given = {"sample_users": 40, "sample_items": 60, "eval_batch_size": 16}
    if not isinstance(options.get("targets"), list):
        given["num_targets"] = 4
    return TextRecData(**{**given, **options})


def module(**options):
    torch.manual_seed(0)
    return TextAttackModule(**{"victim_options": VICTIM, "k": 10, "delta": None, **options})


def trainer(tmp_path, **options):
    given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{**given, "default_root_dir": tmp_path, "enable_checkpointing": False, **options})


def attacked(tmp_path, model=None, source=None, **options):
    """Metrics, results and module of a test."""
    model = module(**options) if model is None else model
    path = tmp_path / "attacks.jsonl"
    model.results_path = str(path)
    (metrics,) = trainer(tmp_path).test(model, source or data(), verbose=False)[:1]
    lines = path.read_text().splitlines()
    return metrics, [AttackResult.from_json(line) for line in lines[1:]], model


def test_exposures_are_the_share_of_users_whose_ranking_holds_the_title(tmp_path):
    metrics, results, model = attacked(tmp_path)
    source = data()
    victim, users = model.victim, source.whole("test")
    vectors = victim.user_state(users)
    for result in results:
        for title, reported in ((result.original, result.exposure_pre), (result.perturbed, result.exposure_post)):
            others = torch.cat([victim.encode_items()[: result.item_id], victim.encode_items()[result.item_id + 1 :]])
            better = (vectors @ others.T > vectors @ victim.encode_items([title]).T).sum(1)
            assert reported == pytest.approx(float((better < 10).double().mean()), abs=1e-12)
    assert metrics["test/exposure/pre"] == pytest.approx(sum(r.exposure_pre for r in results) / 4)
    assert metrics["test/lift"] == pytest.approx(metrics["test/exposure/post"] / metrics["test/exposure/pre"])


def test_the_search_sees_the_anchor_users_alone(tmp_path):
    _, results, model = attacked(tmp_path, anchor_share=0.25)
    view = model.view
    assert len(view.anchors) == 10 and len(view.users) == 40
    for result in results:
        goal = view.goal(model.goal, result.item_id)
        assert goal([result.perturbed]).tolist() == [result.goal_post]
        tau = view.anchor_top.values
        assert len(tau) == 10


def test_a_share_of_users_is_as_many_as_it_says():
    counts = [(share, len(choose(count, share, 1))) for share, count in ((0.29, 100), (0.4, 7), (0.01, 5), (1.0, 6))]
    assert counts == [(0.29, 29), (0.4, 2), (0.01, 1), (1.0, 6)]
    rows = choose(50, 0.5, 1).tolist()
    assert rows == sorted(set(rows)) and rows != choose(50, 0.5, 2).tolist()


def test_an_attack_leaves_weights_titles_and_mode_as_they_were(tmp_path):
    model = module(defense="spell", adaptive=True)
    source = data()
    model.victim.set_titles(source.titles)
    before = {name: value.clone() for name, value in model.victim.state_dict().items()}
    scores = model.victim.encode_items()
    model.train()
    attacked(tmp_path, model, source)
    after = model.victim.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.victim.defense is None and model.victim.item_titles == source.titles
    assert torch.equal(model.victim.encode_items(), scores)


def test_no_attack_changes_no_metric_at_all(tmp_path):
    metrics, results, _ = attacked(tmp_path, recipe="identity")
    assert all(result.original == result.perturbed for result in results)
    assert metrics["test/exposure/gain"] == 0 and metrics["test/lift"] == 1 and metrics["test/win_rate"] == 0
    clean = {
        name: value
        for name, value in metrics.items()
        if name.count("/") == 1 and f"test/attacked/{name[5:]}" in metrics
    }
    assert {"test/ndcg@10", "test/recall@10", "test/mrr", "test/auc"} <= clean.keys()
    for name, value in clean.items():
        assert metrics[f"test/attacked/{name[5:]}"] == value and metrics[f"test/change/{name[5:]}"] == 0


def test_all_attacked_titles_at_once_are_those_of_the_items_and_not_of_the_histories(tmp_path):
    metrics, results, model = attacked(tmp_path)
    source = data()
    victim, users = model.victim, source.whole("test")
    items = victim.encode_items()
    for result in results:
        items[result.item_id] = victim.encode_items([result.perturbed])[0]
    scores = victim.user_state(users) @ items.T
    own = scores.gather(1, users.item_ids[:, None])
    ranks = (scores >= own).sum(1) - 1
    assert metrics["test/attacked/recall@10"] == pytest.approx(float((ranks < 10).double().mean()))
    assert metrics["test/attacked/mrr"] == pytest.approx(float((1 / (1 + ranks)).mean()), abs=1e-6)


def test_propagation_gives_histories_the_attacked_titles(tmp_path):
    # Items that are in histories, and a model that moves much: some metric must differ.
    source = data(targets="popular", num_targets=12)
    one, _, _ = attacked(tmp_path / "a", None, source, at_once=True)
    other, _, _ = attacked(tmp_path / "b", None, source, propagate_to_history=True)
    assert one["test/exposure/post"] == other["test/exposure/post"]
    assert any(one[name] != other[name] for name in one if name.startswith("test/attacked/"))


def test_a_resumed_attack_writes_the_same_file_without_doing_targets_again(tmp_path, monkeypatch):
    _, _, model = attacked(tmp_path)
    path = tmp_path / "attacks.jsonl"
    whole = path.read_bytes()
    # As after a kill: the part of the first process, its last line torn.
    lines = whole.decode().splitlines(keepends=True)
    path.unlink()
    (tmp_path / "attacks.part0.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    asked = []
    search = model.attack.attack
    again = module()
    monkeypatch.setattr(
        type(model.attack), "attack", lambda self, *a, **k: asked.append(k["item_id"]) or search(*a, **k)
    )
    attacked(tmp_path, again)
    assert path.read_bytes() == whole and len(asked) == 2
    assert [p.name for p in tmp_path.glob("attacks*")] == ["attacks.jsonl"]


def test_results_of_another_attack_are_not_gone_on_with(tmp_path):
    attacked(tmp_path)
    with pytest.raises(ValueError, match=r"made with other settings \(.*recipe: 'deepwordbug' there, 'punc' now"):
        attacked(tmp_path, recipe="punc")
    torch.manual_seed(1)
    other = TextAttackModule(victim_options=VICTIM, k=10, delta=None)
    with pytest.raises(ValueError, match=r"weights: .* there"):
        attacked(tmp_path, other)


def test_the_order_of_targets_changes_no_result(tmp_path):
    _, results, _ = attacked(tmp_path / "a", None, data(targets=[3, 7, 11]))
    _, other, _ = attacked(tmp_path / "b", None, data(targets=[11, 3, 7]))
    assert [r.item_id for r in results] == [3, 7, 11] and [r.item_id for r in other] == [11, 3, 7]
    assert sorted(map(AttackResult.to_json, results)) == sorted(map(AttackResult.to_json, other))


def test_the_size_of_scored_batches_changes_no_result(tmp_path):
    _, results, _ = attacked(tmp_path / "a")
    _, other, _ = attacked(tmp_path / "b", victim_options={**VICTIM, "encode_batch": 1})
    assert [r.perturbed for r in results] == [r.perturbed for r in other]
    assert [r.goal_post for r in results] == [r.goal_post for r in other]


def test_two_processes_write_what_one_writes(run, tmp_path):
    arguments = (
        *("--model", "TextAttackModule", "--data", "TextRecData", "--model.k", "10", "--model.defense", "spell"),
        *("--model.adaptive", "true", "--data.sample_users", "40", "--data.sample_items", "60"),
        *("--data.num_targets", "5", "--model.victim_options", json.dumps(VICTIM), "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false", "--seed_everything", "0", "--trainer.log_every_n_steps", "1"),
    )
    fitted = run("fit", *arguments, "--trainer.max_epochs", "1")
    checkpoint = str(fitted.run_folder / "last.ckpt")
    metrics = []
    for devices in (1, 2):
        own = ("--trainer.devices", str(devices), *(("--trainer.strategy", "ddp_fork") if devices > 1 else ()))
        file = tmp_path / f"{devices}" / "attacks.jsonl"
        cli = run("test", *arguments, "--ckpt_path", checkpoint, *own, "--model.results", str(file))
        metrics.append({name: float(value) for name, value in cli.trainer.callback_metrics.items()})
    for name in ("attacks.jsonl", "attacks.adaptive.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        assert metrics[1][name] == pytest.approx(value, abs=1e-12), name


def test_a_defence_that_restores_every_title_recovers_all_of_the_exposure(tmp_path, monkeypatch):
    from zoo.text_attack import attack_report

    source = data()
    _, results, _ = attacked(tmp_path / "first", None, source)
    clean = {result.perturbed: result.original for result in results}
    defense = lambda titles: [clean.get(title, title) for title in titles]  # noqa: E731
    monkeypatch.setattr(attack_report, "defense_of", lambda *_: defense)
    for defend in ("all", "targets"):
        metrics, _, _ = attacked(tmp_path / defend, None, source, defense="spell", defend=defend)
        assert metrics["test/exposure/post"] != metrics["test/exposure/pre"]
        assert metrics["test/defended/exposure/post"] == metrics["test/exposure/pre"]
        assert metrics["test/defended/recovery"] == 1
    assert metrics["test/defended/exposure/pre"] == metrics["test/exposure/pre"]


def test_an_adaptive_attack_searches_against_the_defence(tmp_path):
    # Edits of this defence's own making: it drops all hyphens, so that those of the attack do nothing.
    metrics, _, _ = attacked(tmp_path, recipe="punc", recipe_options={"marks": "-"}, defense="spell", adaptive=True)
    assert metrics["test/defended/adaptive/exposure/post"] <= metrics["test/exposure/post"]
    lines = (tmp_path / "attacks.adaptive.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["settings"]["defense"] == "spell" and len(lines) == 5


def test_predict_attacks_and_returns_the_results(tmp_path):
    model = module()
    model.results_path = str(tmp_path / "attacks.jsonl")
    found = trainer(tmp_path).predict(model, data())
    results = [result for batch in found for result in batch]
    lines = (tmp_path / "attacks.jsonl").read_text().splitlines()
    assert [result.to_json() for result in results] == lines[1:] and len(results) == 4


def test_a_victim_from_its_checkpoint_is_attacked_and_not_trained(run, tmp_path, monkeypatch):
    small = ("--data", "TextRecData", "--data.sample_users", "40", "--data.sample_items", "60", *_flags())
    trained = run("fit", "--model", "RecFormerRec", *small, *(f"--model.{k}={v}" for k, v in VICTIM.items()))
    path = str(trained.run_folder / "best.ckpt")
    victim = load_victim(path)
    cli = run("--model", "TextAttackModule", *small, "--model.victim_checkpoint", path, "--model.k", "10")
    assert cli.trainer.callback_metrics["test/targets"] == 1
    state = cli.model.victim.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in victim.state_dict().items())
    assert not list(cli.run_folder.glob("best.ckpt"))


def _flags():
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
    return (*quiet, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps=1")


def test_a_checkpoint_that_is_no_victims_is_refused(run, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of a victim: give the best\.ckpt"):
        TextAttackModule(victim_checkpoint=str(path))
    with pytest.raises(ValueError, match=r"absent\.ckpt: no such checkpoint file"):
        TextAttackModule(victim_checkpoint=str(tmp_path / "absent.ckpt"))


def test_a_victim_whose_prompt_holds_no_title_is_refused(tmp_path):
    model = TextAttackModule(victim="P5Rec", victim_options={"prompt": "p5_ids"})
    with pytest.raises(ValueError, match=r"never reads the title with prompt='p5_ids'"):
        trainer(tmp_path).test(model, data(mode="yesno", num_candidates=20), verbose=False)


def test_a_pointwise_victim_is_attacked_by_propensity_and_reported_by_exposure_too(tmp_path):
    options = {"max_history": 2, "max_title_tokens": 8}
    model = TextAttackModule(
        victim="P5Rec", victim_options=options, k=5, num_candidates=20, max_users=12, recipe_options={"kinds": ["swap"]}
    )
    path = tmp_path / "attacks.jsonl"
    model.results_path = str(path)
    source = data(mode="yesno", num_candidates=20, num_targets=2)
    (metrics, *_) = trainer(tmp_path).test(model, source, verbose=False)
    results = [AttackResult.from_json(line) for line in path.read_text().splitlines()[1:]]
    assert all(0 < result.goal_pre < 1 for result in results)
    assert metrics["test/goal/pre"] == pytest.approx(sum(result.goal_pre for result in results) / 2)
    view = model.view
    assert len(view.top.values) == 12 and len(view.anchor_top.values) == 4
    for result in results:
        # By hand: the target against the same lists, without itself.
        scores = model.victim.score(view.users, [result.perturbed], torch.tensor([result.item_id]))
        lists = torch.stack(
            [torch.randperm(60, generator=g)[:20] for g in [torch.Generator().manual_seed(42)] for _ in range(12)]
        )
        others = model.victim.score_items(view.users, lists).masked_fill(lists == result.item_id, -torch.inf)
        tau = others.topk(5, dim=1).values[:, -1]
        assert result.exposure_post == pytest.approx(float(exposure(scores, tau)[0]))


def test_a_datamodule_without_titles_or_targets_is_refused(tmp_path):
    from datamodules import SequenceData

    with pytest.raises(ValueError, match="reads titles: give a datamodule that has them"):
        trainer(tmp_path).test(module(), SequenceData(sample_users=20), verbose=False)


def test_the_datas_mode_must_fit_the_victim(tmp_path):
    with pytest.raises(ValueError, match=r"RecFormerRec needs --data\.mode sequence, got yesno"):
        trainer(tmp_path).test(module(), data(mode="yesno", num_candidates=20), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"victim": "BERT4Rec"}, "victim must be one of CoLLMRec, P5Rec, RecFormerRec, TALLRec"),
        ({"victim_options": {"heads": 3}}, "RecFormerRec has no heads; it has num_items"),
        ({"recipe": "hotflip"}, "recipe must be one of identity"),
        ({"recipe_options": {"marks": "-"}}, "deepwordbug has no marks; it has"),
        ({"goal": "sales"}, "goal must be one of auto, exposure"),
        ({"goal": "propensity"}, "use ExposureGoal"),
        ({"anchor_share": 0}, "anchor_share must be above 0 and at most 1, got 0"),
        ({"anchor_share": 1.5}, "anchor_share must be above 0"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"delta": -0.1}, "delta must be"),
        ({"k": -1}, "k must be at least 1"),
        ({"max_users": 0}, "max_users must be at least 1"),
        ({"num_candidates": -1}, "num_candidates must be at least 0"),
        ({"defend": "some"}, "defend must be all or targets"),
        ({"adaptive": True}, "adaptive attacks the defended victim"),
        ({"defense": "prayer"}, "defense must be one of spell, rewrite"),
        ({"defense": "spell", "defense_options": {"edits": 1}}, "spell has no edits; it has max_edit"),
        ({"defense": "rewrite"}, "defense='rewrite' needs defense_options.model"),
        ({"defense_options": {"max_edit": 1}}, "defense_options have no meaning without a defense"),
        ({"ties": "lucky"}, "ties must be one of"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextAttackModule(**options)


def test_a_list_as_long_as_the_catalogue_is_refused(tmp_path):
    with pytest.raises(ValueError, match="60"):
        trainer(tmp_path).test(module(k=60), data(), verbose=False)


def test_a_target_that_is_no_item_is_refused():
    with pytest.raises(ValueError, match=r"99.*0\.\.59"):
        _ = data(targets=[99]).target_ids


def test_the_wrapper_trains_the_victim_as_the_victim_trains_itself(tmp_path):
    source = data(seed=3)
    torch.manual_seed(0)
    alone = RecFormerRec(**VICTIM)
    torch.manual_seed(0)
    wrapped = TextAttackModule(victim_options=VICTIM, k=10)
    for model in (alone, wrapped):
        trainer(tmp_path, max_epochs=1, limit_train_batches=3).fit(model, data(seed=3))
    state = wrapped.victim.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())
    assert source.titles == wrapped.victim.titles
