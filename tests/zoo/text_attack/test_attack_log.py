"""The file of an attack run."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from zoo.text_attack.attack_log import AttackLog
from zoo.text_attack.recipes import build_attack

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from zoo.text_attack.attack import AttackResult

TITLES = {7: "The Legend of Zelda", 2: "Pokémon “Émeraude”", 9: "", 4: "Turtle Beach Ear Force", 0: "Wii Sports"}
ORDER = list(TITLES)
SETTINGS = {"recipe": "deepwordbug", "delta": None, "targets": tuple(ORDER)}


def attacked(item: int) -> AttackResult:
    result = build_attack("deepwordbug", delta=None).attack(
        TITLES[item], lambda texts: [len(set(text)) / 7 for text in texts], item_id=item
    )
    result.ppl_pre = float("nan") if item == 9 else 1 / 3
    return result


def run(path: Path, items: Sequence[int], world_size: int = 1, settings: dict[str, object] | None = None) -> None:
    """Attack what is not there yet, each process its share."""
    logs = [AttackLog(path, settings or SETTINGS, rank) for rank in range(world_size)]
    done = logs[0].completed()
    for place, item in enumerate(items):
        if item not in done:
            logs[place % world_size].append(attacked(item))


def finish(path: Path) -> bytes:
    AttackLog(path, SETTINGS).merge(ORDER)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    return path.read_bytes()


@pytest.fixture
def uninterrupted(tmp_path: Path) -> bytes:
    (tmp_path / "whole").mkdir()
    path = tmp_path / "whole" / "attacks.jsonl"
    run(path, ORDER)
    return finish(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "attacks.jsonl"


def test_the_file_holds_the_settings_and_then_the_results_in_order(path: Path) -> None:
    run(path, ORDER)
    merged = AttackLog(path, SETTINGS).merge(ORDER)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"settings": {"recipe": "deepwordbug", "delta": None, "targets": ORDER}}
    assert [json.loads(line)["item_id"] for line in lines[1:]] == ORDER == [one.item_id for one in merged]
    assert AttackLog(path, SETTINGS).completed()[4] == attacked(4)


def test_of_two_results_of_an_item_that_of_the_file_counts(path: Path) -> None:
    run(path, ORDER)
    finish(path)
    other = attacked(4)
    other.goal_post += 1
    AttackLog(path, SETTINGS).append(other)
    assert AttackLog(path, SETTINGS).completed()[4] == attacked(4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stopped_after", range(6))
def test_a_run_that_went_on_leaves_the_file_of_one_never_stopped(
    path: Path, uninterrupted: bytes, stopped_after: int, world_size: int
) -> None:
    run(path, ORDER[:stopped_after], world_size)
    run(path, ORDER, 3 - world_size // 2)  # with another number of processes
    assert finish(path) == uninterrupted
    run(path, ORDER)  # a finished run has nothing to do
    assert finish(path) == uninterrupted


@pytest.mark.parametrize("cut", [1, 20, "in a character", "all but the first line", "in the first line", "whole"])
def test_a_torn_last_line_is_dropped_with_a_warning_and_attacked_again(
    path: Path, uninterrupted: bytes, cut: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    run(path, ORDER[:2])
    part = AttackLog(path, SETTINGS).part
    content = part.read_bytes()
    first = content.index(b"\n") + 1
    places = {
        "in a character": content.index("é".encode()) + 1,
        "all but the first line": first + 1,
        "in the first line": first - 3,
        "whole": 0,
    }
    part.write_bytes(content[: places[cut] if isinstance(cut, str) else -cut])
    with caplog.at_level(logging.WARNING):
        done = AttackLog(path, SETTINGS).completed()
    assert list(done) == ([7] if cut in (1, 20, "in a character") else [])
    assert ("the last line was cut off" in caplog.text) == (cut != "whole")
    run(path, ORDER)
    assert finish(path) == uninterrupted


def test_a_result_is_in_the_file_as_soon_as_it_is_appended(path: Path) -> None:
    log = AttackLog(path, SETTINGS, rank=1)
    for count, item in enumerate(ORDER, start=1):
        log.append(attacked(item))
        assert log.part.name == "attacks.part1.jsonl"
        assert len(AttackLog(path, SETTINGS).completed()) == count


def test_a_file_made_with_other_settings_is_refused_with_the_differing_keys(path: Path) -> None:
    run(path, ORDER)
    other = {"recipe": "punc", "targets": ORDER, "budget": 5}
    message = r"budget: None there, 5 now; delta: None there, None now; recipe: 'deepwordbug' there, 'punc' now\)"
    with pytest.raises(ValueError, match=message):
        AttackLog(path, other).completed()
    with pytest.raises(ValueError, match=message):
        AttackLog(path, other).append(attacked(7))
    before = finish(path)
    with pytest.raises(ValueError, match=r"attacks\.jsonl was made with other settings"):
        AttackLog(path, other).completed()
    assert path.read_bytes() == before


def test_a_damaged_line_in_the_middle_is_an_error_and_not_dropped(path: Path) -> None:
    run(path, ORDER)
    part = AttackLog(path, SETTINGS).part
    lines = part.read_bytes().split(b"\n")
    lines[2] = lines[2][:30]
    part.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"attacks\.part0\.jsonl is no file of attack results"):
        AttackLog(path, SETTINGS).completed()


def test_a_target_without_a_result_is_named_and_nothing_is_written(path: Path) -> None:
    run(path, ORDER[:3])
    with pytest.raises(ValueError, match=r"2 of 5 targets have no result .* the first is item 4"):
        AttackLog(path, SETTINGS).merge(ORDER)
    assert not path.exists() and len(AttackLog(path, SETTINGS).completed()) == 3


def test_results_of_other_items_are_kept_behind_those_asked_for(path: Path) -> None:
    run(path, ORDER)
    merged = AttackLog(path, SETTINGS).merge([9, 7])
    assert [one.item_id for one in merged] == [9, 7]
    assert list(AttackLog(path, SETTINGS).completed()) == [9, 7, 0, 2, 4]


def test_files_of_other_runs_in_the_folder_are_left_alone(path: Path) -> None:
    path.parent.mkdir()
    for name in ("attacks2.part0.jsonl", "attacks.partx.jsonl", "attacks.part0.txt"):
        (path.parent / name).write_text("not ours")
    run(path, ORDER)
    AttackLog(path, SETTINGS).merge(ORDER)
    assert len(list(path.parent.iterdir())) == 4


def test_settings_that_are_no_plain_values_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="must be plain values"):
        AttackLog(path, {"goal": object()})
