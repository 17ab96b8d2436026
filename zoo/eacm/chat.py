"""The command `python -m zoo.eacm.chat`: talk to a trained model in the terminal."""

from __future__ import annotations

import argparse
import math
import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zoo.common.checkpoints import load_run_checkpoint, weights_mismatch
from zoo.common.command import CommandParser
from zoo.eacm.types import UNK_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from zoo.eacm.dialogue_module import DialogueModule

MODELS: dict[str, str] = {
    "EACM": "zoo.eacm.eacm",
    "ECM": "zoo.eacm.ecm",
    "EmoEmb": "zoo.eacm.eacm",
    "Seq2Seq": "zoo.eacm.eacm",
    "SteeredLM": "zoo.eacm.steered",
}
"""Where each model that replies is defined."""

_DESCRIPTION = """\
Talk to a trained model: a post goes in; the reply, its emotion and the distribution over emotions come out.

  python -m zoo.eacm.chat --checkpoint best.ckpt
  printf 'i lost my job\\n/emotion angry\\ni lost my job\\n' | python -m zoo.eacm.chat --checkpoint best.ckpt

/help in the conversation lists the commands.
"""
_HELP = """\
Type a post, and the model replies. Commands:
  /emotion NAME              reply with this emotion from now on
  /emotion NAME=0.7 NAME=0.3 reply with a mixture
  /emotion auto              let the model choose again
  /all [POST]                replies to a post (the last one by default) under every emotion
  /greedy                    the likeliest word at each step
  /beam [5]                  search with so many hypotheses
  /sample [0.8]              draw words, at a temperature (1 by default)
  /context                   begin or stop to keep the turns so far as part of the post
  /help                      this text
  /quit                      leave; so does the end of input"""
_SEPARATOR = "[SEP]"
_WIDTH = 20
"""Columns of a bar."""
_MOST_HYPOTHESES = 100


class Posts(NamedTuple):
    """What models read of posts without a reply."""

    post_ids: Tensor
    post_mask: Tensor
    post_text: list[str]
    reply_emotion: Tensor
    reply_emotion_known: Tensor


