"""The answers behind the cells of a comparison: questions once, and for each run what it answered before and after.

An answer is two bytes: the option that the model chose (254: it failed, 255: not asked), and the probability of the
right one in 1/250 (255: none). Runs that answer alike share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.attack.behind import MOMENTS, Given, asked_tasks, read_run
from retrograd.attack.folder import read_folder
from retrograd.report.mask import Mask
from retrograd.report.panels.questions import MOST, texts_of
from retrograd.report.subjects import Attack
from retrograd.settings.tasks import Task, tasks_from

__all__ = ["MOST_ANSWERS", "Behind", "answers_behind"]

MOST_ANSWERS = 3_000_000  # of a page: 6 MB before they are packed
_FAILED, _NOT_ASKED, _LEVELS = 254, 255, 250

_Cell = tuple[str, str]


class Behind(NamedTuple):
    """What the panel needs besides its cells.

    runs: By group and attack; each run says which row of the arrays its answers are at every moment.
    questions, tasks: As they may be shown; arrays: `chosen` and `probability`, [rows · questions] uint8.
    why: What is not shown, in words.
    """

    runs: dict[_Cell, list[dict[str, Any]]]
    questions: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]
    why: str


def answers_behind(subject: Attack, comparison: dict[str, Any], mask: Mask) -> Behind:
    """The answers behind every cell of a compare.json, as many as a page may hold."""
    cells = {(cell["group"], cell["attack"]): cell["runs"] for cell in comparison["cells"] if "runs" in cell}
    if not cells:
        again = f"retrograd compare {subject.folder}"
        return _nothing(f"an earlier version made this table: after {again} its cells can be opened")
    tasks = asked_tasks(tasks_from(read_folder(subject.folder).tasks))
    for most, why in ((None, ""), (1, "a page cannot hold the answers of all runs: each cell opens to its first one")):
        table = _Table(subject.folder, tasks)
        runs = {cell: [table.add(run) for run in mine[:most]] for cell, mine in cells.items()}
        if table.size <= MOST_ANSWERS:
            gone = f"the answers of {', '.join(sorted(table.gone))} are not there any more" if table.gone else ""
            listed = list(table.listed(mask, comparison["questions"]))
            return Behind(runs, [entry for task in listed for entry in task.pop("entries")], listed, table.arrays(),
                          "; ".join(filter(None, (why, gone))))  # fmt: skip
    where = subject.folder / "models" / "MODEL" / "CONFIGURATION"
    return _nothing(f"a page cannot hold the answers behind the cells; they are in {where}")


def _nothing(why: str) -> Behind:
    return Behind({}, [], [], {}, why)


class _Table:
    """Rows of answers to all questions that are listed, each different one once."""

    def __init__(self, folder: Path, tasks: dict[str, Task]) -> None:
        self.folder, self.tasks = folder, tasks
        self.rows: dict[tuple[bytes | None, ...], int] = {}  # by task; null where it was not asked
        self.counts: dict[str, int] = {}  # questions by task
        self.right: dict[str, np.ndarray] = {}
        self.gone: set[str] = set()

    @property
    def size(self) -> int:
        return len(self.rows) * sum(min(MOST, count) for count in self.counts.values())

    def add(self, run: dict[str, Any]) -> dict[str, Any]:
        """A run with the rows of its answers; null where there are none."""
        shown: dict[str, Any] = {"model": run["model"], "seed": run["seed"]}
        for moment in MOMENTS:
            where = run[moment]
            given = {} if where is None else read_run(self.folder / run["folder"], where, self.tasks)
            if where is not None and not given:
                self.gone.add(run["folder"])
            shown[moment] = {"row": self._row(given), "at": _at(where)} if given else None
        return shown

    def _row(self, given: dict[str, Given]) -> int:
        for name, answers in given.items():
            self.counts.setdefault(name, len(answers.right))
            self.right.setdefault(name, answers.right[:MOST])
        packed = tuple(_packed(given[name]).tobytes() if name in given else None for name in self.tasks)
        return self.rows.setdefault(packed, len(self.rows))

    def arrays(self) -> dict[str, np.ndarray]:
        """chosen and probability, row after row."""
        counts = [min(MOST, self.counts.get(name, 0)) for name in self.tasks]
        parts = [
            [np.full((2, n), _NOT_ASKED, np.uint8) if packed is None else np.frombuffer(packed, np.uint8).reshape(2, n)
             for packed, n in zip(row, counts)]
            for row in self.rows
        ]  # fmt: skip
        both = np.stack([np.concatenate(row, axis=1) for row in parts], axis=1)  # [2, rows, questions]
        return {"chosen": both[0].reshape(-1), "probability": both[1].reshape(-1)}

    def listed(self, mask: Mask, halves: dict[str, Sequence[int] | None]) -> Iterator[dict[str, Any]]:
        """Every task with its questions; place: of its first forget question among all of them."""
        place = 0
        for name, task in self.tasks.items():
            count = self.counts.get(name, 0)
            texts, why = texts_of({**vars(task), "limit": count}, count, mask) if count else ([], "it was not asked")
            forget = task.role == "forget"
            entries = [
                {"question": text["question"], "choices": text["choices"], "right": int(right),
                 **({key: _bit(bits, place + k) for key, bits in halves.items()} if forget else {})}
                for k, (text, right) in enumerate(zip(texts or _untold(count), self.right.get(name, ())))
            ]  # fmt: skip
            more = f"the first {MOST:,} of {count:,} are listed" if count > MOST else ""
            yield {"name": name, "side": "forget" if forget else "retain", "count": len(entries), "entries": entries,
                   "why": "; ".join(filter(None, (why, more)))}  # fmt: skip
            place += count if forget else 0


def _packed(given: Given) -> np.ndarray:
    """[2, listed questions] uint8."""
    chosen = np.where(given.chosen < 0, _FAILED, given.chosen)
    level = np.where(np.isnan(given.probability), _NOT_ASKED, np.rint(_LEVELS * given.probability))
    return np.stack([chosen[:MOST], level[:MOST]]).astype(np.uint8)


def _untold(count: int) -> list[dict[str, Any]]:
    return [{"question": f"question {k + 1}", "choices": None} for k in range(min(MOST, count))]


def _bit(bits: Sequence[int] | None, place: int) -> int | None:
    return None if bits is None else bits[place]


def _at(where: dict[str, Any]) -> str:
    if where["strength"] is not None:
        return f"strength {where['strength']:g}"
    return f"step {where['step']}"
