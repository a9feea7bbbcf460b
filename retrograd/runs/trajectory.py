"""Run, resume, replay: THE loop. A trajectory is a training, the states kept from it, and how to come back.

Durable are: every state file, the final state, the digests of all states, and in reverse the cotangent with the scores
so far. After a kill the forward run goes on from the highest state file and the reverse sweep from its last durable
cotangent, by a plan over the states that survived. The bits are the same because replay is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from retrograd.core import plan as plans
from retrograd.core import tree
from retrograd.core.optim import Cotangent
from retrograd.core.step import State, Training
from retrograd.core.sweep import Advanced, Event, Leavings, Ledger, Reversed, Turned, accumulate, seed_cotangent, sweep
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_lines, read_tensors, write_tensors
from retrograd.runs.store import Store

__all__ = ["Layout", "Replay", "Trajectory", "layout"]


@dataclass(frozen=True)
class Replay:
    """How states are kept.

    Args:
        plan: "auto" (all states if they fit, else binomial), or a kind of `plans.make`.
        memory, disk: Bytes that held states may take. With disk, memory takes up to two states more: one on its way
            to disk, one read ahead.
        interval: Distance between held states of the "interval" plan.
        slots: States held by the "binomial" plan; as many as fit when None.
        keep: Leave the states of the forward run on disk.
        heartbeat: Seconds between durable resume points; 0 makes one at every step.
    """

    plan: str = "auto"
    memory: int = 1 << 62
    disk: int = 0
    interval: int | None = None
    slots: int | None = None
    keep: bool = False
    heartbeat: float = 60.0


@dataclass(frozen=True)
class Layout:
    """A plan with where its slots are."""

    kind: str
    plan: plans.Plan
    cost: plans.Cost
    on_disk: int
    state_bytes: int


def layout(replay: Replay, steps: int, state_bytes: int) -> Layout:
    """Choose the plan for a run and check that its states fit.

    Raises:
        ValueError: If they do not, with what would.
    """
    in_memory, on_disk = replay.memory // max(1, state_bytes), replay.disk // max(1, state_bytes)
    # kept states stay on disk, and the way back holds at most all but the initial one again, in memory
    fit = min(on_disk + 1, in_memory + 1) if replay.keep else in_memory + on_disk
    kind = replay.plan
    if kind == "auto":
        kind = "all" if steps <= (on_disk + 1 if replay.keep else fit) else "binomial"
    slots = replay.slots or max(1, min(fit, steps))
    plan = plans.make(kind, steps, slots=slots, every=replay.interval)
    cost = plans.check(plan, steps)
    forward = plan[: next(i for i, action in enumerate(plan) if isinstance(action, plans.Turn))]
    kept = sum(isinstance(action, plans.Snapshot) for action in forward) - 1 if replay.keep else 0
    needed = kept if replay.keep else cost.slots
    if needed > (on_disk if replay.keep else fit):
        where = (
            f"--replay.disk {replay.disk:,}" if replay.keep else f"memory {replay.memory:,} and disk {replay.disk:,}"
        )
        raise ValueError(
            f"plan {kind!r} holds {needed} states of {state_bytes:,} bytes, and {where} bytes hold {fit}. Raise "
            "--replay.memory or --replay.disk, or use --replay.plan auto."
        )
    return Layout(kind, plan, cost, steps if replay.keep else max(0, cost.slots - in_memory), state_bytes)


class Trajectory:
    """One run of a training with the states kept from it.

    Args:
        training: Recipe, engine, stream and data weights.
        initial: State 0.
        replay: Which states are kept, and where.
        folder: For durable states; None keeps all in memory, and a kill loses the run.
        identity: Hash of what the run is made of; state files of another are refused.
        observe: Called with every event.
    """

    def __init__(
        self,
        training: Training,
        initial: State,
        replay: Replay | None = None,
        folder: Path | None = None,
        identity: str = "",
        observe: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.training, self.initial, self.folder, self.observe = training, initial, folder, observe
        self.replay = replay or Replay()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.steps = len(training.stream)
        self.layout = layout(self.replay, self.steps, tree.nbytes(initial))
        self.ledger = Ledger(self._digests())
        self.left = Leavings.of(training, initial)
        self.store = Store(initial, folder, identity, self.layout.on_disk, self.ledger.digests)
        self._pending: tuple[plans.Plan, State] | None = None  # the plan past its Turn, and the working state
        self._final: State | None = None
        self._beat = time.monotonic()
        self._extra: set[int] = set()  # state files that are resume points and no slot

    def train(self) -> State:
        """The final state: trained, resumed from the highest durable state, or read if training is done."""
        if self.folder and (self.folder / "final.safetensors").exists():
            self.store.kept = set(self.store.durable()) if self.replay.keep else set()
            self._final = self._read_final()
            return self._final
        actions = self._forward_plan()
        turn = next(i for i, action in enumerate(actions) if isinstance(action, plans.Turn)) + 1
        state, final = self.initial, None
        if self.replay.keep:
            self.store.kept = {a.step for a in actions[:turn] if isinstance(a, plans.Snapshot)} | set(
                self.store.durable()
            )
        self.store.follow(actions[:turn])
        for event in sweep(actions[:turn], self.training, self.store, self.ledger, self.left, state=state):
            if isinstance(event, Turned):
                final = event.outcome.state
                self.observe(event)
                self._record(final)
            elif isinstance(event, Advanced):
                state = event.outcome.state
                self.observe(event)  # first: a step with a durable digest counts as told when a run resumes
                self._record(state)
                self._forward_heartbeat(state)
        assert final is not None, "a forward plan ends with its Turn"
        if self.replay.keep:
            self.store.on_disk = 0  # the way back holds its states in memory
        if state.step != self.steps - 1:  # resumed at the last state itself
            state = self.store.get(self.steps - 1)
        self._pending = (actions[turn:], state)
        self.store.settle()  # a final state on disk says that all the others are
        self._write_final(final)
        self._final = final
        return final

    def reverse(self, gradient: dict[str, Tensor], key: str = "", *, curvature: bool = False) -> Tensor:
        """Scores [K, *weights.shape] for the query gradients [K, *shape], from the last durable cotangent if any.

        Args:
            key: Tells this sweep's durable cotangent from another query's.
            curvature: Estimate the preconditioned Hessian's largest eigenvalue on the way; see `sweep`.
        """
        gradient = {name: gradient[name] for name in self.initial.params}  # files have their own order
        queries = next(iter(gradient.values())).shape[0]
        cotangent = seed_cotangent(gradient, self.initial)
        weights = self.training.weights
        scores = torch.zeros((queries, *weights.shape), dtype=weights.dtype)
        cotangent, scores, left = self._read_reverse(cotangent, scores, key)
        actions, state = self._reverse_plan(left)
        self._beat = time.monotonic()
        self.store.follow(actions)
        events = sweep(
            actions, self.training, self.store, self.ledger, self.left, state=state, cotangent=cotangent,
            after=self._final, curvature=curvature,
        )  # fmt: skip
        self._final = None
        del gradient, cotangent, state  # the sweep's alone: it lets go of each as soon as it can
        for event in events:
            if isinstance(event, Reversed):
                accumulate(scores, event)
                self._reverse_heartbeat(event, scores, key)
            self.observe(event)
            del event  # or its cotangent would outlast the next step
        return scores

    def reverse_steps_left(self, key: str = "") -> int:
        """Steps still to be pulled back, by the durable cotangent."""
        path = self._reverse_path(key)
        return int(read_tensors(path)[1]["step"]) if path is not None and path.exists() else self.steps

    def clean(self, key: str = "") -> None:
        """Remove what only a resume would need; the final state stays, and the forward states if they are kept."""
        if self.folder is None:
            return
        for step in self.store.durable():
            if not self.replay.keep:
                self.store.remove(step)
        for file in self.folder.glob(".state-*.tmp"):  # a kill came while it was written
            file.unlink()
        self.clean_reverse(key)

    def clean_reverse(self, key: str = "") -> None:
        """Remove the durable cotangent of a finished sweep."""
        path = self._reverse_path(key)
        if path is not None:
            path.unlink(missing_ok=True)

    def _reverse_path(self, key: str) -> Path | None:
        return self.folder / f"reverse{'-' if key else ''}{key}.safetensors" if self.folder else None

    def _forward_plan(self) -> plans.Plan:
        durable = self.store.durable()
        if not durable:
            return self.layout.plan
        return self._resumed(self.steps, turn=True)

    def _reverse_plan(self, left: int) -> tuple[Iterable[plans.Action], State | None]:
        if left == 0:
            return (), None
        if self._pending is not None and left == self.steps:
            actions, state = self._pending
            self._pending = None
            return actions, state
        return self._resumed(left, turn=False), None

    def _resumed(self, steps: int, *, turn: bool) -> plans.Plan:
        """A plan over the states that survived, with what room the budgets leave."""
        held = [0, *(t for t in self.store.durable() if t < steps)]
        in_memory = self.replay.memory // max(1, self.layout.state_bytes)
        free = max(0, min(in_memory, steps) - 1)
        self.store.on_disk = 0
        self.store.held = list(held)
        return plans.resumed(steps, held, free, turn=turn)

    def _record(self, state: State) -> None:
        if self.folder and state.step not in self._known:
            append_line(self.folder / "digests.txt", f"{state.step} {self.ledger.digests[state.step]}")
            self._known.add(state.step)

    def _digests(self) -> dict[int, str]:
        pairs = [line.split() for line in read_lines(self.folder / "digests.txt")] if self.folder else []
        found = {int(step): digest for step, digest in pairs}
        self._known = set(found)
        return found

    def _due(self) -> bool:
        if self.folder is None or time.monotonic() - self._beat < self.replay.heartbeat:
            return False
        self._beat = time.monotonic()
        return True

    def _forward_heartbeat(self, state: State) -> None:
        """Make the state durable; of these resume points only the last is kept."""
        if not self._due() or self.store.has(state.step):
            return
        self.store.save(state, instead_of=self._extra - set(self.store.held))
        self._extra = {state.step}

    def _reverse_heartbeat(self, event: Reversed, scores: Tensor, key: str) -> None:
        path = self._reverse_path(key)
        if path is None or not self._due():
            return
        tensors = {**tree.named(event.cotangent), "scores": scores}
        digest = tree.digest((event.cotangent, scores))
        metadata = {"step": str(event.step), "identity": self.store.identity, "digest": digest}
        write_tensors(path, tensors, metadata)
        if not self.replay.keep:
            for step in self.store.durable():
                if step >= event.step and step not in self.store.held:
                    self.store.remove(step)

    def _read_reverse(self, cotangent: Cotangent, scores: Tensor, key: str) -> tuple[Cotangent, Tensor, int]:
        """The last durable cotangent, scores and steps left; or those given, and all."""
        path = self._reverse_path(key)
        if path is None or not path.exists():
            return cotangent, scores, self.steps
        tensors, metadata = read_tensors(path)
        found_scores = tensors.pop("scores")
        if metadata.get("identity") != self.store.identity or found_scores.shape != scores.shape:
            raise RunError(f"{path} was written by another run; delete it and run the same command again")
        found = tree.unnamed(cotangent, tensors)
        if tree.digest((found, found_scores)) != metadata["digest"]:
            raise RunError(
                f"{path} does not have the bits that were written: its digest differs. Delete it and run the same "
                "command again; the sweep starts over."
            )
        return found, found_scores, int(metadata["step"])

    def _write_final(self, final: State) -> None:
        if self.folder:
            digest = self.ledger.digests[final.step]
            metadata = {"step": str(final.step), "identity": self.store.identity, "digest": digest}
            write_tensors(self.folder / "final.safetensors", tree.named(final), metadata)

    def _read_final(self) -> State:
        assert self.folder is not None, "only a trajectory with a folder has files"
        path = self.folder / "final.safetensors"
        tensors, metadata = read_tensors(path)
        state = tree.unnamed(self.initial, tensors)._replace(step=self.steps)
        same = tree.digest((state.params, state.moments)) == metadata.get("digest")
        if metadata.get("identity") != self.store.identity or not same:
            raise RunError(
                f"{path} was written by another run or has changed since; delete it and run the same command again"
            )
        return state
