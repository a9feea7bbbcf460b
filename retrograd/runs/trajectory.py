"""Run, resume, replay: THE loop. A trajectory is a training, the states kept from it, and how to come back.

Durable are: every state file, the final state, the digests of all states, and in reverse the cotangent with the scores
so far. After a kill the forward run goes on from the highest state file and the reverse sweep from its last durable
cotangent, by a plan over the states that survived. The bits are the same because replay is. In which order things are
written, so that this holds after every kill and power failure, is said in `retrograd.durable`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograd.core import memory, tree
from retrograd.core import plan as plans
from retrograd.core.optim import ELEMENTWISE, Cotangent, Moments
from retrograd.core.step import State, Training, micro_batches_of, needs_gradient, recovered
from retrograd.core.sweep import (
    Advanced,
    Event,
    Leavings,
    Ledger,
    Remade,
    Reversed,
    Turned,
    accumulate,
    seed_cotangent,
    sweep,
)
from retrograd.durable import make_folder, remove, remove_leftovers
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_lines, read_tensors, sync, write_tensors
from retrograd.runs.identity import told_apart
from retrograd.runs.states.budget import Replay, layout
from retrograd.runs.states.store import Gradients, Store

__all__ = ["Trajectory", "clean", "first_missing", "read_digests"]

_DIGESTS, _OF = "digests.txt", "identity"  # the file, and what its first line begins with


class Trajectory:
    """One run of a training with the states kept from it.

    Args:
        training: Recipe, engine, stream and data weights.
        initial: State 0; or a later one, from which the run goes on: the steps before it are not this run's.
        replay: Which states are kept, and where.
        folder: For durable states; None keeps all in memory, and a kill loses the run.
        identity: Hash of what the run is made of; state files of another are refused.
        observe: Called with every event.
        logs: Files that `observe` appends to; they are synced before a resume point that comes after.
    """

    def __init__(
        self,
        training: Training,
        initial: State,
        replay: Replay | None = None,
        folder: Path | None = None,
        identity: str = "",
        observe: Callable[[Event], None] = lambda event: None,
        logs: Sequence[Path] = (),
    ) -> None:
        self.training, self.initial, self.folder, self.observe = training, initial, folder, observe
        self.logs = logs
        self.replay = replay or Replay()
        if folder is not None:
            make_folder(folder)
        self.start, self.steps = initial.step, len(training.stream)
        sizes = (tree.nbytes(initial), tree.nbytes(initial.params))
        elementwise = isinstance(training.recipe.optimizer, ELEMENTWISE)
        on_host = all(leaf.device.type == "cpu" for leaf in tree.leaves(initial))
        self.layout = layout(self.replay, self.steps - self.start, *sizes, elementwise=elementwise, on_host=on_host)
        self.ledger = Ledger(self._digests())
        self.left = Leavings.of(training, initial)
        self.store = Store(initial, folder, identity, self.layout.on_disk, self.ledger.digests)
        self.gradients = Gradients(initial.params, folder, identity, self.layout.gradients_on_disk)
        self._pending: tuple[plans.Plan, State] | None = None  # the plan past its Turn, and the working state
        self._final: State | None = None
        self._query = ""  # digest of what is being pulled back
        self._beat = time.monotonic()
        self._extra: set[int] = set()  # state files that are resume points and no slot

    def train(self) -> State:
        """The final state: trained, resumed from the highest durable state, or read if training is done."""
        with self._quiet_after():
            return self._train()

    def _train(self) -> State:
        self._refuse_other()
        if self.folder and self._final_path.exists():
            self._keep(self.store.durable() if self.replay.keep else ())
            self._final = self._read_final()
            return self._final
        self.back_to(first_missing(self.ledger.digests, start=self.start + 1) - 1)
        actions = self._forward_plan()
        turn = next(i for i, action in enumerate(actions) if isinstance(action, plans.Turn)) + 1
        state, final = self.initial, None
        if self.replay.keep:
            self._keep([*(a.step for a in actions[:turn] if isinstance(a, plans.Snapshot)), *self.store.durable()])
        for event in self._sweep(actions[:turn], state=state):
            if isinstance(event, Turned):
                final = event.outcome.state
                self.observe(event)
                self._record(final)
            elif isinstance(event, Advanced):
                state = event.outcome.state
                self.observe(event)  # first: a step with a durable digest counts as told when a run resumes
                self._record(state)
                self._forward_heartbeat(state)
            elif isinstance(event, Remade):
                state = event.state
                self.observe(event)
        assert final is not None, "a forward plan ends with its Turn"
        if self.replay.keep:
            self.store.on_disk = 0  # the way back holds its states in memory
        if state.step != self.steps - 1:  # resumed at the last state itself
            state = self.store.get(self.steps - 1)
        self._pending = (actions[turn:], state)
        self.store.as_is = self.gradients.keeps
        self.store.settle()  # a final state on disk says that all the others are
        self.gradients.store.settle()
        self._write_final(final)
        self._final = final
        return final

    def reverse(
        self,
        gradient: dict[str, Tensor],
        key: str = "",
        *,
        curvature: bool = False,
        moments: Moments | None = None,
        reached: Callable[[Cotangent], None] = lambda cotangent: None,
    ) -> Tensor:
        """Scores [K, *weights.shape] for the query gradients [K, *shape], from the last durable cotangent if any.

        Args:
            key: Tells this sweep's durable cotangent from another query's.
            curvature: Estimate the preconditioned Hessian's largest eigenvalue on the way; see `sweep`.
            moments: λ_T's part for the moments, [K, *shape]; zero when None, as for every query of the parameters.
            reached: Shown the cotangent of the first state.
        """
        gradient = {name: gradient[name] for name in self.initial.params}  # files have their own order
        queries = next(iter(gradient.values())).shape[0]
        cotangent = seed_cotangent(gradient, self.initial)
        if moments is not None:
            cotangent = cotangent._replace(moments=moments)
        self._query = tree.digest((gradient, moments))
        weights = self.training.weights
        scores = torch.zeros((queries, *weights.shape), dtype=weights.dtype)
        cotangent, scores, left = self._read_reverse(cotangent, scores, key)
        actions, state = self._reverse_plan(left)
        self._beat = time.monotonic()
        events = self._sweep(actions, state=state, cotangent=cotangent, after=self._final, curvature=curvature)
        self._final = None
        if left == self.start:
            reached(cotangent)
        del gradient, moments, cotangent, state  # the sweep's alone: it lets go of each as soon as it can
        with self._quiet_after():
            for event in events:
                if isinstance(event, Reversed):
                    accumulate(scores, event)
                    if event.step == self.start:
                        reached(event.cotangent)
                elif isinstance(event, Advanced) and not event.replayed:
                    self._record(event.outcome.state)  # its line was lost
                self.observe(event)
                if isinstance(event, Reversed):
                    self._reverse_heartbeat(event, scores, key)
                del event  # or its cotangent would outlast the next step
        return scores

    def reverse_steps_left(self, key: str = "") -> int:
        """Steps still to be pulled back, by the durable cotangent."""
        path = self._reverse_path(key)
        left = int(read_tensors(path)[1]["step"]) if path is not None and path.exists() else self.steps
        return left - self.start

    def back_to(self, step: int) -> None:
        """Remove what is durable of later states, the final one first: what is told of them has been lost."""
        if self.folder is None or step >= self.steps:
            return
        self._final_path.unlink(missing_ok=True)
        for later in self.store.durable():
            if later > step:
                self.store.remove(later)
        for later in self.gradients.store.durable():
            if later > step:
                self.gradients.drop(later - 1)

    def clean(self, key: str = "") -> None:
        """Remove what only a resume would need; the final state stays, and the forward states if they are kept."""
        if self.folder is None:
            return
        for step in self.store.durable():
            if not self.replay.keep:
                self.store.remove(step)
        self.gradients.clean(self.replay.keep)
        remove_leftovers(self.folder)
        self.clean_reverse(key)

    def clean_reverse(self, key: str = "") -> None:
        """Remove the durable cotangent of a finished sweep."""
        path = self._reverse_path(key)
        if path is not None:
            path.unlink(missing_ok=True)

    @contextmanager
    def _quiet_after(self) -> Iterator[None]:
        """A computation that an error ends writes nothing any more: the next may be in this process."""
        try:
            yield
        except BaseException:
            for store in (self.store, self.gradients.store):
                store.stop()
            raise

    def _keep(self, states: Iterable[int]) -> None:
        """Let the files of these states outlive their slots, and those of all gradients if any state's does."""
        self.store.kept = set(states)
        self.gradients.store.kept = set(range(1, self.steps + 1)) if self.store.kept else set()

    def _sweep(self, actions: Sequence[plans.Action], **given: Any) -> Iterator[Event]:
        self.store.follow(action.step for action in actions if isinstance(action, plans.Restore))
        self.gradients.follow(self._asked(actions))
        kept = (self.store, self.ledger, self.left)
        idle = 1 << 62  # on the way forward: the way back takes more memory anyway
        if "cotangent" in given:
            idle = max(self.replay.memory, tree.nbytes(self.initial.params))
        return memory.reusing(sweep(actions, self.training, *kept, gradients=self.gradients, **given), idle)

    def _asked(self, actions: Iterable[plans.Action]) -> Iterator[int]:
        """The steps whose gradients a sweep asks for, if they are kept."""
        recipe, engine = self.training.recipe, self.training.engine
        unknown = recovered(recipe, self.initial, self.initial.moments) is None
        wanted = unknown and engine.repeats(micro_batches_of(self.training, self.start)[0])
        for action in actions:
            match action:
                case plans.Advance(start, stop):
                    yield from range(start, stop)
                case plans.Reverse(step) if wanted and needs_gradient(self.training, step):
                    yield step

    def _reverse_path(self, key: str) -> Path | None:
        return self.folder / f"reverse{'-' if key else ''}{key}.safetensors" if self.folder else None

    def _forward_plan(self) -> plans.Plan:
        durable = self.store.durable()
        if not durable:
            return plans.shifted(self.layout.plan, self.start)
        return self._resumed(self.steps, turn=True)

    def _reverse_plan(self, left: int) -> tuple[plans.Plan, State | None]:
        if left == self.start:
            return (), None
        if self._pending is not None and left == self.steps:
            actions, state = self._pending
            self._pending = None
            return actions, state
        return self._resumed(left, turn=False), None

    def _resumed(self, steps: int, *, turn: bool) -> plans.Plan:
        """A plan over the states that survived, with what room the budgets leave."""
        held = [self.start, *(t for t in self.store.durable() if t < steps)]
        in_memory = self.replay.memory // max(1, self.layout.state_bytes)
        if self.gradients.keeps:
            in_memory = min(in_memory, self.layout.cost.slots)  # the rest is theirs
        free = max(0, min(in_memory, steps - self.start) - 1)
        keeps = turn and self.replay.keep
        if keeps:  # what is held goes to disk, and stays there
            free = max(0, self.layout.cost.slots - len(held))
        self.store.on_disk = self.steps if keeps else 0
        self.store.held = set(held)
        self.gradients.find()
        actions = plans.resumed(steps - self.start, [t - self.start for t in held], free, turn=turn)
        return plans.shifted(actions, self.start)

    def _record(self, state: State) -> None:
        if self.folder and state.step not in self._known:
            if not self._known:
                append_line(self.folder / _DIGESTS, f"{_OF} {self.store.identity}")
            append_line(self.folder / _DIGESTS, f"{state.step} {self.ledger.digests[state.step]}")
            self._known.add(state.step)

    def _digests(self) -> dict[int, str]:
        found = read_digests(self.folder) if self.folder else {}
        self._known = set(found)
        return found

    def _refuse_other(self) -> None:
        """Refuse a folder whose digests are another run's: its states may be gone, and drift would be blamed."""
        lines = read_lines(self.folder / _DIGESTS) if self.folder else []
        found = lines[0].removeprefix(f"{_OF} ") if lines else self.store.identity
        if found != self.store.identity:
            raise RunError(f"{self.folder} {told_apart(found, self.store.identity)}.")

    def _sync_logs(self) -> None:
        """What is told of the steps before a resume point is on disk before it."""
        assert self.folder is not None, "only a trajectory with a folder has files"
        for path in (self.folder / _DIGESTS, *self.logs):
            sync(path)

    @property
    def _final_path(self) -> Path:
        assert self.folder is not None, "only a trajectory with a folder has files"
        return self.folder / "final.safetensors"

    def _due(self) -> bool:
        if self.folder is None or time.monotonic() - self._beat < self.replay.heartbeat:
            return False
        self._beat = time.monotonic()
        return True

    def _forward_heartbeat(self, state: State) -> None:
        """Make the state durable; of these resume points only the last is kept."""
        if not self._due() or self.store.has(state.step):
            return
        self.store.save(state, self._extra - set(self.store.held), first=self._sync_logs)
        self._extra = {state.step}

    def _reverse_heartbeat(self, event: Reversed, scores: Tensor, key: str) -> None:
        path = self._reverse_path(key)
        if path is None or not self._due():
            return
        tensors = {**tree.named(event.cotangent), "scores": scores}
        digest = tree.digest((event.cotangent, scores))
        metadata = {
            "step": str(event.step), "identity": self.store.identity, "digest": digest, "query": self._query,
        }  # fmt: skip
        self._sync_logs()
        write_tensors(path, tensors, metadata)
        if not self.replay.keep:
            for step in self.store.durable():
                if step >= event.step and step not in self.store.held:
                    self.store.remove(step)

    def _read_reverse(self, cotangent: Cotangent, scores: Tensor, key: str) -> tuple[Cotangent, Tensor, int]:
        """The last durable cotangent, scores and the step they are of; or those given, and the last."""
        path = self._reverse_path(key)
        if path is None or not path.exists():
            return cotangent, scores, self.steps
        tensors, metadata = read_tensors(path)
        found_scores = tensors.pop("scores")
        if metadata.get("identity") != self.store.identity:
            raise RunError(f"{path} {told_apart(metadata.get('identity'), self.store.identity)}.")
        if metadata.get("query") != self._query:
            raise RunError(
                f"{path} is a sweep of another query, half done: its gradient has digest {metadata.get('query')}, this "
                f"one has {self._query}. Finish that query first, or delete the file; then run the same command again."
            )
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
            self._sync_logs()
            write_tensors(self._final_path, tree.named(final), metadata)

    def _read_final(self) -> State:
        path = self._final_path
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") != self.store.identity:
            raise RunError(f"{path} {told_apart(metadata.get('identity'), self.store.identity)}.")
        state = tree.unnamed(self.initial, tensors)._replace(step=self.steps)
        if tree.digest((state.params, state.moments)) != metadata.get("digest"):
            raise RunError(f"{path} has changed since it was written; delete it and run the same command again")
        return state


def clean(folder: Path, *, keep: bool = False) -> None:
    """Remove from a finished trajectory's folder what only a resume would need; states and gradients unless kept."""
    for pattern in () if keep else ("state-*.safetensors", "gradient-*.safetensors"):
        for path in folder.glob(pattern):
            remove(path)
    remove(folder / "reverse.safetensors")


def read_digests(folder: Path) -> dict[int, str]:
    """Digests of states by step; a line that is not whole tells nothing."""
    width, found = len(tree.digest(())), {}
    for line in read_lines(folder / _DIGESTS):
        match line.split(" "):
            case [step, digest] if step.isdecimal() and len(digest) == width:
                found[int(step)] = digest
    return found


def first_missing(steps: Container[int], start: int = 0) -> int:
    """The lowest number from `start` on that is not among `steps`.

    >>> first_missing({0, 1, 3})
    2
    """
    return next(step for step in itertools.count(start) if step not in steps)
