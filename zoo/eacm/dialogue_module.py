"""What the models of dialogue share: training, perplexity, replies and what is measured of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from zoo.common.distributed import global_mean
from zoo.common.predictions import PredictionFile
from zoo.eacm.evaluation_options import EvaluationOptions
from zoo.eacm.reply_evaluation import ReplyEvaluation
from zoo.eacm.reply_metrics import CorpusPerplexity, SelectorMetrics
from zoo.eacm.selector import HEADS, class_index, emotion_losses
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.eacm.emotion_metrics import Head
    from zoo.eacm.types import Answers, Dialogues, Scored

log = logging.getLogger(__name__)

OPTIMIZERS = ("sgd", "adam", "adamw")
REDUCTIONS = ("sequence", "token")
EVALUATION = tuple(field.name for field in fields(EvaluationOptions) if field.name != "max_length")
"""Arguments that say only how replies are made and judged: a checkpoint does not fix them."""
Emotion = int | str | Sequence[float] | Tensor | None
"""What steers a reply: nothing (the model chooses), a class or its name, a distribution for all posts, a class for each
post (int64 `(posts,)`), or a distribution for each (float `(posts, num_emotions)`)."""


class DialogueModule(LightningModule):
    """A model that replies to posts; the base of this room's models.

    A subclass has `score_replies` and `answer`.

    Args:
        num_emotions: Number of emotions.
        label_names: Their names by class; by default the data's.
        emotion_head: "softmax" (one emotion at a time) or "sigmoid" (several): how choices are trained.
        lambda_emotion: Weight of the losses of the emotions.
        loss_reduction: "sequence" (mean over the words of a reply, then over replies) or "token" (over all words).
        optimizer: "sgd", "adam" or "adamw".
        lr: Learning rate.
        weight_decay: Of the optimizer.
        lr_decay: Factor of the rate after an epoch that did not lower the validation's perplexity; 1 for none.
        max_length: Most words of a reply that is made.
        decoding: "greedy", "beam" or "sample".
        beam_size: Hypotheses of each post ("beam").
        num_return: Replies of each post, best first ("beam"; "sample" draws so many).
        length_penalty: Log-probabilities are divided by `length ** length_penalty`; 0 for their sum.
        no_repeat_ngram: No reply has the same run of so many words twice; 0 for no such rule.
        temperature: Of "sample".
        top_k: "sample" draws from so many likeliest words; 0 for all.
        top_p: "sample" draws from the fewest words that have this probability together.
        seed: Of "sample".
        judge: Checkpoint of an `EmotionTagger` that says what emotion a reply has ("emotion-a" in the test).
        test_forced: Whether the test asks for every post and every emotion for a reply with that emotion, and for one
            with the true one; by default where there is a judge.
        lexicon: File of words with emotions ("emotion-w"); "default" for a small English one, None for none.
        word_vectors: File of word vectors in text format for the embedding metrics; "model" for the model's own word
            vectors; None for none.
        table_rows: Posts in the table of replies.

    Raises:
        ValueError: If an argument is out of its range or unknown.
    """

    monitor = "val/perplexity"
    monitor_mode = "min"
    chooses_emotions = False
    """Whether the model chooses the emotion of its reply."""
    takes_emotions = False
    """Whether a reply can be asked for with an emotion."""

    def __init__(
        self,
        num_emotions: int,
        label_names: list[str] | None = None,
        emotion_head: str = "sigmoid",
        lambda_emotion: float = 1.0,
        loss_reduction: str = "sequence",
        optimizer: str = "sgd",
        lr: float = 0.5,
        weight_decay: float = 0.0,
        lr_decay: float = 0.99,
        max_length: int = 30,
        decoding: str = "greedy",
        beam_size: int = 5,
        num_return: int = 1,
        length_penalty: float = 0.0,
        no_repeat_ngram: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        judge: str | None = None,
        test_forced: bool | None = None,
        lexicon: str | None = None,
        word_vectors: str | None = None,
        table_rows: int = 50,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        if emotion_head not in HEADS:
            raise ValueError(f"emotion_head must be one of {', '.join(HEADS)}, got {emotion_head!r}")
        if loss_reduction not in REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {', '.join(REDUCTIONS)}, got {loss_reduction!r}")
        if not lr > 0 or not 0 < lr_decay <= 1 or weight_decay < 0 or lambda_emotion < 0:
            raise ValueError(
                "lr must be positive, lr_decay above 0 and at most 1, weight_decay and lambda_emotion at least 0, got "
                f"{lr}, {lr_decay}, {weight_decay} and {lambda_emotion}"
            )
        if label_names is not None and len(label_names) != num_emotions:
            raise ValueError(f"label_names has {len(label_names)} names for num_emotions={num_emotions}")
        self.options = EvaluationOptions(
            max_length, decoding, beam_size, num_return, length_penalty, no_repeat_ngram, temperature, top_k, top_p,
            seed, judge, test_forced, lexicon, word_vectors, table_rows,
        )  # fmt: skip
        self.num_emotions, self.emotion_head, self.lambda_emotion = num_emotions, emotion_head, lambda_emotion
        self._own_names = label_names
        self.loss_reduction, self.optimizer_name, self.lr = loss_reduction, optimizer, lr
        self.weight_decay, self.lr_decay = weight_decay, lr_decay
        self.vocabulary_: DialogueVocabulary | None = None
        self.perplexity = CorpusPerplexity()
        head: Any = emotion_head
        # Logits of a softmax above 0 say nothing: the head decides which emotions count as chosen.
        head = cast("Head", emotion_head)
        self.selected = SelectorMetrics(num_emotions, head)
        self.selected_posts = SelectorMetrics(num_emotions, head)
        self._evaluation: ReplyEvaluation | None = None
        self._predictions = PredictionFile(self)

    # What a subclass has.

    def score_replies(self, batch: Dialogues) -> Scored:
        """Likelihood of the batch's replies, with gradients."""
        raise NotImplementedError

    def answer(self, batch: Any, emotion: Emotion = None, **options: Any) -> Answers:
        """Replies to posts.

        Args:
            batch: Anything with the `post_*` attributes of `Dialogues`; models steered by the true emotion read
                `reply_emotion`, where `emotion` is None.
            emotion: What steers them.
            **options: In place of the module's own: `decoding`, `beam_size`, `num_return`, ... (see the arguments).
        """
        raise NotImplementedError

    def word_table(self) -> Tensor | None:
        """The reply's word vectors `(words, size)`, for the embedding metrics; None without."""
        return None

    def attention_maps(self, batch: Dialogues) -> tuple[dict[str, Tensor], list[str], list[str]] | None:
        """Attention over a post with and without the emotion, for a picture; None for models that have none.

        Returns:
            By title the weights `(reply words, post words)`, the post's words and the reply's.
        """
        return None

    # Words and names.

    @property
    def vocabulary(self) -> DialogueVocabulary:
        """Words of posts and replies.

        Raises:
            RuntimeError: If none has come yet.
        """
        if self.vocabulary_ is None:
            raise RuntimeError(
                f"{type(self).__name__} knows no words yet: train it with a datamodule that has `post_tokenizer` and "
                "`reply_tokenizer` (such as DialogueData), load a checkpoint, or set `vocabulary_`"
            )
        return self.vocabulary_

    @property
    def label_names(self) -> list[str]:
        """Names of the emotions by class: the ones given, those of the data, or numbers."""
        if self._own_names is not None:
            return self._own_names
        known = self.vocabulary_.label_names if self.vocabulary_ is not None else []
        return known or [str(number) for number in range(self.num_emotions)]

    def setup(self, stage: str) -> None:
        """Take the words of the datamodule.

        Raises:
            ValueError: If the model was trained with others.
        """
        found = DialogueVocabulary.of(getattr(self.trainer, "datamodule", None))
        if found is None:
            return
        if self.vocabulary_ is None:
            self.vocabulary_ = found
        elif not self.vocabulary_.same_as(found):
            raise ValueError(
                f"{type(self).__name__} was trained with other words or emotions than this datamodule has: give the "
                "data options that it was trained with"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the words, and the name of the class, by which `zoo.eacm.chat` finds it."""
        checkpoint["dialogue_model"] = type(self).__name__
        if self.vocabulary_ is not None:
            checkpoint["dialogue_vocabulary"] = self.vocabulary_.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the words back."""
        content = checkpoint.get("dialogue_vocabulary")
        if content is not None:
            self.vocabulary_ = DialogueVocabulary.from_dict(content)

    # Emotions.

    def distribution(self, emotion: Emotion, posts: int) -> Tensor | None:
        """What steers replies, as float32 `(posts, num_emotions)`; None for the model's own choice.

        Args:
            emotion: See `Emotion`.
            posts: Number of posts.

        Raises:
            ValueError: If it is no emotion, or no distribution: negative, not finite, or of another shape.
        """
        if emotion is None:
            return None
        if isinstance(emotion, str):
            emotion = class_index(emotion, self.label_names)
        given = torch.as_tensor(emotion, device=self.device)
        if not given.is_floating_point() and given.dim() < 2:
            if bool(((given < 0) | (given >= self.num_emotions)).any()):
                raise ValueError(f"an emotion must be in 0..{self.num_emotions - 1}, got {given.tolist()}")
            given = torch.nn.functional.one_hot(given, self.num_emotions)
        given = given.float()
        if given.dim() == 1:
            given = given.expand(posts, -1)
        if given.shape != (posts, self.num_emotions):
            raise ValueError(
                f"emotion must have the shape ({posts}, {self.num_emotions}), posts and emotions, got "
                f"{tuple(given.shape)}"
            )
        if not bool(torch.isfinite(given).all()) or bool((given < 0).any()):
            raise ValueError("the shares of an emotion must be finite and at least 0")
        return given

    # Training.

    def reply_loss(self, scored: Scored) -> Tensor:
        """`L_gen`: by "sequence" the mean over replies of their mean over words, by "token" the mean over words."""
        if self.loss_reduction == "sequence":
            return (scored.nll / scored.tokens.clamp(min=1)).mean()
        return global_mean(scored.nll / scored.tokens.clamp(min=1), scored.tokens)

    def losses(self, batch: Dialogues) -> dict[str, Tensor]:
        """The terms of the loss, and the loss: `reply`, `post_emotion`, `reply_emotion`, `penalty` and `loss`.

        Terms that the model has not are left out. Emotions that are not known do not count.
        """
        scored = self.score_replies(batch)
        terms = {"reply": self.reply_loss(scored)}
        if scored.selection is not None:
            for name, logits, targets, known in (
                ("post_emotion", scored.selection.post_logits, batch.post_emotion, batch.post_emotion_known),
                ("reply_emotion", scored.selection.reply_logits, batch.reply_emotion, batch.reply_emotion_known),
            ):
                if logits is not None:
                    terms[name] = global_mean(emotion_losses(logits, targets, self.emotion_head), known)
        if scored.penalty is not None:
            terms["penalty"] = scored.penalty
        emotions = sum((terms[name] for name in ("post_emotion", "reply_emotion") if name in terms), torch.zeros(()))
        loss = terms["reply"] + self.lambda_emotion * emotions
        return {**terms, "loss": loss + terms["penalty"] if scored.penalty is not None else loss}

    def training_step(self, batch: Dialogues, batch_idx: int) -> Tensor:
        """The joint loss of a batch."""
        terms = self.losses(batch)
        size = len(batch.post_ids)
        for name, value in terms.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", batch_size=size)
        return terms["loss"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD, Adam or AdamW, whose rate falls when the validation's perplexity does not."""
        kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        parameters = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer: torch.optim.Optimizer = kinds[self.optimizer_name](
            parameters, lr=self.lr, weight_decay=self.weight_decay
        )
        if self.lr_decay == 1:
            return optimizer
        scheduler = ReduceLROnPlateau(optimizer, factor=self.lr_decay, patience=0, threshold=0.0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/perplexity", "strict": False},
        }

    # Evaluation.

    def _count(self, batch: Dialogues) -> Scored:
        scored = self.score_replies(batch)
        self.perplexity.update(scored.nll.double().sum(), scored.tokens.sum())
        if scored.selection is not None:
            choice = scored.selection
            self.selected.update(choice.reply_logits, batch.reply_emotion, batch.reply_emotion_known)
            if choice.post_logits is not None:
                self.selected_posts.update(choice.post_logits, batch.post_emotion, batch.post_emotion_known)
        return scored

    def _log_counts(self, stage: str) -> None:
        values = {"perplexity": self.perplexity.compute()}
        self.perplexity.reset()
        for side, metric in (("selector", self.selected), ("post_selector", self.selected_posts)):
            # Asked of all processes alike: one without a batch would leave the others waiting.
            if bool(metric.has_rows()):
                values |= {f"{side}/{name}": value for name, value in metric.compute().items()}
            metric.reset()
        for name, value in values.items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "perplexity")

    def validation_step(self, batch: Dialogues, batch_idx: int) -> None:
        """Count a batch."""
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._log_counts("val")

    def on_test_start(self) -> None:
        """Read the judge, the lexicon and the word vectors."""
        self._evaluation = ReplyEvaluation(self, self.options)

    def test_step(self, batch: Dialogues, batch_idx: int) -> None:
        """Count a batch, reply to it, and count that."""
        scored = self._count(batch)
        assert self._evaluation is not None
        self._evaluation.update(batch, scored)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`, the table of replies and the pictures."""
        self._log_counts("test")
        assert self._evaluation is not None
        self._evaluation.finish()
        self._evaluation = None

    def on_predict_start(self) -> None:
        """Open the file of predictions."""
        self._predictions.open()

    def predict_step(self, batch: Dialogues, batch_idx: int) -> dict[str, Any]:
        """Replies to posts: `replies` (for each post a list of texts), `scores`, and `emotion` if something steers."""
        answers = self.answer(batch)
        replies = [[" ".join(words) for words in row] for row in answers.words]
        names = self.label_names
        lines = []
        for row, (post, own) in enumerate(zip(batch.post_text, replies, strict=True)):
            line: dict[str, Any] = {"post": post, "reply": own[0]}
            if len(own) > 1:
                line["replies"] = own
            if answers.emotion is not None:
                shares = answers.emotion[row]
                line["emotion"] = names[int(shares.argmax())]
                line["distribution"] = {
                    name: round(share, 4) for name, share in zip(names, shares.tolist(), strict=True)
                }
            lines.append(line)
        self._predictions.write(lines)
        out: dict[str, Any] = {"replies": replies, "scores": answers.scores}
        return out if answers.emotion is None else {**out, "emotion": answers.emotion}

    def on_predict_end(self) -> None:
        """Close the file of predictions."""
        self._predictions.close()
