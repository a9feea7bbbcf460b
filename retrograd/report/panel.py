"""What a panel is: one template, one script, one function that gathers its data.

To add one: write templates/NAME.html and templates/NAME.js, and in `panels/` a function of (subject, view) that returns
a `Content`, or None where the subject has nothing of it to show; list them as a `Panel` in `panels/__init__.py`. The
template gets the content's data as `c`; the script registers itself by `retrograd.panel("NAME", (root, data) => …)` and
gets the same data. Text goes through `view.mask` before it is put there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrograd.report.mask import Mask
from retrograd.report.subjects import Subject

__all__ = ["Content", "Panel", "Source", "View"]


class Source(NamedTuple):
    """Where numbers come from: the file, and the command that makes it again."""

    file: Path | str
    command: str


class Content(NamedTuple):
    """What a panel shows. data: plain values, as JSON has them; arrays: by name; sources: of its numbers."""

    data: dict[str, Any]
    sources: list[Source]
    arrays: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True)
class View:
    """How subjects are looked at.

    tables: Arrays that several panels of a page share, by name; corpora: where a run's tokens are in them, by folder.
    """

    mask: Mask
    tables: dict[str, Content] = field(default_factory=dict)
    corpora: dict[str, Any] = field(default_factory=dict)


class Panel(NamedTuple):
    """name: of its template and its script; title: over it; of: the subjects it is about."""

    name: str
    title: str
    of: type[Subject]
    gather: Callable[[Any, View], Content | None]
