"""RecFormerRec: losses by brute force, its table of items, evaluation, and a run from training to predictions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import Trainer

from datamodules.text_rec import TextRecData
from tests.zoo.text_attack.pairs import TITLES, batch, victim
from zoo.text_attack.recformer_rec import RecFormerRec
from zoo.text_attack.victims import load_victim

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1}


def made(**options: Any) -> Any:
    return victim(RecFormerRec, **{"backbone_options": SMALL, "vocab_size": 300, **options})


def table_of(model: Any) -> Tensor:
    """Each item's unit vector by itself, in float64."""
    parts = [model.recformer(model.item_sequences(*(x[i : i + 1] for x in (model.item_ids, model.item_lengths))))
             for i in range(len(model.titles))]  # fmt: skip
    vectors = torch.cat(parts).detach().double()
    return torch.nn.functional.normalize(vectors, dim=1)


def users_of(model: Any, rows: Any) -> Tensor:
    parts = [model.recformer(model.history_sequences(row[None])) for row in rows.history]
    vectors = torch.cat(parts).detach().double()
    return torch.nn.functional.normalize(vectors, dim=1)


def test_in_batch_loss_leaves_out_items_that_are_the_target_of_another_row() -> None:
    model = made(temperature=0.2)
    rows = batch(6)._replace(item_ids=torch.tensor([3, 8, 3, 5, 8, 3]))
    table, users = table_of(model), users_of(model, rows)
    losses = []
    for user, own in zip(users, rows.item_ids.tolist(), strict=True):
        others = sorted({int(i) for i in rows.item_ids} - {own})
        # Each negative counts as often as it is in the batch.
        terms = [torch.exp(user @ table[i] / 0.2) * rows.item_ids.tolist().count(i) for i in others]
        positive = torch.exp(user @ table[own] / 0.2)
        losses.append(-torch.log(positive / (positive + sum(terms))))
    torch.testing.assert_close(model.loss(rows).double(), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_full_softmax_loss_is_over_the_whole_table() -> None:
    model = made(objective="full_softmax", num_items=len(TITLES), temperature=0.3)
    model.begin_epoch()
    torch.testing.assert_close(model.item_table.double(), table_of(model), atol=1e-5, rtol=1e-5)
    rows = batch(6)
    logits = users_of(model, rows) @ table_of(model).T / 0.3
    wanted = (logits.logsumexp(1) - logits[torch.arange(6), rows.item_ids]).mean()
    loss = model.loss(rows)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-5, rtol=1e-5)
    before = model.item_table.clone()
    loss.backward()
    assert torch.equal(before, model.item_table) and model.recformer.item_positions.weight.grad.abs().sum() > 0


def test_masked_words_add_their_weighted_loss_of_histories_and_items() -> None:
    model = made(mlm_weight=0.25)
    rows = batch(4)
    torch.manual_seed(7)
    total = model.loss(rows)
    torch.manual_seed(7)
    parts = [model.history_sequences(rows.history)]
    parts.append(model.item_sequences(model.item_ids[rows.item_ids], model.item_lengths[rows.item_ids]))
    masked = [model.masked_titles(part, model.tokenizer) for part in parts]
    model.masked_titles = None
    torch.testing.assert_close(total, model.loss(rows) + 0.25 * (masked[0] + masked[1]) / 2)


def test_the_table_is_made_anew_at_the_start_of_an_epoch_and_kept_in_the_second_stage() -> None:
    model = made(objective="full_softmax", num_items=len(TITLES), two_stage=True, patience=[1, 1])
    model.on_train_batch_start(batch(), 1)
    assert (model.item_table == 0).all()
    model.on_train_batch_start(batch(), 0)
    first = model.item_table.clone()
    assert not model.after_validation({"ndcg@10": torch.tensor(0.3)})
    weights = model.recformer.item_positions.weight
    kept = weights.detach().clone()
    with torch.no_grad():
        weights += 1
    model.on_train_batch_start(batch(), 0)
    assert not torch.equal(first, model.item_table)
    assert not model.after_validation({"ndcg@10": torch.tensor(0.2)})
    assert torch.equal(first, model.item_table) and torch.equal(weights, kept)
    with torch.no_grad():
        weights += 1
    model.on_train_batch_start(batch(), 0)
    assert torch.equal(first, model.item_table)
    assert model.after_validation({"ndcg@10": torch.tensor(0.2)})
    assert torch.equal(weights, kept)


