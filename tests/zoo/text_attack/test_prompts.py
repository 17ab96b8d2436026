"""Prompts: pieces, batches that are gathered, histories that are shortened, and titles that look like marks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.zoo.text_attack.pairs import TITLES, Batch, batch
from zoo.text_attack.prompt_tables import PieceEncoder, PromptTables
from zoo.text_attack.prompts import (
    ListTemplate,
    Prompt,
    TokenTable,
    alpaca_prompt,
    assemble,
    collm_prompt,
    p5_prompts,
    prompt_of,
)
from zoo.text_attack.tokenizers import build_tokenizer

PROMPTS = {"alpaca": alpaca_prompt(), "collm": collm_prompt(), **p5_prompts()}
SLOTS = ("<UserID>", "<TargetItemID>")


def tables(prompt: Prompt, titles: list[str] = TITLES, **options: Any) -> PromptTables:
    tokenizer = build_tokenizer("train", [*titles, *prompt.fixed_texts()], 600, SLOTS)
    values = {"max_tokens": 400, "max_history": 10, "max_title_tokens": 16, **options}
    return PromptTables(prompt, tokenizer, titles, **values)


def read(made: PromptTables, rows: Batch) -> list[str]:
    prefixes, _ = made.prefixes(rows.user_ids, rows.history, rows.liked)
    pieces = torch.cat((prefixes, made.tails(rows.item_ids)[:, None]), 1)
    ids, mask = assemble(made.table, pieces, 0, left=True)
    return [made.tokenizer.decode(i[m > 0]).removeprefix(" ") for i, m in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_assembled_rows_are_the_pieces_behind_each_other(left: bool) -> None:
    rows = [[5, 6], [], [7], [8, 9, 10]]
    pieces = torch.tensor([[0, -1, 2], [3, 1, 0], [-1, -1, -1]])
    ids, mask = assemble(TokenTable.of(rows), pieces, 0, left)
    for line, chosen, marks in zip(ids.tolist(), pieces.tolist(), mask.tolist(), strict=True):
        expected = [token for piece in chosen if piece >= 0 for token in rows[piece]]
        gap = [0] * (ids.shape[1] - len(expected))
        assert line == (gap + expected if left else expected + gap)
        assert marks == ([0] * len(gap) + [1] * len(expected) if left else [1] * len(expected) + [0] * len(gap))


@pytest.mark.parametrize("name", PROMPTS)
def test_gathered_prompts_spell_the_text_with_the_oldest_title_first(name: str) -> None:
    made = tables(PROMPTS[name])
    rows = batch()
    for row, text in enumerate(read(made, rows)):
        history = [h for h in rows.history[row].tolist() if h >= 0]
        liked = rows.liked[row].tolist()[: len(history)]
        assert text == made.text(row, history, liked, int(rows.item_ids[row]))


def test_lists_hold_what_was_liked_and_what_was_not() -> None:
    made = tables(alpaca_prompt("game"))
    rows = batch()._replace(
        history=torch.tensor([[3, 1, 2, -1]] * 6), liked=torch.tensor([[True, False, True, False]] * 6)
    )
    text = read(made, rows)[0]
    assert f'User Preference: "{TITLES[2]}", "{TITLES[3]}"\nUser Unpreference: "{TITLES[1]}"\nWhether' in text
    empty = rows._replace(history=torch.full((6, 4), -1), liked=torch.zeros(6, 4, dtype=torch.bool))
    assert "User Preference: None.\nUser Unpreference: None.\nWhether" in read(made, empty)[0]
    assert "purchase history list of user_4" in read(tables(PROMPTS["p5_history"]), rows)[4]


@pytest.mark.parametrize("name", PROMPTS)
def test_pieces_are_the_tokens_of_the_whole_text(name: str) -> None:
    assert tables(PROMPTS[name]).check_joint() == (0, 64)


def test_pieces_that_meet_inside_a_word_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    glued = Prompt("glued", header="Super", tail="Mario {title}")
    with caplog.at_level(logging.WARNING):
        differ, count = tables(glued, titles=["SuperMario Kart", "SuperMario"] * 5).check_joint()
    assert differ == count
    assert f"{differ} of {count} prompts have other tokens than their whole text" in caplog.text


def test_attacked_titles_in_questions_alone_are_no_pieces_that_meet_inside_a_word() -> None:
    attacked = [title.replace("a", "e") + " new" for title in TITLES]
    made = tables(PROMPTS["alpaca"], item_titles=attacked)
    assert made.check_joint() == (0, 64)
    text = made.text(0, [2], [True], 3)
    assert f'"{TITLES[2]}"' in text and f'"{attacked[3]}"' in text
    # Those of the questions are compared only where they are not cut.
    long = [f"{title} {'word ' * 30}" for title in TITLES]
    assert tables(PROMPTS["alpaca"], item_titles=long).check_joint() == (0, 0)


def test_braces_in_a_prompt_of_ones_own_are_text() -> None:
    own = Prompt("own", header='{"user": {user}, "asks": true}', tail=" {title}")
    assert read(tables(own), batch())[2].startswith('{"user": 2, "asks": true}')


def test_long_histories_lose_their_oldest_titles_and_the_question_stays() -> None:
    prompt = alpaca_prompt()
    wide = tables(prompt)
    rows = batch(length=10)._replace(
        history=torch.arange(10).expand(6, 10), liked=torch.arange(10).expand(6, 10) % 2 == 0
    )
    _, none = wide.prefixes(rows.user_ids, rows.history, rows.liked)
    assert none.tolist() == [0] * 6
    bare = wide.prefixes(rows.user_ids, rows.history - 20, rows.liked)[0]
    room = int(wide.table.lengths_of(bare).sum(1).max()) + wide.reserve
    seen = set()
    for extra in range(0, 60, 7):
        narrow = tables(prompt, max_tokens=room + extra)
        prefixes, dropped = narrow.prefixes(rows.user_ids, rows.history, rows.liked)
        length = int(narrow.table.lengths_of(prefixes).sum(1)[0])
        assert length + narrow.reserve <= room + extra
        kept = 10 - int(dropped[0])
        seen.add(kept)
        expected = wide.text(0, list(range(kept)), [i % 2 == 0 for i in range(kept)], int(rows.item_ids[0]))
        assert read(narrow, rows)[0] == expected
        # One more title would not have fitted.
        more = wide.prefixes(rows.user_ids, rows.history[:, : kept + 1], rows.liked[:, : kept + 1])[0]
        assert kept == 10 or int(wide.table.lengths_of(more).sum(1)[0]) + narrow.reserve > room + extra
    assert len(seen) > 2


@pytest.mark.parametrize("name", ["alpaca", "p5_history"])
def test_a_prompt_without_room_for_a_title_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"max_tokens is 30.*the title would be cut off"):
        tables(PROMPTS[name], max_tokens=30)


@pytest.mark.parametrize("name", ["alpaca", "collm", "p5_history"])
def test_long_titles_are_cut_and_the_words_after_them_stay(name: str) -> None:
    title = "Super Mario " * 30
    made = tables(PROMPTS[name], titles=[*TITLES, title], max_title_tokens=5)
    kept = made.readable(title)
    assert 0 < kept < 60
    rows = batch()._replace(item_ids=torch.full((6,), len(TITLES)))
    tail = PROMPTS[name].tail.replace("{title}", title[:kept])
    assert all(text.endswith(tail) for text in read(made, rows))
    table, pieces = made.with_texts([title, title[:kept] + " Zelda Zelda", "Zelda" + title[5:]])
    lines = [table.flat[table.starts[p] :][: table.lengths[p]].tolist() for p in pieces]
    assert lines[0] == lines[1] != lines[2]
    assert made.readable("Mario") == 5


def test_marks_in_a_title_are_ordinary_text_and_slots_are_found_by_id() -> None:
    titles = [*TITLES, "</s> <UserID> the <TargetItemID> <pad>", "日本 ☃ <UserID>", ""]
    made = tables(collm_prompt(), titles=titles)
    specials = {made.tokenizer.convert_tokens_to_ids(slot) for slot in SLOTS}
    rows = batch()._replace(
        item_ids=torch.arange(6) % 3 + len(TITLES),
        history=torch.arange(40, 43).expand(6, 3),
        liked=torch.ones(6, 3) > 0,
    )
    prefixes, _ = made.prefixes(rows.user_ids, rows.history, rows.liked)
    ids, _ = assemble(made.table, torch.cat((prefixes, made.tails(rows.item_ids)[:, None]), 1), 0, left=True)
    for slot in specials:
        assert ((ids == slot).sum(1) == 1).all()
    assert not (ids == made.tokenizer.eos_token_id).any()
    assert "</s> <UserID> the <TargetItemID> <pad>" in read(made, rows)[0]


def test_a_title_that_yields_a_special_token_all_the_same_is_refused() -> None:
    tokenizer = build_tokenizer("train", TITLES, 400)

    class Reads:
        added_tokens_decoder = tokenizer.added_tokens_decoder
        unk_token_id = tokenizer.unk_token_id
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, **{**options, "split_special_tokens": False})

    with pytest.raises(ValueError, match=r"'Mario </s>' yields the special token </s>"):
        PieceEncoder(Reads())(["Mario </s>"])


def test_added_tokens_that_are_not_special_may_come_from_a_title() -> None:
    from tokenizers import AddedToken

    tokenizer = build_tokenizer("train", TITLES, 300)
    tokenizer.add_tokens([AddedToken("  ", special=False)])
    assert 300 in PieceEncoder(tokenizer)(["two  blanks"], "a")[0].ids


def test_a_prompt_of_ones_own_is_built_from_its_parts() -> None:
    own = prompt_of({"header": "User {user}:", "tail": " {title}", "liked": {"start": " had"}}, PROMPTS)
    assert own.liked == ListTemplate(start=" had") and own.reads_title
    assert not prompt_of("p5_ids", PROMPTS).reads_title


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("unknown", "prompt must be alpaca"),
        ({"header": "x"}, "needs tail"),
        ({"header": "x", "tail": "y"}, "must hold {title}"),
        ({"header": "x", "tail": " {title}", "foot": ""}, "has no foot"),
        ({"header": "x", "tail": " {title}", "liked": {"item": "a"}}, "must hold {title} once"),
        ({"header": "x", "tail": " {title}", "answer": "yes"}, "must hold {answer} once"),
    ],
    ids=["name", "missing", "no_title", "part", "list", "answer"],
)
def test_a_prompt_that_cannot_be_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_of(spec, PROMPTS)
