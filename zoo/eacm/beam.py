"""Beam search over many posts at once, for any model that gives words one step at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

State: TypeAlias = dict[str, Tensor]
"""What a model remembers of hypotheses: tensors whose first dimension is the hypotheses."""

GROUP = 64
"""Columns of a group of which `best_columns` first looks at the largest only."""


class StepModel(Protocol):
    """A model that says one word after the other."""

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One word on.

        What stays as it is should be handed back as the same tensor: such tensors are not copied when hypotheses change
        places.

        Args:
            tokens: int64 `(hypotheses,)`, the last words.
            state: What came before them.

        Returns:
            Logits `(hypotheses, vocab_size)` of the words after `tokens`, and the new state.
        """


class Replies(NamedTuple):
    """Replies of a model, in ids.

    Attributes:
        tokens: int64 `(posts, replies, length)`: words, EOS where the reply ended, then 0.
        lengths: int64 `(posts, replies)`, words without EOS.
        scores: float32 `(posts, replies)`: `log_probs / n ** length_penalty`, n the words and EOS.
        log_probs: float32 `(posts, replies)`, the model's log-probability of words and EOS: minus the teacher-forced
            negative log-likelihood. Where a post has fewer replies than were asked for, scores and log_probs are -inf
            and the reply is empty.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    log_probs: Tensor


class Rules(NamedTuple):
    """What may be said.

    Attributes:
        go_id: What every reply is begun with; not part of it.
        eos_id: The end of a reply.
        banned: Words that are never said.
        max_length: Most words of a reply, EOS counted.
        no_repeat_ngram: No reply has the same run of so many words twice; 0 for no such rule.
        length_penalty: See `Replies`.
    """

    go_id: int
    eos_id: int
    banned: tuple[int, ...]
    max_length: int
    no_repeat_ngram: int
    length_penalty: float

    def next_log_probs(self, logits: Tensor, said: Tensor) -> Tensor:
        """Log-probabilities of next words, -inf for those that the rules forbid.

        They are the model's own, not scaled up for what is forbidden: sums stay comparable with likelihoods.

        Args:
            logits: `(hypotheses, vocab_size)`.
            said: int64 `(hypotheses, length)`, the words so far.

        Returns:
            float32 `(hypotheses, vocab_size)`, a new tensor.

        Raises:
            ValueError: If the logits do not fit the hypotheses or the special words.
        """
        highest = max((self.eos_id, *self.banned))
        if logits.ndim != 2 or len(logits) != len(said) or logits.shape[1] <= highest:
            raise ValueError(
                f"the model's logits must be ({len(said)}, vocab_size) with vocab_size above {highest}, the highest id "
                f"of EOS and the banned words, got {tuple(logits.shape)}"
            )
        log_probs = logits.float().log_softmax(-1)
        log_probs.index_fill_(1, torch.tensor(self.banned, dtype=torch.int64, device=logits.device), -torch.inf)
        size, length = self.no_repeat_ngram, said.shape[1]
        starts = length - size + 1
        if size and starts > 0:
            repeats = torch.ones(len(said), starts, dtype=torch.bool, device=said.device)
            for place in range(size - 1):
                repeats &= said[:, place : place + starts] == said[:, starts + place, None]
            # Added rather than set: a word that follows several runs must stay forbidden if one of them is the last.
            log_probs.scatter_add_(
                1, said[:, size - 1 :], torch.zeros(repeats.shape).to(log_probs).masked_fill_(repeats, -torch.inf)
            )
        return log_probs


def best_columns(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row and their columns: `topk`, faster on long rows.

    The `count` largest values lie in the `count` groups of columns with the largest maxima.

    Args:
        values: `(rows, columns)`.
        count: At most the number of columns.

    Returns:
        Values, largest first, and int64 columns: `(rows, count)` twice.
    """
    rows, columns = values.shape
    groups = columns // GROUP
    if groups <= 4 * count:
        largest: tuple[Tensor, Tensor] = values.topk(count)
        return largest
    # Groups of neighbours: the maximum over the last dimension is several times faster than over another.
    grouped = values[:, : groups * GROUP].view(rows, groups, GROUP)
    chosen = grouped.amax(2).topk(count).indices[..., None].expand(rows, count, GROUP)
    place = torch.arange(GROUP, device=values.device)
    rest = torch.arange(groups * GROUP, columns, device=values.device).expand(rows, -1)
    candidates = torch.cat((grouped.gather(1, chosen).flatten(1), values[:, groups * GROUP :]), 1)
    best, index = candidates.topk(count)
    return best, torch.cat(((chosen * GROUP + place).flatten(1), rest), 1).gather(1, index)


def take_rows(state: State, rows: Tensor, leave: AbstractSet[str] = frozenset()) -> State:
    """Rows of a state, in a given order, but of the tensors named in `leave`."""
    return {name: value if name in leave else value.index_select(0, rows) for name, value in state.items()}


