"""How large the report of a token run is, how long it takes to make, and how quickly it answers in a browser.

A run's folder is written with random scores of two queries, heavy-tailed as real ones are, and random words; no model is
trained. `retrograd report` makes its page in a process of its own; Debian's chromium, driven by Playwright, opens it. The
lasso is drawn with the mouse, and what it selects is held against the score files before any time is printed.

    python bench/report.py                                  # 1,000 rows of 1,024 tokens
    python bench/report.py --rows 1000 10000                # and 10,000: ten million tokens
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tools import machine, table, write_json

HERE = Path(__file__).parent.parent
LENGTH, VOCABULARY = 1024, 50_000
CORNERS = [(60, 300), (340, 300), (340, 520), (60, 520)]  # of the lasso, on the map's 760 × 560 pixels


def write_run(folder: Path, rows: int, length: int) -> None:
    """A folder as `retrograd magic --attribute tokens` leaves it, with the files that a page is made of."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    count = rows * length
    words = np.array([f" w{k}" for k in range(VOCABULARY)])
    ids = np.minimum(draw.zipf(1.3, count), VOCABULARY) - 1
    both = (draw.standard_t(3, (2, count)) * 1e-6).astype(np.float32)
    scores = np.stack([both[0], 0.7 * both[0] + 0.7 * both[1]])
    position = np.tile(np.arange(length), rows)
    scores[:, position == 0] = 0
    row = np.repeat(np.arange(rows), length)
    columns = {
        "row": row, "position": position, "doc_id": row, "token_id": ids, "token": pa.array(words).take(pa.array(ids)),
        "target": position > 0, "score_forget": scores[0], "score_retain": scores[1],
    }  # fmt: skip
    parquet.write_table(pa.table(columns), folder / "scores.parquet")
    sums = scores.reshape(2, rows, length).sum(2, dtype=np.float64)
    examples = [
        {"doc_id": k, "score": float(sums[0, k]), "steps": [k // 16], "targets": length - 1,
         "scores": {"forget": float(sums[0, k]), "retain": float(sums[1, k])},
         "text": "".join(words[ids[k * length : k * length + 60]])}
        for k in range(rows)
    ]  # fmt: skip
    (folder / "all_scores.json").write_text(json.dumps({"meaning": "", "examples": examples}))
    train = {"optimizer": "adamw", "lr": 1e-4, "lr_schedule": "constant", "eps_root": 1e-6, "weight_decay": 0.0,
             "batch_size": 16, "epochs": 1}  # fmt: skip
    config = {"model": "random", "dtype": "float32", "attribute": "tokens", "data": {"dataset": "random"}, "train": train,
              "queries": {"forget": {}, "retain": {}}, "query": {}}  # fmt: skip
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    told = {"documents": rows, "rows": rows, "targets": rows * (length - 1), "longest": length, "packed": False}
    manifest = {
        "command": "magic",
        "steps": rows // 16,
        "rows": told,
        "hashes": {"rows": "0"},
        "phases": {"scores": {}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def made(run: Path) -> dict[str, float]:
    """Seconds, and the most bytes, of the command."""
    start = time.monotonic()
    code = "import sys; from retrograd.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, "report", str(run)], check=True, stdout=subprocess.DEVNULL, cwd=HERE)
    return {
        "make_seconds": time.monotonic() - start,
        "make_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def opened(file: Path, rows: int, length: int) -> dict[str, float]:
    """Seconds until the page answers, milliseconds of selections, bytes of the browser's processes at their most."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("there is no chromium; apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        start = time.monotonic()
        page.goto(file.as_uri(), timeout=120_000)
        page.wait_for_selector("html[data-ready=yes]", state="attached", timeout=120_000)
        ready = time.monotonic() - start
        canvas = page.locator("[data-panel=map] canvas")
        found: dict[str, Any] = {"ready_seconds": ready}
        times = {
            "lasso": lambda: draw_lasso(page, canvas),
            "quadrant": lambda: page.click(".quadrants button >> nth=1"),
        }
        for name, does in times.items():
            each = []
            for _ in range(7):
                does()
                each.append(float(canvas.get_attribute("data-ms")))
                found[f"{name}_tokens"] = int(
                    page.inner_text("[data-panel=map] .status").split(" of ")[0].replace(",", "")
                )
            found |= {f"{name}_ms": sorted(each)[3], f"{name}_ms_least": min(each)}
        start = time.monotonic()
        page.fill("[data-panel=rows] input", "w777")
        page.wait_for_selector(f"[data-panel=rows] .count:not(:has-text('{rows:,} of'))", timeout=60_000)
        found["search_seconds"] = time.monotonic() - start
        session = browser.new_browser_cdp_session()
        processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
        found["renderer_bytes"] = max(peak(one["id"]) for one in processes if one["type"] == "renderer")
        found["browser_bytes"] = sum(peak(one["id"]) for one in processes)
        browser.close()
    return found


def draw_lasso(page: Any, canvas: Any) -> None:
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for k, (a, b) in enumerate([*CORNERS, CORNERS[0]]):
        page.mouse.move(box["x"] + a * box["width"] / 760, box["y"] + b * box["height"] / 560)
        if k == 0:
            page.mouse.down()
    page.mouse.up()


def peak(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def right(run: Path, found: dict[str, float]) -> None:
    """What was selected is what the score files say; of the lasso, up to its edge of one pixel each way."""
    import pyarrow.parquet as parquet

    sys.path.insert(0, str(HERE))
    from retrograd.report.pack import LIMIT, quantise

    columns = parquet.read_table(run / "scores.parquet", columns=["score_forget", "score_retain", "target"])
    x, y, target = (columns[name].to_numpy() for name in ("score_forget", "score_retain", "target"))
    assert found["quadrant_tokens"] == ((x < 0) & (y >= 0) & target).sum()
    px = quantise(x)[0] / LIMIT * 760 / 2.08 + 380
    py = -(quantise(y)[0] / LIMIT) * 560 / 2.08 + 280
    (left, top), (low, bottom) = CORNERS[0], CORNERS[2]
    counts = [
        int(((px > left - e) & (px < low + e) & (py > top - e) & (py < bottom + e) & target).sum()) for e in (-2, 2)
    ]
    assert counts[0] <= found["lasso_tokens"] <= counts[1], (counts, found["lasso_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000])
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            write_run(run, rows, options.length)
            found: dict[str, Any] = {"tokens": rows * options.length, "load": os.getloadavg()[0], **made(run)}
            file = run / "report.html"
            found["file_bytes"] = file.stat().st_size
            found["frame_bytes"] = found["file_bytes"] - sum(map(len, arrays(file)))
            found |= opened(file, rows, options.length)
            right(run, found)
            results.append(found)
    heads = [
        "tokens",
        "make s",
        "GiB",
        "page MB",
        "without arrays MB",
        "ready s",
        "lasso ms (least)",
        "quadrant ms (least)",
        "search s",
        "renderer GiB",
        "load",
    ]
    lines = [
        [f"{one['tokens']:,}", f"{one['make_seconds']:.1f}", f"{one['make_bytes'] / 2**30:.2f}", f"{one['file_bytes'] / 1e6:.1f}",
         f"{one['frame_bytes'] / 1e6:.2f}", f"{one['ready_seconds']:.2f}", f"{one['lasso_ms']:.0f} ({one['lasso_ms_least']:.0f})",
         f"{one['quadrant_ms']:.0f} ({one['quadrant_ms_least']:.0f})",
         f"{one['search_seconds']:.2f}", f"{one['renderer_bytes'] / 2**30:.2f}", f"{one['load']:.1f}"]
        for one in results
    ]  # fmt: skip
    print(table(heads, lines))
    if options.json:
        write_json(options.json, {"machine": machine(), "results": results})


def arrays(file: Path) -> list[str]:
    """The packed arrays of a page."""
    parts = file.read_text(encoding="utf8").split('<script type="application/octet-stream"')[1:]
    return [part.partition(">")[2].partition("<")[0] for part in parts]


if __name__ == "__main__":
    main()
