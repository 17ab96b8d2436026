from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules.image_tasks import ImageTaskBatch, ImageTaskData, ImageTaskRows
from datamodules.loading import Draw, KeyedSampler, mix
from datamodules.sources import image_task_sample
from datamodules.sources.image_task_sample import DIGIT_SIZE, digit_parts, scene_rays, scene_truth, scenes
from datamodules.sources.image_task_sets import ArrayTable

if TYPE_CHECKING:
    from pathlib import Path

DIGITS = ("embedded", "multi_mnist", "multi_fashion", "multi_fashion_mnist")


def same(first: ImageTaskBatch, second: ImageTaskBatch) -> bool:
    pairs = [(first.images, second.images)]
    for one, other in ((first.targets, second.targets), (first.masks, second.masks)):
        assert list(one) == list(other)
        pairs += list(zip(one.values(), other.values(), strict=True))
    return all(torch.equal(one, other) for one, other in pairs)


def rows_of(batch: ImageTaskBatch, rows: torch.Tensor) -> ImageTaskBatch:
    return ImageTaskBatch(
        batch.images[rows],
        {name: target[rows] for name, target in batch.targets.items()},
        {name: mask[rows] for name, mask in batch.masks.items()},
    )


@pytest.mark.parametrize(
    ("source", "channels", "expected"),
    [
        *((source, 1, [("left", "multiclass", 10), ("right", "multiclass", 10)]) for source in DIGITS),
        (
            "embedded_scenes",
            3,
            [("segmentation", "segmentation", 5), ("depth", "depth", 1), ("normals", "normals", 3)],
        ),
        ("cityscapes", 3, [("segmentation", "segmentation", 7), ("depth", "depth", 1)]),
        ("nyuv2", 3, [("segmentation", "segmentation", 13), ("depth", "depth", 1), ("normals", "normals", 3)]),
        ("camvid", 3, [("segmentation", "segmentation", 11), ("boundary", "depth", 1)]),
    ],
)
def test_tasks_are_plain_values_known_without_any_file(
    source: str, channels: int, expected: list[tuple[str, str, int]], tmp_path: Path
) -> None:
    data = ImageTaskData(source, data_dir=None if source.startswith("embedded") else str(tmp_path))
    assert data.tasks == [
        {"name": name, "kind": kind, "num_outputs": outputs, "target_mean": 0.0, "target_std": 1.0}
        for name, kind, outputs in expected
    ]
    assert data.task_names == [name for name, _, _ in expected]
    assert data.in_channels == channels
    backwards = ImageTaskData(source, tasks=data.task_names[::-1])
    assert backwards.tasks == data.tasks[::-1]


