"""Attacks that edit a title once, without asking the victim: what every search is compared with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.text_attack.attack import AttackResult, item_generator, make_result
from zoo.text_attack.constraints import ProtectedWords, ReadableWords, Stopwords
from zoo.text_attack.rewriting import LMRewriteDefense
from zoo.text_attack.search import CountedGoal
from zoo.text_attack.transformations import CharacterEdits
from zoo.text_attack.word_lists import POSITIVE_WORDS, PROTECTED_WORDS, STOPWORDS
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

    from zoo.text_attack.search import GoalFunction, Stop

_log = logging.getLogger(__name__)

REWRITE_PROMPT = (
    "You are a marketing expert who writes product titles. Rewrite the title below so that it attracts more customers. "
    "Keep its content and its length. Answer with the new title only.\n\nTitle: {title}\nNew title:"
)
PLACES = ("end", "start")


class OneShotAttack:
    """An attack that chooses its edit without a query; the goal is asked afterwards, for the report alone.

    Args:
        seed: Seed of all chance.
        recipe: Name of the attack in results; part of the seed.
    """

    def __init__(self, *, seed: int = 42, recipe: str) -> None:
        self.seed, self.recipe = seed, recipe

    def edit(self, text: str, item_id: int, rng: random.Random, readable: int) -> str | None:
        """The edited title, or None where there is nothing to edit.

        Args:
            text: The title.
            item_id: The item.
            rng: The only source of chance.
            readable: Characters of the title that the victim reads.
        """
        raise NotImplementedError

    def attack(
        self,
        text: str,
        goal: GoalFunction,
        *,
        item_id: int = 0,
        readable: Callable[[str], int] | None = None,
    ) -> AttackResult:
        """Edit a title, and score it before and after; these two scores are no queries of the attack.

        See `TextAttack.attack`.
        """
        rng = item_generator(self.seed, self.recipe, item_id)
        edited = self.edit(text, item_id, rng, len(text) if readable is None else readable(text))
        perturbed = text if edited is None else edited
        counted = CountedGoal(goal, title=text)
        pre, post = counted([text, perturbed])
        stop: Stop = "no_modifiable_word" if edited is None else "exhausted"
        return make_result(
            item_id,
            text,
            perturbed,
            recipe=self.recipe,
            goal_pre=pre,
            goal_post=post,
            n_queries=0,
            n_scored=counted.n_scored,
            stop=stop,
            synonym_source=None,
            encoder=None,
            seed=self.seed,
            trace=[[0, post]],
        )


class Identity(OneShotAttack):
    """Leaves every title as it is: with it, nothing that an attack run measures may move."""

    def __init__(self, *, seed: int = 42, recipe: str = "identity") -> None:
        super().__init__(seed=seed, recipe=recipe)

    def edit(self, text: str, item_id: int, rng: random.Random, readable: int) -> str | None:
        """See `OneShotAttack`."""
        return text


class RandomEdit(OneShotAttack):
    """One random typing error of DeepWordBug in one random word: the control of every table.

    Args:
        stopwords: Words to leave alone, see `Stopwords`.
        protected_words: More of them, see `ProtectedWords`.
        seed: Seed of all chance.
        recipe: Name of the attack in results.
    """

    def __init__(
        self,
        stopwords: Iterable[str] | None = STOPWORDS,
        protected_words: Iterable[str] = PROTECTED_WORDS,
        *,
        seed: int = 42,
        recipe: str = "random",
    ) -> None:
        super().__init__(seed=seed, recipe=recipe)
        self._before = (Stopwords(stopwords), ProtectedWords(protected_words))
        self._edits = CharacterEdits()

    def edit(self, text: str, item_id: int, rng: random.Random, readable: int) -> str | None:
        """See `OneShotAttack`."""
        words = Words.of(text)
        places = ReadableWords(readable).modifiable(words)
        for constraint in self._before:
            places &= constraint.modifiable(words)
        editable = [i for i in sorted(places) if len(words.words[i]) > 1]
        if not editable:
            return None
        return rng.choice(self._edits.candidates(words, rng.choice(editable), rng)).text


class TrivialInsertion(OneShotAttack):
    """Appends words of praise; where a victim cuts titles, what stands at the end of a long one may never be read.

    Args:
        words: Words to draw from, without replacement.
        count: How many to insert.
        place: At the "end" or at the "start" of the title.
        seed: Seed of all chance.
        recipe: Name of the attack in results.

    Raises:
        ValueError: If `count` is below 1 or above the number of words, or the place is unknown.
    """

    def __init__(
        self,
        words: Sequence[str] = POSITIVE_WORDS,
        count: int = 5,
        place: str = "end",
        *,
        seed: int = 42,
        recipe: str = "trivial",
    ) -> None:
        if not 1 <= count <= len(words):
            raise ValueError(f"count must lie in 1..{len(words)}, the number of words to draw from; got {count}")
        if place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}; got {place!r}")
        super().__init__(seed=seed, recipe=recipe)
        self.words, self.count, self.place = tuple(words), count, place

    def edit(self, text: str, item_id: int, rng: random.Random, readable: int) -> str | None:
        """See `OneShotAttack`."""
        if not text.strip():
            return None
        praise = " ".join(rng.sample(self.words, self.count))
        return f"{text} {praise}" if self.place == "end" else f"{praise} {text}"


class RewriteAttack(OneShotAttack):
    """Titles rewritten by a language model, here or elsewhere.

    Args:
        rewriter: Turns a list of titles into their rewrites, such as `LanguageModelRewriter`; or a file of ready ones,
            one JSON object `{"item_id": 3, "text": "..."}` a line.
        seed: Seed, for the result.
        recipe: Name of the attack in results.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line of it is not such an object, or an item has two.
    """

    def __init__(
        self,
        rewriter: Callable[[list[str]], Sequence[str]] | str | Path,
        *,
        seed: int = 42,
        recipe: str = "rewrite",
    ) -> None:
        super().__init__(seed=seed, recipe=recipe)
        self._path = Path(rewriter).expanduser() if isinstance(rewriter, str | Path) else None
        self._ready = None if self._path is None else _read_rewrites(self._path)
        self._rewriter = None if isinstance(rewriter, str | Path) else rewriter

    def edit(self, text: str, item_id: int, rng: random.Random, readable: int) -> str | None:
        """See `OneShotAttack`.

        Raises:
            ValueError: If the file has no rewrite of the item, or the rewriter gives another number of texts.
        """
        if not text.strip():
            return None
        if self._rewriter is not None:
            rewrites = self._rewriter([text])
            if len(rewrites) != 1:
                raise ValueError(f"the rewriter gave {len(rewrites)} texts for one title, {text!r}")
            rewrite = rewrites[0]
        elif self._ready is not None and item_id in self._ready:
            rewrite = self._ready[item_id]
        else:
            raise ValueError(f"{self._path} has no rewrite of item {item_id} ({text!r}): add a line for it")
        if not rewrite.strip():
            _log.warning("the rewrite of item %d (%r) is empty: the title stays as it is", item_id, text)
            return text
        return rewrite


class LanguageModelRewriter(LMRewriteDefense):
    """A language model on this machine that makes titles more attractive, greedily; what it asks of the model is this.

    A title keeps its text where the answer is empty or longer than twice the title.

    Args:
        model: A folder of `save_pretrained` with its tokenizer, or a hub id.
        prompt: Text around the title, with `{title}` once.
        max_new_tokens: Longest answer in tokens.
        batch_size: Titles written at once.

    Raises:
        ValueError: If the prompt does not have `{title}` once, or a number is below 1.
    """

    def __init__(
        self, model: str | Path, prompt: str = REWRITE_PROMPT, max_new_tokens: int = 64, batch_size: int = 16
    ) -> None:
        super().__init__(model, prompt, max_new_tokens, batch_size)


def _read_rewrites(path: Path) -> dict[int, str]:
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file; a file of rewrites has lines {{"item_id": 3, "text": "..."}}')
    rewrites: dict[int, str] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is not JSON ({error})") from error
            item = row.get("item_id") if isinstance(row, dict) else None
            if type(item) is not int or not isinstance(row.get("text"), str):
                raise ValueError(
                    f'line {number} of {path} must be {{"item_id": integer, "text": string}}, got {line.strip()[:80]!r}'
                )
            if item in rewrites:
                raise ValueError(f"line {number} of {path} is a second rewrite of item {item}")
            rewrites[item] = row["text"]
    return rewrites
