"""Pictures as single HTML files, drawn by plotly, which is inside the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["scatter"]

MOST = 12  # queries drawn at once; the others are a click away in the legend


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
