"""gpu.json of bench/gpu.py as Markdown, and into docs/performance.md between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_setup import MODES, show
from tools import table

__all__ = ["report", "write_docs", "written"]

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- bench/gpu.sh -->", "<!-- end of bench/gpu.sh -->"
_SHAPES = ("160M", "1.4B", "6.9B")
_ALL = ("rates", "exact", *_SHAPES, "engines", "queries", "head")


def report(values: dict[str, Any]) -> str:
    """Everything that was measured, as Markdown."""
    where, sections = values["machine"], values["sections"]
    toy = "Toy sizes, which say nothing about speed. " if values["toy"] else ""
    late = [name for name, found in sections.items() if not found["finished"]]
    cut = f" Cut off by time or error, figures up to there: {', '.join(late)}." if late else ""
    missing = [name for name in _ALL if name not in sections]
    cut += f" Not measured: {', '.join(missing)}." if missing else ""
    head = (
        f"{toy}{where['device']}, torch {where['torch']}, transformers {where['transformers']}, commit "
        f"{where['commit'][:9]}. Medians of up to 5 calls.{cut}\n"
    )
    shapes = {name: sections[name] for name in _SHAPES if name in sections}
    rates = sections.get("rates", {}).get("operations_per_second", {})
    parts = [head, _rates(sections.get("rates")), _exact(sections.get("exact")), _steps(shapes, rates), _runs(shapes)]
    parts += [_engines(sections.get("engines")), _queries(sections.get("queries")), _head(sections.get("head"))]
    return "\n".join(part for part in parts if part)


def written(output: Path, docs: bool = False) -> None:
    """gpu.json of a folder as gpu.md beside it and on the screen, and into the docs if asked; toys never get there."""
    path = output / "gpu.json"
    if not path.exists():
        raise SystemExit(f"{path} is not there: no section has measured anything")
    values = json.loads(path.read_text(encoding="utf8"))
    text = report(values)
    (output / "gpu.md").write_text(text, encoding="utf8")
    print(f"{text}\nThese figures are in {path} and {output / 'gpu.md'}.", flush=True)
    if docs and values["toy"]:
        raise SystemExit("toy sizes say nothing about speed: docs/performance.md is left as it is")
    if docs:
        write_docs(text)


def write_docs(text: str, page: Path = PAGE) -> None:
    """Replace what stands between the markers of the page.

    Raises:
        ValueError: If the page does not have them once each, in order.
    """
    whole = page.read_text(encoding="utf8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or whole.count(BEGIN) + whole.count(END) != 2:
        raise ValueError(
            f"{page} needs the lines {BEGIN} and {END}, once each and in this order, to write between them"
        )
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf8")


def _rates(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    products = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in found["operations_per_second"].items())
    copies = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in found["bytes_per_second"].items())
    size = found["size"]
    return f"Square products of {size} × {size}, TFLOP/s: {products}. Copies, GB/s: {copies}.\n"


def _exact(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    plain = "; ".join(f"{k}: {v:.1e}" if isinstance(v, float) else f"{k}: {v}" for k, v in found.items()
                      if isinstance(v, (float, int)) and k not in ("section_seconds", "finished"))  # fmt: skip
    rows = [[mode, f"{each['relative difference']:.2g}", f"{each['rank correlation']:.3f}"]
            for mode, each in found.get("lower precision", {}).items()]  # fmt: skip
    lower = table(["scores of 6 steps, 160M", "relative difference from float32", "rank correlation"], rows)
    return f"{plain}.\n\n{lower if rows else ''}"


def _steps(shapes: dict[str, Any], rates: dict[str, float]) -> str:
    rows = []
    for name, section in shapes.items():
        for mode, found in section["modes"].items():
            rate = rates.get(MODES[mode].rate)
            cells = [_cell(found.get(kind), rate) for kind in ("plain", "train", "double", "blocks")]
            digest = found.get("digest", {}).get("seconds")
            peaks = " → ".join(_peak(found.get(kind)) for kind in ("double", "blocks"))
            rows.append([name, mode, *cells, "" if digest is None else f"{digest * 1e3:.3g}", peaks])
    if not rows:
        return _left_out(shapes)
    columns = ["shape", "arithmetic", "plain step", "step", "pullback, double", "pullback, blocks", "digest, ms",
               "peak, double → blocks"]  # fmt: skip
    return (
        "One step of 4 rows of 104 tokens with SGD: ms, TFLOP/s of the operations it needs (3 or 9 forward passes), and "
        f"their share of the rate of square products in the same arithmetic.\n\n{table(columns, rows)}{_left_out(shapes)}"
    )


def _left_out(shapes: dict[str, Any]) -> str:
    told = [
        f"{name} {dtype}: {', '.join(f'{k} {show(n)}' for k, n in m['needed_bytes'].items() if n > m['free_bytes'])} "
        f"of {show(m['free_bytes'])}"
        for name, section in shapes.items()
        for dtype, m in section["memory"].items()
        if any(n > m["free_bytes"] for n in m["needed_bytes"].values())
    ]
    return f"\nLeft out, for more memory was predicted than is free: {'; '.join(told)}.\n" if told else ""


def _cell(found: dict[str, Any] | None, rate: float | None) -> str:
    if not found or "seconds" not in found:
        return "out of memory" if found else "–"
    speed = found["operations"] / found["seconds"]
    share = f", {100 * speed / rate:.0f} %" if rate else ""
    return f"{found['seconds'] * 1e3:.3g} ({speed / 1e12:.3g}{share})"


def _peak(found: dict[str, Any] | None) -> str:
    return show(found["peak_bytes"]) if found and "peak_bytes" in found else "–"


def _runs(shapes: dict[str, Any]) -> str:
    rows, notes, ways = (
        [],
        [],
        [f"{e}, states on the {place}" for e in ("double", "blocks") for place in ("host", "device")],
    )
    for name, section in shapes.items():
        for mode, found in section["modes"].items():
            runs = found.get("runs", {})
            if runs:
                rows.append([name, mode, *(_run(runs.get(way), section["steps"]) for way in ways)])
        if "whole run" in section:
            run = section["whole run"]
            notes.append(f"{name} in float32, double, states on the host, run in full: {run['whole']:.3g} s "
                         f"({run['train']:.3g} train, {run['reverse']:.3g} query and reverse); extrapolated "
                         f"{run['predicted']['whole']:.3g} s.")  # fmt: skip
    if not rows:
        return ""
    steps = next(iter(shapes.values()))["steps"]
    told = "\n".join(["", *notes, ""]) if notes else ""
    return (
        f"{steps} steps, **extrapolated** from these along the replay plan for the room there is: seconds of the whole run, "
        f"in runs of the plain loop; (states held, steps taken again by step).\n\n"
        f"{table(['shape', 'arithmetic', *ways], rows)}{told}"
    )


def _run(run: dict[str, Any] | None, steps: int) -> str:
    if run is None:
        return "–"
    return f"{run['whole']:.3g} s, {run['of plain']:.2f} × ({run['slots']}, {run['replays'] / steps:.2f})"


def _engines(found: dict[str, Any] | None) -> str:
    rows = []
    for length, each in (found or {}).get("lengths", {}).items():
        if "seconds" in each.get("double", {}) and "seconds" in each.get("blocks", {}):
            double, blocks = each["double"], each["blocks"]
            active = double["peak_bytes"] - 6 * each["state_bytes"]
            rows.append([length, f"{blocks['seconds'] / double['seconds']:.2f}", f"{_peak(double)} → {_peak(blocks)}",
                         f"{each['predicted_graph_bytes'] / active:.2f}" if active > 0 else "–"])  # fmt: skip
    columns = ["tokens in a row", "time, blocks ÷ double", "peak, double → blocks", "predicted ÷ measured graph"]
    return f"160M, 4 rows, float32, one pullback:\n\n{table(columns, rows)}" if rows else ""


def _queries(found: dict[str, Any] | None) -> str:
    rows = [
        [engine, f"{each['of K single ones']:.2f}", " → ".join(_peak(each[k]) for k in ("K = 1", "K = 8"))]
        for engine, each in (found or {}).items()
        if isinstance(each, dict) and "of K single ones" in each
    ]
    return f"160M, float32:\n\n{table(['engine', '8 queries, of 8 pullbacks', 'peak, 1 → 8'], rows)}" if rows else ""


def _head(found: dict[str, Any] | None) -> str:
    parts = []
    for name, each in (found or {}).get("sizes", {}).items():
        rows = [[*kind.rsplit(", ", 2), f"{taken['seconds'] * 1e3:.3g}", _peak(taken)]
                for kind, taken in each.items() if isinstance(taken, dict) and "seconds" in taken]  # fmt: skip
        size = each["size"]
        title = (
            f"The head of {name}: {size['tokens']} tokens, width {size['width']}, vocabulary {size['vocabulary']:,}:"
        )
        parts.append(f"{title}\n\n{table(['way', 'work', 'arithmetic', 'ms', 'peak'], rows)}" if rows else "")
    return "\n".join(parts)
