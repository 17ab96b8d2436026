"""Words: cut once, edited in place."""

from __future__ import annotations

import pytest

from zoo.text_attack.words import Words

TITLES = (
    "",
    "   ",
    "!!",
    "Mario",
    "Mario Kart: Double-Dash!!",
    " (Turtle Beach) - Ear Force P11,  PS3 ",
    "Assassin's Creed",
    "a_b c*d e@f g-",
    "Pokémon Édition 64",
)


@pytest.mark.parametrize("title", TITLES)
def test_the_text_of_a_cut_title_is_the_title(title: str) -> None:
    words = Words.of(title)
    assert words.text == title
    assert [title[start : start + len(word)] for start, word in zip(words.starts, words.words, strict=True)] == list(
        words.words
    )


def test_marks_between_letters_belong_to_the_word() -> None:
    assert Words.of("Assassin's Double-Dash!! a_b c*d e@f g- -h").words == (
        "Assassin's",
        "Double-Dash",
        "a_b",
        "c*d",
        "e@f",
        "g",
        "h",
    )


def test_a_word_keeps_its_place_after_a_blank_was_put_in_an_earlier_one() -> None:
    edited = Words.of("Mario Kart Wii").replaced(0, "Mar io").replaced(2, "W ii")
    assert edited.text == "Mar io Kart W ii" and len(edited) == 3
    assert edited.words[1] == "Kart" and edited.starts == (0, 6, 11)


@pytest.mark.parametrize(
    ("title", "index", "text"),
    [
        ("Mario Kart Wii", 0, "Kart Wii"),
        ("Mario Kart Wii", 1, "Mario Wii"),
        ("Mario Kart Wii", 2, "Mario Kart"),
        ("Mario", 0, ""),
        ("Game (Deluxe) Pack", 1, "Game () Pack"),
        ("Mario, Kart - Wii", 1, "Mario, - Wii"),
        ("Mario  Kart", 1, "Mario"),
    ],
)
def test_a_word_leaves_with_one_blank(title: str, index: int, text: str) -> None:
    assert Words.of(title).without(index).text == text


@pytest.mark.parametrize("title", TITLES)
def test_no_blanks_are_doubled_by_leaving_out_a_word(title: str) -> None:
    words = Words.of(" ".join(title.split()))
    for index in range(len(words)):
        assert "  " not in words.without(index).text
        assert words.without(index).text == words.without(index).text.strip()


@pytest.mark.parametrize("title", TITLES)
def test_sides_add_up_to_the_text_also_after_edits(title: str) -> None:
    words = Words.of(title)
    for index in range(len(words)):
        edited = words.replaced(0, "quite another").replaced(index, "word")
        before, word, after = edited.sides(index)
        assert before + word + after == edited.text and word == "word"


def test_a_window_holds_that_many_words_around_the_place() -> None:
    words = Words.of("a b, c d (e) f g")
    assert words.window(3, 3) == "c d (e"
    assert words.window(0, 3) == "a b, c"
    assert words.window(6, 3) == "e) f g"
    assert words.window(3, 1) == "d"
    assert words.window(3, 99) == "a b, c d (e) f g"


def test_changed_places_are_those_whose_words_differ() -> None:
    words = Words.of("a b c d")
    assert words.changed(words.replaced(1, "x").replaced(3, "y")) == [1, 3]
