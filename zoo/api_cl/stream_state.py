"""What a stream carries from batch to batch, and into checkpoints: task, memory, real images, queries, matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed

from zoo.api_cl.real_images import RealImages
from zoo.api_cl.stream_evaluation import KINDS, StreamEvaluation

if TYPE_CHECKING:
    from zoo.api_cl.api_session import APISession
    from zoo.api_cl.ledger import QueryLedger
    from zoo.api_cl.memory import ReplayMemory

_FIELDS = ("task", "iterations", "done", "exhausted", "decimals", "precisions")


class StreamState(StreamEvaluation):
    """The state of a stream.

    Attributes:
        ledger: Rows asked, by API and purpose.
        memory: Images of past tasks.
        real: Real images of the present task.
        task: The present task, or the last one; None before the first.
        iterations: Iterations that the task may have.
        done: Iterations that it had.
        exhausted: Whether its budget ended it.
        decimals: To which its API rounds, as a probe found; -1 for not at all.
        precisions: The same for all tasks so far.
    """

    ledger: QueryLedger
    memory: ReplayMemory
    task: int | None = None
    iterations: int | None = None
    done: int = 0
    exhausted: bool = False
    decimals: int | None = None

    def start_state(self, ledger: QueryLedger, memory: ReplayMemory) -> None:
        """Begin with nothing learnt."""
        self.ledger, self.memory, self.real = ledger, memory, RealImages()
        self.session: APISession | None = None
        self.precisions: dict[int, int] = {}
        self.resumed = False
        self._of_ranks: list[dict[str, Any]] | None = None

    @property
    def last_task(self) -> int:
        """The last task that is, or was, learnt; the first if none was."""
        return self.task or 0

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.trainer.world_size) if self._trainer is not None else 1

    def extra_scores(self) -> dict[str, float]:
        """Rows asked, over all processes."""
        return {"test/queries": float(self.asked())} if self.ledger.summary() else {}

    def asked(self) -> int:
        """Rows asked so far, over all processes. All of them must call it."""
        spent = torch.tensor(float(self.ledger.spent()), dtype=torch.float64)
        if self.world > 1 and self._of_ranks is None:
            distributed.all_reduce(spent)
        elif self._of_ranks is not None:
            spent = torch.tensor(float(sum(_rows(state["ledger"]) for state in self._of_ranks)))
        return int(spent)

    def _own_state(self) -> dict[str, Any]:
        return {
            "ledger": self.ledger.state_dict(),
            "memory": self.memory.state_dict(),
            "real": self.real.state_dict(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the state of all processes."""
        own = self._own_state()
        states: list[Any] = [own]
        if self.world > 1:
            states = [None] * self.world
            distributed.all_gather_object(states, own)
        checkpoint["stream"] = {
            "ranks": states,
            "fields": {name: getattr(self, name) for name in _FIELDS},
            "matrices": {kind: self.matrices[kind].state_dict() for kind in KINDS},
            "fidelity": dict(self.fidelity),
            "history": {name: torch.stack(values) for name, values in self.history.items() if values},
            "samples": dict(self.samples),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the state over; that of the processes when training goes on."""
        state = checkpoint.get("stream")
        if state is None:
            return
        for name in _FIELDS:
            setattr(self, name, state["fields"][name])
        for kind in KINDS:
            self.matrices[kind].load_state_dict(state["matrices"][kind])
        self.fidelity, self.samples = dict(state["fidelity"]), dict(state["samples"])
        self.history = {name: list(values) for name, values in state["history"].items()}
        self._of_ranks = state["ranks"]
        self.session = None
        if self._trainer is None or self.trainer.state.fn != "fit":
            # The first process's part, whatever the number of processes was: nothing is added to it.
            self.memory.size = int(self._of_ranks[0]["memory"]["size"])
            self._take(self._of_ranks[0])

    def on_fit_start(self) -> None:
        """Give each process its own part of a restored state.

        Raises:
            ValueError: If the run was made by another number of processes.
        """
        if self._of_ranks is not None:
            if len(self._of_ranks) != self.world:
                raise ValueError(
                    f"the checkpoint is of a run with {len(self._of_ranks)} processes, each with a memory of its own: "
                    f"it cannot go on with {self.world}. Set --trainer.devices {len(self._of_ranks)}."
                )
            self._take(self._of_ranks[self.global_rank])
            self._of_ranks, self.resumed = None, True
        self.memory.to(self.device)

    def _take(self, state: dict[str, Any]) -> None:
        self.ledger.load_state_dict(state["ledger"])
        self.memory.load_state_dict(state["memory"])
        self.real.load_state_dict(state["real"])


def _rows(state: dict[str, Any]) -> int:
    return sum(rows for purposes in state["rows"].values() for rows in purposes.values())