class _Kept:
    """The best replies that each post has so far."""

    def __init__(self, posts: int, count: int, max_length: int, device: torch.device) -> None:
        self.scores = torch.full((posts, count), -torch.inf, device=device)
        self.log_probs = torch.full((posts, count), -torch.inf, device=device)
        self.lengths = torch.zeros(posts, count, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(posts, count, max_length, dtype=torch.int64, device=device)

    def offer(self, posts: Tensor, tokens: Tensor, lengths: Tensor, log_probs: Tensor, divisor: float) -> None:
        """Keep what is better than the worst: `(posts, hypotheses, ...)` for rows `posts`, -inf for no reply."""
        scores = torch.cat((self.scores[posts], log_probs / divisor), 1)
        scores, place = scores.topk(self.scores.shape[1])
        self.scores[posts] = scores
        self.log_probs[posts] = torch.cat((self.log_probs[posts], log_probs), 1).gather(1, place)
        self.lengths[posts] = torch.cat((self.lengths[posts], lengths), 1).gather(1, place)
        place = place[..., None].expand(-1, -1, tokens.shape[2])
        self.tokens[posts] = torch.cat((self.tokens[posts], tokens), 1).gather(1, place)

    def replies(self) -> Replies:
        """All of them; hypotheses that were none are empty."""
        none = self.scores == -torch.inf
        return Replies(
            self.tokens.masked_fill(none[..., None], 0), self.lengths.masked_fill(none, 0), self.scores, self.log_probs
        )


def search(model: StepModel, state: State, posts: int, rules: Rules, beam_size: int, num_return: int) -> Replies:
    """Beam search.

    At each step the `beam_size` best continuations of a post's hypotheses are taken; those that end in EOS are
    collected and the others go on. A post is done, and leaves the batch, when none of its hypotheses can still beat the
    worst of the `num_return` best replies: sums of log-probabilities only fall, so a hypothesis of sum s reaches at
    most `s / n ** length_penalty`, n the shortest or the longest length that it may still end with.

    Args:
        model: Gives the words.
        state: `(posts, ...)` each, before the first word.
        posts: Number of posts, at least 1.
        rules: What may be said.
        beam_size: Hypotheses of each post.
        num_return: Replies of each post, at most `beam_size`.

    Raises:
        ValueError: If logits are not numbers, or a post has no reply whose probability is above 0.
    """
    device = next(iter(state.values())).device
    kept = _Kept(posts, num_return, rules.max_length, device)
    active = torch.arange(posts, device=device)
    words = torch.full((posts, 1), rules.go_id, device=device)
    said = torch.zeros(posts, 1, rules.max_length, dtype=torch.int64, device=device)
    sums = torch.zeros(posts, 1, device=device)
    # Tensors that no step has changed are the same in all hypotheses of a post.
    constant = set(state)
    for step in range(rules.max_length):
        count, width = words.shape
        logits, new = model.step(words.flatten(), state)
        constant &= {name for name, value in new.items() if value is state.get(name)}
        totals = rules.next_log_probs(logits, said[..., :step].flatten(0, 1))
        vocab_size = totals.shape[1]
        totals.view(count, width, -1).add_(sums[..., None])
        sums, columns = best_columns(totals.view(count, -1), min(beam_size, width * vocab_size))
        if bool(sums.isnan().any()):
            raise ValueError("the model's logits are not all numbers")
        parents = columns // vocab_size
        words = columns - parents * vocab_size
        said = said.gather(1, parents[..., None].expand(-1, -1, rules.max_length))
        said[..., step] = words
        ended = words == rules.eos_id
        last = step + 1 == rules.max_length
        if last or bool(ended.any()):
            closed = sums if last else sums.masked_fill(~ended, -torch.inf)
            divisor = (step + 1.0) ** rules.length_penalty
            kept.offer(active, said, step + 1 - ended.long(), closed, divisor)
        if last:
            break
        sums = sums.masked_fill(ended, -torch.inf)
        reach = max((step + 2.0) ** rules.length_penalty, float(rules.max_length) ** rules.length_penalty)
        going = (sums.amax(1) / reach > kept.scores[active, -1]).nonzero().squeeze(1)
        if not len(going):
            break
        rows = parents + width * torch.arange(count, device=device)[:, None]
        fewer = len(going) < count
        if fewer:
            active, words, said, sums, rows = (part[going] for part in (active, words, said, sums, rows))
        rows = rows.flatten()
        if fewer or words.shape[1] != width:
            state = take_rows(new, rows)
        elif torch.equal(rows, torch.arange(len(rows), device=device)):
            state = new
        else:
            state = take_rows(new, rows, leave=constant)
    replies = kept.replies()
    if bool((replies.scores[:, 0] == -torch.inf).any()):
        raise ValueError("a post has no reply whose probability is above 0: all words are banned or of logit -inf")
    return replies
