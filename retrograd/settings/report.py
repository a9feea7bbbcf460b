"""The configuration of `retrograd report`. No heavy imports here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["ReportConfig"]


@dataclass(frozen=True)
class ReportConfig:
    """One page that opens offline: of runs, evaluations, experiments and attacks, one or any of them together.

    Text of a corpus to forget is masked, with its hash and its length: that of --forget, and that of each run of
    `retrograd unlearn` among the folders, or which a folder's models were made with.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH…")] = tyro.MISSING
    """Folders of `retrograd magic`, `train`, `unlearn`, `evaluate`, `experiment` or `attack`. Token runs on the same
    rows share one map."""
    output: Path | None = None
    """The page; report.html in the first folder when None."""
    title: str | None = None
    """Of the page; the folders' names when None."""
    forget: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Corpus whose text is masked; may be given several times, as for `retrograd unlearn`."""
    retain: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Corpus whose words may be shown although a corpus to forget has them too."""
    show_forget: bool = False
    """Show the text of corpora to forget."""
