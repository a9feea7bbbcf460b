"""What the machine has to give, and how it is made to repeat itself and not to dawdle."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["deterministic", "free_memory", "settled"]


def free_memory() -> int:
    """Bytes of host memory that processes can still take; a guess of 4 GiB where the system does not tell."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 4 << 30


@contextmanager
def settled() -> Iterator[None]:
    """Collections of garbage leave out what is there already: libraries and a model are some 100,000 objects."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def deterministic(device: torch.device) -> None:
    """Let a GPU give the same bits for the same work: replay is checked against the digests of the first pass.

    Call it before the first matrix product: cuBLAS reads its setting when it starts. A CPU needs nothing.
    """
    import torch

    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
