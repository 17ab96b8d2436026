"""Zero-shot heads against the plain procedure, and their cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.merging import zero_shot
from zoo.merging.heads import CosineHead
from zoo.merging.zero_shot import zero_shot_heads

NAMES = {
    "mnist": ["zero", "one", "two"],
    "svhn": ["zero", "one", "two"],
    "pets": ["cat", "long haired dog"],
}
TEMPLATES = {
    "mnist": ["a photo of the number {}"],
    "svhn": ["a photo of the number {}"],
    "pets": ["a {}", "a photo of a big {} with a {}", "one {} of two"],
}
TEXT = "a photo of the number zero one two cat long haired dog big with small"
WORDS = ["<pad>", "<start>", "<unk>", *TEXT.split(), "<end>"]
END = WORDS.index("<end>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model and its tokenizer, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    where = tmp_path_factory.mktemp("clip")
    ids = {word: row for row, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", END)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(where)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": END}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(where)
    return where


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(folder: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer, CLIPModel

    return CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def plain_weight(model: Any, tokenizer: Any, names: list[str], templates: list[str]) -> Tensor:
    """One prompt at a time, without padding."""
    rows = []
    for name in names:
        total = torch.zeros(6)
        for template in templates:
            ids = torch.tensor([tokenizer(template.replace("{}", name))["input_ids"]])
            feature = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
            total += feature / feature.norm()
        mean = total / len(templates)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_heads_are_the_normalised_mean_of_normalised_text_features(folder: Path, cache: Path, batch_size: int) -> None:
    heads = zero_shot_heads(str(folder), class_names=NAMES, templates=TEMPLATES, batch_size=batch_size, cache_dir=cache)
    model, tokenizer = load(folder)
    assert list(heads) == list(NAMES)
    for task, head in heads.items():
        expected = plain_weight(model, tokenizer, NAMES[task], TEMPLATES[task])
        assert isinstance(head, CosineHead) and head.weight.dtype == torch.float32
        torch.testing.assert_close(head.weight, expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(head.scale, model.logit_scale.detach().exp())
        features = torch.randn(3, 6)
        torch.testing.assert_close(head(features), head.scale * F.normalize(features, dim=1) @ expected.T)
    # The embeddings of different classes must differ, or the comparison above would show nothing.
    assert (heads["pets"].weight @ heads["pets"].weight.T)[0, 1] < 0.999


def test_padding_is_right_under_the_rule_of_the_first_configs(folder: Path, cache: Path) -> None:
    model, tokenizer = load(folder)
    model.text_model.eos_token_id = 2
    head = zero_shot_heads(model, tokenizer, class_names=NAMES, templates=TEMPLATES, cache_dir=cache)["pets"]
    expected = plain_weight(model, tokenizer, NAMES["pets"], TEMPLATES["pets"])
    torch.testing.assert_close(head.weight, expected, atol=2e-6, rtol=0)


def test_a_model_in_memory_gives_the_same_heads_and_is_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    model.train()
    model.vision_model.eval()
    named = zero_shot_heads(folder, folder, class_names=NAMES, templates=TEMPLATES, cache_dir=tmp_path / "a")
    given = zero_shot_heads(model, tokenizer, class_names=NAMES, templates=TEMPLATES, cache_dir=tmp_path / "b")
    assert model.training and model.text_model.training and not model.vision_model.training
    assert all(torch.equal(named[task].weight, given[task].weight) for task in NAMES)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_prompts_give_the_same_head_but_not_the_same_module(folder: Path, cache: Path) -> None:
    heads = zero_shot_heads(folder, class_names=NAMES, templates=TEMPLATES, cache_dir=cache)
    assert torch.equal(heads["mnist"].weight, heads["svhn"].weight)
    assert len(list(cache.iterdir())) == 2
    heads["mnist"].weight.zero_()
    assert heads["svhn"].weight.abs().sum() > 0


def test_the_cache_serves_the_same_prompts_and_weights_only(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(folder)
    calls = []
    embed = zero_shot._embed
    monkeypatch.setattr(zero_shot, "_embed", lambda *given: calls.append(1) or embed(*given))

    def heads(**templates: list[str]) -> Tensor:
        changed = {**TEMPLATES, **templates}
        return zero_shot_heads(model, tokenizer, class_names=NAMES, templates=changed, cache_dir=cache)["pets"].weight

    first = heads()
    assert len(calls) == 2
    assert torch.equal(heads(), first) and len(calls) == 2
    assert not torch.equal(heads(pets=["a {}"]), first) and len(calls) == 3
    model.vision_model.pre_layrnorm.weight.data.zero_()
    model.visual_projection.weight.data.zero_()
    assert torch.equal(heads(), first) and len(calls) == 3
    model.config.text_config.hidden_act = "gelu"
    heads()
    assert len(calls) == 5
    model.text_model.final_layer_norm.weight.data[0] += 1
    assert not torch.equal(heads(), first) and len(calls) == 7
    model.logit_scale.data.zero_()
    heads()
    assert len(calls) == 9


def test_any_module_with_text_features_will_do_and_has_its_own_cache(cache: Path) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 3)
            self.logit_scale = nn.Parameter(torch.tensor(2.0))

        def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            assert not torch.is_grad_enabled() and not self.training
            return (self.table(input_ids) * attention_mask[:, :, None]).sum(1)

    def tokenizer(prompts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in prompt.split()] for prompt in prompts]}

    for _ in range(2):
        bag = Bag()
        head = zero_shot_heads(
            bag, tokenizer, class_names={"t": ["cat", "two dogs"]}, templates={"t": ["a {}"]}, cache_dir=cache
        )["t"]
        table = bag.table.weight.detach()
        expected = F.normalize(torch.stack([table[1] + table[3], table[1] + table[3] + table[4]]), dim=1)
        torch.testing.assert_close(head.weight, expected)


def test_the_split_into_classes_is_part_of_the_cache_key(folder: Path, cache: Path) -> None:
    one = zero_shot_heads(folder, class_names={"t": ["cat"]}, templates={"t": ["a {}", "the {}"]}, cache_dir=cache)["t"]
    two = zero_shot_heads(folder, class_names={"t": ["a cat", "the cat"]}, templates={"t": ["{}"]}, cache_dir=cache)[
        "t"
    ]
    assert one.weight.shape == (1, 6) and two.weight.shape == (2, 6)


def test_the_cache_of_the_user_is_the_default(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    zero_shot_heads(folder, class_names=NAMES, templates=TEMPLATES)
    assert len(list((tmp_path / "lightning-method-zoo" / "zero_shot_heads").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_a_warning_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept for the next run"):
        heads = zero_shot_heads(
            folder, class_names={"t": ["cat"]}, templates={"t": ["a {}"]}, cache_dir=tmp_path / "file" / "x"
        )
    assert heads["t"].weight.shape == (1, 6)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ({}, {}, "class_names has none; templates has none"),
        ({"a": ["x"], "b": ["x"]}, {"a": ["{}"]}, "class_names has a, b; templates has a"),
        ({"a": []}, {"a": ["{}"]}, r"class_names\['a'\] must be a list of texts"),
        ({"a": ["x", " "]}, {"a": ["{}"]}, r"class_names\['a'\] must be a list of texts"),
        ({"a": ["x", 3]}, {"a": ["{}"]}, r"class_names\['a'\] must be a list of texts"),
        ({"a": ["x"]}, {"a": "a {}"}, r"templates\['a'\] must be a list of texts"),
        ({"a": ["x"]}, {"a": ["a {}", "a {c}"]}, r"templates\['a'\]: 'a {c}' has no {}"),
        ({"a": ["cat " * 15]}, {"a": ["{}"]}, "of task 'a' has 17 tokens, the text tower takes 16"),
    ],
)
def test_bad_prompts_are_refused_by_task(folder: Path, cache: Path, names: Any, templates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_heads(folder, class_names=names, templates=templates, cache_dir=cache)


def test_repeated_class_names_are_told(folder: Path, cache: Path) -> None:
    with pytest.warns(UserWarning, match=r"class_names\['a'\] repeats cat"):
        zero_shot_heads(folder, class_names={"a": ["cat", "dog", "cat"]}, templates={"a": ["a {}"]}, cache_dir=cache)


def test_what_is_missing_is_named(folder: Path, cache: Path, tmp_path: Path) -> None:
    model, _ = load(folder)
    with pytest.raises(ValueError, match="with a model in memory, pass its tokenizer"):
        zero_shot_heads(model, None, class_names=NAMES, templates=TEMPLATES, cache_dir=cache)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        zero_shot_heads(folder, class_names=NAMES, templates=TEMPLATES, batch_size=0, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"config\.json and model\.safetensors"):
        zero_shot_heads(tmp_path / "nothing", None, class_names=NAMES, templates=TEMPLATES, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing --local-dir FOLDER"):
        zero_shot_heads("nobody/nothing", folder, class_names=NAMES, templates=TEMPLATES, cache_dir=cache)