def test_embedded_pairs_show_the_digits_of_their_labels_and_of_their_part_alone() -> None:
    parts = digit_parts()
    pictures = {stage: {image.tobytes(): label for image, label in zip(*part, strict=True)}
                for stage, part in parts.items()}  # fmt: skip
    assert [len(part.labels) for part in parts.values()] == [1_197, 300, 300]
    assert len({*pictures["train"], *pictures["validate"], *pictures["test"]}) == 1_797
    data = ImageTaskData(batch_size=1_000, eval_batch_size=500, num_pairs=2_500, num_eval=400)
    for stage, loader, count in (
        ("train", data.train_dataloader(), 2_500),
        ("validate", data.val_dataloader(), 400),
        ("test", data.test_dataloader(), 400),
    ):
        batches = list(loader)
        images = torch.cat([batch.images for batch in batches])
        assert images.shape == (count, 1, 12, 12)
        assert (float(images.min()), float(images.max())) == (0, 1)
        grey = (images[:, 0] * 16).round().to(torch.uint8).numpy()
        left = torch.cat([batch.targets["left"] for batch in batches])
        assert left.dtype == torch.int64
        # Where the other digit does not reach, a corner is the digit itself.
        corner = np.array([image.reshape(8, 8) for image in (np.frombuffer(b, np.uint8) for b in pictures[stage])])
        known = np.array(list(pictures[stage].values()))
        for row in range(0, count, 97):
            seen = (corner[:, :4] == grey[row, :4, :8]).all((1, 2)) & (corner[:, :, :4] == grey[row, :8, :4]).all(
                (1, 2)
            )
            assert left[row] in known[seen]
            right = batches[row // len(batches[0].images)].targets["right"][row % len(batches[0].images)]
            under = grey[row, 4:, 4:]
            seen = (corner[:, 4:] == under[4:]).all((1, 2)) & (corner[:, :, 4:] == under[:, 4:]).all((1, 2))
            assert right in known[seen]
    assert len(ImageTaskData()._parts[0]) == 1_197
    assert DIGIT_SIZE == 8


def test_scenes_have_exact_depths_and_normals() -> None:
    size = 40
    truth, height = scene_truth(60, size, np.random.default_rng(5))
    points = truth.depth[..., None] * scene_rays(size)
    assert np.allclose(np.linalg.norm(truth.normals, axis=-1), 1)
    many, _ = scene_truth(2_000, 16, np.random.default_rng(6))
    assert (np.sum(scene_rays(16) * many.normals, axis=-1) < 0).all(), "normals point to the camera"
    ground, wall = truth.classes == 0, truth.classes == 1
    assert np.allclose(points[..., 1][ground], np.broadcast_to(-height, ground.shape)[ground])
    assert (points[..., 1] >= -height - 1e-9).all(), "nothing is below the ground"
    for depth, behind in zip(truth.depth, wall, strict=True):
        assert np.ptp(depth[behind]) == 0
        assert (depth <= depth[behind].max() + 1e-9).all(), "nothing is behind the wall"
    found = dict.fromkeys((2, 3, 4), 0)
    for scene in range(60):
        for thing in range(1, 6):
            seen = truth.things[scene] == thing
            if seen.sum() < 12:
                continue
            where, facing = points[scene][seen], truth.normals[scene][seen]
            (label,) = np.unique(truth.classes[scene][seen])
            found[label] += 1
            if label == 3:
                # Going in along the normal by the radius leads to one centre.
                across, turned = (where - where[0]).ravel(), (facing - facing[0]).ravel()
                radius = (across @ turned) / (turned @ turned)
                assert 0.35 <= radius <= 0.9
                assert np.allclose(across, radius * turned, atol=1e-9)
            else:
                assert np.ptp(facing, axis=0).max() == 0
                assert np.allclose((where - where[0]) @ facing[0], 0, atol=1e-9)
    assert min(found.values()) > 10


def test_each_pixel_shows_the_nearest_surface(monkeypatch: pytest.MonkeyPatch) -> None:
    hit, met = image_task_sample._hit, []

    def recorded(*arguments: Any) -> Any:
        met.append(hit(*arguments))
        return met[-1]

    monkeypatch.setattr(image_task_sample, "_hit", recorded)
    truth, height = scene_truth(80, 24, np.random.default_rng(2))
    down = scene_rays(24)[..., 1]
    ground = np.where(down < 0, -height / np.where(down < 0, down, -1), np.inf)
    assert (truth.depth <= ground + 1e-9).all()
    overlaps = 0
    for thing, (depth, _) in enumerate(met, start=1):
        seen = truth.things == thing
        there = seen.any((1, 2))  # an object of which something is seen is in the scene
        assert np.array_equal(truth.depth[seen], depth[seen])
        assert (truth.depth[there] <= depth[there]).all()
        overlaps += int((np.isfinite(depth[there]) & ~seen[there] & (truth.things[there] > 0)).sum())
    assert overlaps > 100


def test_scene_tables_mark_borders_and_unknown_depths_and_parts_differ() -> None:
    table = scenes(50)
    labels, depth = table.targets["segmentation"], table.targets["depth"]
    truth, _ = scene_truth(50, 32, np.random.default_rng([0, 0]))
    surface = truth.things * 10 + truth.classes
    for row in range(32):
        for column in range(32):
            right, below = min(column + 1, 31), min(row + 1, 31)
            here = surface[:, row, column]
            border = (surface[:, row, right] != here) | (surface[:, below, column] != here)
            assert np.array_equal(labels[:, row, column], np.where(border, -1, truth.classes[:, row, column]))
    known = depth[:, 0] > 0
    assert float(known.double().mean()) == pytest.approx(0.95, abs=0.005)
    assert np.array_equal(depth[:, 0][known], truth.depth.astype(np.float32)[known.numpy()])
    assert np.array_equal(table.targets["normals"], truth.normals.transpose(0, 3, 1, 2).astype(np.float32))
    assert torch.equal(scenes(50).images, table.images)
    assert not any(torch.equal(scenes(50, part=part).images, table.images) for part in ("validate", "test"))


def test_images_stay_bytes_until_they_are_gathered() -> None:
    for source in ("embedded", "embedded_scenes"):
        data = ImageTaskData(source)
        for table in (*data._parts, data._test_table):
            assert isinstance(table, ArrayTable)
            assert table.images.dtype == torch.uint8
    assert table.targets["segmentation"].dtype == torch.int8
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, ImageTaskBatch)
    assert batch.images.dtype == torch.float32
    assert batch.targets["segmentation"].dtype == torch.int64
    assert data._scenes == (256, 64, 32)
    large = ImageTaskData("embedded_scenes", num_scenes=5, num_eval=3, scene_size=48)
    assert next(iter(large.train_dataloader())).images.shape == (5, 3, 48, 48)
    assert next(iter(large.val_dataloader())).targets["normals"].shape == (3, 3, 48, 48)


