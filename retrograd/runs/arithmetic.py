"""The arithmetic that a run's bits depend on besides data, model and recipe: one record, made when it is set up.

It is in the manifest from before the first step. A run that goes on takes it up again, as far as a process can choose;
where the machine gives another one, the run is refused, for replay has to have the bits that training had.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from retrograd.runs.identity import EDITION, told_apart
from retrograd.runs.manifest import Manifest

__all__ = ["Arithmetic", "begun_with", "deterministic", "precise", "refuse_other_arithmetic"]


@dataclass(frozen=True)
class Arithmetic:
    """What two trainings of one identity have to share to have the same bits, on one version of the libraries.

    Args:
        dtype: Of parameters and activations, torch's name.
        engine: What differentiates the steps.
        compiled: Whether its passes are.
        tf32: Whether float32 products round their factors (`--tf32`).
        device, device_name: Where it computes, and what that is.
        threads: Of the host; sums are split by thread.
        shards: Logical shards that each step's rows are summed in; any number of processes that divides it shares them.
        layout: How parameters lie over processes, where bits depend on it.
    """

    dtype: str
    engine: str
    compiled: bool
    tf32: bool
    device: str
    device_name: str
    threads: int
    shards: int = 1
    layout: str = "whole"

    @classmethod
    def here(
        cls, dtype: torch.dtype, device: torch.device, engine: str, *, compiled: bool, shards: int = 1
    ) -> Arithmetic:
        """With what this process has of threads and precision."""
        name = platform.processor() or platform.machine()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
        tf32 = torch.get_float32_matmul_precision() != "highest"
        kind = (str(dtype).removeprefix("torch."), engine, compiled, tf32)
        return cls(*kind, str(device), name, torch.get_num_threads(), shards)

    @property
    def chosen(self) -> tuple[Any, ...]:
        """What a run's identity covers: all but what the machine gives, for states may be read on another."""
        return (self.dtype, self.engine, self.compiled, self.tf32, self.shards, self.layout)

    def apply(self) -> None:
        """Let this process compute so, as far as it can choose: threads and precision."""
        torch.set_num_threads(self.threads)
        if self.tf32 != (torch.get_float32_matmul_precision() != "highest"):
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32


def begun_with(run: Path) -> Arithmetic | None:
    """The arithmetic of a run that was begun; None where none was.

    Raises:
        ValueError: If it was begun by an earlier version, whose runs cannot be gone on with.
    """
    values = Manifest(run / "manifest.json").values
    begun = values.get("identity")
    if begun is None:
        return None
    if not begun.startswith(f"{EDITION}-"):
        raise ValueError(f"the run in {run} {told_apart(begun, 'the one asked for')}, or with --overwrite.")
    known = dict(values["arithmetic"])
    return Arithmetic(**{"shards": known.pop("world_size", 1), **known})


def refuse_other_arithmetic(run: Path, begun: Arithmetic | None, here: Arithmetic) -> None:
    """Refuse to go on with a run on a machine whose arithmetic is another one's.

    Raises:
        ValueError: With all that differs.
    """
    if begun is None or begun == here:
        return
    old, new = asdict(begun), asdict(here)
    lines = "\n  ".join(f"{name}: {old[name]} → {new[name]}" for name in old if old[name] != new[name])
    raise ValueError(
        f"{run} was begun with other arithmetic:\n  {lines}\nReplay has to take the steps that training took, bit for "
        "bit. Go on where it was begun, use another folder, or --overwrite to start afresh."
    )


def precise(device: torch.device, *, tf32: bool) -> None:
    """Let float32 products keep their bits, or round their factors to TF32's 11, in this process from now on.

    Raises:
        ValueError: If TF32 is asked for where there is none: nothing would be faster, and the run's record untrue.
    """
    if tf32 and device.type != "cuda":
        raise ValueError(f"--tf32 needs an NVIDIA GPU of 2020 or later, and this run is on {device}. Leave --tf32 out.")
    if tf32 and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        raise ValueError(
            f"--tf32 needs a GPU of compute capability 8.0 or more, and {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}. Leave --tf32 out."
        )
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # convolutions, which take TF32 unless they are told not to


def deterministic(device: torch.device) -> None:
    """Let a GPU give the same bits for the same work: replay is checked against the digests of the first pass.

    Call it before the first matrix product: cuBLAS reads its setting when it starts. A CPU needs nothing.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
