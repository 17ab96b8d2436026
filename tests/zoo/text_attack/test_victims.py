"""What all victims share: catalogue, other titles, defences, tokenizers in checkpoints; and victims by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from datamodules.text_rec import TextRecData
from tests.zoo.text_attack.pairs import TITLES, batch, victim
from zoo.text_attack.p5 import P5Rec
from zoo.text_attack.recformer_rec import RecFormerRec
from zoo.text_attack.victim import TextRecVictim, decay_groups
from zoo.text_attack.victims import VICTIMS, build_victim, load_victim, victim_class

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1}


def made(**options: Any) -> Any:
    return victim(RecFormerRec, **{"backbone_options": SMALL, "vocab_size": 300, **options})


def changed(model: Any, before: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Items whose own vectors, and users whose vectors, are no longer those of before."""
    items, users = model.encode_items(), model.user_state(batch())
    apart = [(new - old).abs().amax(1) > 1e-6 for new, old in zip((items, users), before, strict=True)]
    return apart[0].nonzero()[:, 0].tolist(), apart[1].nonzero()[:, 0].tolist()


def test_other_titles_are_those_of_items_alone_or_of_histories_too_and_go_again() -> None:
    model, rows = made(), batch()
    item = int(rows.history[2, 0])
    holders = [row for row in range(6) if item in rows.history[row].tolist()]
    before = model.encode_items(), model.user_state(rows)
    model.put_titles({item: "Zelda Quest Zelda"})
    assert changed(model, before) == ([item], [])
    assert model.item_titles[item] == "Zelda Quest Zelda" and model.history_titles == model.titles == TITLES
    torch.testing.assert_close(model.encode_items()[item], model.encode_items(["Zelda Quest Zelda"])[0])
    model.put_titles({item: "Zelda Quest Zelda"}, in_history=True)
    assert changed(model, before) == ([item], holders) and holders
    model.put_titles(None)
    assert changed(model, before) == ([], [])
    assert torch.equal(model.encode_items(), before[0]) and torch.equal(model.user_state(rows), before[1])


@pytest.mark.parametrize("item", [-1, len(TITLES)])
def test_a_title_for_an_item_that_is_not_there_is_refused(item: int) -> None:
    with pytest.raises(ValueError, match=rf"items \[{item}\] are not in the catalogue, whose ids are 0..39"):
        made().put_titles({0: "x", item: "y"})


def test_a_defence_stands_before_the_catalogue_and_what_is_scored_and_goes_again() -> None:
    model, rows = made(), batch()
    before = model.encode_items(), model.user_state(rows)
    plain = model.score(before[1], ["MARIO kart"])
    assert model.with_defense(lambda texts: [text.lower() for text in texts]) is model
    lowered = made(seed=0)
    lowered.titles, lowered._replaced = [title.lower() for title in TITLES], {}
    lowered._read()
    torch.testing.assert_close(model.encode_items(), lowered.encode_items())
    users = model.user_state(rows)
    torch.testing.assert_close(users, lowered.user_state(rows))
    assert torch.equal(model.score(users, ["MARIO kart"]), model.score(users, ["mario KART"]))
    assert model.titles == TITLES
    model.with_defense(None)
    assert torch.equal(model.encode_items(), before[0])
    assert torch.equal(model.score(before[1], ["MARIO kart"]), plain)


def test_titles_read_in_inference_mode_serve_a_later_training() -> None:
    model = made()
    with torch.inference_mode():
        model.put_titles({1: "Halo"})
    assert not model.item_ids.is_inference() and not model.title_lengths.is_inference()
    model.loss(batch()).backward()


def test_a_catalogue_is_taken_from_the_datamodule_once_and_the_tokenizer_stays() -> None:
    data = TextRecData(sample_items=30, sample_users=20)
    model = RecFormerRec(backbone_options=SMALL, vocab_size=300)
    with pytest.raises(RuntimeError, match="RecFormerRec has no tokenizer yet"):
        model.tokenizer  # noqa: B018
    model.prepare(data)
    assert model.titles == data.titles
    table, tokenizer = model.item_ids, model.tokenizer
    model.prepare(data)
    assert model.item_ids is table
    model.prepare(SimpleNamespace(titles=["Other", "Words"]))
    assert model.titles == ["Other", "Words"] and model.tokenizer is tokenizer
    model.prepare(None)
    assert model.titles == ["Other", "Words"]


