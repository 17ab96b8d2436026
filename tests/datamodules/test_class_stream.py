from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import datamodules
from datamodules.class_stream import ClassStreamData, EvalBatch, StreamBatch
from datamodules.class_stream_batches import StreamSteps, Stretch, to_canonical
from datamodules.class_stream_parts import split_classes
from datamodules.loading import Draw
from datamodules.sources.classification_sets import MemorySets
from tests.datamodules.sources.test_classification_sets import write_npz
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

COUNTS = (120, 40, 40, 40, 30, 30)
"""Training images of each class; there are 10 of each for test."""


def sets(pixels: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Images 8 x 8 whose first two pixels are the number of the image and its part, the others drawn by `pixels`."""
    found = {}
    for part, counts in (("train", COUNTS), ("test", (10,) * 6)):
        count, generator = sum(counts), torch.Generator().manual_seed(7)
        labels = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
        labels = labels[torch.randperm(count, generator=generator)]
        images = torch.randint(0, 256, (count, 8, 8), dtype=torch.uint8, generator=generator.manual_seed(pixels))
        numbers = torch.arange(count)
        images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = numbers % 250, numbers // 250, int(part == "test")
        found[part] = images, labels
    return found


def data(**options: Any) -> ClassStreamData:
    given = {"num_tasks": 3, "iterations_per_task": 7, "batch_size": 8, "seed": 1, **options}
    return ClassStreamData.from_datasets(given.pop("datasets", sets()), **given)


def numbers(images: Tensor) -> list[int]:
    """Which images of the set they are, by their pixels; canonical ones too."""
    if images.is_floating_point():
        images = ((images + 1) * 127.5).round()
    return (images[:, 0, 0, 0].int() + 250 * images[:, 0, 0, 1].int()).tolist()


def same(first: Iterable[StreamBatch], second: Iterable[StreamBatch]) -> bool:
    def equal(one: StreamBatch, other: StreamBatch) -> bool:
        tensors = zip(one[4:], other[4:], strict=True)
        return one[:4] == other[:4] and all(a is b if a is None or b is None else torch.equal(a, b) for a, b in tensors)

    return all(equal(one, other) for one, other in zip(first, second, strict=True))


def stream(source: ClassStreamData) -> list[StreamBatch]:
    """All batches of the stream, epoch by epoch as a Trainer draws them."""
    loader = source.train_dataloader()
    batches = []
    for epoch in range(len(source.task_classes)):
        loader.sampler.set_epoch(epoch)
        assert len(loader) == source.iterations_per_task
        batches += list(loader)
    return batches


def test_classes_are_shared_out_in_ascending_order_or_in_a_drawn_one() -> None:
    assert split_classes(10) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert split_classes(6, 2) == [[0, 1, 2], [3, 4, 5]]
    signs = split_classes(43, classes_per_task=4)
    assert len(signs) == 10 and signs[9] == [36, 37, 38, 39]
    assert split_classes(10, 2, 3) == [[0, 1, 2], [3, 4, 5]]
    drawn = split_classes(43, classes_per_task=4, class_order_seed=3)
    assert drawn == split_classes(43, 10, 4, 3) != split_classes(43, 10, 4, 4)
    labels = [label for task in drawn for label in task]
    assert len(set(labels)) == 40 and labels != list(range(40)) and all(task == sorted(task) for task in drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((43, 5), "43 classes do not divide into num_tasks=5: .* classes_per_task=8, which leaves 3 of them out"),
        ((10, 10), "num_tasks=10 gives each task 1 of 10 classes: expected at least 2"),
        ((10, 12), "num_tasks=12 gives each task 0 of 10 classes"),
        ((10, 3, 4), "num_tasks=3 with classes_per_task=4 take 12 classes, but there are 10"),
        ((10, None, 11), "num_tasks=1 with classes_per_task=11 take 11 classes, but there are 10"),
    ],
)
def test_a_split_that_does_not_work_out_is_refused_with_its_numbers(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_classes(*arguments)


def test_classes_of_no_task_are_logged_and_keep_their_column(caplog: pytest.LogCaptureFixture) -> None:
    source = data(num_tasks=2, classes_per_task=2, class_order_seed=5)
    with caplog.at_level(logging.INFO):
        used = {label for task in source.task_classes for label in task}
    unused = ", ".join(str(label) for label in range(6) if label not in used)
    assert f"2 of 6 classes are in no task: {unused}" in caplog.text
    assert source.num_classes == 6 and source.class_names == list("012345")
    assert {int(label) for task in range(2) for label in source.private(task)[1]} == used
    shown = {int(label) for loader in source.test_dataloader() for batch in loader for label in batch.labels}
    assert shown == used


def test_private_images_are_all_of_a_tasks_classes_under_their_own_labels() -> None:
    source, (images, labels) = data(class_order_seed=2), sets()["train"]
    seen = []
    for task, classes in enumerate(source.task_classes):
        found, known = source.private(task)
        assert found.dtype == torch.uint8 and found.shape[1:] == (1, 8, 8)
        assert sorted(set(known.tolist())) == classes
        assert torch.equal(found[:, 0], images[numbers(found)]) and torch.equal(known, labels[numbers(found)])
        seen += numbers(found)
    assert sorted(seen) == list(range(sum(COUNTS)))
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"there is no task {wrong}: expected 0 to 2"):
            source.private(wrong)


def test_a_held_out_image_is_in_no_other_part_whatever_the_tasks_are() -> None:
    options = {"validation_fraction": 0.2, "real_fraction": 1.0}
    held_out = []
    for more in ({}, {"class_order_seed": 4}, {"num_tasks": 2}, {"seed": 9}):
        source, held = data(**options, **more), []
        for task, loader in enumerate(source.val_dataloader()):
            batches = list(loader)
            labels = torch.cat([batch.labels for batch in batches])
            here = numbers(torch.cat([batch.images for batch in batches]))
            private = numbers(source.private(task)[0])
            assert not set(here) & set(private) and not set(here) & set(numbers(source.real(task)[0]))
            for label in source.task_classes[task]:
                assert int((labels == label).sum()) == round(0.2 * COUNTS[label])
            held += here
        held_out.append(sorted(held))
    assert held_out[0] == held_out[1] == held_out[2] == held_out[3]
    assert len(held_out[0]) == 60 and held_out[0] != list(range(60))
    with pytest.raises(ValueError, match=r"validation_fraction=0.01 holds out 0 of 40 training images of class 1: exp"):
        data(validation_fraction=0.01).setup("fit")


def test_without_a_validation_share_the_test_images_are_measured_on() -> None:
    source = data()
    for shown, tested in zip(source.val_dataloader(), source.test_dataloader(), strict=True):
        assert [numbers(batch.images) for batch in shown] == [numbers(batch.images) for batch in tested]


@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.5, 1.0])
def test_the_real_share_takes_its_part_of_each_class_and_depends_on_the_seed(fraction: float) -> None:
    shares = [data(real_fraction=fraction, seed=seed) for seed in (1, 1, 2)]
    for task in range(3):
        images, labels = shares[0].real(task)
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for label in shares[0].task_classes[task]:
            assert int((labels == label).sum()) == int(round(fraction * 100) * COUNTS[label] // 100)
        private, known = shares[0].private(task)
        places = [numbers(private).index(number) for number in numbers(images)]
        assert torch.equal(images, to_canonical(private[places])) and torch.equal(labels, known[places])
        first, again, other = (set(numbers(share.real(task)[0])) for share in shares)
        assert first == again and (first != other) == (fraction < 1)
        assert first <= set(numbers(data(real_fraction=1.0).real(task)[0]))
        assert set(numbers(data(real_fraction=fraction / 2, min_per_class=1).real(task)[0])) < first


def test_a_share_that_leaves_a_class_empty_is_refused() -> None:
    signs = {part: (torch.zeros(240, 8, 8, dtype=torch.uint8), torch.arange(240) // 120 + 6) for part in
             ("train", "test")}  # fmt: skip
    names = [str(label) for label in range(8)]
    source = {"datasets": signs, "num_tasks": 4, "class_names": names}
    with pytest.raises(ValueError, match="task 0 has no image of class 0, 1 in its part 'private'"):
        data(real_fraction=0.1, **source).real(0)
    message = r"real_fraction=0.005: 0.5 % of 120 images leaves class 6 empty; need >= 0.9 %, or set min_per_class"
    with pytest.raises(ValueError, match=message):
        data(real_fraction=0.005, **source).real(3)
    assert len(data(real_fraction=0.009, **source).real(3)[1]) == 2
    assert len(data(real_fraction=0.005, min_per_class=3, **source).real(3)[1]) == 6
    with pytest.raises(ValueError, match=r"min_per_class=121 is too much: class 6 has 120 images"):
        data(real_fraction=0.5, min_per_class=121, **source).real(3)
    hundreds = {"train": (torch.zeros(200, 8, 8, dtype=torch.uint8), torch.arange(200) // 100)}
    exact = data(datasets=hundreds, num_tasks=1, real_fraction=0.29).real(0)
    assert exact[1].bincount().tolist() == [29, 29], "0.29 * 100 is 28.999999999999996"
    named = {**source, "class_names": [*names[:6], "stop", "yield"]}
    with pytest.raises(ValueError, match=r"leaves class 6 \(stop\) empty"):
        data(real_fraction=0.005, **named).real(3)


def test_every_part_of_a_task_has_at_most_max_images_and_each_class_its_share() -> None:
    few, many = (data(max_images=size, validation_fraction=0.2) for size in (8, 20))
    for task in range(3):
        assert [len(few.private(task)[1]), len(many.private(task)[1])] == [8, 20]
        assert set(numbers(few.private(task)[0])) < set(numbers(many.private(task)[0]))
    for size, counts in ((8, [6, 2]), (20, [15, 5]), (40, [30, 10]), (100, [75, 25])):
        assert data(max_images=size).private(0)[1].bincount().tolist() == counts
    assert [sum(len(batch.labels) for batch in loader) for loader in few.test_dataloader()] == [8, 8, 8]
    assert [sum(len(batch.labels) for batch in loader) for loader in few.val_dataloader()] == [8, 8, 8]
    with pytest.raises(ValueError, match=r"task 0 has no image of class 1 in its part 'private' with max_images=1"):
        data(max_images=1).private(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_its_tasks_in_turn_and_tells_first_and_last_steps(workers: int) -> None:
    batches = stream(data(num_workers=workers))
    assert all(isinstance(batch, StreamBatch) for batch in batches)
    assert [batch[:4] for batch in batches] == [
        (task, step, step == 0, step == 6) for task in range(3) for step in range(7)
    ]


def test_a_data_free_stream_is_the_same_whatever_the_pixels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, others = (stream(data(datasets=sets(pixels))) for pixels in (0, 1))
    assert all(batch.images is None and batch.labels is None for batch in batches)
    assert same(batches, others)

    def read(self: MemorySets, task: str, part: str) -> None:
        raise AssertionError(f"{part} was read")

    monkeypatch.setattr(MemorySets, "read", read)
    blind = data()
    assert same(batches, stream(blind)), "no image is even read"
    assert blind.real(0) is None and blind.task_classes == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(AssertionError, match="train was read"):
        data(real_fraction=0.1).train_dataloader()


def test_real_images_of_a_task_come_in_a_new_order_in_every_pass() -> None:
    source = data(real_fraction=0.2, iterations_per_task=40)
    batches = stream(source)
    for task in range(3):
        images, labels = source.real(task)
        shown = [batch for batch in batches if batch.task == task]
        assert {len(batch.labels) for batch in shown} == {8}
        sequence = numbers(torch.cat([batch.images for batch in shown]))
        size = len(labels)
        passes = [sequence[start : start + size] for start in range(0, len(sequence) - size, size)]
        assert all(sorted(order) == sorted(numbers(images)) for order in passes)
        assert len({tuple(order) for order in passes}) == len(passes) > 8
        known = dict(zip(numbers(images), labels.tolist(), strict=True))
        assert [known[number] for batch in shown for number in numbers(batch.images)] == [
            label for batch in shown for label in batch.labels.tolist()
        ]
    assert same(batches, stream(data(real_fraction=0.2, iterations_per_task=40, num_workers=2)))
    assert not same(batches, stream(data(real_fraction=0.2, iterations_per_task=40, seed=2)))
    small = stream(data(real_fraction=0.05, batch_size=20))[7]
    counts = torch.tensor(numbers(small.images)).unique(return_counts=True)[1]
    assert counts.tolist() == [5] * 4, "4 images fill 20 places evenly"


def test_the_order_of_a_task_depends_neither_on_the_other_tasks_nor_on_their_steps() -> None:
    images, labels = sets()["train"]
    alone = StreamSteps([Stretch(2, images[:20, None], labels[:20])], 5, 8, 1)
    third = StreamSteps([Stretch(0), Stretch(1, images[30:, None], labels[30:]), *alone.stretches], 5, 8, 1)
    places = [torch.tensor([place]) for place in range(15)]
    assert same([alone[Draw(place, 0)] for place in places[:5]], [third[Draw(place, 3)] for place in places[10:]])


def test_joint_training_is_one_stretch_of_the_images_of_all_tasks() -> None:
    source = data(joint=True, real_fraction=1.0, batch_size=100)
    batches = stream(source)
    assert [batch[:4] for batch in batches] == [(2, step, step == 0, step == 20) for step in range(21)]
    assert set(numbers(torch.cat([batch.images for batch in batches[:3]]))) == set(range(sum(COUNTS)))
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == set(range(6))


def _shown(rank: int, fraction: float) -> list[list[list[int]]]:
    source = data(real_fraction=fraction, batch_size=4, eval_batch_size=7, iterations_per_task=9)
    steps = [numbers(batch.images) for batch in stream(source)]
    labels = [batch.labels.tolist() for batch in stream(source)]
    tested = [numbers(batch.images) for loader in source.test_dataloader() for batch in loader]
    return [steps, labels, tested]


@pytest.mark.parametrize("fraction", [0.1, 1.0])
def test_two_processes_see_the_batches_of_one_and_test_each_image_once(fraction: float, tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, _shown, fraction)
    batches = stream(data(real_fraction=fraction, batch_size=8, iterations_per_task=9))
    assert len(first[0]) == len(second[0]) == 27
    assert [a + b for a, b in zip(first[0], second[0], strict=True)] == [numbers(batch.images) for batch in batches]
    assert [a + b for a, b in zip(first[1], second[1], strict=True)] == [batch.labels.tolist() for batch in batches]
    assert sorted(number for batch in first[2] + second[2] for number in batch) == list(range(60))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_restored_in_the_middle_of_a_task_gives_the_rest(workers: int) -> None:
    options = {"real_fraction": 0.3, "num_workers": workers}
    whole = stream(data(**options))
    for epoch, had in ((0, 0), (0, 1), (1, 3), (2, 6)) if workers == 0 else ((1, 3),):
        loader = data(**options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        iterator = iter(loader)
        for _ in range(had):
            next(iterator)
        state = loader.state_dict()
        assert state == {"epoch": epoch, "batches": had}
        resumed = data(**options).train_dataloader()
        resumed.load_state_dict(state)
        assert same(resumed, whole[7 * epoch + had : 7 * epoch + 7])


class Recorder(LightningModule):
    """Notes what it is shown; its weights depend on the order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.shown: list[tuple[int, int, list[int] | None]] = []
        self.tested: list[tuple[int, int]] = []

    def training_step(self, batch: StreamBatch, batch_idx: int) -> Tensor:
        real = None if batch.images is None else numbers(batch.images)
        self.shown.append((batch.task, batch.step, real))
        images = torch.full((1, 1, 1, 8), batch.task + 1.0) if batch.images is None else batch.images
        return ((self.weight * images[:, 0, -1]).mean() - batch.step) ** 2

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert isinstance(batch, EvalBatch)

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        assert isinstance(batch, EvalBatch)
        self.tested.append((dataloader_idx, len(batch.labels)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def trainer(folder: Path, **options: Any) -> Trainer:
    shown = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=3, accelerator="cpu", default_root_dir=folder, **shown, **options)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
@pytest.mark.parametrize("options", [{}, {"real_fraction": 0.3, "validation_fraction": 0.2}])
def test_a_run_resumed_from_any_step_sees_what_the_unbroken_one_saw(options: dict[str, Any], tmp_path: Path) -> None:
    each_step = ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )  # fmt: skip
    unbroken = Recorder()
    trainer(tmp_path, callbacks=[each_step]).fit(unbroken, data(iterations_per_task=3, **options))
    assert [shown[:2] for shown in unbroken.shown] == [(task, step) for task in range(3) for step in range(3)]
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 9
    for file in files:
        step = torch.load(file, weights_only=True)["global_step"]
        resumed = Recorder()
        again = data(iterations_per_task=3, **options)
        trainer(tmp_path, enable_checkpointing=False).fit(resumed, again, ckpt_path=file, weights_only=True)
        assert resumed.shown == unbroken.shown[step:], file.name
        assert torch.equal(resumed.weight, unbroken.weight), file.name


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled (train|val) dataloader shuffling")
def test_overfit_batches_repeats_the_first_steps(tmp_path: Path) -> None:
    model = Recorder()
    runner = trainer(tmp_path, overfit_batches=2, enable_checkpointing=False)
    runner.fit_loop.max_epochs = 2
    runner.fit(model, data(real_fraction=0.3))
    assert [shown[:2] for shown in model.shown] == [(0, 0), (0, 1), (0, 0), (0, 1)]
    assert model.shown[:2] == model.shown[2:]


def test_a_trainer_fits_and_tests_the_embedded_digits(tmp_path: Path) -> None:
    model, source = Recorder(), ClassStreamData(iterations_per_task=2)
    runner = trainer(tmp_path, enable_checkpointing=False)
    runner.fit_loop.max_epochs = 5
    runner.fit(model, source)
    runner.test(model, source, verbose=False)
    assert model.shown == [(task, step, None) for task in range(5) for step in range(2)]
    assert [loader for loader, _ in model.tested] == [0, 1, 2, 3, 4] and sum(count for _, count in model.tested) == 600
    assert source.image_shape == [1, 8, 8] and source.num_classes == 10 and source.class_names[9] == "9"
    assert source.task_classes == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_the_embedded_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    source, (given, labels) = ClassStreamData(), load_digits(return_X_y=True)
    parts = [source.private(task) for task in range(5)]
    parts += [(next(iter(loader)).images, next(iter(loader)).labels) for loader in source.test_dataloader()]
    found = torch.cat([images if images.is_floating_point() else to_canonical(images) for images, _ in parts])
    pairs = zip(found, torch.cat([labels for _, labels in parts]), strict=True)
    steps = sorted((*((image.flatten() + 1) * 8).round().int().tolist(), int(label)) for image, label in pairs)
    assert steps == sorted((*map(int, row), int(label)) for row, label in zip(given, labels, strict=True))


def test_bytes_come_to_the_canonical_domain_exactly() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    found = to_canonical(every)
    assert found.dtype == torch.float32 and (float(found.min()), float(found.max())) == (-1.0, 1.0)
    assert torch.allclose(found.double(), every.double() / 127.5 - 1, atol=1e-7)
    assert torch.equal(((found + 1) * 127.5).round().byte(), every)
    assert torch.equal(ClassStreamData.to_canonical(every), found)
    with pytest.raises(ValueError, match=r"images have the dtype torch.float32: expected uint8"):
        to_canonical(found)


def test_evaluation_shows_each_test_image_of_a_task_once_in_order() -> None:
    source, (images, labels) = data(eval_batch_size=6), sets()["test"]
    for loaders in (source.test_dataloader(), source.predict_dataloader()):
        assert len(loaders) == 3
        for task, loader in enumerate(loaders):
            batches = list(loader)
            assert [len(batch.labels) for batch in batches] == [6, 6, 6, 2]
            rows = torch.isin(labels, torch.tensor(source.task_classes[task])).nonzero()[:, 0]
            assert torch.equal(torch.cat([batch.labels for batch in batches]), labels[rows])
            assert torch.equal(torch.cat([batch.images for batch in batches]), to_canonical(images[rows, None]))


def test_a_fingerprint_changes_with_what_a_service_is_trained_on_and_with_nothing_else() -> None:
    own = data().fingerprint(0)
    alike = data(seed=5, real_fraction=0.5, batch_size=3, iterations_per_task=2, num_tasks=1, classes_per_task=2)
    assert alike.fingerprint(0) == own
    relabelled = sets()
    relabelled["train"][1][relabelled["train"][1] < 2] ^= 1
    others = [
        data(datasets=relabelled).fingerprint(0),
        data().fingerprint(1),
        data(datasets=sets(3)).fingerprint(0),
        data(max_images=20).fingerprint(0),
        data(validation_fraction=0.2).fingerprint(0),
        data(image_size=9).fingerprint(0),
        data(num_tasks=2).fingerprint(0),
    ]
    assert len({own, *others}) == 8


def test_grey_sets_keep_one_channel_and_all_sets_their_size(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    labels = np.array([0, 1, 2, 3])
    names = np.array(["ant", "bee", "cow", "dog"])
    whole = {"classes": names, "y_train": labels, "y_test": labels}
    write_npz(tmp_path / "grey" / "grey.npz", x_train=colour[..., 0], x_test=colour[..., 1], **whole)
    write_npz(tmp_path / "colour.npz", x_train=colour, x_test=colour[:, ::-1], **whole)
    options = {"source": "zoo", "data_dir": str(tmp_path), "num_tasks": 2}
    grey, rgb = (ClassStreamData(dataset=name, **options) for name in ("grey", "colour"))
    assert grey.image_shape == [1, 6, 6] and rgb.image_shape == [3, 6, 6]
    assert rgb.class_names == names.tolist() and rgb.task_classes == [[0, 1], [2, 3]]
    assert torch.equal(rgb.private(1)[0], torch.from_numpy(colour[2:]).permute(0, 3, 1, 2))
    found = next(iter(grey.test_dataloader()[1])).images
    assert torch.equal(found, to_canonical(torch.from_numpy(colour[2:, None, :, :, 1])))
    framed = ClassStreamData(dataset="grey", image_size=8, **options)
    assert framed.image_shape == [1, 8, 8]
    assert torch.equal(framed.private(0)[0][:, :, 1:7, 1:7], grey.private(0)[0])
    assert next(iter(framed.test_dataloader()[0])).images.shape == (2, 1, 8, 8)
    with pytest.raises(FileNotFoundError, match=r"task 'mnist' is not in .*put mnist/mnist\.npz there.*found colour"):
        _ = ClassStreamData(dataset="mnist", **options).task_classes
    crossed = ClassStreamData(dataset="grey", test_path=str(tmp_path / "colour.npz"), **options)
    with pytest.raises(ValueError, match=r"have the shape \(3, 6, 6\), which cannot be brought to .* \(1, 6, 6\)"):
        crossed.setup("test")
    mixed = ClassStreamData(dataset="colour", test_path=str(tmp_path / "grey" / "grey.npz"), **options)
    assert next(iter(mixed.test_dataloader()[0])).images.shape == (2, 3, 6, 6)


def test_test_path_replaces_the_test_images_by_class_name(tmp_path: Path) -> None:
    images = np.zeros((4, 12, 12), np.uint8) + np.array([10, 20, 30, 40], np.uint8)[:, None, None]
    fields = {"x_train": None, "y_train": None, "x_test": images, "y_test": np.array([0, 1, 2, 3])}
    write_npz(tmp_path / "digits.npz", classes=np.array(["7", "2", "ten", "3"]), **fields)
    for path in (tmp_path, tmp_path / "digits.npz"):
        source = ClassStreamData(test_path=str(path), num_tasks=2)
        with pytest.warns(UserWarning, match="1 of 4 test images are left out, as training knows no class ten"):
            loaders = source.test_dataloader()
        first, second = (next(iter(loader)) for loader in loaders)
        assert first.labels.tolist() == [2, 3] and second.labels.tolist() == [7]
        assert first.images.shape == (2, 1, 8, 8)
        assert ((first.images[:, 0, 0, 0] + 1) * 127.5).tolist() == pytest.approx([20, 40], abs=1e-3)
        assert len(source.private(0)[1]) > 500
    write_npz(tmp_path / "digits.npz", classes=np.array(["7", "2", "6", "3"]), **fields)
    with pytest.raises(ValueError, match=r"task 0 has no image of class 0, 1 in its part 'test'"):
        ClassStreamData(test_path=str(tmp_path)).setup("test")
    with pytest.raises(FileNotFoundError, match=r"test_path=.*gone is missing: expected digits\.npz, or its folder"):
        ClassStreamData(test_path=str(tmp_path / "gone")).setup("test")


def test_devices_and_pinning_take_a_batch_with_and_without_images() -> None:
    from lightning.fabric.utilities import move_data_to_device

    for options in ({}, {"real_fraction": 0.3}):
        batch = next(iter(data(**options).train_dataloader()))
        moved = move_data_to_device(batch, torch.device("meta"))
        assert isinstance(moved, StreamBatch) and moved[:4] == (0, 0, True, False)
        devices = [None if tensor is None else tensor.device.type for tensor in moved[4:]]
        assert devices == (["meta", "meta"] if options else [None, None])


def test_the_package_hands_out_the_data_module_and_its_batches() -> None:
    assert datamodules.ClassStreamData is ClassStreamData
    assert datamodules.StreamBatch is StreamBatch and datamodules.EvalBatch is EvalBatch
    assert datamodules.DATAMODULES["ClassStreamData"] == "datamodules.class_stream"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "source must be one of embedded, zoo, got 'web'"),
        ({"dataset": "mnist"}, "dataset='mnist' is not embedded: expected digits, or source=zoo"),
        ({"data_dir": "/nowhere"}, "data_dir=/nowhere has no meaning for source='embedded'"),
        ({"num_tasks": 0}, "num_tasks must be at least 1, got 0"),
        ({"classes_per_task": 1}, "classes_per_task must be at least 2, got 1"),
        ({"iterations_per_task": 0}, "iterations_per_task must be at least 1, got 0"),
        ({"min_per_class": -1}, "min_per_class must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"real_fraction": 1.1}, "real_fraction must be from 0 to 1, got 1.1"),
        ({"real_fraction": -0.1}, "real_fraction must be from 0 to 1, got -0.1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1, got 1.0"),
        ({"joint": True}, "joint=True has no meaning without real images: set real_fraction above 0"),
        ({"min_per_class": 2}, "min_per_class=2 has no meaning without real images: set real_fraction above 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassStreamData(**options)


@pytest.mark.real
def test_traffic_signs_give_ten_tasks_of_four_classes() -> None:
    source = ClassStreamData("zoo", "gtsrb", classes_per_task=4, real_fraction=0.1, iterations_per_task=2)
    assert len(source.task_classes) == 10 and source.num_classes == 43 and source.image_shape == [3, 32, 32]
    batches = stream(source)
    assert len(batches) == 20 and all(set(b.labels.tolist()) <= set(source.task_classes[b.task]) for b in batches)
    assert [len(loader.dataset) for loader in source.test_dataloader()] == [96] * 10
