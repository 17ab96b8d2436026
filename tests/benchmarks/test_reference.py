"""The plain reference and our code compute the same: the benchmarks compare like with like."""

import random
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.reference.sasrec import PlainSASRec, bce_loss, evaluate, joint_loss, nt_xent_loss
from benchmarks.reference.ticoserec import (
    EvalSamples,
    HybridSimilarity,
    OfflineSimilarity,
    OnlineSimilarity,
    Ratios,
    Sequences,
    TrainSamples,
    pad,
)
from datamodules.sequence import SequenceData
from zoo.common.contrastive import nt_xent
from zoo.common.ranking import FullRankingMetrics
from zoo.ticoserec.augment import TiAugmenter, ViewPolicy
from zoo.ticoserec.encoder import SASRecEncoder
from zoo.ticoserec.losses import bce_next_item
from zoo.ticoserec.similarity import ItemSimilarity, hybrid_similarity, online_similarity

NUM_ITEMS, LENGTH = 40, 50


class Table:
    """The similarity of a fixed table."""

    def __init__(self, most_similar: Tensor) -> None:
        self.table = most_similar.tolist()

    def most_similar(self, item: int) -> tuple[int, float]:
        return self.table[item], 1.0


def toy_sequences(users: int = 30, seed: int = 0) -> Sequences:
    drawn = random.Random(seed)
    items, times = [], []
    for _ in range(users):
        length = drawn.randint(5, 70)
        items.append([drawn.randint(1, NUM_ITEMS) for _ in range(length)])
        # Whole days, many of them the same.
        times.append(sorted(86_400 * drawn.choice(range(length)) for _ in range(length)))
    return Sequences(items, times, set(), NUM_ITEMS, LENGTH)


def encoders() -> tuple[PlainSASRec, SASRecEncoder]:
    """The dense encoder and ours with the same weights, without dropout."""
    torch.manual_seed(0)
    plain = PlainSASRec(NUM_ITEMS, LENGTH, hidden=16, inner=24, hidden_dropout=0.0, attn_dropout=0.0)
    ours = SASRecEncoder(NUM_ITEMS, LENGTH, hidden_size=16, inner_size=24, hidden_dropout=0.0, attn_dropout=0.0)
    for parameter in plain.parameters():
        parameter.data.normal_(std=0.3)
    plain.item_embedding.weight.data[0] = 0
    state = plain.state_dict()
    for layer in range(len(plain.blocks)):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{layer}.{name}.{kind}") for name in ("query", "key", "value")]
            state[f"blocks.{layer}.query_key_value.{kind}"] = torch.cat(parts)
    ours.load_state_dict(state)
    return plain, ours


@pytest.mark.parametrize("operator", ["S", "I", "M", "C"])
def test_plain_operators_agree_with_the_tensor_ones(operator: str) -> None:
    data, most_similar = toy_sequences(200), torch.arange(NUM_ITEMS + 1).roll(-1).clamp(min=1)
    ratios = Ratios()
    samples = TrainSamples(data, ratios)
    samples.similarity = Table(most_similar)
    policy = ViewPolicy(
        crop=ratios.crop,
        mask=ratios.mask,
        substitute=ratios.substitute,
        insert=ratios.insert,
        mask_mode=ratios.mask_mode,
        short_ops=operator,
        long_ops=operator,
    )
    augment = TiAugmenter(most_similar, policy)
    for items, times in zip(data.items, data.times, strict=True):
        inputs, known_times = items[:-3], times[:-2]
        if operator == "C" and int(ratios.crop * len(inputs)) <= 2:
            continue  # one item at random
        # Wide enough for every insertion.
        width = 2 * len(inputs)
        views, lengths = augment(
            torch.tensor([pad(inputs, width)]), torch.tensor([pad(known_times, width + 1)]), torch.tensor([len(inputs)])
        )
        expected = samples.augment(operator, inputs, known_times)
        assert views[0, width - int(lengths[0]) :].tolist() == expected


def test_plain_reorder_shuffles_inside_the_window_only() -> None:
    data = toy_sequences(100)
    samples = TrainSamples(data, Ratios(reorder=0.5))
    samples.similarity = Table(torch.arange(NUM_ITEMS + 1))
    for items, times in zip(data.items, data.times, strict=True):
        view = samples.augment("R", items[:-3], times[:-2])
        assert sorted(view) == sorted(items[:-3])
        moved = [place for place, (a, b) in enumerate(zip(view, items, strict=False)) if a != b]
        assert not moved or moved[-1] - moved[0] < len(view) // 2


