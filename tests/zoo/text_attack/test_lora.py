"""Adapters: what is trained, written and read."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.text_attack.language_models import build_decoder
from zoo.text_attack.lora import add_lora, export_adapter

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[1, 7, 8, 9]])


def base() -> Any:
    torch.manual_seed(0)
    return build_decoder("tiny", {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}, 50)


def test_only_adapters_are_trained_and_they_begin_without_effect() -> None:
    plain, adapted = base().eval(), add_lora(base(), {}).eval()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 2 and all("lora_" in name for name in trained)
    assert {name.split(".self_attn.")[1].split(".")[0] for name in trained} == {"q_proj", "v_proj"}
    assert torch.equal(plain(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


def test_an_adapter_that_was_written_is_read_with_the_same_outputs(tmp_path: Path) -> None:
    adapted = add_lora(base(), {"r": 2, "alpha": 3, "targets": ["k_proj"]})
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    folder = export_adapter(adapted, tmp_path / "adapter")
    read = add_lora(base(), {}, adapter=folder)
    assert torch.equal(adapted.eval()(input_ids=IDS).logits, read.eval()(input_ids=IDS).logits)
    assert any(parameter.requires_grad for parameter in read.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "lora has no rank; it has r, alpha"),
        ({"r": 0}, "r of at least 1"),
        ({"targets": ["query"]}, "no layer is called query.*q_proj"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
    ],
    ids=["unknown", "rank", "targets", "dropout"],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(base(), options)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json and no adapter_model.safetensors"):
        add_lora(base(), {}, adapter=tmp_path)
    with pytest.raises(ValueError, match="built without lora"):
        export_adapter(base(), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="lora needs peft: pip install"):
        add_lora(base(), {})
