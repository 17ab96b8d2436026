"""What all victims do that are asked about pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.zoo.text_attack.pairs import NUM_USERS, TITLES, batch, victim
from zoo.text_attack.collm import CoLLMRec
from zoo.text_attack.p5 import P5Rec
from zoo.text_attack.tallrec import TALLRec

SIZES = {"num_users": NUM_USERS, "num_items": len(TITLES), "cf_size": 8, "proj_factor": 2}
VICTIMS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "tallrec": (TALLRec, {}),
    "tallrec_lora": (TALLRec, {"lora": {}}),
    "p5": (P5Rec, {}),
    "collm_1": (CoLLMRec, SIZES),
    "collm_2": (CoLLMRec, {**SIZES, "stage": 2}),
}
TEXTS = ["Super Mario", "Halo Quest of the Dragon", "Zelda"]
IDS = torch.tensor([3, 4, 5])


def make(name: str, **options: Any) -> Any:
    kind, values = VICTIMS[name]
    return victim(kind, **{**values, **options})


@pytest.fixture(params=VICTIMS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_two_calls_agree_exactly_and_leave_weights_and_modes_alone(name: str) -> None:
    made = make(name)
    made.train()
    before = copy.deepcopy(made.state_dict())
    users = made.user_state(batch())
    first, second = made.score(users, TEXTS, IDS), made.score(users, TEXTS, IDS)
    assert torch.equal(first, second)
    assert first.shape == (6, 3) and first.dtype == torch.float32 and not first.requires_grad
    assert ((first > 0) & (first < 1)).all() and len(first.unique()) == first.numel()
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in before.items())
    assert all(module.training for module in made.modules())


def test_scores_do_not_depend_on_how_many_prompts_go_at_once(name: str) -> None:
    made = make(name)
    expected = made.score(made.user_state(batch()), TEXTS, IDS)
    for size in (1, 2, 5):
        made.score_batch = size
        torch.testing.assert_close(made.score(made.user_state(batch()), TEXTS, IDS), expected, atol=1e-5, rtol=1e-5)
    reverse = made.score(made.user_state(batch()), TEXTS[::-1], IDS.flip(0)).flip(1)
    torch.testing.assert_close(reverse, expected, atol=1e-5, rtol=1e-5)
    one = batch()
    one = type(one)(*(field[2:3] for field in one))
    torch.testing.assert_close(made.score(made.user_state(one), TEXTS, IDS), expected[2:3], atol=1e-5, rtol=1e-5)


def test_a_title_scores_as_the_item_of_the_catalogue_does(name: str) -> None:
    made = make(name)
    rows = batch()
    users = made.user_state(rows)
    items = made.score_items(users, rows.candidate_ids)
    texts = made.score(users, [TITLES[i] for i in rows.candidate_ids[1]], rows.candidate_ids[1])
    torch.testing.assert_close(items[1], texts[1], atol=1e-5, rtol=1e-5)
    single = made.score_items(users, rows.candidate_ids[:, :1])
    torch.testing.assert_close(single, items[:, :1], atol=1e-5, rtol=1e-5)


def test_the_prefix_cache_gives_the_scores_of_whole_prompts(name: str) -> None:
    made = make(name)
    if not hasattr(made, "use_prefix_cache"):
        assert name == "p5"
        return
    users = made.user_state(batch())
    cached = made.score(users, TEXTS, IDS)
    assert made._cache._bytes > 0
    whole = make(name, use_prefix_cache=False)
    torch.testing.assert_close(whole.score(whole.user_state(batch()), TEXTS, IDS), cached, atol=1e-4, rtol=1e-4)
    small = make(name, cache_bytes=0)
    torch.testing.assert_close(small.score(small.user_state(batch()), TEXTS, IDS), cached, atol=1e-5, rtol=1e-5)


def test_scores_follow_the_weights(name: str) -> None:
    made = make(name)
    users = made.user_state(batch())
    before = made.score(users, TEXTS, IDS)
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = made.score(users, TEXTS, IDS)
    fresh = made.score(made.user_state(batch()), TEXTS, IDS)
    assert not torch.allclose(before, after, atol=1e-4)
    torch.testing.assert_close(after, fresh)


def test_a_defence_is_before_titles_of_histories_and_of_questions(name: str) -> None:
    plain, upper = make(name), make(name)
    upper.with_defense(lambda titles: [title.upper() for title in titles])
    changed = make(name)
    changed.tokenizer = upper.tokenizer
    changed.set_titles([title.upper() for title in TITLES])
    rows = batch()
    defended = upper.score(upper.user_state(rows), TEXTS, IDS)
    expected = changed.score(changed.user_state(rows), [text.upper() for text in TEXTS], IDS)
    torch.testing.assert_close(defended, expected)
    assert not torch.allclose(defended, plain.score(plain.user_state(rows), TEXTS, IDS), atol=1e-4)
    assert upper.with_defense(None) is upper
    torch.testing.assert_close(
        upper.score(upper.user_state(rows), TEXTS, IDS), plain.score(plain.user_state(rows), TEXTS, IDS)
    )


def test_every_trained_weight_has_a_gradient_and_no_other_has(name: str) -> None:
    made = make(name)
    made.loss(batch()).backward()
    for key, parameter in made.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_a_checkpoint_has_the_tokenizer_and_the_scores(name: str) -> None:
    made, other = make(name), make(name, seed=1)
    checkpoint: dict[str, Any] = {"state_dict": made.state_dict()}
    made.on_save_checkpoint(checkpoint)
    other._tokenizer, other.titles = None, []
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    other.set_titles(TITLES)
    scores = [each.score(each.user_state(batch()), TEXTS, IDS) for each in (made, other)]
    assert torch.equal(*scores)


def test_evaluation_ranks_the_asked_item_among_its_candidates(name: str) -> None:
    made = make(name)
    rows = batch()._replace(labels=torch.ones(6))
    made.begin_evaluation("val")
    made.evaluate(rows)
    values = made.end_evaluation()
    items = torch.cat((rows.item_ids[:, None], rows.candidate_ids), 1)
    scores = made.score_items(made.user_state(rows), items)
    best = (scores[:, :1] > scores[:, 1:]).all(1).double().mean()
    assert float(values["hr@1"]) == float(best)
    assert made.monitor == "val/auc" and "auc" in values and float(values["hr@5"]) == 1


def test_words_past_the_cut_change_nothing(name: str) -> None:
    made = make(name, max_title_tokens=3)
    long = "Super Mario Kart Zelda Halo Quest"
    kept = made.readable(long)
    assert 0 < kept < len(long)
    scores = made.score(made.user_state(batch()), [long, long[:kept] + " Star Star Star"], torch.tensor([3, 3]))
    torch.testing.assert_close(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": ["yes"]}, "answers must be two"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"score_batch": 0}, "score_batch must be at least 1"),
        ({"max_tokens": 10}, "the title would be cut off"),
        ({"backbone_options": {"width": 3}}, "the tiny backbone has no width; it has hidden_size"),
        ({"backbone_options": {"hidden_size": 30, "num_heads": 4}}, "must be a multiple of num_heads"),
        ({"answers": ["same", "same"]}, "must differ in their first piece"),
    ],
    ids=["answers", "tokens", "lr", "batch", "fit", "option", "heads", "first_piece"],
)
def test_arguments_out_of_their_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)
