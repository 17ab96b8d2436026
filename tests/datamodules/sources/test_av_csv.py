from __future__ import annotations

import wave
from typing import TYPE_CHECKING, Any

import pytest
import torch

from datamodules import VideoAudioData
from datamodules.sources.av_table import encode_labels, read_rows
from tests.datamodules.sources.av_folders import write_clip, write_table

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS: dict[str, Any] = {
    "image_size": 16, "num_frames": 3, "sample_rate": 8000, "window": 0.25, "n_fft": 256, "hop_length": 125,
    "batch_size": 4,
}  # fmt: skip


def table_data(path: Path, **options: Any) -> VideoAudioData:
    return VideoAudioData(path=str(path), cache_dir=str(path.parent / "cache"), **(SETTINGS | options))


def test_a_table_gives_clips_of_its_splits(tmp_path: Path) -> None:
    data = table_data(write_table(tmp_path))
    data.setup("fit")
    assert (data.source, data.image_shape, data.num_frames) == ("csv", [3, 16, 16], 3)
    assert (data.num_classes, data.label_names) == (2, ["bird", "cat"])
    batches = list(data.train_dataloader())
    assert (
        [batch.video.shape for batch in batches] == [batch.audio.shape for batch in batches] == [(4, 3, 3, 16, 16)] * 2
    )
    for stream in (0, 1):
        values = torch.cat([batch[stream] for batch in batches])
        assert float(values.mean()) == pytest.approx(0, abs=1e-3)
        assert float(values.std()) == pytest.approx(1, abs=1e-2)
    validation, test = next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))
    assert (validation.pair_ids.tolist(), validation.labels.tolist()) == ([0, 3], [0, 0])
    assert (test.pair_ids.tolist(), test.labels.tolist()) == ([0, 3], [1, 1])
    assert torch.equal(validation.audio[:, :, 0], validation.audio[:, :, 2]), "channels of sound are copies"


def test_spectrograms_and_statistics_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="datamodules.sources.av_csv")
    path = write_table(tmp_path)
    first = table_data(path).standardization
    assert "mean and standard deviation from 8 of 8 training clips" in caplog.text
    caplog.clear()
    assert table_data(path).standardization == first
    assert "mean and standard deviation from" not in caplog.text
    (store,) = (tmp_path / "cache").glob("standardization-*.json")
    store.write_text("{")
    assert table_data(path).standardization == first
    assert "is damaged" in caplog.text
    assert table_data(path, n_fft=128).standardization != first, "other settings, other numbers"


def test_a_click_is_in_the_window_of_the_frame_that_shows_it(tmp_path: Path) -> None:
    write_table(tmp_path)
    write_clip(tmp_path, "click", 100, frames=6, click=0.75)
    # Six frames a second, of which the middles of three thirds are taken: 1, 3 and 5, shown at 1/6, 3/6 and 5/6 s.
    new = tmp_path / "new.csv"
    new.write_text("video,audio,label,fps\nclick,click.wav,cat,6\n")
    data = table_data(tmp_path / "clips.csv", test_path=str(new))
    audio = next(iter(data.test_dataloader())).audio[0, :, 0]
    loudest = audio.mean(dim=1)  # (frames, columns)
    assert loudest[2].max() > loudest[0].max() + 1 and loudest[2].max() > loudest[1].max() + 1
    # 83 ms before the centre of a window of 250 ms.
    assert abs(int(loudest[2].argmax()) - (0.125 - 0.0833) / 0.25 * 16) <= 1


def test_a_table_without_splits_is_cut_by_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    lines = ["audio,video,pair_id", *(f"clip{n}.wav,clip{n},{n // 2}" for n in range(12))]
    data = table_data(write_table(tmp_path, lines), batch_size=8)
    ids = [next(iter(loader)).pair_ids.tolist() for loader in (data.val_dataloader(), data.test_dataloader())]
    train = next(iter(data.train_dataloader())).pair_ids.tolist()
    assert [len(set(part)) for part in (*ids, train)] == [1, 1, 4]
    assert not set(ids[0]) & set(ids[1]) and not set(train) & {*ids[0], *ids[1]}
    assert data.num_classes == 0
    assert "12 of 12 rows are frame folders without fps: taken as 25" in caplog.text
    assert "6 of 12 rows have the pair_id of an earlier row" in caplog.text


def test_labels_of_another_table_are_those_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path)
    new = tmp_path / "new.csv"
    new.write_text("video,audio,label,fps\nclip1,clip1.wav,cat,6\nclip2,clip2.wav,dog,6\nclip3,clip3.wav,,6\n")
    data = table_data(path, test_path=str(new))
    assert next(iter(data.test_dataloader())).labels.tolist() == [1, -1, -1]
    assert "1 of 3 rows have labels that" in caplog.text


def test_pairs_in_several_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table_data(write_table(tmp_path)).setup("fit")
    assert "rows of 2 pair_ids are in more than one split" in caplog.text
    caplog.clear()
    apart = tmp_path / "apart"
    lines = ["video,audio,pair_id,split"]
    lines += [f"clip{n},clip{n}.wav,p{n // 2},{'test' if n < 2 else 'train'}" for n in range(12)]
    table_data(write_table(apart, lines)).setup("fit")
    assert "more than one split" not in caplog.text


