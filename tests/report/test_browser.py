"""The page in a browser: it opens without a word or a request, and what it filters is what the score files say."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacking import HALF, compared_out
from reporting import (
    SECRET,
    build_world,
    document_scores,
    document_texts,
    token_scores,
    unlearn,
    write_attack,
    write_evaluation,
    write_experiment,
    write_grid,
    write_hardened,
    write_methods,
)

from retrograd.cli import main
from retrograd.data.rows import Rows
from retrograd.report.pack import LIMIT, quantise
from retrograd.select import weights as weight_files

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = os.environ.get("RETROGRAD_NEED_BROWSER") == "1"  # continuous integration: no skipping


class Seen:
    """A page with everything that it complained of or asked for."""

    def __init__(self, browser: Any, file: Path, **how: Any) -> None:
        self.page = browser.new_page(viewport={"width": how.pop("width", 1200), "height": 900}, **how)
        self.trouble: list[str] = []
        self.page.on("console", lambda said: self.trouble.append(said.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda asked: self.trouble.append(asked.url) if asked.url != file.as_uri() else None)
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]", state="attached", timeout=30_000)

    def keep(self, name: str) -> None:
        """Leave a picture for whoever looks at them."""
        if folder := os.environ.get("RETROGRAD_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _absent("playwright is not installed")
    if CHROMIUM is None:
        _absent("there is no chromium; apt-get install chromium")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def _absent(why: str) -> None:
    if NEEDED:
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def world(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_world(tmp_path_factory.mktemp("browser"))
    assert main(["report", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def seen(browser: Any, world: Path) -> Iterator[Seen]:
    found = Seen(browser, world / "run" / "report.html")
    yield found
    assert not found.trouble
    found.page.close()


def listed(seen: Seen) -> list[int]:
    return [
        int(k)
        for k in seen.page.eval_on_selector_all(
            "[data-panel=rows] .list > details", "all => all.map(one => one.dataset.document)"
        )
    ]


@pytest.mark.parametrize(
    ("name", "how"), [("light", {}), ("dark", {"color_scheme": "dark"}), ("phone", {"width": 390})]
)
def test_it_opens_quietly_and_fits(browser: Any, world: Path, name: str, how: dict[str, Any]) -> None:
    seen = Seen(browser, world / "run" / "report.html", **how)
    assert seen.page.title() == "run · retrograd"  # the hostile row did not run
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= how.get("width", 1200)
    assert "document.title" in seen.page.inner_text("[data-panel=setup]")
    seen.keep(f"run-{name}")
    before = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    seen.page.click("#theme")
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    assert not seen.trouble


def test_documents_are_sorted_as_the_files_say(seen: Seen, world: Path) -> None:
    for column, name in enumerate(("go", "stay", "letters")):
        seen.page.select_option(".switch select", str(column))
        scores = document_scores(world / "run", name)
        for sort, key in (("lowest", lambda k: scores[k]), ("highest", lambda k: -scores[k]), ("size", lambda k: -abs(scores[k])), ("id", lambda k: k)):  # fmt: skip
            seen.page.select_option("[data-panel=rows] .sort", sort)
            assert listed(seen) == sorted(scores, key=key)[:20]
        seen.page.select_option("[data-panel=rows] .sign", "negative")
        seen.page.select_option("[data-panel=rows] .sort", "lowest")
        assert listed(seen) == [k for k in sorted(scores, key=scores.__getitem__) if scores[k] < 0][:20]
        seen.page.select_option("[data-panel=rows] .sign", "all")


def test_search_finds_the_documents_that_have_a_word(seen: Seen, world: Path) -> None:
    texts = document_texts(world / "run")
    for word in ("swims", "RED", "script", "nowhere"):
        seen.page.fill("[data-panel=rows] input", word)
        expected = {k for k, text in texts.items() if word.lower() in text.lower()}
        seen.page.wait_for_selector(f"[data-panel=rows] .count:has-text('{len(expected)} of {len(texts)} documents')")
        assert set(listed(seen)) == expected if len(expected) <= 20 else len(listed(seen)) == 20
        assert seen.page.locator("[data-panel=rows] .list mark").count() <= len(expected)


def test_heat_maps_colour_every_token_by_its_score(seen: Seen, world: Path) -> None:
    for column in (0, 1):
        seen.page.select_option(".switch select", str(column))
        whole, _ = quantise(token_scores(world / "run", column))
        first = listed(seen)[0]
        spans = seen.page.eval_on_selector_all(
            f"[data-panel=rows] [data-document='{first}'] .heat span",
            "all => all.map(one => [Number(one.dataset.score), one.getAttribute('style'), one.title])",
        )
        assert [score for score, _, _ in spans] == whole[first][: len(spans)].tolist()
        assert not whole[first][len(spans) :].any()
        for score, colour, title in spans:
            word = "negative" if score < 0 else "positive"
            assert f"--{word}" in colour if score else colour == "background:transparent"
            assert (
                f"{word}: training on this {'lowers' if score < 0 else 'raises'}" in title
                if score
                else "no target" in title
            )


def selected(seen: Seen) -> int:
    return int(seen.page.inner_text("[data-panel=map] .status").split(" of ")[0].replace(",", ""))


def saved(seen: Seen, path: Path) -> np.ndarray:
    """The selection that the page saves, [rows · length] bool."""
    with seen.page.expect_download() as waiting:
        seen.page.click("[data-panel=map] .save")
    waiting.value.save_as(path)
    runs = json.loads(path.read_text())["runs"]
    found = np.zeros(sum(runs[-2:]), bool)
    for start, count in zip(runs[::2], runs[1::2]):
        found[start : start + count] = True
    return found


def test_a_quadrant_is_what_the_signs_say(seen: Seen, world: Path, tmp_path: Path) -> None:
    x, y = token_scores(world / "run", 0), token_scores(world / "run", 1)
    real = np.zeros(x.shape, bool)
    real[:, 1:] = (x != 0)[:, 1:] | (y != 0)[:, 1:]
    expected = {
        "both losses": (x < 0) & (y < 0),
        "only the first": (x < 0) & (y >= 0) & real,
        "only the second": (x >= 0) & (y < 0),
    }
    for name, mask in expected.items():
        seen.page.click(f".quadrants button:has-text('{name}')")
        assert selected(seen) == mask.sum()
        found = saved(seen, tmp_path / "selection.json")
        assert np.array_equal(np.flatnonzero(found), np.flatnonzero(mask))
        lit = seen.page.locator("[data-panel=map] .list .lit").count()
        assert 0 < lit <= mask.sum()


def pixels(scores: np.ndarray, of: int, sign: int) -> np.ndarray:
    """Where the map draws scores on its square-root axis, in pixels."""
    scale = sign * of / 2.08
    return scale / LIMIT * quantise(scores)[0].astype(float) + of / 2


def test_a_lasso_takes_what_lies_in_it_and_select_reads_the_file(seen: Seen, world: Path, tmp_path: Path) -> None:
    x, y = token_scores(world / "run", 0), token_scores(world / "run", 1)
    px, py = pixels(x, 760, 1), pixels(y, 560, -1)
    canvas = seen.page.locator("[data-panel=map] canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    corners = [(40.0, 300.0), (372.0, 300.0), (372.0, 540.0), (40.0, 540.0)]
    for k, (a, b) in enumerate([*corners, corners[0]]):
        at = box["x"] + a * box["width"] / 760, box["y"] + b * box["height"] / 560
        if k == 0:
            seen.page.mouse.move(*at)
            seen.page.mouse.down()
        seen.page.mouse.move(*at, steps=4)
    seen.page.mouse.up()
    inner = (px > 43) & (px < 369) & (py > 303) & (py < 537) & (x != 0)
    outer = (px > 37) & (px < 375) & (py > 297) & (py < 543) & (x != 0)
    found = np.flatnonzero(saved(seen, tmp_path / "selection.json"))
    assert inner.sum() > 10
    assert set(np.flatnonzero(inner)) <= set(found) <= set(np.flatnonzero(outer))
    assert selected(seen) == len(found)
    assert main([
        "select", str(tmp_path / "chosen"), "--scores", f"{world / 'run'}:go", "--rule", "selection", "--selection",
        str(tmp_path / "selection.json"), "--controls", "random_count",
    ]) == 0  # fmt: skip
    weights = weight_files.read(tmp_path / "chosen", rows_of(world / "run"))
    assert np.array_equal(np.flatnonzero(weights.numpy().ravel()), found)
    assert set(weights.unique().tolist()) == {0.0, 1.0}


def rows_of(run: Path) -> Rows:
    from retrograd.select.sources import load_data
    from retrograd.settings.select import SelectConfig

    return load_data(SelectConfig(out=Path(), scores=(f"{run}:go",))).rows


def test_words_and_documents_light_up_their_points(seen: Seen, world: Path) -> None:
    search = seen.page.locator("[data-panel=map] input[type=search]")
    search.fill("swims")
    search.press("Enter")
    texts = document_texts(world / "run")
    documents = [k for k, text in texts.items() if "swims" in text]
    first_alone = [k for k in documents if texts[k].startswith("swims") and texts[k].count("swims") == 1]
    most, least = len(documents), len(documents) - len(first_alone)  # the first tokens of a row are no targets
    shown = int(seen.page.inner_text("[data-panel=map] .status").split(" documents")[0].split(" in ")[1])
    assert least <= shown <= most
    seen.page.fill("[data-panel=map] .document-id", "5")
    seen.page.press("[data-panel=map] .document-id", "Enter")
    assert "document 5" in seen.page.inner_text("[data-panel=map] .status")
    assert selected(seen) == (token_scores(world / "run", 0)[5] != 0).sum()
    seen.page.click(f"[data-panel=rows] [data-document='{listed(seen)[0]}'] button")
    assert f"document {listed(seen)[0]}" in seen.page.inner_text("[data-panel=map] .status")


def test_a_selection_is_joined_and_cleared(seen: Seen) -> None:
    press = lambda name: seen.page.click(f".quadrants button:has-text('{name}')")  # noqa: E731
    press("only the first")
    first = selected(seen)
    press("only the second")
    second = selected(seen)
    seen.page.select_option("[data-panel=map] .how", "add")
    press("only the first")
    assert selected(seen) == first + second
    seen.page.select_option("[data-panel=map] .how", "cut")
    press("only the second")
    assert selected(seen) == first
    seen.page.click("[data-panel=map] .clear")
    assert "Nothing" in seen.page.inner_text("[data-panel=map] .status")
    assert seen.page.is_disabled("[data-panel=map] .save")


def test_documents_are_points_of_their_sums(seen: Seen, world: Path) -> None:
    seen.page.select_option("[data-panel=map] .unit", "documents")
    seen.page.click(".quadrants button:has-text('both losses')")
    go, stay = (document_scores(world / "run", name) for name in ("go", "stay"))
    both = [k for k in go if go[k] < 0 and stay[k] < 0]
    x = token_scores(world / "run", 0)
    assert f"in {len(both)} documents" in seen.page.inner_text("[data-panel=map] .status")
    assert selected(seen) == sum((x[k] != 0).sum() for k in both)


def test_the_keyboard_moves_the_map(seen: Seen) -> None:
    canvas = seen.page.locator("[data-panel=map] canvas")
    picture = "document.querySelector('[data-panel=map] canvas').toDataURL().length"
    canvas.focus()
    before = seen.page.evaluate(picture)
    canvas.press("+")
    canvas.press("ArrowLeft")
    assert seen.page.evaluate(picture) != before
    canvas.press("0")
    assert seen.page.evaluate(picture) == before


def test_an_unlearned_model_opens_masked(browser: Any, world: Path) -> None:
    run = unlearn(world)
    assert main(["report", str(run)]) == 0
    seen = Seen(browser, run / "report.html")
    text = seen.page.inner_text("body").casefold()
    assert not [word for word in SECRET if word in text]
    assert "▒▒▒▒▒▒" in text
    seen.page.select_option("[data-panel=answers] .kind", "changed")
    seen.keep("unlearned")
    assert not seen.trouble


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("experiment", write_experiment),
        ("attack", write_attack),
        ("hardened", write_hardened),
        ("grid", write_grid),
    ],
)
@pytest.mark.parametrize("width", [1200, 390])
def test_tables_of_many_models_open_quietly_and_fit(
    browser: Any, tmp_path: Path, name: str, write: Any, width: int
) -> None:
    write(tmp_path)
    seen = opened(browser, tmp_path, width=width)
    assert seen.page.locator("svg.chart circle").count() > 1
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.page.evaluate(UNREACHED) == []
    seen.keep(f"{name}-{width}")
    assert not seen.trouble
    seen.page.close()


# what is wider than its place and cannot be scrolled by keyboard; text of charts that has shrunk with the screen
UNREACHED = """[...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth && one.tabIndex < 0)
    .concat([...document.querySelectorAll("svg.chart")].filter((one) => one.clientWidth < 0.9 * one.viewBox.baseVal.width))
    .map((one) => one.outerHTML.slice(0, 80))"""


def opened(browser: Any, folder: Path, **how: Any) -> Seen:
    assert main(["report", str(folder)]) == 0
    return Seen(browser, folder / "report.html", **how)


def cells(seen: Seen, panel: str, row: str) -> list[str]:
    """The cells of the first row of a panel's tables with a header that has some text, each in one line."""
    found = seen.page.locator(f"[data-panel={panel}] tr:has(th[scope=row]:has-text('{row}'))").first.locator("td")
    return [" ".join(text.split()) for text in found.all_inner_texts()]


