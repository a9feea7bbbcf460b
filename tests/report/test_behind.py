"""The answers behind the cells of a comparison: what a page has of them is what the cells' numbers are of."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from attacking import FORGET, HALF, compared_out
from test_report import page, panels

from retrograd.attack.folder import read_folder
from retrograd.cli import main
from retrograd.report.mask import BLOT
from retrograd.report.pack import unpack
from retrograd.settings.attack import name_of


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one attack, and another one."""
    return compared_out(tmp_path_factory.mktemp("behind") / "out", [HALF, replace(HALF, seed=1), FORGET])


def behind(text: str, told: dict[str, Any], name: str, attack: int) -> Any:
    """Of a cell's first run: by moment the options that were chosen and the right one's probability, [questions]."""
    group = next(one for one in told["groups"] if f"-{name}-" in one["name"] or one["name"] == name)
    arrays = {key: unpack(re.search(rf'data-name="{key}" data-type="uint8">([^<]*)<', text)[1], "uint8")
              for key in ("chosen", "probability")}  # fmt: skip
    n, run = len(told["questions"]), group["cells"][attack]["runs"][0]
    of = {moment: slice(run[moment]["row"] * n, (run[moment]["row"] + 1) * n) for moment in ("before", "after", "last")
          if run[moment]}  # fmt: skip
    return group["cells"][attack], {m: (arrays["chosen"][part], arrays["probability"][part]) for m, part in of.items()}


def test_a_cell_opens_to_the_answers_that_its_number_is_of(out: Path) -> None:
    text = page(out)
    told = panels(text)["compare-0"]
    questions = told["questions"]
    assert len(questions) == 3 * 40
    assert [(task["name"], task["side"]) for task in told["tasks"]] == [
        ("forget_a", "forget"), ("forget_b", "forget"), ("retain", "retain")]  # fmt: skip
    assert questions[1]["question"] == "Where is <1>?"
    assert (questions[1]["choices"][questions[1]["right"]], questions[1]["first"], questions[41]["first"]) == (
        "there", 1, 0)  # fmt: skip
    right = np.array([one["right"] for one in questions])
    mine = [k for k, one in enumerate(questions) if one.get("told") == 1]
    for attack in range(2):
        for name in ("leaky", "deep", "shallow", "filtered"):
            cell, answers = behind(text, told, name, attack)
            assert (answers["after"][0] == right)[mine].mean() == pytest.approx(cell["after"][0])
            assert (answers["before"][0] == right)[:80].mean() == 20 / 80
    unseen = [k for k, one in enumerate(questions) if one.get("first") == 0]
    (cell, own), (_, never) = (behind(text, told, name, 0) for name in ("shallow", "filtered"))
    rises = [((one["last"][0] == right) * 1.0 - (one["before"][0] == right))[unseen].mean() for one in (own, never)]
    assert told["attacks"][0]["unseen"] == "second"
    assert rises[0] - rises[1] == pytest.approx(cell["latent"][0])
    chosen, level = own["last"]  # a right answer has e⁵ times the odds of each of three others, a wrong one the inverse
    assert set(level[chosen == right]) == {round(250 / (1 + 3 * np.exp(-5)))}
    assert set(level[chosen != right]) == {round(250 / (3 + np.exp(5)))}
    lost, answers = behind(text, told, "broken", 0)
    assert (lost["after"], lost["lost"], set(answers)) == (None, 1, {"before", "last"})


def test_answers_that_a_page_cannot_hold_or_that_are_gone_are_named(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(out, tmp_path / "out")
    told = panels(page(out))["compare-0"]
    assert all([len(cell["runs"]) for cell in one["cells"]] == [2, 1] for one in told["groups"])
    monkeypatch.setattr("retrograd.report.panels.behind.MOST_ANSWERS", 1)
    assert "a page cannot hold the answers behind" in panels(page(out))["compare-0"]["why"]
    (run,) = (one for one in read_folder(out).targets if one.source.endswith("deep"))
    monkeypatch.undo()
    shutil.rmtree(out / "models" / run.name / name_of(HALF) / "attack" / "answers")
    text = page(out)
    told = panels(text)["compare-0"]
    assert "are not there any more" in told["why"]
    cell, answers = behind(text, told, "deep", 0)
    assert (cell["after"] is not None, answers) == (True, {})


def test_questions_behind_a_cell_hide_what_was_to_be_forgotten(out: Path, tmp_path: Path) -> None:
    out = shutil.copytree(out, tmp_path / "out")
    found = json.loads((out / "recovery.json").read_text())
    one = next(one for one in found["models"].values() if one["source"].endswith("deep"))
    one["source"] = str(tmp_path / "run/model")
    (out / "recovery.json").write_text(json.dumps(found))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run_config.yaml").write_text(yaml.safe_dump({"forget": [str(tmp_path / "forget.jsonl")]}))
    (tmp_path / "forget.jsonl").write_text('{"text": "nowhere is a secret"}\n')
    text = page(out)
    assert panels(text)["compare-0"]["questions"][0]["choices"] == ["here", "there", BLOT * len("nowhere"), "away"]
    assert "nowhere" in page(out, "--show_forget")
    (tmp_path / "forget.jsonl").unlink()
    assert main(["report", str(out)]) == 2


def test_what_a_model_of_another_folder_was_to_forget_is_hidden_too(out: Path, tmp_path: Path) -> None:
    one, two = (shutil.copytree(out, tmp_path / name) for name in ("one", "two"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run_config.yaml").write_text(yaml.safe_dump({"forget": [str(tmp_path / "forget.jsonl")]}))
    (tmp_path / "forget.jsonl").write_text('{"text": "nowhere is a secret"}\n')
    told = json.loads((two / "attack.json").read_text())
    (name,) = (name for name, model in told["models"].items() if model["source"].endswith("deep"))
    told["models"][name]["source"] = str(tmp_path / "run/model")
    (two / "attack.json").write_text(json.dumps(told))
    assert "nowhere" in page(one)
    found = json.loads((one / "compare.json").read_text())
    for run in (run for cell in found["cells"] for run in cell["runs"]):
        run["folder"] = "../two"
    (one / "compare.json").write_text(json.dumps(found))
    assert panels(page(one))["compare-0"]["questions"][0]["choices"][2] == BLOT * len("nowhere")
