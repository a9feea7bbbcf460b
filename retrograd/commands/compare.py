"""`retrograd compare`: models × attacks, pairs of models, fronts and ranks, out of folders of attacks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from retrograd.attack.compare import compared, read_faced
from retrograd.attack.tell import markdown_table
from retrograd.evaluate.answers import write_table
from retrograd.runs.files import write_atomic, write_json
from retrograd.settings.attack import CompareConfig

__all__ = ["compare"]


def compare(config: CompareConfig, console: Console | None = None) -> None:
    """Write compare.json, compare.parquet and compare.md, and show the table.

    Raises:
        ValueError: If a folder holds no attacks, or they cannot be compared.
    """
    console = console or Console()
    if not config.folders:
        raise ValueError("nothing to compare: give folders of `retrograd attack`")
    if not config.utility >= 0:
        raise ValueError(f"--utility is {config.utility}; it has to be 0 or more")
    found = compared(read_faced(config.folders, config.utility))
    output = config.output or config.folders[0]
    write_json(output / "compare.json", {"utility": config.utility, **found})
    _write_parquet(output / "compare.parquet", found["table"])
    every = _sections(found)
    sections = [section for section in every if section[2]]
    missing = _missing(every)
    text = f"# Models under attack\n\nGeneral accuracy lost at most: {config.utility:g}.\n\n"
    text += "".join(f"## {title}\n\n{markdown_table(head, rows)}\n" for title, head, rows in sections)
    text += f"{missing}\n" if missing else ""
    write_atomic(output / "compare.md", partial(Path.write_text, data=text, encoding="utf8"))
    for title, head, rows in sections:
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if missing:
        console.print(missing)
    console.print(f"{output}: compare.json, compare.parquet and compare.md")


def _write_parquet(path: Path, table: list[dict[str, Any]]) -> None:
    import pyarrow

    flat = [{**row, **{f"{name}_{end}": None if row[name] is None else row[name][place]
                       for name in ("interval", "latent_interval") for place, end in enumerate(("low", "high"))}}
            for row in table]  # fmt: skip
    names = [name for name in flat[0] if name not in ("interval", "latent_interval")]
    texts, flags = ("model", "method", "role", "attack"), ("valid", "probe")
    types = {name: pyarrow.string() if name in texts else pyarrow.bool_() if name in flags else pyarrow.float64()
             for name in names}  # fmt: skip
    types["step"] = pyarrow.int64()
    write_table(path, {name: [row[name] for row in flat] for name in names}, types, {"kind": "Compared"})


def _missing(sections: list[tuple[str, list[str], list[list[str]]]]) -> str:
    """Why some tables have no rows; empty where all have."""
    empty = ", ".join(title.split(",")[0].split(":")[0].lower() for title, _, rows in sections if not rows)
    return empty and (
        f"No {empty}: they take attacks that are no probes and bring back the shallow model, and models that "
        "keep their general ability."
    )


def _sections(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of every table."""
    names = {name: (one["method"] or name) if one["role"] == "model" else one["role"]
             for name, one in found["models"].items()}  # fmt: skip
    labels = {name: label if list(names.values()).count(label) == 1 else f"{label} ({name})"
              for name, label in names.items()}  # fmt: skip
    attacks = dict.fromkeys(row["attack"] for row in found["table"])
    by = {(row["model"], row["attack"]): row for row in found["table"]}
    starts = {row["model"]: row for row in found["table"]}
    table = [
        [label, f"{_percent(starts[name]['before'])} / {_percent(starts[name]['retain_before'])}",
         *(_cell(by.get((name, attack))) for attack in attacks)]
        for name, label in labels.items()
    ]  # fmt: skip
    marks = {row["attack"]: " (probe)" if row["probe"] else " (invalid)" if row["valid"] is False else ""
             for row in found["table"]}  # fmt: skip
    pairs = [[pair["attack"], labels[pair["first"]], labels[pair["second"]], _signed(pair), f"{pair['p']:.2g}"]
             for pair in found["pairs"]]  # fmt: skip
    fronts = [
        [when, labels[name], _percent(forget), _percent(retain), "yes" if name in told["front"] else ""]
        for when, told in found["fronts"].items()
        for name, (forget, retain) in told["points"].items()
    ]
    ranks = [
        [name, _ranked(one), str(one["models"]), str(one["attacks"])]
        for name, one in sorted(found["ranks"].items(), key=lambda item: item[1]["rank"])
    ]
    head = ["model", "forget / retain before", *(f"{attack}{marks[attack]}" for attack in attacks)]
    paired = ["attack", "first", "second", "difference", "p"]
    return [
        ("Forget accuracy after attack (and latent recovery)", head, table),
        ("Pairs: second minus first, points of forget accuracy", paired, pairs),
        ("Fronts", ["when", "model", "forget", "retain", "on the front"], fronts),
        ("Ranks, 1 the lowest forget accuracy", ["method", "mean rank", "models", "attacks"], ranks),
    ]  # fmt: skip


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not met"
    if row["after"] is None:
        return "general ability is lost"
    low, high = row["interval"]
    latent = "" if row["latent"] is None or row["role"] == "filtered" else f", latent {100 * row['latent']:+.0f}"
    return f"{_percent(row['after'])} ({100 * low:.0f}–{100 * high:.0f}) @ {row['step']}{latent}"


def _signed(pair: dict[str, Any]) -> str:
    low, high = pair["interval"]
    return f"{100 * pair['difference']:+.1f} ({100 * low:+.0f} to {100 * high:+.0f})"


def _ranked(one: dict[str, Any]) -> str:
    return f"{one['rank']:.2f} ({one['interval'][0]:.2f}–{one['interval'][1]:.2f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
