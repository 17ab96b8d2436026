"""P5: whole words, its loss, its scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.text_attack.pairs import TITLES, batch, victim
from zoo.text_attack.p5 import P5Rec

if TYPE_CHECKING:
    from pathlib import Path


def encoder_rows(made: Any, rows: Any) -> list[list[int]]:
    out = []
    for row in made.training_pieces(rows).tolist():
        table = made.tables.table
        ids = [t for p in row if p >= 0 for t in table.flat[table.starts[p] :][: table.lengths[p]].tolist()]
        out.append([*ids, made.tokenizer.eos_token_id])
    return out


def words_of(made: Any, ids: list[int]) -> list[int]:
    """Whole-word ids by a loop over the pieces' names."""
    out, count = [], 0
    for token in made.tokenizer.convert_ids_to_tokens(ids):
        count += token.startswith("Ġ")
        out.append(0 if token == "</s>" else count)
    return out


def one(made: Any, ids: list[int], decoder: list[int]) -> torch.Tensor:
    vectors = made.t5.shared(torch.tensor([ids]))
    if made.whole_words is not None:
        vectors = vectors + made.whole_words(torch.tensor([words_of(made, ids)]))
    return made.t5(inputs_embeds=vectors, decoder_input_ids=torch.tensor([decoder])).logits[0]


@pytest.mark.parametrize("prompt", ["p5_history", "p5_direct", "p5_recommend", "p5_ids"])
@pytest.mark.parametrize("whole_word", [True, False], ids=["words", "pieces"])
def test_loss_and_scores_are_those_of_prompts_on_their_own(prompt: str, whole_word: bool) -> None:
    made = victim(P5Rec, prompt=prompt, whole_word=whole_word, answers=["yes indeed", "no"])
    rows = batch()
    losses, scores = [], []
    for place, ids in enumerate(encoder_rows(made, rows)):
        answer = [*made.answers.rows[0 if rows.labels[place] > 0.5 else 1], made.tokenizer.eos_token_id]
        logits = one(made, ids, [made.start_id, *answer[:-1]])
        losses.append(F.cross_entropy(logits, torch.tensor(answer)))
        scores.append(torch.sigmoid(logits[0, made.answers.yes_id] - logits[0, made.answers.no_id]))
    torch.testing.assert_close(made.loss(rows), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    found = made.score_items(made.user_state(rows), rows.item_ids[:, None])[:, 0]
    torch.testing.assert_close(found, torch.stack(scores), atol=1e-5, rtol=1e-5)


def test_the_pieces_of_a_users_name_share_a_number_and_end_and_padding_have_none() -> None:
    made = victim(P5Rec)
    ids = made.tokenizer("for user_23 of", add_special_tokens=False)["input_ids"]
    row = torch.tensor([[*ids, made.tokenizer.eos_token_id, 0, 0]])
    words = made.whole_word_ids(row, (torch.arange(row.shape[1]) < len(ids) + 1).long()[None])[0].tolist()
    assert words == [*words_of(made, ids), 0, 0, 0]
    pieces = made.tokenizer.convert_ids_to_tokens(ids)
    own = [word for piece, word in zip(pieces, words, strict=False) if piece in ("2", "3", "_", "23", "_2")]
    assert set(own) == {2} and max(words) == 3


def test_only_a_prompt_without_titles_scores_all_titles_alike() -> None:
    for prompt, alike in (("p5_ids", True), ("p5_direct", False)):
        made = victim(P5Rec, prompt=prompt)
        scores = made.score(made.user_state(batch()), ["Mario", "Zelda"], torch.tensor([3, 3]))
        assert torch.equal(scores[:, 0], scores[:, 1]) == alike
        assert made.prompt.reads_title != alike
    made = victim(P5Rec, prompt="p5_ids")
    assert made.readable("Mario") == 0
    scores = made.score(made.user_state(batch()), ["Mario", "Mario"], torch.tensor([3, 4]))
    assert not torch.equal(scores[:, 0], scores[:, 1])


def test_users_that_come_later_are_named_by_their_numbers() -> None:
    made = victim(P5Rec, prompt="p5_direct")
    late = batch()._replace(user_ids=torch.tensor([0, 1, 1500, 1023, 1024, 7]))
    ids = encoder_rows(made, late)[2]
    assert "user_1500 ." in made.tokenizer.decode(ids)
    before = made.user_state(batch())
    first = made.score(before, ["Mario"])
    made.user_state(late._replace(user_ids=late.user_ids + 1500))
    assert torch.equal(made.score(before, ["Mario"]), first)


@pytest.mark.parametrize("users", [[0, 1, -1], [-1, -1, -1]], ids=["some", "all"])
def test_a_user_without_a_number_is_refused_where_the_prompt_holds_it(users: list[int]) -> None:
    rows = type(batch())(*(field[:3] for field in batch()))._replace(user_ids=torch.tensor(users))
    with pytest.raises(ValueError, match=r"the prompt p5_history holds \{user\}.*have no number"):
        victim(P5Rec).user_state(rows)
    own = {"header": "A user had", "tail": " a good choice ? {title}", "liked": {"start": " these:"}}
    assert victim(P5Rec, prompt=own).user_state(rows).pieces.shape[0] == 3


def test_a_folder_of_save_pretrained_serves_as_backbone(tmp_path: Path) -> None:
    made = victim(P5Rec)
    made.t5.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    read = P5Rec(backbone=str(tmp_path), max_tokens=256)
    read.set_titles(TITLES)
    with torch.no_grad():
        read.whole_words.weight.copy_(made.whole_words.weight)
    rows = batch()
    assert torch.equal(*(each.score_items(each.user_state(rows), rows.candidate_ids) for each in (made, read)))


def test_a_tiny_t5_learns_which_titles_are_liked() -> None:
    made = victim(P5Rec, prompt="p5_direct")
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    likes = torch.tensor(["Mario" in title for title in TITLES])
    draw = torch.Generator().manual_seed(0)
    for _ in range(80):
        items = torch.randint(len(TITLES), (32,), generator=draw)
        rows = batch(32)._replace(item_ids=items, labels=likes[items].float())
        optimizer.zero_grad()
        made.loss(rows).backward()
        optimizer.step()
    scores = made.score(made.user_state(batch()), ["Mario Star Quest", "Zelda Star Quest"])
    assert float(scores[:, 0].min()) > float(scores[:, 1].max()) + 0.3
