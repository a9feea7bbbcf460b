"""What was run, in a sentence; and the table that researchers paste, on the page and as results.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retrograd.report.page import render_markdown
from retrograd.report.panel import Content, Source, View
from retrograd.report.subjects import Attribution, Training
from retrograd.runs.files import write_atomic

__all__ = ["results", "setup", "training", "write_results_table"]

ENDS = 10
_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}


def setup(run: Attribution, view: View) -> Content:
    """The run's sentence and its table."""
    return Content(results(run, view), [Source(run.folder / "manifest.json", reproduce(run))])


def training(run: Training, view: View) -> Content:
    """A training without scores: its sentence, and its losses by step."""
    train, _ = run.journal
    data = {
        "sentence": _trained(run, view), "settings": _settings(run), "phases": _phases(run),
        "steps": [entry["step"] for entry in train], "loss": [entry["loss"] for entry in train],
        "flags": run.manifest.get("flags", []), "formula": run.manifest.get("formula"),
    }  # fmt: skip
    return Content(data, [Source(run.folder / "metrics.jsonl", reproduce(run))])


def reproduce(run: Attribution | Training) -> str:
    """The command that repeats a run."""
    method = f" {run.manifest['method']}" if run.command == "unlearn" else ""
    return f"retrograd {run.command}{method} NEW_FOLDER --config {run.folder / 'run_config.yaml'}"


def results(run: Attribution, view: View) -> dict[str, Any]:
    """What the table says: set-up, time and memory, shape and spread of the scores, both ends, files."""
    tokens = run.tokens
    shown = [_spread(run, column, name) for column, name in enumerate(run.columns)]
    return {
        "sentence": _sentence(run, view), "settings": _settings(run), "phases": _phases(run), "spreads": shown,
        "ends": [_ends(run, view, column) for column in range(len(run.columns))],
        "columns": run.columns, "per_token": tokens is not None, "files": files(run.folder),
        "command": reproduce(run), "left_out": run.left_out,
    }  # fmt: skip


def write_results_table(run: Attribution, view: View) -> Path:
    """results.md in the run's folder: the page's first table as Markdown."""
    path = run.folder / "results.md"
    text = render_markdown("results.md", name=run.name, **results(run, view))
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf8"))
    return path


