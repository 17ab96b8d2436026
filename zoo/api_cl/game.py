"""One round of the game: the generators' loss through a black box, and the learner's loss on what they made.

Plain torch: networks, an API and options come in, scalars to descend on go out.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.api_cl.generator_objective import entropy
from zoo.api_cl.similarity import similarity_loss
from zoo.api_cl.student_objective import distillation, learning_without_forgetting, masked_cross_entropy, replay
from zoo.common.evaluation import evaluation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from zoo.api_cl.gaps import ResponseGap
    from zoo.api_cl.generator_objective import GeneratorObjective
    from zoo.api_cl.memory import MemoryRows
    from zoo.api_cl.networks import Classifier
    from zoo.api_cl.student_objective import ClassSets
    from zoo.api_cl.zeroth_order import ZerothOrderGradient


_PIECE = 256
"""Perturbed images that go through the learner at a time: more would only ask for fresh memory."""


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """A network in eval mode whose parameters collect no gradient; as it was afterwards."""
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(False)
    try:
        with evaluation(network):
            yield
    finally:
        for parameter, want in zip(network.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)


@dataclass
class GeneratorRound:
    """What a round of the generators gives.

    Attributes:
        loss: Scalar whose gradient is that of the objective.
        images: The unperturbed images, float32 `(G * B, c, h, w)`.
        probs: The API's responses to them, `(G * B, C)`.
        report: Scalars to log.
    """

    loss: Tensor
    images: Tensor
    probs: Tensor
    report: dict[str, Tensor]


def generator_round(
    generators: Sequence[nn.Module],
    noise: Tensor,
    learner: Classifier,
    columns: Tensor,
    ask: Callable[[Tensor, Mapping[str, int]], Tensor],
    objective: GeneratorObjective,
    gap: ResponseGap,
    *,
    mode: str = "zo",
    estimator: ZerothOrderGradient | None = None,
    differentiable: Callable[[Tensor], Tensor] | None = None,
    decimals: int | None = None,
    rng: torch.Generator | None = None,
    mean_over_ranks: Callable[[Tensor], Tensor] = _same,
) -> GeneratorRound:
    """The generators' loss, with the learner and the API held fixed.

    Everything is computed in the networks' own precision, outside autocast: differences of half-precision numbers are
    noise.

    Args:
        generators: One or two, in train mode; each makes images from the same noise.
        noise: `(B, latent_dim)`.
        learner: The continual learner, which is left as it was.
        columns: Classes of the task, int64 `(C,)`.
        ask: Queries the API.
        objective: What is minimised.
        gap: The response gap.
        mode: "zo", zeroth-order differences through learner and API; "surrogate", autograd through the learner, with
            the API's label as a constant; "whitebox", autograd through both.
        estimator: For "zo".
        differentiable: For "whitebox": images to responses with their graph, counted as queries.
        decimals: To which the API rounds.
        rng: Of the directions.
        mean_over_ranks: Averages a tensor over processes.

    Returns:
        Its `loss` has the objective's gradient with respect to the generators, in "zo" that of the estimate.
    """
    with torch.autocast(noise.device.type, enabled=False), frozen(learner):
        pre = torch.stack([generator(noise) for generator in generators])
        count, batch = pre.shape[:2]
        images = pre.tanh()
        if mode == "zo":
            assert estimator is not None
            loss, probs, gaps, norm = _zeroth_order(
                pre, learner, columns, ask, objective, gap, estimator, decimals, rng, mean_over_ranks
            )
        else:
            flat = images.flatten(0, 1)
            logits = learner(flat)[:, columns]
            if mode == "whitebox":
                assert differentiable is not None
                probs = differentiable(flat)
                gaps = gap(probs, logits, decimals).view(count, batch)
                loss = objective.exact(probs.view(count, batch, -1), gaps, mean_over_ranks)
            else:
                probs = ask(flat.detach(), {"gen_base": len(flat)})
                gaps = gap(probs, logits.detach(), decimals).view(count, batch)
                labels = probs.argmax(-1).view(count, batch)
                loss = objective.surrogate(logits.view(count, batch, -1), labels, mean_over_ranks)
            probs, gaps = probs.detach().view(count, batch, -1), gaps.detach()
            norm = loss.detach().new_zeros(())
        report = {
            "gap": gaps.mean(),
            "entropy": entropy(probs.mean(1)).mean(),
            "pixel_std": images.detach().std(1, correction=0).mean(),
            "gradient": norm,
        }
        if count == 2 and objective.cooperates:
            first, second = images
            if objective.kind == "feature":
                first, second = learner.features(first), learner.features(second)
            hinge = objective.cooperation(first, second)
            loss = loss + hinge
            report["distance"] = (images[0] - images[1]).detach().abs().mean()
    return GeneratorRound(loss, images.detach().flatten(0, 1), probs.flatten(0, 1), report)


def _zeroth_order(
    pre: Tensor,
    learner: Classifier,
    columns: Tensor,
    ask: Callable[[Tensor, Mapping[str, int]], Tensor],
    objective: GeneratorObjective,
    gap: ResponseGap,
    estimator: ZerothOrderGradient,
    decimals: int | None,
    rng: torch.Generator | None,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, batch = pre.shape[:2]
    points = estimator.perturb(pre.detach().flatten(0, 1), rng)
    rows = points.rows.shape[0]
    images = points.rows.flatten(0, 1).tanh()
    base = count * batch
    probs = ask(images, {"gen_base": base, "gen_dirs": len(images) - base})
    with torch.no_grad():
        logits = torch.cat([learner(piece)[:, columns] for piece in torch.split(images, _PIECE)])
        gaps = gap(probs, logits, decimals).view(rows, count, batch)
        probs = probs.view(rows, count, batch, -1)
        mean = mean_over_ranks(probs[0].mean(1))
        losses = objective.per_sample(probs, gaps, mean)
        gradient = estimator.estimate(losses.flatten(1), points.directions)
    # The chain rule: this scalar's gradient with respect to the generators is the estimate carried through them.
    loss = (pre.flatten(0, 1) * gradient.to(pre.dtype)).sum() / batch
    return loss, probs[0], gaps[0], gradient.flatten(1).norm(dim=1).mean()


@dataclass
class StudentBatch:
    """What the learner sees in one step; all parts go through it in one pass.

    Attributes:
        images: Synthetic images `(B, c, h, w)` and `probs` the API's responses `(B, C)`, or None.
        probs: See `images`.
        real: Real images `(b, c, h, w)` of the task with `labels` (global) and, if the API is imitated on them, its
            responses `real_probs`; or None.
        labels: See `real`.
        real_probs: See `real`.
        memory: Remembered rows.
        decimals: By task, to which its API rounds; a task that is not there, or with a negative number, not at all.
    """

    images: Tensor | None = None
    probs: Tensor | None = None
    real: Tensor | None = None
    labels: Tensor | None = None
    real_probs: Tensor | None = None
    memory: Sequence[MemoryRows] = ()
    decimals: Mapping[int, int] = field(default_factory=dict)

    def rounded(self, task: int) -> int | None:
        """Decimals to which a task's API rounds."""
        found = self.decimals.get(task, -1)
        return None if found < 0 else found

    def inputs(self) -> list[Tensor]:
        """All images, part by part."""
        parts = [part for part in (self.images, self.real) if part is not None]
        return [*parts, *(rows.images for rows in self.memory)]


