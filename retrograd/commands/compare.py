"""`retrograd compare`: groups of models × attacks, pairs, fronts and ranks, out of folders of attacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from retrograd.attack.compare import compared
from retrograd.attack.faced import read_faced
from retrograd.attack.tell import markdown_table, show_table
from retrograd.evaluate.answers import write_table
from retrograd.runs.files import write_atomic, write_json
from retrograd.settings.commands import CompareConfig

__all__ = ["compare", "written"]

_MOST_PAIRS = 40  # rows of attack by attack; all are in compare.json
_TOLD = (
    "Models that differ by seed alone are one row. Accuracies in %, intervals of 95 % that draw models, seeds of the "
    "attack and entities or questions again; with one seed of a kind they say nothing of others."
)

Section = tuple[str, list[str], list[list[str]]]


def compare(config: CompareConfig, console: Console | None = None) -> None:
    """Write compare.json, compare.parquet and compare.md, and show the tables.

    Raises:
        ValueError: If a folder holds no attacks, or they cannot be compared.
    """
    console = console or Console()
    comparison, output = _compared(config), config.output or config.folders[0]
    _write(comparison, config, output)
    for title, head, rows in _sections(comparison):
        if rows:
            show_table(head, rows, console, title)
    for line in _notes(comparison):
        console.print(line)
    console.print(f"{output}: compare.json, compare.parquet and compare.md")


def written(config: CompareConfig) -> list[str]:
    """The same files, and the Markdown's lines for a table that others are in too; nothing where none can be made."""
    try:
        comparison = _compared(config)
    except ValueError as error:
        return ["", "## Under attack", "", str(error)]
    text = _write(comparison, config, config.output or config.folders[0])
    return ["", "## Under attack", "", *text.replace("\n## ", "\n### ").splitlines()[2:]]


def _compared(config: CompareConfig) -> dict[str, Any]:
    if not config.folders:
        raise ValueError("nothing to compare: give folders of `retrograd attack`")
    if not config.utility >= 0:
        raise ValueError(f"--utility is {config.utility}; it has to be 0 or more")
    return compared(read_faced(config.folders, config.utility))


def _write(comparison: dict[str, Any], config: CompareConfig, output: Path) -> str:
    for run in (run for cell in comparison["cells"] for run in cell["runs"]):
        run["folder"] = os.path.relpath(run["folder"], output)  # both may be moved together
    write_json(output / "compare.json", {"utility": config.utility, **comparison})
    _write_parquet(output / "compare.parquet", comparison)
    text = f"# Models under attack\n\nGeneral accuracy lost at most: {config.utility:g}. {_TOLD}\n\n"
    sections = [section for section in _sections(comparison) if section[2]]
    text += "".join(f"## {title}\n\n{markdown_table(head, rows)}\n" for title, head, rows in sections)
    text += "".join(f"* {line}\n" for line in _notes(comparison))
    write_atomic(output / "compare.md", partial(Path.write_text, data=text, encoding="utf8"))
    return text


def _write_parquet(path: Path, comparison: dict[str, Any]) -> None:
    """A row for each model and configuration, and one for each group and attack (model null)."""
    import pyarrow

    rows = [dict(row) for row in comparison["table"]]
    for cell in comparison["cells"]:
        attack = comparison["attacks"][cell["attack"]]
        group = comparison["groups"][cell["group"]]
        row = {"method": group["label"], "role": group["role"],
               "attack": attack["readable"], "valid": attack["valid"], "probe": attack["probe"],
               "retain_after": cell["retain_after"]}  # fmt: skip
        for name in ("after", "latent"):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), cell[name] or (None,) * 3))
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts, flags = ("model", "method", "role", "attack"), ("valid", "probe")
    types = {name: pyarrow.string() if name in texts else pyarrow.bool_() if name in flags else pyarrow.float64()
             for name in names}  # fmt: skip
    types |= {"step": pyarrow.int64(), "seed": pyarrow.int64()}
    write_table(path, {name: [row.get(name) for row in rows] for name in names}, types, {"kind": "Compared"})


def _sections(comparison: dict[str, Any]) -> list[Section]:
    """Title, head and rows of every table."""
    label = {group: entry["label"] for group, entry in comparison["groups"].items()}
    many = len(comparison["pairs"]) > _MOST_PAIRS
    pairs = [[_attack(comparison, pair), label[pair["first"]], label[pair["second"]], _points(pair)]
             for pair in comparison["pairs"] if pair["attack"] is None or not many]  # fmt: skip
    ranks = [
        [label[group], _ranked(rank), str(rank["models"]), str(rank["attacks"]), str(rank["seeds"])]
        for group, rank in sorted(comparison["ranks"].items(), key=lambda item: item[1]["rank"])
    ]
    return [
        ("Each before attack and after its worst one", _HEAD, list(_summary(comparison, label))),
        *_cells(comparison, label),
        ("Pairs: second minus first, points of forget accuracy after attack",
         ["attack", "first", "second", "difference"], pairs),
        ("Ranks, 1 the lowest forget accuracy after attack", ["group", "mean rank", "models", "attacks", "seeds"],
         ranks),
    ]  # fmt: skip


