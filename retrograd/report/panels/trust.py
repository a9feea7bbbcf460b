"""May the scores be trusted? Certificate, agreement with retraining, smoothness, health; and a verdict in plain words.

trust it                 certified or not failed, LDS ≥ 0.95, its interval above 0, and changes of predicted size
trust the ranking only   the interval of LDS is above 0, but LDS is lower, or sizes are off by more than a factor 2
do not trust it          a check of the certificate failed, LDS's interval touches 0, or training is not smooth
not tested               none of that is known: a score is exact as a derivative, and may predict nothing
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from retrograd.report.panel import Content, Source, View
from retrograd.report.panels.setup import reproduce
from retrograd.report.subjects import Attribution

__all__ = ["judged", "retraining", "trust"]

GRADE = 0.95  # LDS that MAGIC reaches where training is smooth
ROUGH = 0.5  # metasmoothness below which a derivative says little about leaving out whole examples
_OLD = (
    "forecast.json is of an earlier version, which does not say what it found: retrograd metasmoothness makes it again"
)
FACTOR = 2.0  # between predicted and measured changes


def trust(run: Attribution, view: View) -> Content:
    """Every test that was made of the run, with a verdict for each query column."""
    certificate, validation, health = run.read("verify.json"), run.read("validation.json"), run.read("health.json")
    smooth, forecast = _smoothness(run.folder), run.read("forecast.json")
    train, reverse = run.journal
    named = _own_columns(run)
    data = {
        "columns": run.columns,
        "verdicts": {name: judged(name, certificate, validation, smooth, forecast) for name in run.columns},
        "certificate": certificate, "validation": validation, "smoothness": smooth,
        "findings": (health or {}).get("findings", []),
        "validated": validation is not None,
        "commands": {"verify": f"retrograd verify {run.folder}", "validate": _validate(run),
                     "metasmoothness": f"retrograd metasmoothness {run.folder}"},
        "train": {key: [entry.get(key) for entry in train] for key in ("step", "loss", "lr", "grad_norm")},
        "reverse": {key: [entry.get(key) for entry in reverse]
                    for key in ("step", "cotangent_norm", "mean_abs_score", "lr_times_sharpness")},
        "named": named,
    }  # fmt: skip
    sources = [Source(run.folder / "metrics.jsonl", reproduce(run)), Source(run.folder / "health.json", reproduce(run))]
    known = {"verify.json": "verify", "validation.json": "validate"}
    sources += [Source(run.folder / file, data["commands"][name]) for file, name in known.items()
                if (run.folder / file).exists()]  # fmt: skip
    if smooth:
        sources.append(Source(smooth["file"], data["commands"]["metasmoothness"]))
    return Content(data, sources)


def retraining(run: Attribution, view: View) -> Content | None:
    """Predicted against measured change, a point for each set that was left out."""
    path = run.folder / "validation.csv"
    if not path.exists():
        return None
    with path.open(encoding="utf8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    sets = [
        {"set": row["subset"] + _weight(row.get("weight", "0")), "fraction": float(row["fraction"]),
         "query": row["query"],
         "predicted": float(row["predicted"]), "measured": float(row["measured"])}
        for row in rows
    ]  # fmt: skip
    validation = run.read("validation.json") or {}
    tables = {name: validation.get(name, []) for name in ("methods", "filtering")}
    return Content({"columns": run.columns, "sets": sets, **tables}, [Source(path, _validate(run))])


def judged(
    name: str, certificate: dict[str, Any] | None, validation: dict[str, Any] | None, smooth: dict[str, Any] | None,
    forecast: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The verdict on one query column, with its reasons.

    Args:
        certificate, validation, smooth, forecast: verify.json, validation.json, a file of metasmoothness and
            forecast.json; None if not made.
    """
    reasons, bad, good = list[str](), list[str](), list[str]()
    if certificate is None:
        reasons.append("no independent certificate was made (retrograd verify)")
    elif certificate["verdict"] == "failed":
        bad.append(f"the certificate failed: {', '.join(certificate['failed'])}")
    else:
        reasons.append(f"the derivative is {certificate['verdict']}")
    if smooth is not None:
        (bad if smooth["value"] < ROUGH else reasons).append(f"metasmoothness is {smooth['value']:.3f}")
    if forecast is not None:
        reasons.append(f"forecast: {forecast['told']}" if "told" in forecast else _OLD)
    fractions = [
        fraction
        for fraction in (validation or {}).get("fractions", [])
        if fraction["fraction"] and name in fraction["queries"]
    ]
    for fraction in fractions:
        if fraction.get("missing"):
            share = _share(fraction)
            reasons.append(f"{share} not all sets are in the bank: {fraction['missing']} are missing")
    fractions = [fraction for fraction in fractions if not fraction.get("missing")]
    for fraction in fractions:
        words, held = _agreement(name, fraction)
        (bad if held is None else good if held else reasons).append(words)
    if not fractions:
        reasons.append("it was not held against retraining (retrograd validate)")
    ranked = bool(fractions) and not bad
    full = ranked and len(good) == len(fractions)
    verdict = "do not trust it" if bad else "trust it" if full else "trust the ranking only" if ranked else "not tested"
    return {"verdict": verdict, "reasons": [*bad, *good, *reasons]}


def _agreement(name: str, fraction: dict[str, Any]) -> tuple[str, bool | None]:
    """Words on a query's agreement at one fraction; True: rank and size hold, False: the rank alone, None: neither."""
    query, (low, high) = fraction["queries"][name], fraction["interval"]
    share = _share(fraction)
    if query["lds"] is None or low is None:
        return f"{share} too few sets were retrained to say anything", None
    words = f"LDS {query['lds']:.3f} {share} (mean of the queries {fraction['mean_lds']:.3f} [{low:.3f}, {high:.3f}])"
    if fraction["failed"]:
        return f"{words}; {fraction['failed']} retrainings diverged", None
    if low <= 0 or query["lds"] <= 0:
        return f"{words}: no rank correlation with retraining is shown", None
    slope = query["slope"]
    sized = slope is not None and 1 / FACTOR <= slope <= FACTOR
    size = f", changes {slope:.2f} times as large as predicted" if slope is not None else ""
    return words + size, sized and query["lds"] >= GRADE


def _share(fraction: dict[str, Any]) -> str:
    share, weight = f"{100 * fraction['fraction']:.3g} % of the documents", fraction.get("weight", 0.0)
    return f"with {share} at weight {weight:g}" if weight else f"without {share}"


def _weight(weight: str) -> str:
    return "" if float(weight) == 0 else f" at weight {weight}"


def _smoothness(folder: Path) -> dict[str, Any] | None:
    import json

    paths = sorted((folder / "metasmoothness").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {**json.loads(paths[-1].read_text(encoding="utf8")), "file": str(paths[-1])} if paths else None


def _validate(run: Attribution) -> str:
    """The call of validate that the files show."""
    fractions = [
        fraction for fraction in (run.read("validation.json") or {}).get("fractions", []) if fraction["fraction"]
    ]
    if not fractions:
        return f"retrograd validate {run.folder} --subsets 50 --fraction 0.01 0.05"
    number = max(query["sets"] for fraction in fractions for query in fraction["queries"].values())
    shares = " ".join(f"{fraction['fraction']:g}" for fraction in fractions)
    return f"retrograd validate {run.folder} --subsets {number} --fraction {shares}"


def _own_columns(run: Attribution) -> list[str]:
    """Columns of the run's own sweep, whose steps are in its journal."""
    reverse = run.journal[1]
    return run.columns[: len(reverse[0]["cotangent_norm"])] if reverse else []
