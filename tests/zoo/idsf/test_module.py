"""IDSF as a Lightning module: its losses, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import logging
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from lightning import Trainer, seed_everything
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.idsf.losses import batch_penalty, bpr_loss
from zoo.idsf.module import IDSF
from zoo.idsf.recommender import _rows_of

if TYPE_CHECKING:
    from pathlib import Path

NUM_USERS, NUM_ITEMS = 8, 12
SIZES = {"image": 5, "text": 3}


class Pairs(NamedTuple):
    user_ids: Tensor
    item_ids: Tensor
    keys: Tensor


def edges() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    own = torch.stack([torch.randperm(NUM_ITEMS, generator=generator)[:3] for _ in range(NUM_USERS)])
    return torch.stack([torch.arange(NUM_USERS).repeat_interleave(3), own.flatten()])


def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(NUM_ITEMS, width, generator=generator) for name, width in SIZES.items()}


def new_model(**options: Any) -> IDSF:
    """A small model that is set up, unless an option takes its data away."""
    seed_everything(0, verbose=False)
    names = options.pop("modalities", list(SIZES))
    given: dict[str, Any] = {"hidden_size": 4, "ks": [2], "top_k": 2, "train_edges": edges(), "features": features()}
    given |= options
    model = IDSF(NUM_USERS, NUM_ITEMS, names, [SIZES[name] for name in names], **given)
    if given["train_edges"] is not None and given["features"] is not None:
        model.setup("fit")
    return model


def batch(items: list[int], negatives: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(len(items)), torch.tensor(items), torch.tensor(negatives)[:, None]


# Losses.


@pytest.mark.parametrize("negatives", [1, 3])
def test_bpr_of_equal_scores_is_ln_2(negatives: int) -> None:
    value = bpr_loss(torch.full((4,), 1.5), torch.full((4, negatives), 1.5))
    assert float(value) == pytest.approx(math.log(2))


def test_the_penalty_of_unit_vectors_is_one_and_a_half() -> None:
    unit = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    assert float(batch_penalty(unit, unit, unit[:, None])) == pytest.approx(1.5)
    assert float(batch_penalty(unit, unit, torch.stack([unit, unit], dim=1))) == pytest.approx(1.5)


def test_the_parts_of_the_loss_are_those_of_the_final_vectors() -> None:
    model = new_model(reg_weight=0.2)
    users, items = model.vectors()
    user_ids, positives, _ = batch([0, 3, 3, 7], [0] * 4)
    negatives = torch.tensor([[1, 2], [4, 4], [0, 9], [5, 6]])
    parts = model.loss_parts(user_ids, positives, negatives)
    assert list(parts) == ["bpr", "reg", "cl"]
    ranking = penalty = 0.0
    for row in range(4):
        u, i = users[row], items[positives[row]]
        penalty += float(u @ u + i @ i) / 2
        for j in items[negatives[row]]:
            ranking += math.log1p(math.exp(-float(u @ (i - j)))) / 2
            penalty += float(j @ j) / 4
    assert float(parts["bpr"].detach()) == pytest.approx(ranking / 4, rel=1e-5)
    assert float(parts["reg"].detach()) == pytest.approx(0.2 * penalty / 4, rel=1e-5)


def test_the_contrastive_loss_has_no_gradient_for_users() -> None:
    for scope in ("batch", "all"):
        model = new_model(contrast_scope=scope)
        model.loss_parts(*batch([0, 1, 2], [3, 4, 5]))["cl"].backward()  # type: ignore[no-untyped-call]
        network = model.network
        assert network.user_id is not None
        assert all(
            table.grad is None or not bool(table.grad.any()) for table in (network.user_id, *network.user_preference)
        )
        assert all(bool(table.grad.any()) for table in network.item_id if table.grad is not None)
        assert network.item_id[0].grad is not None


def test_the_contrastive_loss_of_a_batch_with_all_items_is_that_of_all_items() -> None:
    everything = batch([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
    found = [new_model(contrast_scope=scope).loss_parts(*everything) for scope in ("batch", "all")]
    for name in ("bpr", "reg", "cl"):
        torch.testing.assert_close(found[0][name], found[1][name])
    assert float(new_model().loss_parts(*batch([0, 1], [2, 3]))["cl"].detach()) < float(found[0]["cl"].detach()) - 0.1


def test_without_contrast_the_loss_has_two_parts() -> None:
    for options in ({"cl_weight": 0.0}, {"use_content": False}):
        assert list(new_model(**options).loss_parts(*batch([0, 1], [2, 3]))) == ["bpr", "reg"]


def test_the_cap_draws_as_many_items_anew_in_each_step_and_the_same_in_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, step = new_model(contrast_cap=5), [0]
    monkeypatch.setattr(IDSF, "global_step", property(lambda _: step[0]))
    ids = torch.arange(10)
    drawn = []
    for step[0] in range(40):
        drawn.append(model._capped(ids))
        assert drawn[-1].equal(model._capped(ids))
        assert len(set(drawn[-1].tolist())) == 5 and drawn[-1].tolist() == sorted(drawn[-1].tolist())
    assert len({tuple(part.tolist()) for part in drawn}) > 20
    assert torch.cat(drawn).bincount(minlength=10).min() > 5
    # What is drawn depends on the items, not on their places; fewer than the cap all take part.
    step[0] = 0
    kept = set(model._capped(ids[3:]).add(3).tolist())
    assert set(drawn[0].tolist()) & set(range(3, 10)) <= kept
    assert model._capped(ids[:5]).tolist() == [0, 1, 2, 3, 4]


def test_no_more_items_than_the_cap_are_contrasted(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def counting(anchors: Tensor, views: Tensor, temperature: float, index: Tensor, rows: Tensor) -> Tensor:
        found.append(len(index))
        return (anchors.sum() + views.sum()) * 0

    monkeypatch.setattr("zoo.idsf.module.multi_view_nce", counting)
    new_model(contrast_cap=3).loss_parts(*batch([0, 1, 2], [3, 4, 5]))
    assert found == [3] * 6
    found.clear()
    new_model(id_mode="none").loss_parts(*batch([0, 1, 2], [3, 3, 5]))
    assert found == [5] * 2


def test_a_loss_that_is_no_number_names_epoch_step_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    monkeypatch.setattr(IDSF, "current_epoch", property(lambda _: 3))
    monkeypatch.setattr(IDSF, "global_step", property(lambda _: 17))
    with torch.no_grad():
        model.network.item_id[0].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"epoch 3, step 17: the loss is nan \(bpr=nan, reg=nan, cl=nan\): lower"):
        model.training_step(Pairs(torch.arange(3), torch.arange(3), torch.arange(3)), 0)


# Data.


def wrong_features(**changes: Tensor) -> dict[str, Tensor]:
    return {**features(), **changes}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {"image": features()["image"]}}, "modality 'text' is missing: the data has image"),
        ({"features": {}}, "modality 'image' is missing: the data has none"),
        ({"features": wrong_features(text=torch.ones(11, 3))}, "modality 'text': 11 rows, expected n_items=12; fea"),
        ({"features": wrong_features(text=torch.ones(12, 4))}, r"modality 'text': shape \(12, 4\), expected width 3"),
        ({"features": wrong_features(image=torch.full((12, 5), torch.inf))}, r"modality 'image': row 0 .*\(12 such"),
        ({"train_edges": torch.tensor([[0, 8], [0, 1]])}, r"user ids must lie in 0\.\.7, got 0\.\.8"),
    ],
    ids=["modality", "no-modality", "rows", "width", "inf", "edges"],
)
def test_data_that_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(**options)


def test_what_is_missing_is_named_with_the_way_out() -> None:
    model = new_model(train_edges=None)
    with pytest.raises(ValueError, match="needs the training interactions: train it with InteractionData, or pass"):
        model.setup("fit")
    model = new_model(features=None)
    with pytest.raises(ValueError, match=r"features of image, text: .* or pass train_edges= and features="):
        model.vectors()


# What comes out.


def test_what_was_seen_is_never_recommended() -> None:
    model, users = new_model(), torch.tensor([2, 0, 2])
    items, scores = model.recommend(users, 9, seen=edges())
    every, candidates = model.vectors()
    for row, user in enumerate(users.tolist()):
        seen = set(edges()[1][edges()[0] == user].tolist())
        assert set(items[row].tolist()) == set(range(NUM_ITEMS)) - seen
        torch.testing.assert_close(scores[row], candidates[items[row]] @ every[user])
        assert scores[row].tolist() == sorted(scores[row].tolist(), reverse=True)


def test_what_all_users_have_seen_takes_no_memory_of_users_times_pairs() -> None:
    many, pairs = torch.arange(20_000), torch.stack([torch.arange(20_000), torch.arange(20_000) % NUM_ITEMS])
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            largest = max(largest, found.numel() if isinstance(found, Tensor) else 0)
            return found

    with Sizes():
        rows, items = _rows_of(pairs, many)
    assert rows.equal(many)
    assert items.equal(pairs[1])
    assert largest <= len(many) + 1


def test_more_items_than_are_left_are_refused() -> None:
    model = new_model()
    with pytest.raises(ValueError, match=r"k must be between 1 and 9, the items left for a user .* got 10"):
        model.recommend(torch.arange(3), 10, seen=edges())
    with pytest.raises(ValueError, match=r"k must be between 1 and 12, .* got 13"):
        model.recommend(torch.arange(3), 13)
    with pytest.raises(ValueError, match=r"k must be between 1 and 12, .* got 0"):
        model.recommend(torch.arange(3), 0)


def test_exported_vectors_give_the_scores(tmp_path: Path) -> None:
    model = new_model()
    path = model.export_embeddings(tmp_path / "new" / "vectors.npz")
    with np.load(path) as arrays:
        assert sorted(arrays) == ["id_image", "id_text", "items", "users"]
        users, items = torch.tensor([0, 4, 7]), torch.tensor([1, 1, 11])
        expected = (arrays["users"][users] * arrays["items"][items]).sum(1)
        np.testing.assert_allclose(model(users, items).numpy(), expected, rtol=1e-5)
        np.testing.assert_array_equal(arrays["id_text"], model.network.item_id[1].detach().numpy())
    with np.load(new_model(id_mode="none").export_embeddings(tmp_path / "none")) as arrays:
        assert sorted(arrays) == ["items", "users"]


def test_the_weights_of_each_attention_sum_to_one() -> None:
    weights = new_model().attention_weights()
    assert sorted(weights) == ["content", "id/image", "id/text", "items", "users"]
    for values in weights.values():
        assert values.requires_grad is False
        torch.testing.assert_close(values.sum(1), torch.ones(len(values)))


@pytest.mark.parametrize("ask", ["attention_weights", "content_views", "representations", "encode"])
def test_a_model_that_was_given_its_data_can_be_asked_before_its_setup(ask: str) -> None:
    names = list(SIZES)
    model = IDSF(NUM_USERS, NUM_ITEMS, names, list(SIZES.values()), 4, ks=[2], top_k=2, train_edges=edges(),
                 features=features())  # fmt: skip
    assert getattr(model, ask)() is not None
    without = IDSF(NUM_USERS, NUM_ITEMS, names, list(SIZES.values()), 4, ks=[2], top_k=2)
    without._restored = model.vectors()
    with pytest.raises(ValueError, match=r"IDSF needs the training interactions: .* pass train_edges= and features="):
        getattr(without, ask)()


def test_the_processes_of_a_fabric_take_different_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(contrast_scope="all")
    whole = model._contrast(model.content_views(), None)
    shares = []
    for rank in range(2):
        # A module knows a Fabric by this alone.
        monkeypatch.setattr(model, "_fabric", SimpleNamespace(world_size=2, global_rank=rank))
        shares.append(model._contrast(model.content_views(), None))
    torch.testing.assert_close(torch.stack(shares).mean(), whole)
    assert not torch.isclose(shares[0], shares[1])


def test_the_views_of_content_are_those_that_the_vectors_are_made_of() -> None:
    model = new_model()
    views = model.content_views()
    structure = model.vectors()[1] - torch.nn.functional.normalize(views.fused)
    model.network.use_content = False
    torch.testing.assert_close(model.vectors()[1], structure)


def test_the_report_on_ids_names_each_representation_and_measure() -> None:
    model = new_model()
    held_out = torch.stack([torch.arange(8).repeat_interleave(3), torch.tensor([0, 1, 2] * 6 + [3, 4, 5] * 2)])
    report = model.id_semantics_report(held_out, edges())
    names = {f"{kind}/{name}" for kind in ("id", "projected", "raw") for name in SIZES} | {"untrained"}
    assert set(report) == names
    keys = {"auc", "spearman/image", "spearman/text", "spearman/structure"}
    assert all(set(scores) == keys for scores in report.values())
    assert report["raw/image"]["spearman/image"] == pytest.approx(1)


def test_a_deep_copy_computes_the_same() -> None:
    model = new_model()
    for found, wanted in zip(copy.deepcopy(model).vectors(), model.vectors(), strict=True):
        assert found.equal(wanted)


# Messages.


def test_one_modality_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zoo.idsf.module"):
        new_model(modalities=["text"])
    assert "one modality only (text)" in caplog.text


@pytest.mark.parametrize(
    ("memory", "options", "warned"),
    [
        (4000, {"contrast_scope": "all"}, True),
        (10**9, {"contrast_scope": "all"}, False),
        (4000, {"contrast_scope": "batch"}, False),
        (4000, {"contrast_scope": "all", "cl_weight": 0.0}, False),
    ],
    ids=["small", "large", "batch", "no-contrast"],
)
def test_too_little_memory_for_the_contrast_of_all_items_is_told(
    memory: int,
    options: dict[str, Any],
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    new_model(**options)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("contrast_scope='batch' is the way out" in message for message in told) == warned


def test_the_memory_is_that_of_the_trainers_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_model(contrast_scope="all", train_edges=None)
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    monkeypatch.setattr(Trainer, "strategy", property(lambda _: strategy))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=4000))
    model._warn_of_memory()
    assert "for 12 items, more than half of the 0.0 GB" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "left"}, "norm must be one of sym, sym_self, rw, rw_self, got 'left'"),
        ({"readout": "sum"}, "readout must be one of sum_norm, mlp_ln, got 'sum'"),
        ({"id_mode": "some"}, "id_mode must be one of per_modality, shared, none, got 'some'"),
        ({"contrast_scope": "most"}, "contrast_scope must be one of batch, all, got 'most'"),
        ({"fusion": "max"}, "fusion must be one of attention, mean, got 'max'"),
        ({"ndcg_variant": "some"}, r"ndcg_variant must be one of \['standard', 'hits'\], got 'some'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"cl_weight": -1.0}, "cl_weight and reg_weight at least 0"),
        ({"reg_weight": -1.0}, "cl_weight and reg_weight at least 0"),
        ({"contrast_cap": 0}, "contrast_cap at least 1"),
        ({"id_weight": -0.1}, "id_weight and num_layers must be at least 0"),
        ({"num_layers": -1}, "id_weight and num_layers must be at least 0"),
        ({"hidden_size": 0}, "hidden_size at least 1"),
        ({"modalities": []}, "a modality at least; for interactions alone use LightGCN"),
        ({"ks": [2, 13]}, r"between 1 and num_items=12, got \[2, 13\]"),
        ({"ks": []}, "ks must be cut-offs"),
        ({"top_k": 13}, "top_k must be between 1 and num_items=12, got 13"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr_decay": 1.5}, "lr_decay in"),
        ({"num_negatives": 0}, "num_negatives at least 1"),
    ],
    ids=lambda value: next(iter(value.items())).__repr__() if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(**options)


def test_sizes_that_do_not_match_the_modalities_are_named() -> None:
    with pytest.raises(ValueError, match="got 1 feature_sizes for 2 modalities"):
        IDSF(8, 12, ["image", "text"], [5], ks=[2], top_k=2)
    with pytest.raises(ValueError, match=r"num_items must be at least 1, got 0: set --model.num_items"):
        IDSF(8, 0, ["image"], [5])


def test_sizes_follow_their_modality_and_not_their_place() -> None:
    model = new_model(modalities=["text", "image"])
    assert model.feature_sizes == SIZES and model.modalities == ["image", "text"]
    for found, wanted in zip(model.vectors(), new_model().vectors(), strict=True):
        assert found.equal(wanted)