_HEAD = ["group", "models", "forget before", "retain before", "forget after", "worst attack", "retain there", "latent",
         "on the front"]  # fmt: skip


def _summary(comparison: dict[str, Any], label: dict[str, str]) -> Iterator[list[str]]:
    before, after = comparison["fronts"]["before"], comparison["fronts"]["after"]
    for group, start in before["points"].items():
        end = after["points"].get(group)
        on_front = [when for when, points in (("before", before), ("after", after)) if group in points["front"]]
        cells = [_estimate(end["forget"]), comparison["attacks"][end["attack"]]["readable"],
                 f"{100 * end['retain'][0]:.1f}"] if end else ["–", "–", "–"]  # fmt: skip
        yield [label[group], str(len(comparison["groups"][group]["models"])), _estimate(start["forget"]),
               _estimate(start["retain"]), *cells, _estimate(comparison["latent"].get(group), "{:+.0f}"),
               ", ".join(on_front)]  # fmt: skip


def _cells(comparison: dict[str, Any], label: dict[str, str]) -> Iterator[Section]:
    """Groups × attacks: accuracy after, and latent recovery."""
    by = {(cell["group"], cell["attack"]): cell for cell in comparison["cells"]}
    head = ["group", *(_marked(attack) for attack in comparison["attacks"].values())]
    after = [
        [name, *(_cell(by.get((group, attack))) for attack in comparison["attacks"])] for group, name in label.items()
    ]
    yield "Forget accuracy after attack", head, after
    shown = [attack for attack in comparison["attacks"] if any(cell["latent"] for cell in by.values()
                                                          if cell["attack"] == attack)]  # fmt: skip
    head = ["group", *(_marked(comparison["attacks"][attack]) for attack in shown)]
    latent = [[name, *(_estimate(by.get((group, attack), {}).get("latent"), "{:+.0f}") for attack in shown)]
              for group, name in label.items() if comparison["groups"][group]["role"] != "filtered"]  # fmt: skip
    yield "Latent recovery, points", head, latent if shown else []


def _marked(attack: dict[str, Any]) -> str:
    mark = " (probe)" if attack["probe"] else " (invalid)" if attack["valid"] is False else ""
    return f"{attack['readable']}{mark}"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not met"
    if cell["after"] is None:
        return "general ability is lost" if cell["lost"] else "not met"
    lost = f", {cell['lost']} lost" if cell["lost"] else ""
    return f"{_estimate(cell['after'])} @ {np.median(cell['steps']):g}{lost}"


def _notes(comparison: dict[str, Any]) -> list[str]:
    lines = []
    if comparison["unranked"]:
        lost = ", ".join(comparison["groups"][group]["label"] for group in comparison["unranked"])
        lines.append(f"Without a rank, for no model of theirs keeps its general ability: {lost}.")
    for attack in comparison["attacks"].values():
        if attack["invalid_seeds"] and attack["valid"] is not False:
            lines.append(f"{attack['readable']}: seeds {attack['invalid_seeds']} do not bring back the shallow model, "
                         "and are left out.")  # fmt: skip
    if not any(attack["counts"] for attack in comparison["attacks"].values()):
        lines.append("No pairs, fronts, ranks: they take attacks that are no probes and bring back the shallow model.")
    return lines


def _attack(comparison: dict[str, Any], pair: dict[str, Any]) -> str:
    if pair["attack"] is None:
        return f"all {pair['attacks']}"
    return str(comparison["attacks"][pair["attack"]]["readable"])


def _points(pair: dict[str, Any]) -> str:
    return _estimate([pair["difference"], *pair["interval"]], "{:+.1f}")


def _estimate(interval: list[float] | None, form: str = "{:.1f}") -> str:
    """value (low to high), in percent or points."""
    if interval is None:
        return "–"
    value, low, high = (form.format(100 * x) for x in interval)
    return f"{value} ({low} to {high})"


def _ranked(rank: dict[str, Any]) -> str:
    return f"{rank['rank']:.2f} ({rank['interval'][0]:.2f} to {rank['interval'][1]:.2f})"
