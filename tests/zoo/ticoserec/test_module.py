"""The modules: schedules, exemption, views, losses, and what they refuse."""

from __future__ import annotations

import tempfile

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from datamodules.sequence_rows import SequenceBatch, SequenceTable
from zoo.common.contrastive import nt_xent
from zoo.ticoserec import CL4SRec, CoSeRec, Popularity, SASRec, TiCoSeRec
from zoo.ticoserec.figures import plot_uniformity
from zoo.ticoserec.jagged import pad_left
from zoo.ticoserec.losses import view_vectors

NUM_ITEMS = 25


def make_table(users=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 25, (users,), generator=generator)
    offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    total = int(offsets[-1])
    gaps = torch.randint(0, 5, (total,), generator=generator) * 86_400
    times = torch.cat([part.cumsum(0) for part in gaps.split(lengths.tolist())])
    items = torch.randint(1, NUM_ITEMS + 1, (total,), generator=generator)
    ranks = torch.randperm(users, generator=generator)
    return SequenceTable(items.int(), times, offsets, lengths - 2, ranks)


class Users(Dataset):
    """One training batch per index: the simplest stand-in for `SequenceData`."""

    def __init__(self, table, size=8):
        self.table, self.size = table, size

    def __len__(self):
        return len(self.table.train_lengths) // self.size

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        users = torch.arange(index * self.size, (index + 1) * self.size)
        lengths = (self.table.train_lengths[users] - 1).clamp(max=10)
        ends = self.table.offsets[users] + self.table.train_lengths[users]
        inputs = torch.cat([self.table.item_ids[e - n - 1 : e - 1] for e, n in zip(ends, lengths, strict=True)])
        targets = torch.cat([self.table.item_ids[e - n : e] for e, n in zip(ends, lengths, strict=True)])
        width = int(lengths.max())
        return SequenceBatch(
            users, pad_left(inputs.long(), lengths, width), lengths, pad_left(targets.long(), lengths, width), None
        )


def build(cls=TiCoSeRec, **kwargs):
    settings = {
        "num_items": NUM_ITEMS,
        "max_length": 10,
        "hidden_size": 16,
        "inner_size": 16,
        "model_warm_up_epochs": 0,
        "augmentation_warm_up_epochs": 99,
        "sequences": make_table(),
        "top_k": 5,
    }
    if not issubclass(cls, TiCoSeRec):
        settings = {k: v for k, v in settings.items() if "warm_up" not in k}
    if cls is Popularity:
        settings = {k: settings[k] for k in ("num_items", "sequences", "top_k")}
    torch.manual_seed(0)
    return cls(**settings | kwargs)


def trainer_for(epochs=1, **kwargs):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        limit_val_batches=0,
        default_root_dir=tempfile.gettempdir(),
        **kwargs,
    )


def loader(data):
    return DataLoader(data, batch_size=None)


def fit(model, epochs=1, data=None, **kwargs):
    data = loader(data or Users(make_table()))
    trainer = trainer_for(epochs, **kwargs)
    trainer.fit(model, data, data)
    return trainer


