import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import run_ranks
from zoo.cmmixer import metrics
from zoo.cmmixer.metrics import CrossModalRetrieval, relevant_ranks

Data = tuple[Tensor, Tensor, Tensor]


def pairs(count: int = 40, ids: int = 40, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(count, 6, generator=generator)
    audio = video + torch.randn(count, 6, generator=generator)
    return video, audio, torch.randint(ids, (count,), generator=generator)


def computed(*batches: Data, ks: tuple[int, ...] = (1, 5, 10, 25)) -> dict[str, float]:
    metric = CrossModalRetrieval(ks)
    for batch in batches:
        metric.update(*batch)
    return {name: value.item() for name, value in metric.compute().items()}


def by_loops(queries: Tensor, gallery: Tensor, ids: Tensor) -> tuple[list[int], float]:
    """Rank of the best relevant item for each query, and the mean average precision, in float64."""
    firsts, precisions = [], []
    for query, own in zip(queries.double(), ids.tolist(), strict=True):
        scores = [float(query @ row / (query.norm() * row.norm())) for row in gallery.double()]
        # Among equal scores, the irrelevant ones first.
        order = sorted(range(len(ids)), key=lambda j: (-round(scores[j], 9), int(ids[j]) == own))
        ranks = [rank for rank, j in enumerate(order, 1) if int(ids[j]) == own]
        firsts.append(ranks[0])
        precisions.append(sum(found / rank for found, rank in enumerate(ranks, 1)) / len(ranks))
    return firsts, sum(precisions) / len(precisions)


@pytest.mark.parametrize("count", [2, 3, 7, 33, 1001])
def test_a_constant_encoder_finds_nothing(count: int) -> None:
    video, audio = F.normalize(torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(count)), dim=2)
    values = computed((video.expand(count, -1), audio.expand(count, -1), torch.arange(count)))
    for direction in ("v2a", "a2v"):
        assert values[f"{direction}/r@1"] == 0.0
        assert values[f"{direction}/mdr"] == count
        assert values[f"{direction}/map"] == pytest.approx(1 / count)


def test_equal_columns_tie_exactly_whatever_the_product_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(scores: Tensor, relevant: Tensor) -> Tensor:
        seen.append(scores)
        return relevant_ranks(scores, relevant)

    monkeypatch.setattr(metrics, "relevant_ranks", spy)
    # Some of these sizes lose ties in a plain product of float32 matrices.
    for count, size in ((7, 128), (5, 2048), (7, 2048)):
        x = torch.randn(1, size, generator=torch.Generator().manual_seed(count)).expand(count, -1)
        computed((x, x, torch.arange(count)))
    assert all((scores == scores[:, :1]).all() for scores in seen)


def test_perfect_vectors_find_everything() -> None:
    video = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    values = computed((video, 3 * video, torch.arange(50)))
    for direction in ("v2a", "a2v"):
        assert {values[f"{direction}/{name}"] for name in ("r@1", "r@25", "mdr", "mrr", "map")} == {1.0}
    assert values["map"] == 1.0


def test_two_pairs_have_the_values_worked_out_by_hand() -> None:
    # v0 scores 0.6 and 0.8: its partner is second; v1 scores 0 and 1: first. a0 scores 0.6 and 0, a1 0.8 and 1: first.
    video = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    audio = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    values = computed((video, audio, torch.tensor([5, 3])), ks=(1, 2, 9))
    assert values == pytest.approx(
        {
            **{"v2a/r@1": 0.5, "v2a/r@2": 1.0, "v2a/r@9": 1.0, "v2a/mdr": 1.5, "v2a/mrr": 0.75, "v2a/map": 0.75},
            **{"a2v/r@1": 1.0, "a2v/r@2": 1.0, "a2v/r@9": 1.0, "a2v/mdr": 1.0, "a2v/mrr": 1.0, "a2v/map": 1.0},
            **{"map": 0.875, "gallery_size": 2.0, "chance@1": 0.5, "chance@2": 1.0, "chance@9": 1.0},
        }
    )


@pytest.mark.parametrize("ids", [1000, 12, 3], ids=["one_relevant", "some", "many"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_values_equal_those_of_loops(ids: int, ties: bool) -> None:
    video, audio, pair_ids = pairs(60, ids, seed=ids)
    if ids == 1000:
        pair_ids = torch.arange(60).flip(0)
    if ties:
        # Few distinct vectors, shared by relevant and irrelevant items.
        video, audio = video[torch.arange(60) % 7], audio[torch.arange(60) % 5]
    values = computed((video, audio, pair_ids), ks=(1, 4, 25))
    average = 0.0
    for direction, queries, gallery in (("v2a", video, audio), ("a2v", audio, video)):
        firsts, precision = by_loops(queries, gallery, pair_ids)
        middle = sorted(firsts)[29:31]
        assert values[f"{direction}/map"] == pytest.approx(precision, rel=1e-6)
        assert values[f"{direction}/mrr"] == pytest.approx(sum(1 / rank for rank in firsts) / 60, rel=1e-6)
        assert values[f"{direction}/mdr"] == sum(middle) / 2
        for k in (1, 4, 25):
            assert values[f"{direction}/r@{k}"] == pytest.approx(sum(rank <= k for rank in firsts) / 60, rel=1e-6)
        average += precision / 2
    assert values["map"] == pytest.approx(average, rel=1e-6)


def test_ties_count_against_relevant_items_but_not_between_them() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.9, 0.1]])
    relevant = torch.tensor([[True, True, False, False], [True, True, True, False]])
    assert relevant_ranks(scores, relevant).tolist() == [[3, 4, 0], [1, 2, 4]]
    assert relevant_ranks(scores, torch.eye(4, dtype=torch.bool)[:2]).tolist() == [[4], [4]]


