"""The tagger of emotions."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from lightning import LightningDataModule, Trainer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.common.checkpoints import AtomicCheckpointIO
from zoo.eacm.tagger import EmotionTagger
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAMES = ["none", "happy", "sad"]
FILLERS = ["i", "am", "so", "we", "are", "today"]
SIGNS = [["ok", "fine"], ["glad", "great"], ["cry", "alone"]]
LENGTH = 6


def tokenizer(words: Sequence[str]) -> Tokenizer:
    table = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "[GO]", "[SEP]", *words])}
    made = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


WORDS = FILLERS + [word for signs in SIGNS for word in signs]
VOCABULARY = DialogueVocabulary(tokenizer(WORDS[::-1]), tokenizer(WORDS), NAMES)


class Batch(NamedTuple):
    post_ids: Tensor
    post_mask: Tensor
    reply_in: Tensor
    reply_out: Tensor
    reply_mask: Tensor
    post_emotion: Tensor
    reply_emotion: Tensor
    post_emotion_known: Tensor
    reply_emotion_known: Tensor
    keys: Tensor
    indices: Tensor
    post_text: list[str]
    reply_text: list[str]


def rows(count: int, seed: int = 0, known: bool = True) -> list[tuple[str, str, int]]:
    """Replies whose emotion their last word gives away; posts are of the next class."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        label, sign = int(torch.randint(3, (), generator=draw)), int(torch.randint(2, (), generator=draw))
        size = int(torch.randint(1, LENGTH - 2, (), generator=draw))
        before = [FILLERS[place] for place in torch.randint(len(FILLERS), (size,), generator=draw).tolist()]
        reply, post = " ".join([*before, SIGNS[label][sign]]), " ".join([SIGNS[(label + 1) % 3][sign], *before])
        made.append((post, reply, label if known else -1))
    return made


def collate(part: list[tuple[int, tuple[str, str, int]]], vocabulary: DialogueVocabulary = VOCABULARY) -> Batch:
    indices = torch.tensor([index for index, _ in part])
    posts, replies = [row[0] for _, row in part], [row[1] for _, row in part]
    labels = torch.tensor([row[2] for _, row in part])

    def padded(texts: list[list[int]]) -> Tensor:
        return torch.tensor([text + [0] * (LENGTH + 1 - len(text)) for text in texts])

    post_ids = padded([vocabulary.post.encode(text).ids for text in posts])
    ids = [vocabulary.reply.encode(text).ids for text in replies]
    reply_in, reply_out = padded([[3, *text] for text in ids]), padded([[*text, 2] for text in ids])
    hot = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
    return Batch(
        post_ids, post_ids > 0, reply_in, reply_out, reply_out > 0, hot.roll(1, 1), hot, labels >= 0, labels >= 0,
        indices, indices, posts, replies,
    )  # fmt: skip


class Data(LightningDataModule):
    def __init__(self, vocabulary: DialogueVocabulary = VOCABULARY, count: int = 96) -> None:
        super().__init__()
        self.post_tokenizer, self.reply_tokenizer = vocabulary.post, vocabulary.reply
        self.label_names = vocabulary.label_names
        self._vocabulary, self._count = vocabulary, count

    def _loader(self, seed: int, batch_size: int = 16) -> DataLoader[Any]:
        part: Any = list(enumerate(rows(self._count, seed)))
        return DataLoader(part, batch_size=batch_size, collate_fn=lambda some: collate(some, self._vocabulary))

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(1, batch_size=11)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(2)


def new_tagger(**options: Any) -> EmotionTagger:
    torch.manual_seed(0)
    sizes = {"num_emotions": 3, "post_vocab_size": len(WORDS) + 5, "reply_vocab_size": len(WORDS) + 5}
    tagger = EmotionTagger(**{**sizes, "hidden_size": 16, "embedding_size": 8, "lr": 0.01, "dropout": 0.1, **options})
    tagger.vocabulary = VOCABULARY
    return tagger


