from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.classification_parts import stratified_order
from datamodules.classification_tasks import ClassificationBatch, ClassificationTasksData
from datamodules.sources.classification_sets import DIGIT_TASKS, LabelledImages, MemorySets
from datamodules.task_streams import Normalisation, TaskRows, TaskStreams
from tests.datamodules.sources.test_classification_sets import write_npz
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SIZES = {"small": (40, 30), "large": (100, 50), "colour": (64, 20)}


def sets(seed: int = 0) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Images whose first two pixels are the number of the image and its part; labels from 0 to 4."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for task, counts in SIZES.items():
        found[task] = {}
        for part, count in zip(("train", "test"), counts, strict=True):
            shape = (count, 8, 8, 3) if task == "colour" else (count, 8, 8)
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            flat = images.view(count, 8, 8, -1)
            flat[:, 0, 0], flat[:, 0, 1] = torch.arange(count, dtype=torch.uint8)[:, None], int(part == "test")
            labels = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(seed))
            labels[:5] = torch.arange(5)
            found[task][part] = images, labels
    return found


def data(**options: Any) -> ClassificationTasksData:
    given = {"image_size": 8, "batch_size": 8, "seed": 1, **options}
    return ClassificationTasksData.from_datasets(given.pop("datasets", sets()), **given)


def numbers(images: torch.Tensor) -> list[int]:
    """What the first pixel says; of normalised images too."""
    if images.is_floating_point():
        images = ((images + 1) * 127.5).round()
    return images[:, 0, 0, 0].int().tolist()


def epochs(source: ClassificationTasksData, count: int, **options: Any) -> list[dict[str, ClassificationBatch]]:
    loader, found = source.train_loader(**options), []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


