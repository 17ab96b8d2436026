"""The gated-attention reader against a reading row by row, its symmetries, and files of word vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.summary_mrc.reader import GatedAttentionReader, read_word_vectors

if TYPE_CHECKING:
    from pathlib import Path

PASSAGES = (7, 3, 0)
QUESTIONS = (4, 2, 5)
PIECES = ((1, 2, 1, 1), (3, 1, 2, 2), (1, 1, 1, 1))


def reader(hops: int = 2, **options: Any) -> GatedAttentionReader:
    torch.manual_seed(0)
    built = GatedAttentionReader(30, embedding_size=5, hidden_size=4, hops=hops, **options).double().eval()
    for parameter in built.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return built


def batch(extra: int = 0) -> tuple[Tensor, ...]:
    """Passages, questions and options of several lengths, with as much more padding as asked for."""
    generator = torch.Generator().manual_seed(3)
    passage = torch.randint(2, 30, (3, 7), generator=generator)
    question = torch.randint(2, 30, (3, 5), generator=generator)
    options = torch.randint(2, 30, (3, 4, 3), generator=generator)
    fields: list[Tensor] = []
    for ids, lengths in (
        (passage, torch.tensor(PASSAGES)),
        (question, torch.tensor(QUESTIONS)),
        (options, torch.tensor(PIECES)),
    ):
        mask = torch.arange(ids.shape[-1] + extra) < lengths[..., None]
        fields += [F.pad(ids, (0, extra), value=1).masked_fill(~mask, 1), mask]
    return (*fields[:4], torch.tensor([2, 1, 0]), *fields[4:])


def both_ways(lstms: Any, inputs: Tensor) -> Tensor:
    """One bidirectional LSTM of PyTorch over a row `(length, in)` without padding."""
    whole = nn.LSTM(inputs.shape[1], lstms.onward.hidden_size, bidirectional=True, batch_first=True).double()
    onward, back = lstms.onward.state_dict(), lstms.back.state_dict()
    whole.load_state_dict({**onward, **{f"{name}_reverse": value for name, value in back.items()}})
    out: Tensor = whole(inputs[None])[0][0]
    return out


@torch.no_grad()
def row_by_row(model: GatedAttentionReader, *fields: Tensor) -> Tensor:
    passages, _, questions, _, slots, options, _ = fields
    scores = torch.zeros(3, 4, dtype=torch.float64)
    for row in range(3):
        x = model.embedding(passages[row, : PASSAGES[row]])
        question = model.embedding(questions[row, : QUESTIONS[row]])
        for hop, (first, second) in enumerate(zip(model.passage_lstms, model.question_lstms, strict=True)):
            q = both_ways(second, question)
            d = both_ways(first, x) if len(x) else torch.zeros(0, 8, dtype=torch.float64)
            if hop < len(model.passage_lstms) - 1:
                x = torch.zeros_like(d)
                for place in range(len(d)):
                    weights = torch.tensor([float(d[place] @ state) for state in q], dtype=torch.float64).exp()
                    x[place] = d[place] * sum(w * state for w, state in zip(weights / weights.sum(), q, strict=True))
        slot = q[slots[row]]
        read = torch.zeros(8, dtype=torch.float64)
        if len(d):
            weights = torch.stack([state @ model.slot_attention.weight @ slot for state in d]).exp()
            read = sum(w * state for w, state in zip(weights / weights.sum(), d, strict=True))
        wanted = model.scorer.weight @ torch.cat([read, slot])
        for option in range(4):
            states = both_ways(model.option_lstm, model.embedding(options[row, option, : PIECES[row][option]]))
            scores[row, option] = states.sum(0) / len(states) @ wanted
    return scores


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_scores_are_those_of_reading_row_by_row_without_padding(hops: int) -> None:
    model = reader(hops)
    expected = row_by_row(model, *batch())
    assert expected.std() > 0.01
    torch.testing.assert_close(model(*batch()), expected)


def test_padding_changes_no_score() -> None:
    model = reader()
    torch.testing.assert_close(model(*batch(extra=4)), model(*batch()))


def test_permuted_options_have_permuted_scores() -> None:
    model, order = reader(), torch.tensor([2, 3, 0, 1])
    *fields, options, mask = batch()
    torch.testing.assert_close(model(*fields, options[:, order], mask[:, order]), model(*batch())[:, order])


def test_every_part_is_read() -> None:
    model = reader()
    scores = model(*batch())
    for place, row in ((0, 0), (2, 1), (5, 2)):
        fields = [field.clone() for field in batch()]
        fields[place][row, 0] = fields[place][row, 0] % 28 + 2
        changed = (model(*fields) - scores).abs() > 1e-6
        assert bool(changed[row].any()) and int(changed.any(1).sum()) == 1
    fields = list(batch())
    fields[4] = torch.tensor([1, 0, 3])
    assert bool(((model(*fields) - scores).abs() > 1e-6).any(1).all())


def test_batches_without_any_passage_have_scores_and_gradients() -> None:
    model = reader()
    passage, mask, *others = batch()
    empty = model(passage[:, :0], mask[:, :0], *others)
    torch.testing.assert_close(empty, model(passage, torch.zeros_like(mask), *others))
    torch.testing.assert_close(empty[2], model(*batch())[2])
    empty.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_weight_learns() -> None:
    model = reader()
    F.cross_entropy(model(*batch()), torch.tensor([0, 1, 2])).backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters())


def test_a_scorer_of_zeros_gives_the_loss_log_k() -> None:
    model = reader()
    nn.init.zeros_(model.scorer.weight)
    loss = F.cross_entropy(model(*batch()), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(loss, torch.tensor(4.0, dtype=torch.float64).log())


def test_dropout_is_before_lstms_only() -> None:
    model = reader(dropout=0.5).train()
    seen: list[Tensor] = []
    model.dropout.register_forward_hook(lambda module, args, out: seen.append(out))
    inputs: list[Tensor] = []
    lstms = [*model.passage_lstms, *model.question_lstms, model.option_lstm]
    for lstm in lstms:
        lstm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(*batch())
    assert len(seen) == len(lstms)
    assert all(any(given is dropped for dropped in seen) for given in inputs)
    assert [type(module) for module in model.modules() if "Dropout" in type(module).__name__] == [nn.Dropout]
    assert all(lstm.onward.dropout == lstm.back.dropout == 0 for lstm in lstms)


def test_autocast_gives_scores_in_float32() -> None:
    model = reader().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(*batch())
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model(*batch()), rtol=0.1, atol=0.05)
    assert (scores[0].bfloat16().float() != scores[0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hops": 0}, "hops must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedAttentionReader(**{"vocab_size": 9, **options})


VOCABULARY = {"[PAD]": 0, "the": 1, "naïve": 2, ".": 3, "other": 4}


def written(folder: Path, text: str) -> Path:
    path = folder / "vectors.txt"
    path.write_bytes(text.encode())
    return path


def test_vectors_of_the_vocabulary_are_read_and_no_others(tmp_path: Path) -> None:
    text = "the 0.5 -1 2e-1\nThe 9 9 9\nnaïve 1 2 3\n. . . 7 7 7\n. 4 5 6\nthe 8 8 8\nunknown x y z\n"
    for file in (text, text.replace("\n", "\r\n"), "6 3\n" + text.replace("\n", " \n")):
        found = read_word_vectors(written(tmp_path, file), VOCABULARY, 3)
        assert list(found) == [1, 2, 3]
        expected = torch.tensor([[0.5, -1, 0.2], [1, 2, 3], [4, 5, 6]])
        assert torch.equal(torch.stack(list(found.values())), expected)


def test_lines_that_are_not_utf8_do_not_matter_for_other_words(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_bytes(b"the 1 2\n\xff\xfe 3 4\nother 5 6\n")
    assert list(read_word_vectors(tmp_path / "v.txt", VOCABULARY, 2)) == [1, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2\n", r"line 1: a text line with a word and 3 numbers was expected, there are 2; set embedding_size"),
        ("the 1 2 3 4\n", "line 1: .* there are 4"),
        ("400000 300\nthe 1 2 3\n", "line 1: .* there are 300"),
        ("", "has no word of the vocabulary"),
        ("x 1 2 3\nthe 1 2\n", "line 2: 2 numbers after 'the', expected 3"),
        ("x 1 2 3\nthe 1 two 3\n", "line 2: could not convert string to float: .*two"),
        ("the 1 2 3\nother 1 nan 3\n", "line 2: a number is not finite"),
        ("x 1 2 3\n", r"has no word of the vocabulary \(5 words, case counts\)"),
    ],
)
def test_damaged_or_unfit_files_are_named_with_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_word_vectors(path, VOCABULARY, 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*glove\.txt of word vectors"):
        read_word_vectors(tmp_path / "glove.txt", VOCABULARY, 3)
