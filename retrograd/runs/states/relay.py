"""A trajectory's files, whole or in pieces: how they lie on disk, and how they come to lie otherwise.

    whole               FOLDER/state-000010.safetensors, final.safetensors, reverse.safetensors, digests.txt
    in pieces over N    FOLDER/of-N/rank-0/…, FOLDER/of-N/rank-1/…      the same names, with the pieces of each process
    of R replicas       FOLDER/of-RxN/rank-0/…                          the same, of R·N processes

A run that goes on with another number of processes or replicas, or in one, has its files laid out anew before its first
step, each checked by its digest. Whichever kind is whole in itself counts: FOLDER/of-N has its name when everything is
in it, and goes once the whole files are there. Kept gradients are left out: they save work and change no bit. All
processes need to see one folder.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Cotangent, Params
from retrograd.core.step import Recipe, State, initial_state
from retrograd.durable import remove, rename, temporary_name
from retrograd.parallel.group import Group
from retrograd.parallel.pieces import Pieces, name_of
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_about, read_tensors, write_tensors

__all__ = ["part_of", "parted", "relay"]

_KINDS = ("state-*.safetensors", "final.safetensors", "reverse*.safetensors")
_LOG = "digests.txt"


def part_of(folder: Path, replicas: int, size: int, rank: int) -> Path:
    """Where the files of a process are."""
    return folder / _name(replicas, size) / f"rank-{rank}"


def _name(replicas: int, size: int) -> str:
    return f"of-{size}" if replicas == 1 else f"of-{replicas}x{size}"


def parted(folder: Path) -> bool:
    """Whether files lie in pieces."""
    return any(path.is_dir() for path in folder.glob("of-*"))


def relay(folder: Path, initial: State, recipe: Recipe, form: tuple[int, int], identity: str) -> None:
    """Lay out what is durable for this many processes; by one process, before any of them looks.

    Args:
        initial: The first state, for its shapes.
        recipe: Of the whole parameters.
        form: Replicas, and processes of each that have the states in pieces; (1, 1) where they are whole.
        identity: Of the run; its other files are left to be refused.
    Raises:
        RunError: If a file is broken.
    """
    others = sorted(path for path in folder.glob("of-*") if path.is_dir())
    if others == [folder / _name(*form)]:
        for path in _files(folder):  # a kill left them
            remove(path)
        _drop_apart([part_of(folder, *form, rank) for rank in range(math.prod(form))])
        return
    if not others and (form == (1, 1) or not any(_files(folder))):
        return
    kinds = _Kinds(initial, recipe, identity)
    for other in others:
        _join(other, folder, kinds)
    if form != (1, 1):
        _part(folder, *form, kinds)


class _Kinds:
    """What the files of a trajectory are made of, whole and for each process of any number."""

    def __init__(self, initial: State, recipe: Recipe, identity: str) -> None:
        self.initial, self.recipe, self.identity = initial, recipe, identity

    def pieces(self, size: int, place: int) -> Pieces:
        return Pieces(self.initial.params, self.recipe.pieces, Group(place, size))

    def state(self, lying: Pieces | None = None) -> State:
        """A state of a process, for its structure and shapes; it takes no memory."""
        if lying is None:
            return self.initial
        stubs = {name: torch.empty_like(x, device="meta") for name, x in self.initial.params.items()}
        return initial_state(lying.recipe_of(self.recipe), lying.own(stubs))

    def order(self, tensors: Params, lying: Pieces | None) -> list[Tensor]:
        """The tensors of a file in the order that they are digested in."""
        like = self.state(lying)
        if "scores" not in tensors:
            return [tensors[name] for name in tree.named(like)]
        cotangent = tree.named(Cotangent(like.params, like.moments))
        return [tensors[name] for name in (*cotangent, "scores")]


def _drop_apart(parts: list[Path]) -> None:
    """Remove cotangents of a sweep that the processes did not all come to write: it starts over."""
    for name in {path.name for part in parts for path in part.glob("reverse*.safetensors")}:
        files = [part / name for part in parts]
        if len({read_about(file)["step"] if file.exists() else None for file in files}) > 1:
            for file in files:
                remove(file)


def _files(folder: Path) -> Iterator[Path]:
    for kind in _KINDS:
        yield from sorted(folder.glob(kind))


def _join(parted: Path, folder: Path, kinds: _Kinds) -> None:
    """The whole files of those that every process of a replica had, and the folder of those removed."""
    *replicas, size = map(int, parted.name.removeprefix("of-").split("x"))
    joined = set[str]()
    for start in range(0, math.prod(replicas) * size, size):
        parts = [parted / f"rank-{start + place}" for place in range(size)]
        for path in _files(parts[0]):
            if path.name not in joined and _joined(parts, folder / path.name, kinds):
                joined.add(path.name)
    if (log := parted / "rank-0" / _LOG).exists():
        shutil.copyfile(log, folder / _LOG)
    remove(parted)


def _joined(parts: list[Path], path: Path, kinds: _Kinds) -> bool:
    """Write the whole file of the processes of a replica; False where they do not all have it."""
    if not all((part / path.name).exists() for part in parts):
        return False
    read = [read_tensors(part / path.name) for part in parts]
    metadata = read[0][1]
    if any(more["step"] != metadata["step"] for _, more in read):
        return False  # of a kill between two processes' writes
    pieces: Params = {}
    for place, (tensors, more) in enumerate(read):
        _check(parts[place] / path.name, tensors, more, kinds, kinds.pieces(len(parts), place))
        pieces |= tensors
    whole = _whole(pieces, kinds)
    write_tensors(path, whole, {**metadata, "digest": tree.digest(kinds.order(whole, None))})
    return True


def _part(folder: Path, replicas: int, size: int, kinds: _Kinds) -> None:
    """The files of every process from whole ones, which are removed."""
    parted = folder / _name(replicas, size)
    temporary, ranks = temporary_name(parted), range(size * replicas)
    for path in _files(folder):
        tensors, metadata = read_tensors(path)
        _check(path, tensors, metadata, kinds, None)
        for rank in ranks:
            lying = kinds.pieces(size, rank % size)
            own = _own(tensors, lying)
            digest = tree.digest(kinds.order(own, lying))
            write_tensors(temporary / f"rank-{rank}" / path.name, own, {**metadata, "digest": digest})
    for rank in ranks if (folder / _LOG).exists() else ():
        (temporary / f"rank-{rank}").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / _LOG, temporary / f"rank-{rank}" / _LOG)
    if temporary.exists():
        rename(temporary, parted)
    for path in [*_files(folder), *folder.glob("gradient-*.safetensors"), folder / _LOG]:
        remove(path)


def _check(path: Path, tensors: Params, metadata: dict[str, str], kinds: _Kinds, lying: Pieces | None) -> None:
    if metadata.get("identity") != kinds.identity:
        raise RunError(f"{path} was written by another run: use another folder, or --overwrite to start afresh")
    if tree.digest(kinds.order(tensors, lying)) != metadata.get("digest"):
        raise RunError(
            f"{path} does not have the bits that were written: its digest differs. Delete this file and run the same "
            "command again; what it held is computed again from an earlier state."
        )


def _whole(pieces: Params, kinds: _Kinds) -> Params:
    """Whole tensors by name, from all pieces of each."""
    found: Params = {}
    for name, like in tree.named(kinds.state()).items():
        parts = [pieces[name_of(name, s)] for s in range(kinds.recipe.pieces)]
        wide = parts[0].ndim > max(1, like.ndim)
        x = torch.cat(parts, 1 if wide else 0)
        found[name] = x.reshape(len(x), *like.shape) if wide else x.reshape(like.shape)
    return {**found, "scores": pieces["scores"]} if "scores" in pieces else found


def _own(whole: Params, lying: Pieces) -> Params:
    """A process's pieces of a file's tensors; names end with those of parameters."""
    found: Params = {}
    for name, x in whole.items():
        if name == "scores":
            found[name] = x
            continue
        parameter = max((p for p in lying.shapes if name.endswith(f".{p}")), key=len)
        prefix = name.removesuffix(parameter)
        found |= {f"{prefix}{label}": piece for label, piece in lying.own({parameter: x}).items()}
    return found
