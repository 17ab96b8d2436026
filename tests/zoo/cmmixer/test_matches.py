"""What a retriever finds: lists of predictions, and pictures of a test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.zoo.cmmixer.small_clips import ENCODER, Clips, batches, clips, fit, loader, trainer, uneven
from zoo.cmmixer import figures, matches
from zoo.cmmixer.retriever import AVRetriever

if TYPE_CHECKING:
    from pathlib import Path


def build(**options: Any) -> AVRetriever:
    torch.manual_seed(0)
    return uneven(AVRetriever(**{**ENCODER, "proj_dim": 8, "projector": "linear", **options}))


def embedded(module: Any, parts: list[Clips]) -> tuple[torch.Tensor, torch.Tensor]:
    module.eval()
    with torch.no_grad():
        found = [module(part.video, part.audio) for part in parts]
    video, audio = (torch.cat(vectors) for vectors in zip(*found, strict=True))
    return video, audio


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("top_k", "chunk"), [(3, 1024), (3, 2), (100, 1024)])
def test_every_query_of_both_directions_has_its_best_items(
    top_k: int, chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matches, "_CHUNK", chunk)
    module, parts = build(top_k=top_k), [clips(4, 0), clips(3, 1)]
    found: Any = trainer(tmp_path).predict(module, loader(parts))
    video, audio = embedded(module, parts)
    assert torch.equal(torch.cat([part["video"] for part in found]), video)
    assert torch.equal(torch.cat([part["audio"] for part in found]), audio)
    ids = [id_ for part in parts for id_ in part.pair_ids.tolist()]
    assert [id_ for part in found for id_ in part["pair_ids"].tolist()] == ids
    written = lines(tmp_path)
    assert [(line["query"], line["pair_id"]) for line in written] == [
        (name, str(id_)) for name in ("video", "audio") for id_ in ids
    ]
    for line, scores in zip(written, [*(video @ audio.T), *(audio @ video.T)], strict=True):
        order = sorted(range(7), key=lambda i: -float(scores[i]))[:top_k]
        assert line.keys() == {"query", "pair_id", "found", "scores"}
        assert line["found"] == [str(ids[i]) for i in order]
        assert line["scores"] == pytest.approx([float(scores[i]) for i in order], abs=1e-6)


def test_a_second_prediction_has_a_gallery_of_its_own(tmp_path: Path) -> None:
    module = build()
    trainer(tmp_path).predict(module, loader(batches(2)))
    trainer(tmp_path).predict(module, loader([clips(3, 5)]))
    assert [line["pair_id"] for line in lines(tmp_path)] == ["507", "508", "509"] * 2
    assert all(sorted(line["found"]) == ["507", "508", "509"] for line in lines(tmp_path))


def test_a_test_leaves_pictures_and_nothing_in_a_later_prediction(tmp_path: Path) -> None:
    module = build()
    trainer(tmp_path).test(module, loader(batches(2)), verbose=False)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"figures/test/similarity.png", "figures/test/retrieval.png"}
    trainer(tmp_path).predict(module, loader([clips(3)]))
    assert len(lines(tmp_path)) == 6


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    module = build()
    fit(module, batches(1), tmp_path, batches(1), fast_dev_run=True)
    trainer(tmp_path, fast_dev_run=True).test(module, loader(batches(2)), verbose=False)
    trainer(tmp_path, fast_dev_run=True).predict(module, loader(batches(2)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("relevance", ["pair", "label"])
def test_pictures_are_of_the_first_pairs_and_their_ids(
    relevance: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: dict[str, Any] = {}
    for name in ("draw_similarity", "draw_retrieval"):
        draw = getattr(figures, name)

        def kept(*arguments: Any, name: str = name, draw: Any = draw) -> Any:
            drawn[name] = arguments
            return draw(*arguments)

        monkeypatch.setattr(figures, name, kept)
    monkeypatch.setattr(matches, "_SHOWN", 6)
    module, parts = build(relevance=relevance), batches(3)
    trainer(tmp_path).test(module, loader(parts), verbose=False)
    video, audio = embedded(module, parts)
    ids = torch.cat([part.labels if relevance == "label" else part.pair_ids for part in parts])[:6]
    similarity, shown = drawn["draw_similarity"]
    torch.testing.assert_close(similarity, video[:6] @ audio[:6].T)
    assert torch.equal(shown, ids)
    first, second, scores, shown = drawn["draw_retrieval"]
    assert torch.equal(first, torch.cat([part.video[:, 0] for part in parts])[:6])
    assert torch.equal(second, torch.cat([part.audio[:, 0] for part in parts])[:6])
    assert torch.equal(scores, similarity) and torch.equal(shown, ids)
    trainer(tmp_path).test(module, loader(parts[1:]), verbose=False)
    assert torch.equal(drawn["draw_retrieval"][0], torch.cat([part.video[:, 0] for part in parts[1:]])[:6])