def test_scores_change_no_state_and_are_the_same_every_time() -> None:
    model = made(
        objective="full_softmax", num_items=len(TITLES), two_stage=True, backbone_options={**SMALL, "dropout": 0.5}
    )
    model.train()
    model.recformer.item_positions.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = [
        lambda: model.user_state(batch()),
        model.encode_items,
        lambda: model.encode_items(["Mario", "</s> <UserID>"]),
        lambda: model.score(model.user_state(batch()), TITLES[:3]),
        lambda: model.score_items(model.user_state(batch()), batch().candidate_ids),
        lambda: model.catalogue_scores(batch()),
    ]
    for call in calls:
        first = call()
        assert first.dtype == torch.float32 and not first.requires_grad
        assert torch.equal(first, call())
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_scores_are_cosines_of_titles_whatever_the_batch_and_the_precision() -> None:
    model = made(encode_batch=3)
    rows = batch()
    wanted = users_of(model, rows) @ table_of(model).T
    users = model.user_state(rows)
    for scores in (model.score(users, TITLES), model.catalogue_scores(rows), users @ model.encode_items().T):
        torch.testing.assert_close(scores.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.score(users, [TITLES[4]]).double(), wanted[:, 4:5], atol=1e-5, rtol=1e-5)
    picked = model.score_items(users, rows.candidate_ids)
    torch.testing.assert_close(picked.double(), wanted.gather(1, rows.candidate_ids), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.score(model.user_state(rows), TITLES), model.score(users, TITLES))
        assert model.catalogue_scores(rows).dtype == torch.float32
    assert model.title_tokens([])[0].shape == (0, 32)


