from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from datamodules.interaction import InteractionData, InteractionTable, check_table
from datamodules.interaction_features import normalise, replace_missing


def some_table(split: bool = False, num_users: int = 80, num_items: int = 50, seed: int = 0) -> InteractionTable:
    rng = np.random.default_rng(seed)
    user_ids, item_ids = np.nonzero(rng.random((num_users, num_items)) < 0.25)
    return InteractionTable(
        "toy",
        np.array([f"u{k}" for k in range(num_users)]),
        np.arange(num_items) * 10,
        user_ids,
        item_ids,
        rng.choice([0, 0, 0, 0, 1, 2], len(user_ids)).astype(np.int8) if split else None,
        {
            "text": rng.normal(size=(num_items, 6)).astype(np.float32),
            "image": rng.normal(1, 2, size=(num_items, 4)).astype(np.float32),
        },
        rng.integers(0, 255, (num_items, 4, 4, 3)).astype(np.uint8),
        [f"item {k}" for k in range(num_items)],
    )


def table_pairs(table: InteractionTable, part: int | None = None) -> set[tuple[int, int]]:
    chosen = slice(None) if part is None else table.split == part
    return set(zip(table.user_ids[chosen].tolist(), table.item_ids[chosen].tolist(), strict=True))


def test_missing_vectors_become_the_mean_of_the_others_in_one_modality_of_each_item() -> None:
    table = some_table()
    features = replace_missing(table.features, 0.4, seed=0)
    changed = {name: (features[name] != table.features[name]).any(1) for name in features}
    assert not (changed["text"] & changed["image"]).any()
    assert (changed["text"] | changed["image"]).sum() == 20
    for name, lost in changed.items():
        assert 4 < lost.sum() < 16
        mean = table.features[name][~lost].mean(0)
        np.testing.assert_allclose(features[name][lost], np.broadcast_to(mean, (lost.sum(), len(mean))), rtol=1e-5)
    other = replace_missing(table.features, 0.4, seed=1)
    assert not np.array_equal(other["text"], features["text"])
    data = InteractionData.from_table(table, missing_rate=0.4)
    assert all(np.array_equal(data.features[name], features[name]) for name in features)
    with pytest.raises(ValueError, match=r"missing_rate=1.0 leaves no item with modality 'text'"):
        replace_missing({"text": table.features["text"]}, 1.0, 0)


def test_features_are_scaled_by_row_or_column_and_degenerate_ones_stay_finite() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (100, 5)).astype(np.float32)
    rows[7], rows[:, 2] = 0, 0.1
    rows[7, 2] = 0.1
    np.testing.assert_allclose(np.linalg.norm(normalise(rows, "l2"), axis=1), 1, rtol=1e-5)
    scaled = normalise(rows, "standardize")
    columns = [0, 1, 3, 4]
    np.testing.assert_allclose(scaled[:, columns].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(scaled[:, columns].std(0), 1, rtol=1e-5)
    assert not scaled[:, 2].any()
    assert not normalise(np.zeros((2, 3), dtype=np.float32), "l2").any()
    assert normalise(rows, None) is rows
    data = InteractionData.from_table(some_table(), feature_norm="l2")
    assert torch.allclose(data.features["image"].norm(dim=1), torch.ones(50))


def bad(**changes: Any) -> InteractionTable:
    return some_table(split=True)._replace(**changes)


def with_value(value: float, dtype: type = np.float32) -> dict[str, Any]:
    rows = np.ones((50, 3), dtype=dtype) + np.arange(50)[:, None] + np.arange(3)
    rows = rows.astype(dtype)
    rows[17, 1] = rows[20, 0] = value
    return {"text": rows}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"text": np.ones((48, 3))}}, r"toy: modality 'text': 48 rows, expected num_items=50; .*aligned"),
        ({"features": {"text": np.ones(50)}}, r"modality 'text': shape \(50,\), expected \(num_items, size\)"),
        ({"features": with_value(np.nan)}, "toy: .* 'text': 2 of 50 rows are not finite, the first is row 17 with nan"),
        ({"features": with_value(np.inf, np.float16)}, "'text': 2 of 50 rows .* the first is row 17 with inf"),
        ({"features": with_value(1e300, np.float64)}, "'text': 2 of 50 rows .* the first is row 17 with inf"),
        ({"item_labels": np.arange(45)}, r"toy: \d+ of \d+ item ids are out of range: .* 0 to 49, expected 0..44"),
        ({"user_labels": np.arange(7)}, r"toy: \d+ of \d+ user ids are out of range: .* 0 to 79, expected 0..6"),
        ({"user_ids": np.zeros(0, dtype=np.int64)}, "toy: no interactions"),
        ({"user_ids": np.zeros(5)}, "toy: user ids are float64, expected integers 0..79"),
        ({"item_names": ["a"]}, "toy: item_names has 1 entries, expected 50"),
        ({"images": np.zeros((3, 2, 2, 3), dtype=np.uint8)}, "toy: images has 3 entries, expected 50"),
        ({"split": np.zeros(3, dtype=np.int8)}, "toy: split has 3 entries, expected "),
        ({"split": np.arange(len(some_table().user_ids)) % 4}, r"toy: split has \[0, 1, 2, 3\], expected 0"),
    ],
    ids=[
        "rows", "shape", "nan", "float16", "overflow", "items", "users", "empty", "floats", "names", "images",
        "split_size", "split_values",
    ],
)  # fmt: skip
def test_bad_tables_are_refused_with_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_table(bad(**changes))


