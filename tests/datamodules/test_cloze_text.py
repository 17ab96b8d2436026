import pytest

from datamodules.cloze_text import MARKS, PLACEHOLDER, detokenize, fill_placeholder, second_segment, split_question

QUESTIONS = (
    "The @placeholder ended .",
    "@placeholder",
    "@placeholder 's end",
    'It \'s "@placeholder"',
    "né@placeholder…",
)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("option", ["war", "U.S.", "naïve café", "@placeholder"])
def test_span_holds_the_option_and_its_replacement_restores_the_question(question: str, option: str) -> None:
    text, (start, end) = fill_placeholder(question, option)
    assert text[start:end] == option
    assert text[:start] + PLACEHOLDER + text[end:] == question


def test_marks_stand_outside_the_span() -> None:
    text, (start, end) = fill_placeholder("The @placeholder 's end", "war", marks=MARKS)
    assert text == "The [OPTION] war [/OPTION] 's end"
    assert text[start:end] == "war"


def test_another_slot_token_is_filled() -> None:
    assert fill_placeholder("a ___ b", "x", "___") == ("a x b", (2, 3))


@pytest.mark.parametrize(
    ("question", "count"), [("no slot", 0), ("@placeholder or @placeholder", 2), ("@place holder", 0)]
)
def test_question_needs_exactly_one_slot(question: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"exactly one @placeholder in the question, found {count}: "):
        fill_placeholder(question, "x")
    with pytest.raises(ValueError, match=f"found {count}"):
        second_segment("concat", question, "x", mask_token="[MASK]")


@pytest.mark.parametrize(
    ("question", "filled"),
    [
        ("@placeholder is all", "éclair is all"),
        ('" @placeholder " is all', '" éclair " is all'),
        ("All is @placeholder", "All is éclair"),
    ],
)
def test_only_an_option_that_starts_the_question_gets_a_capital(question: str, filled: str) -> None:
    assert fill_placeholder(question, "éclair")[0] == filled
    text, (start, end) = fill_placeholder(question, "éclair", capitalize_initial=True)
    if question.startswith("All"):
        assert text == filled
    else:
        assert text == filled.replace("éclair", "Éclair")
        assert text[start:end] == "Éclair"


def test_modes_put_the_option_where_they_say() -> None:
    question, option = "The @placeholder ended .", "war"
    expected = {
        "fill": "The war ended .",
        "summary_only": "The war ended .",
        "option_only": "war",
        "concat": "The [MASK] ended . war",
        "concat_sep": "The [MASK] ended .[SEP] war",
    }
    for mode, text in expected.items():
        found, (start, end) = second_segment(mode, question, option, mask_token="[MASK]", sep_token="[SEP]")
        assert found == text
        assert found[start:end] == option
        found, (start, end) = second_segment(mode, question, option, mask_token="M", sep_token="S", marks=MARKS)
        assert found[:start].endswith("[OPTION] ") and found[end:].startswith(" [/OPTION]")


def test_modes_name_what_they_lack() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of fill, .* got 'filled'"):
        second_segment("filled", "@placeholder", "x")
    with pytest.raises(ValueError, match="give mask_token"):
        second_segment("concat", "@placeholder", "x")
    with pytest.raises(ValueError, match="needs sep_token"):
        second_segment("concat_sep", "@placeholder", "x", mask_token="M")


@pytest.mark.parametrize(
    ("tokenised", "text"),
    [
        ("He said , it 's over .", "He said, it's over."),
        ("It did n't end ( yet ) ; who 'll know ?", "It didn't end (yet); who'll know?"),
        ('He called it " @placeholder " .', 'He called it "@placeholder".'),
        ('" It ends . " he said', '"It ends." he said'),
        ("@placeholder 's cost : £ 300,000 or $ 2 m , 5 % more", "@placeholder's cost: £300,000 or $2 m, 5% more"),
        ("Lost 2 - 0 in a head - on way - alas", "Lost 2-0 in a head - on way - alas"),
        ('An odd " quote stays', 'An odd " quote stays'),
        ("the .22 rifle of the Wales ' team", "the .22 rifle of the Wales ' team"),
        ('Already. Fine, it\'s (so) "said".', 'Already. Fine, it\'s (so) "said".'),
    ],
)
def test_detokenize_closes_spaces_round_punctuation(tokenised: str, text: str) -> None:
    assert detokenize(tokenised) == text
    assert detokenize(text) == text


def test_split_question_gives_both_sides() -> None:
    assert split_question("a @placeholder b") == ("a ", " b")