class Chat:
    """A conversation with a model: a line in, its answer out.

    Args:
        module: The model, with its words.
        max_post_length: Most words of a post; the last ones are kept. That of the training data serves best.

    Attributes:
        done: Whether `/quit` was said.

    Raises:
        ValueError: If the model knows no words, or `max_post_length` is not positive.
    """

    def __init__(self, module: DialogueModule, max_post_length: int = 30) -> None:
        if module.vocabulary_ is None:
            raise ValueError(
                f"this {type(module).__name__} knows no words: its checkpoint must come from a training with a "
                "datamodule that has tokenizers (such as DialogueData)"
            )
        if max_post_length < 1:
            raise ValueError(f"max_post_length must be at least 1, got {max_post_length}")
        self.module, self.max_post_length, self.done = module.eval(), max_post_length, False
        self._forced: Tensor | None = None
        self._options: dict[str, Any] = {"num_return": 1}
        self._with_context = False
        self._turns: list[str] = []
        self._last: str | None = None
        self._answered = 0
        self._commands: dict[str, Callable[[str], str]] = {
            "emotion": self._emotion,
            "all": self._all,
            "greedy": self._greedy,
            "beam": self._beam,
            "sample": self._sample,
            "context": self._context,
            "help": lambda _: _HELP,
            "quit": self._quit,
        }

    @property
    def greeting(self) -> str:
        """What stands above a conversation."""
        kind, names = type(self.module).__name__, ", ".join(self.module.label_names)
        if not self.module.takes_emotions:
            return f"{kind} replies without an emotion. Type a post, or /help."
        if not self.module.chooses_emotions:
            return f"{kind} replies with the emotion it is given ({names}). Type /emotion NAME, then a post; or /help."
        return f"{kind} chooses among the emotions {names}. Type a post, or /help."

    def respond(self, line: str) -> str:
        """The answer to a line: a post or a command.

        What is wrong with a line is its answer; nothing is raised for it.
        """
        line = line.strip()
        if not line:
            return "Type a post, or /help."
        if not line.startswith("/"):
            return self._post(line)
        name, _, rest = line[1:].partition(" ")
        command = self._commands.get(name.lower())
        if command is None:
            return f"There is no command /{name}; there are {', '.join(f'/{known}' for known in self._commands)}."
        return command(rest.strip())

    # Posts.

    def _post(self, text: str) -> str:
        trouble, note = self._read(text)
        if trouble:
            return trouble
        if self.module.takes_emotions and not self.module.chooses_emotions and self._forced is None:
            return (
                f"{type(self.module).__name__} replies with the emotion it is given: type /emotion with {self._names}."
            )
        whole = f" {_SEPARATOR} ".join([*self._turns, text]) if self._with_context else text
        reply, shares = self._reply(whole, self._forced)
        self._last = whole
        self._answered += 1
        if self._with_context:
            self._turns += [text, reply] if reply else [text]
        lines = [reply or "(a reply without a word)", *self._bars(shares)]
        return "\n".join([*lines, note] if note else lines)

    def _read(self, text: str) -> tuple[str, str]:
        """What is wrong with a post, and a note on it; each may be empty."""
        tokenizer = self.module.vocabulary.post
        encoding = tokenizer.encode(text)
        separator = tokenizer.token_to_id(_SEPARATOR)
        kept = range(len(encoding.ids))[-self.max_post_length :]
        words = [place for place in kept if encoding.ids[place] != separator]
        unknown = [place for place in words if encoding.ids[place] == UNK_ID]
        if len(unknown) == len(words):
            return "The model knows no word of this post: try other words, as they are in its training data.", ""
        spelled = dict.fromkeys(text[slice(*encoding.offsets[place])] for place in unknown)
        return "", f"(not known: {', '.join(spelled)})" if spelled else ""

    def _reply(self, text: str, forced: Tensor | None) -> tuple[str, Tensor | None]:
        """A reply, and the distribution `(num_emotions,)` that steered it."""
        device = self.module.device
        ids, mask = self.module.vocabulary.encode_posts([text], self.max_post_length)
        gold = torch.zeros(1, self.module.num_emotions, device=device)
        posts = Posts(ids.to(device), mask.to(device), [text], gold, gold.new_zeros(1, dtype=torch.bool))
        # The same post sampled again has another reply, and a whole conversation can be repeated.
        seed = self.module.options.seed + self._answered
        answers = self.module.answer(posts, emotion=forced, seed=seed, **self._options)
        return " ".join(answers.words[0][0]), None if answers.emotion is None else answers.emotion[0].float().cpu()

    def _bars(self, shares: Tensor | None) -> list[str]:
        if shares is None:
            return []
        names = self.module.label_names
        width = max(map(len, names))
        whose = "as you asked" if self._forced is not None else "chosen by the model"
        lines = [f"emotion: {names[int(shares.argmax())]} ({whose})"]
        for name, share in zip(names, shares.tolist(), strict=True):
            bar = "#" * round(_WIDTH * min(share, 1.0))
            lines.append(f"  {name:<{width}}  {bar:<{_WIDTH}} {share:.2f}")
        return lines

    def _all(self, rest: str) -> str:
        if not self.module.takes_emotions:
            return self._without_emotions
        trouble, note = self._read(rest) if rest else ("", "")
        post = rest or self._last
        if post is None:
            return "There is no post yet: type one, or /all POST."
        if trouble:
            return trouble
        names = self.module.label_names
        width = max(map(len, names))
        lines = []
        for name, pure in zip(names, torch.eye(len(names)), strict=True):
            reply, _ = self._reply(post, pure)
            lines.append(f"  {name:<{width}}  {reply or '(a reply without a word)'}")
        return "\n".join([*lines, note] if note else lines)

    # Emotions.

    @property
    def _names(self) -> str:
        return "one of " + ", ".join(self.module.label_names)

    @property
    def _without_emotions(self) -> str:
        return f"{type(self.module).__name__} takes no emotion: there is nothing to choose."

    def _emotion(self, rest: str) -> str:
        module = self.module
        if not module.takes_emotions:
            return self._without_emotions
        if not rest:
            now = "chosen by the model" if self._forced is None else "set by you"
            now = now if module.chooses_emotions or self._forced is not None else "not set yet"
            return "\n".join([f"The emotion is {now}. Type /emotion with {self._names}.", *self._mixture()])
        if self._label(rest) is None and rest.lower() == "auto":
            if not module.chooses_emotions:
                return f"{type(module).__name__} does not choose: type /emotion with {self._names}."
            self._forced = None
            return "The model chooses the emotion."
        try:
            self._forced = self._parsed(rest)
        except ValueError as error:
            return str(error)
        return "\n".join(["Replies have this emotion from now on:", *self._mixture()])

    def _mixture(self) -> list[str]:
        return [] if self._forced is None else self._bars(self._forced)[1:]

    def _label(self, name: str) -> int | None:
        """Class of a name in any case."""
        lowered = [known.lower() for known in self.module.label_names]
        return lowered.index(name.lower()) if name.lower() in lowered else None

    def _parsed(self, text: str) -> Tensor:
        """The distribution of "joy" or "joy=0.7 anger=0.3"."""
        label = self._label(text)
        shares = torch.zeros(self.module.num_emotions)
        if label is not None:
            shares[label] = 1.0
            return shares
        auto = ", or auto" if self.module.chooses_emotions else ""
        if "=" not in text:
            raise ValueError(f"There is no emotion {text!r}: type {self._names}{auto}.")
        for part in re.findall(r"[^=]+=\s*\S*|.+", text):
            name, equals, number = part.strip(" ,").partition("=")
            label = self._label(name.strip())
            if label is None or not equals:
                raise ValueError(f"There is no emotion {name.strip()!r}: type {self._names}{auto}.")
            share = _number(number)
            if share is None or not 0 <= share <= 1:
                raise ValueError(f"A share must be a number from 0 to 1, as in {name.strip()}=0.7, got {part.strip()}.")
            shares[label] = share
        if not bool(shares.any()):
            raise ValueError("A mixture needs a share above 0.")
        # Of a softmax the model has only ever seen shares of 1; of a sigmoid each emotion stands for itself.
        return shares / shares.sum() if self.module.emotion_head == "softmax" else shares

    # Decoding.

    def _greedy(self, rest: str) -> str:
        self._options = {"num_return": 1, "decoding": "greedy"}
        return "Replies are made of the likeliest word at each step."

    def _beam(self, rest: str) -> str:
        size = _number(rest or "5")
        if size is None or not size.is_integer() or not 1 <= size <= _MOST_HYPOTHESES:
            return f"/beam takes a whole number from 1 to {_MOST_HYPOTHESES}, as in /beam 5, got {rest!r}."
        self._options = {"num_return": 1, "decoding": "beam", "beam_size": int(size)}
        return f"Replies are the best of a search with {int(size)} hypotheses."

    def _sample(self, rest: str) -> str:
        temperature = _number(rest or "1")
        if temperature is None or not temperature > 0:
            return f"/sample takes a temperature above 0, as in /sample 0.8, got {rest!r}."
        self._options = {"num_return": 1, "decoding": "sample", "temperature": temperature}
        return f"Replies are drawn at the temperature {temperature:g}."

    def _context(self, rest: str) -> str:
        self._with_context = not self._with_context
        self._turns = []
        if self._with_context:
            words = self.max_post_length
            return f"From now on the post is all turns so far, yours and the model's (their last {words} words)."
        return "Each post stands alone."

    def _quit(self, rest: str) -> str:
        self.done = True
        return "Goodbye."


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def load_model(path: str, name: str | None = None) -> DialogueModule:
    """The model of a checkpoint.

    Args:
        path: A checkpoint of a model that replies.
        name: Its class, for a checkpoint that does not say; EACM by default.

    Raises:
        ValueError: If there is no such file, it is of another class, or of no model that replies.
    """
    checkpoint = load_run_checkpoint(path, resume=False)
    listed = ", ".join(MODELS)
    path_of_class = str(checkpoint.get("hyper_parameters", {}).get("_class_path", ""))
    found = checkpoint.get("dialogue_model") or path_of_class.rpartition(".")[2] or None
    if found is not None and name is not None and found != name:
        raise ValueError(f"{path} is a checkpoint of {found}, not of {name}: leave --model out")
    name = found or name or "EACM"
    if name not in MODELS:
        raise ValueError(f"{path} is a checkpoint of {name}, which does not reply; expected one of {listed}")
    kind: type[DialogueModule] = getattr(import_module(MODELS[name]), name)
    try:
        return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (RuntimeError, TypeError) as error:
        what = weights_mismatch(error)
        if what is None and isinstance(error, RuntimeError):
            raise
        raise ValueError(
            f"{path} is no checkpoint of {name} ({what or error}); say of which model with --model, one of {listed}"
        ) from error


def _lines() -> Iterator[str]:
    """What the user types, or the lines of the input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"> {line.rstrip()}")
            yield line
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def main(argv: Sequence[str] | None = None) -> None:
    """Talk to a model until `/quit` or the end of input.

    Args:
        argv: What follows `python -m zoo.eacm.chat`; `sys.argv` by default.

    Raises:
        SystemExit: With status 2 after a mistake in the arguments, which is explained on stderr in one paragraph.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(
        "python -m zoo.eacm.chat", description=_DESCRIPTION, formatter_class=layout, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="best.ckpt of a run of a model that replies"
    )
    parser.add_argument(
        "--model", choices=sorted(MODELS), help="its class, for a checkpoint that does not say; EACM by default"
    )
    parser.add_argument(
        "--max-post-length", type=int, default=30, metavar="N",
        help="most words of a post, the last ones are kept; as in the data of the training (30)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    with parser.explaining():
        chat = Chat(load_model(options.checkpoint, options.model), options.max_post_length)
        print(chat.greeting)
        for line in _lines():
            print(chat.respond(line))
            if chat.done:
                return


if __name__ == "__main__":
    main()
