from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from datamodules.sources import corruptions
from datamodules.sources.corruptions import CORRUPTIONS, SEVERITIES, TABLES, corrupt, table_for

RANDOM = ("motion_blur", "impulse_noise", "gaussian_noise", "spatter")


def pictures(count: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth colourful fields with some texture, uint8."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(count, height, width, 3)), (0, 3, 3, 0), mode="wrap")
    fields = 128 + 60 * fields / fields.std() + rng.normal(scale=8, size=fields.shape)
    return torch.from_numpy(fields.clip(0, 255).astype(np.uint8))


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_every_corruption_changes_each_image_and_leaves_what_was_given(name: str, size: tuple[int, int]) -> None:
    images = pictures(3, *size)
    before = images.clone()
    out = corrupt(images, name, 3, key=1)
    assert torch.equal(images, before)
    assert out.dtype == torch.uint8 and out.shape == images.shape
    assert all(not torch.equal(new, old) for new, old in zip(out, images, strict=True))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("table", TABLES)
def test_images_are_further_from_the_clean_ones_at_higher_severities(name: str, table: str) -> None:
    images = pictures(24, TABLES[table] // (4 if table == "imagenet" else 1), 48)
    distances = [distance(corrupt(images, name, severity, 0, table=table), images) for severity in range(1, 6)]
    if name == "spatter":  # of water up to severity 3, of mud above
        assert distances[0] < distances[1] and distances[3] < distances[4]
    else:
        assert distances == sorted(distances)
        # CIFAR-10-C's motion blur has one deviation at severities 3 and 4, and what its larger radius adds is nothing.
        assert len(set(distances)) == (4 if (name, table) == ("motion_blur", "cifar") else 5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_the_same_each_time_and_in_every_cut_of_the_data_into_batches(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, rows = pictures(7), torch.arange(7)
    for severity in (2, 5):
        whole = corrupt(images, name, severity, 3)
        assert torch.equal(whole, corrupt(images, name, severity, 3))
        parts = [corrupt(images[part], name, severity, 3, rows[part]) for part in (rows[:1], rows[1:3], rows[3:])]
        assert torch.equal(whole, torch.cat(parts))
        order = torch.tensor([4, 0, 6])
        assert torch.equal(whole[order], corrupt(images[order], name, severity, 3, order))
        monkeypatch.setattr(corruptions, "_PIECE", 2 * 32 * 32 * 3)
        assert torch.equal(whole, corrupt(images, name, severity, 3))
        monkeypatch.undo()


@pytest.mark.parametrize("name", RANDOM)
def test_equal_images_get_different_draws_by_row_and_by_key(name: str) -> None:
    images = pictures(1).expand(3, -1, -1, -1)
    out = corrupt(images, name, 3, 3)
    assert not torch.equal(out[0], out[1]) and not torch.equal(out[1], out[2])
    assert not torch.equal(out, corrupt(images, name, 3, 4))


def test_a_batch_without_images_stays_empty() -> None:
    assert corrupt(pictures(1)[:0], "spatter", 1, 0).shape == (0, 32, 32, 3)


def test_the_table_is_that_of_the_nearest_size_and_may_be_chosen() -> None:
    sizes = {20: "cifar", 32: "cifar", 45: "cifar", 46: "tiny_imagenet", 64: "tiny_imagenet", 119: "tiny_imagenet"}
    sizes |= {120: "imagenet", 224: "imagenet", 500: "imagenet"}
    assert {size: table_for(size, size + 30) for size in sizes} == sizes
    assert table_for(300, 32) == "cifar"
    images = pictures(2)
    assert torch.equal(corrupt(images, "contrast", 1, 0), corrupt(images, "contrast", 1, 0, table="cifar"))
    assert not torch.equal(corrupt(images, "contrast", 1, 0), corrupt(images, "contrast", 1, 0, table="imagenet"))


def test_tables_have_five_severities_for_each_size() -> None:
    for name, tables in SEVERITIES.items():
        assert list(tables) == list(TABLES), name
        assert all(len(levels) == 5 for levels in tables.values()), name


@pytest.mark.parametrize(("table", "severity", "std"), [("cifar", 2, 0.06), ("tiny_imagenet", 3, 0.12)])
def test_gaussian_noise_has_the_standard_deviation_of_the_table_and_is_normal(
    table: str, severity: int, std: float
) -> None:
    grey = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)
    noise = corrupt(grey, "gaussian_noise", severity, 0, table=table).numpy() - 128.0
    # Fractions are cut off: half a level less on average, and a variance of 1/12 more.
    assert noise.mean() == pytest.approx(-0.5, abs=5 * 255 * std / noise.size**0.5)
    assert noise.std() == pytest.approx(((255 * std) ** 2 + 1 / 12) ** 0.5, rel=0.01)
    assert stats.kstest((noise + 0.5).ravel()[::7] / (255 * std), "norm").statistic < 0.025
    together = np.corrcoef(noise.reshape(40, -1))
    assert np.abs(together - np.eye(40)).max() < 0.1
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.02


def test_impulse_noise_hits_its_share_of_the_values_with_black_and_white_alike() -> None:
    grey = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)
    for severity, share in enumerate((0.01, 0.02, 0.03, 0.05, 0.07), start=1):
        out = corrupt(grey, "impulse_noise", severity, 0)
        assert set(out.unique().tolist()) == {0, 128, 255}
        for value in (0, 255):
            assert float((out == value).float().mean()) == pytest.approx(share / 2, rel=0.1)
    assert not torch.equal(out[..., 0], out[..., 1])


def test_contrast_shrinks_differences_from_the_mean_of_image_and_channel() -> None:
    images = pictures(2, 30, 36)
    for severity, factor in enumerate((0.75, 0.5, 0.4, 0.3, 0.15), start=1):
        out = corrupt(images, "contrast", severity, 0)
        for image in range(2):
            for channel in range(3):
                values = images[image, ..., channel].double()
                want = (values.mean() + factor * (values - values.mean())).floor().byte()
                assert torch.equal(out[image, ..., channel], want)
    flat = torch.full((1, 32, 32, 3), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(flat, "contrast", 5, 0), flat)


@pytest.mark.parametrize(("severity", "quality"), [(1, 80), (2, 65), (5, 40)])
def test_jpeg_compression_is_pil_at_the_quality_of_the_table(severity: int, quality: int) -> None:
    images = pictures(2, 32, 40)
    out = corrupt(images, "jpeg_compression", severity, 0)
    for new, old in zip(out, images, strict=True):
        file = io.BytesIO()
        Image.fromarray(old.numpy()).save(file, "JPEG", quality=quality)
        assert np.array_equal(new.numpy(), np.asarray(Image.open(file)))


def test_pixelate_is_pil_s_box_filter_there_and_back() -> None:
    images = pictures(2, 32, 50)
    out = corrupt(images, "pixelate", 4, 0)
    for new, old in zip(out, images, strict=True):
        small = Image.fromarray(old.numpy()).resize((37, 24), Image.Resampling.BOX)
        assert np.array_equal(new.numpy(), np.asarray(small.resize((50, 32), Image.Resampling.BOX)))
    assert corrupt(pictures(1, 2, 3), "pixelate", 5, 0, table="imagenet").shape == (1, 2, 3, 3)


@pytest.mark.parametrize("severity", [1, 4])
def test_motion_blur_is_half_a_gaussian_along_a_line_with_edges_repeated(severity: int) -> None:
    images = pictures(2, 20, 14)
    out = corrupt(images, "motion_blur", severity, 6)
    radius, sigma = {1: (6, 1.0), 4: (8, 2.0)}[severity]
    angles = np.deg2rad(90 * corruptions._uniform(6, np.arange(2), ()) - 45)
    assert np.abs(angles).max() < np.pi / 4
    for image, angle in enumerate(angles):
        total, weights = np.zeros((20, 14, 3)), 0.0
        for step in range(2 * radius + 1):
            dx, dy = (int(np.ceil(step * part - 0.5)) for part in (np.cos(angle), np.sin(angle)))
            weight = np.exp(-(step**2) / (2 * sigma**2))
            weights += weight
            for y in range(20):
                for x in range(14):
                    total[y, x] += weight * images[image, min(max(y + dy, 0), 19), min(x + dx, 13)].numpy()
        assert np.abs(out[image].numpy() - total / weights).max() <= 0.501
    flat = torch.full((1, 32, 32, 3), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(flat, "motion_blur", 5, 0), flat)


def test_angles_of_the_motion_are_spread_from_minus_45_to_45_degrees() -> None:
    draw = corruptions._uniform(0, np.arange(2000), ())
    assert stats.kstest(draw, "uniform").statistic < 0.04


def waves() -> np.ndarray:
    """A layer of water, uint8 `(1, 24, 24)`."""
    y, x = np.mgrid[:24, :24]
    layer = 120 + (20 + 3 * y) * np.sin(x / 2.3 + y / 7) * np.cos(y / 3.1 - x / 9)
    return np.rint(layer).clip(0, 255).astype(np.uint8)[None]


def test_edges_of_water_are_those_that_opencv_finds() -> None:
    found = (
        "01000001f0000198000101e0060320050607019c0c00980801003002c0700c4000085b0c301d087031050060720cc0620890820411823a11"
        "2262106640c82440cc60410198410200"
    )
    want = np.unpackbits(np.frombuffer(bytes.fromhex(found), dtype=np.uint8)).reshape(24, 24).astype(bool)
    assert np.array_equal(corruptions._edges(waves())[0], want)


def test_a_weak_edge_stays_only_beside_a_strong_one_of_its_own_image() -> None:
    layers = np.zeros((2, 9, 9), dtype=np.uint8)
    layers[0, :, 5:] = 100
    layers[1, :, 5:] = 30  # a gradient of 120, between the two thresholds
    edges = corruptions._edges(layers)
    assert edges[0].any() and not edges[1].any()


def test_water_is_lit_as_opencv_does_but_for_its_approximate_distances() -> None:
    y, x = np.mgrid[:64, :64]
    layer = 255 * np.exp(-((x - 12) ** 2 + (y - 50) ** 2) / 90) + 230 * np.exp(-((x - 36) ** 2 + (y - 30) ** 2) / 900)
    layer = np.rint(layer).clip(0, 255)
    shine = np.rint(255 * corruptions._relief(np.where(layer < 90, 0, layer).astype(np.uint8)[None])[0])
    row = [0, 34, 103, 128, 145, 155, 150, 169, 194, 217, 233, 238, 235, 217, 187, 165, 138, 111, 92, 86]
    column = [219, 220, 229, 231, 212, 163, 100, 46, 22, 11, 4, 4, 56, 98]
    assert np.abs(shine[30, 4::3] - row).mean() <= 2
    assert np.abs(shine[44:58, 12] - column).mean() <= 8


def test_means_of_three_by_three_mirror_the_image_at_its_border() -> None:
    values = np.arange(12.0).reshape(1, 3, 4)
    mirrored = np.pad(values[0], 1, mode="reflect")
    want = [[mirrored[y : y + 3, x : x + 3].mean() for x in range(4)] for y in range(3)]
    assert np.allclose(corruptions._mean_3x3(values)[0], want)


def test_water_that_is_far_from_its_edge_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = np.full((1, 8, 60), 200, dtype=np.uint8)
    near = np.broadcast_to(np.arange(60.0), layer.shape)
    monkeypatch.setattr(corruptions, "_distances", lambda edges: near)
    shine = corruptions._relief(layer)
    monkeypatch.setattr(corruptions, "_distances", lambda edges: np.where(near > 20, 100 - near, near))
    assert np.array_equal(corruptions._relief(layer), shine)


def test_distances_are_to_edges_of_the_same_image() -> None:
    edges = np.zeros((2, 5, 9), dtype=bool)
    edges[0, 2, 4] = True
    got = corruptions._distances(edges)
    y, x = np.mgrid[:5, :9]
    assert np.allclose(got[0], np.hypot(y - 2, x - 4))
    assert (got[1] > 1000).all() and (corruptions._distances(edges[1:]) > 1000).all()


def test_histograms_are_equalised_for_each_image_alone() -> None:
    values = np.stack([waves()[0], waves()[0] // 3 + 9, np.full((24, 24), 30, dtype=np.uint8)])
    got = corruptions._equalised(values)
    for image in (0, 1):
        least = int((values[image] == values[image].min()).sum())
        below = np.array([[int((values[image] <= v).sum()) for v in row] for row in values[image]])
        assert np.array_equal(got[image], np.rint((below - least) * 255 / (576 - least)))
    assert np.array_equal(got[2], values[2])
    assert int(got[0].sum()) == 74226  # OpenCV's result


def test_water_shines_where_there_is_some_and_mud_is_brown() -> None:
    layers = np.concatenate([np.where(waves() > 140, waves(), 0), np.zeros_like(waves())]).astype(np.uint8)
    shine = corruptions._relief(layers)
    assert shine[0].max() == 1 and shine.min() == 0
    assert not shine[layers == 0].any()
    black = torch.zeros(4, 64, 64, 3, dtype=torch.uint8)
    water = corrupt(black, "spatter", 3, 0, table="cifar")
    brightest = water.flatten(1, 2)[0, water[0].flatten(0, 1).sum(1).argmax()]
    assert brightest.tolist() == [87, 119, 119]  # half of (175, 238, 238)
    mud = corrupt(black, "spatter", 5, 0, table="imagenet").float()
    assert mud.amax((0, 1, 2)).tolist() in ([63, 42, 20], [62, 41, 19])
    assert not ((mud[..., 0] > 0) & (mud[..., 0] < 50)).any()  # thinner mud is left out
    white = corrupt(torch.full_like(black, 255), "spatter", 5, 0, table="imagenet")
    assert white[mud[..., 0] >= 62].max() < 66


def test_unknown_names_severities_tables_and_shapes_are_refused() -> None:
    images = pictures(2)
    with pytest.raises(ValueError, match=r"corruption must be one of motion_blur, .*'fog'"):
        corrupt(images, "fog", 1, 0)
    for severity in (0, 6, -1):
        with pytest.raises(ValueError, match="severity must be 1, 2, 3, 4 or 5"):
            corrupt(images, "contrast", severity, 0)
    with pytest.raises(ValueError, match=r"table must be auto, cifar, tiny_imagenet, imagenet, got 'mnist'"):
        corrupt(images, "contrast", 1, 0, table="mnist")
    for wrong in (images.float(), images[0], images.permute(0, 3, 1, 2), images[:, :0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(images, height, width, 3\)"):
            corrupt(wrong, "contrast", 1, 0)
    for rows in (torch.arange(3), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected int64 \(2,\)"):
            corrupt(images, "contrast", 1, 0, rows)