def test_nan_ranks_last_whether_it_is_an_item_or_the_query() -> None:
    video, audio = torch.eye(4), torch.eye(4)
    audio[0] = torch.nan
    values = computed((video, audio, torch.arange(4)))
    assert values["v2a/r@1"] == values["a2v/r@1"] == 0.75
    assert values["v2a/mrr"] == values["a2v/mrr"] == pytest.approx((3 + 1 / 4) / 4)
    nothing = computed((torch.full((4, 4), torch.nan), audio, torch.arange(4) // 2))
    assert nothing["v2a/r@1"] == 0.0
    assert nothing["v2a/mdr"] == 3.0


def test_equal_vectors_tie_also_beside_vectors_of_nan() -> None:
    # Of these sizes a plain product of float32 matrices loses ties.
    for size in (128, 2048):
        video = torch.randn(1, size, generator=torch.Generator().manual_seed(7)).expand(7, -1)
        audio = video.clone()
        audio[1::3] = torch.nan
        values = computed((video, audio, torch.arange(7)))
        assert values["v2a/mrr"] == pytest.approx((5 / 5 + 2 / 7) / 7, rel=1e-6)


def test_chance_is_what_random_orders_reach() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    values = computed((torch.ones(10, 2), torch.ones(10, 2), ids), ks=(1, 2, 8, 9, 50))
    for k in (1, 2, 8, 9, 50):
        missed = [math.comb(10 - int((ids == own).sum()), min(k, 10)) / math.comb(10, min(k, 10)) for own in ids]
        assert values[f"chance@{k}"] == pytest.approx(1 - sum(missed) / 10, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    found = [
        relevant_ranks(torch.rand(10, 10, generator=generator), ids[:, None] == ids)[:, 0].le(2).double().mean()
        for _ in range(400)
    ]
    assert torch.stack(found).mean().item() == pytest.approx(values["chance@2"], abs=0.02)
    singles = computed((torch.ones(20, 2), torch.ones(20, 2), torch.arange(20)), ks=(1, 5))
    assert (singles["chance@1"], singles["chance@5"]) == (pytest.approx(1 / 20), pytest.approx(5 / 20))


def test_two_updates_and_small_blocks_give_what_one_update_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    video, audio, ids = pairs(ids=9)
    whole = computed((video, audio, ids))
    assert computed((video[:13], audio[:13], ids[:13]), (video[13:], audio[13:], ids[13:])) == pytest.approx(whole)
    monkeypatch.setattr(metrics, "_PAIRS_AT_ONCE", 3 * 40)
    assert computed((video, audio, ids)) == pytest.approx(whole)


def _on_rank(rank: int, video: Tensor, audio: Tensor, ids: Tensor) -> dict[str, float]:
    own = slice(0, 15) if rank == 0 else slice(15, None)
    return computed((video[own], audio[own], ids[own]))


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    data = pairs(ids=9)
    whole = computed(data)
    for values in run_ranks(tmp_path, _on_rank, *data):
        assert values == pytest.approx(whole)


def test_bf16_vectors_are_ranked_in_float32_also_under_autocast() -> None:
    video, audio, ids = pairs(300, 300)
    video, audio = video.bfloat16(), audio.bfloat16()
    expected = computed((video.float(), audio.float(), ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert computed((video, audio, ids)) == expected


def test_shared_ids_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    video, audio, _ = pairs(5)
    metric = CrossModalRetrieval()
    with caplog.at_level(logging.INFO, logger=metrics.__name__):
        for _ in range(2):
            metric.reset()
            metric.update(video, audio, torch.tensor([0, 1, 1, 2, 1]))
            metric.compute()
    assert [record.getMessage()[:43] for record in caplog.records if record.name == metrics.__name__] == [
        "3 of 5 pairs share their id with others: a "
    ]


def test_names_carry_the_prefix_and_a_reset_empties_the_gallery() -> None:
    metric = CrossModalRetrieval((3,), prefix="test/")
    metric.update(*pairs(8))
    names = set(metric.compute())
    kinds = ("r@3", "mdr", "mrr", "map")
    assert names == {f"test/{way}/{kind}" for way in ("v2a", "a2v") for kind in kinds} | {
        "test/map",
        "test/gallery_size",
        "test/chance@3",
    }
    metric.reset()
    metric.update(*pairs(4))
    assert metric.compute()["test/gallery_size"] == 4


def test_an_empty_gallery_is_an_error_and_not_a_nan() -> None:
    metric = CrossModalRetrieval()
    with pytest.warns(UserWarning, match="before the ``update`` method"), pytest.raises(ValueError, match="no pair"):
        metric.compute()
    metric.update(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no pair was given"):
        metric.compute()


def test_wrong_input_is_refused() -> None:
    for ks in ((), (0, 1), (5, 5)):
        with pytest.raises(ValueError, match="distinct cut-offs"):
            CrossModalRetrieval(ks)
    metric, (video, audio, ids) = CrossModalRetrieval(), pairs(4)
    with pytest.raises(ValueError, match=r"\(4, 6\) and torch.float32 \(3, 6\)"):
        metric.update(video, audio[:3], ids)
    with pytest.raises(ValueError, match=r"pair_ids must be int64 of shape \(4,\), got torch.float32"):
        metric.update(video, audio, ids.float())
    with pytest.raises(ValueError, match=r"got torch.int64 \(3,\)"):
        metric.update(video, audio, ids[:3])
