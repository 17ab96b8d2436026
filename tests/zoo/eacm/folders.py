"""Small backbones in folders, and texts for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from datamodules.dialogue_vocabulary import learn_tokenizer
from tests.zoo.eacm.dialogues import Batch, dialogues
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("gpt2", "llama", "t5", "bart")
NAMES = ["calm", "joy", "anger"]
POSTS = [
    "How are you today?", "I lost my keys. [SEP] Oh no!", "Nice", "It rains a lot, and I am cold.", "What? [SEP] Why?",
    "We won!",
]  # fmt: skip
REPLIES = [
    "I am fine, thanks.", "That is so sad, really.", "Yes", "Take a coat then!", "No idea, why not?", "So glad!",
]  # fmt: skip


def texts() -> tuple[DialogueVocabulary, Batch]:
    """A vocabulary of the texts, and their batch; the last reply but one was cut after three words."""
    tokenizer = learn_tokenizer([*POSTS, *REPLIES], 60)
    known = DialogueVocabulary(tokenizer, tokenizer, NAMES)
    post_ids, post_mask = known.encode_posts(POSTS)
    rows = [[*tokenizer.encode(text).ids, 2] for text in REPLIES]
    rows[4] = rows[4][:3]
    longest = max(len(row) for row in rows)
    out = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = out.ne(0)
    batch = dialogues(rows=6)._replace(
        post_ids=post_ids, post_mask=post_mask, reply_in=torch.cat((torch.full((6, 1), 3), out[:, :-1]), 1),
        reply_out=out, reply_mask=mask, post_text=POSTS, reply_text=REPLIES,
    )  # fmt: skip
    return known, batch


def folder_of(path: Path, kind: str) -> Path:
    """A backbone over byte pairs: "gpt2" (absolute positions, no padding token), "llama", "t5" or "bart"."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([*POSTS, *REPLIES], trainer)
    names = {"eos_token": "</s>"} if kind == "gpt2" else {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(path)
    size = inner.get_vocab_size()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    network: Any
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2,
            initializer_range=0.3,
        )  # fmt: skip
        network = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=24, initializer_range=0.3, **ids,
        )  # fmt: skip
        network = transformers.LlamaForCausalLM(config)
    elif kind == "t5":
        config = transformers.T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **ids
        )
        network = transformers.T5ForConditionalGeneration(config)
    else:
        config = transformers.BartConfig(
            vocab_size=size, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
            decoder_start_token_id=2, init_std=0.3, forced_eos_token_id=None, **ids,
        )  # fmt: skip
        network = transformers.BartForConditionalGeneration(config)
    network.save_pretrained(path)
    return path
