"""What the machine has to give, and how its GPU is made to repeat itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["deterministic", "free_memory"]


def free_memory() -> int:
    """Bytes of host memory that processes can still take; a guess of 4 GiB where the system does not tell."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def deterministic(device: torch.device) -> None:
    """Let a GPU give the same bits for the same work: replay is checked against the digests of the first pass.

    Call it before the first matrix product: cuBLAS reads its setting when it starts. A CPU needs nothing.
    """
    import torch

    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
