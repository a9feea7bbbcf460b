"""Pictures as single HTML files, drawn by plotly, which is inside the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Curve", "curves", "scatter"]

MOST = 12  # queries or tasks drawn at once; the others are a click away in the legend


class Curve(NamedTuple):
    """values by step, None where missing; intervals: (low, high) by step, if there are any."""

    name: str
    steps: Sequence[int]
    values: Sequence[float | None]
    intervals: Sequence[Sequence[float] | None] = ()


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], title: str, marked: int | None = None) -> str:
    """Values against the training step, a panel under another for each unit.

    Args:
        panels: (what the vertical axis shows, its curves); panels without a curve are left out.
        marked: A step to point out.
    """
    from plotly.subplots import make_subplots

    shown = [(axis, found) for axis, found in panels if found]
    figure = make_subplots(rows=max(1, len(shown)), shared_xaxes=True, vertical_spacing=0.06)
    for row, (axis, found) in enumerate(shown, start=1):
        for number, curve in enumerate(found):
            visible: Any = True if number < MOST else "legendonly"
            figure.add_scatter(
                x=list(curve.steps), y=list(curve.values), error_y=_bars(curve), name=curve.name, visible=visible,
                mode="lines+markers", row=row, col=1,
            )  # fmt: skip
        figure.update_yaxes(title_text=axis, row=row, col=1)
    if marked is not None and shown:
        figure.add_vline(x=marked, line={"dash": "dot", "color": "gray"}, annotation_text=f"best: step {marked}")
    figure.update_xaxes(title_text="training step", row=max(1, len(shown)), col=1)
    figure.update_layout(title=title, template="plotly_white", height=200 + 320 * max(1, len(shown)))
    return figure.to_html(include_plotlyjs=True)


def _bars(curve: Curve) -> dict[str, Any] | None:
    """Intervals as plotly draws them: distances from the value."""
    if not curve.intervals:
        return None
    pairs = [(v, i) if v is not None and i else (0.0, (0.0, 0.0)) for v, i in zip(curve.values, curve.intervals)]
    up, down = [high - v for v, (_, high) in pairs], [v - low for v, (low, _) in pairs]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 0.6, "width": 2}


def scatter(sets: Sequence[tuple[str, float, np.ndarray, np.ndarray]], names: Sequence[str]) -> str:
    """Predicted against measured change of each query, a point for each left-out set, with the line of equality.

    Args:
        sets: (name, fraction, predicted [K], measured [K]) of each set.
        names: Of the K queries.
    """
    from plotly import graph_objects as go

    figure = go.Figure()
    fractions = sorted({fraction for _, fraction, _, _ in sets})
    for k, name in enumerate(names):
        for fraction in fractions:
            chosen = [(one, p[k], m[k]) for one, share, p, m in sets if share == fraction]
            labels, x, y = zip(*chosen, strict=True)
            label = f"{name}, {fraction:.3g} left out"
            hint = "%{text}<br>predicted %{x:.3g}<br>measured %{y:.3g}<extra>" + label + "</extra>"
            visible: Any = True if k < MOST else "legendonly"
            figure.add_scatter(
                x=x, y=y, text=[f"set {one}" for one in labels], mode="markers", name=label, hovertemplate=hint,
                visible=visible,
            )  # fmt: skip
    ends = [float(f(p)) for _, _, p, _ in sets for f in (np.min, np.max)]
    if ends:
        line = [min(ends), max(ends)]
        figure.add_scatter(x=line, y=line, mode="lines", name="equal", line={"dash": "dot", "color": "gray"})
    figure.update_layout(
        title="Query loss without a set of training data: predicted against measured",
        xaxis_title="predicted change, −Σ score (nats)", yaxis_title="measured change by retraining (nats)",
        template="plotly_white",
    )  # fmt: skip
    return figure.to_html(include_plotlyjs=True)
