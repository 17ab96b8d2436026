"""The prefix cache: the same scores as whole prompts, and when it is read anew."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from zoo.text_attack.language_models import build_decoder
from zoo.text_attack.prefix_cache import (
    PrefixCache,
    positions,
    read_prefix,
    read_tails,
    read_whole,
    weight_version,
)

USERS, TAILS, VOCABULARY = 3, 4, 50


def decoder(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    if kind == "llama":
        return build_decoder("tiny", {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}, VOCABULARY).eval()
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def rows() -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    prefix = torch.randint(3, VOCABULARY, (USERS, 9), generator=draw)
    prefix_mask = (torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]).long()
    tail = torch.randint(3, VOCABULARY, (USERS * TAILS, 5), generator=draw)
    tail_mask = (torch.arange(5) >= torch.arange(USERS * TAILS)[:, None] % 4).long()
    return prefix, prefix_mask, tail, tail_mask


def alone(network: Any, row: int) -> torch.Tensor:
    """Logits of one prompt without any padding."""
    prefix, prefix_mask, tail, tail_mask = rows()
    user = row // TAILS
    ids = torch.cat((prefix[user][prefix_mask[user] > 0], tail[row][tail_mask[row] > 0]))[None]
    return network(input_ids=ids).logits[0, -1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_tails_behind_shared_beginnings_equal_prompts_on_their_own(kind: str) -> None:
    network = decoder(kind)
    prefix, prefix_mask, tail, tail_mask = rows()
    read = read_prefix(network, {"input_ids": prefix}, prefix_mask)
    assert read is not None
    cached = read_tails(network, read, {"input_ids": tail}, tail_mask)
    again = read_tails(network, read, {"input_ids": tail}, tail_mask)
    assert torch.equal(cached, again)
    expected = torch.stack([alone(network, row) for row in range(USERS * TAILS)])
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)
    some = read_tails(network, read.users(slice(1, 2)), {"input_ids": tail[4:8]}, tail_mask[4:8])
    torch.testing.assert_close(some, expected[4:8], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_whole_prompts_do_not_depend_on_their_padding(kind: str) -> None:
    network = decoder(kind)
    prefix, prefix_mask, _, _ = rows()
    logits = read_whole(network, {"input_ids": prefix}, prefix_mask)
    for row in range(USERS):
        expected = network(input_ids=prefix[row][prefix_mask[row] > 0][None]).logits[0, -1]
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def test_positions_count_what_counts() -> None:
    assert positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@torch.no_grad()
def test_a_decoder_with_sliding_windows_keeps_no_beginnings() -> None:
    import transformers

    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, sliding_window=4, head_dim=16,
    )  # fmt: skip
    prefix, prefix_mask, _, _ = rows()
    network = transformers.MistralForCausalLM(config).eval()
    assert read_prefix(network, {"input_ids": prefix}, prefix_mask) is None


class Users:
    pass


@torch.no_grad()
def test_beginnings_are_read_once_while_users_and_weights_stay_and_memory_lasts() -> None:
    network = decoder("llama")
    prefix, prefix_mask, _, _ = rows()
    reads: list[int] = []

    def ask(cache: PrefixCache, users: Users, chunk: int) -> None:
        def read() -> Any:
            reads.append(chunk)
            return read_prefix(network, {"input_ids": prefix}, prefix_mask)

        cache.get(users, chunk, weight_version(network), read)

    first = read_prefix(network, {"input_ids": prefix}, prefix_mask)
    assert first is not None
    cache, users = PrefixCache(first.nbytes), Users()
    for chunk in (0, 0, 1, 1, 0):
        ask(cache, users, chunk)
    assert reads == [0, 1, 1]
    next(network.parameters()).add_(1)
    ask(cache, users, 0)
    ask(cache, Users(), 0)
    del users
    gc.collect()
    ask(cache, Users(), 0)
    assert reads == [0, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="cache_bytes must be at least 0, got -1"):
        PrefixCache(-1)
