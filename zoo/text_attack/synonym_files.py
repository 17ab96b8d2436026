"""Word lists as files: the formats that synonyms come in."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from zoo.common.text_lines import read_lines

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

Kind = Literal["user", "vectors", "pairs", "wordnet"]
WORD = re.compile(r"\w+(?:['\u2019\-_*@]\w+)*")
PARTS = {"n": "NOUN", "v": "VERB", "a": "ADJ", "s": "ADJ", "r": "ADV"}


def find_file(folder: Path, name: str) -> Path | None:
    """A file of a folder, plain or as `.gz`; None where there is neither."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def kind_of(path: Path) -> Kind:
    """What a file of words holds, told by its first line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it looks like none of the formats.
    """
    expected = (
        "word<TAB>synonym synonym ..., word<TAB>n|v|a|r<TAB>synonym synonym ..., two words a line, or word vectors "
        "(word number number ...)"
    )
    number, line = next(read_lines(path, expected))
    cells, fields = line.split("\t"), line.split()
    if (len(fields) > 2 and _are_numbers(fields[1:])) or (len(fields) == 2 and all(x.isdecimal() for x in fields)):
        return "vectors"
    if len(cells) == 3 and cells[1] in PARTS:
        return "wordnet"
    if len(cells) == 2:
        return "user"
    if len(fields) == 2 and len(cells) == 1:
        return "pairs"
    raise ValueError(f"{path}, line {number}: {line[:60]!r}, expected {expected}")


def read_user(path: Path) -> dict[str, list[str]]:
    """The synonyms of each word of a file of lines `word<TAB>synonym synonym ...`, in lower case and in its order.

    Raises:
        ValueError: If a line is not of this form.
    """
    expected = "word<TAB>synonym synonym ..."
    table: dict[str, list[str]] = {}
    for number, line in read_lines(path, expected):
        word, tab, rest = line.lower().partition("\t")
        if not tab or len(word.split()) != 1 or not rest.split() or "\t" in rest.strip():
            raise ValueError(f"{path}, line {number}: {line[:60]!r}, expected {expected}")
        table.setdefault(word.strip(), []).extend(rest.split())
    return table


def read_pairs(path: Path) -> Counter[tuple[str, str]]:
    """How often each pair of a file of two words a line occurs, both ways together, in order of first appearance.

    Raises:
        ValueError: If a line has not two words.
    """
    pairs: Counter[tuple[str, str]] = Counter()
    same = 0
    for number, line in read_lines(path, "two words a line"):
        words = line.lower().split()
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: {line[:60]!r}, expected two words")
        a, b = words
        if a == b:
            same += 1
        else:
            pairs[(b, a) if (b, a) in pairs else (a, b)] += 1
    if same:
        log.info("%s: %d pairs of a word with itself left out", path, same)
    return pairs


def read_wordnet_table(path: Path) -> dict[str, dict[str, set[str]]]:
    """The synonyms of each word by part of speech, from lines `word<TAB>n|v|a|r<TAB>synonym synonym ...`.

    Raises:
        ValueError: If a line is not of this form.
    """
    expected = "word<TAB>n, v, a or r<TAB>synonym synonym ..."
    table: dict[str, dict[str, set[str]]] = {}
    for number, line in read_lines(path, expected):
        cells = line.lower().split("\t")
        if len(cells) != 3 or cells[1] not in PARTS or len(cells[0].split()) != 1 or not cells[2].split():
            raise ValueError(f"{path}, line {number}: {line[:60]!r}, expected {expected}")
        table.setdefault(cells[0], {}).setdefault(PARTS[cells[1]], set()).update(cells[2].split())
    return table


def read_wordnet_yaml(folder: Path) -> dict[str, dict[str, set[str]]]:
    """The same from the synset files (`noun.act.yaml` ...) of Open English WordNet's `src/yaml`.

    Members of several words are left out, and counted in the log.

    Raises:
        FileNotFoundError: If there are no such files.
        ValueError: If a synset lacks its members or part of speech.
    """
    import yaml

    # The loader in C, where PyYAML has it, is ten times faster.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = sorted(path for part in ("noun", "verb", "adj", "adv") for path in folder.glob(f"{part}.*.yaml"))
    if not files:
        raise FileNotFoundError(f"{folder} has no noun.*.yaml, verb.*.yaml, adj.*.yaml or adv.*.yaml of WordNet")
    table: dict[str, dict[str, set[str]]] = {}
    skipped = 0
    for path in files:
        try:
            synsets = yaml.load(path.read_text(encoding="utf-8"), Loader=loader) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML ({str(error).splitlines()[0]})") from error
        for key, synset in synsets.items():
            part, members = (synset.get("partOfSpeech"), synset.get("members")) if isinstance(synset, dict) else (0, 0)
            if part not in PARTS or not isinstance(members, list):
                raise ValueError(f"{path}, synset {key}: expected members, and a partOfSpeech of {', '.join(PARTS)}")
            words = {str(member).lower() for member in members}
            single = {word for word in words if WORD.fullmatch(word)}
            skipped += len(words) - len(single)
            for word in single:
                table.setdefault(word, {}).setdefault(PARTS[part], set()).update(single - {word})
    log.info("%s: %d words, %d members of several words left out", folder, len(table), skipped)
    return table


def _are_numbers(fields: list[str]) -> bool:
    try:
        [float(field) for field in fields]
    except ValueError:
        return False
    return True
