"""Folders of experts."""

from __future__ import annotations

import json

import pytest
import torch

from tests.zoo.merging.small_experts import CLASSES, clip, encoder, equal, expert_folder, moved
from zoo.merging.backbones import build_encoder
from zoo.merging.expert_folder import is_expert_folder, read_expert_folder, write_expert_folder
from zoo.merging.heads import load_heads


@pytest.mark.parametrize("kind", [encoder, clip])
def test_what_is_written_is_read_again(tmp_path, kind):
    base = kind()
    experts = {"c/d": moved(base, 1), "a.b": moved(base, 2)}
    heads = {"c/d": torch.rand(2, base.dim), "a.b": torch.rand(3, base.dim)}
    joint = moved(base, 3)
    written = write_expert_folder(tmp_path / "run", base, experts.items(), heads, joint, {"lr": 0.1})
    found = read_expert_folder(tmp_path / "run")
    assert found == written
    assert list(found.experts) == ["c/d", "a.b"]
    for task, path in found.experts.items():
        assert equal(build_encoder(path).state_dict(), experts[task].state_dict())
    assert equal(build_encoder(found.pretrained).state_dict(), base.state_dict())
    assert found.joint is not None and equal(build_encoder(found.joint).state_dict(), joint.state_dict())
    assert {task: head.weight.tolist() for task, head in load_heads(found.heads).items()} == {
        task: weight.tolist() for task, weight in heads.items()
    }
    assert json.loads((tmp_path / "run/experts.json").read_text()) == {"tasks": ["c/d", "a.b"], "about": {"lr": 0.1}}


def test_some_of_the_experts_are_read_in_the_order_asked_for(tmp_path):
    whole = expert_folder(tmp_path / "experts")
    # A run's folder has the folder of experts in it.
    part = read_expert_folder(tmp_path, ["c", "a.b"])
    assert part.root == whole.root
    assert list(part.experts) == ["c", "a.b"]
    assert part.experts["c"] == whole.experts["c"]
    assert part.joint is None


def test_an_earlier_folder_is_replaced_as_a_whole(tmp_path):
    expert_folder(tmp_path / "run", joint=True)
    again = expert_folder(tmp_path / "run", tasks=["c"])
    assert list(again.experts) == ["c"]
    assert again.joint is None
    assert [path.name for path in (tmp_path / "run/experts").iterdir()] == ["0"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_writing_that_fails_leaves_the_earlier_folder(tmp_path):
    expert_folder(tmp_path / "run")

    def broken():
        yield "c", encoder()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_expert_folder(tmp_path / "run", encoder(), broken(), {"c": torch.rand(2, 8)})
    assert list(read_expert_folder(tmp_path / "run").experts) == list(CLASSES)
    assert list(expert_folder(tmp_path / "run", tasks=["c"]).experts) == ["c"]


def test_what_is_no_whole_folder_is_refused(tmp_path):
    assert not is_expert_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no folder of experts: experts.json is missing. `python train.py"):
        read_expert_folder(tmp_path)
    folder = expert_folder(tmp_path / "run")
    assert is_expert_folder(folder.root)
    with pytest.raises(ValueError, match=r"has no expert of d, e: it has a.b, keys, c. Choose among them"):
        read_expert_folder(folder.root, ["c", "d", "e"])
    folder.heads.unlink()
    with pytest.raises(FileNotFoundError, match=r"heads.safetensors is missing: .* is not complete"):
        read_expert_folder(folder.root)
    for text in ("{", "[]", "{}"):
        (folder.root / "experts.json").write_text(text)
        with pytest.raises(ValueError, match=r"experts.json is not a list of tasks"):
            read_expert_folder(folder.root)