def test_a_cell_opens_to_its_answers_by_keyboard(browser: Any, tmp_path: Path) -> None:
    out = compared_out(tmp_path / "out", [HALF])
    seen = opened(browser, out)
    panel = seen.page.locator("[data-panel=compare]")
    button = panel.locator("tr:has(th[scope=row]:has-text('leaky')) button.open").first
    number = float(button.inner_text().split()[0])
    button.focus()
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_selector(".behind:not([hidden])")
    assert seen.page.evaluate("document.activeElement.className") == "behind"
    told = panel.locator(".behind .count").inner_text()
    assert f"({number:.1f} %) at step 2" in told
    asked = int(re.search(r"Of (\d+) questions", told)[1])
    rows = panel.locator(".behind .list tr")
    assert rows.count() == 1 + asked
    seen.page.select_option(".behind .part", "forget")
    seen.page.select_option(".behind .kind", "won")  # 10 of 40 in both halves before; 40 and 34 after
    assert "20 (25.0 %) are right before the attack, 74 (92.5 %) at step 2; 54 listed" in panel.locator(".behind .count").inner_text()  # fmt: skip
    first = [" ".join(text.split()) for text in rows.nth(1).locator("td").all_inner_texts()]
    assert first == ["Where is <10>?", "forget, half A", "nowhere", "✗ away 1 %", "✓ nowhere 98 %"]
    seen.keep("behind")
    assert seen.page.evaluate(UNREACHED) == []
    seen.page.keyboard.press("Escape")
    assert seen.page.evaluate("document.activeElement.className") == "open"
    assert not panel.locator(".behind").is_visible()
    seen.page.select_option("[data-panel=compare] .shown", "latent")
    panel.locator("tr:has(th[scope=row]:has-text('leaky')) button.open").first.click()
    assert "Of 40 questions 10 (25.0 %) are right before the attack, 34 (85.0 %) at step 2" in panel.locator(".behind .count").inner_text()  # fmt: skip
    assert not seen.trouble