def test_data_without_titles_or_of_the_other_mode_is_refused() -> None:
    model = RecFormerRec(backbone_options=SMALL)
    for data in (None, SimpleNamespace(mode="sequence")):
        with pytest.raises(ValueError, match="RecFormerRec reads titles: give a datamodule that has them"):
            model.prepare(data)
    with pytest.raises(ValueError, match=r"RecFormerRec needs --data.mode sequence, got yesno"):
        model.prepare(TextRecData(sample_items=30, sample_users=20, mode="yesno"))
    with pytest.raises(ValueError, match=r"P5Rec needs --data.mode yesno, got sequence"):
        P5Rec(vocab_size=300).prepare(TextRecData(sample_items=30, sample_users=20))
    with pytest.raises(ValueError, match="a catalogue needs a title at least"):
        model.set_titles([])


def test_a_checkpoint_holds_the_tokenizer_as_text_and_another_victim_takes_it() -> None:
    model, other = made(), made(titles=["zz yy", "yy xx zz"])
    assert other.title_tokens(["Mario"])[0].tolist() != model.title_tokens(["Mario"])[0].tolist()
    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    assert checkpoint["victim"] == "RecFormerRec" and isinstance(checkpoint["tokenizer"], str)
    other.on_load_checkpoint(checkpoint)
    assert torch.equal(other.title_tokens(["Mario"])[0], model.title_tokens(["Mario"])[0])
    # Its catalogue is cut anew.
    assert torch.equal(other.item_ids, model.title_tokens(other.titles)[0])
    bare: dict[str, Any] = {}
    RecFormerRec(backbone_options=SMALL).on_save_checkpoint(bare)
    assert "tokenizer" not in bare


def test_metrics_begin_anew_and_the_stages_of_evaluation_do_not_mix() -> None:
    model = made()
    model.begin_evaluation("val")
    model.evaluate(batch())
    model.begin_evaluation("test")
    model.evaluate(batch(3))
    assert int(model._metrics["val"]["ranking"].users) == 6 and int(model._metrics["test"]["ranking"].users) == 3
    first = model.end_evaluation()
    model.begin_evaluation("test")
    for rows in (slice(0, 2), slice(2, 3)):
        model.evaluate(type(batch())(*(part[rows] for part in batch(3))))
    assert {k: float(v) for k, v in model.end_evaluation().items()} == pytest.approx(
        {k: float(v) for k, v in first.items()}, abs=1e-6
    )


def test_groups_of_parameters_leave_out_what_is_not_trained_and_empty_ones() -> None:
    matrix, vector, still = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 2), (2,), (2, 2)))
    still.requires_grad_(False)
    groups = decay_groups([("a", matrix), ("b", vector), ("c", still)], 0.3)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.3), (1, 0.0)]
    assert decay_groups([("a", matrix)], 0.3) == [{"params": [matrix], "weight_decay": 0.3}]


@pytest.mark.parametrize("name", sorted(VICTIMS))
def test_each_victim_is_found_by_its_name(name: str) -> None:
    kind = victim_class(name)
    assert kind.__name__ == name and issubclass(kind, TextRecVictim)


def test_a_victim_is_built_from_options_and_the_sizes_that_it_knows() -> None:
    built: Any = build_victim("RecFormerRec", {"lr": 0.1, "backbone_options": SMALL}, num_items=9, num_users=3)
    assert built.hparams["num_items"] == 9 and built.lr == 0.1
    given: Any = build_victim("RecFormerRec", {"num_items": 4, "backbone_options": SMALL}, num_items=9)
    assert given.hparams["num_items"] == 4
    none: Any = build_victim("RecFormerRec", {"backbone_options": SMALL}, num_items=None)
    assert none.hparams["num_items"] is None
    with pytest.raises(ValueError, match=r"victim_options: RecFormerRec has no depth, tau; it has num_items, backbone"):
        build_victim("RecFormerRec", {"depth": 1, "tau": 2, "lr": 0.1})
    with pytest.raises(ValueError, match="victim must be one of CoLLMRec, P5Rec, RecFormerRec, TALLRec, got 'Bert'"):
        build_victim("Bert", {})


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}},
        {"state_dict": {}, "victim": "Other"},
        {"state_dict": {"victim.x": torch.zeros(1)}, "victim": "RecFormerRec"},
    ],
    ids=["none", "unknown", "attack"],
)
def test_a_file_that_is_no_victims_checkpoint_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt is no checkpoint of a victim: give the best.ckpt"):
        load_victim(str(tmp_path / "x.ckpt"))
