"""`retrograd magic`: train, query, reverse, write scores. Running again resumes, or answers that it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Optimizer, rate
from retrograd.core.step import State
from retrograd.core.sweep import Event, Reversed, Turned
from retrograd.lm.query import lm_query
from retrograd.runs import config as configs
from retrograd.runs.config import MagicConfig
from retrograd.runs.files import append_line, read_lines, read_tensors, write_atomic, write_json, write_tensors
from retrograd.runs.manifest import SIGN, Manifest, environment, fingerprint
from retrograd.runs.progress import Bars
from retrograd.runs.scores import Ranked, per_document, ranked, write_scores
from retrograd.runs.trajectory import Replay, Trajectory
from retrograd.stages.assemble import Loaded, assemble

__all__ = ["Outcome", "magic"]


class Outcome(NamedTuple):
    """What a run found. values: φ [K] in nats; scores: [K, documents] or [K, rows, length]; order: proponents first."""

    values: Tensor
    scores: Tensor
    order: list[Ranked]


def magic(config: MagicConfig, console: Console | None = None) -> Outcome:
    """Run, resume or report a metagradient run.

    Args:
        config: The resolved configuration.
        console: Where the summary goes; standard output when None.
    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    configs.check(config)
    _check_folder(config)
    loaded = assemble(config)
    if config.overwrite:
        shutil.rmtree(config.run, ignore_errors=True)  # only now that the new run is known to be sound
    manifest = Manifest(config.run / "manifest.json")
    _set_threads(manifest)
    _refuse_other(manifest, loaded, config)
    if manifest.done("scores"):
        console.print(f"{config.run} is done; these are its scores. Use --overwrite to compute them again.")
        return _summarise(_stored(config, loaded), loaded, console)
    _begin(config, manifest, loaded)
    device = loaded.stream.device
    with Bars(len(loaded.stream)) as bars:
        journal = _Journal(config.run / "metrics.jsonl", loaded.training.recipe.optimizer)
        observe = _both(bars, journal)
        trajectory = Trajectory(
            loaded.training, loaded.initial, _replay(config), config.run / "checkpoints", loaded.identity, observe
        )
        manifest.update(replay=_describe(trajectory))
        with manifest.phase("train"):
            final = trajectory.train()
        with manifest.phase("query"):
            values, gradient = _query(config, loaded, final)
        with manifest.phase("reverse"):
            journal.resume(trajectory)
            scores = trajectory.reverse({n: g.to(device) for n, g in gradient.items()}, final)
    with manifest.phase("scores"):
        order = ranked(per_document(scores, loaded.rows), loaded.rows, loaded.stream.steps_of_rows(), loaded.texts)
        write_scores(config.run, scores, loaded.rows, loaded.stream.steps_of_rows(), order, _token_text(loaded))
    trajectory.clean()
    return _summarise(Outcome(values, scores, order), loaded, console)


def _check_folder(config: MagicConfig) -> None:
    """Refuse a folder that holds another run, with the difference, before anything is loaded."""
    stored = config.run / "run_config.yaml"
    if not stored.exists():
        if config.run.exists() and (not config.run.is_dir() or any(config.run.iterdir())):
            raise ValueError(f"{config.run} exists and is no run of retrograd; choose another folder")
        return
    if config.overwrite:
        return
    old = yaml.safe_load(stored.read_text(encoding="utf8"))
    changed = configs.difference(old, configs.to_dict(config))
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{config.run} holds a run of another configuration:\n  {lines}\nUse another folder, or --overwrite to "
            "start afresh."
        )


def _set_threads(manifest: Manifest) -> None:
    """A resumed run uses the thread count it began with: sums are split by thread, and their bits depend on it."""
    threads = manifest.values.get("threads")
    if threads:
        torch.set_num_threads(threads)