def files(folder: Path) -> list[dict[str, Any]]:
    """Files of a run that someone may open, with their sizes in bytes; states and temporary ones left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        {"name": str(path.relative_to(folder)), "bytes": path.stat().st_size}
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.relative_to(folder).parts[0] not in ("checkpoints", "report.html", "results.md")
    ][:200]


def _sentence(run: Attribution, view: View) -> str:
    what = "each of its training tokens" if run.tokens is not None else "each of its training documents"
    names_shown = dict.fromkeys(column.split("/")[0] for column in run.columns)
    asked = [run.queries[name] for name in names_shown if name in run.queries]
    names = " and ".join(_asked(query) for query in asked[:3]) + (" and others" if len(asked) > 3 else "")
    count = len(run.columns)
    several = f"{count} losses" if count > 1 else "the loss"
    return (
        f"{_trained(run, view)} For {what} a score says how {several} of the finished model would change if training "
        f"had weighed it more: the loss on {names}. Negative: training on this lowers the query loss."
    )


def _asked(query: dict[str, Any]) -> str:
    count = query.get("questions") or query.get("documents")
    what = {"choices": "questions", "text": "documents"}.get(query.get("kind", ""), "")
    return f"“{query['name']}”" + (f" ({count} {what if count != 1 else what[:-1]})" if count and what else "")


def _trained(run: Attribution | Training, view: View) -> str:
    """Which model was trained how on what."""
    config, manifest = run.config, run.manifest
    train, rows = config["train"], manifest.get("rows", {})
    method = f" to forget, by {manifest['method']}," if "method" in manifest else ""
    if "data" in config:
        data = f"{rows.get('documents', 0):,} documents of {_short(config['data']['dataset'])}"
    else:
        named = [f"{_short(source)} to {what}" for what in ("forget", "retain") for source in config.get(what) or ()]
        data = " and ".join(named)
    parameters = manifest.get("parameters")
    size = f", {parameters:,} parameters," if parameters else ""
    return (
        f"{_short(str(config['model']))}{size} was trained{method} for {manifest.get('steps', 0):,} steps of "
        f"{_OPTIMIZERS.get(train['optimizer'], train['optimizer'])} on {data}."
    )


def _short(name: Any) -> str:
    """The last two parts of a path, or a hub name."""
    return "/".join(Path(str(name).partition(",")[0]).parts[-2:]) if name else "?"


def _settings(run: Attribution | Training) -> list[tuple[str, str]]:
    config, manifest = run.config, run.manifest
    train, rows, arithmetic = config["train"], manifest.get("rows", {}), manifest.get("arithmetic", {})
    data = config["data"]["dataset"] if "data" in config else ", ".join(config.get("forget") or ())
    shape = "packed" if rows.get("packed") else "a document each"
    targets = f"{rows.get('targets', 0):,} targets, longest {rows.get('longest', 0)}"
    name = _OPTIMIZERS.get(train["optimizer"], train["optimizer"])
    rate = f"lr {train['lr']:g} {train['lr_schedule']}, ε_root {train['eps_root']:g}, decay {train['weight_decay']:g}"
    device = f"{arithmetic.get('device', '?')} ({arithmetic.get('device_name', '?')})"
    threads = f"{arithmetic.get('threads', '?')} threads, engine {arithmetic.get('engine', '?')}"
    about = {
        "model": str(config["model"]),
        "data": str(data),
        "rows": f"{rows.get('rows', 0):,} ({shape}), {targets}",
        "optimizer": f"{name}, {rate}",
        "batch": f"{train['batch_size']} rows, {train['epochs']} epochs, {manifest.get('steps', 0):,} steps",
        "arithmetic": f"{config['dtype']}, {device}, {threads}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "identity": str(manifest.get("identity", "?")),
    }
    return [(key, value) for key, value in about.items() if value]


def _phases(run: Attribution | Training) -> list[dict[str, Any]]:
    phases = run.manifest.get("phases", {})
    return [
        {"name": name, "seconds": phase.get("seconds"), "bytes": phase.get("peak_memory_bytes")}
        for name, phase in phases.items()
    ]


def _spread(run: Attribution, column: int, name: str) -> dict[str, Any]:
    """Shape, range, mean, deviation and signs of the documents' scores, and of the tokens'."""
    tokens = run.tokens
    spread: dict[str, Any] = {"name": name, "value": _value(run, name)}
    spread["documents"] = _counted(run.documents.scores[column], str(list(run.documents.scores[column].shape)))
    if tokens is not None:
        rows, length = int(tokens.row.max()) + 1, int(tokens.position.max()) + 1
        spread["tokens"] = _counted(tokens.scores[column][tokens.target], f"[{rows}, {length}]")
    return spread


def _counted(scores: np.ndarray, shape: str) -> dict[str, Any]:
    return {
        "shape": shape, "count": len(scores), "min": float(scores.min()), "max": float(scores.max()),
        "mean": float(scores.mean(dtype=np.float64)), "deviation": float(scores.std(dtype=np.float64)),
        "negative": int((scores < 0).sum()), "positive": int((scores > 0).sum()), "zero": int((scores == 0).sum()),
    }  # fmt: skip


def _value(run: Attribution, name: str) -> float | None:
    for query in run.queries.values():
        if name in query["columns"]:
            return query["values_nats"][query["columns"].index(name)]
    return None


def _ends(run: Attribution, view: View, column: int) -> dict[str, list[dict[str, Any]]]:
    documents = run.documents
    order = np.argsort(documents.scores[column], kind="stable")

    def entry(index: int) -> dict[str, Any]:
        document, score = int(documents.ids[index]), float(documents.scores[column][index])
        text = view.mask.document(documents.texts[index], run.data_set(document))
        return {"id": document, "score": score, "text": text}

    return {"lowest": list(map(entry, order[:ENDS])), "highest": list(map(entry, order[::-1][:ENDS]))}