def same(first: Iterable[dict[str, ClassificationBatch]], second: Iterable[dict[str, ClassificationBatch]]) -> bool:
    def equal(one: ClassificationBatch, other: ClassificationBatch) -> bool:
        tensors = zip(one[:3], other[:3], strict=True)
        return one.task == other.task and all(a is b if a is None else torch.equal(a, b) for a, b in tensors)

    pairs = list(zip(first, second, strict=True))
    return all(list(a) == list(b) and all(equal(a[task], b[task]) for task in a) for a, b in pairs)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_every_beginning_of_a_stratified_order_has_its_share_of_each_class(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    labels = torch.multinomial(torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05]), size, True, generator=generator)
    order = stratified_order(labels, 3)
    assert order.sort().values.tolist() == list(range(size))
    shares = labels.bincount(minlength=5) / size
    for stop in range(1, size + 1):
        counts = labels[order[:stop]].bincount(minlength=5)
        assert (counts - stop * shares).abs().max() < 1.5
    assert size < 7 or not torch.equal(order, stratified_order(labels, 4))
    even = stratified_order(torch.arange(10).repeat(10), 3)
    firsts = (even % 10).view(10, 10)
    assert all(sorted(turn) == list(range(10)) for turn in firsts.tolist())
    assert len({tuple(turn) for turn in firsts.tolist()}) > 1
    rare = stratified_order(torch.arange(101) // 100, 3)
    assert int(rare[45:55].max()) == 100, "the only image of a class is in the middle"


def test_parts_are_disjoint_and_cover_the_set() -> None:
    source = data(pretrain_images=10, holdout=True, stream="test")
    for task, (train, test) in SIZES.items():
        found = {part: source.images(task, part) for part in ("all", "pretrain", "finetune", "validate")}
        found |= {part: source.images(task, part) for part in ("test", "stream")}
        number = {part: numbers(images) for part, (images, _) in found.items()}
        assert number["pretrain"] == sorted(number["pretrain"]) and len(number["pretrain"]) == 10
        assert number["all"] == number["pretrain"] + number["finetune"]
        assert len(number["validate"]) == round(0.1 * train)
        assert sorted(number["all"] + number["validate"]) == list(range(train))
        assert len(number["stream"]) == test // 2
        assert sorted(number["stream"] + number["test"]) == list(range(test))
        given = sets()[task]
        for part, (images, labels) in found.items():
            whole, known = given["test" if part in ("test", "stream") else "train"]
            whole = whole.view(len(whole), 8, 8, -1).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
            assert torch.equal(images, whole[number[part]]), part
            assert labels is None if part == "stream" else torch.equal(labels, known[number[part]])
        counts = found["pretrain"][1].bincount(minlength=5)
        shares = found["all"][1].bincount(minlength=5) * 10 / len(number["all"])
        assert (counts - shares).abs().max() < 1.5
    sorted_by_class = {"big": {part: (torch.zeros(500, 8, 8, dtype=torch.uint8), torch.arange(500) // 100)
                               for part in ("train", "test")}}  # fmt: skip
    halves = data(datasets=sorted_by_class, holdout=True, stream="test")
    for part, count in (("validate", 50), ("test", 250)):
        shares = halves.images("big", part)[1].bincount(minlength=5) / count
        assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.12), "a cut is at random"
    assert numbers(data().images("large", "test")[0]) == list(range(50))
    assert numbers(data().images("large", "train")[0]) == numbers(source.images("large", "all")[0].sort(0).values)


def test_the_cut_depends_neither_on_the_seed_nor_on_labels() -> None:
    def parts(source: ClassificationTasksData) -> list[list[int]]:
        return [numbers(source.images(task, part)[0]) for task in SIZES for part in ("all", "validate", "test")]

    options = {"holdout": True, "max_images": 30}
    expected = parts(data(**options))
    assert parts(data(seed=99, **options)) == expected
    assert parts(data(datasets=sets(seed=5), **options)) == expected
    views = ClassificationTasksData()
    upright, rotated = (views.images(task, "validate")[1] for task in ("upright", "rotated"))
    assert torch.equal(upright, rotated), "one digit is for training or for validation in all its views"


def test_max_images_takes_a_part_of_every_part() -> None:
    few, many = data(max_images=6), data(max_images=20)
    for part, count in (("all", 20), ("validate", 10), ("test", 20)):
        small, large = (set(numbers(source.images("large", part)[0])) for source in (few, many))
        assert len(small) == 6 and len(large) == count and small < large
    assert len(few.images("small", "validate")[0]) == 4


def test_adapt_fraction_takes_a_share_that_depends_on_the_seed() -> None:
    for stream, count in (("test", 50), ("validate", 10), ("train", 90)):
        found = [set(numbers(data(stream=stream, adapt_fraction=0.3, seed=seed).images("large", "stream")[0]))
                 for seed in (1, 1, 2)]  # fmt: skip
        assert found[0] == found[1] != found[2]
        assert {len(rows) for rows in found} == {round(0.3 * count)}
    assert len(data(stream="train", train_part="pretrain", pretrain_images=9).images("large", "stream")[0]) == 9
    with pytest.raises(ValueError, match=r"task 'colour' has 6 images to draw from, fewer than the 8 .*adapt_fraction"):
        data(stream="test", adapt_fraction=0.3).train_loader()
    with pytest.raises(ValueError, match="task 'small' has 4 images to draw from, fewer than the 8"):
        data(pretrain_images=4).train_loader(part="pretrain")


def test_images_are_normalised_by_channel_and_grey_is_repeated() -> None:
    source = data(mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])
    for task in SIZES:
        bytes_ = source.images(task, "test")[0]
        found = torch.cat([batch.images for batch in source.eval_loader(task, "test")])
        assert found.dtype == torch.float32 and bytes_.dtype == torch.uint8
        for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 1.0), (0.3, 2.0))):
            expected = (bytes_[:, channel].double() / 255 - mean) / std
            assert torch.allclose(found[:, channel].double(), expected, atol=1e-6)
    default = torch.cat([batch.images for batch in data().eval_loader("colour", "test")])
    assert (float(default.min()), float(default.max())) == pytest.approx((-1, 1), abs=1e-6)