def test_silent_sound_is_told_once_for_all_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path)
    with wave.open(str(tmp_path / "clip2.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    data = table_data(path)
    data.setup("fit")
    for _ in range(2):
        list(data.train_dataloader())
    assert caplog.text.count("clip2.wav is silent") == 1


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    write_clip(tmp_path, "clip", 9)
    lines = "\n".join(["video,audio,label", *(f"clip,clip.wav,{label}" for label in ("-1",))])
    (tmp_path / "table.csv").write_text(lines + "\n")
    assert [row.label for row in read_rows(tmp_path / "table.csv")] == [""]


def test_whole_numbers_stay_what_they_are() -> None:
    labels, names = encode_labels(["3", "", "0"])
    assert (labels.tolist(), names) == ([3, -1, 0], None)
    assert encode_labels(["b", "a", ""])[0].tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], r"clips.csv is empty: expected a header|clips.csv:1: no column 'video'"),
        (["video,sound", "clip0,clip0.wav"], r"clips.csv:1: no column 'audio', only 'video', 'sound'"),
        (["video,audio,audio", "clip0,clip0.wav,"], r"clips.csv:1: 2 columns are called 'audio'"),
        (["video,audio"], r"clips.csv has no rows, only a header"),
        (["video,audio", "clip0,clip0.wav,x"], r"clips.csv:2: 3 fields, but the header has 2 columns"),
        (["video,audio,split", "clip0,clip0.wav,train", "clip1,clip1.wav,dev"],
         r"clips.csv:3: split is 'dev', expected train, validation, test"),
        (["video,audio", "clip0,clip0.wav", "clip1,clip1.wav", "clip0,clip0.wav"], r"clips.csv:4: .*since line 2"),
        (["video,audio", "clip0,"], r"clips.csv:2: audio is empty, and the folder of frames .*clip0 has no sound"),
        (["video,audio", ",clip0.wav"], r"clips.csv:2: video is empty"),
        (["video,audio", "clip0.wav,clip0.wav"], r"clips.csv:2: video .* is neither a folder of frames nor a file of"),
        (["video,audio,fps", "clip0,clip0.wav,fast"], r"clips.csv:2: fps is 'fast', expected a number above 0"),
        (["video,audio,fps", "clip0,clip0.wav,0"], r"clips.csv:2: fps is '0'"),
        (["video,audio,split", "clip0,clip0.wav,test"], r"clips.csv has no row of split=train, only test"),
    ],
    ids=["empty", "column", "twice", "header", "fields", "split", "duplicate", "sound", "video", "kind", "fps", "zero",
         "train"],
)  # fmt: skip
def test_a_malformed_table_is_refused_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_data(write_table(tmp_path, lines, clips=2)).setup("fit")


def test_files_that_are_not_there_are_named_with_their_line(tmp_path: Path) -> None:
    for line, message in (("gone,clip0.wav", r"clips.csv:2: video .*gone is missing"),
                          ("clip0,gone.wav", r"clips.csv:2: audio .*gone.wav is missing")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=message):
            read_rows(write_table(tmp_path / line[:4], ["video,audio", line], clips=1))
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv is missing: expected a CSV file"):
        read_rows(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("video,audio\nÄ,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv is not UTF-8: byte 0xc4"):
        read_rows(tmp_path / "latin.csv")


def test_too_few_frames_are_repeated_only_on_request(tmp_path: Path) -> None:
    path = write_table(tmp_path)
    with pytest.raises(ValueError, match=r"clip\d+ has 6 frames, expected 8 or more.*pad_short=True"):
        table_data(path, num_frames=8).setup("fit")
    video = next(iter(table_data(path, num_frames=8, pad_short=True).train_dataloader())).video
    assert video.shape[1] == 8 and torch.equal(video[:, 5], video[:, 7])


def test_frames_may_come_from_a_clip_in_the_middle(tmp_path: Path) -> None:
    path = write_table(tmp_path)
    whole, middle = (table_data(path, clip_seconds=seconds) for seconds in (None, 0.6))
    rows = [data._clips.rows("train") for data in (whole, middle)]
    times = [part._read_clip(part.table[0]).times for part in rows]
    assert float(times[1][-1] - times[1][0]) < float(times[0][-1] - times[0][0])
    assert float(times[1].mean()) == pytest.approx(float(times[0].mean()), abs=0.1)
    with pytest.raises(ValueError, match="clip_seconds must be above 0"):
        table_data(path, clip_seconds=0.0)
    with pytest.raises(ValueError, match=r"clip_seconds=3\.0 has no meaning for source='embedded'"):
        VideoAudioData(clip_seconds=3.0)


def test_pairs_have_the_names_of_their_table(tmp_path: Path) -> None:
    data = table_data(write_table(tmp_path))
    (batch,) = data.test_dataloader()
    names = data.pair_names
    assert names is not None
    assert {names[number] for number in batch.pair_ids.tolist()} == {
        row.pair_id or f"line {row.line}" for row in data._test_rows.table
    }  # type: ignore[attr-defined]
    assert VideoAudioData().pair_names is None