def _refuse_other(manifest: Manifest, loaded: Loaded, config: MagicConfig) -> None:
    known = manifest.values.get("identity")
    if known is None or known == loaded.identity:
        return
    found = _hashes(loaded)
    changed = [
        f"{name}: {old} → {found[name]}" for name, old in manifest.values["hashes"].items() if found.get(name) != old
    ]
    raise ValueError(
        f"{config.run} was begun with other inputs under the same names:\n  "
        + "\n  ".join(changed)
        + "\nA file or the "
        "model has changed since. Use another folder, or --overwrite to start afresh."
    )


def _hashes(loaded: Loaded) -> dict[str, str]:
    return {
        "recipe": fingerprint(loaded.training.recipe),
        "rows": loaded.rows.digest()[:16],
        "query": loaded.query_rows.digest()[:16],
        "model": tree.digest(loaded.initial.params)[-16:],
    }


def _begin(config: MagicConfig, manifest: Manifest, loaded: Loaded) -> None:
    """Write what the run is before its first step."""
    config.run.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    write_atomic(config.run / "run_config.yaml", lambda temporary: temporary.write_text(values, encoding="utf8"))
    rows = loaded.rows
    manifest.update(
        meaning=SIGN,
        identity=loaded.identity,
        hashes=_hashes(loaded),
        **environment(torch.device(loaded.stream.device)),
        threads=torch.get_num_threads(),
        steps=len(loaded.stream),
        parameters=sum(leaf.numel() for leaf in loaded.initial.params.values()),
        fused_head=loaded.model.fused,
        rows={
            "documents": rows.documents, "rows": len(rows), "targets": rows.targets, "longest": rows.max_length,
            "truncated": rows.truncated, "packed": rows.packed, "skipped_chunks": rows.skipped_chunks,
            "skipped": {str(document): reason for document, reason in rows.skipped.items()},
        },
    )  # fmt: skip


def _replay(config: MagicConfig) -> Replay:
    """Budgets in bytes; "auto" is half of what is free now."""
    given = config.replay
    memory = _free_memory() // 2 if given.memory == "auto" else configs.parse_size(given.memory)
    disk = shutil.disk_usage(config.run).free // 2 if given.disk == "auto" else configs.parse_size(given.disk)
    return Replay(given.plan, memory, disk, given.interval, given.slots, given.keep, given.heartbeat)


def _free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def _describe(trajectory: Trajectory) -> dict[str, Any]:
    chosen = trajectory.layout
    return {
        "plan": chosen.kind, "state_bytes": chosen.state_bytes, "slots": chosen.cost.slots, "on_disk": chosen.on_disk,
        "advances": chosen.cost.advances, "replays": chosen.cost.replays,
    }  # fmt: skip


