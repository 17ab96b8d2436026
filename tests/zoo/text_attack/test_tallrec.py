"""TALLRec: its losses, its learning, and its adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.text_attack.pairs import TITLES, batch, victim
from zoo.text_attack.tallrec import TALLRec

if TYPE_CHECKING:
    from pathlib import Path


def rows_of(made: Any, rows: Any) -> list[tuple[list[int], int]]:
    """Tokens of each prompt with its answer, and the length of the answer."""
    out = []
    for place, row in enumerate(made.training_pieces(rows).tolist()):
        table = made.tables.table
        ids = [t for p in row if p >= 0 for t in table.flat[table.starts[p] :][: table.lengths[p]].tolist()]
        answer = made.endings()[0 if rows.labels[place] > 0.5 else 1]
        out.append(([*ids, *answer], len(answer)))
    return out


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_the_loss_is_the_mean_over_tokens_of_prompts_on_their_own(loss_on: str) -> None:
    made = victim(TALLRec, loss_on=loss_on, answers=["Yes of course", "No"])
    rows = batch()
    losses = []
    for ids, length in rows_of(made, rows):
        logits = made.decoder(input_ids=torch.tensor([ids])).logits[0]
        each = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        losses.append(each if loss_on == "all" else each[-length:])
    torch.testing.assert_close(made.loss(rows), torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)


def test_the_score_is_that_of_the_answers_first_token_after_the_prompt() -> None:
    made = victim(TALLRec)
    rows = batch()
    scores = made.score_items(made.user_state(rows), rows.item_ids[:, None])[:, 0]
    for place, (ids, length) in enumerate(rows_of(made, rows)):
        logits = made.decoder(input_ids=torch.tensor([ids[:-length]])).logits[0, -1]
        expected = torch.sigmoid(logits[made.answers.yes_id] - logits[made.answers.no_id])
        torch.testing.assert_close(scores[place], expected, atol=1e-5, rtol=1e-5)
    assert made.tokenizer.decode([made.answers.yes_id]).strip() in "Yes."
    made.double_softmax = True
    squeezed = made.score_items(made.user_state(rows), rows.item_ids[:, None])
    assert float(squeezed.max() - squeezed.min()) < float(scores.max() - scores.min()) and float(squeezed.max()) < 0.74


def test_a_tiny_decoder_learns_which_titles_of_the_catalogue_are_liked() -> None:
    made = victim(TALLRec, loss_on="answer", prompt={"header": "The title is", "tail": " {title}?\n"})
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    likes = torch.tensor(["Mario" in title for title in TITLES])
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        items = torch.randint(len(TITLES), (32,), generator=draw)
        rows = batch(32)._replace(item_ids=items, labels=likes[items].float())
        optimizer.zero_grad()
        made.loss(rows).backward()
        optimizer.step()
    scores = made.score(made.user_state(batch()), TITLES)
    assert float(scores[:, likes].min()) > float(scores[:, ~likes].max()) + 0.3


def test_only_adapters_are_trained_and_they_are_exported(tmp_path: Path) -> None:
    made = victim(TALLRec, lora={"r": 2})
    assert all("lora_" in name for name, parameter in made.named_parameters() if parameter.requires_grad)
    made.export_adapter(tmp_path)
    other = victim(TALLRec, adapter=str(tmp_path))
    with torch.no_grad():
        for (name, value), (_, wanted) in zip(other.named_parameters(), made.named_parameters(), strict=True):
            if "lora_" not in name:
                value.copy_(wanted)
        for name, value in other.named_parameters():
            if "lora_" in name:
                value.copy_(dict(made.named_parameters())[name])
    rows = batch()
    assert torch.equal(*(each.score_items(each.user_state(rows), rows.candidate_ids) for each in (made, other)))


def test_a_folder_of_save_pretrained_serves_as_backbone_with_its_own_tokenizer(tmp_path: Path) -> None:
    made = victim(TALLRec)
    made.decoder.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    read = TALLRec(backbone=str(tmp_path), max_tokens=256)
    assert all(module.training for module in read.modules())
    read.set_titles(TITLES)
    rows = batch()
    assert torch.equal(*(each.score_items(each.user_state(rows), rows.candidate_ids) for each in (made, read)))
    with pytest.raises(ValueError, match="hidden_size: backbone_options are for 'tiny' only"):
        TALLRec(backbone=str(tmp_path), backbone_options={"hidden_size": 8})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TALLRec(backbone=str(tmp_path / "nowhere"), tokenizer="train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": "prompt"}, "loss_on must be one of all, answer"),
        ({"prompt": {"header": "x <UserID>", "tail": " {title}"}}, "places for vectors"),
        ({"max_tokens": 4000}, "max_tokens is 4000, tiny takes 2048"),
        ({"prompt": "p5"}, "prompt must be alpaca, collm"),
    ],
    ids=["loss", "slots", "positions", "prompt"],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        victim(TALLRec, **options)