def test_augmentation_and_missing_labels_of_an_image_do_not_depend_on_its_batch_rank_or_worker() -> None:
    options: dict[str, Any] = {"num_scenes": 24, "augment": True, "missing_fraction": 0.25, "seed": 3}
    data = ImageTaskData("embedded_scenes", batch_size=8, **options)
    whole = list(data.train_dataloader())
    assert len(whole) == 3
    assert [len(batch.masks) for batch in whole] == [3, 3, 3]
    workers = ImageTaskData("embedded_scenes", batch_size=8, num_workers=2, **options)
    for one, other in zip(whole, workers.train_dataloader(), strict=True):
        assert same(one, other)
    rows = data.train_dataloader().dataset
    for rank in range(2):
        sampler = KeyedSampler(24, 4, shuffle=True, equal=True, seed=3, num_replicas=2, rank=rank)
        for draw, batch in zip(sampler, whole, strict=True):
            part = torch.arange(rank * 4, rank * 4 + 4)
            assert same(rows[draw], rows_of(batch, part))
    key, order = mix(3, 0), torch.randperm(24, generator=torch.Generator().manual_seed(mix(3, 0)))
    for place in range(8):
        assert same(rows[Draw(order[place : place + 1], key)], rows_of(whole[0], torch.tensor([place])))


def test_augmentation_is_new_in_every_epoch_and_absent_from_evaluation() -> None:
    data = ImageTaskData("embedded_scenes", augment=True, num_scenes=20)
    loader = data.train_dataloader()
    rows = loader.dataset
    plain = ImageTaskRows(data._parts[0], data._kinds)[Draw(torch.arange(20), 0)]
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        (draw,) = list(loader.sampler)
        epochs.append(rows[Draw(torch.arange(20), draw.key)])
    unchanged = [(a == b).flatten(1).all(1) for a, b in ((epochs[0].images, epochs[1].images),
                                                         (epochs[0].images, plain.images))]  # fmt: skip
    assert all(int(equal.sum()) < 10 for equal in unchanged)
    for held_out, table in ((data.val_dataloader(), data._parts[1]), (data.test_dataloader(), data._test_table)):
        (batch,) = list(held_out)
        images, targets = table.gather(torch.arange(64))
        assert same(batch, ImageTaskBatch(images, targets, {}))


def test_a_zoom_divides_depths_and_multiplies_distances_to_the_boundary() -> None:
    images = torch.zeros(64, 3, 24, 24, dtype=torch.uint8)
    table = ArrayTable(
        images, {"depth": torch.full((64, 1, 24, 24), 6.0), "boundary": torch.full((64, 1, 24, 24), 6.0)}
    )
    batch = ImageTaskRows(table, {"depth": "depth", "boundary": "depth"}, augment=True)[Draw(torch.arange(64), 1)]
    zooms = 6 / batch.targets["depth"]
    assert {round(float(zoom), 4) for zoom in zooms.unique()} == {1.0, 1.2, 1.5}
    torch.testing.assert_close(batch.targets["boundary"], 6 * zooms)


def test_the_share_of_labels_that_is_missing_is_exact_fixed_and_independent_for_each_task() -> None:
    data = ImageTaskData(num_pairs=1_000, batch_size=1_000, missing_fraction=0.3, seed=1)
    full = ImageTaskData(num_pairs=1_000, batch_size=1_000, seed=1)
    loader, whole = data.train_dataloader(), next(iter(full.train_dataloader()))
    assert whole.masks == {}
    batch = next(iter(loader))
    for name, mask in batch.masks.items():
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == 700
        assert torch.equal(batch.targets[name][mask], whole.targets[name][mask])
        assert not batch.targets[name][~mask].any(), "a hidden label is nowhere in the batch"
    both = (~batch.masks["left"] & ~batch.masks["right"]).sum()
    assert 60 < int(both) < 120, "independent: 90 of 1,000"
    order = next(iter(loader.sampler)).indices
    loader.sampler.set_epoch(1)
    later, later_order = next(iter(loader)), next(iter(loader.sampler)).indices
    assert not torch.equal(order, later_order)
    for name in data.task_names:
        assert torch.equal(batch.masks[name][order.argsort()], later.masks[name][later_order.argsort()])
    right = ImageTaskData(num_pairs=1_000, batch_size=1_000, missing_fraction=0.3, seed=1, tasks=["right"])
    assert torch.equal(next(iter(right.train_dataloader())).masks["right"], batch.masks["right"])
    other = ImageTaskData(num_pairs=1_000, missing_fraction=0.3, seed=2)
    assert not torch.equal(other._hidden["left"], data._hidden["left"])
    for held_out in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert all(part.masks == {} for part in held_out)


