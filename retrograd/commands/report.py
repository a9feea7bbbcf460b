"""`retrograd report`: one page that opens offline."""

from __future__ import annotations

from retrograd.report.report import report

__all__ = ["report"]
