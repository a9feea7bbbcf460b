"""Retrained models of a bank, as the bits in which each differs from the run's own final parameters.

    kept = zlib(planes(bits(θ) ⊕ bits(θ_run)))      by leaf; a leaf without a difference is left out

⊕ undoes itself, so what comes back has the bits that were trained. Retraining without a few documents moves a
parameter in its low bits: byte by byte of each number, laid plane by plane, the high ones are runs of zeros. A file is
named by the digest of its parameters, so that equal models are kept once.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import NonFiniteError
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.run_folder import Opened
from retrograd.runs.states.buffers import as_bytes
from retrograd.trust.bank import Bank, Failed, LeftOut, Retrained

__all__ = ["FOLDER", "Models", "answers", "ask_kept", "packed_difference", "restored"]

FOLDER = "models"
_LEVEL = 1  # of zlib: higher ones take several times as long for a few percent


class Models:
    """The kept models of a run's bank, in validation/models."""

    def __init__(self, run: Opened) -> None:
        self.run, self.folder = run, run.folder / "validation" / FOLDER

    @cached_property
    def base(self) -> Params:
        """The run's own final parameters, on the host.

        Raises:
            ValueError: If their file is gone or another run's.
        """
        path, loaded = self.run.folder / "checkpoints" / "final.safetensors", self.run.loaded
        if not path.exists():
            raise ValueError(
                f"models are kept as differences from {path}, which is not there; put it back, or leave out "
                "--save_models"
            )
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") != loaded.identity:
            raise ValueError(f"{path} is of another run than {self.run.folder}; put the right file back")
        return {n: leaf.cpu() for n, leaf in tree.unnamed(loaded.initial, tensors, move=False).params.items()}

    def keep(self, params: Params) -> str:
        """Write a model, unless it is there; returns its name."""
        ordered = {name: params[name].detach().cpu().contiguous() for name in self.base}
        name = tree.digest(ordered)
        if not self._path(name).exists():
            packed = {n: packed_difference(leaf, self.base[n]) for n, leaf in ordered.items()}
            metadata = {"identity": self.run.loaded.identity, "base": tree.digest(self.base)}
            write_tensors(self._path(name), {n: x for n, x in packed.items() if x is not None}, metadata)
        return name

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def load(self, name: str) -> Params:
        """A kept model, bit for bit, where the run's parameters lie.

        Raises:
            RunError: If its file is broken, or was written against another final state.
        """
        packed, metadata = read_tensors(self._path(name))
        base = tree.digest(self.base)
        if metadata.get("base") != base:
            raise RunError(
                f"{self._path(name)} is a difference from final parameters with digest {metadata.get('base')}, and "
                f"those of {self.run.folder} have {base}. A bank's models go with the run they were made from: copy "
                "its checkpoints/final.safetensors too."
            )
        params = {n: restored(packed[n], leaf) if n in packed else leaf.clone() for n, leaf in self.base.items()}
        if tree.digest(params) != name:
            raise RunError(f"{self._path(name)} does not give back the bits that were kept. Delete it; that retraining "
                           "is repeated with --save_models.")  # fmt: skip
        initial = self.run.loaded.initial.params
        return {n: leaf.to(initial[n].device) for n, leaf in params.items()}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def packed_difference(values: Tensor, base: Tensor) -> Tensor | None:
    """The bits in which two tensors of one shape and dtype differ, compressed, [n] uint8; None if they are the same."""
    difference = as_bytes(values.contiguous()) ^ as_bytes(base.contiguous())
    if not difference.any():
        return None
    planes = np.ascontiguousarray(difference.reshape(-1, values.element_size()).T)
    return torch.frombuffer(bytearray(zlib.compress(planes.data, _LEVEL)), dtype=torch.uint8)


def restored(packed: Tensor, base: Tensor) -> Tensor:
    """The tensor whose `packed_difference` from `base` this is.

    Raises:
        RunError: If what is packed is broken.
    """
    try:
        planes = np.frombuffer(zlib.decompress(packed.numpy().data), dtype=np.uint8)
        difference = planes.reshape(base.element_size(), -1).T
        tensor = base.contiguous().clone()
        flat = as_bytes(tensor)
        flat ^= difference.reshape(-1)
    except (zlib.error, ValueError) as error:
        raise RunError(f"a kept model of the bank is broken: {error}. Delete its file; it is retrained.") from error
    return tensor


def answers(run: Opened, params: Params) -> list[float] | Failed:
    """The query values of a trained model, [K] nats, or which of them is none."""
    try:
        values = run.loaded.queries.values(params).tolist()
    except NonFiniteError as error:  # of what comes before a query is asked, such as an attack
        return Failed(str(error))
    bad = [name for name, value in zip(run.loaded.queries.names, values) if not math.isfinite(value)]
    if not bad:
        return values
    steps = len(run.loaded.stream)
    reason = f"after step {steps - 1}, the last, query {bad[0]!r} is NaN or infinite."
    return Failed(reason, bad[0].partition("/")[0])


def ask_kept(
    run: Opened, bank: Bank, sets: Iterable[LeftOut], conditions: dict[str, int]
) -> Iterator[tuple[LeftOut, Retrained | Failed, dict[str, int]]]:
    """Ask kept models what retraining would be asked: query values to the bit, without a training step.

    Args:
        sets: Those whose models the bank has.
        conditions: Those of this call; of a set's kept models the one trained under them is asked, if there is one.
    Raises:
        RunError: If a model with everything has a query value that is not finite.
    """
    models, baselines = Models(run), dict[tuple[str, int], list[float]]()
    before = torch.get_num_threads()
    try:
        for left_out in sets:
            kept = bank.model(left_out.key, conditions)
            assert kept is not None, f"the bank keeps no model of {left_out.name}"
            threads = kept.conditions["threads"]
            torch.set_num_threads(threads)  # sums are split by thread
            baseline = baselines.get((kept.baseline_model, threads)) or _sound(run, models.load(kept.baseline_model))
            baselines[kept.baseline_model, threads] = baseline
            equal = kept.model == kept.baseline_model
            answered = baseline if equal else answers(run, models.load(kept.model))
            asked = (
                answered
                if isinstance(answered, Failed)
                else Retrained(answered, baseline, kept.model, kept.baseline_model)
            )
            yield left_out, asked, kept.conditions
    finally:
        torch.set_num_threads(before)


def _sound(run: Opened, params: Params) -> list[float]:
    values = answers(run, params)
    if isinstance(values, Failed):
        raise RunError(f"of the kept model with everything, {values.reason} Nothing can be compared with it.")
    return values