@dataclass(frozen=True)
class StudentObjective:
    """Weights and kinds of the learner's losses: L = L_new + real L_real + memory L_mem + similarity L_sim.

    Attributes:
        sets: Classes of the tasks.
        gap: Response gap of synthetic images, new and remembered.
        scenario: What real labels compete with: "til" or "cil".
        cil_target: "masked" or "padded", see `distillation`.
        real: alpha.
        memory: beta.
        similarity: gamma.
        kind: Of the similarity, see `similarity_loss`.
        lwf: Weight of learning without forgetting on the present images.
        derpp: Weight of the squared distance to remembered logits of real images (DER++).
    """

    sets: ClassSets
    gap: ResponseGap
    scenario: str = "til"
    cil_target: str = "masked"
    real: float = 1.0
    memory: float = 1.0
    similarity: float = 1.0
    kind: str = "cka"
    lwf: float = 0.0
    derpp: float = 0.0

    def __call__(
        self, learner: Classifier, previous: Classifier | None, batch: StudentBatch, task: int
    ) -> dict[str, Tensor]:
        """The weighted terms by name, of which the sum is minimised.

        Args:
            learner: In train mode.
            previous: Its frozen copy after the former task, in eval mode; None in the first task.
            batch: What it sees.
            task: The present task.

        Raises:
            ValueError: If there is nothing to learn from.
        """
        inputs = batch.inputs()
        if not inputs:
            raise ValueError("a step of the learner has no images: give real_fraction > 0 or a method that makes some")
        features = learner.features(torch.cat(inputs))
        logits = list(learner.head(features).split([len(part) for part in inputs]))
        terms: dict[str, Tensor] = {}
        if batch.images is not None:
            assert batch.probs is not None
            target = self.cil_target if self.scenario == "cil" else "masked"
            terms["new"] = distillation(
                batch.probs, logits.pop(0), self.sets, task, self.gap, target, batch.rounded(task)
            )
        if batch.real is not None:
            assert batch.labels is not None
            real_logits = logits.pop(0)
            if batch.real_probs is not None:
                share = len(batch.real) / (len(batch.real) + (0 if batch.images is None else len(batch.images)))
                imitated = distillation(
                    batch.real_probs, real_logits, self.sets, task, self.gap, decimals=batch.rounded(task)
                )
                new = terms.get("new", imitated)
                # One mean over synthetic and real images together.
                terms["new"] = (1 - share) * new + share * imitated
            if self.real:
                allowed = self.sets.allowed(batch.labels, self.scenario, task)
                terms["real"] = self.real * masked_cross_entropy(real_logits, batch.labels, allowed)
            if self.lwf and previous is not None:
                with torch.no_grad():
                    old_logits = previous(batch.real)
                terms["lwf"] = self.lwf * learning_without_forgetting(real_logits, old_logits, self.sets, task)
        if batch.memory and self.memory:
            terms["memory"] = self.memory * replay(
                batch.memory, logits, self.sets, task, self.gap, self.scenario, batch.rounded
            )
        if batch.memory and self.derpp:
            terms["derpp"] = self.derpp * _stored_logits(batch.memory, logits)
        if batch.memory and self.similarity and previous is not None and self.kind != "none":
            remembered = sum(len(part) for part in logits)
            known = self.sets.seen(task - 1, features.device)
            with torch.no_grad():
                old_features = previous.features(torch.cat(inputs[len(inputs) - len(logits) :]))
                old_logits = previous.head(old_features)[:, known]
            terms["similarity"] = self.similarity * similarity_loss(
                self.kind, features[-remembered:], old_features, torch.cat(logits)[:, known], old_logits
            )
        return terms


def _stored_logits(rows: Sequence[MemoryRows], logits: Sequence[Tensor]) -> Tensor:
    """Mean squared distance to the logits that were stored with real images."""
    pairs = [(group.responses, scores) for group, scores in zip(rows, logits, strict=True) if group.real]
    if not pairs:
        return logits[0].new_zeros((), dtype=torch.float32)
    stored, now = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    return (now.float() - stored).square().mean()
