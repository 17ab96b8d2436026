from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules import ShillingInjector
from datamodules.shilling import bandwagon_fillers

NUM_ITEMS = 50


def sequences(users: int = 400, length: int = 21) -> tuple[Tensor, Tensor]:
    # Items 0..4, the most popular decile, are a third of all.
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, NUM_ITEMS, (users, length), generator=generator)
    items[:, ::3] = torch.randint(0, 5, items[:, ::3].shape, generator=generator)
    return items.flatten(), length * torch.arange(users + 1)


@pytest.mark.parametrize("kind", ["random", "bandwagon"])
def test_fake_users_follow_the_real_ones_and_have_the_target_last(kind: str) -> None:
    items, offsets = sequences()
    targets = torch.tensor([7, 2, 49])
    found = ShillingInjector(kind, share=0.03)(items, offsets, targets, NUM_ITEMS)
    fakes = 12
    assert len(found.offsets) == 400 + fakes + 1
    assert torch.equal(found.item_ids[: len(items)], items)
    assert torch.equal(found.offsets[:401], offsets)
    assert set(found.offsets.diff()[400:].tolist()) == {21}
    assert found.item_ids[found.offsets[401:] - 1].tolist() == found.target_ids.tolist() == [7, 2, 49] * 4
    for start, end in zip(found.offsets[400:-1].tolist(), found.offsets[401:].tolist(), strict=True):
        profile = found.item_ids[start:end].tolist()
        assert len(set(profile)) == len(profile)
        assert min(profile) >= 0 and max(profile) < NUM_ITEMS


@pytest.mark.parametrize(("share", "users", "fakes"), [(0.01, 400, 4), (0.01, 10, 1), (0.29, 100, 29), (1.0, 7, 7)])
def test_the_share_counts_fake_users_in_total_and_there_is_at_least_one(share: float, users: int, fakes: int) -> None:
    items, offsets = sequences(users)
    found = ShillingInjector("random", share)(items, offsets, torch.tensor([1, 2]), NUM_ITEMS)
    assert len(found.target_ids) == fakes


def test_the_profile_is_as_long_as_the_mean_sequence() -> None:
    items, offsets = torch.arange(11) % NUM_ITEMS, torch.tensor([0, 3, 11])  # 3 and 8: 5.5 on average
    found = ShillingInjector("random", 1.0)(items, offsets, torch.tensor([1]), NUM_ITEMS)
    assert set(found.offsets.diff()[2:].tolist()) == {6}


def popular_share(kind: str) -> float:
    items, offsets = sequences()
    found = ShillingInjector(kind, share=1.0)(items, offsets, torch.tensor([30, 31]), NUM_ITEMS)
    fillers = found.item_ids[len(items) :].view(-1, 21)[:, :-1]
    return (fillers < 5).float().mean().item()


def test_random_fillers_are_uniform_and_bandwagon_fillers_have_a_tenth_more_of_popular_items() -> None:
    assert popular_share("random") == pytest.approx(5 / 49, abs=0.01)
    # 2 of 20 from the five popular ones; the other 18 from the 47 items left, among which are three popular ones.
    assert popular_share("bandwagon") == pytest.approx(0.1 + 0.9 * 3 / 47, abs=0.01)


def test_a_tenth_of_few_fillers_is_met_on_average() -> None:
    items, offsets = sequences()
    fillers = bandwagon_fillers(torch.full((4_000,), 30), 4, items, offsets, NUM_ITEMS, 0)
    leading = (fillers < 5).float().mean().item()
    # 0.4 of 4 are popular, and of the others 5 (or 4) of 49 (or 48).
    assert leading == pytest.approx((0.4 + 3.6 * 4.6 / 48.6) / 4, abs=0.01)
    # They stand at any place.
    by_place = (fillers < 5).float().mean(0)
    assert by_place.max() - by_place.min() < 0.03


def test_a_popular_target_is_no_filler_of_its_own_profile() -> None:
    items, offsets = sequences()
    for kind in ("random", "bandwagon"):
        found = ShillingInjector(kind, share=1.0)(items, offsets, torch.tensor([0]), NUM_ITEMS)
        assert not (found.item_ids[len(items) :].view(-1, 21)[:, :-1] == 0).any()


def test_profiles_are_a_function_of_the_seed() -> None:
    items, offsets = sequences()

    def drawn(seed: int) -> Tensor:
        return ShillingInjector("bandwagon", 0.1, seed)(items, offsets, torch.tensor([3]), NUM_ITEMS).item_ids

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_generator_of_ones_own_fills_the_profiles() -> None:
    def copies(target_ids: Tensor, count: int, item_ids: Tensor, offsets: Tensor, num_items: int, seed: int) -> Tensor:
        return item_ids[offsets[: len(target_ids), None] + torch.arange(count)]

    items, offsets = sequences()
    found = ShillingInjector(copies, 0.01)(items, offsets, torch.tensor([3]), NUM_ITEMS)
    assert torch.equal(found.item_ids[len(items) :].view(4, 21)[:, :-1], items.view(-1, 21)[:4, :-1])


def test_what_cannot_be_injected_is_refused() -> None:
    items, offsets = sequences(10)
    with pytest.raises(ValueError, match="shilling must be one of bandwagon, random, got 'aush'"):
        ShillingInjector("aush")
    with pytest.raises(ValueError, match="shilling_share must be above 0 and at most 1, got 0"):
        ShillingInjector(share=0)
    with pytest.raises(ValueError, match=r"target ids \[50\]: expected 0\.\.49"):
        ShillingInjector()(items, offsets, torch.tensor([50]), NUM_ITEMS)
    with pytest.raises(ValueError, match="needs users and targets, got 10 and 0"):
        ShillingInjector()(items, offsets, torch.tensor([], dtype=torch.int64), NUM_ITEMS)
    wrong = torch.full((1, 20), 50)
    with pytest.raises(ValueError, match=r"an item that is not in 0\.\.49"):
        ShillingInjector(lambda *_: wrong)(items, offsets, torch.tensor([1]), NUM_ITEMS)
    with pytest.raises(ValueError, match=r"fillers \(1, 19\), expected \(1, 20\)"):
        ShillingInjector(lambda *_: wrong[:, 1:])(items, offsets, torch.tensor([1]), NUM_ITEMS)


@pytest.mark.parametrize("generator", ["random", "bandwagon"])
def test_profiles_are_never_longer_than_the_catalogue(generator: str) -> None:
    items, offsets = torch.tensor([0, 1, 2, 0, 1, 2, 0]), torch.tensor([0, 7])
    found = ShillingInjector(generator, 1.0)(items, offsets, torch.tensor([1]), 3)
    assert found.item_ids[7:-1].sort().values.tolist() == [0, 2]
    assert found.item_ids[-1] == 1
    assert found.offsets.tolist() == [0, 7, 10]
