"""`python -m zoo.merging`: what it writes, what it says, and how it answers mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.merging.command import main
from zoo.merging.one_shot import dare_merge, magnitude_merge, task_arithmetic, ties_merge, weight_average

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]

METHODS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "average": (weight_average, []),
    "task_arithmetic": (partial(task_arithmetic, coef=0.5), ["--coef", "0.5"]),
    "magnitude": (partial(magnitude_merge, coef=0.3, density=0.1), ["--density", "0.1"]),
    "ties": (partial(ties_merge, density=0.4, merge_func="mean"), ["--density", "0.4", "--merge-func", "mean"]),
    "dare": (partial(dare_merge, drop=0.2, seed=3), ["--drop", "0.2", "--seed", "3"]),
    "dare_ties": (partial(dare_merge, coef=1.0, ties_density=0.2), ["--coef", "1"]),
}


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """A base and two experts in files, as arguments."""
    generator = torch.Generator().manual_seed(0)
    base = {"stem.weight": torch.randn(4, 5, generator=generator), "head.0.bias": torch.randn(3, generator=generator)}
    save_file(base, tmp_path / "base.safetensors")
    for task in ("mnist", "svhn"):
        expert = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
        save_file(expert, tmp_path / f"{task}.safetensors")
    experts = [f"--expert={task}={tmp_path / task}.safetensors" for task in ("mnist", "svhn")]
    return ["--pretrained", str(tmp_path / "base.safetensors"), *experts]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Expects exit status 2 and returns the one paragraph on stderr."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        return said.err.removeprefix("error: ").rstrip("\n")

    return call


def opened(folder: Path) -> tuple[Path, dict[str, Path]]:
    return folder / "base.safetensors", {task: folder / f"{task}.safetensors" for task in ("mnist", "svhn")}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_writes_what_its_function_returns(
    method: str, sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function, options = METHODS[method]
    out = tmp_path / "merged.safetensors"
    main(["merge", "--method", method, *sources, *options, "--out", str(out)])
    expected = function(*opened(tmp_path))
    written = load_file(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    said = capsys.readouterr()
    assert said.err == ""
    first, second, third = said.out.splitlines()
    assert first.startswith(f"{method} of mnist, svhn")
    assert re.fullmatch(r"23 parameters in 2 tensors merged in [\d.]+ s, peak memory [\d.]+ [MG]B", second)
    assert third == f"wrote {out} (0.0 MB)"


def test_the_report_names_the_settings_with_their_defaults(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["merge", "--method", "ties", *sources, "--density", "0.5", "--out", str(tmp_path / "m.safetensors")])
    assert capsys.readouterr().out.startswith("ties of mnist, svhn (coef 0.3, density 0.5, merge-func sum)\n")


def test_parts_are_chosen_by_regular_expressions(sources: list[str], tmp_path: Path) -> None:
    base = load_file(tmp_path / "base.safetensors")
    out = tmp_path / "merged.safetensors"
    start = ["merge", "--method", "average", *sources, "--out", str(out)]
    for options, merged in (
        (["--exclude", "^head"], {"stem.weight"}),
        (["--include", "bias$"], {"head.0.bias"}),
        (["--include", "^head", "--include", "^stem"], {"stem.weight", "head.0.bias"}),
    ):
        main([*start, *options])
        assert {name for name, tensor in load_file(out).items() if not torch.equal(tensor, base[name])} == merged


def test_names_are_fitted_unless_they_are_to_be_taken_as_they_are(
    sources: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "svhn.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in load_file(path).items()}, path)
    arguments = ["merge", "--method", "average", *sources, "--out", tmp_path / "m.safetensors"]
    assert "expert svhn does not fit" in refused(*arguments, "--key-map", "none")
    main([str(argument) for argument in arguments])


def test_statistics_can_be_averaged(tmp_path: Path) -> None:
    for name, mean in (("base", 0.0), ("a", 1.0), ("b", 3.0)):
        norm = {"norm.weight": torch.full((2,), 1 + mean / 10), "norm.running_mean": torch.full((2,), mean)}
        save_file(norm, tmp_path / f"{name}.safetensors")
    arguments = ["merge", "--method", "average", "--pretrained", str(tmp_path / "base.safetensors")]
    arguments += [f"--expert={name}={tmp_path / name}.safetensors" for name in "ab"]
    out = tmp_path / "m.safetensors"
    for buffers, expected in (([], 0.0), (["--buffers", "average"], 2.0)):
        main([*arguments, "--out", str(out), *buffers])
        assert load_file(out)["norm.running_mean"].tolist() == [expected] * 2


def test_a_folder_of_transformers_becomes_one_that_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    models = [transformers.CLIPVisionModel(config).eval() for _ in range(3)]
    for name, model in zip(("base", "a", "b"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": 8}')
    (tmp_path / "base" / "README.md").write_text("About the pre-trained model.")
    (tmp_path / "base" / "model.safetensors.index.json").write_text("{}")
    arguments = ["merge", "--method", "average", "--pretrained", str(tmp_path / "base")]
    arguments += [f"--expert={name}={tmp_path / name}" for name in "ab"]
    out = tmp_path / "merged-v1.5"
    main([*arguments, "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "base/config.json").read_text())
    assert f"wrote {out}/model.safetensors" in capsys.readouterr().out
    merged, info = transformers.CLIPVisionModel.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for own, left, right in zip(merged.parameters(), *(model.parameters() for model in models[1:]), strict=True):
        assert torch.allclose(own, (left + right) / 2, atol=1e-6)
    assert "own folder" in refused(*arguments, "--out", tmp_path / "base")
    assert "is one with a config.json" in refused(
        "merge", "--method", "average", "--pretrained", tmp_path / "a" / "model.safetensors",
        f"--expert=b={tmp_path / 'b'}", "--out", tmp_path / "new",
    )  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_inspect_shows_norms_and_cosines(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, mnist, svhn = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "mnist", "svhn"))
    main(["inspect", *sources])
    rows = {
        cells[0]: cells[1:]
        for line in capsys.readouterr().out.splitlines()
        if (cells := [cell.strip() for cell in re.split("[│┃]", line)[1:-1]])
    }
    assert rows["layer"] == ["pretrained", "mnist", "svhn"]
    for name in base:
        norms = [base[name].norm(), (mnist[name] - base[name]).norm(), (svhn[name] - base[name]).norm()]
        assert [float(cell) for cell in rows[name]] == pytest.approx([float(norm) for norm in norms], rel=1e-3)
    whole, left, right = (
        torch.cat([tensor.flatten() for tensor in tensors])
        for tensors in (
            base.values(),
            [mnist[name] - base[name] for name in base],
            [svhn[name] - base[name] for name in base],
        )
    )
    norms = [float(vector.norm()) for vector in (whole, left, right)]
    assert [float(cell) for cell in rows["whole vector"]] == pytest.approx(norms, rel=1e-3)
    shares = [float(cell.rstrip("%")) / 100 for cell in rows["over pretrained"][1:]]
    assert shares == pytest.approx([norm / norms[0] for norm in norms[1:]], abs=1e-4)
    cosine = float(torch.nn.functional.cosine_similarity(left, right, dim=0))
    assert [float(cell) for cell in rows["mnist"]] == pytest.approx([1, cosine], abs=1e-3)
    assert [float(cell) for cell in rows["svhn"]] == pytest.approx([cosine, 1], abs=1e-3)


def test_inspect_groups_layers_and_keeps_long_names_whole(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ".".join(["encoder[bold]", *["very_long_name"] * 12])
    for name in ("base", "mnist", "svhn"):
        path = tmp_path / f"{name}.safetensors"
        save_file({**load_file(path), f"{long}.weight": torch.randn(2), f"{long}.bias": torch.randn(2)}, path)
    main(["inspect", *sources, "--by", "module"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(long in line for line in lines) == 1
    assert not any("weight" in line or "bias" in line for line in lines)


def test_warnings_are_one_line_on_stderr(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", *sources, f"--expert=copy={tmp_path}/svhn.safetensors"])
    assert capsys.readouterr().err == "warning: experts svhn and copy are identical\n"


def test_a_terminal_sees_a_bar_with_the_tensor_that_was_read(
    sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    main(["merge", "--method", "ties", *sources, "--out", str(tmp_path / "m.safetensors")])
    said = capsys.readouterr()
    assert "100%" in said.err and "stem.weight" in said.err
    assert "100%" not in said.out


def test_mistakes_are_answered_in_one_paragraph(
    sources: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = tmp_path / "merged.safetensors"
    start = ["merge", *sources, "--out", out]
    assert "--density does nothing with --method average, which takes no options" in refused(
        *start, "--method", "average", "--density", "0.2"
    )
    assert "--seed does nothing with --method ties, which takes --coef, --density, --merge-func" in refused(
        *start, "--method", "ties", "--seed", "0"
    )
    assert "invalid choice: 'tie'" in refused(*start, "--method", "tie")
    assert "--coef: invalid float value: 'x'" in refused(*start, "--method", "ties", "--coef", "x")
    assert "density must be a share in (0, 1], got 2.0" in refused(*start, "--method", "ties", "--density", "2")
    assert "unrecognized arguments: --dens 1" in refused(*start, "--method", "ties", "--dens", "1")
    assert "--expert mnist: expected NAME=PATH" in refused(*start, "--method", "ties", "--expert", "mnist")
    assert "--expert mnist=b: mnist is already" in refused(*start, "--method", "ties", "--expert", "mnist=b")
    assert "required: --expert" in refused("merge", "--method", "ties", "--pretrained", "a", "--out", "b")
    assert "no_such.safetensors" in refused(*start, "--method", "ties", "--expert", "x=no_such.safetensors")
    assert "merged.bin: expected a name that ends in .safetensors" in refused(
        "merge", *sources, "--method", "ties", "--out", tmp_path / "merged.bin"
    )
    assert "belongs to the weights that are merged" in refused(
        "merge", *sources, "--method", "ties", "--out", tmp_path / "mnist.safetensors"
    )
    assert "required: merge|inspect" in refused()
    assert "include=['(']: expected regular expressions" in refused(*start, "--method", "ties", "--include", "(")
    assert not out.exists()


def test_a_mistake_shows_its_trace_when_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_DEBUG", "1")
    with pytest.raises(ValueError, match="expected NAME=PATH"):
        main(["inspect", "--pretrained", "a", "--expert", "b"])


def test_help_lists_methods_and_defaults_without_loading_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "zoo.merging", "merge", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "| zoo.merging.command" in done.stderr.replace("  ", "") and "| torch\n" not in done.stderr
    for text in (*METHODS, "--coef 0.3", "--density 0.2", "NAME=PATH", ".safetensors", "example:"):
        assert text in done.stdout
