"""Query, reverse, write: what `magic` and `query` share once there is a trained trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from retrograd.core.optim import rate
from retrograd.core.step import State
from retrograd.parallel.group import here
from retrograd.parallel.shard import Sharded
from retrograd.query.named import Asked
from retrograd.query.together import ask_together, given
from retrograd.runs.files import read_tensors, write_json, write_tensors
from retrograd.runs.gradients import StoredGradient, values_of, write_gradient
from retrograd.runs.health import Finding, sweep_findings
from retrograd.runs.journal import read_journal, recipe_gradients
from retrograd.runs.scores import (
    Ranked,
    detractors,
    origins_of,
    per_document,
    proponents,
    ranked,
    read_scores,
    write_scores,
)
from retrograd.runs.setup import Loaded, Setup

__all__ = ["Outcome", "ask", "show_ends", "stored", "summarise", "write_results"]

ENDS = 5  # documents of each end that are shown


class Outcome(NamedTuple):
    """What a sweep found, for K query columns.

    Args:
        names: Of the columns.
        values: φ after training, [K] nats.
        scores: [K, documents] or [K, rows, length], nats per unit of weight; negative = proponent.
        order: Documents by the first query's score, proponents first.
        findings: What to know before acting on the scores.
    """

    names: list[str]
    values: Tensor
    scores: Tensor
    order: list[Ranked]
    findings: list[Finding]


def ask(
    run: Path, loaded: Setup, asked: Sequence[Asked], final: State
) -> tuple[Tensor, dict[str, Tensor] | StoredGradient]:
    """Values [K] and gradients [K, *shape] of queries at the final state, read again if they are on disk.

    Of a run in pieces the gradients are on disk alone.
    """
    if isinstance(loaded.training.engine, Sharded):
        paths = [run / "queries" / query.name / "gradient.safetensors" for query in asked]
        each = [_ask_in_pieces(path, loaded, query, final) for path, query in zip(paths, asked)]
        return torch.cat(each), StoredGradient(tuple(paths), tuple(final.params))
    answers = [_ask_one(run / "queries" / query.name, loaded, query, final) for query in asked]
    for query in asked:
        query.release()
    values = torch.cat([values for values, _ in answers])
    if len(answers) == 1:
        return values, {name: answers[0][1][name].to(loaded.stream.device) for name in final.params}
    # leaf by leaf, each given up as it is copied
    parts = {name: [grads.pop(name) for _, grads in answers] for name in final.params}
    return values, {name: torch.cat(parts.pop(name)).to(loaded.stream.device) for name in final.params}


def write_results(
    run: Path, folder: Path, loaded: Loaded, asked: Sequence[Asked], values: Tensor, scores: Tensor
) -> Outcome:
    """Write every file of a finished sweep.

    Args:
        run: Folder of the run, whose journal has the training steps.
        folder: Where the score files go; its metrics.jsonl has the sweep.
    """
    names = [column.name for query in asked for column in query.columns]
    train, _ = read_journal(run / "metrics.jsonl")
    _, reverse = read_journal(folder / "metrics.jsonl")
    lr = getattr(loaded.training.recipe.optimizer, "lr")  # noqa: B009
    rates = [rate(lr, step) for step in range(len(loaded.stream))]
    gradients = recipe_gradients(rates, reverse, names)
    if gradients is not None:
        write_json(folder / "recipe_gradients.json", gradients)
    findings = [*loaded.findings, *sweep_findings(train, reverse, loaded.training.recipe)]
    write_json(folder / "health.json", {"findings": [vars(finding) for finding in findings]})
    start = 0
    for query in asked if len(asked) > 1 else ():
        part = slice(start, start := start + len(query.columns))
        _write(run / "queries" / query.name, loaded, scores[part], names[part], None)
    leading = len(asked[0].columns)
    order = _write(folder, loaded, scores, names, leading)
    return Outcome(names, values, scores, order, findings)


def stored(run: Path, folder: Path, loaded: Loaded, asked: Sequence[Asked]) -> Outcome:
    """The outcome of a sweep that is done, from its files."""
    scores = read_scores(folder / "scores.pt", loaded.stream.per_token)
    values = torch.cat(
        [read_tensors(run / "queries" / query.name / "gradient.safetensors")[0]["values"] for query in asked]
    )
    order = _ranked(loaded, scores, len(asked[0].columns))
    train, reverse = read_journal(run / "metrics.jsonl")[0], read_journal(folder / "metrics.jsonl")[1]
    findings = [*loaded.findings, *sweep_findings(train, reverse, loaded.training.recipe)]
    return Outcome([column.name for query in asked for column in query.columns], values, scores, order, findings)


def summarise(outcome: Outcome, loaded: Loaded, asked: Sequence[Asked], console: Console) -> Outcome:
    """The query values, the spread of the scores, the ends of the ranking with their text, and what to beware of."""
    shown = list(zip(outcome.names, outcome.values.tolist(), strict=True))
    if len(shown) == 1:
        console.print(f"Query loss after training: {shown[0][1]:.4f} nats")
    else:
        listed = ", ".join(f"{name} {value:.4f}" for name, value in shown[:8])
        console.print(f"Query losses after training, nats: {listed}{' …' if len(shown) > 8 else ''}")
    for line in _further(asked):
        console.print(line)
    totals = torch.tensor([record.score for record in outcome.order], dtype=torch.float64)
    skipped = f", {len(loaded.rows.skipped)} documents without a target skipped" if loaded.rows.skipped else ""
    about = f" for {asked[0].name!r}" if len(asked) > 1 else ""
    console.print(
        f"Scores of {len(totals)} documents{about}{skipped}: {int((totals < 0).sum())} proponents, "
        f"{int((totals > 0).sum())} detractors; min {totals.min():.3g}, median {totals.median():.3g}, max "
        f"{totals.max():.3g}, sum {totals.sum():.3g} nats per unit of weight."
    )
    console.print("Negative: training on it lowers the query loss.", style="dim")
    show_ends(outcome.order, console)
    for finding in outcome.findings:
        console.print(Text(f"Beware: {finding}"), style="yellow")
    return outcome


def _further(asked: Sequence[Asked]) -> Iterator[str]:
    """Which queries are asked after what besides the run."""
    for query in asked:
        phases = query.record.get("then", ())
        if phases:
            phrases = ", then ".join(f"{phase['steps']} further steps of {phase['path']}" for phase in phases)
            yield f"{query.name} is asked after {phrases}."


def show_ends(order: Sequence[Ranked], console: Console) -> None:
    """Print the strongest proponents and detractors, by the sign of their scores."""
    ends = (
        ("proponents", "negative", proponents(order, ENDS)),
        ("detractors", "positive", detractors(order, ENDS)),
    )
    for kind, sign, records in ends:
        if records:
            console.print(_table(f"Strongest {kind} (most {sign})", records))
        else:
            console.print(f"No {kind}: no document has a {sign} score.")


def _ask_one(folder: Path, loaded: Setup, query: Asked, final: State) -> tuple[Tensor, dict[str, Tensor]]:
    path, identity = folder / "gradient.safetensors", f"{loaded.identity}/{query.digest}"
    if path.exists():
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") == identity:
            return tensors.pop("values"), {name.removeprefix("gradient."): g for name, g in tensors.items()}
    values, gradient = ask_together(here(), query, final.params)
    named = {f"gradient.{name}": leaf for name, leaf in gradient.items()}
    _record(folder, query, values, final)
    write_tensors(path, {"values": values, **named}, {"identity": identity, "layout": "whole"})
    return values, gradient


def _ask_in_pieces(path: Path, loaded: Setup, query: Asked, final: State) -> Tensor:
    """The values; the gradient goes to disk leaf by leaf."""
    engine, identity = loaded.training.engine, f"{loaded.identity}/{query.digest}"
    assert isinstance(engine, Sharded)
    known = values_of(path, identity)
    if known is not None:
        return known
    values, own = ask_together(here(), query, final.params, engine.lying)
    _record(path.parent, query, values, final)
    write_gradient(path, values, final.params, given(engine.lying, own), identity)
    return values


def _record(folder: Path, query: Asked, values: Tensor, final: State) -> None:
    """What query.json says.

    Raises:
        ValueError: If a value is not finite.
    """
    if not torch.isfinite(values).all():
        raise ValueError(f"query {query.name!r} after training is {values.tolist()}; lower the learning rate")
    record = {**query.record, **query.measure(final.params)}
    columns = [column.name for column in query.columns]
    write_json(
        folder / "query.json", {"name": query.name, "columns": columns, "values_nats": values.tolist(), **record}
    )


def _write(folder: Path, loaded: Loaded, scores: Tensor, names: Sequence[str], leading: int | None) -> list[Ranked]:
    order, steps = _ranked(loaded, scores, leading), loaded.stream.steps_of_rows()
    write_scores(folder, scores, loaded.rows, steps, order, _token_text(loaded), names, origins_of(loaded.parts))
    return order


def _ranked(loaded: Loaded, scores: Tensor, leading: int | None) -> list[Ranked]:
    totals, steps = per_document(scores, loaded.rows), loaded.stream.steps_of_rows()
    return ranked(totals, loaded.rows, steps, loaded.texts, leading, origins_of(loaded.parts))


def _token_text(loaded: Loaded) -> Callable[[np.ndarray], list[str]]:
    """Token ids → texts as they stand within a text: a tokenizer that joins words by spaces loses them at its start."""

    def decode(*ids: int) -> str:
        return loaded.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def texts(ids: np.ndarray) -> list[str]:
        first = int(ids[0])
        before = decode(first)
        both = {int(token): decode(first, int(token)) for token in np.unique(ids)}
        known = {k: text[len(before) :] if text.startswith(before) else decode(k) for k, text in both.items()}
        return [known[int(token)] for token in ids]

    return texts


def _table(title: str, records: list[Ranked]) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("doc", justify="right")
    sided = any(record.origin for record in records)
    if sided:
        table.add_column("side", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("text", ratio=1)
    for record in records:
        side = [record.origin["side"]] if sided else []
        table.add_row(str(record.doc_id), *side, f"{record.score:+.3e}", Text(record.text[:120]))
    return table
