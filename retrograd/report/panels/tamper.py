"""Attacks on unlearned models: what comes back, by configuration, with the controls beside it."""

from __future__ import annotations

from typing import Any

from retrograd.attack.tell import cells
from retrograd.report.panel import Content, Source, View
from retrograd.report.subjects import Attack

__all__ = ["tamper"]


def tamper(subject: Attack, view: View) -> Content:
    """Accuracy on what was to go and to stay along each attack; the table; the worst case of each model."""
    recovery = subject.found
    head, rows = cells(recovery)
    configurations = recovery["configurations"].items()
    named = {
        name: f"{model['role']}: {name}" if model["role"] != "model" else name
        for name, model in recovery["models"].items()
    }
    shown = ("step", "tokens", "strength", "forget", "forget_interval", "retain")
    curves = [
        {"model": named[meeting["model"]], "role": meeting["role"], "configuration": meeting["configuration"],
         "points": [{key: point.get(key) for key in shown} for point in meeting["points"]]}
        for meeting in recovery["meetings"]
    ]  # fmt: skip
    data: dict[str, Any] = {
        "curves": curves, "head": head, "rows": rows,
        "configurations": {name: configuration["readable"] for name, configuration in configurations},
        "invalid": {name: valid["why"] for name, configuration in configurations
                    if (valid := configuration["valid"]) and valid["valid"] is False},
        "worst": [{"model": named[model], **case} for model, cases in recovery["worst"].items() for case in cases],
    }  # fmt: skip
    command = f"retrograd attack {subject.folder} …"
    return Content(data, [Source(subject.folder / "recovery.json", command)])