def test_a_comparison_shows_what_came_back_and_what_was_hidden(browser: Any, tmp_path: Path) -> None:
    write_attack(tmp_path)
    found = json.loads((tmp_path / "compare.json").read_text())
    seen = opened(browser, tmp_path)
    after, latent = ([100 * value for value in found["cells"][0][name]] for name in ("after", "latent"))
    assert cells(seen, "compare", "npo")[1] == f"{after[0]:.1f} {after[1]:.1f} to {after[2]:.1f}"
    assert cells(seen, "compare", "base")[1] == "ability lost"
    seen.page.select_option("[data-panel=compare] .shown", "latent")
    assert cells(seen, "compare", "npo")[1] == f"{latent[0]:+.0f} {latent[1]:+.0f} to {latent[2]:+.0f}"
    assert "Positive (orange)" in seen.page.inner_text("[data-panel=compare]")
    assert (
        seen.page.locator('[data-panel=compare] .fronts circle[r="5"]').count() == 3
    )  # base has none after the attack
    assert not seen.trouble
    seen.page.close()


def test_hardening_has_a_row_for_each_iteration(browser: Any, tmp_path: Path) -> None:
    write_hardened(tmp_path)
    found = json.loads((tmp_path / "harden.json").read_text())
    seen = opened(browser, tmp_path)
    rows = seen.page.locator("[data-panel=harden] tr:has(td)")
    assert [float(row.locator("td").nth(1).inner_text()) for row in rows.all()] == [
        one["objective"] for one in found["iterations"]
    ]
    assert "best" in rows.nth(found["best"]).inner_text()
    assert not seen.trouble
    seen.page.close()


