"""What is measured of replies: against the true ones, against a judge of emotions, and under forced emotions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from zoo.common.artifacts import log_figure, log_table
from zoo.common.checkpoints import load_run_checkpoint
from zoo.eacm.emotion_metrics import EmotionMetrics
from zoo.eacm.lexicon import EmotionLexicon
from zoo.eacm.reply_metrics import DialogueMetrics
from zoo.eacm.tagger import EmotionTagger
from zoo.eacm.word_vectors import read_word_vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.eacm.dialogue_module import DialogueModule
    from zoo.eacm.evaluation_options import EvaluationOptions
    from zoo.eacm.types import Dialogues, Scored

log = logging.getLogger(__name__)

Words = list[list[str]]
_SPECIALS = 4


def read_judge(path: str, label_names: Sequence[str], device: torch.device) -> EmotionTagger:
    """A tagger from a checkpoint, in evaluation mode.

    Raises:
        ValueError: If there is no such file, it is no tagger's, or the tagger knows other emotions.
    """
    weights = load_run_checkpoint(path, resume=False)["state_dict"]
    if not {"classifier.weight", "pooling.score.weight"} <= weights.keys():
        raise ValueError(f"judge: {path} is no checkpoint of an EmotionTagger: give the best.ckpt of its training")
    judge = EmotionTagger.load_from_checkpoint(path, map_location=device, weights_only=True)
    if judge.label_names != list(label_names):
        raise ValueError(
            f"judge: {path} knows the emotions {', '.join(judge.label_names)}, the model {', '.join(label_names)}: "
            "train it on the same data"
        )
    return judge.eval().requires_grad_(False)


class ReplyEvaluation:
    """Metrics of a test, beside perplexity and the choice of emotions.

    - Of the replies as the model makes them: `DialogueMetrics`; with a judge `emotion_a` and `macro_f1` of
      `EmotionMetrics` against the true emotions (of which the first counts); with a lexicon `emotion_w`.
    - Of the judge: the same against the true replies, `judge/*`: what a system of true replies would have.
    - Of the data: `copy/*`, replies that have the emotion of the post, as if a system copied it.
    - Under forced emotions: `forced_gold/*` with the true emotion; `forced/<name>`, share of all replies made with this
      emotion that the judge finds it in, and `forced/followed`, their mean; `forced/diverse`, share of posts whose
      replies to all emotions are not one and the same, and `forced/different`, mean share of different ones among them.

    Args:
        module: The model under test.
        options: How replies are made and judged.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file does not fit.
    """

    def __init__(self, module: DialogueModule, options: EvaluationOptions) -> None:
        self.module, self.options = module, options
        device, names = module.device, module.label_names
        count = module.num_emotions
        self.judge = None if options.judge is None else read_judge(options.judge, names, device)
        self.lexicon: EmotionLexicon | None = None
        if options.lexicon is not None:
            default = options.lexicon == "default"
            self.lexicon = EmotionLexicon.default(names) if default else EmotionLexicon.read(options.lexicon, names)
        forced = options.test_forced if options.test_forced is not None else self.judge is not None
        self.forced = forced and module.takes_emotions
        if options.test_forced and not module.takes_emotions:
            log.info("%s takes no emotion: there is nothing to force", type(module).__name__)
        self.metrics = self._dialogue_metrics().to(device)
        judged = ("auto", "reference", "copy", "forced_gold", *(f"forced/{name}" for name in names))
        self.judged = {name: EmotionMetrics(count, names).to(device) for name in judged}
        self.said, self.diverse, self.different = (MeanMetric().to(device) for _ in range(3))
        self.transitions = {
            side: MulticlassConfusionMatrix(count).to(device) for side in ("gold", "predicted", "judged")
        }
        self._gates: list[Tensor] = []
        self._rows: list[list[Any]] = []
        self._shown: Dialogues | None = None

    def _dialogue_metrics(self) -> DialogueMetrics:
        source = self.options.word_vectors
        if source is None:
            return DialogueMetrics()
        tokenizer = self.module.vocabulary.reply
        words = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
        if source == "model":
            table = self.module.word_table()
            if table is None:
                raise ValueError(
                    f"word_vectors='model': {type(self.module).__name__} has none of the data's words; give a file"
                )
            known = torch.arange(len(words)) >= _SPECIALS
            return DialogueMetrics(words, table.cpu(), known, embedding_name="model_embedding")
        vectors, known = read_word_vectors(source, words)
        log.info("%s has vectors of %.1f %% of the %d words", source, 100 * float(known.float().mean()), len(words))
        return DialogueMetrics(words, vectors, known)

    def _references(self, batch: Dialogues) -> Words:
        ends = batch.reply_out.ne(0) & batch.reply_out.ne(2)
        vocabulary = self.module.vocabulary
        return [
            vocabulary.reply_words(row[:length])
            for row, length in zip(batch.reply_out.tolist(), ends.sum(1).tolist(), strict=True)
        ]

    def _tag(self, replies: Words) -> Tensor:
        assert self.judge is not None
        return self.judge.tag([" ".join(words) for words in replies]).primary.to(self.module.device)

    def _count(self, name: str, replies: Words, target: Tensor, known: Tensor) -> Tensor | None:
        """Count replies with their targets where these are known; the judge's classes of all."""
        if self.judge is None:
            return None
        judged = self._tag(replies)
        self.judged[name].update(judged[known], target[known])
        return judged

    def update(self, batch: Dialogues, scored: Scored) -> None:
        """Reply to a batch, and count.

        Args:
            batch: The posts with their true replies.
            scored: What the model made of these.
        """
        module = self.module
        answers = module.answer(batch)
        replies = [row[0] for row in answers.words]
        references = self._references(batch)
        self.metrics.update(replies, references)
        known, gold = batch.reply_emotion_known, batch.reply_emotion.argmax(-1)
        judged = self._count("auto", replies, gold, known)
        self._count("reference", references, gold, known)
        if self.lexicon is not None:
            holds, counts = self.lexicon.said(replies, gold.cpu())
            self.said.update(holds.double().to(module.device), (counts & known.cpu()).double().to(module.device))
        self._count_transitions(batch, scored, judged)
        forced = self._force(batch, gold, known) if self.forced else {}
        self._show(batch, replies, references, answers.emotion, judged, forced)

    def _count_transitions(self, batch: Dialogues, scored: Scored, judged: Tensor | None) -> None:
        both = batch.post_emotion_known & batch.reply_emotion_known
        post, gold = batch.post_emotion.argmax(-1), batch.reply_emotion.argmax(-1)
        self.judged["copy"].update(post[both], gold[both])
        chosen = None if scored.selection is None else scored.selection.reply_logits.argmax(-1)
        for name, reply in (("gold", gold), ("predicted", chosen), ("judged", judged)):
            if reply is not None and bool(both.any()):
                self.transitions[name].update(reply[both], post[both])
        if scored.selection is not None and scored.selection.gate is not None and len(self._gates) < 20:
            self._gates.append(scored.selection.gate.float().flatten().cpu())

    def _force(self, batch: Dialogues, gold: Tensor, known: Tensor) -> dict[str, Words]:
        """Replies under each emotion by its name, counted."""
        names = self.module.label_names
        replies: dict[str, Words] = {}
        for label, name in enumerate(names):
            replies[name] = [row[0] for row in self.module.answer(batch, emotion=label, num_return=1).words]
            everywhere = torch.full_like(gold, label)
            self._count(f"forced/{name}", replies[name], everywhere, torch.ones_like(known))
        true = [replies[names[label]][row] for row, label in enumerate(gold.tolist())]
        self._count("forced_gold", true, gold, known)
        kinds = torch.tensor([len({tuple(own[row]) for own in replies.values()}) for row in range(len(gold))])
        self.diverse.update((kinds > 1).double().to(gold.device))
        self.different.update(((kinds - 1) / max(1, len(names) - 1)).double().to(gold.device))
        return replies

    def _show(
        self,
        batch: Dialogues,
        replies: Words,
        references: Words,
        emotion: Tensor | None,
        judged: Tensor | None,
        forced: dict[str, Words],
    ) -> None:
        if self._shown is None:
            self._shown = batch
        names = self.module.label_names
        for row in range(min(len(replies), self.options.table_rows - len(self._rows))):
            gold = names[int(batch.reply_emotion[row].argmax())] if bool(batch.reply_emotion_known[row]) else ""
            chosen = "" if emotion is None else names[int(emotion[row].argmax())]
            found = "" if judged is None else names[int(judged[row])]
            own = [" ".join(forced[name][row]) for name in names] if forced else []
            self._rows.append(
                [batch.post_text[row], " ".join(references[row]), gold, chosen, found, " ".join(replies[row]), *own]
            )

    def finish(self) -> None:
        """Log `test/*`, the table and the pictures. All processes must call it."""
        values: dict[str, Tensor] = dict(self.metrics.compute())
        for name, metric in self.judged.items():
            if not metric.update_called:
                continue
            found = metric.compute()
            if int(metric.confusion.sum()) == 0 and self.module.trainer.world_size == 1:
                continue
            values |= self._named(name, found)
        if self.lexicon is not None:
            values["emotion_w"] = self.said.compute()
        if self.forced:
            values |= {"forced/diverse": self.diverse.compute(), "forced/different": self.different.compute()}
            shares = [values[f"forced/{name}"] for name in self.module.label_names if f"forced/{name}" in values]
            if shares:
                values["forced/followed"] = torch.stack(shares).mean()
        for name, value in values.items():
            self.module.log(f"test/{name}", torch.nan_to_num(value.float()))
        self._log_rows()
        self._draw()

    def _named(self, name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
        if name.startswith("forced/"):
            return {name: found["emotion_a"]}
        if name == "auto":
            return {key.replace("macro_f1", "emotion_macro_f1"): value for key, value in found.items()}
        if name == "copy":
            return {"copy/acc": found["emotion_a"], "copy/macro_f1": found["macro_f1"]}
        prefix = "judge" if name == "reference" else name
        return {f"{prefix}/{'acc' if key == 'emotion_a' else key}": value for key, value in found.items()} | (
            {f"{prefix}/emotion_a": found["emotion_a"]} if name == "forced_gold" else {}
        )

    def _log_rows(self) -> None:
        if not self._rows:
            return
        columns = ["post", "true reply", "true emotion", "chosen emotion", "judged emotion", "reply"]
        forced = [f"reply, {name}" for name in self.module.label_names] if self.forced else []
        log_table(self.module, "test/replies", [*columns, *forced], self._rows)

    def _draw(self) -> None:
        from zoo.eacm.figures import draw_attention, draw_gates, draw_transitions

        names = self.module.label_names
        seen = {name: metric.compute() for name, metric in self.transitions.items() if metric.update_called}
        if seen:
            titles = {"gold": "true replies", "predicted": "chosen", "judged": "replies, as judged"}
            parts = {titles[name]: matrix.cpu() for name, matrix in seen.items()}
            log_figure(self.module, "test/transitions", draw_transitions(parts, names))
        if self._gates:
            log_figure(self.module, "test/gate", draw_gates(torch.cat(self._gates)))
        maps = None if self._shown is None else self.module.attention_maps(self._shown)
        if maps is not None:
            log_figure(self.module, "test/attention", draw_attention(*maps))
