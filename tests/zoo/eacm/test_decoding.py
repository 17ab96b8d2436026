"""Decoding: against exhaustive search, plain beam and greedy searches, and the distributions that it draws from."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.common.keyed_random import keyed_uniform, mix_keys
from zoo.eacm.beam import GROUP, best_columns
from zoo.eacm.decoding import Replies, State, decode, draw

PAD, UNK, EOS, GO = range(4)
SPECIAL = {"go_id": GO, "eos_id": EOS, "banned": (PAD, UNK, GO)}
NOT_CHANGED = ("post", "memory")


class Stub:
    """Logits are a random function of the post and of all words so far; its state must agree with itself."""

    def __init__(self, vocab_size: int, eos: float = 0.0, scale: float = 4.0) -> None:
        self.vocab_size, self.eos, self.scale = vocab_size, eos, scale
        self.rows: list[int] = []
        self.states: list[State] = []

    def logits(self, post: Tensor, history: Tensor) -> Tensor:
        code = mix_keys(post, *history.unbind(1))
        values = keyed_uniform(code[:, None], torch.arange(self.vocab_size)) * self.scale
        # The words that may not be said are the likeliest, as UNK is for a model of a small vocabulary.
        values[:, [PAD, UNK, GO]] += 1.0
        values[:, EOS] += self.eos
        return values.float()

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        self.rows.append(len(tokens))
        self.states.append(state)
        history = torch.cat((state["history"], tokens[:, None]), 1)
        assert (history[:, 0] == GO).all()
        assert torch.equal(state["twice"].flatten(1), 2 * state["history"].repeat(1, 3)), "tensors took different rows"
        assert torch.equal(state["memory"][:, 0, 0], state["post"].float())
        assert torch.equal(state["own"], state["post"]), "what stays the same took rows of another post"
        twice = (2 * history).repeat(1, 3).view(len(tokens), 3, -1)
        new = {"history": history, "twice": twice, "own": state["own"] + 0}
        return self.logits(state["post"], history), {**state, **new}


def first_state(posts: list[int]) -> State:
    post = torch.tensor(posts)
    return {
        "post": post,
        "history": torch.zeros(len(post), 0, dtype=torch.int64),
        "twice": torch.zeros(len(post), 3, 0, dtype=torch.int64),
        "memory": post.float()[:, None, None].repeat(1, 2, 5),
        "own": post.clone(),
    }


def run(model: Stub, posts: list[int], **options: Any) -> Replies:
    return decode(model, first_state(posts), **SPECIAL, **options)


def said(replies: Replies, post: int = 0) -> list[list[int]]:
    """Replies to a post as they were said: with EOS, without padding."""
    rows = replies.tokens[post].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def follow(model: Stub, post: int, words: list[int], size: int = 0) -> list[float]:
    """Log-probabilities of next words after `words`, one call of the model at a time; -inf for forbidden ones."""
    logits = model.logits(torch.tensor([post]), torch.tensor([[GO, *words]])).double()
    values: list[float] = logits.log_softmax(1)[0].tolist()
    for word in range(model.vocab_size):
        whole = [*words, word]
        grams = [tuple(whole[place : place + size]) for place in range(len(whole) - size + 1)] if size else []
        if word in (PAD, UNK, GO) or (grams[-1:] and grams[-1] in grams[:-1]):
            values[word] = -math.inf
    return values


def rescore(model: Stub, post: int, words: list[int]) -> float:
    return sum(follow(model, post, words[:place])[word] for place, word in enumerate(words))


def exhaustive(model: Stub, post: int, max_length: int, penalty: float, size: int = 0) -> list[tuple[float, list[int]]]:
    """All replies by falling score."""
    found = []
    open_ = [(0.0, list[int]())]
    for length in range(1, max_length + 1):
        longer = []
        for total, words in open_:
            for word, value in enumerate(follow(model, post, words, size)):
                if value > -math.inf:
                    row = (total + value, [*words, word])
                    (found if word == EOS or length == max_length else longer).append(row)
        open_ = longer
    return sorted(((total / len(words) ** penalty, words) for total, words in found), reverse=True)


def plain_beam(
    model: Stub, post: int, max_length: int, beam: int, penalty: float, size: int = 0
) -> list[tuple[float, list[int]]]:
    """Beam search of one post, hypothesis by hypothesis, to the end."""
    found = []
    open_ = [(0.0, list[int]())]
    for length in range(1, max_length + 1):
        rows = [
            (total + value, [*words, word])
            for total, words in open_
            for word, value in enumerate(follow(model, post, words, size))
            if value > -math.inf
        ]
        best = sorted(rows, reverse=True)[:beam]
        found += [row for row in best if row[1][-1] == EOS or length == max_length]
        open_ = [row for row in best if row[1][-1] != EOS]
    return sorted(((total / len(words) ** penalty, words) for total, words in found), reverse=True)


def plain_greedy(model: Stub, post: int, max_length: int, size: int = 0) -> list[int]:
    words: list[int] = []
    while len(words) < max_length and words[-1:] != [EOS]:
        values = follow(model, post, words, size)
        words.append(values.index(max(values)))
    return words


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_greedy_decoding_is_a_plain_loop_over_the_likeliest_words(size: int) -> None:
    model = Stub(9, eos=-2.0)
    posts = list(range(20))
    replies = run(model, posts, max_length=9, no_repeat_ngram=size)
    for post in posts:
        assert said(replies, post) == [plain_greedy(model, post, 9, size)]


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("size", [0, 2])
def test_beam_search_of_one_hypothesis_is_greedy(penalty: float, size: int) -> None:
    model = Stub(9)
    options = {"max_length": 8, "length_penalty": penalty, "no_repeat_ngram": size}
    greedy = run(model, list(range(40)), **options)
    beam = run(model, list(range(40)), method="beam", beam_size=1, **options)
    assert torch.equal(greedy.tokens, beam.tokens) and torch.equal(greedy.lengths, beam.lengths)
    torch.testing.assert_close(greedy.scores, beam.scores)
    torch.testing.assert_close(greedy.log_probs, beam.log_probs)
    # Some replies end by themselves and some do not.
    assert 0 < int((greedy.lengths == 8).sum()) < 40


@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0, -1.0])
@pytest.mark.parametrize("size", [0, 2])
def test_a_beam_of_full_width_is_exhaustive_search(penalty: float, size: int) -> None:
    model = Stub(7, eos=0.5)
    posts = list(range(6))
    replies = run(
        model, posts, max_length=4, method="beam", beam_size=400, num_return=7, length_penalty=penalty,
        no_repeat_ngram=size,
    )  # fmt: skip
    for post in posts:
        expected = exhaustive(model, post, 4, penalty, size)[:7]
        assert said(replies, post) == [words for _, words in expected]
        assert replies.scores[post].tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)


@pytest.mark.parametrize("beam", [2, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 0.7, 2.0, -1.0])
@pytest.mark.parametrize("size", [0, 2])
def test_beam_search_is_a_plain_one_of_each_post_that_goes_to_the_end(beam: int, penalty: float, size: int) -> None:
    model = Stub(9)
    posts = list(range(16))
    replies = run(
        model, posts, max_length=6, method="beam", beam_size=beam, num_return=2, length_penalty=penalty,
        no_repeat_ngram=size,
    )  # fmt: skip
    for post in posts:
        expected = plain_beam(model, post, 6, beam, penalty, size)[:2]
        assert said(replies, post) == [words for _, words in expected]
        assert replies.scores[post].tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_beams_score_at_least_what_greedy_does_and_at_most_what_exhaustive_search_does() -> None:
    model = Stub(7)
    posts = list(range(30))
    greedy = run(model, posts, max_length=4)
    best = torch.tensor([[exhaustive(model, post, 4, 0.0)[0][0]] for post in posts])
    wide = run(model, posts, max_length=4, method="beam", beam_size=64)
    narrow = run(model, posts, max_length=4, method="beam", beam_size=3)
    assert (wide.scores >= greedy.scores - 1e-6).all() and bool((wide.scores > greedy.scores + 0.1).any())
    assert (narrow.scores <= best + 1e-5).all()
    assert greedy.scores.mean() + 0.05 < narrow.scores.mean()


@pytest.mark.parametrize("options", [{}, {"method": "beam", "beam_size": 4, "num_return": 4}, {"method": "sample"}])
def test_scores_are_the_likelihoods_of_what_was_said(options: dict[str, Any]) -> None:
    model = Stub(8)
    options = {"max_length": 6, "length_penalty": 0.8, "temperature": 0.5, **options}
    replies = run(model, list(range(12)), generator=torch.Generator().manual_seed(0), **options)
    for post in range(12):
        for place, words in enumerate(said(replies, post)):
            total = rescore(model, post, words)
            assert float(replies.log_probs[post, place]) == pytest.approx(total, abs=1e-5)
            assert float(replies.scores[post, place]) == pytest.approx(total / len(words) ** 0.8, abs=1e-5)
            assert int(replies.lengths[post, place]) == len(words) - (words[-1] == EOS)
            assert not replies.tokens[post, place, len(words) :].any()
    ended = (replies.tokens == EOS).any(2)
    assert 0 < int(ended.sum()) < ended.numel()
    assert (replies.scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"method": "beam", "beam_size": 5, "num_return": 5}, {"method": "sample", "num_return": 5}]
)
def test_pad_unk_and_go_are_never_said_although_likeliest(options: dict[str, Any]) -> None:
    replies = run(Stub(12, eos=-3.0), list(range(30)), max_length=7, **options)
    within = torch.arange(replies.tokens.shape[2]) < replies.lengths[..., None]
    words = replies.tokens[within]
    assert words.numel() > 30
    assert not torch.isin(words, torch.tensor([PAD, UNK, EOS, GO])).any()
    assert replies.scores.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "beam", "beam_size": 4, "num_return": 3}, {"method": "sample", "num_return": 3, "top_k": 6}],
    ids=["greedy", "beam", "sample"],
)
def test_the_reply_to_a_post_does_not_depend_on_the_posts_around_it(options: dict[str, Any]) -> None:
    options = {"max_length": 9, "no_repeat_ngram": 2, "length_penalty": 0.5, **options}

    def replies_to(posts: list[int]) -> Replies:
        keys = torch.tensor(posts) + 100
        return run(Stub(10), posts, **options, keys=keys, generator=torch.Generator().manual_seed(3))

    posts = [5, 3, 8, 11, 2, 30, 31, 7]
    together = replies_to(posts)
    for place, post in enumerate(posts):
        alone = replies_to([post])
        assert said(alone) == said(together, place)
        assert torch.equal(alone.scores[0], together.scores[place])
        assert torch.equal(alone.lengths[0], together.lengths[place])
    assert len(set(together.lengths[:, 0].tolist())) > 2


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "beam", "beam_size": 4}, {"method": "sample", "num_return": 4}],
    ids=["greedy", "beam", "sample"],
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_run_of_words_is_said_twice(options: dict[str, Any], size: int) -> None:
    def repeats(**more: int) -> int:
        replies = run(Stub(7, eos=-50.0), list(range(20)), max_length=12, **options, **more)
        count = 0
        for post in range(20):
            for words in said(replies, post):
                grams = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
                count += len(grams) - len(set(grams))
        return count

    assert repeats() > 0
    assert repeats(no_repeat_ngram=size) == 0


def test_rows_of_posts_that_are_done_are_not_asked_for() -> None:
    posts = list(range(25))
    model = Stub(8)
    lengths = run(model, posts, max_length=8).lengths[:, 0]
    steps = (lengths + 1).clamp(max=8)
    assert model.rows == [int((steps > step).sum()) for step in range(int(steps.max()))]

    together, alone = Stub(8), Stub(8)
    for post in posts:
        run(alone, [post], max_length=8, method="beam", beam_size=3)
    run(together, posts, max_length=8, method="beam", beam_size=3)
    assert together.rows[:2] == [25, 51]  # Eight posts are done at once.
    assert sum(together.rows) == sum(alone.rows) < 25 * (1 + 3 * 7)


def test_beam_search_stops_as_soon_as_no_hypothesis_can_win() -> None:
    # The probability of an end is high: with the sum as score, what goes on is behind at once.
    short, long = Stub(8, eos=6.0), Stub(8, eos=6.0)
    run(short, [0, 1, 2], max_length=20, method="beam", beam_size=3)
    assert len(short.rows) == 1
    # A strong penalty may still lift what goes on.
    run(long, [0, 1, 2], max_length=20, method="beam", beam_size=3, length_penalty=5.0)
    assert len(long.rows) > 5


@pytest.mark.parametrize(
    ("penalty", "shares", "later", "expected"),
    [(1.0, (0.5, 0.1), (0.0, 1.0), [4] * 10), (-1.0, (0.1, 0.5), (1.0, 0.0), [4, EOS])],
    ids=["the longest may win", "the next end may win"],
)
def test_beam_search_goes_on_while_any_length_may_still_win(
    penalty: float, shares: tuple[float, float], later: tuple[float, float], expected: list[int]
) -> None:
    class Scripted:
        """EOS and word 4 with given probabilities first, and with others later; the rest is banned words."""

        def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
            end, word = shares if tokens[0] == GO else later
            row = torch.tensor([1 - end - word, 0.0, end, 0.0, word]).clamp(min=1e-9)
            return row.log().expand(len(tokens), 5), state

    options = {"max_length": 10, "method": "beam", "beam_size": 2, "length_penalty": penalty}
    replies = decode(Scripted(), {"post": torch.zeros(1)}, **SPECIAL, **options)
    assert said(replies) == [expected]


def test_what_a_model_never_changes_is_not_copied_when_hypotheses_change_places() -> None:
    model = Stub(9, eos=-50.0)
    run(model, [0, 1, 2], max_length=6, method="beam", beam_size=3)
    assert model.rows == [3, 9, 9, 9, 9, 9]
    for before, after in itertools.pairwise(model.states[1:]):
        assert all(before[name] is after[name] for name in NOT_CHANGED)


def test_a_tensor_that_is_changed_once_is_reordered_ever_after() -> None:
    class Late(Stub):
        """Remembers the second word from then on."""

        def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
            logits, new = super().step(tokens, {name: value for name, value in state.items() if name != "second"})
            second = tokens if new["history"].shape[1] == 3 else state["second"]
            if new["history"].shape[1] >= 3:
                assert torch.equal(second, new["history"][:, 2])
            return logits, {**new, "second": second}

    state = {**first_state([0, 1, 2, 3]), "second": torch.zeros(4, dtype=torch.int64)}
    decode(Late(12, eos=-50.0), state, **SPECIAL, max_length=8, method="beam", beam_size=4)


def test_the_first_state_is_left_as_it_was() -> None:
    state = first_state([0, 1, 2])
    before = {name: value.clone() for name, value in state.items()}
    for options in ({}, {"method": "beam", "beam_size": 3}, {"method": "sample", "num_return": 3}):
        decode(Stub(8), state, **SPECIAL, max_length=5, **options)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_post_without_enough_replies_has_empty_ones_of_score_minus_infinity() -> None:
    # Words EOS and 4, length 2: only [EOS], [4, EOS] and [4, 4].
    replies = run(Stub(5), [0, 1], max_length=2, method="beam", beam_size=8, num_return=5)
    assert sorted(said(replies)[:3]) == [[EOS], [4, EOS], [4, 4]]
    assert replies.scores[:, :3].isfinite().all()
    assert (replies.scores[:, 3:] == -torch.inf).all() and (replies.log_probs[:, 3:] == -torch.inf).all()
    assert not replies.tokens[:, 3:].any() and not replies.lengths[:, 3:].any()


def test_no_posts_have_no_replies() -> None:
    for method, beam in (("greedy", 1), ("beam", 2), ("sample", 1)):
        replies = run(Stub(6), [], max_length=4, method=method, beam_size=beam)
        assert replies.tokens.shape == (0, 1, 0) and replies.scores.shape == replies.lengths.shape == (0, 1)


def test_what_is_drawn_is_a_function_of_the_generators_seed() -> None:
    def drawn(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return run(Stub(20), [4, 4, 4], max_length=10, method="sample", num_return=2, generator=generator).tokens

    assert torch.equal(drawn(1), drawn(1))
    assert drawn(1).shape != drawn(2).shape or not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(5)
    first, second = drawn(None), drawn(None)
    torch.manual_seed(5)
    assert torch.equal(first, drawn(None))
    assert first.shape != second.shape or not torch.equal(first, second)
    # Equal posts in different rows, and the replies of one post, are drawn apart.
    assert len({tuple(row) for row in drawn(1).flatten(0, 1).tolist()}) == 6


def cut(probabilities: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that is drawn from, word by word."""
    shares = (probabilities.log() / temperature).exp()
    order = shares.argsort(descending=True).tolist()[: top_k or len(shares)]
    total = float(shares[order].sum())
    left, mass = torch.zeros_like(shares), 0.0
    for word in order:
        if mass < top_p:
            left[word] = shares[word]
        mass += float(shares[word]) / total
    return left / left.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 4, 0.8), (1.0, 50, 1.0)],
)
def test_words_are_drawn_from_the_distribution_that_was_asked_for(temperature: float, top_k: int, top_p: float) -> None:
    model = Stub(10, scale=2.0)
    replies = run(
        model, [7], max_length=1, method="sample", num_return=20_000, temperature=temperature, top_k=top_k,
        top_p=top_p, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected = cut(torch.tensor(follow(model, 7, [])).double().exp(), temperature, top_k, top_p)
    counts = replies.tokens.flatten().bincount(minlength=10)
    possible = expected > 0
    assert not counts[~possible].any()
    chi2 = (((counts - 20_000 * expected) ** 2)[possible] / (20_000 * expected[possible])).sum()
    # The 99.9 % point of chi-square with at most 6 degrees of freedom.
    assert float(chi2) < 22.5


def test_later_words_are_drawn_given_those_before_and_apart_from_them() -> None:
    model = Stub(6, scale=1.0)
    replies = run(
        model, [3], max_length=2, method="sample", num_return=20_000, generator=torch.Generator().manual_seed(0)
    )
    rows = [tuple(words) for words in said(replies)]
    raw = {tuple(words): math.exp(rescore(model, 3, words)) for _, words in exhaustive(model, 3, 2, 0.0)}
    first = {word: math.exp(follow(model, 3, [])[word]) for word in (EOS, 4, 5)}
    chi2 = 0.0
    for words, share in raw.items():
        share /= sum(first.values())
        if len(words) == 2:
            share /= sum(math.exp(value) for value in follow(model, 3, [words[0]]))
        chi2 += (rows.count(words) - 20_000 * share) ** 2 / (20_000 * share)
    assert len(raw) == 7 and chi2 < 22.5


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_no_rounding_draws_a_word_of_no_probability(uniform: float) -> None:
    log_probs = torch.full((4, 1000), -torch.inf)
    log_probs[:, 1:-1] = torch.randn(4, 998, generator=torch.Generator().manual_seed(0)) - 30
    words = draw(log_probs, torch.full((4,), uniform, dtype=torch.float64))
    assert words.tolist() == [1 if uniform == 0 else 998] * 4


def test_top_p_keeps_the_word_that_passes_it_and_always_the_likeliest() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.4]]).log().expand(1000, 3)
    uniform = torch.linspace(0, 1 - 1e-9, 1000).double()
    assert set(draw(log_probs, uniform, top_p=0.1).tolist()) == {1}
    assert set(draw(log_probs, uniform, top_p=0.51).tolist()) == {1, 2}
    assert set(draw(log_probs, uniform, top_p=0.91).tolist()) == {0, 1, 2}
    assert set(draw(log_probs, uniform, top_k=2).tolist()) == {1, 2}


