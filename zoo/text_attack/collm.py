"""CoLLM (Zhang et al. 2023, arXiv 2310.19488): a decoder that is also given vectors of user and item in its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common.checkpoints import load_checkpoint
from zoo.common.schedules import WarmupCosine
from zoo.text_attack.answer_scores import yes_probability
from zoo.text_attack.matrix_factorisation import fit_matrix_factorisation, load_vectors
from zoo.text_attack.prompts import ITEM_SLOT, USER_SLOT, collm_prompt, prompt_of
from zoo.text_attack.tallrec import DecoderRec

if TYPE_CHECKING:
    from zoo.text_attack.pointwise import PromptUsers
    from zoo.text_attack.types import RecBatch

LOSSES = ("bce_yes", "ce_two")


class CoLLMRec(DecoderRec):
    """CoLLM in two stages: the text alone, then, with the decoder frozen, what maps the vectors into its prompt.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        backbone: "tiny" (a small Llama with fresh weights), or a folder or hub id of a causal language model.
        backbone_options: Of "tiny" (see `build_decoder`).
        cf_embeddings: A safetensors file with `user_embeddings` and `item_embeddings`; without one, they are learnt by
            matrix factorisation from the datamodule's `train_pairs` when training begins.
        cf_size: Width of these vectors.
        cf_epochs: Passes of the matrix factorisation.
        proj_factor: The hidden layer of the map is so many times as wide as the vectors.
        stage: 1 trains the decoder (or its adapters) on prompts without vectors; 2 trains the map alone.
        freeze_cf: Whether stage 2 leaves the vectors as they are.
        init_from: Checkpoint of stage 1 that stage 2 begins with.
        loss: "bce_yes" (sigmoid of the logit of yes, as published) or "ce_two" (yes against no); scores go by the same.
        prompt: "collm", or the attributes of a `Prompt` with the places `<UserID>` and `<TargetItemID>`.
        noun: What the items are.
        answers: What stands for yes and for no.
        lora: See `TALLRec`.
        adapter: See `TALLRec`.
        tokenizer: See `TALLRec`.
        vocab_size: See `TALLRec`.
        max_tokens: See `TALLRec`.
        max_history: See `TALLRec`.
        max_title_tokens: See `TALLRec`.
        score_batch: See `TALLRec`.
        use_prefix_cache: See `TALLRec`.
        cache_bytes: See `TALLRec`.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on vectors.
        warmup_steps: Steps in which the rate rises; it falls to 0 along a cosine in the others.
        cf_seed: Of the matrix factorisation.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ImportError: If transformers is missing, or peft with `lora`.
        ValueError: If an argument is out of its range, or a file does not fit.
    """

    cf_users: Tensor
    cf_items: Tensor
    cf_ready: Tensor

    def __init__(
        self,
        num_users: int | None = None,
        num_items: int | None = None,
        backbone: str = "tiny",
        backbone_options: dict[str, Any] | None = None,
        cf_embeddings: str | None = None,
        cf_size: int = 256,
        cf_epochs: int = 30,
        proj_factor: int = 10,
        stage: int = 1,
        freeze_cf: bool = True,
        init_from: str | None = None,
        loss: str = "bce_yes",
        prompt: str | dict[str, Any] = "collm",
        noun: str = "book",
        answers: list[str] = ["Yes", "No"],  # noqa: B006 - a plain value, never changed
        lora: dict[str, Any] | None = None,
        adapter: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 2000,
        max_tokens: int = 1024,
        max_history: int = 15,
        max_title_tokens: int = 32,
        score_batch: int = 256,
        use_prefix_cache: bool = True,
        cache_bytes: int = 2**30,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
        warmup_steps: int = 200,
        cf_seed: int = 0,
    ) -> None:
        if not num_users or not num_items:
            raise ValueError(
                "CoLLMRec needs num_users and num_items, the sizes of its tables: --model.num_users and "
                f"--model.num_items, got {num_users} and {num_items}"
            )
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage}")
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if min(cf_size, proj_factor, cf_epochs) < 1 or warmup_steps < 0:
            raise ValueError(
                "cf_size, proj_factor and cf_epochs must be at least 1 and warmup_steps 0, got "
                f"{cf_size}, {proj_factor}, {cf_epochs} and {warmup_steps}"
            )
        chosen = prompt_of(prompt, {"collm": collm_prompt(noun, features=stage == 2)})
        if stage == 2 and sorted(chosen.slots) != sorted((USER_SLOT, ITEM_SLOT)):
            raise ValueError(
                f"the prompt of stage 2 must hold {USER_SLOT} and {ITEM_SLOT} once, it holds {chosen.slots}"
            )
        if stage == 2 and ITEM_SLOT not in chosen.tail:
            raise ValueError(f"{ITEM_SLOT} must be in the tail of the prompt, with the item's title")
        if stage == 1 and chosen.slots:
            raise ValueError(f"stage 1 reads no vectors: its prompt cannot hold {', '.join(chosen.slots)}")
        super().__init__(
            chosen, answers, backbone, backbone_options, lora, adapter, tokenizer, vocab_size,
            WarmupCosine(warmup_steps), use_prefix_cache, cache_bytes, extra_tokens=(USER_SLOT, ITEM_SLOT),
            max_tokens=max_tokens, max_history=max_history, max_title_tokens=max_title_tokens,
            score_batch=score_batch, lr=lr, weight_decay=weight_decay,
        )  # fmt: skip
        self.save_hyperparameters()
        self.stage, self.loss_kind, self.cf_epochs, self.cf_seed = stage, loss, cf_epochs, cf_seed
        self.num_users, self.num_items, self.cf_size = num_users, num_items, cf_size
        self.reads_vectors = stage == 2
        hidden = int(self._embedding().embedding_dim)
        self.projection = nn.Sequential(
            nn.Linear(cf_size, cf_size * proj_factor), nn.ReLU(), nn.Linear(cf_size * proj_factor, hidden)
        )
        trained = stage == 2 and not freeze_cf
        self.cf_users = nn.Parameter(torch.zeros(num_users, cf_size), requires_grad=trained)
        self.cf_items = nn.Parameter(torch.zeros(num_items, cf_size), requires_grad=trained)
        self.register_buffer("cf_ready", torch.zeros((), dtype=torch.bool))
        if cf_embeddings is not None:
            self._set_vectors(*load_vectors(cf_embeddings, num_users, num_items, cf_size))
        if init_from is not None:
            self._begin_with(init_from)
        self.projection.requires_grad_(stage == 2)
        if stage == 2:
            self.decoder.requires_grad_(False)

    def _embedding(self) -> Any:
        model: Any = self.decoder
        return model.get_input_embeddings()

    def _begin_with(self, path: str) -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"init_from: {path} is not a file; give a checkpoint of CoLLMRec's stage 1")
        checkpoint = load_checkpoint(file)
        if checkpoint.get("victim") != type(self).__name__:
            raise ValueError(f"init_from: {path} is no checkpoint of CoLLMRec, but of {checkpoint.get('victim')}")
        # Vectors of a file of this run's own are not replaced.
        own = ("cf_",) if bool(self.cf_ready) else ()
        weights = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(own or "\0")}
        try:
            missing = self.load_state_dict(weights, strict=False).missing_keys
        except RuntimeError as error:
            raise ValueError(f"init_from: the weights of {path} do not fit: {error}") from error
        lacking = [name for name in missing if name.startswith("decoder.")]
        if lacking:
            raise ValueError(f"init_from: {path} lacks weights of the decoder: {', '.join(lacking[:5])}")
        self.on_load_checkpoint({"tokenizer": checkpoint.get("tokenizer")})

    @torch.no_grad()
    def _set_vectors(self, users: Tensor, items: Tensor) -> None:
        self.cf_users.copy_(users)
        self.cf_items.copy_(items)
        self.cf_ready.fill_(True)

    def on_fit_start(self) -> None:
        """Learn the vectors of users and items, unless they are there.

        Raises:
            ValueError: If stage 2 has neither vectors nor a datamodule with `train_pairs`.
        """
        if bool(self.cf_ready):
            return
        pairs = getattr(getattr(self.trainer, "datamodule", None), "train_pairs", None)
        if pairs is not None:
            self._set_vectors(
                *fit_matrix_factorisation(
                    pairs, self.num_users, self.num_items, self.cf_size, epochs=self.cf_epochs, seed=self.cf_seed
                )
            )
        elif self.reads_vectors:
            raise ValueError(
                "stage 2 needs vectors of users and items: give cf_embeddings, or a datamodule with train_pairs"
            )

    def user_state(self, batch: RecBatch) -> PromptUsers:
        """Beginnings of the prompts of the users of a batch.

        Raises:
            ValueError: If stage 2 is asked about a user who has no vector.
        """
        unknown = int((batch.user_ids < 0).sum()) if self.reads_vectors else 0
        if unknown:
            raise ValueError(
                f"{unknown} of {len(batch.user_ids)} users are not in the training data (test_path) and have no "
                "vector: test stage 2 on users of the training, or use stage 1"
            )
        return super().user_state(batch)

    def inputs(self, ids: Tensor, user_ids: Tensor | None, item_ids: Tensor | None) -> dict[str, Tensor]:
        """Token vectors, with those of user and item in their places.

        Raises:
            ValueError: If the prompt asks about an item that is not known.
        """
        if not self.reads_vectors:
            return {"input_ids": ids}
        out = ids
        places = []
        for slot, owners, table in ((USER_SLOT, user_ids, self.cf_users), (ITEM_SLOT, item_ids, self.cf_items)):
            here = ids == int(self.tokenizer.convert_tokens_to_ids(slot))
            # The network need not know the slot's token.
            out = out.masked_fill(here, self.pad_id)
            places.append((here, owners, table, slot))
        vectors: Tensor = self._embedding()(out)
        for here, owners, table, slot in places:
            if owners is None:
                # Beginnings hold no item, and ends no user, unless the item is not known.
                if bool(here.any()):
                    raise ValueError(f"the prompt holds {slot}: CoLLM needs item_ids in score(users, texts, item_ids)")
                continue
            mapped = self.projection(table[owners])
            vectors = torch.where(here[..., None], mapped[:, None].to(vectors.dtype), vectors)
        return {"inputs_embeds": vectors}

    def probability(self, logits: Tensor) -> Tensor:
        """Probability of yes, by the same rule as the loss."""
        return yes_probability(logits, self.answers) if self.loss_kind == "bce_yes" else super().probability(logits)

    def loss(self, batch: RecBatch) -> Tensor:
        """Binary cross-entropy of the answer."""
        logits = self.answer_logits(batch).float()
        yes = logits[:, self.answers.yes_id]
        if self.loss_kind == "ce_two":
            yes = yes - logits[:, self.answers.no_id]
        return F.binary_cross_entropy_with_logits(yes, batch.labels.float())
