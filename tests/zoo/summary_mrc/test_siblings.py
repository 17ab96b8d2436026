"""ClozeScorer, GAReader and MaskedLM: what must not change a score, what they write, and what they read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from datamodules.cloze_tokenizer import load_tokenizer, tokenizer_fingerprint
from datamodules.passage_pieces import PassageBatch
from tests.zoo.summary_mrc.choices import (
    OPTIONS,
    TINY,
    TINY_LINE,
    WIDTH,
    WORDS,
    batches,
    fit,
    gradients,
    loader,
    padded,
    permuted,
    rows,
    tokenizer,
    tokens,
    trainer,
    uneven,
    whole,
    write,
)
from zoo.summary_mrc import ga_reader
from zoo.summary_mrc.cloze_scorer import ClozeScorer
from zoo.summary_mrc.encoders import build_text_encoder, encode
from zoo.summary_mrc.ga_reader import GAReader
from zoo.summary_mrc.masked_lm import MaskedLM
from zoo.summary_mrc.module import SummaryMRC

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = len(WORDS) + 5
ORDER = [3, 0, 4, 1, 2]
DROPLESS = {**TINY, "dropout": 0.0}
SIBLINGS = ("each", "first", "reader")


def cloze_scorer(kind: str = "bert", **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"encoder": "tiny", "encoder_options": {"kind": kind, **DROPLESS}, "vocab_size": SIZE}
    return uneven(ClozeScorer(**settings | options))


def reader(**options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": SIZE, "embedding_size": 6, "hidden_size": 5, "dropout": 0.0, "hops": 2}
    return uneven(GAReader(**settings | options))


def sibling(name: str) -> tuple[Any, Any]:
    """A module, and the questions in its layout."""
    if name == "reader":
        return reader(), lambda questions: tokens("reader", questions)
    return cloze_scorer(), lambda questions: tokens("cloze", questions, masks=name)


@pytest.mark.parametrize("name", SIBLINGS)
def test_permuted_options_have_permuted_scores(name: str) -> None:
    module, table = sibling(name)
    questions = rows()
    scores, other = (module(whole(table(some))) for some in (questions, permuted(questions, ORDER)))
    assert scores.shape == (12, OPTIONS) and bool((scores.std(1) > 1e-3).all())
    torch.testing.assert_close(other, scores[:, ORDER], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIBLINGS)
def test_padding_changes_no_score(name: str) -> None:
    module, table = sibling(name)
    found = table(rows())
    scores = module(whole(found))
    torch.testing.assert_close(module(padded(whole(found), cloze=name != "reader")), scores, rtol=0, atol=1e-5)
    for row in (int(found.lengths.argmin()), int(found.lengths.argmax())):
        torch.testing.assert_close(module(found[torch.tensor([row])])[0], scores[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SIBLINGS)
def test_training_reaches_all_weights_and_learns_the_questions(name: str) -> None:
    module, table = sibling(name)
    parts = batches(table(rows()), 6)
    first, found = gradients(module.train(), parts[0])
    assert found.keys() == {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    module.lr = 1e-2
    fit(module, parts, max_epochs=6)
    assert gradients(module, parts[0])[0] < first


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch = whole(tokens("cloze"))
    loss, expected = gradients(cloze_scorer().train(), batch)
    again, found = gradients(cloze_scorer(gradient_checkpointing=True).train(), batch)
    torch.testing.assert_close(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", [ClozeScorer, GAReader])
def test_the_layout_of_another_module_is_refused(module: Any) -> None:
    own = {"ClozeScorer": "cloze", "GAReader": "reader"}[module.__name__]
    options = {"encoder": "tiny"} if module is ClozeScorer else {}
    with pytest.raises(ValueError, match=rf"{module.__name__} needs --data\.encode {own}, got 'joint'"):
        module(vocab_size=SIZE, encode="joint", **options)


@pytest.mark.parametrize("module", [ClozeScorer, MaskedLM])
def test_an_encoder_too_small_for_the_data_is_refused(module: Any, tmp_path: Path) -> None:
    cloze_scorer().scorer.network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer has {SIZE + 1} tokens, the embedding of .* has {SIZE}"):
        module(str(tmp_path), vocab_size=SIZE + 1)

    class Long(LightningDataModule):
        max_length = 65

    runner = trainer()
    with pytest.raises(ValueError, match=r"--data\.max_length is 65, but the encoder \(BertForMaskedLM\) has 64"):
        runner.validate(module(str(tmp_path), vocab_size=SIZE), datamodule=Long())


def test_a_pretrained_masked_language_model_answers_without_training(run: Any, tmp_path: Path) -> None:
    network = build_text_encoder("tiny", vocab_size=SIZE, options=DROPLESS, head="masked_lm")
    vocabulary = tokenizer().get_vocab()
    with torch.no_grad():
        # It holds this word likelier than any other, wherever it stands.
        network.get_output_embeddings().bias[vocabulary["fjord"]] = 8.0
    network.save_pretrained(tmp_path / "encoder")
    tokenizer().save_pretrained(tmp_path / "encoder")
    questions = rows()
    for options, label in zip(questions.options, questions.labels.tolist(), strict=True):
        options[:] = [word for word in WORDS if word != "fjord"][:OPTIONS]
        options[label] = "fjord"
    folder = str(tmp_path / "encoder")
    path = write(questions, tmp_path / "questions.jsonl")
    cli = run(
        "test", "--model", "ClozeScorer", "--model.encoder", folder, "--data", "ClozeData", "--data.encode", "cloze",
        "--data.tokenizer", folder, "--data.path", path, "--data.val_path", path, "--data.drop_overlap", "false",
        "--data.max_length", "64", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    )  # fmt: skip
    metrics = cli.result["metrics"]
    assert metrics["test/acc"] == 1 and metrics["test/ties"] == 0
    assert metrics["test/prior/chance"] == pytest.approx(1 / OPTIONS)
    assert 0 < metrics["test/loss"] < 0.01


def masked_batch(*counts: int) -> PassageBatch:
    """Sequences of uneven length, with so many tokens to predict."""
    generator = torch.Generator().manual_seed(len(counts))
    shape = (len(counts), 14)
    ids = torch.randint(5, SIZE, shape, generator=generator)
    attention = (torch.arange(14) < torch.tensor([14 - row for row in range(len(counts))])[:, None]).long()
    labels = torch.full(shape, -100)
    for row, count in enumerate(counts):
        places = torch.randperm(14 - row, generator=generator)[:count]
        labels[row, places] = torch.randint(5, SIZE, (count,), generator=generator)
    types = (torch.arange(14) > 8).long() * attention
    return PassageBatch(ids * attention, attention, types, labels)


def masked_lm(**options: Any) -> Any:
    torch.manual_seed(0)
    return uneven(MaskedLM(**{"encoder": "tiny", "encoder_options": DROPLESS, "vocab_size": SIZE, **options}))


def whole_logits(module: Any, batch: PassageBatch) -> Tensor:
    logits = module.scorer.network(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    ).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")


def test_the_loss_at_masked_places_is_that_of_the_whole_logits() -> None:
    batch, found = masked_batch(3, 0, 5, 1), []
    for total in (lambda module: module.masked_loss(batch)[0], lambda module: whole_logits(module, batch)):
        module = masked_lm()
        loss = total(module)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in module.parameters())])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert int(masked_lm().masked_loss(batch)[1]) == 9


def test_a_batch_without_a_masked_token_has_no_loss_and_changes_nothing() -> None:
    module = masked_lm()
    total, count = module.masked_loss(masked_batch(0, 0))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert all(not bool(parameter.grad.any()) for parameter in module.parameters() if parameter.grad is not None)


def test_evaluation_of_a_masked_language_model_counts_tokens_and_not_batches() -> None:
    module, parts = masked_lm(), [masked_batch(3, 0, 5, 1), masked_batch(0), masked_batch(1, 1)]
    sums = torch.stack([whole_logits(module, batch) for batch in parts]).sum().item()
    for stage, key in (("validate", "val"), ("test", "test")):
        for _ in range(2):
            (found,) = getattr(trainer(), stage)(module, loader(parts), verbose=False)
            assert found == pytest.approx({f"{key}/loss": sums / 11, f"{key}/perplexity": math.exp(sums / 11)})


@pytest.mark.parametrize(
    ("options", "message"), [({"lr": 0.0}, "lr must be positive"), ({"weight_decay": -1.0}, "least 0")]
)
def test_values_of_pre_training_out_of_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_lm(**options)


@pytest.mark.parametrize("export", [False, True], ids=["run's folder", "folder of its own"])
def test_what_pre_training_writes_is_read_back_with_its_tokenizer(run: Any, tmp_path: Path, export: bool) -> None:
    common = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1")
    common += ("--trainer.log_every_n_steps", "1")
    passages = tmp_path / "passages.txt"
    passages.write_text("\n".join(rows(20).articles))
    cli = run(
        "fit", "--model", "MaskedLM", "--model.encoder_options", TINY_LINE, "--data", "PassageData",
        "--data.path", str(passages), "--data.tokenizer", "words", "--data.max_length", "64", *common,
        *(("--model.export", str(tmp_path / "exported")) if export else ()),
    )  # fmt: skip
    target = tmp_path / "exported" if export else cli.run_folder
    encoder, folder = str(target / "encoder"), str(target / "tokenizer")
    trained = cli.model.scorer.network.eval()
    own = load_tokenizer(folder, lambda: ())
    assert tokenizer_fingerprint(own) == tokenizer_fingerprint(cli.datamodule.tokenizer)
    batch = own([" ".join(WORDS[:9]), "cedar marsh"], padding=True, return_tensors="pt")
    inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    modules = [
        SummaryMRC(encoder, vocab_size=len(own)).encoder,
        ClozeScorer(encoder, vocab_size=len(own)).scorer.network,
    ]
    with torch.no_grad():
        expected = encode(trained, *inputs)
        for network in modules:
            assert torch.equal(encode(network.eval(), *inputs), expected)
        assert torch.equal(modules[1](*inputs).logits, trained(*inputs).logits)
    after = run(
        "fit", "--model", "SummaryMRC", "--model.encoder", encoder, "--data", "ClozeData", "--data.tokenizer", folder,
        "--data.path", write(rows(), tmp_path / "questions.jsonl"), "--data.max_length", "64", *common,
    )  # fmt: skip
    assert after.model.encoder.config.hidden_size == WIDTH
    assert tokenizer_fingerprint(
        load_tokenizer(str(after.run_folder / "tokenizer"), lambda: ())
    ) == tokenizer_fingerprint(own)


class Questions(LightningDataModule):
    tokenizer = tokenizer()

    def train_dataloader(self) -> Any:
        return loader(batches(tokens("reader"), 6))


@pytest.fixture
def vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    """A file with the vectors of some words, and a list that grows with each time it is read."""
    path = tmp_path / "vectors.txt"
    known = WORDS[:7]
    path.write_text("".join(f"{word} {place} 2 3 4 5 {-place}\n" for place, word in enumerate(known)))
    found: list[Any] = []
    read = ga_reader.read_word_vectors
    monkeypatch.setattr(ga_reader, "read_word_vectors", lambda *args: found.append(args) or read(*args))
    return str(path), found


def fit_reader(module: Any, folder: Path, epochs: int, **options: Any) -> Any:
    runner = trainer(folder, max_epochs=epochs, limit_val_batches=0, num_sanity_val_steps=0)
    data = Questions()
    data.val_dataloader = data.train_dataloader
    runner.fit(module.train(), datamodule=data, **options)
    return runner


def test_word_vectors_are_read_once_for_the_words_that_have_one(vectors: Any, tmp_path: Path) -> None:
    path, read = vectors
    module = reader(word_vectors=path, lr=1e-9)
    before = module.reader.embedding.weight.detach().clone()
    fit_reader(module, tmp_path, 1)
    weight = module.reader.embedding.weight.detach()
    ids = tokenizer().convert_tokens_to_ids(WORDS[:7])
    expected = torch.tensor([[place, 2, 3, 4, 5, -place] for place in range(7)]).float()
    torch.testing.assert_close(weight[ids], expected, rtol=0, atol=1e-5)
    others = [row for row in range(SIZE) if row not in ids]
    torch.testing.assert_close(weight[others], before[others], rtol=0, atol=1e-5)
    assert module.vectors_read and len(read) == 1
    fit_reader(module, tmp_path, 1)
    trainer().validate(module, loader(batches(tokens("reader"))), verbose=False)
    assert len(read) == 1


def test_a_resumed_reader_keeps_what_it_has_learnt(vectors: Any, tmp_path: Path) -> None:
    path, read = vectors
    module = reader(word_vectors=path, lr=0.1)
    runner = fit_reader(module, tmp_path, 2)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    (tmp_path / "vectors.txt").unlink()
    again = reader(word_vectors=path, lr=0.1)
    fit_reader(again, tmp_path, 2, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(again.reader.embedding.weight, module.reader.embedding.weight)
    loaded = GAReader.load_from_checkpoint(tmp_path / "half.ckpt")
    fit_reader(loaded, tmp_path, 1)
    assert len(read) == 1


def test_word_vectors_need_a_tokenizer(vectors: Any) -> None:
    with pytest.raises(ValueError, match="word_vectors needs a datamodule with a tokenizer"):
        fit(reader(word_vectors=vectors[0]), batches(tokens("reader")))
