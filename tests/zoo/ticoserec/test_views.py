"""From the training table to views, and what the modules make of it: no leak, the right times, the flags' effects."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.ticoserec import reference
from tests.zoo.ticoserec.test_module import NUM_ITEMS, build, fit, make_table, prepared
from zoo.ticoserec import CL4SRec, SASRec, TiCoSeRec, ViewPolicy
from zoo.ticoserec.similarity import ItemSimilarity, hybrid_similarity, online_similarity
from zoo.ticoserec.views import ViewTable

NEAREST = [0, *((i * 7 + 3) % NUM_ITEMS + 1 for i in range(1, NUM_ITEMS + 1))]


def rows_of(table):
    """Training inputs and times of each user; the last time is that of the last target."""
    for user, length in enumerate(table.train_lengths.tolist()):
        begin = int(table.offsets[user])
        items = table.item_ids[begin : begin + length].tolist()
        yield items[:-1], table.timestamps[begin : begin + length].tolist()


@pytest.mark.parametrize("letter", ["S", "I", "M", "C"])
@pytest.mark.parametrize("max_length", [6, 50])
def test_views_of_the_table_equal_the_loops(letter, max_length):
    table = make_table()
    policy = ViewPolicy(short_ops=letter, long_ops=letter, mask_mode="maximum", crop=0.5, substitute=0.4)
    views = ViewTable(table, policy, NUM_ITEMS, max_length, exempt_ratio=0.0)
    users = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    items, lengths = views(users, 3, 17, torch.tensor(NEAREST))
    found = [row.tolist() for row in items.split(lengths.tolist())]
    inputs = list(rows_of(table))
    for place, user in enumerate(users.tolist() * 2):
        row, times = inputs[user]
        gaps = reference.right_gaps(times)
        expected = {
            "S": lambda row=row, gaps=gaps: reference.substitute(row, gaps, 0.4, "minimum", NEAREST),
            "I": lambda row=row, gaps=gaps: reference.insert(row, gaps, 0.5, "maximum", NEAREST),
            "M": lambda row=row, gaps=gaps: reference.mask(row, gaps, 0.5, "maximum"),
            "C": lambda row=row, gaps=gaps: reference.crop(row, gaps, 0.5, "minimum"),
        }[letter]()
        if expected is None:
            assert len(found[place]) == 1 and found[place][0] in row
        else:
            assert found[place] == expected[-max_length:]


def test_validation_and_test_items_leak_into_neither_similarity_nor_views():
    table = make_table()
    changed = table.item_ids.clone()
    for user in range(40):
        end = int(table.offsets[user + 1])
        # the last three: target of training, of validation, of test
        changed[end - 3 : end] = changed[end - 3 : end] % NUM_ITEMS + 1
    models = [prepared(sequences=t) for t in (table, table._replace(item_ids=changed))]
    assert torch.equal(models[0].offline_most_similar, models[1].offline_most_similar)
    users = torch.arange(40)
    assert torch.equal(models[0].draw_views(users).item_ids, models[1].draw_views(users).item_ids)


@pytest.mark.parametrize("direction", ["most", "official"])
def test_the_hybrid_follows_its_flag(direction):
    model = build(hybrid=direction, augmentation_warm_up_epochs=0, lr=1e-9, weight_decay=0.0)
    fit(model, epochs=2)
    offline = ItemSimilarity(model.offline_most_similar, model.offline_scores, *model.offline_limits.tolist())
    reverse = direction == "official"
    online = online_similarity(model.encoder.item_embedding.weight, least=reverse)
    assert torch.equal(model.most_similar, hybrid_similarity(offline, online, reverse))
    assert not torch.equal(model.most_similar, model.offline_most_similar)


@pytest.mark.parametrize(("which", "beyond"), [("all", 0), ("train", 2)])
def test_negatives_avoid_the_users_items_asked_for(which, beyond):
    model = prepared(SASRec, exclude_negatives=which)
    table = make_table()
    expected = set()
    for user in range(40):
        begin, end = int(table.offsets[user]), int(table.offsets[user + 1])
        expected |= {user * (NUM_ITEMS + 1) + item for item in table.item_ids[begin : end - beyond].tolist()}
    assert set(model.negatives.seen.tolist()) == expected


def test_the_optimizer_is_adam_with_decay_inside():
    optimizer = prepared(SASRec, lr=0.002, weight_decay=0.01).trainer.optimizers[0]
    assert type(optimizer) is torch.optim.Adam
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.002, 0.01, (0.9, 0.999))


def test_everybody_can_be_left_alone_even_without_times():
    table = make_table()._replace(timestamps=None, uniformity_rank=torch.full((40,), 40))
    model = prepared(TiCoSeRec, sequences=table, positions="random", exempt_ratio=1.0)
    items, _ = model.draw_views(torch.tensor([5]))
    begin, length = int(table.offsets[5]), int(table.train_lengths[5])
    plain = table.item_ids[begin : begin + length - 1][-10:].tolist()
    assert items.tolist() == plain * 2
    with pytest.warns(UserWarning, match=r"exempt_ratio=0.3 leaves nobody alone"):
        fit(build(sequences=table, positions="random", exempt_ratio=0.3))


def test_methods_without_substitutes_need_no_neighbours():
    table = make_table()
    # every user has one item of its own over and over: nothing occurs together
    own = torch.repeat_interleave(torch.arange(40) % NUM_ITEMS + 1, table.offsets.diff())
    fit(build(CL4SRec, sequences=table._replace(item_ids=own.int())))
    with pytest.raises(ValueError, match="no two items occur together"):
        fit(build(TiCoSeRec, sequences=table._replace(item_ids=own.int())))


def test_long_and_empty_histories_are_scored_by_their_newest_items():
    model = prepared(SASRec).eval()
    history = torch.randint(1, NUM_ITEMS, (1, 14))
    long = model.score(history, torch.tensor([14]))
    assert torch.equal(long, model.score(history[:, -10:], torch.tensor([10])))
    mixed = model.score(torch.cat([history, torch.zeros_like(history)]), torch.tensor([14, 0]))
    assert torch.allclose(mixed[0], long[0], atol=1e-6) and mixed[1].abs().max() == 0
