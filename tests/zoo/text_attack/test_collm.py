"""CoLLM: its two stages, its slots, and its vectors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.zoo.text_attack.pairs import NUM_USERS, TITLES, batch, victim
from zoo.text_attack.collm import CoLLMRec

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"num_users": NUM_USERS, "num_items": len(TITLES), "cf_size": 8, "proj_factor": 2}


def make(stage: int, titles: list[str] = TITLES, **options: Any) -> Any:
    return victim(CoLLMRec, titles, stage=stage, **{**SIZES, **options})


def trained(made: Any) -> set[str]:
    made.loss(batch()).backward()
    return {
        name.split(".")[0] + ("/lora" * ("lora_" in name)) for name, p in made.named_parameters() if p.grad is not None
    }


def test_stage_one_trains_the_adapters_alone_and_stage_two_the_map_alone() -> None:
    assert trained(make(1, lora={})) == {"decoder/lora"}
    assert trained(make(1)) == {"decoder"}
    assert trained(make(2, lora={})) == {"projection"}
    assert trained(make(2)) == {"projection"}
    assert trained(make(2, freeze_cf=False)) == {"projection", "cf_users", "cf_items"}


@pytest.mark.parametrize("loss", ["bce_yes", "ce_two"])
def test_loss_and_scores_are_those_of_prompts_with_vectors_in_their_places(loss: str) -> None:
    titles = [*TITLES[:-1], "☃ <UserID> <TargetItemID> Mario"]
    made = make(2, titles, loss=loss)
    rows = batch()
    rows.item_ids[0] = rows.history[3, 0] = len(titles) - 1
    rows.liked[3, 0] = True
    table = made.tables.table
    user, item = (made.tokenizer.convert_tokens_to_ids(slot) for slot in ("<UserID>", "<TargetItemID>"))
    yes = []
    for place, row in enumerate(made.training_pieces(rows).tolist()):
        ids = torch.tensor([t for p in row if p >= 0 for t in table.flat[table.starts[p] :][: table.lengths[p]]])
        assert (ids == user).sum() == (ids == item).sum() == 1
        vectors = made.decoder.get_input_embeddings()(ids)
        vectors[ids == user] = made.projection(made.cf_users[rows.user_ids[place]])
        vectors[ids == item] = made.projection(made.cf_items[rows.item_ids[place]])
        logits = made.decoder(inputs_embeds=vectors[None]).logits[0, -1]
        yes.append(logits[made.answers.yes_id] - (loss == "ce_two") * logits[made.answers.no_id])
    expected = torch.stack(yes)
    torch.testing.assert_close(
        made.loss(rows), F.binary_cross_entropy_with_logits(expected, rows.labels), atol=1e-5, rtol=1e-5
    )
    users = made.user_state(rows)
    found = made.score_items(users, torch.stack((rows.item_ids, rows.item_ids.flip(0)), 1))[:, 0]
    torch.testing.assert_close(found, torch.sigmoid(expected), atol=1e-5, rtol=1e-5)


def test_an_items_vector_counts_in_stage_two_and_must_be_known() -> None:
    made = make(2)
    users = made.user_state(batch())
    scores = made.score(users, ["Mario", "Mario"], torch.tensor([3, 4]))
    assert not torch.allclose(scores[:, 0], scores[:, 1], atol=1e-5)
    with pytest.raises(ValueError, match=r"<TargetItemID>: CoLLM needs item_ids"):
        made.score(users, ["Mario"])
    first = make(1)
    assert first.score(first.user_state(batch()), ["Mario"]).shape == (6, 1)


def test_a_user_without_a_vector_is_refused_where_vectors_are_read() -> None:
    rows = batch()._replace(user_ids=torch.tensor([0, 1, -1, 3, -1, 5]))
    with pytest.raises(ValueError, match="2 of 6 users are not in the training data"):
        make(2).user_state(rows)
    first = make(1)
    users = first.user_state(rows)
    assert torch.equal(first.score(users, ["Mario"]), first.score(first.user_state(batch()), ["Mario"]))


def test_vectors_are_learnt_when_training_begins_and_only_once() -> None:
    made = make(2, cf_epochs=2)
    pairs = torch.tensor([[0, 1], [1, 2], [2, 3]])
    made._trainer = SimpleNamespace(datamodule=SimpleNamespace(train_pairs=pairs), barebones=False)
    made.on_fit_start()
    learnt = made.cf_users.clone()
    assert bool(made.cf_ready) and bool(learnt.any())
    with torch.no_grad():
        made.cf_users.add_(1)
    made.on_fit_start()
    assert torch.equal(made.cf_users, learnt + 1)
    assert {"cf_users", "cf_items", "cf_ready"} <= set(made.state_dict())
    lonely = make(2)
    lonely._trainer = SimpleNamespace(datamodule=None, barebones=False)
    with pytest.raises(ValueError, match="give cf_embeddings, or a datamodule with train_pairs"):
        lonely.on_fit_start()


def test_vectors_of_a_file_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    users, items = torch.rand(NUM_USERS, 8), torch.rand(len(TITLES), 8)
    save_file({"user_embeddings": users, "item_embeddings": items}, path)
    made = CoLLMRec(**SIZES, cf_embeddings=str(path), vocab_size=400)
    assert torch.equal(made.cf_users, users) and torch.equal(made.cf_items, items) and bool(made.cf_ready)


def test_stage_two_begins_with_the_decoder_and_the_tokenizer_of_stage_one(tmp_path: Path) -> None:
    first = make(1)
    checkpoint: dict[str, Any] = {"state_dict": first.state_dict()}
    first.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "one.ckpt")
    sizes = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    second = CoLLMRec(**SIZES, stage=2, vocab_size=400, backbone_options=sizes, init_from=str(tmp_path / "one.ckpt"))
    for name, value in second.decoder.state_dict().items():
        assert torch.equal(value, first.decoder.state_dict()[name])
    assert not any(weight.requires_grad for weight in first.projection.parameters())
    vectors = {"user_embeddings": torch.rand(NUM_USERS, 8), "item_embeddings": torch.rand(len(TITLES), 8)}
    save_file(vectors, tmp_path / "own.safetensors")
    own = CoLLMRec(
        **SIZES, stage=2, vocab_size=400, backbone_options=sizes, init_from=str(tmp_path / "one.ckpt"),
        cf_embeddings=str(tmp_path / "own.safetensors"),
    )  # fmt: skip
    assert torch.equal(own.cf_users, vectors["user_embeddings"]) and bool(own.cf_ready)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="do not fit"):
        CoLLMRec(**SIZES, stage=2, vocab_size=400, init_from=str(tmp_path / "one.ckpt"))
    with pytest.raises(FileNotFoundError, match=r"init_from: .* is not a file"):
        CoLLMRec(**SIZES, stage=2, vocab_size=400, init_from=str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {}, "victim": "P5Rec"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="no checkpoint of CoLLMRec, but of P5Rec"):
        CoLLMRec(**SIZES, stage=2, vocab_size=400, init_from=str(tmp_path / "other.ckpt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_users": None}, "--model.num_users"),
        ({"stage": 3}, "stage must be 1 or 2"),
        ({"loss": "mse"}, "loss must be one of bce_yes, ce_two"),
        ({"cf_size": 0}, "cf_size, proj_factor and cf_epochs must be at least 1"),
        ({"stage": 2, "prompt": {"header": "x", "tail": " {title}"}}, "must hold <UserID> and <TargetItemID> once"),
        ({"prompt": {"header": "<UserID>", "tail": " {title}"}}, "stage 1 reads no vectors"),
        ({"stage": 2, "prompt": {"header": "<UserID> <TargetItemID>", "tail": " {title}"}}, "must be in the tail"),
    ],
    ids=["users", "stage", "loss", "size", "no_slots", "slots", "place"],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoLLMRec(**{**SIZES, "vocab_size": 400, **options})
