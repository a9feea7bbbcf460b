"""Slots for states and for gradients, in host memory and on disk, written and read beside the computation.

A plan's slots are a stack. Its lowest positions are held longest and read least, so those go to disk when memory does
not hold all. On disk a state is one safetensors file with its digest, so a flipped bit or a truncated file is seen when
it is read. Gradients are a stack too, of as many as there are steps, and are held as states without moments are.

One thread writes and reads, in the order it is asked to. At most one state is on its way out, and at most one is read
ahead, the next one the plan restores: that is the memory taken beyond the slots. A file has its name only when it is
whole, so a kill at any moment loses what was under way and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from retrograd.core import memory, tree
from retrograd.core.optim import Params
from retrograd.core.step import State
from retrograd.parallel.group import ALONE, Group
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.identity import told_apart
from retrograd.runs.states.buffers import copy_alone, packed
from retrograd.runs.states.sparse_rows import thin_like, thinned, whole
from retrograd.runs.states.transfers import Copies

try:
    from retrograd.accel import pool
except ModuleNotFoundError:  # the folder may be deleted: memory comes from torch then, slower, and no bit is another
    pass
else:
    memory.use(pool)

__all__ = ["Gradients", "Store"]

_SMALL = 1 << 20  # bytes; waking a thread takes longer than copying so little


class Store:
    """Slots of one trajectory.

    Every method that finds that a state given earlier could not be written raises the RunError that says why, and goes
    on raising it: the run has to stop, and resumes from the files that are there.

    Args:
        initial: The first state; never written, and the pattern of all states.
        folder: Where disk slots are; None for memory only.
        identity: Hash of recipe, data and model; states of another are refused.
        on_disk: How many of the stack's lowest positions go to disk.
        digests: Step → digest, where the ledger has computed it; a state it does not know is digested here.
        name: What its files are called.
        thin: Whether matrices are held by those of their rows that are not zero, where those are few.
    """

    def __init__(
        self,
        initial: State,
        folder: Path | None,
        identity: str,
        on_disk: int = 0,
        digests: Mapping[int, str] | None = None,
        name: str = "state",
        thin: bool = False,
    ) -> None:
        self.initial, self.folder, self.identity, self.on_disk = initial, folder, identity, on_disk
        self.name, self.thin, self.as_is = name, thin, False
        self.digests = {} if digests is None else digests
        self.memory: dict[int, State] = {}
        self.held: set[int] = set()
        self.kept: set[int] = set()  # files that outlive their slot
        self._copies = Copies(initial)
        self._thread = ThreadPoolExecutor(1, "states")  # begins with its first job and ends with the store
        self._saved: set[int] = set()  # files written, or being written, by this store
        self._leaving: dict[int, State] = {}  # the one on its way out; it stays if it cannot be written
        self._last: Future[None] | None = None  # the job of that one
        self._coming: tuple[int, Future[State]] | None = None
        self._expected: deque[int] = deque()

    def follow(self, steps: Iterable[int]) -> None:
        """Expect these to be got, in this order, and read each ahead of its time; replaces what was expected."""
        self._expected = deque(steps)
        self._coming = None
        self._read_ahead(None)

    def put(self, state: State) -> None:
        """Hold a state in memory or on disk, by its position in the stack."""
        self._raise()
        if state.step == self.initial.step:
            self.memory[state.step] = state
        elif self.folder and len(self.held) < self.on_disk:
            if state.step not in self._saved:
                self.save(state)
        elif self._copies.on_host and self.as_is:
            self.memory[state.step] = state
        elif self._copies.on_host and tree.nbytes(state) <= _SMALL:
            self.memory[state.step] = self._in_memory(state)
        else:
            self._send(state, lambda host: self.memory.update({state.step: self._in_memory(host)}))
        self.held.add(state.step)

    def get(self, step: int) -> State:
        """A held state, on the device of the initial one.

        Raises:
            RunError: If its file is broken, or was written by another run.
        """
        self._raise()
        if step in self._expected:
            while self._expected.popleft() != step:
                pass  # what was expected before has come from elsewhere
        state = self._near(step)
        if state is None:
            coming = self._coming if self._coming and self._coming[0] == step else (step, self._fetch(step))
            self._coming = None
            state = coming[1].result()
        self._read_ahead(state)
        return state

    def drop(self, step: int) -> None:
        """Give up a slot."""
        if step in self._leaving:
            self.settle()
        self.memory.pop(step, None)
        self.held.discard(step)
        if self._coming and self._coming[0] == step:
            self._coming = None
        if self.folder and step not in self.kept:
            self.remove(step)

    def save(self, state: State, instead_of: Collection[int] = (), first: Callable[[], None] = lambda: None) -> None:
        """Make a state durable, in a moment; the files of `instead_of` are removed once it is.

        Args:
            first: Called by the thread that writes, before the state's file gets its name.
        """
        known = self.digests.get(state.step)
        path, old = self.path(state.step), [self.path(step) for step in instead_of]

        def write(host: State) -> None:
            thin = self._thinned(host)
            digest = tree.digest((thin.params, thin.moments)) if known is None else known
            metadata = {"step": str(state.step), "identity": self.identity, "digest": digest}
            first()
            write_tensors(path, tree.named(thin), metadata)
            for file in old:
                file.unlink(missing_ok=True)

        self._send(state, write)
        self._saved.add(state.step)
        self._saved.difference_update(instead_of)

    def has(self, step: int) -> bool:
        """Whether a state is on disk, or on its way there."""
        return step in self._saved or self.path(step).exists()

    def settle(self) -> None:
        """Wait until every state given is where it is held."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def stop(self) -> None:
        """Wait until nothing is written or read any more."""
        self._thread.shutdown()
        self._thread = ThreadPoolExecutor(1, "states")

    def durable(self) -> list[int]:
        """Steps of the states on disk."""
        if self.folder is None:
            return []
        self.settle()
        return sorted(int(file.stem.rsplit("-", 1)[1]) for file in self.folder.glob(f"{self.name}-*.safetensors"))

    def remove(self, step: int) -> None:
        """Remove a state's file."""
        if step in self._leaving:
            self.settle()
        self._saved.discard(step)
        self.path(step).unlink(missing_ok=True)

    def path(self, step: int) -> Path:
        assert self.folder is not None, "only a trajectory with a folder has files"
        return self.folder / f"{self.name}-{step:06d}.safetensors"

    def _send(self, state: State, finish: Callable[[State], None]) -> None:
        """Let the thread bring a state to host memory and `finish` it there, once the one before is through."""
        self.settle()
        begun = self._copies.begin()

        def job() -> None:
            finish(self._copies.down(state, begun))
            del self._leaving[state.step]

        self._leaving[state.step] = state
        self._last = self._thread.submit(job)

    def _near(self, step: int) -> State | None:
        """A state that needs no copy: on its way out, or in the memory where steps are taken."""
        if (leaving := self._leaving.get(step)) is not None:
            return leaving
        if step == self.initial.step:
            return self.memory.get(step, self.initial)
        return self._whole(self.memory[step]) if self._copies.on_host and step in self.memory else None

    def _read_ahead(self, state: State | None) -> None:
        """Begin to read what is expected next; `state` is the one got last."""
        step = self._expected[0] if self._expected else self.initial.step  # which is never read
        if step not in self.held or self._near(step) is not None or (self._coming and self._coming[0] == step):
            return
        if state is not None and state.step == step:
            again: Future[State] = Future()
            again.set_result(state)
            self._coming = (step, again)
        else:
            self._coming = (step, self._fetch(step))

    def _fetch(self, step: int) -> Future[State]:
        room, begun = self._copies.room(), self._copies.begin()
        return self._thread.submit(lambda: self._copies.up(self._read(step), room, begun))

    def _read(self, step: int) -> State:
        if step in self.memory:
            return self._whole(self.memory[step])
        tensors, metadata = read_tensors(self.path(step), _memory)
        if metadata.get("identity") != self.identity:
            raise RunError(f"snapshot {self.path(step)} {told_apart(metadata.get('identity'), self.identity)}.")
        like = self.initial
        if self.thin:
            like = like._replace(params=thin_like(like.params, tensors, "params."))
        state = tree.unnamed(like, tensors, move=False)._replace(step=step)
        if tree.digest((state.params, state.moments)) != metadata["digest"]:
            raise RunError(
                f"snapshot {self.path(step)} does not have the bits that were written: its digest differs. Delete this "
                f"file and run the same command again; the {self.name} is computed again from an earlier state."
            )
        return self._whole(state)

    def _in_memory(self, state: State) -> State:
        """A copy in host memory, in two buffers: the sweep keeps a state's moments when it has done with the rest."""
        thin = self._thinned(state)
        params, moments = (packed(part, copy_alone, memory.held) for part in (thin.params, thin.moments))
        return State(state.step, params, moments)

    def _thinned(self, host: State) -> State:
        return host._replace(params=thinned(host.params)) if self.thin else host

    def _whole(self, held: State) -> State:
        return held._replace(params=whole(held.params, self.initial.params)) if self.thin else held

    def _raise(self) -> None:
        if self._last is not None and self._last.done():
            self.settle()