def test_a_negative_id_is_refused() -> None:
    table = some_table()
    table.item_ids[3] = -1
    with pytest.raises(ValueError, match=r"1 of \d+ item ids are out of range: they go from -1 to 49"):
        InteractionData.from_table(table).setup("fit")


def test_half_precision_is_widened_before_any_statistic() -> None:
    rows = np.full((50, 300), 300, dtype=np.float16) + np.arange(50, dtype=np.float16)[:, None]
    rows[:, 0] = np.arange(50)
    data = InteractionData.from_table(some_table()._replace(features={"audio": rows}), feature_norm="l2")
    assert torch.isfinite(data.features["audio"]).all()
    assert torch.allclose(data.features["audio"].norm(dim=1), torch.ones(50))


def test_zero_and_constant_rows_are_warned_about_beyond_one_in_a_hundred(caplog: pytest.LogCaptureFixture) -> None:
    table = some_table(num_items=200)
    table.features["text"][:2] = 0
    check_table(table)
    assert "all zero" not in caplog.text
    table.features["text"][2] = 5
    check_table(table)
    assert "modality 'text': 2 rows of 200 are all zero and 1 constant" in caplog.text
    assert "mean vector" in caplog.text


def repeated(table: InteractionTable, part: int, of: int, count: int) -> InteractionTable:
    """The table with the first `count` pairs of a part once more in another part."""
    assert table.split is not None
    rows = np.flatnonzero(table.split == of)[:count]
    return table._replace(
        user_ids=np.append(table.user_ids, table.user_ids[rows]),
        item_ids=np.append(table.item_ids, table.item_ids[rows]),
        split=np.append(table.split, np.full(count, part, dtype=np.int8)),
    )


def test_duplicates_are_dropped_with_a_count_and_leaks_refused(caplog: pytest.LogCaptureFixture) -> None:
    table = some_table(split=True)
    total = len(table.user_ids)
    for part in range(3):
        caplog.clear()
        checked = check_table(repeated(table, part, part, 3))
        assert f"toy: dropped 3 duplicates of {total + 3} interactions" in caplog.text
        assert table_pairs(checked, part) == table_pairs(table, part)
        assert len(checked.user_ids) == total
    for part, of in ((1, 0), (2, 0), (0, 1), (0, 2)):
        with pytest.raises(ValueError, match="toy: 4 validation or test pairs are also in the training"):
            check_table(repeated(table, part, of, 4))
    check_table(repeated(table, 1, 2, 5))
    assert "toy: 5 pairs are both in the validation and in the test" in caplog.text
