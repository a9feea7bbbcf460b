"""Attacks on unlearned models: what comes back, by configuration, with the controls beside it."""

from __future__ import annotations

from typing import Any

from retrograd.attack.tell import cells
from retrograd.report.panel import Content, Source, View
from retrograd.report.subjects import Attack

__all__ = ["tamper"]


def tamper(subject: Attack, view: View) -> Content:
    """Accuracy on what was to go and to stay along each attack; the table; the worst case of each model."""
    found = subject.found
    head, rows = cells(found)
    named = {
        name: f"{one['role']}: {name}" if one["role"] != "model" else name for name, one in found["models"].items()
    }
    shown = ("step", "tokens", "strength", "forget", "forget_interval", "retain")
    curves = [
        {"model": named[one["model"]], "role": one["role"], "configuration": one["configuration"],
         "points": [{key: point.get(key) for key in shown} for point in one["points"]]}
        for one in found["meetings"]
    ]  # fmt: skip
    data: dict[str, Any] = {
        "curves": curves, "head": head, "rows": rows,
        "configurations": {name: one["readable"] for name, one in found["configurations"].items()},
        "invalid": {name: valid["why"] for name, one in found["configurations"].items()
                    if (valid := one["valid"]) and valid["valid"] is False},
        "worst": [{"model": named[model], **case} for model, cases in found["worst"].items() for case in cases],
    }  # fmt: skip
    command = f"retrograd attack {subject.folder} …"
    return Content(data, [Source(subject.folder / "recovery.json", command)])
