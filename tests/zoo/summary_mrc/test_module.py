"""SummaryMRC: each option scored by itself, whatever stands beside it, in every mode and layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.zoo.summary_mrc.choices import (
    OPTIONS,
    TINY,
    TINY_LINE,
    WIDTH,
    fit,
    gradients,
    padded,
    permuted,
    rows,
    tokenizer,
    tokens,
    uneven,
    whole,
    write,
)
from zoo.summary_mrc.encoders import build_text_encoder, encode, save_text_encoder
from zoo.summary_mrc.module import LAYOUTS, MODES, SummaryMRC

if TYPE_CHECKING:
    from pathlib import Path

MATCHERS = ("comatch", "duma", "cls", "mean")
BOTH = [(layout, matcher) for layout in LAYOUTS for matcher in MATCHERS]
ORDER = [3, 0, 4, 1, 2]


def build(layout: str = "joint", kind: str = "bert", **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "encoder": "tiny",
        "encoder_options": {"kind": kind, "dropout": 0.0, **TINY},
        "vocab_size": len(tokenizer(options.get("mark_option", False))),
        "encode": layout,
        "dropout": 0.0,
    }
    return uneven(SummaryMRC(**settings | options))


@torch.no_grad()
def one_by_one(module: Any, batch: Any) -> torch.Tensor:
    """The scores without any padding: a sequence at a time, cut to its tokens."""
    scores = torch.zeros(batch.accepted.shape)
    for row in range(scores.shape[0]):
        for option in range(scores.shape[1]):
            places = batch.summary_index[row, option][batch.summary_mask[row, option]]
            chosen = batch.option_mask[row, option][batch.summary_mask[row, option]]
            if module.encode_layout == "joint":
                kept = batch.attention_mask[row, option].bool()
                ids, types = batch.input_ids[row, option][kept], batch.token_type_ids[row, option][kept]
                states = encode(module.encoder, ids[None], torch.ones_like(ids)[None], types[None])[0]
                passage = states[batch.passage_mask[row, option][kept]]
            else:
                ids = batch.summary_ids[row, option][batch.summary_attention_mask[row, option].bool()]
                states = encode(module.encoder, ids[None], torch.ones_like(ids)[None])[0]
                kept = batch.passage_attention_mask[row].bool()
                ids = batch.passage_ids[row][kept]
                passage = encode(module.encoder, ids[None], torch.ones_like(ids)[None])[0]
                passage = passage[batch.passage_mask[row][kept]]
            summary = states[places]
            masks = [torch.ones(1, len(part), dtype=torch.bool) for part in (summary, passage)]
            sides = (summary[None], masks[0], passage[None], masks[1])
            vectors = [module.matcher(*sides, first=states[:1], span=chosen[None]), states[:1]]
            vectors.append(summary[chosen].mean(0, keepdim=True))
            scores[row, option] = module.scorer(torch.cat(vectors, -1))
    return scores


@pytest.mark.parametrize(("layout", "matcher"), BOTH)
def test_scores_are_those_of_each_sequence_without_padding(layout: str, matcher: str) -> None:
    module, batch = build(layout, matcher=matcher), tokens(layout)[torch.arange(5)]
    scores = module(batch)
    assert scores.shape == (5, OPTIONS) and bool((scores.std(1) > 1e-3).all())
    torch.testing.assert_close(scores, one_by_one(module, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "matcher"), BOTH)
def test_permuted_options_have_permuted_scores(layout: str, matcher: str) -> None:
    module = build(layout, matcher=matcher)
    questions = rows()
    scores, other = (module(whole(tokens(layout, table))) for table in (questions, permuted(questions, ORDER)))
    torch.testing.assert_close(other, scores[:, ORDER], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
@pytest.mark.parametrize(("layout", "matcher"), BOTH)
def test_padding_changes_no_score(layout: str, matcher: str, kind: str) -> None:
    module, table = build(layout, kind, matcher=matcher), tokens(layout)
    scores = module(whole(table))
    torch.testing.assert_close(module(padded(whole(table))), scores, rtol=0, atol=1e-5)
    shortest, longest = int(table.lengths.argmin()), int(table.lengths.argmax())
    for row in (shortest, longest):
        torch.testing.assert_close(module(table[torch.tensor([row])])[0], scores[row], rtol=0, atol=1e-5)
    assert table.lengths[longest] > table.lengths[shortest] + 10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_options_in_chunks_give_the_same_loss_and_gradients(layout: str, chunk: int) -> None:
    batch = whole(tokens(layout))
    loss, expected = gradients(build(layout), batch)
    module = build(layout, option_chunk=chunk)
    seen: list[int] = []
    module.encoder.register_forward_pre_hook(
        lambda network, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    chunked, found = gradients(module, batch)
    torch.testing.assert_close(chunked, loss, rtol=1e-5, atol=0)
    assert list(found) == list(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    parts = [len(range(OPTIONS)[start : start + chunk]) for start in range(0, OPTIONS, chunk)]
    sizes = [12 * part for part in parts]
    again = sizes[::-1] if len(parts) > 1 else []
    assert seen == [12] * (layout == "separate") + sizes + again


def test_chunks_with_dropout_are_computed_again_with_the_same_one() -> None:
    module, batch = build(option_chunk=2, dropout=0.5).train(), whole(tokens())
    masks: list[Any] = []
    module.dropout.register_forward_hook(lambda layer, args, out: masks.append((out == 0).clone()))
    gradients(module, batch)
    assert len(masks) == 6
    for first, second in zip(masks[:3], reversed(masks[3:]), strict=True):
        assert torch.equal(first, second) and first.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_changes_no_gradient(layout: str) -> None:
    batch = whole(tokens(layout))
    loss, expected = gradients(build(layout).train(), batch)
    again, found = gradients(build(layout, gradient_checkpointing=True).train(), batch)
    torch.testing.assert_close(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("matcher", ["auto", "cls"])
def test_every_mode_trains_all_of_its_weights(layout: str, mode: str, matcher: str) -> None:
    module = build(layout, mode=mode, matcher=matcher).train()
    assert module.matcher.kind == ("cls" if matcher == "cls" else "mean" if mode in MODES[3:] else "comatch")
    batch = whole(tokens(layout, mode=mode, with_passage=module.with_passage))
    _, found = gradients(module, batch)
    assert found.keys() == {name for name, _ in module.named_parameters()}
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_zero_scorer_has_the_loss_of_a_guess(layout: str) -> None:
    module, batch = build(layout), whole(tokens(layout))
    torch.nn.init.zeros_(module.scorer.weight)
    loss, _ = gradients(module, batch)
    torch.testing.assert_close(loss, torch.tensor(float(OPTIONS)).log())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["fill", "summary_only", "option_only"])
def test_what_a_mode_leaves_out_changes_no_score(layout: str, mode: str) -> None:
    module = build(layout, mode=mode)
    first, second = rows(), rows()
    second.articles[:] = ["cedar marsh"] * 12
    third = rows()
    third.questions[:] = ["ridge @placeholder trail"] * 12
    scores = [
        module(whole(tokens(layout, table, mode=mode, with_passage=module.with_passage)))
        for table in (first, second, third)
    ]
    assert torch.allclose(scores[0], scores[1], atol=1e-5) == (mode != "fill")
    assert torch.allclose(scores[0], scores[2], atol=1e-5) == (mode == "option_only")


@pytest.mark.parametrize("matcher", MATCHERS)
def test_the_option_span_counts_only_where_it_is_asked_for(matcher: str) -> None:
    batch = whole(tokens())
    other = batch._replace(option_mask=batch.summary_mask)
    widths = {"comatch": (16, 16), "duma": (32, 16), "cls": (16, 0), "mean": (16, 0)}[matcher]
    for span in (True, False, None):
        module = build(matcher=matcher, option_span=span, use_cls=False)
        assert module.scorer.in_features == widths[0] + (widths[1] + WIDTH) * (span is not False)
        assert torch.equal(module(batch), module(other)) == (span is False)
    assert build(matcher=matcher, mode="concat").option_span is False


def test_marker_tokens_grow_the_embedding_of_a_checkpoint(tmp_path: Path) -> None:
    size = len(tokenizer())
    encoder = build().encoder
    save_text_encoder(encoder, tmp_path)
    settings = {"encoder": str(tmp_path), "encoder_options": None}
    with pytest.raises(ValueError, match=f"the tokenizer has {size + 2} tokens, the embedding of .* has {size}"):
        build(vocab_size=size + 2, **settings)
    torch.manual_seed(0)
    module = SummaryMRC(str(tmp_path), vocab_size=size + 2, mark_option=True)
    weight = module.encoder.get_input_embeddings().weight
    assert weight.shape[0] == size + 2
    assert torch.equal(weight[:size], encoder.get_input_embeddings().weight)
    batch = whole(tokens(mark_option=True))
    assert int(batch.input_ids.max()) == size + 1
    before = weight[size:].detach().clone()
    fit(module, [batch, batch, batch], max_steps=3)
    assert bool((module.encoder.get_input_embeddings().weight[size:] != before).any(1).all())


@pytest.mark.parametrize("loader", ["ElectraForPreTraining", "ElectraModel", "BertForMaskedLM", "BertModel"])
def test_a_folder_of_save_pretrained_is_an_encoder_that_trains(loader: str, tmp_path: Path) -> None:
    import transformers

    kind = "electra" if loader.startswith("Electra") else "bert"
    network = uneven(getattr(transformers, loader)(build(kind=kind).encoder.config))
    network.save_pretrained(tmp_path)
    module = SummaryMRC(str(tmp_path), vocab_size=len(tokenizer()), lr=1e-2, warmup_ratio=0.0).eval()
    batch = whole(tokens())
    sequences = [field.flatten(0, 1) for field in (batch.input_ids, batch.attention_mask, batch.token_type_ids)]
    with torch.no_grad():
        torch.testing.assert_close(encode(module.encoder, *sequences), encode(network, *sequences))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(module.train(), [batch], max_steps=1)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("matcher", ["comatch", "duma"])
def test_attention_is_over_the_passage_s_own_words(layout: str, matcher: str) -> None:
    module, table, row = build(layout, matcher=matcher), tokens(layout), 4
    batch = table[torch.tensor([row, 0, int(table.lengths.argmax())])]
    summary, passage, weights = module.attention(batch)
    assert weights.shape == (OPTIONS, summary.shape[1], passage.shape[1])
    torch.testing.assert_close(weights.sum(-1), (summary >= 0).float())
    assert bool((weights.movedim(2, 1)[passage < 0] == 0).all()) and bool((passage < 0).any())
    article, question = rows().articles[row], rows().questions[row]
    for option, text in enumerate(rows().options[row]):
        words = [tokenizer().decode(ids[option][ids[option] >= 0]) for ids in (summary, passage)]
        assert words == [question.replace("@placeholder", text), article]
    _, _, alone = module.attention(table[torch.tensor([row])])
    torch.testing.assert_close(weights[:, : alone.shape[1], : alone.shape[2]], alone, rtol=0, atol=1e-5)


def test_without_a_look_at_the_passage_there_is_no_attention() -> None:
    assert build(matcher="cls").attention(whole(tokens())) is None
    table = tokens(mode="summary_only", with_passage=False)
    assert build(mode="summary_only").attention(whole(table)) is None


def test_a_passage_that_the_data_lacks_is_missed() -> None:
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match="passage_mask keeps no token in"):
            build(layout)(whole(tokens(layout, with_passage=False)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": "cloze"}, r"SummaryMRC needs --data\.encode joint or separate, got 'cloze'"),
        ({"mode": "filled"}, "mode must be one of fill, concat, .*, got 'filled'"),
        ({"matcher": "dual"}, "matcher must be one of auto, comatch, .*, got 'dual'"),
        ({"mode": "concat", "option_span": True}, "option_span needs the option in its slot: .* got 'concat'"),
        ({"mode": "option_only", "matcher": "comatch"}, "matcher='comatch' matches with a passage, .*'option_only'"),
        ({"with_passage": False, "matcher": "duma"}, "matcher='duma' matches with a passage"),
        ({"matcher": "cls", "match_dim": 3}, "match_dim is for matcher 'comatch' only"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"option_chunk": 0}, "option_chunk must be at least 1, got 0"),
        ({"num_options": 1}, "num_options must be at least 2, got 1"),
        ({"encoder": "bert-of-nobody/nothing", "encoder_options": None}, r"local folder.*pretrained=False"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(**options)


def test_the_command_line_names_what_to_change(refused: Any, tmp_path: Path) -> None:
    path = write(rows(), tmp_path / "questions.jsonl")
    command = (
        "fit", "--model", "SummaryMRC", "--model.encoder", "tiny", "--model.encoder_options", TINY_LINE,
        "--data", "ClozeData", "--data.path", path, "--data.tokenizer", "words", "--data.max_length",
    )  # fmt: skip
    assert "needs --data.encode joint or separate, got 'reader'" in refused(
        2, *command, "64", "--data.encode", "reader"
    )
    message = refused(1, *command, "65")
    assert "--data.max_length is 65, but the encoder (BertModel) has 64 positions" in message
    encoder = save_text_encoder(build_text_encoder("tiny", vocab_size=9, options=TINY), tmp_path / "encoder")
    folder = ("--model.encoder", str(encoder), "--model.encoder_options", "null")
    message = refused(2, *command, "64", *folder)
    assert f"the embedding of {encoder} has 9" in message and "the tokenizer has " in message
