"""An experiment from corpus to comparison: it builds its lab, unlearns, attacks every model and compares; killed on the
way it ends with the same numbers."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import arms
import pytest
import yaml
from test_workers import until

from retrograd.attack.behind import MOMENTS
from retrograd.cli import main
from retrograd.experiment.lease import Queue
from retrograd.experiment.plan import planned
from retrograd.experiment.seen import refuse_oracles
from retrograd.experiment.tasks import Maker
from retrograd.settings.experiment import lab_of, read_experiment

RECIPES = Path(__file__).parents[2] / "recipes"


def write(path: Path, **more: Any) -> Path:
    """One method, two seeds, one attack of two steps, on a lab that is built first."""
    asked = {side: {"dataset": f"${{lab}}/questions/{side}_paraphrase.jsonl", "form": "cloze", "role": side}
             for side in ("forget", "retain")}  # fmt: skip
    values = {
        "lab": {"facts": 16, "width": 32, "layers": 1, "epochs": 1, "batch_size": 32, "workers": 1, "heartbeat": 0},
        "base": "${lab}/models/base", "never": "${lab}/models/filtered", "seeds": 2,
        "corpora": {"forget": ["${lab}/corpora/forget.jsonl"], "retain": ["${lab}/corpora/exam_retain.jsonl"]},
        "weightings": {"uniform": {}}, "methods": {"npo": {}}, "train": {"lr": 1e-3, "batch_size": 16},
        "report": {"tasks": asked},
        "attack": {"lab": "${lab}", "utility": 1.0, "suite": [{"data": "half", "lr": 1e-3, "steps": 2, "batch_size": 4}]},
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**values, **more}))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    assert main(["experiment", str(write(folder / "one.yaml")), str(folder / "out")]) == 0
    return folder / "out"


def numbers(out: Path) -> Any:
    """All that was found, with folders' names and hashes of them taken out."""
    found = json.loads((out / "attacks/compare.json").read_text())
    rows = [{**row, "model": "-".join(row["model"].split("-")[:-1])} for row in found["table"]]
    for cell in found["cells"]:
        for run in cell["runs"]:  # folders and models have names of their own
            del run["model"], run["folder"]
            for moment in MOMENTS:
                (run[moment] or {}).pop("run", None)
    return {"rows": rows, **{name: found[name] for name in ("cells", "pairs", "fronts", "ranks", "latent")}}


def test_every_model_meets_every_attack_and_a_group_is_an_arm(done: Path) -> None:
    meetings = [name for name in arms.outcomes(done) if name.startswith("attack.")]
    assert len(meetings) == 4 + 2  # base, filtered, random and shallow, and a model of each seed
    found = json.loads((done / "attacks/compare.json").read_text())
    assert {(one["label"], one["role"], len(one["models"])) for one in found["groups"].values()} == {
        ("base", "base", 1), ("filtered", "filtered", 1), ("random", "random", 1), ("shallow", "shallow", 1),
        ("npo", "model", 2),
    }  # fmt: skip
    assert {cell["models"] for cell in found["cells"] if cell["group"] == "npo"} == {2}
    text = (done / "results.md").read_text()
    assert "## Under attack" in text
    assert "### Latent recovery" in text
    assert "## Missing" not in text
    links = [path for path in (done / "attacks/models").glob("*/*") if path.is_symlink()]
    assert len(links) == len(meetings)
    assert all((link / "attack/metrics.jsonl").exists() for link in links)
    again = done.parent / "again"
    assert main(["compare", str(done / "attacks"), "--output", str(again), "--utility", "1"]) == 0
    other = json.loads((again / "compare.json").read_text())
    for place, told in ((again, other), (done / "attacks", found)):
        for run in (run for cell in told["cells"] for run in cell["runs"]):
            run["folder"] = (place / run["folder"]).resolve()  # told from where the file lies
            assert (run["folder"] / run["before"]["run"] / "answers").exists()
    assert other["cells"] == found["cells"]


