"""The manifest of a run: what it is made of, by hash, and how far it has come."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrograd.runs.files import write_json

__all__ = ["SIGN", "Manifest", "environment"]

SIGN = (
    "Scores are derivatives of the query loss with respect to data weights, in nats per unit of weight, aligned with "
    "targets. Negative: a proponent, training on it lowers the query loss. Positive: a detractor."
)


class Manifest:
    """manifest.json, written again after every phase."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}

    def update(self, **values: Any) -> None:
        """Set entries and write the file."""
        self.values |= values
        write_json(self.path, self.values)

    def done(self, phase: str) -> bool:
        return phase in self.values.get("phases", {})

    @contextmanager
    def phase(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a phase; it counts as done when the block ends without an error."""
        start, before, record = time.monotonic(), time.process_time(), dict[str, Any]()
        yield record
        record |= {
            "seconds": round(time.monotonic() - start, 3), "cpu_seconds": round(time.process_time() - before, 3),
            "peak_memory_bytes": _peak_memory(),
        }  # fmt: skip
        self.update(phases={**self.values.get("phases", {}), name: record})


def environment() -> dict[str, Any]:
    """Versions of Python and of the libraries."""
    libraries = ("retrograd", "torch", "transformers", "datasets", "peft", "numpy", "safetensors")
    return {"versions": {library: _version(library) for library in libraries}, "python": platform.python_version()}


@functools.cache
def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _peak_memory() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
