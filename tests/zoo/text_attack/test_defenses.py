"""Spelling repair against a scan of all words, its invariances, and what a defence recovers."""

from __future__ import annotations

import copy
import math
import random
import string

import pytest

from tests.zoo.text_attack.test_stealth import distance_by_table
from zoo.text_attack.defenses import SpellDefense, recovery
from zoo.text_attack.words import Words

TITLES = [
    "Super Mario Kart 8: Deluxe",
    "Mario Party - Nintendo Switch",
    "PlayStation 4 Slim (500GB)",
    "Spider-Man: Miles Morales",
    "The Legend of Zelda",
    "Zelda's Adventure",
    "NBA LIVE 19",
    "Kart Racing",
]


@pytest.fixture(scope="module")
def defense():
    return SpellDefense(TITLES)


def nearest_by_scan(counts, word, max_edit):
    ranked = sorted((distance_by_table(word, known), -count, known) for known, count in counts.items())
    return ranked[0][2] if ranked[0][0] <= max_edit else None


@pytest.mark.parametrize("max_edit", [0, 1, 2, 3])
def test_the_index_finds_what_a_scan_of_all_words_finds(max_edit):
    draw = random.Random(0)
    counts = {"".join(draw.choices("abcd", k=draw.randint(1, 7))): draw.randint(1, 4) for _ in range(150)}
    defense = SpellDefense(counts, max_edit)
    changed = 0
    for _ in range(400):
        word = "".join(draw.choices("abcde", k=draw.randint(1, 8)))
        expected = word if word in counts else nearest_by_scan(counts, word, max_edit) or word
        assert defense([word]) == [expected], word
        changed += expected != word
    assert bool(changed) == (max_edit > 0)


def test_titles_of_known_words_are_left_as_they_are(defense):
    assert defense(TITLES) == TITLES
    others = ["SUPER zelda's PARTY!!", "spider-man (kart)  8", "", "?!"]
    assert defense(others) == others


def test_marks_inside_a_word_are_dropped_if_that_makes_it_known(defense):
    assert defense(["Sup'er Ma-rio", "Spid'er-Man"]) == ["Super Mario", "Spider-Man"]
    # More marks than edits.
    assert defense(["P-l-a-y'S't'ation"]) == ["PlayStation"]


def test_ties_go_to_the_more_frequent_word_and_then_to_the_alphabet():
    assert SpellDefense({"cart": 1, "card": 3})(["caro"]) == ["card"]
    assert SpellDefense({"cart": 2, "card": 2})(["caro"]) == ["card"]
    assert SpellDefense({"cart": 9, "caros": 1})(["caros"]) == ["caros"]
    # Nearer wins over more frequent.
    assert SpellDefense({"zelda": 1, "zeldas": 9})(["zelpa"]) == ["zelda"]


def test_words_far_from_all_known_ones_stay(defense):
    assert defense(["Xylophone Mario"]) == ["Xylophone Mario"]


def test_a_repair_is_written_as_the_catalogue_or_the_word_before_was(defense):
    assert defense(["PlaySttaion", "playsttaion", "PLAYSTTAION"]) == ["PlayStation", "playstation", "PLAYSTATION"]
    assert defense(["LIVEE", "Livee", "livee"]) == ["LIVE", "Live", "live"]


def attacked(titles, seed=0):
    draw = random.Random(seed)
    found = []
    for title in titles:
        words = Words.of(title)
        for i, word in enumerate(words.words):
            place = draw.randrange(len(word))
            kind = draw.randrange(4)
            letter = draw.choice(string.ascii_letters + "'-" if place > 0 else string.ascii_letters)
            new = word[:place] + (letter, "", letter, word[::-1])[kind] + word[place + (kind != 2) :]
            words = words.replaced(i, new or word)
        found.append(words.text)
    return found


@pytest.mark.parametrize("seed", range(30))
def test_repairing_twice_changes_nothing_more(defense, seed):
    once = defense(attacked(TITLES, seed))
    assert defense(once) == once
    assert once != attacked(TITLES, seed)


def test_what_stands_between_words_stays(defense):
    assert defense(["  Maroi   Kart -- (Supre)!  "]) == ["  Mario   Kart -- (Super)!  "]


def test_repairs_do_not_depend_on_what_was_repaired_before(defense):
    titles = attacked(TITLES, 3)
    together = defense(titles)
    assert [SpellDefense(TITLES)([title])[0] for title in reversed(titles)] == together[::-1]
    assert copy.deepcopy(defense)(titles) == together


def test_a_full_memory_of_repairs_is_emptied_and_changes_nothing(monkeypatch):
    monkeypatch.setattr("zoo.text_attack.defenses._CACHE_WORDS", 3)
    defense = SpellDefense(TITLES)
    assert defense(attacked(TITLES)) == SpellDefense(TITLES)(attacked(TITLES))
    assert len(defense._repaired) <= 3


def test_looking_words_up_does_not_make_them_known(defense):
    before = defense.num_words
    defense(["Unheardof Qwertzuiop"])
    assert defense.num_words == before == 25
    assert defense.knows("MARIO") and not defense.knows("Unheardof")


def test_counts_that_are_no_single_word_are_counted_in_the_log(caplog):
    caplog.set_level("INFO", "zoo.text_attack.defenses")
    defense = SpellDefense({"mario": 3, "two words": 1, "c++": 1})
    assert defense.num_words == 1
    assert "2 of 3 entries are no single word" in caplog.text


def test_bad_dictionaries_are_refused():
    with pytest.raises(ValueError, match="no word"):
        SpellDefense(["", "?!"])
    with pytest.raises(ValueError, match="got -1"):
        SpellDefense(TITLES, -1)
    with pytest.raises(ValueError, match="'mario' must occur at least once, got 0"):
        SpellDefense({"mario": 0})


def test_restoring_every_title_recovers_everything_and_doing_nothing_nothing():
    clean, hurt = [0.1, 0.05, 0.2], [0.3, 0.05, 0.4]
    assert recovery(clean, hurt, clean) == 1
    assert recovery(clean, hurt, hurt) == 0
    assert recovery(0.1, 0.3, 0.15) == pytest.approx(0.75)
    assert recovery([0.1, 0.3], [0.5, 0.3], [0.1, 0.4]) == pytest.approx(0.75)
    assert recovery(0.1, 0.3, 0.05) > 1


def test_an_attack_without_effect_leaves_nothing_to_recover():
    assert recovery(0.1, 0.1, 0.1) == 1
    assert math.isnan(recovery(0.1, 0.1, 0.2))


def test_recovery_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="'defended': 1"):
        recovery([0.1, 0.2], [0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="attacked must be finite"):
        recovery([0.1], [math.nan], [0.1])
    with pytest.raises(ValueError, match="'clean': 0"):
        recovery([], [], [])


def test_repair_undoes_single_letter_edits_of_long_words(defense):
    titles = ["Nintendo Adventure", "Legend Racing"]
    for seed in range(20):
        draw = random.Random(seed)
        hurt = []
        for title in titles:
            place = draw.randrange(1, 5)
            hurt.append(title[:place] + title[place + 1] + title[place] + title[place + 2 :])
        assert defense(hurt) == titles


def test_of_spellings_that_are_equally_near_the_most_frequent_one_is_taken() -> None:
    assert SpellDefense({"LEgo": 1, "leGO": 3})(["lEgOx"]) == ["leGO"]
    assert SpellDefense({"LEgo": 3, "leGO": 1})(["lEgOx"]) == ["LEgo"]
