"""Leases of tasks in a folder that any number of workers see, on one machine or many. No locks, no server, no clock.

    tasks/NAME/lease-3.json   who took the task over as the third; only one can make a file of a name
               beat-3         a count that its owner raises when the task makes progress
               freed-3        its owner gave it back
               3/             what that owner writes
               done.json      the result, or failed.json: the reason; only one can make it

The owner is who has the highest number. A task can be taken if it has no owner, if its owner gave it back or is known
to be dead, or if the beat has stood still for `seconds` by the clock of whoever looks. Each owner writes into a folder
of its own, into which the next one takes what is there: so a late owner, who was stopped and wakes, spoils nothing, and
finds at its next beat that it has lost the task.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from retrograd.durable import LOCK, make_folder, rename, temporary_name, to_disk
from retrograd.experiment.owner import Owner, is_dead, myself

__all__ = ["Lease", "LeaseLostError", "Queue"]

_LEASE = re.compile(r"lease-(\d+)\.json")


class LeaseLostError(BaseException):
    """Another worker has the task. No `except` of a task may take it for the task's own failure."""


class Lease(NamedTuple):
    """A task that is held: by its name, and as which owner."""

    name: str
    number: int


class Queue:
    """The tasks of a folder, as one worker sees them.

    Args:
        folder: Holds a folder for each task.
        seconds: Without a beat after which a task can be taken over.
    """

    def __init__(self, folder: Path, seconds: float, me: Owner | None = None) -> None:
        self.folder, self.seconds, self.me = folder, seconds, me or myself()
        self._seen: dict[Lease, tuple[str, float]] = {}  # the beat, and when it was first seen
        self._settled: dict[tuple[str, str], dict[str, Any]] = {}

    def take(self, name: str) -> Lease | None:
        """The task, if it can be taken, with what its last owner left; None if another has it or it is settled."""
        if self.result(name) is not None or self.failure(name) is not None:
            return None
        last = self._last(name)
        if last is not None and not self._free(last):
            return None
        lease = Lease(name, last.number + 1 if last else 1)
        folder = self.folder / name
        make_folder(folder)
        owner = {**self.me._asdict(), "since": time.time()}
        if not _only_one(folder / f"lease-{lease.number}.json", json.dumps(owner)):
            return None
        if self.result(name) is not None:  # settled in between
            self.give_back(lease)
            return None
        self._inherit(lease)
        return lease

    def place(self, lease: Lease) -> Path:
        """The folder that this owner writes into."""
        return self.folder / lease.name / str(lease.number)

    def beat(self, lease: Lease) -> None:
        """Tell that the task made progress.

        Raises:
            LeaseLostError: If another worker has taken it.
        """
        self.check(lease)
        path = self.folder / lease.name / f"beat-{lease.number}"
        temporary = temporary_name(path)
        temporary.write_text(str(time.time_ns()))
        os.replace(temporary, path)

    def check(self, lease: Lease) -> None:
        """Raises:
        LeaseLostError: If another worker has taken the task, or it is settled.
        """
        if self._last(lease.name) != lease or (self.folder / lease.name / "done.json").exists():
            raise LeaseLostError(lease.name)

    def finish(self, lease: Lease, outcome: dict[str, Any]) -> None:
        """Settle the task: its outcome, with the owner's number, which says where its files are.

        Raises:
            LeaseLostError: If another worker has taken it.
        """
        self._settle(lease, "done", outcome)

    def fail(self, lease: Lease, reason: str) -> None:
        """Settle the task as failed; raises as `finish`."""
        self._settle(lease, "failed", {"reason": reason})

    def give_back(self, lease: Lease) -> None:
        """Let another take it at once."""
        _only_one(self.folder / lease.name / f"freed-{lease.number}", "")

    def result(self, name: str) -> dict[str, Any] | None:
        """The outcome of a task that is done, with `place`, the folder of its files."""
        outcome = self._read(name, "done")
        return None if outcome is None else {**outcome, "place": str(self.folder / name / str(outcome["owner"]))}

    def failure(self, name: str) -> str | None:
        """Why a task failed."""
        outcome = self._read(name, "failed")
        return None if outcome is None else str(outcome["reason"])

    def forget_failures(self) -> None:
        """Let everything that failed be tried again."""
        for path in self.folder.glob("*/failed.json"):
            last = self._last(path.parent.name)
            if last is not None:
                self.give_back(last)
            path.unlink(missing_ok=True)
        self._settled = {key: outcome for key, outcome in self._settled.items() if key[1] == "done"}

    def _settle(self, lease: Lease, what: str, values: dict[str, Any]) -> None:
        self.check(lease)
        text = json.dumps({"owner": lease.number, **values}, indent=2, ensure_ascii=False)
        if not _only_one(self.folder / lease.name / f"{what}.json", text):
            raise LeaseLostError(lease.name)

    def _read(self, name: str, what: str) -> dict[str, Any] | None:
        if (name, what) not in self._settled:
            try:
                text = (self.folder / name / f"{what}.json").read_text(encoding="utf8")
            except FileNotFoundError:
                return None
            self._settled[name, what] = json.loads(text)
        return self._settled[name, what]

    def _last(self, name: str) -> Lease | None:
        try:
            numbers = [int(match[1]) for file in os.listdir(self.folder / name) if (match := _LEASE.fullmatch(file))]
        except FileNotFoundError:
            return None
        return Lease(name, max(numbers)) if numbers else None

    def _free(self, lease: Lease) -> bool:
        return self._let_go(lease) or self._stands_still(lease)

    def _let_go(self, lease: Lease) -> bool:
        """Whether its owner gave it back or is dead, so that nobody writes there any more."""
        folder = self.folder / lease.name
        if (folder / f"freed-{lease.number}").exists():
            return True
        return is_dead(json.loads((folder / f"lease-{lease.number}.json").read_text(encoding="utf8")))

    def _stands_still(self, lease: Lease) -> bool:
        try:
            beat = (self.folder / lease.name / f"beat-{lease.number}").read_text()
        except FileNotFoundError:
            beat = ""
        now = time.monotonic()
        known, since = self._seen.get(lease, (None, now))
        if known != beat:
            since = now
        self._seen[lease] = (beat, since)
        return now - since >= self.seconds

    def _inherit(self, lease: Lease) -> None:
        """What the last owner left, as its files are whole at every moment and what is told comes before its state."""
        new = self.place(lease)
        numbers = [int(path.name) for path in new.parent.iterdir() if path.name.isdecimal()]
        there = [number for number in numbers if number < lease.number]  # a later owner's is not ours to take
        if not there:
            make_folder(new)
            return
        last = Lease(lease.name, max(there))
        if self._let_go(last):
            os.rename(self.place(last), new)
            to_disk(new.parent)
        else:
            _copied(self.place(last), new)


def _only_one(path: Path, text: str) -> bool:
    """Write a file that is whole when it has its name, if no other process did; whether it did not."""
    temporary = temporary_name(path)
    temporary.write_text(text, encoding="utf8")
    try:
        to_disk(temporary)
        os.link(temporary, path)
        to_disk(path.parent)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _copied(old: Path, new: Path) -> None:
    """A copy of what somebody may still be writing: what says that a phase is done first, then states, then logs.

    A log then has every line that was written before the states copied (`retrograd.durable`, rule 3).
    """
    temporary = temporary_name(new)
    make_folder(temporary)
    files = [path for path in old.rglob("*") if path.is_file() and not path.name.startswith((LOCK, "."))]
    for path in sorted(files, key=_turn):
        target = temporary / path.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except FileNotFoundError:  # a state that is needed no more
            target.unlink(missing_ok=True)
    rename(temporary, new)


def _turn(path: Path) -> tuple[int, str]:
    order = {".json": 0, ".yaml": 0, ".safetensors": 1}
    return order.get(path.suffix, 2), str(path)