def test_a_grid_is_drawn_along_the_setting_that_is_chosen(browser: Any, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    write_grid(tmp_path)
    rows = [row for row in parquet.read_table(tmp_path / "results.parquet").to_pylist() if row["lds"] is not None]
    seen = opened(browser, tmp_path)
    told = [f"LDS {row['lds']:.3g}" for row in rows]
    for axis, ticks in (("train.optimizer", {"adamw", "muon"}), ("train.lr", {"0.001", "0.01"})):
        seen.page.select_option("[data-panel=grid] .axis", axis)
        chart = seen.page.locator("[data-panel=grid] .lds svg")
        hints = [text.split(": ")[1].split(",")[0] for text in chart.locator("circle title").all_text_contents()]
        assert sorted(hints) == sorted(told)
        assert ticks <= set(chart.locator("text").all_text_contents())
    assert "missing: it <failed>" in seen.page.inner_text("[data-panel=grid]")
    assert not seen.trouble
    seen.page.close()


def test_an_evaluation_shows_metrics_of_unlearning_with_their_meaning(browser: Any, tmp_path: Path) -> None:
    write_evaluation(tmp_path)
    one = json.loads((tmp_path / "summary.json").read_text())["results"][0]["of_unlearning"]["mia_zlib"]
    seen = opened(browser, tmp_path, width=390)
    low, high = one["interval"]
    assert cells(seen, "exam", "mia_zlib")[1] == f"{one['value']:.3g} {low:.2g} to {high:.2g}"
    assert "0.5: as never known" in seen.page.inner_text("[data-panel=exam]")
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not seen.trouble
    seen.page.close()


def test_methods_on_one_bank_stand_side_by_side(browser: Any, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    write_methods(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "validation.json").read_text())
    seen = opened(browser, tmp_path / "run", width=390)
    for name, one in told["methods"][0]["methods"].items():
        low, high = one["interval"]
        assert cells(seen, "retraining", name)[0] == f"{one['mean_lds']:.3g} {low:.3g} to {high:.3g}"
    text = seen.page.inner_text("[data-panel=retraining]")
    assert f"{told['filtering'][0]['without_the_strongest']:.3g}" in text
    assert seen.page.locator("[data-panel=retraining] circle").count() == 2
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert seen.page.evaluate(UNREACHED) == []
    seen.keep("methods-390")
    assert not seen.trouble
    seen.page.close()
