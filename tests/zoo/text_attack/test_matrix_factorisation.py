"""Vectors of users and items from their interactions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from zoo.text_attack.matrix_factorisation import fit_matrix_factorisation, load_vectors
from zoo.text_attack.pair_metrics import area_under_roc

if TYPE_CHECKING:
    from pathlib import Path


def two_camps() -> torch.Tensor:
    """Even users have even items, odd ones odd items; a quarter of the pairs is held back."""
    users, items = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    same = (users % 2 == items % 2) & ((users + items) % 8 != 0)
    return torch.stack((users[same], items[same]), 1)


def test_held_back_items_of_a_users_camp_score_higher_than_those_of_the_other() -> None:
    users, items = fit_matrix_factorisation(two_camps(), 20, 20, 4, epochs=100)
    scores = users @ items.T
    row, column = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    held_back = (row + column) % 8 == 0
    other = row % 2 != column % 2
    assert float(area_under_roc(scores[held_back], scores[other])) > 0.9


def test_the_same_seed_gives_the_same_vectors_whatever_was_drawn_before() -> None:
    first = fit_matrix_factorisation(two_camps(), 20, 20, 4, epochs=2, seed=3)
    torch.rand(5)
    second = fit_matrix_factorisation(two_camps(), 20, 20, 4, epochs=2, seed=3)
    other = fit_matrix_factorisation(two_camps(), 20, 20, 4, epochs=2, seed=4)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([[0, 20]], r"item id 20 is not in 0..19"), ([[-1, 0]], r"user id -1"), ([], "a pair at least")],
    ids=["item", "user", "none"],
)
def test_pairs_that_cannot_be_are_refused(pairs: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_matrix_factorisation(torch.tensor(pairs, dtype=torch.int64).view(-1, 2), 20, 20, 4)


def test_vectors_of_a_file_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    save_file({"user_embeddings": torch.ones(3, 2), "item_embeddings": torch.zeros(4, 2)}, path)
    users, items = load_vectors(path, 3, 4, 2)
    assert users.shape == (3, 2) and items.shape == (4, 2) and float(users.sum()) == 6
    with pytest.raises(ValueError, match=r"item_embeddings of .* has the shape \(4, 2\), expected \(5, 2\)"):
        load_vectors(path, 3, 5, 2)
    save_file({"user_embeddings": torch.ones(3, 2)}, path)
    with pytest.raises(ValueError, match="has no item_embeddings"):
        load_vectors(path, 3, 4, 2)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_vectors(path, 3, 4, 2)
    with pytest.raises(FileNotFoundError, match="is not a file: cf_embeddings"):
        load_vectors(tmp_path / "none", 3, 4, 2)
