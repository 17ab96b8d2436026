"""An iteration of the stream: rounds of the generators, steps of the learner, and what a task leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.api_cl.game import StudentBatch, generator_round
from zoo.api_cl.options import learning_rate_factor
from zoo.api_cl.stream_state import StreamState
from zoo.api_cl.student_objective import fisher_diagonal
from zoo.common.evaluation import evaluation
from zoo.common.reproducibility import mix, run_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from zoo.api_cl.game import StudentObjective
    from zoo.api_cl.generator_objective import GeneratorObjective
    from zoo.api_cl.networks import Classifier


class StreamTraining(StreamState):
    """Trains generators and learner; `APIStreamCL` sets what is declared here.

    Attributes:
        previous: Frozen copy of the learner after the former task.
        generators: None, one or two.
        generator_objective: What they minimise.
        student_objective: What the learner minimises.
        method: See `METHODS`.
        asks: Whether the method asks APIs.
        fisher: Of "ewc": weights' importance, flat.
        anchor: Of "ewc": weights after the former task, flat.
    """

    learner: Classifier
    previous: Classifier
    generators: nn.ModuleList
    generator_objective: GeneratorObjective
    student_objective: StudentObjective
    method: str
    scenario: str
    asks: bool
    distill_real: bool
    store_real: bool
    reuse_base: bool
    memory_size: int
    memory_batch_size: int
    generator_batch_size: int
    student_batch_size: int
    generator_steps: int
    student_steps: int
    latent_dim: int
    image_shape: list[int]
    optimizer_name: str
    schedule: str
    lr: float
    generator_lr: float
    weight_decay: float
    clip_norm: float | None
    ewc_weight: float
    fisher: Tensor
    anchor: Tensor
    seed: int | None
    _rng: torch.Generator
    _columns: Tensor

    def _iterate(self, batch: Any, task: int, step: int) -> Tensor:
        assert self.iterations is not None
        factor = learning_rate_factor(self.schedule, step, self.iterations)
        optimizers = self._optimizers()
        *generator_optimizers, student_optimizer = optimizers
        for optimizer, rate in zip(optimizers, self._rates(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        self.learner.train()
        self.previous.eval()
        self.generators.train()
        base: tuple[Tensor, Tensor] | None = None
        if self.generators and self.method != "frozen_generator":
            for _ in range(self.generator_steps):
                base = self._generator_step(generator_optimizers)
        synthetic = [self._synthetic(base if number == 0 else None) for number in range(self.student_steps)]
        real = self._real_parts(batch, task)
        loss = torch.zeros((), device=self.device)
        for number in range(self.student_steps):
            last = number == self.student_steps - 1
            loss = self._student_step(synthetic[number], real[number], task, student_optimizer, last)
        if self.asks and 3 * step >= self.iterations:
            for images, probs in synthetic:
                self.memory.offer(images, probs, task, self._rng)
        self._share_statistics()
        self.history.setdefault("loss", []).append(loss.cpu())
        return loss

    @torch.no_grad()
    def _share_statistics(self) -> None:
        """Give all processes the same running statistics: DDP does not, under manual optimization."""
        found = (*self.learner.buffers(), *self.generators.buffers())
        buffers = [buffer for buffer in found if buffer.is_floating_point()]
        if self.world > 1 and buffers:
            for buffer, mean in zip(buffers, self._means_over_ranks(buffers), strict=True):
                buffer.copy_(mean)

    def _generator_step(self, optimizers: Sequence[Optimizer]) -> tuple[Tensor, Tensor]:
        session = self.session
        assert session is not None
        noise = self._noise(self.generator_batch_size)
        found = generator_round(
            list(self.generators), noise, self.learner, self._columns, session.ask, self.generator_objective,
            session.gap, mode=session.gen_grad, estimator=session.estimator, differentiable=session.differentiable,
            decimals=session.decimals, rng=self._rng, mean_over_ranks=self._mean_over_ranks,
        )  # fmt: skip
        self._descend(found.loss, list(self.generators.parameters()))
        for optimizer in optimizers:
            optimizer.step()
        for name, value in found.report.items():
            self.log(f"train/generator/{name}", value, batch_size=1)
            self.history.setdefault(name, []).append(value.detach().cpu())
        return found.images, found.probs

    @torch.no_grad()
    def _synthetic(self, base: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Images and responses for a step of the learner; without an API, none."""
        if not self.asks:
            return torch.empty(0), torch.empty(0)
        assert self.session is not None
        if base is not None and self.reuse_base:
            return base
        size = self.student_batch_size
        with torch.autocast(self.device.type, enabled=False):
            if self.generators:
                count = len(self.generators)
                shares = [size // count + (place < size % count) for place in range(count)]
                images = torch.cat(
                    [generator(self._noise(n)) for generator, n in zip(self.generators, shares, strict=True)]
                ).tanh()
            else:
                shape = (size, *self.image_shape)
                images = torch.randn(*shape, generator=self._rng, device=self.device).tanh()
        return images, self.session.ask(images, "student")

    def _real_parts(self, batch: Any, task: int) -> list[tuple[Tensor, Tensor, Tensor | None] | None]:
        """The batch's real images, shared out among the learner's steps."""
        if batch.images is None:
            if not self.asks:
                raise ValueError(f"method={self.method} learns from real images: set --data.real_fraction above 0")
            return [None] * self.student_steps
        images, labels = batch.images.float(), batch.labels
        session = self.session
        ask = (lambda rows: session.ask(rows, "real")) if self.distill_real and session is not None else None
        probs = self.real.add(images, labels, ask)
        parts: list[tuple[Tensor, Tensor, Tensor | None] | None] = []
        for rows in torch.arange(len(images), device=images.device).tensor_split(self.student_steps):
            one = rows if len(rows) else rows.new_zeros(1)
            parts.append((images[one], labels[one], None if probs is None else probs[one]))
        return parts

    def _student_step(
        self,
        synthetic: tuple[Tensor, Tensor],
        real: tuple[Tensor, Tensor, Tensor | None] | None,
        task: int,
        optimizer: Optimizer,
        last: bool,
    ) -> Tensor:
        seen = StudentBatch(memory=self._remembered(), decimals=self.precisions)
        if len(synthetic[0]):
            seen.images, seen.probs = synthetic
        if real is not None:
            seen.real, seen.labels, seen.real_probs = real
        previous = self.previous if task > 0 else None
        terms = self.student_objective(self.learner, previous, seen, task)
        if self.ewc_weight and task > 0:
            flat = torch.cat([parameter.flatten() for parameter in self.learner.parameters()])
            terms["ewc"] = 0.5 * self.ewc_weight * (self.fisher * (flat - self.anchor).square()).sum()
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        self._descend(loss, list(self.learner.parameters()))
        # The Trainer counts the last step only: one of its steps is an iteration.
        if last:
            wrapped = self.optimizers()
            (wrapped[-1] if isinstance(wrapped, list) else wrapped).step()
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=1)
        else:
            optimizer.step()
        return loss.detach()

    def _remembered(self) -> list[Any]:
        if not len(self.memory):
            return []
        n = self.memory_batch_size
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self._rng, device=self.device)))
        rows = self.memory.sample(n, draw)
        return rows + self.memory.sample(n, draw, real=True)

    def _descend(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Set the gradients, averaged over the processes."""
        # Not manual_backward: DDP's hooks would wait for the parameters of the other networks.
        with torch.autocast(self.device.type, enabled=False):
            # A backward pass takes the precision of its forward pass, and no other on top.
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = [
            torch.zeros_like(p) if gradient is None else gradient
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        if self.world > 1:
            found = self._means_over_ranks(found)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def _mean_over_ranks(self, tensor: Tensor) -> Tensor:
        if self.world == 1:
            return tensor
        mean: Tensor = self.trainer.strategy.reduce(tensor.clone(), reduce_op="mean")
        return mean

    def _means_over_ranks(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor, in one exchange."""
        flat = self._mean_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def _noise(self, size: int) -> Tensor:
        return torch.randn(size, self.latent_dim, generator=self._rng, device=self.device)

    @torch.no_grad()
    def _close_task(self, task: int) -> None:
        if self.store_real and self.memory_size and len(self.real):
            images, labels, _ = self.real.tensors(self.device)
            self.memory.add_real(images, labels, task, self._rng, self._stored(images))
        if self.memory_size:
            self.memory.close_task(task)
        if self.ewc_weight:
            self._consolidate(task)
        if self.generators:
            for number, images in enumerate(self.generate(16)):
                self.samples[f"{task}/{'AB'[number]}"] = images.cpu()
        self.session = None

    @torch.no_grad()
    def generate(self, n: int, which: str = "both") -> list[Tensor]:
        """Images `(n, c, h, w)` in [-1, 1] of generator "A", "B", or of "both".

        Raises:
            ValueError: If there is no such generator.
        """
        names = "AB"[: len(self.generators)]
        if not names or which not in ("both", *names):
            raise ValueError(f"which must be one of both, {', '.join(names)}, got {which!r}")
        rng = torch.Generator(self.device).manual_seed(mix(run_seed(self.seed), n))
        noise = torch.randn(n, self.latent_dim, generator=rng, device=self.device)
        made = []
        for name, generator in zip(names, self.generators, strict=True):
            if which in ("both", name):
                with evaluation(generator):
                    made.append(generator(noise).tanh())
        return made

    def _stored(self, images: Tensor) -> Tensor | None:
        """What is kept with real images: for dark experience replay the learner's logits."""
        if not self.student_objective.derpp:
            return None
        with evaluation(self.learner):
            return torch.cat([self.learner(part) for part in torch.split(images, 256)]).float()

    def _consolidate(self, task: int) -> None:
        """Note which weights matter: the Fisher information of the task's real images, added to that of the others."""
        images, labels, _ = self.real.tensors(self.device)
        images, labels = images[:512], labels[:512]
        allowed = self.sets.allowed(labels, self.scenario, task)
        with torch.enable_grad(), evaluation(self.learner):
            found = fisher_diagonal(self.learner, images, labels, allowed)
        self.fisher += self._mean_over_ranks(torch.cat([part.flatten() for part in found.values()]))
        self.anchor.copy_(torch.cat([parameter.flatten() for parameter in self.learner.parameters()]))

    def configure_optimizers(self) -> list[Optimizer]:
        """One Adam for each generator, and the learner's optimizer."""
        found: list[Optimizer] = [
            torch.optim.Adam(generator.parameters(), lr=self.generator_lr) for generator in self.generators
        ]
        if self.optimizer_name == "sgd":
            learner = torch.optim.SGD(
                self.learner.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.weight_decay
            )
            return [*found, learner]
        return [*found, torch.optim.Adam(self.learner.parameters(), lr=self.lr, weight_decay=self.weight_decay)]

    def _optimizers(self) -> list[Optimizer]:
        wrapped = self.optimizers(use_pl_optimizer=False)
        return list(wrapped) if isinstance(wrapped, list) else [wrapped]

    def _rates(self) -> list[float]:
        return [self.generator_lr] * len(self.generators) + [self.lr]