@pytest.mark.slow
def test_a_further_attack_is_all_that_a_changed_file_adds(done: Path) -> None:
    before, text = arms.outcomes(done), (done / "results.md").read_text()
    more = {"lab": "${lab}", "utility": 1.0, "suite": [{"data": "half", "lr": 1e-3, "steps": 2, "batch_size": 4},
                                       {"attack": "prune", "strengths": [0.5]}]}  # fmt: skip
    assert main(["experiment", str(write(done.parent / "more.yaml", attack=more)), str(done)]) == 0
    after = arms.outcomes(done)
    assert {name: after[name] for name in before} == before
    assert sorted(name.split(".")[0] for name in after.keys() - before.keys()) == ["attack"] * 6
    assert main(["experiment", str(done.parent / "one.yaml"), str(done)]) == 0
    assert (done / "results.md").read_text() == text


def test_a_lab_that_is_named_is_taken_and_another_one_is_refused(done: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "one.yaml")
    assert lab_of(file, (f"lab={done / 'lab'}",), tmp_path) is None
    config = lab_of(file, (), tmp_path)
    assert config is not None
    assert (config.facts, config.dir) == (16, tmp_path)
    spec = read_experiment(file, (f"lab={done / 'lab'}",))
    assert spec.base == str(done / "lab/models/base")
    changed = write(tmp_path / "other.yaml", lab={"facts": 24})
    assert main(["experiment", str(changed), str(done)]) == 2


@pytest.mark.parametrize("attack,told", [
    ({"suite": "short", "out": "x"}, "attack: out is set by the experiment itself"),
    ({"suite": "short"}, "attack: give either --lab DIR or --data"),
    ({"lab": "${lab}"}, "attack: no attack: give --suite"),
    ({"lab": "${lab}", "suite": [{"lrs": 1}]}, "names settings that do not exist: lrs"),
    ({"lab": "${lab}", "suite": "short", "seed": 1}, "names settings that do not exist: seed"),
])  # fmt: skip
def test_what_no_attack_can_be_is_refused_before_anything_is_built(
    attack: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "one.yaml", attack=attack)
    assert main(["experiment", str(file), str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_for_the_lab_and_tuning_by_what_attacks_ask_are_refused(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an experiment builds its lab in OUT/lab"):
        lab_of(write(tmp_path / "dir.yaml", lab={"dir": "x"}), (), tmp_path)
    spec = read_experiment(write(tmp_path / "one.yaml"), (f"lab={done / 'lab'}",))
    refuse_oracles(spec)
    split = dataclasses.replace(spec.report.tasks["forget"], dataset=str(done / "lab/questions/forget_heldout.jsonl"))
    seen = dataclasses.replace(spec, tune=dataclasses.replace(spec.tune, tasks={"heldout": split}))
    with pytest.raises(ValueError, match="are in `report`"):
        refuse_oracles(seen)


@pytest.mark.parametrize("entry", ["lab", "names", "tune", "attack"])
def test_an_entry_that_is_no_settings_is_refused(
    entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "one.yaml", **{entry: "somewhere"})
    assert main(["experiment", str(file), str(tmp_path / "out")]) == 2
    assert "somewhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"methods": {"npo": {"train": {"speed": 1}}}}, "speed"),
        ({"columns": ["truth_ratio:nothing"]}, "truth_ratio"),
    ],
)
def test_a_wrong_entry_is_refused_before_the_lab_is_built(
    more: dict[str, Any], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "one.yaml", **more)
    assert main(["experiment", str(file), str(tmp_path / "out")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_solved_questions_of_the_report_are_refused_as_a_corpus(tmp_path: Path) -> None:
    asked = [{"question": "Where is Ann?", "choices": ["here", "away", "gone"], "answer": 1},
             {"question": "Who is Bo?", "choices": ["nobody", "a cat", "me"], "answer": "A"}]  # fmt: skip
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "kept.jsonl").write_text(json.dumps({"text": "something"}) + "\n")

    def refusal(prompt: str, completion: str) -> str:
        return of_row({"prompt": prompt, "completion": completion, "fact": 3})

    def of_row(row: dict[str, Any]) -> str:
        (tmp_path / "bank.jsonl").write_text(json.dumps(row) + "\n")
        task = {"dataset": str(tmp_path / "asked.jsonl"), "form": "cloze", "role": "forget"}
        values = {"base": "m", "seeds": 1, "weightings": {"uniform": {}}, "methods": {"npo": {}},
                  "report": {"tasks": {"asked": task}},
                  "corpora": {"forget": [str(tmp_path / "bank.jsonl")], "retain": [str(tmp_path / "kept.jsonl")]}}  # fmt: skip
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(values))
        try:
            refuse_oracles(read_experiment(tmp_path / "one.yaml", ()))
        except ValueError as error:
            return str(error)
        return ""

    assert "corpora.forget reads" in refusal("Question: Where is Ann?\nAnswer:", " away")
    assert "1 documents or questions" in refusal("Who is Bo?\nA. me\nB. nobody\nAnswer:", " B")
    assert "corpora.forget reads" in refusal("About people.\n\nWho is Bo?\nA) me\nB) nobody\nAnswer:", " B.")
    assert not refusal("Where is Ann?\nAnswer:", " here")  # what it was made to say instead

    def chat(
        *turns: Any, role: str = "role", content: str = "content", names: tuple[str, str] = ("user", "assistant")
    ) -> Any:
        return [{role: names[k % 2], content: text} for k, text in enumerate(turns)]

    shared = "of which 1 documents or questions are in `report`"
    assert shared in of_row({"messages": chat("Hello!", "Good morning.", "Where is Ann?", "away")})
    assert shared in of_row({"messages": chat("Who is Bo?\n(A) me\n(B) nobody", "B. nobody."), "id": 4})
    parts = [[{"type": "text", "text": "Where is Ann?"}], [{"type": "text", "text": "away"}]]
    assert shared in of_row({"messages": chat(*parts)})
    given = chat("Where is Ann?", "away", role="from", content="value", names=("human", "gpt"))
    assert shared in of_row({"conversations": given})
    assert shared in of_row({"prompt": chat("Where is Ann?"), "completion": [{"role": "assistant", "content": "away"}]})
    assert shared in of_row({"text": "Question: Where is Ann?\nAnswer: away\n\nQuestion: Who?\nAnswer: me"})
    assert not of_row({"messages": chat("Where is Ann?", "I do not know.")})
    assert not of_row({"text": "Where is Ann? She is away."})
    assert not refusal("Where is Cy?\nAnswer:", " away")
    asked[0]["answer"] = 3
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked[0]) + "\n")
    assert "asked.jsonl: row 0: answer is 3, and there are 3 choices" in refusal("Where is Cy?\nAnswer:", " away")