@pytest.mark.parametrize("stream", ["test", "validate", "train"])
def test_a_stream_has_no_labels_and_random_ones_change_nothing(stream: str) -> None:
    options = {"stream": stream, "adapt_fraction": 0.9, "holdout": True, "batch_size": 3}
    source, other = data(**options), data(datasets=sets(seed=3), **options)
    batches = epochs(source, 2)
    assert all(batch.labels is None for step in batches for batch in step.values())
    assert same(batches, epochs(other, 2))
    assert source.fingerprint("stream") == other.fingerprint("stream")
    for loader in (source.train_loader(), source.eval_loader("small", "stream")):
        tables = getattr(loader.dataset, "tables", {"small": loader.dataset})
        assert all(table.labels is None for table in tables.values()), "nothing is there to be gathered"
    images, labels = source.images("small", "stream")
    assert labels is None
    for step in batches:
        batch = step["small"]
        assert numbers(batch.images) == numbers(images[batch.rows])


def test_every_pass_over_a_task_shows_each_image_once_in_a_new_order() -> None:
    source = data()
    steps = epochs(source, 10)
    assert len(steps) == 10 * 12, "an epoch shows every image of the largest task"
    for task, (count, _) in SIZES.items():
        kept = count - round(0.1 * count)
        rows = torch.cat([step[task].rows for step in steps])
        assert {len(step[task].rows) for step in steps} == {8}
        passes = rows[: len(rows) // kept * kept].view(-1, kept)
        assert (passes.sort(1).values == torch.arange(kept)).all()
        assert len({tuple(order) for order in passes.tolist()}) == len(passes) > 9
        images, labels = source.images(task, "train")
        for step in steps[::17]:
            batch = step[task]
            assert numbers(batch.images) == numbers(images[batch.rows])
            assert torch.equal(batch.labels, labels[batch.rows]) and batch.task == task


def test_the_order_of_a_task_depends_on_the_seed_its_name_and_the_pass_alone() -> None:
    everything = epochs(data(), 2, steps=20)
    alone = epochs(data(tasks=["colour"]), 2, steps=20)
    assert same([{"colour": step["colour"]} for step in everything], alone)
    assert same(epochs(data(), 1, steps=40), everything)
    assert not same(epochs(data(seed=2), 2, steps=20), everything)
    twice = {"a": sets()["small"], "b": sets()["small"]}
    rows = [[step[task].rows.tolist() for step in epochs(data(datasets=twice), 1)] for task in "ab"]
    assert rows[0] != rows[1]


def test_workers_change_nothing() -> None:
    assert same(epochs(data(num_workers=2), 2), epochs(data(), 2))


def _rank_rows(rank: int) -> list[list[list[int]]]:
    steps = epochs(data(batch_size=4), 2)
    alone = epochs(data(), 2, alone=True)
    evaluation = [batch.rows.tolist() for batch in data(eval_batch_size=7).eval_loader("large", "test")]
    found = [[step[task].rows.tolist() for step in part for task in SIZES] for part in (steps, alone)]
    return [*found, evaluation]


def test_two_processes_see_the_batches_of_one(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, _rank_rows)
    expected = [step[task].rows.tolist() for step in epochs(data(), 2) for task in SIZES]
    assert [a + b for a, b in zip(first[0], second[0], strict=True)] == expected
    assert first[1] == second[1] == expected, "a process alone sees the whole batches"
    assert sorted(row for batch in first[2] + second[2] for row in batch) == list(range(50))


def test_evaluation_shows_each_image_of_each_task_once_in_order() -> None:
    source = data(eval_batch_size=16, seen_tasks=["small"], stream="test")
    loaders = {"validate": source.val_dataloader(), "test": source.test_dataloader()}
    assert [len(found) for found in loaders.values()] == [3, 3]
    for part, found in loaders.items():
        for task, loader in zip(SIZES, found, strict=True):
            batches = list(loader)
            images, labels = source.images(task, part)
            assert {batch.task for batch in batches} == {task}
            assert torch.equal(torch.cat([batch.labels for batch in batches]), labels)
            assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(len(images)))
            assert numbers(torch.cat([batch.images for batch in batches])) == numbers(images)
    assert list(next(iter(source.train_loader()))) == ["small"]
    assert data(validation_fraction=0).val_dataloader() == []


