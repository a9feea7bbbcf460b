"""Hardening, iteration by iteration: the objective, what predicts it, the held-out attacks, and what was learnt."""

from __future__ import annotations

from typing import Any

from retrograd.report.panel import Content, Source, View
from retrograd.report.subjects import Hardened

__all__ = ["harden"]

_SHOWN = ("iteration", "objective", "held_out", "retain_kl", "expected_change", "measured_change", "metasmoothness",
          "gradient_norm", "largest_weight", "objective.forget", "objective.retain", "train.lr")  # fmt: skip


def harden(subject: Hardened, view: View) -> Content:
    """All iterations; forget loss after each attack that was learnt against, and after each held-out one."""
    outcome, config = subject.found, subject.config
    lines = [{name: iteration.get(name) for name in _SHOWN} for iteration in outcome["iterations"]]
    learnt = [
        sum(iteration["forget_after_attack"]) / len(iteration["forget_after_attack"])
        for iteration in outcome["iterations"]
    ]
    held = [iteration["held_out_forget"] for iteration in outcome["iterations"]]
    data: dict[str, Any] = {
        "iterations": lines, "best": outcome["best"], "forget": learnt,
        "held": [[losses[k] for losses in held] for k in range(len(held[0]))],
        "attacks": {name: config.get(name) for name in ("suite", "held_out", "sample", "learn", "mu")},
        "settings": [name for name in _SHOWN if "." in name and lines[0][name] is not None],
    }  # fmt: skip
    return Content(data, [Source(subject.folder / "harden.json", f"retrograd harden {subject.folder} …")])
