"""Distances between titles against their tables, and their means."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from tests.ranks import run_ranks
from zoo.text_attack.stealth import TextStealth, levenshtein, rouge_l, words_changed


def distance_by_table(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def common_by_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


def random_strings(count=3000, letters="abc", longest=12):
    draw = random.Random(0)
    return [tuple("".join(draw.choices(letters, k=draw.randint(0, longest))) for _ in range(2)) for _ in range(count)]


def test_levenshtein_equals_the_table_on_random_strings():
    for a, b in random_strings():
        assert levenshtein(a, b) == distance_by_table(a, b), (a, b)
    for a, b in random_strings(60, "abcd", 150):
        assert levenshtein(a, b) == distance_by_table(a, b), (a, b)


def test_levenshtein_takes_lists_of_words():
    assert levenshtein(["super", "mario", "kart"], ["mario", "cart"]) == 2
    assert levenshtein([], ["a"]) == levenshtein(["a"], ()) == 1


def test_rouge_is_f1_of_the_common_subsequence_on_random_words():
    for a, b in random_strings(1000):
        common = common_by_table(a, b)
        precision, recall = common / max(len(b), 1), common / max(len(a), 1)
        expected = 2 * precision * recall / (precision + recall) if common else float(not a and not b)
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected), (a, b)


def test_rouge_of_equal_titles_is_one_and_of_disjoint_titles_zero():
    assert rouge_l("Super Mario, Kart!", "super mario kart") == 1
    assert rouge_l("Super Mario", "Zelda: Links") == 0
    assert rouge_l("", "Zelda") == 0
    assert rouge_l("", "") == 1


def test_the_share_of_changed_words_counts_places():
    assert words_changed("Super Mario Kart 8", "Super Mar'io Kart 9") == 0.5
    assert words_changed("Super Mario", "Super Mario") == 0
    assert words_changed("Super Mario", "Super Mario great best") == 0.5
    assert words_changed("Super Mario", "Su per Mario") == pytest.approx(2 / 3)
    assert words_changed("", "") == 0


ORIGINALS = ["Super Mario Kart", "Zelda", "", "Halo 3"]
PERTURBED = ["Super Mairo Kart", "Ze'lda", "", "Halo 3"]
COSINE = torch.tensor([0.9, 0.7, 1.0, 1.0])
PPL_PRE = torch.tensor([10.0, 20.0, torch.nan, 30.0])
PPL_POST = torch.tensor([30.0, 80.0, torch.nan, 30.0])


def filled(parts=(slice(None),)):
    metric = TextStealth()
    for part in parts:
        metric.update(
            ORIGINALS[part], PERTURBED[part], cosine=COSINE[part], ppl_pre=PPL_PRE[part], ppl_post=PPL_POST[part]
        )
    return metric


def test_means_and_medians_are_those_of_the_titles():
    values = {name: float(value) for name, value in filled().compute().items()}
    expected = {
        "edit_distance": 3 / 4,
        "edit_ratio": (2 / 16 + 1 / 5) / 4,
        "words_changed": (1 / 3 + 1) / 4,
        "rouge_l": (2 / 3 + 0 + 1 + 1) / 4,
        "cosine": 0.9,
        "ppl_pre": 20,
        "ppl_post": 140 / 3,
        "ppl_ratio": (3 + 4 + 1) / 3,
        "ppl_pre_median": 20,
        "ppl_post_median": 30,
        "ppl_ratio_median": 3,
    }
    assert values == pytest.approx(expected, rel=1e-6)


def test_the_median_of_an_even_number_is_between_the_two_middle_ones():
    metric = TextStealth()
    ratios = [1.0, 2.0, 4.0, 100.0]
    metric.update(["a"] * 4, ["b"] * 4, ppl_pre=torch.ones(4), ppl_post=torch.tensor(ratios))
    assert float(metric.compute()["ppl_ratio_median"]) == statistics.median(ratios) == 3


def test_any_order_and_division_gives_the_same_bits():
    draw = random.Random(1)
    pairs = random_strings(200)
    numbers = torch.rand(200)

    def of(order):
        metric = TextStealth()
        for i in order:
            metric.update([pairs[i][0]], [pairs[i][1]], cosine=numbers[i : i + 1])
        return metric.compute()

    one = TextStealth()
    one.update([a for a, _ in pairs], [b for _, b in pairs], cosine=numbers)
    assert of(draw.sample(range(200), 200)) == of(range(200)) == one.compute()


def test_what_was_not_given_is_not_reported():
    metric = TextStealth()
    with pytest.warns(UserWarning, match="compute"):
        assert metric.compute() == {}
    metric.update(["a"], ["b"])
    assert set(metric.compute()) == {"edit_distance", "edit_ratio", "words_changed", "rouge_l"}


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 and 1"):
        TextStealth().update(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="both"):
        TextStealth().update(["a"], ["a"], ppl_pre=torch.ones(1))
    with pytest.raises(ValueError, match=r"cosine must have shape \(1,\)"):
        TextStealth().update(["a"], ["a"], cosine=torch.ones(2))


def stealth_of_part(rank, split):
    # With a split of 4 the second rank has no title at all.
    return filled([slice(0, split)] if rank == 0 else [slice(split, 4)] if split < 4 else []).compute()


@pytest.mark.parametrize("split", [3, 4])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric TextStealth:UserWarning")
def test_two_processes_give_the_bits_of_one_also_if_one_has_no_title(tmp_path, split):
    for values in run_ranks(tmp_path, stealth_of_part, split):
        assert values == filled().compute()