@pytest.mark.parametrize("groups", [2, 4, 99])
def test_groups_by_length_have_the_same_loss_and_gradients_with_less_padding(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    history = torch.tensor([[3, 4, 5, 6], [3, -1, -1, -1], [-1] * 4, [5, 6, 1, 2], [2, 1, -1, -1], [6, -1, -1, -1]])
    found, sizes = [], []
    for number in (1, groups):
        model, places = made(length_groups=number), list[int]()
        vectors = model.vectors

        def seen(sequence: Any, vectors: Any = vectors, places: list[int] = places) -> Tensor:
            places.append(sequence.input_ids.numel())
            return vectors(sequence)

        monkeypatch.setattr(model, "vectors", seen)
        loss = model.loss(batch()._replace(history=history))
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
        sizes.append(places)
    assert [len(places) for places in sizes] == [2, min(groups, 6) + 1]
    assert sum(sizes[1]) < 0.8 * sum(sizes[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_losses_are_in_full_precision_under_autocast() -> None:
    model = made(objective="full_softmax", num_items=len(TITLES))
    model.begin_epoch()
    with torch.autocast("cpu", torch.bfloat16):
        products = model._cosines(model.user_state(batch()), model.item_table)
        assert model.loss(batch()).dtype == torch.float32
    torch.testing.assert_close(products, model.user_state(batch()) @ model.item_table.T, atol=1e-6, rtol=1e-6)


def test_only_the_newest_items_of_a_history_are_read() -> None:
    model = made(max_items=2)
    history = torch.tensor([[3, 4, 5, 6], [3, 4, -1, -1]])
    sequence = model.history_sequences(history)
    assert torch.equal(sequence.input_ids[0], sequence.input_ids[1])
    key = len(model._key)
    first = model.title_ids[3][: model.title_lengths[3]].tolist()
    assert sequence.input_ids[0, 1 : 1 + len(first)].tolist() == first
    assert sequence.item_position_ids[0, 1 : 1 + len(first)].tolist() == [1] * len(first)
    assert sequence.token_type_ids[0, 1 : 1 + len(first)].tolist() == [1] * key + [2] * (len(first) - key)
    users = model.user_state(batch()._replace(history=torch.zeros(6, 0, dtype=torch.int64)))
    empty = model.user_state(batch()._replace(history=torch.full((6, 3), -1)))
    torch.testing.assert_close(users, empty)
    assert model.history_sequences(torch.full((1, 3), -1)).input_ids.tolist() == [[model.tokenizer.bos_token_id]]


def test_only_the_characters_before_the_cut_are_readable() -> None:
    model = made(max_attr_length=8)
    text = "Super Mario Kart Deluxe Pokémon Quest of the unread words"
    end = model.readable(text)
    assert 0 < end < len(text)
    users = model.user_state(batch())
    assert torch.equal(model.score(users, [text]), model.score(users, [text[:end] + " Zelda Halo Quest of it all"]))
    kept = model.title_tokens([text])[0][0, len(model._key) :].tolist()
    assert model.tokenizer.decode(kept).strip() == text[:end].strip()
    inside = text[: end - 1] + ("x" if text[end - 1] != "x" else "y") + text[end:]
    assert not torch.equal(model.score(users, [text]), model.score(users, [inside]))
    assert model.readable("Mario") == 5 and model.readable("") == 0
    assert model.with_defense(lambda texts: texts).readable(text) == len(text)


def test_seen_items_are_left_out_except_the_one_asked_about() -> None:
    model, rows = made(mask_seen=True), batch(6)
    rows = rows._replace(item_ids=rows.history[:, 0].clamp(min=0))
    scores = model.catalogue_scores(rows)
    plain = made().catalogue_scores(rows)
    for row in range(6):
        seen = {int(i) for i in rows.history[row] if i >= 0} - {int(rows.item_ids[row])}
        assert {i for i in range(len(TITLES)) if scores[row, i] == -torch.inf} == seen
        kept = [i for i in range(len(TITLES)) if i not in seen]
        assert torch.equal(scores[row, kept], plain[row, kept])


def test_kept_vectors_are_forgotten_when_titles_or_weights_change() -> None:
    model = made()
    first = model.item_vectors()
    assert model.item_vectors() is first
    model.put_titles({2: "Zelda Zelda"})
    assert not torch.equal(model.item_vectors()[2], first[2]) and torch.equal(model.item_vectors()[3], first[3])
    model.put_titles(None)
    torch.testing.assert_close(model.item_vectors(), first)
    with torch.no_grad():
        model.recformer.item_positions.weight.mul_(2)
    model.loss(batch())
    assert (model.item_vectors() - first).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "bpr"}, "objective must be one of inbatch, full_softmax, got 'bpr'"),
        ({"two_stage": True}, "two_stage keeps the items' vectors"),
        ({"objective": "full_softmax"}, "needs num_items"),
        ({"objective": "full_softmax", "num_items": -1}, "needs num_items"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive, got nan"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"mlm_weight": -0.1}, "mlm_weight and weight_decay must not be negative, got -0.1"),
        ({"weight_decay": -0.1}, "mlm_weight and weight_decay must not be negative"),
        ({"encode_batch": 0}, "encode_batch and top_k must be at least 1"),
        ({"length_groups": 0}, "length_groups"),
        ({"top_k": 0}, "encode_batch and top_k must be at least 1"),
        ({"max_attr_length": 1}, "max_attr_length 2, got 1, 512, 10, 1"),
        ({"mlm_weight": 0.1, "mlm_probability": 1.0}, "mlm_probability must be between 0 and 1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1"),
        ({"max_items": 0}, "max_items must be at least 1"),
        ({"objective": "full_softmax", "num_items": 9, "two_stage": True, "patience": [1]}, "patience must be two"),
        ({"backbone_options": {"depth": 2}}, "the tiny backbone has no depth"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{name}={given}" for name, given in value.items()),
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecFormerRec(**options)


def test_a_catalogue_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_attr_length is 2, but the attribute's name 'title' takes \d tokens"):
        made(max_attr_length=2)
    with pytest.raises(ValueError, match=f"num_items is 7, but the catalogue has {len(TITLES)} titles"):
        made(objective="full_softmax", num_items=7).begin_epoch()


def test_masked_words_need_a_tokenizer_that_can_mask(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = made().tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mlm_weight needs a tokenizer with a mask token"):
        RecFormerRec(tokenizer=str(tmp_path), mlm_weight=0.1)


def test_vectors_do_not_decay_and_the_copy_of_the_best_network_is_not_trained() -> None:
    model = made(objective="full_softmax", num_items=len(TITLES), two_stage=True, weight_decay=0.1)
    matrices, vectors = model.optimizer().param_groups
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert {p.ndim for p in matrices["params"]} == {2} and {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.recformer.parameters()))


@pytest.fixture(scope="module")
def data() -> TextRecData:
    return TextRecData(sample_items=40, sample_users=41, batch_size=64, eval_batch_size=8, seed=1)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_trains_saves_loads_tests_and_predicts(data: TextRecData, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"backbone_options": SMALL, "vocab_size": 300, "max_tokens": 64, "lr": 2e-3, "top_k": 4}
    model: Any = RecFormerRec(40, objective="full_softmax", two_stage=True, patience=[1, 1], mlm_weight=0.1, **options)
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(model, data)
    assert 0 <= float(fit.callback_metrics["val/ndcg@10"]) <= 1
    assert model.stages.best == fit.callback_metrics["val/ndcg@10"] or model.stages.bad > 0 or model.stages.frozen
    path = tmp_path / "victim.ckpt"
    fit.save_checkpoint(path)

    back: Any
    for back in (RecFormerRec.load_from_checkpoint(path, weights_only=True), load_victim(str(path))):
        assert back.tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()
        assert torch.equal(back.item_table, model.item_table)
        assert torch.equal(back.stages.best, model.stages.best) and torch.equal(back.stages.stage, model.stages.stage)
        back.set_titles(data.titles)
        rows = data.whole("test")
        assert torch.equal(
            back.score(back.user_state(rows), data.titles), model.score(model.user_state(rows), data.titles)
        )

    # 41 users in batches of 8: the last batch is of one user.
    found = trainer(tmp_path).test(back, data, verbose=False)[0]
    metrics = back.new_metrics()
    back.begin_evaluation("test")
    back.update_metrics(metrics, rows)
    wanted = {f"test/{name}": float(value) for name, value in metrics["ranking"].compute().items()}
    assert found == pytest.approx(wanted, abs=1e-6) and len(wanted) == 6

    parts: Any = trainer(tmp_path).predict(back, data)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 41 == sum(len(part["item_ids"]) for part in parts)
    scores = back.catalogue_scores(rows)
    for line in lines:
        user = data.user_labels.index(line["user"])
        row = scores[rows.user_ids.tolist().index(user)]
        assert line["scores"] == pytest.approx(row.topk(4).values.tolist(), abs=1e-5)
        assert [float(row[data.item_labels.index(item)]) for item in line["items"]] == pytest.approx(
            line["scores"], abs=1e-5
        )