class Gradients:
    """The gradients of a trajectory's steps; that of step t is held like a state t + 1 of which it were the parameters.

    Args:
        params: The pattern of all gradients.
        folder, identity: As for states.
        on_disk: How many of the first steps' go to disk; None if none are to be kept but those that are there.
        group: Processes that each have a part of every gradient, and have to know of the same ones.
    """

    def __init__(
        self, params: Params, folder: Path | None, identity: str, on_disk: int | None = None, group: Group = ALONE
    ) -> None:
        self.group = group
        self.keeps = on_disk is not None
        self.store = Store(State(0, params, {}), folder, identity, on_disk or 0, name="gradient", thin=True)
        self.find()

    def find(self) -> None:
        """Those that are on disk are there for a sweep, again after one that left them."""
        self.store.held |= set(self.group.common(self.store.durable()))

    def follow(self, steps: Iterable[int]) -> None:
        """Expect those of these steps to be asked for, in this order."""
        self.store.follow(step + 1 for step in steps)

    def put(self, step: int, grads: Params) -> None:
        if self.keeps and step + 1 not in self.store.held:
            self.store.put(State(step + 1, grads, {}))

    def get(self, step: int) -> Params | None:
        return self.store.get(step + 1).params if step + 1 in self.store.held else None

    def clean(self, keep: bool) -> None:
        """Remove the files, unless they are to be kept."""
        for step in () if keep else self.store.durable():
            self.store.remove(step)

    def drop(self, step: int) -> None:
        if step + 1 in self.store.held:
            self.store.drop(step + 1)


def _memory(mapped: dict[str, Tensor]) -> dict[str, Tensor]:
    """Memory for a state, leaf by leaf as a step makes one, so that the same blocks serve both."""
    return {name: memory.empty_like(leaf) for name, leaf in mapped.items()}