class Recorder(LightningModule):
    """Notes what it is shown; its weights depend on the order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))
        self.shown: list[tuple[int, int, dict[str, list[int]]]] = []
        self.tested: list[tuple[str, int]] = []

    def training_step(self, batch: dict[str, ClassificationBatch], batch_idx: int) -> torch.Tensor:
        self.shown.append((self.current_epoch, batch_idx, {task: part.rows.tolist() for task, part in batch.items()}))
        return sum((self.weight * part.images[:, 0, 0, :8]).mean() for part in batch.values()) ** 2  # type: ignore[return-value]

    def validation_step(self, batch: ClassificationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val", float(len(batch.rows)), batch_size=len(batch.rows))

    def test_step(self, batch: ClassificationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested.append((batch.task, len(batch.rows)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def trainer(folder: Path, **options: Any) -> Trainer:
    shown = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(max_epochs=2, accelerator="cpu", default_root_dir=folder, **shown, **options)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
@pytest.mark.parametrize(("workers", "limit"), [(0, None), (0, 3), (2, None)])
def test_a_run_resumed_from_any_step_sees_what_the_unbroken_one_saw(
    workers: int, limit: int | None, tmp_path: Path
) -> None:
    def made() -> ClassificationTasksData:
        return data(stream="test", steps_per_epoch=5, num_workers=workers)

    each_step = ModelCheckpoint(
        tmp_path, "{epoch}-{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    unbroken, options = Recorder(), {"limit_train_batches": limit}
    trainer(tmp_path, callbacks=[each_step], **options).fit(unbroken, made())
    assert [shown[:2] for shown in unbroken.shown] == [(e, i) for e in range(2) for i in range(limit or 5)]
    assert len({str(shown[2]) for shown in unbroken.shown}) == len(unbroken.shown)
    files = sorted(tmp_path.glob("*.ckpt"))
    for file in files if workers == 0 else files[2::4]:
        step = torch.load(file, weights_only=True)["global_step"]
        resumed = Recorder()
        trainer(tmp_path, enable_checkpointing=False, **options).fit(resumed, made(), ckpt_path=file, weights_only=True)
        assert resumed.shown == unbroken.shown[step:], file.name
        assert torch.equal(resumed.weight, unbroken.weight), file.name


def test_a_fit_without_validation_can_go_on_for_more_epochs(tmp_path: Path) -> None:
    seen = []
    for stops in ([3], [1, 3]):
        seen.append(Recorder())
        source = data(steps_per_epoch=3, validation_fraction=0)
        runner = trainer(tmp_path, enable_checkpointing=False)
        for stop in stops:
            runner.fit_loop.max_epochs = stop
            runner.fit(seen[-1], source)
    assert seen[0].shown == seen[1].shown and len(seen[0].shown) == 9


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled val")
def test_overfit_batches_repeats_the_first_steps(tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, overfit_batches=2, enable_checkpointing=False).fit(model, data())
    shown = [batch for _, _, batch in model.shown]
    assert len(shown) == 4 and shown[:2] == shown[2:] and shown[0] != shown[1]


def test_a_trainer_takes_the_parts_in_turn(tmp_path: Path) -> None:
    model, source = Recorder(), ClassificationTasksData(max_images=40, steps_per_epoch=2, validation_fraction=0.5)
    runner = trainer(tmp_path, enable_checkpointing=False)
    runner.fit(model, source)
    runner.test(model, source, verbose=False)
    assert list(model.shown[0][2]) == list(DIGIT_TASKS)
    assert model.tested == [(task, 40) for task in DIGIT_TASKS]
    assert source.task_names == list(DIGIT_TASKS) and source.in_channels == 3
    assert source.tasks[2] == {"name": "parity", "num_classes": 2}
    assert source.images("upright", "test")[0].shape == (40, 3, 20, 20)


def test_test_path_replaces_the_test_images_by_class_name(tmp_path: Path) -> None:
    home, new = tmp_path / "home", tmp_path / "new"
    for task in ("bugs", "birds"):
        write_npz(home / task / f"{task}.npz")
    write_npz(new / "bugs.npz", classes=np.array(["cow", "ant", "bee"]), x_train=None, y_train=None)
    write_npz(new / "birds" / "birds.npz", x_test=np.full((2, 4, 4), 9, np.uint8))
    options = {"source": "zoo", "data_dir": str(home), "image_size": 4, "validation_fraction": 0.3}
    source = ClassificationTasksData(test_path=str(new), tasks=["bugs", "birds"], **options)
    assert source.images("bugs", "test")[1].tolist() == [1, 2]
    assert (source.images("birds", "test")[0] == 9).all()
    assert int(source.images("birds", "train")[0].max()) > 9
    one = ClassificationTasksData(test_path=str(new / "bugs.npz"), tasks=["bugs"], **options)
    assert one.images("bugs", "test")[1].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"test_path=.*bugs\.npz is one file, but there are 2 tasks"):
        ClassificationTasksData(test_path=str(new / "bugs.npz"), tasks=["bugs", "birds"], **options).setup("test")
    with pytest.raises(FileNotFoundError, match=r"test_path=.*gone is missing: expected a folder with <task>/<task>"):
        ClassificationTasksData(test_path=str(tmp_path / "gone"), tasks=["bugs"], **options).setup("test")
    (new / "bugs.npz").unlink()
    source = ClassificationTasksData(test_path=str(new), tasks=["bugs"], **options)
    with pytest.raises(FileNotFoundError, match=r"task 'bugs' is not in .*name the folder in test_path; found birds"):
        source.setup("test")


def test_zoo_sets_are_named_by_tasks_and_missing_ones_by_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "bugs" / "bugs.npz")
    options = {"source": "zoo", "data_dir": str(tmp_path), "validation_fraction": 0.25}
    source = ClassificationTasksData(tasks=["bugs"], **options)
    assert source.tasks == [{"name": "bugs", "num_classes": 3}]
    assert source.class_names == {"bugs": ["ant", "bee", "cow"]}
    assert source.images("bugs", "train")[0].shape == (3, 3, 32, 32)
    with pytest.raises(FileNotFoundError, match=r"task 'mnist' is not in .*put mnist/mnist\.npz there.*found bugs"):
        _ = ClassificationTasksData(**options).tasks
    with pytest.raises(ValueError, match="pretrain_images=3 leaves nothing to fine-tune on: task 'bugs' has 3"):
        ClassificationTasksData(tasks=["bugs"], pretrain_images=3, **options).setup("fit")
    with pytest.raises(ValueError, match="the part to pre-train on needs pretrain_images"):
        source.fingerprint("pretrain")
    with pytest.raises(ValueError, match="holds out 0: expected at least one on each side"):
        ClassificationTasksData(tasks=["bugs"], **{**options, "validation_fraction": 0.1}).setup("fit")
    write_npz(tmp_path / "bugs" / "bugs.npz", y_test=np.array([0, 9]))
    with pytest.raises(ValueError, match=r"bugs\.npz: y_test has the value 9 at 1: expected 0 to 2"):
        source.setup("test")


@pytest.fixture
def negatives(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """Corruptions that invert the channel of their number; a list of the calls."""
    calls = []

    def corrupt(images: torch.Tensor, name: str, severity: int, key: int, rows: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (8, 8, 3)
        assert torch.equal(images[:, 0, 0, 0].long(), rows % 256), "an image is known by its number"
        calls.append((name, severity, len(images), key))
        changed = images.clone()
        changed[..., int(name)] = 255 - changed[..., int(name)]
        return changed

    module = ModuleType("corruptions")
    module.corrupt = corrupt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datamodules.sources.corruptions", module)
    return calls


def test_a_corruption_leaves_the_frame_black_and_an_image_keeps_its_own(
    negatives: list[tuple[str, int, int, int]],
) -> None:
    framed = data(corruption="1", image_size=12).images("small", "test")[0]
    assert (framed[:, 1, 2:10, 2:10] == 255 - framed[:, 0, 2:10, 2:10]).all()
    framed[:, :, 2:10, 2:10] = 0
    assert int(framed.max()) == 0
    few, many = (data(corruption=["0", "1", "2"], max_images=size).images("large", "test")[0] for size in (9, 40))
    assert {image.numpy().tobytes() for image in few} < {image.numpy().tobytes() for image in many}


@pytest.mark.parametrize("stream", ["none", "test", "validate", "train"])
def test_a_corruption_is_on_the_test_images_and_on_the_stream(
    stream: str, negatives: list[tuple[str, int, int, int]]
) -> None:
    clean, source = data(), data(stream=stream, corruption="1", severity=3, holdout=stream == "test")
    inverted = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]
    given = {task: parts["test"][0].view(-1, 8, 8, parts["test"][0].shape[3] if task == "colour" else 1)
             .permute(0, 3, 1, 2).expand(-1, 3, -1, -1) for task, parts in sets().items()}  # fmt: skip
    for task in SIZES:
        for part in ("all", "validate"):
            assert torch.equal(source.images(task, part)[0], clean.images(task, part)[0])
        test = source.images(task, "test")[0]
        assert torch.equal(test ^ inverted, given[task][numbers(test)])
        if stream != "none":
            found = source.images(task, "stream")[0]
            if stream == "test":
                expected = given[task][numbers(found)]
            else:
                expected = clean.images(task, {"validate": "validate", "train": "all"}[stream])[0]
            assert torch.equal(found ^ inverted, expected)
            assert found is not source.images(task, "stream")[0]
    assert {call[:2] for call in negatives} == {("1", 3)}
    tests = [call for call in negatives if call[2] in (20, 30, 50)][:3]
    assert len({call[3] for call in tests}) == 3, "no two tasks have the same noise"
    assert len(negatives) == (6 if stream in ("validate", "train") else 3), "images are disturbed once"


def test_a_list_of_corruptions_shares_the_images_out(negatives: list[tuple[str, int, int, int]]) -> None:
    images = torch.zeros(3_000, 8, 8, dtype=torch.uint8)
    images[:, 0, 0] = (torch.arange(3_000) % 256).byte()
    big = {"big": {"test": (images, torch.arange(3_000) % 5)}}
    found = data(datasets=big, corruption=["0", "1", "2"]).images("big", "test")[0]
    hit = (found[:, :, 1:] == 255).all(-1).all(-1)
    assert (hit.sum(1) == 1).all()
    assert hit.sum(0).tolist() == [call[2] for call in negatives]
    assert (hit.sum(0) - 1_000).abs().max() < 100
    assert torch.equal(found, data(datasets=big, corruption=["0", "1", "2"], seed=5).images("big", "test")[0])


def test_hub_sets_are_read_before_the_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class HubSets(MemorySets):
        def __init__(self, image_size: int) -> None:
            assert image_size == 8
            super().__init__(sets())

        def read(self, task: str, part: str) -> LabelledImages:
            read.append((task, part))
            return super().read(task, part)

    module = ModuleType("hub_sets")
    module.HubSets = HubSets  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datamodules.sources.hub_sets", module)
    source = ClassificationTasksData("hub", tasks=list(SIZES), image_size=8)
    source.prepare_data()
    assert sorted(read) == sorted((task, part) for task in SIZES for part in ("train", "test"))
    assert torch.equal(source.images("colour", "test")[0], data().images("colour", "test")[0])
    assert ClassificationTasksData("hub").task_names[0] == "sun397"


def test_a_fingerprint_changes_with_what_is_shown_and_with_nothing_else() -> None:
    source = data(stream="test")
    assert source.fingerprint("test") == data(stream="none", batch_size=3, seed=9).fingerprint("test")
    others = [
        source.fingerprint("validate"),
        source.fingerprint("stream"),
        source.fingerprint("test", "small"),
        source.fingerprint("test", "large"),
        data(mean=0.4).fingerprint("test"),
        data(image_size=9).fingerprint("test"),
        data(max_images=7).fingerprint("test"),
        data(datasets=sets(seed=4)).fingerprint("test"),
        data(tasks=["large", "small", "colour"]).fingerprint("test"),
    ]
    assert len({source.fingerprint("test"), *others}) == 10
    renamed = [data(datasets={name: sets()["small"]}).fingerprint("test") for name in ("small", "tiny")]
    assert renamed[0] == source.fingerprint("test", "small") != renamed[1]
    few = data(stream="test", adapt_fraction=0.8)
    assert few.fingerprint("stream") != data(stream="test", adapt_fraction=0.8, seed=2).fingerprint("stream")


def test_a_loader_can_differ_from_its_data_module() -> None:
    source = data(pretrain_images=20)
    step = next(iter(source.train_loader("pretrain", "none", 5, ["large"])))
    assert list(step) == ["large"] and len(step["large"].rows) == 5 and step["large"].labels is not None
    assert len(source.train_loader("pretrain", "none", 5, ["large"])) == 4
    step = next(iter(source.train_loader(stream="test")))
    assert step["small"].labels is None
    for arguments, message in (
        ({"part": "validate"}, "part must be one of all, pretrain, finetune, got 'validate'"),
        ({"stream": "all"}, "stream must be one of none, test, validate, train, got 'all'"),
        ({"tasks": ["medium"]}, "tasks has 'medium', expected some of small, large, colour"),
    ):
        with pytest.raises(ValueError, match=message):
            source.train_loader(**arguments)
    with pytest.raises(ValueError, match="part must be one of train, all, pretrain, finetune, validate, test, stream"):
        source.images("small", "dev")
    with pytest.raises(ValueError, match="stream=none has no images to adapt to"):
        source.images("small", "stream")
    with pytest.raises(ValueError, match="validation_fraction=0 holds no image out"):
        data(stream="validate", validation_fraction=0).setup("fit")
    with pytest.raises(ValueError, match="there is no task"):
        TaskStreams({}, 4, 0)


def test_pin_memory_and_devices_take_a_batch_as_it_is() -> None:
    from lightning.fabric.utilities import move_data_to_device

    rows = TaskRows("a", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), None, Normalisation((0.5,) * 3, (0.5,) * 3))
    step = TaskStreams({"a": rows}, 2, 0)[next(iter(data().train_loader().sampler))]
    moved = move_data_to_device(step, torch.device("meta"))["a"]
    assert moved.images.device.type == moved.rows.device.type == "meta"
    assert moved.labels is None and moved.task == "a" and isinstance(moved, ClassificationBatch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "source must be one of embedded, zoo, hub, got 'web'"),
        ({"stream": "all"}, "stream must be one of none, test, validate, train, got 'all'"),
        ({"train_part": "half"}, "train_part must be one of all, pretrain, finetune, got 'half'"),
        ({"train_part": "finetune"}, "train_part=finetune needs pretrain_images"),
        ({"tasks": ["upright", "sideways"]}, "tasks has 'sideways', expected some of upright, rotated"),
        ({"tasks": ["upright", "upright"]}, r"tasks must name at least one task, each once, got \['upright', 'upright"),
        ({"tasks": []}, r"tasks must name at least one task, each once, got \[\]"),
        ({"tasks": ["upright"], "seen_tasks": ["noisy"]}, "seen_tasks has 'noisy', expected some of upright"),
        ({"seen_tasks": ["sideways"]}, "seen_tasks has 'sideways', expected some of upright, rotated"),
        ({"seen_tasks": ["noisy", "noisy"]}, "seen_tasks must name at least one task, each once"),
        ({"source": "zoo", "tasks": ["a"], "seen_tasks": ["b"]}, "seen_tasks has 'b', expected some of a"),
        ({"source": "zoo", "seen_tasks": ["b"]}, "seen_tasks has 'b', expected some of mnist, fashion_mnist"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"pretrain_images": 0}, "pretrain_images must be at least 1, got 0"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1, got 1.0"),
        ({"adapt_fraction": 0.0}, "adapt_fraction must be above 0 and at most 1, got 0.0"),
        ({"severity": 6}, "severity must be from 1 to 5, got 6"),
        ({"mean": [0.5, 0.5]}, r"mean must be one number, or three, got \[0.5, 0.5\]"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"data_dir": "/nowhere"}, "data_dir=/nowhere has no meaning for source='embedded'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassificationTasksData(**options)


def test_bad_options_of_tensors_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="tasks has 'medium', expected some of small, large, colour"):
        data(tasks=["medium"])
    with pytest.raises(ValueError, match="seen_tasks has 'medium', expected some of small, large, colour"):
        data(seen_tasks=["medium"])
    with pytest.raises(ValueError, match="data_dir=x has no meaning for tensors"):
        data(data_dir="x")
