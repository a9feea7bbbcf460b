"""What is on disk after a kill, and after the power goes: the order of writes that makes every moment recoverable.

A kill keeps all that was written. A power failure keeps what was synced, may lose the rest in any order, and may cut a
file that was growing anywhere. These rules hold against both.

1. **A file has its name when it is whole.** It is written under a temporary name that no other process uses, synced,
   renamed, and its folder is synced: then it counts, and not before. Only then is removed what it replaces.
2. **A log grows by whole lines** (metrics.jsonl, digests.txt, retrains.jsonl). A line without its end is cut off before
   anything is appended, and no reader sees it. Lines are not synced one by one.
3. **Lines come first.** What is told of a step (its evaluation, its line, its digest, in this order) is written before
   a state after it is, and a step's pullback before its cotangent. Resume points, the final state and cotangents wait
   until the logs are synced. A state that only holds a place in a replay plan does not wait: see 4.
4. **A durable point counts only with all lines before it.** A run that goes on compares: a state, or the final one,
   beyond the first missing line or digest is removed, and training goes on from the last that has them all; a cotangent
   beyond a missing line is removed, and the sweep starts over. So a lost line costs work and changes no bit, for
   replay gives the same bits.
5. **One writer a folder** (`runs.lock`). Who has the folder alone removes temporary files that a kill left.
6. **Done is said last**: a phase stands in manifest.json once the files it wrote are synced. What starts a run afresh
   removes the manifest first and run_config.yaml last, so a folder half emptied is still a run that can be started.

What is removed may come back when the power goes. That is harmless: all of it is true of this run, and counts by 4.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["LOCK", "foreign", "make_folder", "remove", "remove_leftovers", "rename", "temporary_name", "to_disk"]

LOCK = ".lock"
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp|\.tmp[0-9A-Za-z]{6}")  # ours, and what safetensors writes first


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process, on whatever machine, uses.

    >>> temporary_name(Path("runs/scores.pt"))  # doctest: +ELLIPSIS
    PosixPath('runs/.scores.pt...tmp')
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def to_disk(path: Path) -> None:
    """Sync a file, or the names in a folder."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # systems that sync no folders
            raise
    finally:
        os.close(file)


def rename(temporary: Path, path: Path) -> None:
    """Give a whole file, or a folder of files, its name, durably. A folder must not be in the way of a folder."""
    for inside in temporary.rglob("*") if temporary.is_dir() else ():
        to_disk(inside)
    to_disk(temporary)
    os.replace(temporary, path)
    to_disk(path.parent)


def make_folder(folder: Path) -> bool:
    """Make a folder with those it lies in, durably; whether it is new."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        to_disk(path.parent)
    return bool(new)


def remove(path: Path) -> None:
    """Remove a file or a folder, whether or not it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders, at any depth; only for whoever has the folder alone."""
    for path in [path for path in folder.rglob(".*tmp*") if _TEMPORARY.fullmatch(path.name)]:
        remove(path)


def foreign(folder: Path) -> Iterator[str]:
    """Names in a folder besides locks and temporary files, which a killed command may have left in a new one."""
    for path in folder.iterdir():
        if not (path.name.startswith(LOCK) or _TEMPORARY.fullmatch(path.name)):
            yield path.name
