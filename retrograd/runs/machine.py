"""What the machine has to give: memory, and a garbage collector that leaves alone what stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["free_memory", "settled"]


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
