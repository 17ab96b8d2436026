from __future__ import annotations

import io
import json
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from datamodules.sources.classification_sets import LabelledImages
from datamodules.sources.clip_images import resize_and_crop
from datamodules.sources.clip_prompts import MERGING_TASKS
from datamodules.sources.hub_sets import HubSets, read_hub_set

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

datasets = pytest.importorskip("datasets")

SIZES = [(20, 12), (9, 30), (16, 16), (40, 17), (8, 8)]
LABELS = [2, 0, 1, 1, 2]
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pictures(seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def hub_like(labels: Sequence[int] = LABELS, names: list[str] | None = NAMES, seed: int = 0) -> Any:
    """A data set as the hub's are: pictures, and classes with names."""
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": pictures(seed), "label": list(labels)}, features=features)


def raw_parquet(path: Path, files: Sequence[bytes | None], labels: Any = LABELS, as_struct: bool = True) -> Path:
    """A parquet file that knows nothing of the library `datasets`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images: list[Any] = [None if f is None else {"bytes": f, "path": None} for f in files] if as_struct else list(files)
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


@pytest.fixture
def local(tmp_path: Path) -> dict[str, Path]:
    """One set in every form that is read; the split "train" has other pictures."""
    whole = datasets.DatasetDict({"train": hub_like(seed=1), "test": hub_like()})
    whole.save_to_disk(str(tmp_path / "whole"))
    hub_like().save_to_disk(str(tmp_path / "single"))
    whole["test"].to_parquet(str(tmp_path / "file.parquet"))
    for name in ("train", "test"):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        whole[name].to_parquet(str(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet"))
        (tmp_path / "folders" / name).mkdir(parents=True)
        whole[name].to_parquet(str(tmp_path / "folders" / name / "0000.parquet"))
        whole[name].save_to_disk(str(tmp_path / "splits" / name))
    files = [png(image) for image in pictures()]
    raw_parquet(tmp_path / "raw" / "test.parquet", files)
    raw_parquet(tmp_path / "bytes" / "test.parquet", files, as_struct=False)
    names = ("whole", "single", "file.parquet", "hub", "folders", "splits", "raw", "bytes")
    return {name: tmp_path / name for name in names}


def test_every_form_of_a_local_copy_gives_the_same_images_and_labels(local: dict[str, Path], tmp_path: Path) -> None:
    want = resize_and_crop(pictures(), 10)
    for form, path in local.items():
        table = read_hub_set(path, "test", size=10, cache_dir=tmp_path / "cache")
        assert len(table) == 5
        assert table.labels.tolist() == LABELS and table.labels.dtype == torch.int64, form
        assert table.class_names == (NAMES if form not in ("raw", "bytes") else ["0", "1", "2"]), form
        assert torch.equal(table.gather(torch.arange(5)), want), form
    train = read_hub_set(str(local["hub"]), "train", size=10, cache_dir=tmp_path / "cache")
    assert torch.equal(train.gather(torch.arange(5)), resize_and_crop(pictures(1), 10))


def test_batches_are_of_the_rows_asked_for_in_their_order(local: dict[str, Path]) -> None:
    table = read_hub_set(local["whole"], size=8)
    want = resize_and_crop(pictures(), 8)
    for rows in ([3, 0, 3], [4], []):
        got = table.gather(torch.tensor(rows, dtype=torch.int64))
        assert got.dtype == torch.uint8 and torch.equal(got, want[rows])


def test_tables_map_their_file_and_can_be_sent_to_a_worker(local: dict[str, Path]) -> None:
    table = read_hub_set(local["whole"], size=8)
    assert table._dataset.cache_files
    sent = pickle.dumps(table)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent).gather(torch.tensor([1])), table.gather(torch.tensor([1])))


def test_a_configuration_chooses_among_folders_of_parquet_files(tmp_path: Path) -> None:
    for config, labels in (("plain", LABELS), ("other", [0, 0, 0, 0, 1])):
        raw_parquet(tmp_path / "set" / config / "test-00000-of-00001.parquet", [png(i) for i in pictures()], labels)
    table = read_hub_set(tmp_path / "set", "test", config="plain", cache_dir=tmp_path / "cache")
    assert table.labels.tolist() == LABELS


def test_files_of_a_split_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = [png(image) for image in pictures()]
    raw_parquet(tmp_path / "set" / "test-00001-of-00002.parquet", files[3:], LABELS[3:])
    raw_parquet(tmp_path / "set" / "test-00000-of-00002.parquet", files[:3], LABELS[:3])
    raw_parquet(tmp_path / "set" / "test_other.parquet", files)
    assert read_hub_set(tmp_path / "set", "test", cache_dir=tmp_path / "cache").labels.tolist() == LABELS


def test_columns_class_names_and_labels_as_texts(tmp_path: Path) -> None:
    table = pa.table({"img": [png(image) for image in pictures()], "kind": [NAMES[label] for label in LABELS]})
    pq.write_table(table, tmp_path / "test.parquet")
    options: dict[str, Any] = {"image_column": "img", "label_column": "kind", "cache_dir": tmp_path / "cache"}
    found = read_hub_set(tmp_path / "test.parquet", class_names=NAMES, **options)
    assert found.labels.tolist() == LABELS and found.class_names == NAMES
    with pytest.raises(ValueError, match=r"column 'kind' holds texts such as 'cow': expected class_names"):
        read_hub_set(tmp_path / "test.parquet", **options)
    with pytest.raises(ValueError, match=r"column 'kind' has 'bee' at row 2: expected one of class_names"):
        read_hub_set(tmp_path / "test.parquet", class_names=["ant", "cow"], **options)


def test_class_names_given_replace_those_of_the_set_if_they_are_as_many(local: dict[str, Path]) -> None:
    assert read_hub_set(local["whole"], class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="2 class_names are given, but column 'label' has 3 classes: ant, bee, cow"):
        read_hub_set(local["whole"], class_names=["a", "b"])


def test_missing_splits_and_columns_are_refused_by_name(local: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"whole has no split 'val': it has train, test"):
        read_hub_set(local["whole"], "val")
    with pytest.raises(ValueError, match=r"hub has no file of the split 'val': .*it has test-00000"):
        read_hub_set(local["hub"], "val", cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=r"splits holds no data set with a split 'val'"):
        read_hub_set(local["splits"], "val")
    with pytest.raises(ValueError, match=r"no column 'img': it has image, label; name another in image_column"):
        read_hub_set(local["whole"], image_column="img")
    with pytest.raises(ValueError, match=r"no column 'fine': it has image, label; name another in label_column"):
        read_hub_set(local["whole"], label_column="fine")
    with pytest.raises(ValueError, match=r"column 'label' holds .*: expected images"):
        read_hub_set(local["whole"], image_column="label")


def test_a_folder_of_one_split_is_not_taken_for_another(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": pictures(), "label": LABELS}
    train = datasets.Dataset.from_dict(rows, features=features, split="train")
    train.save_to_disk(str(tmp_path / "single"))
    assert len(read_hub_set(tmp_path / "single", "train")) == 5
    with pytest.raises(ValueError, match="single holds the split 'train', not 'test'"):
        read_hub_set(tmp_path / "single", "test")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, -1, 2, 0], None, r"has the label -1 at row 2 \(1 such\): expected 0 to 2"),
        ([0, 1, 3, 3, 0], ["a", "b", "c"], r"has the label 3 at row 2 \(2 such\): expected 0 to 2"),
        ([0, None, 2, 1, None], None, r"has no label at row 1 \(2 are missing\)"),
        ([0.5, 1.0, 0.0, 1.0, 0.0], None, "holds double: expected class numbers"),
        ([True, False, True, True, False], None, "holds bool: expected class numbers"),
    ],
)
def test_labels_that_are_no_classes_are_refused_with_their_row(
    tmp_path: Path, labels: list[Any], names: list[str] | None, message: str
) -> None:
    path = raw_parquet(tmp_path / "test.parquet", [png(image) for image in pictures()], labels)
    with pytest.raises(ValueError, match=message):
        read_hub_set(path, class_names=names, cache_dir=tmp_path / "cache")


def test_damaged_and_missing_images_are_refused_with_their_row(tmp_path: Path) -> None:
    files: list[bytes | None] = [png(image) for image in pictures()]
    for row, content, message in (
        (3, b"no picture", r"the image at row 3 in column 'image' cannot be decoded"),
        (1, png(pictures()[1])[:200], r"the image at row 1 in column 'image' cannot be decoded"),
        (2, None, r"column 'image' has no image at row 2"),
    ):
        broken = [content if place == row else file for place, file in enumerate(files)]
        path = raw_parquet(tmp_path / f"{row}.parquet", broken)
        table = read_hub_set(path, cache_dir=tmp_path / "cache")
        good = [place for place in range(5) if place != row]
        assert len(table.gather(torch.tensor(good))) == 4
        with pytest.raises(ValueError, match=message):
            table.gather(torch.tensor([4, row, 0]))


def test_empty_and_damaged_files_are_refused(tmp_path: Path) -> None:
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    pq.write_table(schema.empty_table(), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="holds no row"):
        read_hub_set(tmp_path / "test.parquet", cache_dir=tmp_path / "cache")
    hub_like().select([]).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none holds no row"):
        read_hub_set(tmp_path / "none")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"bad.parquet is no readable parquet file"):
        read_hub_set(tmp_path / "bad.parquet", cache_dir=tmp_path / "cache")
    whole = raw_parquet(tmp_path / "test.parquet", [png(image) for image in pictures()]).read_bytes()
    (tmp_path / "test.parquet").write_bytes(b"PAR1" + bytes(300) + whole[304:])
    with pytest.raises(ValueError, match=r"test.parquet \(split test\) is no readable parquet file"):
        read_hub_set(tmp_path / "test.parquet", cache_dir=tmp_path / "cache")
    (tmp_path / "half" / "test").mkdir(parents=True)
    hub_like().save_to_disk(str(tmp_path / "half"))
    for file in (tmp_path / "half").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="half is damaged"):
        read_hub_set(tmp_path / "half")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no data set .*save_to_disk writes"):
        read_hub_set(tmp_path / "empty")


@pytest.mark.parametrize("id", ["./none", "/none/at/all", "~/none", "a/b/c", "none.parquet"])
def test_paths_that_are_missing_are_not_looked_up_on_the_hub(id: str) -> None:
    with pytest.raises(FileNotFoundError, match="is missing: expected a folder of save_to_disk"):
        read_hub_set(id)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_without_a_network_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    way = r"\('ufldl-stanford/svhn', 'cropped_digits'\).save_to_disk\(FOLDER\)"
    with pytest.raises(FileNotFoundError, match=f"the hub did not give it .*{way}"):
        read_hub_set("ufldl-stanford/svhn", config="cropped_digits", cache_dir=tmp_path)


def test_the_hub_is_asked_for_the_configuration_and_what_it_says_of_a_wrong_split_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def load(*args: Any, **options: Any) -> None:
        asked.append((args, options))
        raise ValueError(f'Unknown split "{options["split"]}". Should be one of ["train", "test"].')

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"a/b, configuration 'c', split 'val' cannot be read: Unknown split"):
        read_hub_set("a/b", "val", config="c", cache_dir=tmp_path)
    assert asked == [(("a/b", "c"), {"split": "val", "cache_dir": str(tmp_path)})]


def test_a_task_is_read_by_the_configuration_columns_and_names_of_its_entry(tmp_path: Path) -> None:
    for config, kinds in (("plain", [NAMES[label] for label in LABELS]), ("other", ["bee"] * 5)):
        path = tmp_path / "mine" / config / "test.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"img": [png(image) for image in pictures()], "kind": kinds}), path)
    hub = {"id": "a/b", "config": "plain", "splits": {"test": "test"}, "image_column": "img", "label_column": "kind"}
    entry = {"note": "", "hub": hub, "templates": ["a {}."], "class_names": NAMES, "aliases": {}}
    (tmp_path / "mine.json").write_text(json.dumps({"tasks": {"mine": entry}}))
    sets = HubSets(8, root=tmp_path, prompts=tmp_path / "mine.json", cache_dir=tmp_path / "cache")
    assert sets.table("mine", "test").labels.tolist() == LABELS
    assert sets.table("mine", "test").class_names == NAMES
    assert list((tmp_path / "cache").rglob("*.arrow"))


def test_tasks_are_read_from_local_copies_with_the_names_of_their_prompts(tmp_path: Path) -> None:
    digits = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
    rows = {"image": pictures(), "label": [3, 9, 0, 0, 7]}
    for part in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=digits).save_to_disk(str(tmp_path / "mnist" / part))
    scenes = hub_like(names=["/a/abbey", "/b/barn_door", "/s/stage/indoor"])
    datasets.DatasetDict({"test": scenes}).save_to_disk(str(tmp_path / "sun397"))
    sets = HubSets(12, root=tmp_path)
    assert sets.names() == list(MERGING_TASKS)
    assert sets.classes("mnist") == [*"0123456789"] and len(sets.classes("gtsrb")) == 43
    assert sets.classes("sun397") == ["abbey", "barn door", "stage indoor"]
    found = sets.read("mnist", "train")
    assert isinstance(found, LabelledImages)
    assert found.labels.tolist() == rows["label"]
    assert torch.equal(found.images, resize_and_crop(pictures(), 12).permute(0, 3, 1, 2))
    assert sets.table("mnist", "test") is sets.table("mnist", "test")
    assert sets.table("mnist", "test") is not sets.table("mnist", "train")


def test_large_parts_are_decoded_piece_by_piece(local: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.sources.hub_sets._CHUNK", 2)
    local["whole"].rename(local["whole"].with_name("sun397"))
    found = HubSets(12, root=local["whole"].parent).read("sun397", "test")
    assert torch.equal(found.images, resize_and_crop(pictures(), 12).permute(0, 3, 1, 2))


def test_corrupted_splits_are_parts_of_the_tasks_that_have_them(tmp_path: Path) -> None:
    names = [f"{kind}" for kind in range(10)]
    splits = {"contrast": hub_like(names=names), "test": hub_like(names=names, seed=1)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "eurosat"))
    sets = HubSets(8, root=tmp_path)
    assert torch.equal(sets.table("eurosat", "contrast").gather(torch.arange(5)), resize_and_crop(pictures(), 8))
    with pytest.raises(ValueError, match=r"'mnist' has no part 'contrast': it has train, test"):
        sets.table("mnist", "contrast")


def test_a_file_of_prompts_adds_sets_and_tasks_without_a_set_are_refused(
    local: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    hub = {
        "id": str(local["whole"]),
        "config": None,
        "splits": {"train": "test", "test": "train"},
        "image_column": "image",
        "label_column": "label",
    }
    entry = {"note": "", "hub": hub, "templates": ["a {}."], "class_names": ["A", "B", "C"], "aliases": {}}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"tasks": {"mine": entry}}))
    sets = HubSets(8, prompts=path)
    assert sets.classes("mine") == ["A", "B", "C"]
    assert torch.equal(sets.read("mine", "test").images[0], resize_and_crop(pictures(1), 8)[0].permute(2, 0, 1))
    with pytest.raises(ValueError, match="'kmnist' has no set on the hub"):
        HubSets(8).table("kmnist", "test")
    with pytest.raises(FileNotFoundError, match="the hub did not give it"):
        HubSets(8, root=tmp_path, cache_dir=tmp_path / "cache").table("dtd", "test")
