"""Which task moves which weight: accumulated updates by task (AU and rAU)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from zoo.adatask.optimizer import AdaTask
from zoo.adatask.slots import JOINT
from zoo.adatask.step_terms import rescaled, step_terms, stepped_with

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from zoo.adatask.task_gradients import TaskGradients

MODES = ("exact", "instant")
DOMINATED = 0.9
"""An element is dominated where one task has more than this share."""
_TINY = 1e-20
_FEWEST = 64
_SPLIT = (SGD, RMSprop, Adagrad, Adam, AdamW)


class TaskDominance:
    """Keeps AU_k <- decay AU_k + (1 - decay) U_k² and rAU_k = AU_k / Σ_j AU_j of shared parameters.

    U_k is what task k adds to a parameter in a step, weight decay left out, so that Σ_k U_k is the change of the
    parameter. `AdaTask` tells its U_k. The step of torch's SGD, RMSprop, Adagrad, Adam and AdamW is linear in the
    gradient once the denominators are fixed, and is split with the tasks' gradients, whatever `.grad` was clipped to:

        gradients = TaskGradients(model.parameters(), ["click", "like"])
        dominance = TaskDominance(optimizer, gradients)
        rows = per_task_grads(losses, gradients.parameters)
        gradients.clear()
        gradients.accumulate(rows, [True, True])
        gradients.write_grad()
        optimizer.step()  # dominance takes note
        dominance.table()

    A parameter is watched from the step on in which a second task reaches it. A task without a gradient in a step of
    the parameter moves it by its old momentum at most; otherwise U_k = 0 and its AU decays. Coupled weight decay goes
    to no task, as does momentum from before the first step that was seen.

    Args:
        optimizer: `AdaTask`, SGD, RMSprop, Adagrad, Adam or AdamW.
        gradients: The tasks' gradients at each step, or a function that returns them; AdaTask has its own.
        names: Names of parameters; those that the optimizer knows, or their numbers, by default.
        decay: Of the average.
        mode: "exact", or "instant", which leaves the momentum of a plain optimizer out: U_k is then the present
            gradient over the present denominator, and nothing needs to happen between sampled steps.
        every_n_steps: Average over every n-th step. With momentum "exact" still follows all of them.
        groups: What makes a layer of the summaries: "module" (a parameter's name up to the last dot), "parameter",
            or a function of the parameter's name.
        device: Where the averages lie, such as "cpu"; beside the parameters by default.
        subsample: Share of each parameter's elements to watch, at least 64 of them.
        seed: Of the choice of these elements.

    Raises:
        ValueError: If an option is out of its range, or `gradients` is missing.
        RuntimeError: If the step of the optimizer cannot be split.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gradients: TaskGradients | Callable[[], TaskGradients] | None = None,
        names: Mapping[Tensor, str] | None = None,
        *,
        decay: float = 0.99,
        mode: str = "exact",
        every_n_steps: int = 1,
        groups: str | Callable[[str], str] = "module",
        device: torch.device | str | None = None,
        subsample: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_sampling(decay, every_n_steps, groups, subsample)
        _check(optimizer, gradients, mode)
        self.optimizer, self.groups, self.every_n_steps = optimizer, groups, every_n_steps
        self.tasks: tuple[str, ...] | None = optimizer.tasks if isinstance(optimizer, AdaTask) else None
        self._options: dict[str, Any] = {"decay": decay, "mode": mode, "subsample": subsample, "seed": seed}
        self._source, self._names = gradients, dict(names or {})
        self._device = None if device is None else torch.device(device)
        self._records: dict[int, _Record] = {}
        self._chosen: dict[int, Tensor] = {}
        self._places: dict[Tensor, int] = {}
        # SGD takes its first gradient undamped.
        self._started = {parameter for parameter, state in optimizer.state.items() if state}
        self._steps = 0
        self._hook: RemovableHandle | None = None
        if isinstance(optimizer, AdaTask):
            self._hook = optimizer.add_update_hook(self._listen)
            self._handles = [
                optimizer.register_step_pre_hook(self._before_adatask),
                optimizer.register_step_post_hook(self._after_adatask),
            ]
        else:
            self._handles = [optimizer.register_step_post_hook(self._after_plain)]

    def close(self) -> None:
        """Let go of the optimizer; what was averaged stays."""
        for handle in [*self._handles, *([self._hook] if self._hook is not None else [])]:
            handle.remove()
        self._handles, self._hook = [], None

    def _before_adatask(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # AdaTask is faster while nobody asks for the updates.
        due = self._steps % self.every_n_steps == 0
        if due and self._hook is None:
            assert isinstance(optimizer, AdaTask)
            self._hook = optimizer.add_update_hook(self._listen)
        elif not due and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_adatask(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert isinstance(optimizer, AdaTask)
        self._steps += not optimizer.gradients.empty

    def _listen(self, parameter: Tensor, updates: Tensor, task_ids: list[int]) -> None:
        if len(task_ids) > 1 and JOINT not in task_ids:
            place = self._place(parameter)
            self.observe(parameter, torch.stack([self._select(place, update) for update in updates]), task_ids)

    @torch.no_grad()
    def _after_plain(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return  # a fused kernel has left everything alone
        groups = [group for group in optimizer.param_groups if group.get("shared", True)]
        stepped = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
        if not stepped:
            return
        gradients = self._source() if callable(self._source) else self._source
        assert gradients is not None
        if gradients.empty:
            raise RuntimeError("the optimizer made a step without gradients by task: call accumulate() before step()")
        self._meet(gradients.names)
        due = self._steps % self.every_n_steps == 0
        self._steps += 1
        if not due and self._options["mode"] == "instant":
            return
        index = {parameter: i for i, parameter in enumerate(gradients.parameters)}
        # Fused optimizers keep their clocks on the device: read all of them before more work is queued there.
        clocks = [float(optimizer.state[parameter].get("step", 0)) for _, parameter in stepped]
        for (group, parameter), clock in zip(stepped, clocks, strict=True):
            if parameter not in index:
                raise RuntimeError(f"the gradients by task leave out {self._name(self._place(parameter))}")
            found = [row[index[parameter]] for row in gradients.rows]
            self._split(group, parameter, clock, found, due)

    def _split(
        self, group: dict[str, Any], parameter: Tensor, clock: float, found: Sequence[Tensor | None], due: bool
    ) -> None:
        """Attribute the step that a plain optimizer has just made."""
        state, place = self.optimizer.state[parameter], self._place(parameter)
        record = self._records.setdefault(place, _Record())
        fresh = record.moments is None and parameter not in self._started
        record.ids += [k for k, g in enumerate(found) if g is not None and k not in record.ids]
        if not record.ids:
            return
        terms = step_terms(self.optimizer, group, lambda name: self._select(place, state[name]), clock, fresh)
        if self._options["mode"] == "instant":
            terms = terms._replace(decay=0.0, gain=1.0, through=0.0, direct=1.0)
        if not terms.decay and (len(record.ids) < 2 or not due):
            return
        gradient = stepped_with(self.optimizer, group, parameter, state)
        joint = self._select(place, gradient)
        x = joint.new_zeros(len(record.ids), len(joint))
        for slot, k in enumerate(record.ids):
            own = found[k]
            if own is not None:
                x[slot] = self._select(place, gradient if own is parameter.grad else own)
        x = rescaled(x, joint, torch.finfo(gradient.dtype).eps)
        if terms.before and terms.denominator is not None:
            x = x / terms.denominator
        moment = terms.gain * x
        if terms.decay:
            record.moments = moment = _padded(record.moments, x).mul_(terms.decay).add_(moment)
        if due and len(record.ids) > 1:
            update = -terms.lr * (terms.through * moment + terms.direct * x)
            if not terms.before and terms.denominator is not None:
                update /= terms.denominator
            self.observe(parameter, update, record.ids)

    def observe(self, parameter: Tensor, updates: Tensor, task_ids: Sequence[int]) -> None:
        """Average the squares of a step's updates; called at every n-th step for each parameter that tasks share.

        Args:
            parameter: The parameter.
            updates: `(slots, elements)`, what each task added to the elements that are watched.
            task_ids: Tasks of the slots.
        """
        record = self._records.setdefault(self._place(parameter), _Record())
        record.ids += [k for k in task_ids if k not in record.ids]
        if record.ids != list(task_ids):
            ordered = updates.new_zeros(len(record.ids), updates.shape[1])
            ordered[[record.ids.index(k) for k in task_ids]] = updates
            updates = ordered
        average, decay = _padded(record.averages, updates), self._options["decay"]
        record.averages = average.mul_(decay).addcmul_(updates, updates, value=1 - decay)

    def _place(self, parameter: Tensor) -> int:
        if parameter not in self._places:
            self._places = {p: i for i, p in enumerate(_parameters(self.optimizer))}
        return self._places[parameter]

    def _name(self, place: int) -> str:
        names = [name for group in self.optimizer.param_groups
                 for name in group.get("param_names", [None] * len(group["params"]))]  # fmt: skip
        return self._names.get(_parameters(self.optimizer)[place]) or names[place] or f"parameter {place}"

    def _layer(self, place: int) -> str:
        name = self._name(place)
        if callable(self.groups):
            return self.groups(name)
        return name if self.groups == "parameter" else name.rpartition(".")[0] or name

    def _select(self, place: int, tensor: Tensor) -> Tensor:
        """The watched elements `(elements,)`, where they are averaged."""
        flat, share = tensor.flatten(), self._options["subsample"]
        if share < 1:
            if place not in self._chosen:
                generator = torch.Generator().manual_seed(self._options["seed"] * 1_000_003 + place)
                count = min(len(flat), max(_FEWEST, round(share * len(flat))))
                chosen = torch.randperm(len(flat), generator=generator)[:count].sort().values
                self._chosen[place] = chosen.to(flat.device)
            flat = flat[self._chosen[place]]
        return flat.to(self._device or flat.device, torch.promote_types(flat.dtype, torch.float32))

    def _meet(self, tasks: Sequence[str]) -> None:
        if self.tasks is not None and self.tasks != tuple(tasks):
            raise ValueError(f"the averages are of the tasks {', '.join(self.tasks)}, not of {', '.join(tasks)}")
        self.tasks = tuple(tasks)

    def rau(self, parameter: Tensor) -> Tensor:
        """Share of each task in a parameter, `(tasks, *shape)`, or `(tasks, elements)` of those that are watched.

        A task that does not reach the parameter has share 0; all are NaN where nothing has moved (Σ AU <= 1e-20).

        Raises:
            ValueError: If no two tasks have reached the parameter so far.
        """
        place = self._place(parameter)
        record = self._records.get(place, _Record())
        if record.averages is None or self.tasks is None:
            raise ValueError(f"{self._name(place)} has not been moved by two tasks so far")
        everything = record.averages.sum(0)
        shares = torch.zeros_like(everything).repeat(len(self.tasks), 1)
        shares[record.ids] = record.averages
        shares = torch.where(everything > _TINY, shares / everything, torch.nan)
        return shares if self._options["subsample"] < 1 else shares.view(-1, *parameter.shape)

    def _summaries(self) -> dict[str, _Layer]:
        parameters = _parameters(self.optimizer)
        pieces: dict[str, list[_Layer]] = {}
        for place, record in sorted(self._records.items()):
            if record.averages is None:
                continue
            shares = self.rau(parameters[place]).flatten(1)
            shares = shares[:, ~shares[0].isnan()]
            entropy = torch.special.entr(shares).sum(0) / math.log(len(record.ids))
            pieces.setdefault(self._layer(place), []).append(_Layer(shares, entropy, record.ids))
        return {
            name: _Layer(
                torch.cat([part.shares for part in parts], 1),
                torch.cat([part.entropy for part in parts]),
                sorted({k for part in parts for k in part.reached}),
            )
            for name, parts in pieces.items()
            if any(len(part.entropy) for part in parts)
        }

    def table(self) -> list[dict[str, Any]]:
        """One row per layer and task that reaches it, in the order of the parameters; none where nothing has moved.

        Returns:
            Rows with `layer`, `task`, `mean` and `median` of rAU over the elements, and, equal for all tasks of a
            layer, `dominated` (share of elements in which one task has more than 0.9), `entropy` (mean of
            -Σ_k rAU_k log rAU_k over the logarithm of the number of tasks; 1 is balance) and `elements`.
        """
        rows: list[dict[str, Any]] = []
        for name, layer in self._summaries().items():
            assert self.tasks is not None
            common = {
                "dominated": _mean(layer.shares.amax(0) > DOMINATED),
                "entropy": _mean(layer.entropy),
                "elements": len(layer.entropy),
            }
            for k in layer.reached:
                own = layer.shares[k]
                # torch's median is the lower one of two.
                median = float(own.median() - (-own).median()) / 2
                rows.append({"layer": name, "task": self.tasks[k], "mean": _mean(own), "median": median, **common})
        return rows

    def histograms(self, bins: int = 20) -> dict[str, list[int]]:
        """Elements of each layer by rAU of the first of two tasks, or by the largest rAU of more, in [0, 1]."""
        found = {}
        for name, layer in self._summaries().items():
            values = layer.shares[0] if len(layer.shares) == 2 else layer.shares.amax(0)
            places = (values * bins).long().clamp(max=bins - 1)
            found[name] = torch.bincount(places, minlength=bins).tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Averages and first moments by the parameters' positions in the optimizer: plain values and tensors."""
        records = {
            place: {"ids": list(record.ids), "averages": record.averages, "moments": record.moments}
            for place, record in self._records.items()
        }
        tasks = None if self.tasks is None else list(self.tasks)
        return {"options": dict(self._options), "tasks": tasks, "steps": self._steps, "records": records}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If the state was made with other options, for other tasks or for other parameters.
        """
        options = state_dict["options"]
        differing = [f"{k}={options.get(k)!r}, not {v!r}" for k, v in self._options.items() if options.get(k) != v]
        if differing:
            raise ValueError(f"the averages were made with {'; '.join(differing)}")
        if state_dict["tasks"] is not None:
            self._meet(state_dict["tasks"])
        parameters, records = _parameters(self.optimizer), {}
        for place, saved in state_dict["records"].items():
            expected = self._select(place, parameters[place].detach()) if place < len(parameters) else None
            kept = {name: saved[name] for name in ("averages", "moments") if saved[name] is not None}
            if expected is None or any(value.shape[1] != len(expected) for value in kept.values()):
                raise ValueError(f"the averages hold a parameter {place} that this optimizer does not have so")
            moved = {name: value.to(expected.device, expected.dtype, copy=True) for name, value in kept.items()}
            records[place] = _Record(list(saved["ids"]), moved.get("averages"), moved.get("moments"))
        self._records, self._steps = records, state_dict["steps"]


class _Record:
    """Of one parameter: its tasks, their averages and their first moments `(slots, elements)`."""

    def __init__(
        self, ids: list[int] | None = None, averages: Tensor | None = None, moments: Tensor | None = None
    ) -> None:
        self.ids, self.averages, self.moments = ids or [], averages, moments


class _Layer(NamedTuple):
    """Shares `(tasks, elements)`, normalised entropy `(elements,)` and the tasks that reach the layer."""

    shares: Tensor
    entropy: Tensor
    reached: list[int]


def _padded(kept: Tensor | None, like: Tensor) -> Tensor:
    """What was kept so far, with zeros for new slots."""
    if kept is None:
        return torch.zeros_like(like)
    return torch.cat([kept, torch.zeros_like(like[len(kept) :])]) if len(kept) < len(like) else kept


def _mean(values: Tensor) -> float:
    return float(values.mean(dtype=torch.float64))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check(optimizer: Optimizer, gradients: object, mode: str) -> None:
    name, adatask = type(optimizer).__name__, isinstance(optimizer, AdaTask)
    # A subclass may step otherwise.
    if not adatask and type(optimizer) not in _SPLIT:
        known = ", ".join(cls.__name__ for cls in _SPLIT)
        raise RuntimeError(f"the step of {name} cannot be split by task: use AdaTask, or one of torch's {known}")
    if any(parameter.is_complex() for parameter in _parameters(optimizer)):
        raise RuntimeError("complex parameters cannot be watched")
    if not adatask and gradients is None:
        raise ValueError(f"the step of {name} is split with the tasks' gradients: pass gradients=TaskGradients(...)")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if adatask and mode == "instant":
        raise ValueError("mode='instant' is for plain optimizers; AdaTask tells its updates as they are")


def check_sampling(decay: float, every_n_steps: int, groups: object, subsample: float) -> None:
    """Raise a ValueError if an option of `TaskDominance` is out of its range."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if every_n_steps < 1:
        raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
    if not 0 < subsample <= 1:
        raise ValueError(f"subsample must be in (0, 1], got {subsample}")
    if not callable(groups) and groups not in ("module", "parameter"):
        raise ValueError(f"groups must be 'module', 'parameter' or a function of a name, got {groups!r}")
