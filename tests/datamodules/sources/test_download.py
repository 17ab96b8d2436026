from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from typing import TYPE_CHECKING

import pytest

from datamodules import SequenceData
from datamodules.sources import sequence_sets
from datamodules.sources.download import RemoteFile, fetch
from datamodules.sources.sequence_sets import SETS, find_files, read_set, remote_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = b"1 1 2 3 4\n2 4 3 2 1\n"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "published"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".download.lock")


def test_a_file_is_there_complete_and_checked_or_not_at_all(server: tuple[str, Path], tmp_path: Path) -> None:
    url, published = server
    (published / "a.txt").write_bytes(CONTENT)
    target = tmp_path / "data"
    digest = hashlib.sha256(CONTENT).hexdigest()
    file = RemoteFile("a.txt", f"{url}/a.txt", len(CONTENT), digest)
    with pytest.raises(ValueError, match=f"has {len(CONTENT)} bytes, expected 5"):
        fetch([file._replace(size=5)], target)
    assert leftovers(target) == []
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, expected 00"):
        fetch([file._replace(sha256="00")], target)
    assert leftovers(target) == []
    with pytest.raises(FileNotFoundError, match=r"b\.txt answers 404 .*put b\.txt \(plain or \.gz\) into .*data"):
        fetch([RemoteFile("b.txt", f"{url}/b.txt")], target)
    assert leftovers(target) == []
    fetch([file], target)
    assert (target / "a.txt").read_bytes() == CONTENT
    (published / "a.txt").unlink()
    fetch([file], target)  # what is there is not fetched again
    assert leftovers(target) == ["a.txt"]


def test_without_network_the_error_says_which_files_go_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_sets, "_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(
        FileNotFoundError,
        match=r"no network.*put Beauty_item_org_rank\.txt, Beauty_time_org_rank\.txt .*into .*Beauty, or .*ZOO_DATA",
    ):
        SequenceData(source="beauty", data_dir=str(tmp_path)).prepare_data()
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"ZOO_DATA=.*gone is not a folder"):
        SequenceData(source="beauty").prepare_data()


def test_a_published_set_is_downloaded_once_and_found_again(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, published = server
    monkeypatch.setattr(sequence_sets, "_BASE_URL", url)
    (published / "Home").mkdir()
    (published / "Home" / "Home_item_org_rank.txt").write_bytes(CONTENT)
    (published / "Home" / "Home_time_org_rank.txt").write_bytes(CONTENT.replace(b"4 3 2 1", b"1 2 3 4"))
    monkeypatch.setitem(SETS, "home", SETS["home"]._replace(checks={}))
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    data = SequenceData(source="home")
    assert (data.num_items, data.num_users) == (4, 2)  # before prepare_data, as links are evaluated
    for path in (published / "Home").iterdir():
        path.unlink()
    assert SequenceData(source="home").num_items == 4


def test_known_files_carry_size_and_hash_and_unknown_ones_say_so() -> None:
    for source, chosen in SETS.items():
        for order in ("org", "var"):
            for file in remote_files(source, order):
                assert file.name.startswith(chosen.stem)
                assert file.url.startswith("https://")
                known = source in ("beauty", "sports", "yelp_a")
                assert (file.sha256 is not None) == known
    assert remote_files("home", "org")[1].size is None


@pytest.mark.parametrize(
    ("files", "order", "found"),
    [
        (["Beauty_item.txt", "Beauty_time.txt"], "auto", "Beauty_item.txt"),
        (["Beauty/Beauty_item_org_rank.txt", "Beauty/Beauty_time_org_rank.txt"], "auto", "Beauty_item_org_rank.txt"),
        (["ticoserec/Beauty_item_org_rank.txt.gz", "ticoserec/Beauty_time_org_rank.txt.gz"], "org", "Beauty_item_org"),
        (["data/Beauty/Beauty_item_var_rank.txt", "data/Beauty/Beauty_time_var_rank.txt"], "auto", "Beauty_item_var"),
    ],
)
def test_files_are_found_under_their_published_names(tmp_path: Path, files: list[str], order: str, found: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    result = find_files("beauty", order, tmp_path)
    assert result is not None
    assert result[0].name.startswith(found)
    other = "var" if "org" in found else "org"
    assert find_files("beauty", other, tmp_path) is None or found == "Beauty_item.txt"


def test_one_file_of_two_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "Beauty_item_org_rank.txt").write_bytes(CONTENT)
    (tmp_path / "Beauty_time_var_rank.txt").write_bytes(CONTENT)
    with pytest.raises(FileNotFoundError, match=r"Beauty_time_org_rank\.txt \(or \.gz\) is missing beside"):
        read_set("beauty", "auto", str(tmp_path))


def test_a_flat_folder_does_not_mistake_one_yelp_for_the_other(tmp_path: Path) -> None:
    for name in ("Yelp_item_org_rank.txt", "Yelp_time_org_rank.txt"):
        (tmp_path / name).touch()
    assert find_files("yelp_b", "org", tmp_path) is None
    own = tmp_path / "Yelp-B"
    own.mkdir()
    for name in ("Yelp_item_org_rank.txt", "Yelp_time_org_rank.txt"):
        (own / name).touch()
    assert find_files("yelp_b", "org", tmp_path) is not None
    assert find_files("yelp_b", "org", own) is not None
    assert find_files("yelp_a", "org", tmp_path) is None


def test_the_list_of_users_gives_the_published_order(tmp_path: Path) -> None:
    (tmp_path / "Beauty_item_org_rank.txt").write_bytes(CONTENT)
    (tmp_path / "Beauty_time_org_rank.txt").write_bytes(CONTENT.replace(b"4 3 2 1", b"1 2 3 4"))
    (tmp_path / "Beauty_var_rank_users.txt").write_text("2\n1\n")
    data = read_set("beauty", "var", str(tmp_path))
    assert data.user_labels.tolist() == [2, 1]
    assert data.item_ids.tolist() == [4, 3, 2, 1, 1, 2, 3, 4]
    (tmp_path / "Beauty_var_rank_users.txt").write_text("2\n3\n")
    with pytest.raises(ValueError, match="does not list the users of"):
        read_set("beauty", "var", str(tmp_path))
