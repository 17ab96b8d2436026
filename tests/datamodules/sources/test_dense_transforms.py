from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from datamodules.sources import dense_transforms
from datamodules.sources.dense_transforms import SCALES, CropZoomFlip, apply_crop_zoom_flip, draw_crop_zoom_flip

KINDS = {
    "segmentation": "segmentation",
    "depth": "depth",
    "normals": "normals",
    "boundary": "depth",
    "scene": "multiclass",
}


def batch(count: int, height: int, width: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, height, width, generator=generator), {
        "segmentation": torch.randint(-1, 7, (count, height, width), generator=generator),
        "depth": torch.rand(count, 1, height, width, generator=generator) * 5,
        "normals": F.normalize(torch.randn(count, 3, height, width, generator=generator), dim=1),
        "boundary": torch.rand(count, 1, height, width, generator=generator) + 1,
        "scene": torch.arange(count),
    }


def one_by_one(
    images: torch.Tensor, targets: dict[str, torch.Tensor], drawn: CropZoomFlip, powers: dict[str, int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The published procedure, sample by sample."""
    height, width = images.shape[-2:]
    out_images: list[torch.Tensor] = []
    out: dict[str, list[torch.Tensor]] = {name: [] for name in targets}
    for row in range(len(images)):
        scale = SCALES[int(drawn.choices[row])]
        h, w = int(height / scale), int(width / scale)
        top, left = int(drawn.tops[row]), int(drawn.lefts[row])

        def crop(value: torch.Tensor) -> torch.Tensor:
            return value[..., top : top + h, left : left + w]  # noqa: B023 - called within the round

        image = F.interpolate(crop(images[row])[None], size=(height, width), mode="bilinear", align_corners=True)[0]
        out_images.append(image.flip(-1) if drawn.flips[row] else image)
        for name, target in targets.items():
            value = target[row]
            if KINDS[name] == "multiclass":
                out[name].append(value)
                continue
            value = value[None] if KINDS[name] == "segmentation" else value
            value = F.interpolate(crop(value)[None].float(), size=(height, width), mode="nearest")[0].to(value.dtype)
            if KINDS[name] == "depth":
                value = value * scale if powers.get(name, -1) == 1 else value / scale
            if drawn.flips[row]:
                value = value.flip(-1)
                if KINDS[name] == "normals":
                    value = value * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
            out[name].append(value[0] if KINDS[name] == "segmentation" else value)
    return torch.stack(out_images), {name: torch.stack(values) for name, values in out.items()}


@pytest.mark.parametrize(("height", "width"), [(128, 256), (36, 48), (31, 45), (288, 384)])
def test_the_batched_transform_equals_the_published_one_sample_by_sample(height: int, width: int) -> None:
    count = 24 if height < 200 else 6
    images, targets = batch(count, height, width)
    kept = images.clone(), {name: value.clone() for name, value in targets.items()}
    drawn = draw_crop_zoom_flip(7, torch.arange(count), height, width)
    powers = {"boundary": 1}
    new_images, new_targets = apply_crop_zoom_flip(images, targets, KINDS, drawn, zoom_powers=powers)
    expected_images, expected = one_by_one(images, targets, drawn, powers)
    torch.testing.assert_close(new_images, expected_images, rtol=0, atol=1e-6)
    assert list(new_targets) == list(targets)
    for name, value in new_targets.items():
        assert value.dtype == targets[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    torch.testing.assert_close((images, targets), kept, rtol=0, atol=0)
    if count == 24:
        assert set(drawn.choices.tolist()) == {0, 1, 2}
        assert len(set(drawn.flips.tolist())) == 2


def test_a_batch_takes_one_interpolation_for_each_zoom(monkeypatch: pytest.MonkeyPatch) -> None:
    images, targets = batch(40, 36, 48)
    drawn = draw_crop_zoom_flip(1, torch.arange(40), 36, 48)
    apply_crop_zoom_flip(images, targets, KINDS, drawn)
    calls = []
    real = F.interpolate

    def counted(values: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(len(values))
        return real(values, **options)

    monkeypatch.setattr(dense_transforms.F, "interpolate", counted)
    apply_crop_zoom_flip(images, targets, KINDS, drawn)
    assert len(calls) == 2
    assert sum(calls) == int((drawn.choices > 0).sum())


def test_draws_are_uniform_within_the_picture_and_depend_on_key_and_index_alone() -> None:
    indices = torch.arange(60_000)
    drawn = draw_crop_zoom_flip(3, indices, 128, 256)
    assert (drawn.choices.bincount() / 60_000).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert float(drawn.flips.double().mean()) == pytest.approx(0.5, abs=0.01)
    for choice, (rows, columns) in enumerate([(0, 0), (22, 43), (43, 86)]):
        chosen = drawn.choices == choice
        assert (int(drawn.tops[chosen].min()), int(drawn.tops[chosen].max())) == (0, rows)
        assert (int(drawn.lefts[chosen].min()), int(drawn.lefts[chosen].max())) == (0, columns)
        assert float(drawn.tops[chosen].double().mean()) == pytest.approx(rows / 2, abs=0.4)
    columns_drawn = torch.stack([drawn.choices, drawn.tops, drawn.flips.long()]).double()[:, drawn.choices == 2][1:]
    assert abs(float(torch.corrcoef(columns_drawn)[0, 1])) < 0.03
    some = torch.tensor([59_999, 5, 5, 17])
    for part, whole in zip(draw_crop_zoom_flip(3, some, 128, 256), drawn, strict=True):
        assert torch.equal(part, whole[some])
    assert not torch.equal(draw_crop_zoom_flip(4, indices, 128, 256).tops, drawn.tops)