def _query(config: MagicConfig, loaded: Loaded, final: State) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and gradients at the final state, read again if they are on disk."""
    folder = config.run / "queries" / "query"
    path = folder / "gradient.safetensors"
    if path.exists():
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") == loaded.identity:
            return tensors.pop("values"), {name.removeprefix("gradient."): g for name, g in tensors.items()}
    values, gradient = lm_query(loaded.training.engine, loaded.columns)(final.params)
    if not torch.isfinite(values).all():
        raise ValueError(f"the query loss after training is {values.tolist()}; lower the learning rate")
    named = {f"gradient.{name}": leaf for name, leaf in gradient.items()}
    write_tensors(path, {"values": values, **named}, {"identity": loaded.identity, "layout": "whole"})
    documents = [int(document[-1]) for document in loaded.query_rows.doc_ids]
    write_json(
        folder / "query.json",
        {
            "values_nats": values.tolist(), "reduction": config.query.reduction, "documents": documents,
            "targets": loaded.query_rows.targets,
            "skipped": {str(k): v for k, v in loaded.query_rows.skipped.items()},
        },
    )  # fmt: skip
    return values, gradient


class _Journal:
    """metrics.jsonl: a line per original step and per reversed step, each once however often the run was killed."""

    def __init__(self, path: Path, optimizer: Optimizer) -> None:
        self.path, self.lr = path, getattr(optimizer, "lr")  # noqa: B009
        lines = read_lines(path)
        self.trained = {entry["step"] for entry in map(json.loads, lines) if entry["phase"] == "train"}
        if path.exists():
            self._rewrite(lines)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Reversed):
            norms, mean, bad = event.norm.tolist(), event.scores.abs().mean().item(), event.nonfinite
            self._write(phase="reverse", step=event.step, cotangent_norm=norms, nonfinite=bad, mean_abs_score=mean)
        elif event.step not in self.trained and (isinstance(event, Turned) or not event.replayed):
            self.trained.add(event.step)
            loss, grad_norm = event.outcome.loss, event.outcome.grad_norm
            self._write(phase="train", step=event.step, loss=loss, lr=rate(self.lr, event.step), grad_norm=grad_norm)

    def resume(self, trajectory: Trajectory) -> None:
        """Drop reverse lines that the resumed sweep will write again."""
        left = trajectory.reverse_steps_left()
        lines = [line for line in read_lines(self.path) if not _again(json.loads(line), left)]
        self._rewrite(lines)

    def _rewrite(self, lines: list[str]) -> None:
        write_atomic(self.path, lambda t: t.write_text("".join(f"{line}\n" for line in lines), encoding="utf8"))

    def _write(self, **values: Any) -> None:
        append_line(self.path, json.dumps(values))


def _again(entry: dict[str, Any], left: int) -> bool:
    return entry["phase"] == "reverse" and entry["step"] < left


def _both(*observers: Callable[[Event], None]) -> Callable[[Event], None]:
    def observe(event: Event) -> None:
        for observer in observers:
            observer(event)

    return observe


def _token_text(loaded: Loaded) -> Callable[[np.ndarray], list[str]]:
    def texts(ids: np.ndarray) -> list[str]:
        known = {int(token): loaded.tokenizer.decode([int(token)]) for token in np.unique(ids)}
        return [known[int(token)] for token in ids]

    return texts


def _stored(config: MagicConfig, loaded: Loaded) -> Outcome:
    scores = torch.load(config.run / "scores.pt", weights_only=True)
    base = 2 if config.attribute == "tokens" else 1
    leading = scores[None] if scores.ndim == base else scores.movedim(-1, 0)
    values = read_tensors(config.run / "queries" / "query" / "gradient.safetensors")[0]["values"]
    steps = loaded.stream.steps_of_rows()
    return Outcome(values, leading, ranked(per_document(leading, loaded.rows), loaded.rows, steps, loaded.texts))


def _summarise(outcome: Outcome, loaded: Loaded, console: Console) -> Outcome:
    """The query value, the spread of the scores, and the ends of the ranking with their text."""
    shown = ", ".join(f"{value:.4f}" for value in outcome.values.tolist()[:8])
    console.print(f"Query loss after training: {shown} nats" + (" …" if len(outcome.values) > 8 else ""))
    totals = torch.tensor([record.score for record in outcome.order], dtype=torch.float64)
    skipped = f", {len(loaded.rows.skipped)} documents without a target skipped" if loaded.rows.skipped else ""
    console.print(
        f"Scores of {len(totals)} documents{skipped}: {int((totals < 0).sum())} proponents, {int((totals > 0).sum())} "
        f"detractors; min {totals.min():.3g}, median {totals.median():.3g}, max {totals.max():.3g}, sum "
        f"{totals.sum():.3g} nats per unit of weight."
    )
    console.print("Negative: training on it lowers the query loss.", style="dim")
    half = min(5, (len(outcome.order) + 1) // 2)
    console.print(_table("Strongest proponents (most negative)", outcome.order[:half]))
    console.print(_table("Strongest detractors (most positive)", outcome.order[::-1][:half]))
    return outcome


def _table(title: str, records: list[Ranked]) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("doc", justify="right")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("text", ratio=1)
    for record in records:
        table.add_row(str(record.doc_id), f"{record.score:+.3e}", Text(record.text[:120]))
    return table
