from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.sources.clip_images import CLIP_MEAN, CLIP_STD, clip_transform, resize_and_crop


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


@pytest.mark.parametrize("size", [224, 33])
def test_pictures_come_out_as_from_the_processor_of_transformers(size: int) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.models.clip.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    shapes = [(28, 28), (300, 201), (201, 300), (size, size + 7), (64, 333), (512, size)]
    for seed, (width, height) in enumerate(shapes):
        for mode in ("RGB", "L", "P", "RGBA"):
            image = picture(width, height, mode, seed)
            want = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(clip_transform([image], size), want, atol=1e-6, rtol=0)


def test_pictures_of_different_sizes_make_one_batch_of_bytes() -> None:
    images = [picture(50, 20), picture(20, 40, "L"), picture(8, 8)]
    out = resize_and_crop(images, 16)
    assert out.shape == (3, 16, 16, 3) and out.dtype == torch.uint8
    for place, image in enumerate(images):
        assert torch.equal(out[place], resize_and_crop([image], 16)[0])
    assert torch.equal(out[1, ..., 0], out[1, ..., 1])


def test_the_middle_of_the_longer_side_is_kept() -> None:
    pixels = np.zeros((10, 40, 3), dtype=np.uint8)
    pixels[:, 15:25] = 200
    assert (resize_and_crop([Image.fromarray(pixels)], 10) == 200).all()
    assert (resize_and_crop([Image.fromarray(pixels.transpose(1, 0, 2))], 10) == 200).all()


def test_bytes_of_the_right_size_are_only_normalised_and_others_resized_as_pictures_are() -> None:
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(CLIP_MEAN).double(), torch.tensor(CLIP_STD).double()
    want = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    got = clip_transform(images, 12)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)
    pictures = [Image.fromarray(image.numpy()) for image in images]
    assert torch.equal(clip_transform(images, 20), clip_transform(pictures, 20))


def test_tensors_that_are_no_bytes_with_channels_last_are_refused() -> None:
    whole = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    for wrong in (whole.float(), whole.permute(0, 3, 1, 2), whole[0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(images, height, width, 3\)"):
            clip_transform(wrong, 8)
