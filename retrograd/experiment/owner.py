"""Who owns a lease: a process of a machine since it was started, and whether that process is known to be dead.

A number of a process says nothing on another machine, after a restart, or in another namespace of processes; then
nobody is known to be dead.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Owner", "is_dead", "myself"]


class Owner(NamedTuple):
    """host: name of the machine; boot: which start of it, with the namespace of pid; started: of the process, in ticks
    since then; 0 where the system does not say."""

    pid: int
    host: str
    boot: str
    started: int


def myself() -> Owner:
    """This process."""
    return Owner(os.getpid(), platform.node(), _boot(), _started(os.getpid()) or 0)


def is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner, as a lease tells of it, is known to live no more."""
    me = myself()
    if (owner.get("host"), owner.get("boot")) != (me.host, me.boot) or not me.boot:
        return False
    started = _started(int(owner["pid"]))
    return started is None or (bool(owner["started"]) and started != owner["started"])


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process was started; None if there is none or it has ended and waits for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
