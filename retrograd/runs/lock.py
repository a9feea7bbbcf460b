"""One writer a folder: a lock that names its holder, and that no dead process holds.

The operating system holds the lock (flock) and lets go of it when the process ends, however it ends, or the machine
does: there is nothing stale to take over. The file says who the holder is. It is removed when the lock is given back; a
kill leaves it behind, and the next holder writes over it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from retrograd.durable import LOCK, make_folder, remove_leftovers
from retrograd.runs.errors import RunError

__all__ = ["locked"]

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_held: set[int] = set()  # file descriptors of this process's locks


@contextlib.contextmanager
def locked(
    folder: Path, name: str = LOCK, *, shared: bool = False, patience: float = 0.3, tidy: bool = True
) -> Iterator[None]:
    """Hold a folder, which is made if there is none, and removed again if it is empty then.

    Args:
        name: Of the lock's file, for locks of parts of what a folder holds; it has to begin with `LOCK`.
        shared: With others that share it; none has it alone meanwhile.
        patience: Seconds to wait for whoever has it.
        tidy: Remove temporary files that a kill left in the folder, if it is held alone.
    Raises:
        ValueError: If another process has it, with its number, machine, command and since when.
        RunError: If the lock's file cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    try:
        new = make_folder(folder)
        file = _acquired(folder / name, shared, time.monotonic() + patience)
    except OSError as error:
        raise RunError(f"cannot write {folder / name}: {error}") from error
    _held.add(file)
    try:
        if tidy and not shared and name == LOCK:
            remove_leftovers(folder)
        yield
    finally:
        _held.discard(file)
        _release(file, folder / name, shared)
        if new:
            with contextlib.suppress(OSError):  # it has been filled
                folder.rmdir()


def _acquired(path: Path, shared: bool, until: float) -> int:
    """The open file of a lock that is held."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _flock(file, fcntl.LOCK_EX)
            if free:  # whoever left something in it is gone
                os.ftruncate(file, 0)
            held = _flock(file, fcntl.LOCK_SH) if shared else free
            if held and _is(file, path):
                os.lseek(file, 0, os.SEEK_END)
                os.write(file, _myself())
                return file
        except BaseException:
            os.close(file)
            raise
        holders = _holders(file)
        os.close(file)
        if not held:
            if time.monotonic() >= until:
                raise ValueError(_refusal(path.parent, holders))
            time.sleep(0.05)


def _release(file: int, path: Path, shared: bool) -> None:
    """The name goes while the lock is held, so that nobody gets a lock on a file that is about to go."""
    with contextlib.suppress(OSError):
        if (not shared or _flock(file, fcntl.LOCK_EX)) and _is(file, path):
            path.unlink()
    os.close(file)


def _flock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            "this file system has no locks: see to it yourself that one command at a time writes into the folder",
            stacklevel=5,
        )
    return True


def _is(file: int, path: Path) -> bool:
    """Whether the open file is the one of that name: its last holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _myself() -> bytes:
    holder = {
        "pid": os.getpid(), "host": platform.node(), "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
    }  # fmt: skip
    return json.dumps(holder).encode() + b"\n"


def _holders(file: int) -> list[dict[str, Any]]:
    """Who says that it holds the lock and is not known to be dead."""
    holders = []
    for line in os.pread(file, 1 << 20, 0).split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            holder = json.loads(line)
            if holder["host"] != platform.node() or _lives(int(holder["pid"])):
                holders.append(holder)
    return holders


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _refusal(folder: Path, holders: list[dict[str, Any]]) -> str:
    words = [
        f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
        for holder in holders
    ]
    return (
        f"{folder} is in use by {'; '.join(words) or 'another process'}. Two writers would spoil it: wait until that "
        "one has ended, or use another folder."
    )


def _let_go_in_child() -> None:
    for file in _held:  # or a child would hold the lock beyond its parent's death
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