class Spy(TiCoSeRec):
    """Notes in which epochs views are drawn, and from which neighbour table."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drawn, self.tables, self.logged = [], [], []

    def draw_views(self, user_ids):
        self.drawn.append(self.current_epoch)
        self.tables.append(self.most_similar.clone())
        return super().draw_views(user_ids)

    def log(self, name, *args, **kwargs):
        self.logged.append((self.current_epoch, name))
        super().log(name, *args, **kwargs)


def spy(**kwargs):
    settings = {
        "num_items": NUM_ITEMS,
        "max_length": 10,
        "hidden_size": 16,
        "inner_size": 16,
        "sequences": make_table(),
        "top_k": 5,
    }
    torch.manual_seed(0)
    return Spy(**settings | kwargs)


def test_views_start_after_the_model_warm_up_and_the_hybrid_after_the_similarity_warm_up():
    model = spy(model_warm_up_epochs=1, augmentation_warm_up_epochs=2)
    fit(model, epochs=5)
    assert sorted(set(model.drawn)) == [1, 2, 3, 4]
    assert (0, "train/cl_loss") not in model.logged and (1, "train/cl_loss") in model.logged
    offline = [torch.equal(table, model.offline_most_similar) for table in model.tables]
    # five batches an epoch; "until the epoch index exceeds E_a" leaves epochs 1 and 2 with the offline table
    assert all(offline[:10]) and not any(offline[10:])


def test_a_warm_up_as_long_as_the_run_is_reported():
    with pytest.warns(UserWarning, match="model_warm_up_epochs=3 is not below max_epochs=1"):
        fit(spy(model_warm_up_epochs=3))
    with pytest.warns(UserWarning, match="augmentation_warm_up_epochs=0 is below model_warm_up_epochs=1"):
        fit(spy(model_warm_up_epochs=1, augmentation_warm_up_epochs=0), epochs=2)


def prepared(cls=TiCoSeRec, **kwargs):
    model = build(cls, **kwargs)
    fit(model, max_steps=1)
    return model


def views_of(model, users):
    item_ids, lengths = model.draw_views(users)
    return item_ids.split(lengths.tolist())


def test_exactly_the_most_even_users_are_left_alone():
    model = prepared(exempt_ratio=0.3)
    table = make_table()
    untouched = []
    for user in range(40):
        begin = int(table.offsets[user])
        plain = table.item_ids[begin : begin + int(table.train_lengths[user]) - 1][-10:].long()
        changed = False
        for epoch in range(8):
            model.trainer.fit_loop.epoch_progress.current.completed = epoch
            model.trainer.fit_loop.epoch_progress.current.processed = epoch
            changed |= any(not torch.equal(v, plain) for v in views_of(model, torch.tensor([user])))
        untouched += [] if changed else [user]
    assert sorted(untouched) == sorted((table.uniformity_rank < 12).nonzero().squeeze(1).tolist())


def test_exempt_users_can_have_empty_views():
    model = prepared(exempt_ratio=0.3, exempt_mode="zero")
    exempt = (make_table().uniformity_rank < 12).nonzero().squeeze(1)
    assert model.draw_views(exempt).lengths.tolist() == [0] * 24


def test_views_do_not_depend_on_the_batch_and_differ_between_views_and_epochs():
    model = prepared(exempt_ratio=0.0, mask_mode="random", augment_threshold=-1)
    users = torch.arange(40)
    together, alone = views_of(model, users), views_of(model, users[30:])
    for i in range(10):
        assert torch.equal(together[30 + i], alone[i]) and torch.equal(together[70 + i], alone[10 + i])
    assert sum(not torch.equal(together[i], together[40 + i]) for i in range(40)) > 20
    model.trainer.fit_loop.epoch_progress.current.processed += 1
    model.trainer.fit_loop.epoch_progress.current.completed += 1
    later = views_of(model, users)
    assert sum(not torch.equal(a, b) for a, b in zip(together, later, strict=True)) > 40


@pytest.mark.parametrize("view_repr", ["flatten", "last", "mean"])
def test_joint_loss_is_the_weighted_sum_of_its_published_parts(view_repr):
    weights = {"cl_weight": 0.3, "rec_weight": 2.0, "temperature": 2.0}
    model = prepared(hidden_dropout=0.0, attn_dropout=0.0, view_repr=view_repr, **weights)
    logged = {}
    model.log = lambda name, value, **_: logged.__setitem__(name, float(value.detach()))
    batch = Users(make_table())[1]
    loss = float(model.training_step(batch, 0).detach())
    item_ids, lengths = model.draw_views(batch.user_ids)
    states, _ = model.encoder.encode(item_ids, lengths)
    first, second = view_vectors(states, lengths, 10, view_repr).chunk(2)
    contrastive = float(nt_xent(first, second, 2.0).detach())
    assert logged["train/cl_loss"] == pytest.approx(contrastive, rel=1e-4)
    assert loss == pytest.approx(2 * logged["train/rec_loss"] + 0.3 * contrastive, rel=1e-4)
    model.cl_weight = 0
    assert loss == pytest.approx(float(model.training_step(batch, 0).detach()) + 0.3 * contrastive, rel=1e-4)


def test_official_padding_changes_the_contrastive_loss_only():
    losses = {}
    for mode in ("zero", "official"):
        model = prepared(hidden_dropout=0.0, attn_dropout=0.0, pad_outputs=mode)
        torch.manual_seed(1)
        model.encoder.load_state_dict(build().encoder.state_dict())
        logged = {}
        model.log = lambda name, value, logged=logged, **_: logged.__setitem__(name, float(value.detach()))
        model.training_step(Users(make_table())[0], 0)
        losses[mode] = logged
    assert losses["zero"]["train/rec_loss"] == pytest.approx(losses["official"]["train/rec_loss"], rel=1e-5)
    assert abs(losses["zero"]["train/cl_loss"] - losses["official"]["train/cl_loss"]) > 1e-3


@pytest.mark.parametrize(
    ("cls", "rec_loss"),
    [(SASRec, loss) for loss in ("bce", "ce", "gbce", "sampled_softmax")]
    + [(cls, "bce") for cls in (TiCoSeRec, CoSeRec, CL4SRec)],
)
def test_every_sibling_and_every_loss_overfits_one_batch(cls, rec_loss):
    views = {} if cls is SASRec else {"cl_weight": 0.01}
    plain = {"hidden_dropout": 0.0, "attn_dropout": 0.0, "weight_decay": 0.0, "hidden_size": 32}
    model = build(cls, rec_loss=rec_loss, num_negatives=4, lr=0.01, **plain, **views)
    fit(model, 150, limit_train_batches=1)
    batch = Users(make_table())[0]
    model.eval()
    scores = model.score(batch.item_ids, batch.lengths).detach()
    # Sampled negatives are never items of the user, so only the others are pushed below the target.
    table = make_table()
    for row, user in enumerate(batch.user_ids.tolist()):
        own = table.item_ids[table.offsets[user] : table.offsets[user + 1]].long()
        target = float(scores[row, batch.target_ids[row, -1]])
        scores[row, own] = -torch.inf
        scores[row, batch.target_ids[row, -1]] = target
    hits = scores[:, 1:].argmax(1) + 1 == batch.target_ids[:, -1]
    assert hits.float().mean() >= 0.75


def test_gru4rec_trains_in_the_same_slot():
    model = build(TiCoSeRec, encoder="gru4rec", num_layers=1)
    before = model.encoder.gru.weight_hh_l0.clone()
    fit(model)
    assert not torch.equal(before, model.encoder.gru.weight_hh_l0)
    with pytest.raises(ValueError, match='pad_outputs="official" needs encoder="sasrec"'):
        build(TiCoSeRec, encoder="gru4rec", pad_outputs="official")


def evaluate(model, batch):
    trainer = trainer_for()
    return trainer.test(model, DataLoader([batch], batch_size=None), verbose=False)[0]


class Fixed(SASRec):
    """Scores given from outside."""

    def score(self, item_ids, lengths):
        return self.fixed.clone()


def ranked(fixed, seen, **kwargs):
    model = build(Fixed, ks=[1, 3], **kwargs)
    model.fixed = fixed
    users = torch.arange(len(fixed))
    batch = SequenceBatch(users, torch.ones(len(fixed), 2).long(), torch.full_like(users, 2), users + 3, seen)
    return evaluate(model, batch)


def test_seen_items_and_padding_never_outrank_the_target():
    scores = torch.full((4, NUM_ITEMS + 1), -1.0)
    scores[:, 0], scores[:, 9] = 5.0, 4.0
    scores[torch.arange(4), torch.arange(4) + 3] = 1.0
    seen = torch.tensor([[0, 9]] * 4)
    assert ranked(scores, seen)["test/hr@1"] == 1.0
    # the published code gives seen items and padding the score 0: harmless here, as the target scores above it
    assert ranked(scores, seen, evaluation="official")["test/hr@1"] == 1.0
    assert ranked(scores - 2, seen, evaluation="official")["test/hr@1"] == 0.0
    # below zero, only true exclusion keeps padding and seen items under the target
    assert ranked(scores - 2, seen)["test/hr@1"] == 1.0
    unseen = scores - 2
    unseen[:, 9] = -5.0
    assert ranked(unseen, None)["test/hr@1"] == 1.0
    assert ranked(torch.zeros(4, NUM_ITEMS + 1), seen)["test/hr@3"] == 0.0


def test_scores_that_are_not_numbers_name_step_and_users():
    scores = torch.zeros(4, NUM_ITEMS + 1)
    scores[2, 7] = torch.nan
    with pytest.raises(ValueError, match=r"step 0, users \[2\]"):
        ranked(scores, None)
    scores[2] = -torch.inf
    with pytest.raises(ValueError, match=r"users \[2\]: no item has a score above -inf"):
        ranked(scores, None)


def test_the_metric_by_uniformity_averages_each_group_of_users_alone(monkeypatch):
    table = make_table()
    model = build(Fixed, ks=[1, 3])
    users = torch.arange(40)
    targets = users % 20 + 3
    scores = torch.zeros(40, NUM_ITEMS + 1)
    group = table.uniformity_rank * 5 // 40
    # group g's users have g items above their target
    for user in range(40):
        scores[user, targets[user]] = 1.0
        others = [i for i in range(1, NUM_ITEMS + 1) if i != targets[user]][: int(group[user])]
        scores[user, others] = 2.0
    model.fixed = scores
    drawn = {}
    monkeypatch.setattr(
        "zoo.ticoserec.recommender.plot_uniformity",
        lambda values, counts, metric: (
            drawn.update(values=values, counts=counts) or plot_uniformity(values, counts, metric)
        ),
    )
    evaluate(model, SequenceBatch(users, torch.ones(40, 2).long(), torch.full_like(users, 2), targets, None))
    assert drawn["counts"] == [8] * 5
    assert drawn["values"] == pytest.approx([1.0, 1 / 1.5849625, 0.5, 0.0, 0.0])


def test_popularity_ranks_by_training_counts():
    model = build(Popularity)
    with pytest.warns(UserWarning, match="run with no optimizer"):
        fit(model)
    table = make_table()
    counts = torch.zeros(NUM_ITEMS + 1)
    for user in range(40):
        begin = int(table.offsets[user])
        for item in table.item_ids[begin : begin + int(table.train_lengths[user])].tolist():
            counts[item] += 1
    assert torch.equal(model.popularity, counts)
    best, _ = model.recommend(torch.zeros(1, 1).long(), torch.ones(1).long(), 3)
    assert counts[best[0]].tolist() == counts.sort(descending=True).values[:3].tolist()


def test_recommend_leaves_out_what_was_seen_and_agrees_with_predict():
    model = prepared(SASRec).eval()
    batch = Users(make_table())[0]
    items, scores = model.recommend(batch.item_ids, batch.lengths, 5)
    assert all(not set(row.tolist()) & set(seen.tolist()) for row, seen in zip(items, batch.item_ids, strict=True))
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_heads=2"),
        ({"rec_loss": "hinge"}, "rec_loss must be one of bce, ce, gbce, sampled_softmax, got 'hinge'"),
        ({"exempt_ratio": 1.5}, "exempt_ratio must lie between 0 and 1, got 1.5"),
        ({"augment_threshold": 0}, "threshold must be -1"),
        ({"short_ops": "AB"}, "short_ops must be different letters out of SIMRC, got 'AB'"),
        ({"crop_ratio": 0.0}, "crop ratio must lie strictly between 0 and 1, got 0.0"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"cl_weight": -1.0}, "cl_weight must be at least 0, got -1.0"),
        ({"lr": 0.0}, "lr must be positive and weight_decay at least 0, got 0.0"),
        ({"gbce_calibration": 5.0}, "gbce_calibration must lie between 0 and 1, got 5.0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"ks": []}, "ks must be cut-offs of at least 1"),
        ({"view_repr": "first"}, "view_repr must be one of flatten, last, mean, got 'first'"),
        ({"num_items": None}, "set --model.num_items"),
        ({"top_k": 26}, "top_k must be between 1 and num_items=25, got 26"),
    ],
)
def test_bad_settings_are_named_with_their_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_time_stamps_are_asked_for_where_positions_come_from_time():
    bare = make_table()._replace(timestamps=None)
    with pytest.raises(ValueError, match="needs time stamps"):
        fit(build(sequences=bare))
    fit(build(CoSeRec, sequences=bare))


def test_equal_time_stamps_and_single_user_batches_are_reported():
    table = make_table()
    flat = table._replace(timestamps=torch.zeros_like(table.timestamps))
    with pytest.warns(UserWarning, match="all time stamps of every user are equal"):
        fit(build(sequences=flat))
    model = build()
    with pytest.warns(UserWarning, match="a batch of one user has no negatives"):
        fit(model, data=Users(make_table(), size=1))


def test_missing_sequences_are_explained():
    with pytest.raises(ValueError, match="needs the training sequences"):
        fit(build(sequences=None))


def test_it_is_a_plain_lightning_module():
    assert all(issubclass(cls, LightningModule) for cls in (SASRec, TiCoSeRec, CoSeRec, CL4SRec, Popularity))
    assert dict(build(CL4SRec).hparams)["view_repr"] == "last"
