"""How a trajectory comes back after a kill: what is durable of it, and the plan over what survived.

Durable are: every state file, the final state, the digests of all states, and in reverse the cotangent with the scores
so far. The forward run goes on from the highest state file and the reverse sweep from its last durable cotangent, by a
plan over the states that survived. In which order things are written, so that this holds after every kill and power
failure, is said in `retrograd.durable`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from retrograd.core import plan as plans
from retrograd.core import tree
from retrograd.core.optim import Cotangent
from retrograd.core.step import State
from retrograd.core.sweep import Reversed
from retrograd.durable import remove, remove_leftovers
from retrograd.parallel.group import ALONE, Group
from retrograd.runs.errors import RunError, StoppedError, asked_to_stop
from retrograd.runs.files import append_line, read_about, read_lines, read_tensors, sync, write_tensors
from retrograd.runs.identity import told_apart
from retrograd.runs.states.budget import Layout, Replay
from retrograd.runs.states.store import Gradients, Store

__all__ = ["Durable", "clean", "first_missing", "read_digests"]

_DIGESTS, _OF = "digests.txt", "identity"  # the file, and what its first line begins with


class Durable:
    """What is durable of one trajectory. With no folder nothing is.

    Args:
        folder: Where the files are.
        steps: Of the training; `store.initial` says where it begins.
        replay: Which states are kept, and how often a resume point is made.
        layout: What `replay` came to.
        store, gradients: Slots for states and for gradients.
        digests: Step → digest, as the ledger knows them; those that are here already are on disk.
        logs: Files that are synced before a resume point that comes after.
        group: Processes that each have a part of every state: what is durable is what all of them have.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        replay: Replay,
        layout: Layout,
        store: Store,
        gradients: Gradients,
        digests: dict[int, str],
        logs: Sequence[Path] = (),
        group: Group = ALONE,
    ) -> None:
        self.group = group
        self.folder, self.steps, self.replay, self.layout, self.logs = folder, steps, replay, layout, logs
        self.store, self.gradients, self.digests = store, gradients, digests
        self.start, self.identity = store.initial.step, store.identity
        self._told = set(digests)  # whose digest has its line
        self._beat = time.monotonic()
        self._ending = False  # by agreement of all processes
        self._extra: list[int] = []  # state files that are resume points and no slot, the latest last

    def forward_plan(self) -> plans.Plan:
        """The layout's plan, or one that goes on from the highest state file."""
        if not self.group.common(self.store.durable()):
            return plans.shifted(self.layout.plan, self.start)
        return self.resumed(self.steps, turn=True)

    def resumed(self, steps: int, *, turn: bool) -> plans.Plan:
        """A plan over the states that survived, with what room the budgets leave."""
        held = [self.start, *(t for t in self.group.common(self.store.durable()) if t < steps)]
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

    def keep(self, states: Iterable[int]) -> None:
        """Let the files of these states outlive their slots, and those of all gradients if any state's does."""
        self.store.kept = set(states)
        self.gradients.store.kept = set(range(1, self.steps + 1)) if self.store.kept else set()

    def back_to(self, step: int) -> None:
        """Remove what is durable of later states, the final one first: what is told of them has been lost."""
        if self.folder is None or step >= self.steps:
            return
        self._final.unlink(missing_ok=True)
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
        path = self._reverse(key)
        if path is not None:
            path.unlink(missing_ok=True)

    def reverse_steps_left(self, key: str = "") -> int:
        """Steps still to be pulled back, by the durable cotangent."""
        path = self._reverse(key)
        left = self._reverse_step(path) if path is not None else None
        return (self.steps if left is None else left) - self.start

    def refuse_other(self) -> None:
        """Refuse a folder whose digests are another run's: its states may be gone, and drift would be blamed.

        Raises:
            RunError: With what may have changed.
        """
        lines = read_lines(self.folder / _DIGESTS) if self.folder else []
        begun = lines[0].removeprefix(f"{_OF} ") if lines else self.identity
        if begun != self.identity:
            raise RunError(f"{self.folder} {told_apart(begun, self.identity)}.")

    def record(self, state: State) -> None:
        """Write the line of a state's digest, once."""
        if self.folder and state.step not in self._told:
            if not self._told:
                append_line(self.folder / _DIGESTS, f"{_OF} {self.identity}")
            append_line(self.folder / _DIGESTS, f"{state.step} {self.digests[state.step]}")
            self._told.add(state.step)

    def rest(self) -> None:
        """Begin to wait for the next heartbeat."""
        self._beat = time.monotonic()

    def forward_heartbeat(self, state: State) -> None:
        """Make the state durable if it is time; of these resume points only the last is kept.

        Of several processes the last two: one may be ahead of another.
        """
        if not self._due() or self.store.has(state.step):
            return
        still = self._extra[-1:] if self.group.world > 1 else []
        self.store.save(state, set(self._extra) - {*still, *self.store.held}, first=self._sync_logs)
        self._extra = [*still, state.step]

    def stop_if_asked(self) -> None:
        """End, once what the last heartbeat has made durable is on disk, if somebody asked for it.

        Raises:
            StoppedError: If somebody did.
        """
        if self._ending:
            self.store.settle()
            raise StoppedError

    def reverse_heartbeat(self, event: Reversed, scores: Tensor, key: str, query: str) -> None:
        """Make the cotangent and the scores so far durable if it is time; later states are then done with.

        Args:
            key, query: As for `read_reverse`.
        """
        path = self._reverse(key)
        if path is None or not self._due():
            return
        tensors = {**tree.named(event.cotangent), "scores": scores}
        digest = tree.digest((event.cotangent, scores))
        metadata = {"step": str(event.step), "identity": self.identity, "digest": digest, "query": query}
        self._sync_logs()
        write_tensors(path, tensors, metadata)
        self.let_go(event.step)

    def let_go(self, step: int) -> None:
        """Remove what a kill may have left of the states that a durable cotangent at `step` is done with."""
        for later in () if self.replay.keep else self.store.durable():
            if later >= step and later not in self.store.held:
                self.store.remove(later)

    def read_reverse(self, cotangent: Cotangent, scores: Tensor, key: str, query: str) -> tuple[Cotangent, Tensor, int]:
        """The last durable cotangent, scores and the step they are of; or those given, and the last.

        Args:
            key: Tells this sweep's file from another query's.
            query: Digest of what is being pulled back.
        Raises:
            RunError: If the file is another run's, of another query, or broken.
        """
        path = self._reverse(key)
        if path is None or len(set(self.group.everywhere(self._reverse_step(path)))) > 1 or not path.exists():
            return cotangent, scores, self.steps  # the sweep starts over, too, where processes were killed between
        tensors, metadata = read_tensors(path)
        read_scores = tensors.pop("scores")
        if metadata.get("identity") != self.identity:
            raise RunError(f"{path} {told_apart(metadata.get('identity'), self.identity)}.")
        if metadata.get("query") != query:
            raise RunError(
                f"{path} is a sweep of another query, half done: its gradient has digest {metadata.get('query')}, this "
                f"one has {query}. Finish that query first, or delete the file; then run the same command again."
            )
        read = tree.unnamed(cotangent, tensors)
        if tree.digest((read, read_scores)) != metadata["digest"]:
            raise RunError(
                f"{path} does not have the bits that were written: its digest differs. Delete it and run the same "
                "command again; the sweep starts over."
            )
        return read, read_scores, int(metadata["step"])

    def write_final(self, final: State) -> None:
        if self.folder:
            known = self.store.digests.get(final.step) or tree.digest((final.params, final.moments))
            metadata = {"step": str(final.step), "identity": self.identity, "digest": known}
            self._sync_logs()
            write_tensors(self._final, tree.named(final), metadata)

    def read_final(self) -> State | None:
        """The final state, if training is done.

        Raises:
            RunError: If its file is another run's, or broken.
        """
        if self.folder is None or not all(self.group.everywhere(self._final.exists())):
            return None
        path = self._final
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") != self.identity:
            raise RunError(f"{path} {told_apart(metadata.get('identity'), self.identity)}.")
        state = tree.unnamed(self.store.initial, tensors)._replace(step=self.steps)
        if tree.digest((state.params, state.moments)) != metadata.get("digest"):
            raise RunError(f"{path} has changed since it was written; delete it and run the same command again")
        return state

    @property
    def _final(self) -> Path:
        assert self.folder is not None, "only a trajectory with a folder has files"
        return self.folder / "final.safetensors"

    def _reverse(self, key: str) -> Path | None:
        return self.folder / f"reverse{'-' if key else ''}{key}.safetensors" if self.folder else None

    def _reverse_step(self, path: Path) -> int | None:
        """The step of a durable cotangent, if there is one."""
        return int(read_about(path)["step"]) if path.exists() else None

    def _due(self) -> bool:
        waited, asked = time.monotonic() - self._beat >= self.replay.heartbeat, asked_to_stop()
        due, self._ending = self.group.agreed((waited or asked, asked))
        if self.folder is None or not due:
            return False
        self.rest()
        return True

    def _sync_logs(self) -> None:
        """What is told of the steps before a resume point is on disk before it."""
        assert self.folder is not None, "only a trajectory with a folder has files"
        for path in (self.folder / _DIGESTS, *self.logs):
            sync(path)


def clean(folder: Path, *, keep: bool = False) -> None:
    """Remove from a finished trajectory's folder what only a resume would need; states and gradients unless kept."""
    for pattern in () if keep else ("state-*.safetensors", "gradient-*.safetensors"):
        for path in folder.glob(pattern):
            remove(path)
    remove(folder / "reverse.safetensors")


def read_digests(folder: Path) -> dict[int, str]:
    """Digests of states by step; a line that is not whole tells nothing."""
    width, digests = len(tree.digest(())), {}
    for line in read_lines(folder / _DIGESTS):
        match line.split(" "):
            case [step, digest] if step.isdecimal() and len(digest) == width:
                digests[int(step)] = digest
    return digests


def first_missing(steps: Container[int], start: int = 0) -> int:
    """The lowest number from `start` on that is not among `steps`.

    >>> first_missing({0, 1, 3})
    2
    """
    return next(step for step in itertools.count(start) if step not in steps)