def test_hidden_labels_of_pixels_are_undefined() -> None:
    data = ImageTaskData("embedded_scenes", num_scenes=40, batch_size=40, missing_fraction=0.5)
    batch = next(iter(data.train_dataloader()))
    for name, undefined in (("segmentation", -1), ("depth", 0), ("normals", 0)):
        hidden = batch.targets[name][~batch.masks[name]]
        assert len(hidden) == 20
        assert bool((hidden == undefined).all())
        assert bool((batch.targets[name][batch.masks[name]] != undefined).any())


def test_new_scenes_and_new_digits_can_be_tested(tmp_path: Path) -> None:
    table = scenes(3, part="test", seed=9)
    images, targets = table.gather(torch.arange(3))
    for row in range(3):
        for folder, array in (("image", images), ("label", targets["segmentation"]), ("depth", targets["depth"]),
                              ("normals", targets["normals"])):  # fmt: skip
            (tmp_path / folder).mkdir(exist_ok=True)
            np.save(tmp_path / folder / f"{row}.npy", array[row].numpy())
    data = ImageTaskData("embedded_scenes", test_path=str(tmp_path))
    (batch,) = list(data.test_dataloader())
    assert same(batch, ImageTaskBatch(images, targets, {}))
    digits = tmp_path / "digits.npz"
    x = np.arange(4, dtype=np.uint8).repeat(64).reshape(4, 8, 8)
    np.savez(digits, x_test=x, y_test=np.arange(4))
    (batch,) = list(ImageTaskData(test_path=str(digits)).test_dataloader())
    assert torch.equal((batch.images[:, 0, 0, 0] * 16).long(), batch.targets["left"])
    np.savez(digits, x_test=x + 14, y_test=np.arange(4))
    with pytest.raises(ValueError, match=r"digits\.npz: x_test has the value 17: expected 0 to 16"):
        ImageTaskData(test_path=str(digits)).setup("test")


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer_weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[ImageTaskBatch]] = {"fit": [], "validate": [], "test": [], "predict": []}

    def training_step(self, batch: ImageTaskBatch, batch_idx: int) -> torch.Tensor:
        self.seen["fit"].append(batch)
        return self.layer_weight * batch.images.mean()

    def validation_step(self, batch: ImageTaskBatch, batch_idx: int) -> None:
        self.seen["validate"].append(batch)

    def test_step(self, batch: ImageTaskBatch, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: ImageTaskBatch, batch_idx: int) -> torch.Tensor:
        return batch.images

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_takes_the_parts_in_turn(tmp_path: Path) -> None:
    data = ImageTaskData("embedded_scenes", num_scenes=6, num_eval=3, batch_size=4, eval_batch_size=2)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, log_every_n_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Recorder()
    trainer.fit(model, data)
    assert [len(batch.images) for batch in model.seen["fit"]] == [4, 2, 4, 2]
    assert not torch.equal(model.seen["fit"][0].images, model.seen["fit"][2].images)
    assert [len(batch.images) for batch in model.seen["validate"]] == [2, 1, 2, 1]
    trainer.test(model, data, verbose=False)
    predicted = trainer.predict(model, data)
    assert predicted is not None
    tested = torch.cat([batch.images for batch in model.seen["test"]])
    assert torch.equal(torch.cat(predicted), tested)  # type: ignore[arg-type]
    assert torch.equal(tested, data._test_table.gather(torch.arange(3))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "mnist"}, "source must be one of embedded, embedded_scenes, .* got 'mnist'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"num_eval": 0}, "num_eval must be at least 1"),
        ({"source": "embedded_scenes", "scene_size": 8}, "scene_size must be at least 16, got 8"),
        ({"source": "embedded_scenes", "num_pairs": 5}, "num_pairs=5 has no meaning for source='embedded_scenes'"),
        ({"num_scenes": 5}, "num_scenes=5 has no meaning for source='embedded': expected embedded_scenes"),
        ({"source": "nyuv2", "num_eval": 5}, "num_eval=5 has no meaning for source='nyuv2'"),
        ({"missing_fraction": 1.0}, "missing_fraction must be at least 0 and below 1, got 1.0"),
        ({"missing_fraction": -0.1}, "missing_fraction must be at least 0 and below 1"),
        ({"augment": True}, "augment=True would change the labels of source='embedded'"),
        ({"data_dir": "x"}, "data_dir=x has no meaning for source='embedded', which has no file"),
        ({"tasks": []}, "tasks must name at least one of left, right, each once"),
        ({"tasks": ["left", "left"]}, "tasks must name at least one of left, right, each once"),
        ({"tasks": ["left", "depth"]}, "tasks has 'depth', but source='embedded' has left, right"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTaskData(**options)