def trainer(folder: Path, epochs: int = 4) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a tokenizer of its own, as save_pretrained writes them."""
    import transformers

    folder = tmp_path_factory.mktemp("bert")
    own = tokenizer([*WORDS, "[CLS]"])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    wrapped.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(wrapped), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("encoder", ["gru", "tiny", "folder"])
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_it_learns_and_a_checkpoint_alone_tags_the_same(
    tmp_path: Path, hub_folder: Path, encoder: str, head: str
) -> None:
    name = str(hub_folder) if encoder == "folder" else encoder
    tagger = new_tagger(encoder=name, head=head)
    tagger.vocabulary = None
    fit = trainer(tmp_path)
    fit.fit(tagger, datamodule=Data())
    assert {"train/loss", tagger.monitor, "val/acc", "val/multilabel_f1"} <= set(fit.callback_metrics)
    found = fit.test(tagger, datamodule=Data(), verbose=False)[0]
    assert found["test/acc"] > 0.95 and found["test/macro_f1"] > 0.95
    path = tmp_path / "tagger.ckpt"
    fit.save_checkpoint(path)
    loaded = EmotionTagger.load_from_checkpoint(path, map_location="cpu")
    assert loaded.label_names == NAMES
    texts = [reply for _, reply, _ in rows(20, seed=5)]
    ours, theirs = tagger.tag(texts), loaded.tag(texts)
    assert torch.equal(ours.probabilities, theirs.probabilities)
    assert (theirs.primary == torch.tensor([label for _, _, label in rows(20, seed=5)])).float().mean() > 0.9
    assert theirs.primary.shape == theirs.secondary.shape == (20,) and theirs.probabilities.shape == (20, 3)


@pytest.mark.parametrize("encoder", ["gru", "tiny", "folder"])
def test_padding_and_neighbours_do_not_change_a_text(hub_folder: Path, encoder: str) -> None:
    tagger = new_tagger(encoder=str(hub_folder) if encoder == "folder" else encoder)
    texts = ["glad", "i am so cry", "", "we are we are ok"]
    together = tagger.tag(texts).probabilities
    alone = torch.cat([tagger.tag([text]).probabilities for text in texts])
    assert torch.allclose(together, alone, atol=1e-6) and together.isfinite().all()
    assert torch.allclose(tagger.tag(texts, batch_size=3).probabilities, together, atol=1e-6)
    ids, mask = tagger.encode(texts, "reply")
    tagger.eval()
    wider = torch.cat((ids, torch.full((4, 3), 7)), 1), torch.cat((mask, torch.zeros(4, 3).bool()), 1)
    assert torch.allclose(tagger(*wider, "reply"), tagger(ids, mask, "reply"), atol=1e-6)
    assert tagger.tag([]).probabilities.shape == (0, 3)


def test_a_batch_is_read_as_its_texts_are_tagged() -> None:
    tagger = new_tagger(side="both")
    batch = collate(list(enumerate(rows(9))))
    tagger.eval()
    logits, targets, known = tagger.examples(batch)
    expected = [tagger.tag(batch.post_text, "post"), tagger.tag(batch.reply_text, "reply")]
    assert torch.allclose(logits.softmax(1), torch.cat([tags.probabilities for tags in expected]), atol=1e-6)
    assert torch.equal(targets, torch.cat((batch.post_emotion, batch.reply_emotion))) and known.all()
    assert torch.equal(tagger.tag(batch.reply_text).primary, expected[1].primary)


def test_rows_whose_emotion_is_not_known_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tagger = new_tagger(dropout=0.0)
    monkeypatch.setattr(tagger, "log", lambda *_, **__: None)
    known, unknown = rows(6), rows(5, seed=1, known=False)
    expected = tagger.training_step(collate(list(enumerate(known))), 0)
    found = tagger.training_step(collate(list(enumerate(known + unknown))), 0)
    assert torch.allclose(found, expected, atol=1e-6) and expected > 0.1
    nothing = tagger.training_step(collate(list(enumerate(unknown))), 0)
    nothing.backward()
    assert nothing == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in tagger.parameters())
    tagger.validation_step(collate(list(enumerate(known + unknown))), 0)
    assert int(tagger.metrics.confusion.sum()) == 6


def test_the_loss_is_the_mean_over_rows_of_cross_entropy_or_of_binary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(list(enumerate(rows(7))))
    batch = batch._replace(reply_emotion=batch.reply_emotion.index_fill(0, torch.tensor([0]), 1.0))
    for head in ("softmax", "sigmoid"):
        tagger = new_tagger(head=head, dropout=0.0)
        monkeypatch.setattr(tagger, "log", lambda *_, **__: None)
        logits = tagger.examples(batch)[0]
        if head == "softmax":
            shares = batch.reply_emotion / batch.reply_emotion.sum(1, keepdim=True)
            expected = torch.nn.functional.cross_entropy(logits, shares)
        else:
            expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.reply_emotion)
        assert torch.allclose(tagger.training_step(batch, 0), expected, atol=1e-6)


def test_the_second_class_is_secondary_above_the_threshold() -> None:
    tagger = new_tagger(head="sigmoid", secondary_threshold=0.5)
    tags = tagger._tags(torch.tensor([[-5.0, 4.0, 2.0], [-5.0, -0.1, 4.0], [3.0, -4.0, 1.0], [3.0, 5.0, -1.0]]))
    assert tags.primary.tolist() == [1, 2, 0, 1]
    assert tags.secondary.tolist() == [2, 0, 2, 0]


def test_data_with_other_words_are_read_through_their_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tagger = new_tagger(side="both")
    trainer(tmp_path, 3).fit(tagger, datamodule=Data())
    other = DialogueVocabulary(tokenizer([*WORDS, "more"]), tokenizer(sorted(WORDS)), NAMES)
    expected = trainer(tmp_path).test(tagger, datamodule=Data(), verbose=False)
    assert trainer(tmp_path).test(tagger, datamodule=Data(other), verbose=False) == expected
    assert "another vocabulary than the tagger" in caplog.text
    renamed = DialogueVocabulary(VOCABULARY.post, VOCABULARY.reply, ["a", "b", "c"])
    with pytest.raises(ValueError, match="trained with the classes none, happy, sad, the data have a, b, c"):
        trainer(tmp_path).test(tagger, datamodule=Data(renamed), verbose=False)


@pytest.mark.parametrize("side", ["reply", "post", "both"])
def test_predictions_label_a_corpus(tmp_path: Path, side: str) -> None:
    tagger = new_tagger(side=side)
    run = trainer(tmp_path)
    results = run.predict(tagger, datamodule=Data(count=20))
    assert results is not None
    sides = ["post", "reply"] if side == "both" else [side]
    lines = [json.loads(line) for line in next(tmp_path.rglob("predictions.jsonl")).read_text().splitlines()]
    assert sorted((line["index"], line["side"]) for line in lines) == sorted((i, s) for i in range(20) for s in sides)
    corpus = rows(20, seed=2)
    for line in lines:
        text = corpus[line["index"]][line["side"] == "reply"]
        tags = tagger.tag([text], line["side"])
        assert line["text"] == text and line["primary"] == NAMES[int(tags.primary)] and line["secondary"] is None
        assert line["probabilities"] == pytest.approx(tags.probabilities[0].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "left"}, "side must be one of post, reply, both"),
        ({"head": "tanh"}, "head must be one of"),
        ({"num_emotions": None}, "--model.num_emotions must be at least 2"),
        ({"reply_vocab_size": None}, "--model.reply_vocab_size must be at least 1"),
        ({"hidden_size": 7}, "hidden_size must be even"),
        ({"embedding_size": 0}, "embedding_size must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"secondary_threshold": 1.0}, "secondary_threshold"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_tagger(**options)


def test_what_does_not_fit_the_tagger_is_an_error(tmp_path: Path) -> None:
    tagger = new_tagger(post_vocab_size=None)
    with pytest.raises(ValueError, match="side must be one of reply"):
        tagger.tag(["ok"], "post")
    tagger.vocabulary = None
    with pytest.raises(RuntimeError, match="knows no words yet"):
        tagger.tag(["ok"])
    small = new_tagger(reply_vocab_size=9)
    small.vocabulary = None
    with pytest.raises(ValueError, match="reply_vocab_size is 9, the data's tokenizer has 17 words"):
        trainer(tmp_path).fit(small, datamodule=Data())
    with pytest.raises(FileNotFoundError, match="not a folder"):
        new_tagger(encoder=str(tmp_path / "none"))


def test_a_checkpoint_brings_the_tokenizer_that_it_was_trained_with(tmp_path: Path, hub_folder: Path) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "bert")
    trained = new_tagger(encoder=str(folder))
    checkpoint: dict[str, Any] = {}
    trained.on_save_checkpoint(checkpoint)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"glad": content["model"]["vocab"]["cry"], "cry": content["model"]["vocab"]["glad"]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    loaded, texts = new_tagger(encoder=str(folder)), ["i am glad", "cry"]
    assert not torch.equal(loaded.encode(texts, "reply")[0], trained.encode(texts, "reply")[0])
    loaded.on_load_checkpoint(checkpoint)
    ours, theirs = trained.encode(texts, "reply"), loaded.encode(texts, "reply")
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