@pytest.mark.parametrize("columns", [5, GROUP, 24 * GROUP, 24 * GROUP + 1, 50 * GROUP + 63])
def test_the_best_columns_are_those_of_topk(columns: int) -> None:
    values = torch.randn(6, columns, generator=torch.Generator().manual_seed(0))
    values[0, :-2] = -torch.inf
    values[1] = values[1].sort().values
    values[2] = values[2].sort(descending=True).values
    best, place = best_columns(values, 5)
    assert torch.equal(best, values.topk(5).values)
    assert torch.equal(values.gather(1, place), best)
    assert all(len(set(row)) == 5 for row in place.tolist())


def test_log_probabilities_are_float32_whatever_the_logits_are() -> None:
    class Half(Stub):
        def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
            logits, new = super().step(tokens, state)
            return logits.bfloat16(), new

    for method, beam in (("greedy", 1), ("beam", 2), ("sample", 1)):
        replies = decode(Half(8), first_state([1]), **SPECIAL, max_length=1, method=method, beam_size=beam)
        exact = Stub(8).logits(torch.tensor([1]), torch.tensor([[GO]])).bfloat16().double().log_softmax(1)
        assert replies.log_probs.dtype == replies.scores.dtype == torch.float32
        assert float(replies.log_probs[0, 0]) == pytest.approx(float(exact[0, replies.tokens[0, 0, 0]]), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method must be one of greedy, beam, sample, got 'best'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"method": "beam", "beam_size": 0}, "beam_size must be at least 1, got 0"),
        ({"beam_size": 3}, "beam_size must be 1 where method is 'greedy', got 3"),
        ({"num_return": 0}, "num_return must be at least 1, got 0"),
        ({"num_return": 2}, r"num_return must be at most 1 \(greedy gives one reply\), got 2"),
        ({"method": "beam", "beam_size": 2, "num_return": 3}, r"num_return must be at most 2 \(beam_size\), got 3"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be at least 0, got -1"),
        ({"length_penalty": math.nan}, "length_penalty must be from -10.0 to 10.0, got nan"),
        ({"length_penalty": -11.0}, "length_penalty must be from -10.0 to 10.0, got -11"),
        ({"method": "sample", "temperature": 0.0}, "temperature must be above 0 and finite, got 0"),
        ({"method": "sample", "temperature": math.inf}, "temperature must be above 0 and finite, got inf"),
        ({"method": "sample", "top_k": -1}, "top_k must be at least 0, got -1"),
        ({"method": "sample", "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"method": "sample", "top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"method": "sample", "keys": torch.zeros(3)}, r"keys must be int64 \(2,\), got torch.float32 \(3,\)"),
        ({"banned": (PAD, EOS)}, r"EOS not banned: got 3, 2, \(0, 2\)"),
        ({"banned": (-1,)}, r"must be ids from 0, EOS not banned: got 3, 2, \(-1,\)"),
        ({"eos_id": 8}, r"logits must be \(2, vocab_size\) with vocab_size above 8, .* got \(2, 8\)"),
    ],
)
def test_bad_arguments_are_refused_by_name_value_and_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(Stub(8), first_state([0, 1]), **{"max_length": 4, **SPECIAL, **options})


def test_a_state_without_one_number_of_posts_is_refused() -> None:
    for state, message in (
        ({}, r"first dimension, got \{\}"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(3)}, r"got \{'a': 2, 'b': 3\}"),
        ({"a": torch.tensor(1.0)}, r"got \{'a': None\}"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(Stub(8), state, **SPECIAL, max_length=4)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize(("method", "beam"), [("greedy", 1), ("beam", 3), ("sample", 1)])
def test_logits_from_which_no_word_follows_are_refused(value: float, method: str, beam: int) -> None:
    class Broken(Stub):
        def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
            logits, new = super().step(tokens, state)
            if len(self.rows) > 1:
                logits[-1] = value
            return logits, new

    with pytest.raises(ValueError, match=r"logits are not|no word|no reply"):
        decode(Broken(8, eos=-20.0), first_state([0]), **SPECIAL, max_length=4, method=method, beam_size=beam)
