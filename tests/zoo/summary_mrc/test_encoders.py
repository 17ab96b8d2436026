"""Text encoders: built, saved, read back, and what is refused."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.summary_mrc.encoders import TINY_KINDS, build_text_encoder, encode, max_positions, save_text_encoder

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 31
SIZES = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "max_length": 12}
CONFIG = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def tiny(kind: str = "bert", head: Any = "base", **options: Any) -> Any:
    torch.manual_seed(0)
    built = build_text_encoder("tiny", vocab_size=VOCABULARY, options={"kind": kind, **SIZES, **options}, head=head)
    # Fresh weights hide differences: biases are 0 and norms are 1.
    for parameter in built.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, 7)
    return ids * mask, mask, types * mask


@torch.no_grad()
def states(network: nn.Module) -> Tensor:
    network.eval()
    return encode(network, *tokens())


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_a_tiny_encoder_is_in_train_mode_and_every_weight_has_a_gradient(kind: str) -> None:
    network = tiny(kind)
    assert all(module.training for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    hidden = encode(network, *tokens())
    assert hidden.shape == (2, 7, 16)
    hidden.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert (network.config.num_hidden_layers, network.config.hidden_dropout_prob) == (2, 0.1)


@pytest.mark.parametrize("kind", TINY_KINDS)
@pytest.mark.parametrize("head", ["base", "masked_lm"])
def test_a_saved_network_comes_back_bit_for_bit(kind: str, head: Any, tmp_path: Path) -> None:
    network = tiny(kind, head)
    assert save_text_encoder(network, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    read = build_text_encoder(tmp_path / "new" / "folder", head=head, vocab_size=VOCABULARY, max_length=12)
    assert all(module.training for module in read.modules())
    assert list(read.state_dict()) == list(network.state_dict())
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in read.state_dict().items())
    assert torch.equal(states(read), states(network))


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_base_of_a_masked_language_model_is_read_without_its_head(kind: str, tmp_path: Path) -> None:
    network = tiny(kind, "masked_lm")
    save_text_encoder(network, tmp_path)
    base = build_text_encoder(str(tmp_path))
    assert torch.equal(states(base), states(network))
    assert set(base.state_dict()) == {
        name.partition(".")[2] for name in network.state_dict() if name.startswith(network.base_model_prefix + ".")
    }
    again = save_text_encoder(base, tmp_path / "again")
    assert torch.equal(states(build_text_encoder(again)), states(network))


def test_a_discriminator_and_a_classifier_are_read_as_bases(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification, ElectraForPreTraining

    for kind, loader in (("electra", ElectraForPreTraining), ("bert", BertForSequenceClassification)):
        network = loader(tiny(kind).config).eval()
        network.save_pretrained(tmp_path / kind)
        base = build_text_encoder(tmp_path / kind)
        assert torch.equal(states(base), states(network))
        assert not [name for name in base.state_dict() if "pooler" in name]


def test_a_checkpoint_without_a_head_is_refused_as_a_masked_language_model(tmp_path: Path) -> None:
    save_text_encoder(tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of BertForMaskedLM, which would be random: cls\."):
        build_text_encoder(tmp_path, head="masked_lm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precision_are_saved_and_read_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    network = tiny().to(dtype)
    save_text_encoder(network, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    read = build_text_encoder(tmp_path)
    assert {parameter.dtype for parameter in read.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}
    assert all(torch.equal(value, network.state_dict()[name].float()) for name, value in read.state_dict().items())
    network.save_pretrained(tmp_path / "low")
    low = build_text_encoder(tmp_path / "low")
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_token_types_are_used_where_the_network_has_them(kind: str) -> None:
    network = tiny(kind).eval()
    ids, mask, types = tokens()
    with torch.no_grad():
        same = torch.equal(encode(network, ids, mask, types), encode(network, ids, mask))
    assert same == (kind in ("roberta", "deberta-v2"))


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_longest_sequence_is_what_the_network_takes(kind: str) -> None:
    network = tiny(kind).eval()
    longest = max_positions(network)
    assert longest == (None if kind == "deberta-v2" else 12)
    ids = torch.randint(2, VOCABULARY, (1, 13))
    assert encode(network, ids[:, :12], torch.ones(1, 12)).shape == (1, 12, 16)
    if longest is None:
        assert encode(network, ids, torch.ones(1, 13)).shape == (1, 13, 16)
    else:
        with pytest.raises((IndexError, RuntimeError)):
            encode(network, ids, torch.ones(1, 13))


def test_a_length_above_the_positions_is_refused_with_both_numbers(tmp_path: Path) -> None:
    roberta = {**CONFIG, "model_type": "roberta", "max_position_embeddings": 14}
    assert max_positions(build_text_encoder(roberta, vocab_size=9, max_length=12)) == 12
    with pytest.raises(ValueError, match="max_length is 13, but the given config takes sequences of at most 12 tokens"):
        build_text_encoder(roberta, vocab_size=9, max_length=13)
    save_text_encoder(tiny(), tmp_path)
    with pytest.raises(ValueError, match=f"max_length is 13, but {tmp_path} takes sequences of at most 12 tokens"):
        build_text_encoder(tmp_path, max_length=13)


def test_padding_of_another_id_moves_the_positions_of_roberta() -> None:
    options = {"kind": "roberta", **SIZES}
    network = build_text_encoder("tiny", vocab_size=VOCABULARY, options=options, pad_token_id=3)
    assert max_positions(network) == 12 and network.config.pad_token_id == 3


def test_a_vocabulary_above_the_embedding_is_refused_with_both_sizes(tmp_path: Path) -> None:
    save_text_encoder(tiny(), tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer has 33 tokens, the embedding of {tmp_path} has 31: .*resize="):
        build_text_encoder(tmp_path, vocab_size=33)
    with pytest.raises(ValueError, match="the tokenizer has 33 tokens, the embedding of the given config has 32"):
        build_text_encoder({**CONFIG, "vocab_size": 32}, vocab_size=33)
    assert build_text_encoder(tmp_path, vocab_size=9).get_input_embeddings().num_embeddings == VOCABULARY


@pytest.mark.parametrize("kind", TINY_KINDS)
@pytest.mark.parametrize("head", ["base", "masked_lm"])
def test_a_resized_embedding_keeps_its_rows_and_is_saved(kind: str, head: Any, tmp_path: Path) -> None:
    network = tiny(kind, head)
    save_text_encoder(network, tmp_path)
    grown = build_text_encoder(tmp_path, vocab_size=VOCABULARY + 2, resize=True, head=head)
    rows = grown.get_input_embeddings().weight
    assert rows.shape[0] == VOCABULARY + 2 and bool((rows[-2:] != 0).any(1).all())
    assert torch.equal(states(grown), states(network))
    grown.eval()
    ids, mask, types = tokens()
    with torch.no_grad():
        hidden = encode(grown, ids + 2, mask, types)
        if head == "masked_lm":
            assert grown(input_ids=ids, attention_mask=mask).logits.shape[-1] == VOCABULARY + 2
    save_text_encoder(grown, tmp_path / "grown")
    read = build_text_encoder(tmp_path / "grown", vocab_size=VOCABULARY + 2, head=head).eval()
    with torch.no_grad():
        assert torch.equal(encode(read, ids + 2, mask, types), hidden)


def test_without_pretrained_weights_the_config_of_a_folder_is_enough(tmp_path: Path) -> None:
    save_text_encoder(tiny(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    network = build_text_encoder(tmp_path, pretrained=False, vocab_size=50, pad_token_id=4)
    assert network.get_input_embeddings().num_embeddings == 50
    assert (network.config.hidden_size, network.config.pad_token_id) == (16, 4)
    assert network.training
    with pytest.raises(FileNotFoundError, match=r"has no weights: .*pretrained=False needs only the config\.json"):
        build_text_encoder(tmp_path)


def test_configs_give_fresh_weights_and_are_left_as_they_are() -> None:
    from transformers import BertConfig

    given = BertConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"}, vocab_size=20)
    values, before = dict(CONFIG), copy.deepcopy(given.to_dict())
    for config, size in ((given, 20), (values, 17)):
        torch.manual_seed(0)
        first = build_text_encoder(config, vocab_size=17)
        torch.manual_seed(0)
        second = build_text_encoder(config, vocab_size=17)
        assert first.get_input_embeddings().num_embeddings == size
        assert torch.equal(states_of(first), states_of(second))
        assert first.config is not second.config and first.config is not config
    assert values == CONFIG and given.to_dict() == before
    assert build_text_encoder(CONFIG, vocab_size=17, head="masked_lm").config.vocab_size == 17


@torch.no_grad()
def states_of(network: nn.Module) -> Tensor:
    ids = torch.arange(2, 10)[None]
    return encode(network.eval(), ids, torch.ones_like(ids))


def test_keys_that_a_config_does_not_know_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zoo"):
        build_text_encoder({**CONFIG, "hiden_size": 8}, vocab_size=17)
    assert caplog.messages == ["BertConfig has no hiden_size: without effect"]


@pytest.mark.parametrize("kind", [kind for kind in TINY_KINDS if kind != "albert"])
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    plain = tiny(kind, dropout=0.0)
    options = {"kind": kind, **SIZES, "dropout": 0.0}
    saving = build_text_encoder("tiny", vocab_size=VOCABULARY, options=options, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    for network in (plain, saving):
        encode(network, *tokens()).square().sum().backward()
    for first, second in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)
    with torch.inference_mode():
        torch.testing.assert_close(encode(saving.eval(), *tokens()), encode(plain.eval(), *tokens()))


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    kept = []
    for checkpointing in (False, True):
        options = {**SIZES, "dropout": 0.0, "num_layers": 4}
        network = build_text_encoder(
            "tiny", vocab_size=VOCABULARY, options=options, gradient_checkpointing=checkpointing
        )
        saved: list[int] = []

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encode(network, *tokens())
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 3


def test_gradient_checkpointing_of_a_network_that_has_none_is_refused() -> None:
    with pytest.raises(ValueError, match="AlbertModel has no gradient checkpointing: leave it off"):
        build_text_encoder("tiny", vocab_size=9, options={"kind": "albert"}, gradient_checkpointing=True)


def test_padding_changes_no_state() -> None:
    for kind in TINY_KINDS:
        network = tiny(kind).eval()
        ids, mask, types = tokens()
        with torch.no_grad():
            short = encode(network, ids[1:, :5], mask[1:, :5], types[1:, :5])
        torch.testing.assert_close(states(network)[1:, :5], short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gpt2"}, "kind must be one of bert, electra, albert, roberta, deberta-v2, got 'gpt2'"),
        ({"layers": 3}, "the tiny encoder has no layers; it has kind, hidden_size, num_layers, num_heads, interm"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"hidden_size": 18}, r"hidden_size \(18\) must be a multiple of num_heads \(4\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_options_of_the_tiny_encoder_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_text_encoder("tiny", vocab_size=9, options=options)


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    from transformers import ViTConfig

    with pytest.raises(ValueError, match="the tiny encoder needs vocab_size"):
        build_text_encoder("tiny")
    with pytest.raises(ValueError, match="hidden_size: for the 'tiny' encoder only, nobody/nothing has its own config"):
        build_text_encoder("nobody/nothing", options={"hidden_size": 8})
    with pytest.raises(ValueError, match="head must be base or masked_lm, got 'lm'"):
        build_text_encoder("tiny", vocab_size=9, head="lm")  # type: ignore[arg-type]
    for kind in (None, "bertt"):
        config = {key: value for key, value in {**CONFIG, "model_type": kind}.items() if value is not None}
        with pytest.raises(ValueError, match=f"has model_type {kind!r}; it must be one that transformers knows"):
            build_text_encoder(config, vocab_size=9)
    with pytest.raises(ValueError, match=r"the given config \(t5\) has an encoder and a decoder"):
        build_text_encoder({"model_type": "t5"}, vocab_size=9)
    with pytest.raises(ValueError, match="is a ViTModel, whose input is pixel_values, not input_ids"):
        build_text_encoder(ViTConfig())
    with pytest.raises(ValueError, match="no masked language model of model_type 'gpt2', which the given config is"):
        build_text_encoder({"model_type": "gpt2"}, vocab_size=9, head="masked_lm")


def test_networks_of_text_and_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the given config|is a CLIPModel"):
        build_text_encoder({"model_type": "clip"})


def test_a_hub_id_without_a_network_names_the_ways_out() -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder.*FOLDER.*'tiny'.*pretrained=False"):
        build_text_encoder("nobody/nothing")
