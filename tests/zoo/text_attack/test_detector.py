"""Flags and areas against counts over all pairs."""

from __future__ import annotations

import logging

import pytest
import torch

from zoo.text_attack.detector import PerplexityDetector
from zoo.text_attack.perplexity import NGramLanguageModel


class Lookup:
    """The perplexity of a title is the number it holds."""

    name = "lookup"

    def perplexity(self, texts):
        return torch.tensor([float(text) if text else torch.nan for text in texts])


def as_titles(values):
    return [str(float(value)) for value in values]


def area_by_pairs(attacked, clean):
    return sum((a > c) + (a == c) / 2 for a in attacked for c in clean) / (len(attacked) * len(clean))


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        attacked = torch.randint(3, 12, (17,), generator=generator).tolist()
        clean = torch.randint(1, 9, (23,), generator=generator).tolist()
        got = PerplexityDetector(Lookup()).auroc(as_titles(attacked), as_titles(clean))
        assert got == pytest.approx(area_by_pairs(attacked, clean), abs=1e-12)


def test_the_area_is_one_half_for_a_constant_perplexity_and_one_for_a_perfect_one():
    detector = PerplexityDetector(Lookup())
    assert detector.auroc(["5"] * 4, ["5"] * 3) == 0.5
    assert detector.auroc(["9", "8"], ["1", "2"]) == 1
    assert detector.auroc(["1", "2"], ["9", "8"]) == 0


def test_the_threshold_is_the_quantile_of_ratios_of_clean_titles():
    detector = PerplexityDetector(Lookup(), quantile=0.9).fit(as_titles(range(1, 102)))
    assert detector.threshold == pytest.approx(91 / 51)
    assert detector.ratios(["102"]).tolist() == [2]
    assert detector.flags(["90", "91", "92", ""]).tolist() == [False, False, True, False]


def test_no_more_clean_titles_are_flagged_than_the_quantile_leaves():
    clean = as_titles(torch.rand(1000).mul(100).add(1).tolist())
    detector = PerplexityDetector(Lookup(), quantile=0.95).fit(clean)
    assert 0.045 <= float(detector.flags(clean).double().mean()) <= 0.05


def test_a_language_model_of_the_catalogue_tells_misspelt_titles():
    titles = [f"Super Mario {word} {i}" for word in ("Kart", "Party", "World") for i in range(10)]
    detector = PerplexityDetector(NGramLanguageModel(titles)).fit(titles)
    hurt = [title.replace("Mario", "Mxrqio").replace("Super", "Sjuper") for title in titles]
    assert bool(detector.flags(hurt).all())
    assert detector.auroc(hurt, titles) == 1


def test_titles_without_a_perplexity_are_left_out_and_counted(caplog):
    caplog.set_level(logging.INFO, "zoo.text_attack.detector")
    detector = PerplexityDetector(Lookup())
    assert detector.auroc(["", "9"], ["1", "", ""]) == 1
    assert "1 of 2 attacked titles" in caplog.text and "2 of 3 clean titles" in caplog.text
    assert detector.fit(["1", "", "3"]).ratios(["4"]).tolist() == [2]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="quantile"):
        PerplexityDetector(Lookup(), quantile=1)
    with pytest.raises(RuntimeError, match="call fit"):
        PerplexityDetector(Lookup()).flags(["1"])
    with pytest.raises(ValueError, match="none of the 0 clean"):
        PerplexityDetector(Lookup()).fit([])
    with pytest.raises(ValueError, match="none of the 1 attacked"):
        PerplexityDetector(Lookup()).auroc([""], ["1"])
    with pytest.raises(ValueError, match="'inf' is infinite"):
        PerplexityDetector(Lookup()).fit(["1", "inf"])
