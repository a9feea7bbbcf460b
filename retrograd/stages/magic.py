"""`retrograd magic`: train, query, reverse, write scores. Running again resumes, or answers that it is done."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor

from retrograd.core import tree
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW, Muon, Optimizer, rate
from retrograd.core.schedule import Schedule
from retrograd.core.step import Recipe, State, Training, initial_state
from retrograd.core.sweep import Event, Reversed, Turned
from retrograd.lm.data import load_documents
from retrograd.lm.model import DTYPES, CausalLM, load_causal_lm, load_tokenizer
from retrograd.lm.query import lm_query, query_columns
from retrograd.lm.rows import Rows, build_rows
from retrograd.lm.stream import DataStream
from retrograd.runs import config as configs
from retrograd.runs.config import MagicConfig, TrainConfig
from retrograd.runs.files import append_line, read_lines, read_tensors, write_atomic, write_json, write_tensors
from retrograd.runs.manifest import SIGN, Manifest, environment, fingerprint
from retrograd.runs.progress import Bars
from retrograd.runs.scores import EXCERPT, Ranked, per_document, ranked, write_scores
from retrograd.runs.trajectory import Replay, Trajectory

__all__ = ["Outcome", "magic"]


class Outcome(NamedTuple):
    """What a run found. values: φ [K] in nats; scores: [K, documents] or [K, rows, length]; order: proponents first."""

    values: Tensor
    scores: Tensor
    order: list[Ranked]


class _Loaded(NamedTuple):
    """Everything a run is made of, loaded and checked before the first step."""

    rows: Rows
    texts: list[str]
    model: CausalLM
    tokenizer: Any
    stream: DataStream
    training: Training
    initial: State
    columns: list[Any]
    query_rows: Rows
    identity: str


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
    loaded = _load(config)
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


def optimizer(train: TrainConfig, steps: int, exclude: tuple[str, ...] = ()) -> Optimizer:
    """The optimizer of a configuration; `exclude` names the matrices that Muon leaves to AdamW."""
    ratio = train.warmup_ratio if train.warmup_ratio is not None else 0.3 if train.lr_schedule == "one-cycle" else 0.0
    warmup = min(steps - 1, math.ceil(ratio * steps))
    lr = Schedule(train.lr_schedule, train.lr, steps, warmup)
    adam = (train.beta1, train.beta2, train.eps, train.eps_root)
    match train.optimizer:
        case "sgd":
            return SGD(lr, train.momentum, train.nesterov, train.weight_decay)
        case "adamw":
            return AdamW(lr, *adam, train.weight_decay)
        case "muon":
            return Muon(lr, train.momentum or 0.95, True, train.weight_decay, 5, *adam, exclude)
    raise ValueError(f"unknown optimizer {train.optimizer!r}; the optimizers are sgd, adamw, muon")


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


def _load(config: MagicConfig) -> _Loaded:
    device = _device(config.device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    model = _load_model(config, device)
    rows, texts = _rows(config.data, tokenizer, model, config.data.chunk_length, config.data.min_chars, "data")
    query_rows, _ = _rows(config.query, tokenizer, model, None, 0, "query")
    stream = DataStream(
        rows,
        config.train.batch_size,
        epochs=config.train.epochs,
        shuffle=config.data.shuffle,
        seed=config.train.seed,
        weight_shape=(len(rows), rows.max_length) if config.attribute == "tokens" else None,
        dtype=torch.promote_types(DTYPES[config.dtype], torch.float32),
        device=device,
    )
    train = config.train
    recipe = Recipe(
        optimizer(train, len(stream), _embeddings(model)), train.max_grad_norm, train.micro_batch_size, train.seed,
        train.dropout,
    )  # fmt: skip
    training = Training(recipe, Double(model.objective), stream, stream.weights)
    initial = initial_state(recipe, model.params)
    size = train.micro_batch_size or train.batch_size
    columns = query_columns(query_rows, config.query.reduction, batch_size=size, dtype=stream.dtype, device=device)
    identity = fingerprint(
        recipe, rows.digest(), query_rows.digest(), tree.digest(initial.params), stream.shuffle, stream.seed,
        stream.batch_size, stream.epochs, config.attribute, config.query.reduction, config.dtype,
    )  # fmt: skip
    return _Loaded(rows, texts, model, tokenizer, stream, training, initial, columns, query_rows, identity)


def _load_model(config: MagicConfig, device: torch.device) -> CausalLM:
    adapters = None
    if config.lora.rank:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
            target_modules=list(config.lora.target_modules) or None, task_type="CAUSAL_LM",
        )  # fmt: skip
    if config.dtype == "bfloat16":
        warnings.warn(
            "bfloat16 parameters swallow small updates (at |w| = 0.02 neighbours are 1e-4 apart): scores are mostly "
            "noise; a cosine of -0.42 with float32 was measured elsewhere. Use --dtype float32 for scores you act on.",
            stacklevel=2,
        )
    if config.train.optimizer != "sgd" and config.train.eps_root < 1e-10:
        warnings.warn(
            f"--train.eps_root {config.train.eps_root:g} leaves the update rough where gradients are near 0: scores "
            "will be finite but will predict retraining badly. 1e-8 or more is smoother.",
            stacklevel=2,
        )
    return load_causal_lm(
        config.model, dtype=config.dtype, device=device, lora=adapters, seed=config.train.seed,
        dropout=config.train.dropout,
    )  # fmt: skip


def _rows(
    source: Any, tokenizer: Any, model: CausalLM, chunk_length: int | None, min_chars: int, name: str
) -> tuple[Rows, list[str]]:
    """Token rows of a data or query source, and an excerpt of each document."""
    documents = load_documents(source.dataset, split=source.split, subset=source.subset, limit=source.limit)
    settings = getattr(model.module, "config")  # noqa: B009
    context = getattr(settings, "max_position_embeddings", None)
    longest = source.max_length or (None if chunk_length else context)
    if context and max(longest or 0, chunk_length or 0) > context:
        raise ValueError(f"--{name}: rows of {longest or chunk_length} tokens exceed the model's context of {context}")
    try:
        rows = build_rows(
            documents, tokenizer, text_column=source.text_column, max_length=longest, chunk_length=chunk_length,
            min_chars=min_chars, vocab_size=settings.vocab_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--{name}.dataset {source.dataset}: {error}") from error
    return rows, _excerpts(documents, source.text_column, tokenizer)


def _excerpts(documents: Any, column: str | None, tokenizer: Any) -> list[str]:
    names = documents.column_names
    for columns in ([column], ["messages"], ["prompt", "completion"], ["text"], ["input_ids"]):
        if all(name in names for name in columns):
            found = zip(*(documents[name] for name in columns))
            return [_excerpt(values, tokenizer) for values in found]
    raise AssertionError("build_rows has chosen a column")


def _excerpt(values: tuple[Any, ...], tokenizer: Any) -> str:
    parts = []
    for value in values:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(" ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value))
        elif isinstance(value, list):
            parts.append(tokenizer.decode(value[:EXCERPT]))
        else:
            parts.append(str(value or ""))
    text = " ".join(" ".join(parts).split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def _embeddings(model: CausalLM) -> tuple[str, ...]:
    """Names of the input and output embeddings, which Muon leaves to AdamW."""
    ends = [m for m in (model.module.get_input_embeddings(), model.module.get_output_embeddings()) if m is not None]  # type: ignore[operator]
    weights = {end.weight.untyped_storage().data_ptr() for end in ends if hasattr(end, "weight")}
    return tuple(name for name, leaf in model.params.items() if leaf.untyped_storage().data_ptr() in weights)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def _set_threads(manifest: Manifest) -> None:
    """A resumed run uses the thread count it began with: sums are split by thread, and their bits depend on it."""
    threads = manifest.values.get("threads")
    if threads:
        torch.set_num_threads(threads)


def _refuse_other(manifest: Manifest, loaded: _Loaded, config: MagicConfig) -> None:
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


def _hashes(loaded: _Loaded) -> dict[str, str]:
    return {
        "recipe": fingerprint(loaded.training.recipe),
        "rows": loaded.rows.digest()[:16],
        "query": loaded.query_rows.digest()[:16],
        "model": tree.digest(loaded.initial.params)[-16:],
    }


def _begin(config: MagicConfig, manifest: Manifest, loaded: _Loaded) -> None:
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


def _query(config: MagicConfig, loaded: _Loaded, final: State) -> tuple[Tensor, dict[str, Tensor]]:
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


def _token_text(loaded: _Loaded) -> Callable[[np.ndarray], list[str]]:
    def texts(ids: np.ndarray) -> list[str]:
        known = {int(token): loaded.tokenizer.decode([int(token)]) for token in np.unique(ids)}
        return [known[int(token)] for token in ids]

    return texts


def _stored(config: MagicConfig, loaded: _Loaded) -> Outcome:
    scores = torch.load(config.run / "scores.pt", weights_only=True)
    base = 2 if config.attribute == "tokens" else 1
    leading = scores[None] if scores.ndim == base else scores.movedim(-1, 0)
    values = read_tensors(config.run / "queries" / "query" / "gradient.safetensors")[0]["values"]
    steps = loaded.stream.steps_of_rows()
    return Outcome(values, leading, ranked(per_document(leading, loaded.rows), loaded.rows, steps, loaded.texts))


def _summarise(outcome: Outcome, loaded: _Loaded, console: Console) -> Outcome:
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
    from rich.text import Text

    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("doc", justify="right")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("text", ratio=1)
    for record in records:
        table.add_row(str(record.doc_id), f"{record.score:+.3e}", Text(record.text[:120]))
    return table
