"""Whether the other ranks of a job are still there: every one has a pulse in the job's store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrograd.parallel.group import Group

__all__ = ["Pulses"]


class Pulses:
    """Which ranks beat, from now on."""

    def __init__(self, group: Group) -> None:
        self.group, self.since = group, time.monotonic()
        self.first = self._read()

    def still(self) -> list[int]:
        """Ranks that have not beaten since."""
        return [rank for rank, count in self._read().items() if count == self.first[rank]]

    def late(self) -> str:
        """What to say of ranks that have not beaten for longer than patience; empty if there is none."""
        if time.monotonic() - self.since < self.group.patience:
            return ""
        if still := self.still():
            return f"rank {', '.join(map(str, still))} has stopped for {self.group.patience:g} s (--patience)"
        self.since, self.first = time.monotonic(), self._read()
        return ""

    def _read(self) -> dict[int, bytes]:
        store, ranks = self.group._store, [r for r in range(self.group.world) if r != self.group.rank]
        return {r: store.get(f"pulse/{r}") if store.check([f"pulse/{r}"]) else b"" for r in ranks}