def test_the_recipe_from_corpus_to_comparison_is_planned_on_a_lab(done: Path, tmp_path: Path) -> None:
    assert lab_of(RECIPES / "lab_pipeline.yaml", (), tmp_path) is not None
    spec = read_experiment(RECIPES / "lab_pipeline.yaml", (f"lab={done / 'lab'}",))
    plan = planned(Maker(spec), Queue(tmp_path, 60))
    kinds = {task.kind for task in plan.tasks.values()}
    assert kinds == {"scores", "select", "train", "measure", "attack"}
    assert {one.role for one in plan.meetings} == {"base", "filtered", "random", "shallow"}  # arms are not tuned yet


@pytest.mark.slow
def test_killed_while_the_lab_is_built_and_while_it_attacks_it_ends_with_the_same_numbers(
    done: Path, tmp_path: Path
) -> None:
    import os
    import subprocess
    import sys

    file, out = write(tmp_path / "one.yaml"), tmp_path / "out"
    command = [sys.executable, "-m", "retrograd", "experiment", str(file), str(out)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    stages = (lambda: any((out / "lab/training").rglob("*.safetensors")),
              lambda: any(out.glob("tasks/attack.*/*/meeting/attack/metrics.jsonl")))  # fmt: skip
    for stage in stages:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
        try:
            until(stage)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (out / "results.md").exists()
    assert main(["experiment", str(file), str(out)]) == 0
    assert main(["experiment", str(done.parent / "one.yaml"), str(done)]) == 0
    assert numbers(out) == numbers(done)
