"""Coefficients on disk."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from zoo.merging.coefficient_files import load_coefficients, save_coefficients

LAYERS, TASKS = ["stem.weight", "stem.bias", "out.weight"], ["a.b", "c"]
VALUES = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])


def test_coefficients_come_back_with_their_names_and_settings(tmp_path):
    path = tmp_path / "new" / "coef.safetensors"
    about = {"granularity": "layer", "preprocess": "ties", "density": 0.25}
    save_coefficients(str(path), VALUES.clone().requires_grad_().T.contiguous().T, LAYERS, TASKS, about)
    found = load_coefficients(path)
    assert torch.equal(found.values, VALUES)
    assert (found.layer_names, found.task_names, found.about, found.path) == (LAYERS, TASKS, about, str(path))
    save_coefficients(path, VALUES, LAYERS, TASKS)
    assert load_coefficients(str(path)).about == {}


def test_layers_and_tasks_are_chosen_by_name(tmp_path):
    save_coefficients(tmp_path / "coef.safetensors", VALUES, LAYERS, TASKS)
    found = load_coefficients(tmp_path / "coef.safetensors")
    assert found.select(["out.weight", "stem.weight"], ["c", "a.b"]).tolist() == VALUES[[2, 0]][:, [1, 0]].tolist()
    with pytest.raises(
        ValueError, match=r"has no layer 'head' \(1 missing\): it has stem.weight, stem.bias, out.weight"
    ):
        found.select(["stem.bias", "head"], TASKS)
    with pytest.raises(ValueError, match=r"has no task 'd' \(2 missing\): it has a.b, c; expected a.b, d, e"):
        found.select(LAYERS, ["a.b", "d", "e"])


def test_the_wrong_shape_is_refused_and_a_transposed_one_recognised(tmp_path):
    path = tmp_path / "coef.safetensors"
    save_coefficients(path, VALUES.T, LAYERS, TASKS)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for the 3 layers .* and the 2 tasks a.b, c. .* save coef.T"):
        load_coefficients(path)
    save_coefficients(path, VALUES[:2], LAYERS, TASKS)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for the 3 layers stem.weight, stem.bias, out.weight") as info:
        load_coefficients(path)
    assert "transposed" not in str(info.value)
    save_coefficients(path, torch.rand(9, 2), [f"l{i}" for i in range(8)], TASKS)
    with pytest.raises(ValueError, match=r"l0, l1, l2, l3, l4, \.\.\. and"):
        load_coefficients(path)


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors is missing: expected coefficients of AdaMerging"):
        load_coefficients(tmp_path / "gone.safetensors")
    save_file({"coefficients": VALUES}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    for name in ("plain", "text"):
        with pytest.raises(ValueError, match="is no file of coefficients with the names of layers and tasks"):
            load_coefficients(tmp_path / f"{name}.safetensors")


def checkpoint(raw=VALUES, constraint="clamp", **changes):
    content = {
        "state_dict": {"coefficients_.raw": raw},
        "merging": {"layer_names": LAYERS, "merge_tasks": TASKS},
        "hyper_parameters": {"constraint": constraint, "granularity": "layer", "preprocess": None, "density": 0.2},
    }
    return {**content, **changes}


@pytest.mark.parametrize("constraint", ["clamp", "project", "sigmoid", "none"])
def test_a_checkpoint_gives_the_effective_coefficients(tmp_path, constraint):
    raw = torch.tensor([[-0.5, 0.2], [0.3, 1.4], [0.5, 0.6]])
    torch.save(checkpoint(raw, constraint), tmp_path / "run.ckpt")
    found = load_coefficients(tmp_path / "run.ckpt")
    expected = {"sigmoid": raw.sigmoid(), "none": raw}.get(constraint, raw.clamp(0, 1))
    assert torch.equal(found.values, expected)
    assert (found.layer_names, found.task_names) == (LAYERS, TASKS)
    assert found.about == {"granularity": "layer", "preprocess": None, "density": 0.2}


def test_checkpoints_of_other_modules_are_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    for content in ({"state_dict": {}}, checkpoint(hyper_parameters={}), [1], "text"):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"run.ckpt is no checkpoint of AdaMerging"):
            load_coefficients(path)
    for data in (b"", b"no checkpoint"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"run.ckpt is no checkpoint of AdaMerging"):
            load_coefficients(path)