def test_plain_similarities_find_the_same_neighbours() -> None:
    rows = toy_sequences().train_items()
    flat, lengths = torch.tensor([item for row in rows for item in row]), torch.tensor([len(row) for row in rows])
    offline, plain_offline = ItemSimilarity.fit(flat, lengths, NUM_ITEMS), OfflineSimilarity(rows)
    vectors = torch.randn(NUM_ITEMS + 1, 8, generator=torch.Generator().manual_seed(1))
    online, plain_online = online_similarity(vectors), OnlineSimilarity(vectors)
    hybrid, plain_hybrid = hybrid_similarity(offline, online), HybridSimilarity(plain_offline, plain_online)
    for item in range(1, NUM_ITEMS + 1):
        nearest, score = plain_offline.most_similar(item)
        assert plain_offline.neighbours[item][nearest] == pytest.approx(float(offline.scores[item]), rel=1e-5)
        assert score == pytest.approx(float(offline.normalised()[item]), abs=1e-5)
        nearest, score = plain_online.most_similar(item)
        assert nearest == int(online.most_similar[item])
        assert score == pytest.approx(float(online.normalised()[item]), abs=1e-5)
    assert [plain_hybrid.most_similar(item)[0] for item in range(1, NUM_ITEMS + 1)] == hybrid[1:].tolist()


def test_dense_encoder_and_loss_agree_on_real_positions() -> None:
    plain, ours = encoders()
    inputs, targets, negatives = next(iter(DataLoader(TrainSamples(toy_sequences()), batch_size=30)))
    lengths = (inputs > 0).sum(1)
    real = inputs > 0
    dense, states = plain(inputs), ours(inputs, lengths)
    torch.testing.assert_close(states[real], dense[real], rtol=1e-4, atol=1e-4)
    vectors = ours.item_embedding.weight
    positive, negative = ((states[real] * vectors[ids[real]]).sum(-1) for ids in (targets, negatives))
    loss = bce_next_item(positive, negative[:, None])
    torch.testing.assert_close(loss, bce_loss(plain, dense, targets, negatives), rtol=1e-4, atol=1e-4)


def test_dense_contrastive_loss_agrees() -> None:
    first, second = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nt_xent_loss(first, second, 0.7), nt_xent(first, second, 0.7))


def test_joint_loss_adds_the_weighted_contrastive_loss() -> None:
    plain, _ = encoders()
    samples = TrainSamples(toy_sequences())
    samples.similarity = OfflineSimilarity(samples.data.train_items())
    inputs, targets, negatives, first, second = next(iter(DataLoader(samples, batch_size=30)))
    expected = bce_loss(plain, plain(inputs), targets, negatives) + 0.1 * nt_xent_loss(plain(first), plain(second))
    torch.testing.assert_close(joint_loss(plain, (inputs, targets, negatives, first, second)), expected)


def test_exempt_users_keep_their_sequence_and_negatives_are_new_to_the_user() -> None:
    data = toy_sequences()
    data.exempt.add(3)
    samples = TrainSamples(data)
    samples.similarity = Table(torch.arange(NUM_ITEMS + 1))
    inputs, targets, negatives, first, second = samples[3]
    assert first.equal(inputs)
    assert second.equal(inputs)
    assert not set(negatives[negatives > 0].tolist()) & set(data.items[3])
    assert (negatives > 0).equal(targets > 0)


def test_loop_over_users_ranks_as_counting_does() -> None:
    from scipy import sparse

    plain, ours = encoders()
    data = toy_sequences()
    seen = sparse.lil_matrix((len(data.items), NUM_ITEMS + 1))
    for user, items in enumerate(data.items):
        seen[user, [item for item in items[:-2] if item != items[-2]]] = 1
    found = evaluate(plain, DataLoader(EvalSamples(data), batch_size=7), seen.tocsr(), ks=(5, 20))
    metric = FullRankingMetrics((5, 20), ("hr", "ndcg"))
    for items in data.items:
        inputs = torch.tensor([pad(items[:-2], LENGTH)])
        scores = ours(inputs, (inputs > 0).sum(1))[:, -1] @ ours.item_embedding.weight.T
        scores[:, [0, *(item for item in items[:-2] if item != items[-2])]] = -torch.inf
        metric.update(scores, torch.tensor([items[-2]]))
    assert found == pytest.approx({name: float(value) for name, value in metric.compute().items()}, abs=1e-6)


def test_bench_of_the_embedded_sample_times_every_path(tmp_path: Path) -> None:
    from benchmarks.ticoserec import Bench

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = Bench(SequenceData(sample_users=150, batch_size=128, seed=0), steps=1, folder=str(tmp_path))
        for case in bench.cases().values():
            assert case.ours().wall > 0, case.name
            assert case.reference().wall > 0, case.name
