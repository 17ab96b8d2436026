"""A defence that lets a language model on this machine write titles anew."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from zoo.common.pretrained import load_pretrained, transformers_library

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

DEFENSE_PROMPT = (
    "Correct the grammar, spelling and word substitution errors in the following product title. Answer with the "
    "corrected title only.\nTitle: {title}\nCorrected title:"
)


class LMRewriteDefense:
    """Titles rewritten by a language model, greedily; a title keeps its text if what comes out cannot be its repair.

    The first line of the answer is taken, without quotes around it. If it is empty or longer than twice the title, the
    title stays. Answers are remembered; the network is loaded at the first title.

    Args:
        model: A folder of `save_pretrained` with its tokenizer, or a hub id; a decoder, or an encoder with a decoder.
        prompt: Text around the title, with `{title}` once.
        max_new_tokens: Longest answer in tokens.
        batch_size: Titles written at once.

    Raises:
        ValueError: If the prompt does not have `{title}` once, or a number is below 1.
    """

    def __init__(
        self, model: str | Path, prompt: str = DEFENSE_PROMPT, max_new_tokens: int = 48, batch_size: int = 32
    ) -> None:
        if prompt.count("{title}") != 1:
            raise ValueError(f"prompt must hold {{title}} once, got {prompt!r}")
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
        self.model, self.prompt = model, prompt
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.num_kept = 0
        self._rewritten: dict[str, str] = {}
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, titles: list[str]) -> list[str]:
        """Rewrite titles.

        Args:
            titles: Titles.

        Returns:
            As many titles.

        Raises:
            FileNotFoundError: If the network is neither in a folder nor on the hub.
        """
        # Of like lengths together, so that little is padding.
        new = sorted({title for title in titles if title not in self._rewritten}, key=lambda title: (len(title), title))
        kept = 0
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            for title, answer in zip(part, self._answers(part), strict=True):
                rewritten = _first_line(answer)
                usable = bool(rewritten) and len(rewritten) <= 2 * len(title)
                kept += not usable
                self._rewritten[title] = rewritten if usable else title
        if kept:
            self.num_kept += kept
            _log.info("%d of %d titles keep their text: the answer was empty or too long", kept, len(new))
        return [self._rewritten[title] for title in titles]

    def _answers(self, titles: list[str]) -> list[str]:
        network, tokenizer = self._networks()
        before, after = self.prompt.split("{title}")
        batch = tokenizer([before + title + after for title in titles], return_tensors="pt", padding=True)
        width = batch["input_ids"].shape[1]
        with torch.inference_mode():
            written = network.generate(
                input_ids=batch["input_ids"].to(network.device),
                attention_mask=batch["attention_mask"].to(network.device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=tokenizer.pad_token_id,
            )
        if not network.config.is_encoder_decoder:
            written = written[:, width:]
        answers: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
        return answers

    def _networks(self) -> tuple[Any, Any]:
        if self._loaded is None:
            transformers = transformers_library()
            config = load_pretrained(self.model, transformers.AutoConfig)
            loader = (
                transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
            )
            network = load_pretrained(self.model, loader)
            # A decoder goes on where the text ends, so the padding must stand before it.
            side = "right" if config.is_encoder_decoder else "left"
            tokenizer = load_pretrained(self.model, transformers.AutoTokenizer, padding_side=side)
            if tokenizer.pad_token_id is None:
                if tokenizer.eos_token_id is None:
                    raise ValueError(f"the tokenizer of {self.model} has neither a padding nor an end token")
                tokenizer.pad_token_id = tokenizer.eos_token_id
            self._loaded = (network, tokenizer)
        return self._loaded


def _first_line(answer: str) -> str:
    """The first line of an answer that says something, without quotes around it."""
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'":
        line = line[1:-1].strip()
    return line
