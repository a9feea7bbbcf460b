"""State slots in host memory and on disk.

A plan's slots are a stack. Its lowest positions are held longest and read least, so those go to disk when memory does
not hold all. In memory a state is one flat buffer: kept leaf by leaf, states would lie scattered among the steps'
temporaries and a run of 10 GiB of states was seen to take 18. On disk it is one safetensors file with its digest, so a
flipped bit or a truncated file is seen when it is read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import State
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors, write_tensors

__all__ = ["Store"]


class Store:
    """Slots of one trajectory.

    Args:
        initial: State 0; never written, and the pattern of all states.
        folder: Where disk slots are; None for memory only.
        identity: Hash of recipe, data and model; states of another are refused.
        on_disk: How many of the stack's lowest positions go to disk.
    """

    def __init__(self, initial: State, folder: Path | None, identity: str, on_disk: int = 0) -> None:
        self.initial, self.folder, self.identity, self.on_disk = initial, folder, identity, on_disk
        self.memory: dict[int, State] = {}
        self.held: list[int] = []
        self.kept: set[int] = set()  # files that outlive their slot

    def put(self, state: State) -> None:
        """Hold a state in memory or on disk, by its position in the stack."""
        if state.step and self.folder and len(self.held) < self.on_disk:
            self.save(state)
        else:
            self.memory[state.step] = _packed(state) if state.step else state
        self.held.append(state.step)

    def get(self, step: int) -> State:
        """A held state, on the device of the initial one.

        Raises:
            RunError: If its file is broken, or was written by another run.
        """
        if step in self.memory:
            return tree.map(lambda x, like: x.to(like.device), self.memory[step], self.initial)
        if step == 0:
            return self.initial
        tensors, metadata = read_tensors(self.path(step))
        if metadata.get("identity") != self.identity:
            raise RunError(
                f"snapshot {self.path(step)} was written by run {metadata.get('identity')}, this run is "
                f"{self.identity}; its scores would be another run's. Use another folder, or --overwrite."
            )
        state = tree.unnamed(self.initial, tensors)._replace(step=step)
        if tree.digest((state.params, state.moments)) != metadata["digest"]:
            raise RunError(
                f"snapshot {self.path(step)} does not have the bits that were written: its digest differs. Delete this "
                "file and run the same command again; the state is computed again from an earlier one."
            )
        return state

    def drop(self, step: int) -> None:
        """Give up a slot."""
        self.memory.pop(step, None)
        if step in self.held:
            self.held.remove(step)
        if self.folder and step not in self.kept:
            self.path(step).unlink(missing_ok=True)

    def save(self, state: State) -> None:
        """Make a state durable."""
        assert self.folder is not None, "only a trajectory with a folder has durable states"
        digest = tree.digest((state.params, state.moments))
        metadata = {"step": str(state.step), "identity": self.identity, "digest": digest}
        write_tensors(self.path(state.step), tree.named(state), metadata)

    def durable(self) -> list[int]:
        """Steps of the states on disk."""
        if self.folder is None:
            return []
        return sorted(int(file.stem.split("-")[1]) for file in self.folder.glob("state-*.safetensors"))

    def path(self, step: int) -> Path:
        assert self.folder is not None, "only a trajectory with a folder has files"
        return self.folder / f"state-{step:06d}.safetensors"


def _packed(state: State) -> State:
    """A copy of a state in host memory whose tensors are views of one buffer."""
    leaves = tree.leaves(state)
    sizes = [-(-leaf.numel() * leaf.element_size() // 64) * 64 for leaf in leaves]  # aligned for vector instructions
    parts = iter(torch.empty(sum(sizes), dtype=torch.uint8).split(sizes))

    def place(leaf: Tensor) -> Tensor:
        room = next(parts)[: leaf.numel() * leaf.element_size()].view(leaf.dtype).view(leaf.shape)
        return room.copy_(leaf)

    return tree.map(place, state)
