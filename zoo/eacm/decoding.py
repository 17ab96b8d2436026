"""Replies from a model that gives words one step at a time: greedy, by beam search, or drawn; many posts at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.common.keyed_random import keyed_uniform, mix_keys
from zoo.eacm.beam import Replies, Rules, State, StepModel, search, take_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["METHODS", "Replies", "State", "StepModel", "decode"]

METHODS = ("greedy", "beam", "sample")
"""Ways to choose words."""
MAX_PENALTY = 10.0
"""Largest length penalty of either sign."""


@torch.no_grad()
def decode(
    model: StepModel,
    state: State,
    *,
    go_id: int,
    eos_id: int,
    banned: Sequence[int],
    max_length: int,
    method: str = "greedy",
    beam_size: int = 1,
    num_return: int = 1,
    length_penalty: float = 0.0,
    no_repeat_ngram: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    keys: Tensor | None = None,
) -> Replies:
    """Replies to posts, all at once; what has ended leaves the batch.

    The reply to a post does not depend on the posts around it. Beam search with one hypothesis is greedy decoding. A
    reply of `max_length` words without EOS is taken as it is.

    Args:
        model: Gives the words.
        state: The model's state before the first word, `(posts, ...)` each; it is not written to.
        go_id: What every reply is begun with.
        eos_id: The end of a reply.
        banned: Words that are never said (PAD, UNK, GO).
        max_length: Most words of a reply, EOS counted.
        method: "greedy" (the likeliest word each time), "beam" (see `search`) or "sample" (words are drawn).
        beam_size: Hypotheses of each post ("beam").
        num_return: Replies of each post: the best, best first ("beam"), or independent draws ("sample").
        length_penalty: Scores are log-probabilities over `length ** length_penalty`, EOS counted: 0 for their sum,
            above 0 for longer replies in beam search.
        no_repeat_ngram: No reply has the same run of so many words twice; 0 for no such rule.
        temperature: Log-probabilities are divided by it before words are drawn.
        top_k: Words are drawn from so many likeliest; 0 for all.
        top_p: Words are drawn from the fewest likeliest (of the `top_k`) that have this probability together.
        generator: Seeds what is drawn, by one number from it; torch's own by default.
        keys: int64 `(posts,)`: what is drawn for a post depends on the seed and its key alone; by default its row.

    Returns:
        The replies; those of "sample" in the order drawn.

    Raises:
        ValueError: If an argument is out of its range, the state has no tensor or differs in its number of posts, the
            logits do not fit or are not numbers, or no word is left to say.

    Example:
        >>> class Counting:
        ...     def step(self, tokens, state):
        ...         return torch.nn.functional.one_hot(tokens + 1, 8).float(), state
        >>> state = {"posts": torch.zeros(1)}
        >>> decode(Counting(), state, go_id=3, eos_id=7, banned=(0, 1, 3), max_length=9).tokens.tolist()
        [[[4, 5, 6, 7]]]
    """
    posts = _num_posts(state)
    _check(method, beam_size, num_return, max_length, length_penalty, no_repeat_ngram)
    if min((go_id, eos_id, *banned)) < 0 or eos_id in banned:
        raise ValueError(
            f"go_id, eos_id and banned must be ids from 0, EOS not banned: got {go_id}, {eos_id}, {banned}"
        )
    rules = Rules(go_id, eos_id, tuple(banned), max_length, no_repeat_ngram, length_penalty)
    device = next(iter(state.values())).device
    if method == "sample":
        _check_draw(temperature, top_k, top_p)
        if keys is None:
            keys = torch.arange(posts, device=device)
        elif keys.shape != (posts,) or keys.dtype != torch.int64:
            raise ValueError(f"keys must be int64 ({posts},), got {keys.dtype} {tuple(keys.shape)}")
    if posts == 0:
        empty = torch.zeros(0, num_return, device=device)
        return Replies(torch.zeros(0, num_return, 0, dtype=torch.int64, device=device), empty.long(), empty, empty)
    if method == "beam":
        replies = search(model, state, posts, rules, beam_size, num_return)
    elif method == "greedy":
        replies = _one_by_one(model, state, posts, rules, lambda log_probs, rows, step: log_probs.argmax(1))
    else:
        assert keys is not None
        source = None if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=source))
        draws = mix_keys(seed, keys[:, None], torch.arange(num_return, device=device)).flatten()
        if num_return > 1:
            state = take_rows(state, torch.arange(posts, device=device).repeat_interleave(num_return))

        def choose(log_probs: Tensor, rows: Tensor, step: int) -> Tensor:
            return draw(log_probs, keyed_uniform(draws[rows], step), temperature, top_k, top_p)

        replies = _one_by_one(model, state, len(draws), rules, choose)
        replies = Replies(*(part.view(posts, num_return, *part.shape[2:]) for part in replies))
    longest = min(int(replies.lengths.max()) + 1, max_length)
    return replies._replace(tokens=replies.tokens[..., :longest])


def draw(log_probs: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """A word for each row, where the distribution function passes a uniform number.

    Args:
        log_probs: `(rows, vocab_size)`, -inf for words that are never drawn; they need not be normalised.
        uniform: `(rows,)`, in [0, 1).
        temperature: See `decode`.
        top_k: See `decode`.
        top_p: See `decode`.

    Returns:
        int64 `(rows,)`.

    Raises:
        ValueError: If a row has no word to draw, or is not made of numbers.
    """
    # float32 sums lose the words whose probability is below 6e-8.
    weights = log_probs.double() / temperature
    words = None
    if top_k or top_p < 1:
        weights, words = weights.topk(min(top_k or weights.shape[1], weights.shape[1]))
    shares = weights.softmax(1)
    if top_p < 1:
        shares = shares.masked_fill(shares.cumsum(1) - shares >= top_p, 0)
    below = shares.cumsum(1)
    total = below[:, -1:]
    if bool(total.isnan().any()):
        raise ValueError("no word to draw: the model's logits are not numbers, or all words are forbidden")
    # Below the total: the sum passes it at a word of probability above 0, whatever is rounded.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(below, target, right=True)
    return (place if words is None else words.gather(1, place)).squeeze(1)


def _one_by_one(
    model: StepModel, state: State, count: int, rules: Rules, choose: Callable[[Tensor, Tensor, int], Tensor]
) -> Replies:
    """One reply for each row of the state; `choose` takes log-probabilities, their rows and the step."""
    device = next(iter(state.values())).device
    tokens = torch.zeros(count, rules.max_length, dtype=torch.int64, device=device)
    lengths = torch.full((count,), rules.max_length, device=device)
    sums = torch.zeros(count, device=device)
    rows = torch.arange(count, device=device)
    words = torch.full((count,), rules.go_id, device=device)
    for step in range(rules.max_length):
        logits, state = model.step(words, state)
        log_probs = rules.next_log_probs(logits, tokens[rows, :step])
        words = choose(log_probs, rows, step)
        chosen = log_probs.gather(1, words[:, None]).squeeze(1)
        if not bool(chosen.isfinite().all()):
            raise ValueError("no word to say: the model's logits are not numbers, or all words are forbidden")
        tokens[rows, step] = words
        sums[rows] += chosen
        ended = words == rules.eos_id
        if bool(ended.any()):
            lengths[rows[ended]] = step
            going = (~ended).nonzero().squeeze(1)
            if not len(going):
                break
            rows, words, state = rows[going], words[going], take_rows(state, going)
    scores = sums / (lengths + 1).clamp(max=rules.max_length).float() ** rules.length_penalty
    return Replies(tokens[:, None], lengths[:, None], scores[:, None], sums[:, None])


def _num_posts(state: State) -> int:
    sizes = {name: value.shape[0] if value.ndim else None for name, value in state.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ValueError(f"state must have tensors of one number of posts in their first dimension, got {sizes}")
    return next(iter(state.values())).shape[0]


def _check(
    method: str, beam_size: int, num_return: int, max_length: int, length_penalty: float, no_repeat_ngram: int
) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, value, low in (
        ("beam_size", beam_size, 1),
        ("num_return", num_return, 1),
        ("max_length", max_length, 1),
        ("no_repeat_ngram", no_repeat_ngram, 0),
    ):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if method != "beam" and beam_size != 1:
        raise ValueError(f"beam_size must be 1 where method is {method!r}, got {beam_size}: use method='beam'")
    most = {"greedy": 1, "beam": beam_size}.get(method, num_return)
    if num_return > most:
        raise ValueError(
            f"num_return must be at most {most} ({'beam_size' if method == 'beam' else 'greedy gives one reply'}), got "
            f"{num_return}"
        )
    if not abs(length_penalty) <= MAX_PENALTY:
        raise ValueError(f"length_penalty must be from {-MAX_PENALTY} to {MAX_PENALTY}, got {length_penalty}")


def _check_draw(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
