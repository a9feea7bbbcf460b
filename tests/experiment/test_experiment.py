"""`retrograd experiment` end to end on a tiny world: the table, what is reused, failures, matching, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import arms
import pyarrow.parquet as pq
import pytest

from retrograd.cli import main
from retrograd.experiment.measure import divergence, read_divergence
from retrograd.experiment.seen import refuse_oracles
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.settings.experiment import read_experiment
from retrograd.settings.unlearn import UnlearnConfig, parse_source


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arms.save_world(tmp_path_factory.mktemp("world"))


def run(file: Path, out: Path, world: Path, *more: str) -> int:
    return main(["experiment", str(file), str(out), "--names", f"world={world}", *more])


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    assert run(arms.write(folder / "one.yaml"), folder / "out", world) == 0
    return folder


def table(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "results.parquet").to_pylist()


def kinds(out: Path) -> list[str]:
    return sorted(name.split(".")[0] for name in arms.outcomes(out))


def test_every_task_is_done_once_and_the_table_has_every_arm(done: Path) -> None:
    found = kinds(done / "out")
    counts = {kind: found.count(kind) for kind in set(found)}
    # scores of one corpus; weights of the arm and of each seed of its control; 3 arms × 2 seeds; these and two models
    assert counts == {"scores": 1, "select": 3, "train": 6, "measure": 8}
    rows = table(done / "out")
    assert {row["weighting"] for row in rows} == {"uniform", "value", "random", None}
    forget = {row["weighting"]: row for row in rows if row["quantity"] == "forget"}
    for weighting, row in forget.items():
        of_seeds = [r["value"] for r in rows if r["quantity"] == "accuracy forget" and r["weighting"] == weighting]
        if weighting:
            assert math.isclose(row["value"], sum(of_seeds) / 2)
            assert row["low"] <= row["value"] <= row["high"]
    text = (done / "out/results.md").read_text()
    assert "npo × value: no claim: utilities are not matched" in text
    assert "## Missing" not in text


def test_weights_from_files_are_those_of_the_weighting_that_made_them(done: Path, world: Path, tmp_path: Path) -> None:
    before = arms.outcomes(done / "out")
    made = next(Path(one["place"]) / "weights" for name, one in before.items() if name.startswith("select.value"))
    file = arms.write(tmp_path / "files.yaml", weightings={"mine": {"files": [str(made)]}}, seeds=1)
    assert run(file, tmp_path / "out", world) == 0
    (name,) = (name for name in arms.outcomes(tmp_path / "out") if name.startswith("measure.report-npo-mine-s0"))
    same = next(one for name, one in before.items() if name.startswith("measure.report-npo-value-s0"))
    assert arms.outcomes(tmp_path / "out")[name]["digest"] == same["digest"]


def test_weights_from_files_stand_alone(world: Path, tmp_path: Path) -> None:
    for weighting in ({"files": ["a", "b"]}, {"files": ["a"], "q": 0.2}):
        file = arms.write(tmp_path / "one.yaml", weightings={"mine": weighting})
        with pytest.raises(ValueError, match="`files` stands alone, one for each of 1 forget corpora"):
            read_experiment(file, (f"world={world}",))


@pytest.mark.slow
def test_running_again_does_nothing_and_a_changed_file_what_is_new(done: Path, world: Path) -> None:
    before = arms.outcomes(done / "out")
    text = (done / "out/results.md").read_text()
    assert run(done / "one.yaml", done / "out", world) == 0
    assert arms.outcomes(done / "out") == before
    assert (done / "out/results.md").read_text() == text
    assert run(arms.write(done / "more.yaml", seeds=3), done / "out", world) == 0
    after = arms.outcomes(done / "out")
    assert {name: after[name] for name in before} == before
    assert sorted(name.split(".")[0] for name in after.keys() - before.keys()) == [
        "measure", "measure", "measure", "select", "train", "train", "train",
    ]  # fmt: skip
    assert run(done / "one.yaml", done / "out", world) == 0
    assert (done / "out/results.md").read_text() == text


def test_the_arms_differ_and_a_control_has_the_arm_s_weights_elsewhere(done: Path) -> None:
    from retrograd.runs.files import read_tensors

    found = arms.outcomes(done / "out")
    digests = [outcome["digest"] for name, outcome in found.items() if name.startswith("measure")]
    assert len(set(digests)) == len(digests)
    weights = {
        name.split(".")[1]: read_tensors(Path(outcome["place"]) / "weights/weights.safetensors")[0]["weights"]
        for name, outcome in found.items() if name.startswith("select")
    }  # fmt: skip
    arm, controls = weights["value-0"], [weights["random-0-s0"], weights["random-0-s1"]]
    for control in controls:
        assert sorted(arm[arm != 0].tolist()) == sorted(control[control != 0].tolist())
        assert arm.tolist() != control.tolist()
    assert controls[0].tolist() != controls[1].tolist()


def test_divergence_is_the_mean_over_targets_of_plain_kl(done: Path, world: Path) -> None:
    import torch

    name, outcome = next((n, o) for n, o in arms.outcomes(done / "out").items() if "report-npo-uniform-s0" in n)
    model = next(o["place"] for n, o in arms.outcomes(done / "out").items() if n.startswith("train.npo-uniform-s0"))
    found = read_divergence(Path(outcome["place"]) / "answers")
    assert found is not None
    total, count = 0.0, 0
    base, lm = (load_causal_lm(str(path)) for path in (world / "base", Path(model) / "run/model"))
    tokenizer = load_tokenizer(str(world / "base"))
    for line in (world / "report.jsonl").read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
        with torch.no_grad():
            p, q = (one.module(ids).logits[0, :-1].double().log_softmax(-1) for one in (base, lm))
        total, count = total + float(torch.sum(p.exp() * (p - q))), count + ids.shape[1] - 1
    assert sum(found.targets) >= count  # an end of sequence may be a target too
    rows = load_rows(parse_source(str(world / "report.jsonl"), UnlearnConfig()), tokenizer, lm, None)[0]
    one_by_one = [divergence(lm, base, rows, 1).nats[row] for row in range(len(rows))]
    assert torch.allclose(torch.tensor(found.nats), torch.tensor(one_by_one), atol=1e-5)
    if sum(found.targets) == count:
        assert math.isclose(sum(found.nats), total, rel_tol=1e-4)
    assert math.isclose(outcome["kl"], found.mean), name


@pytest.mark.slow
def test_matching_utility_and_forgetting_on_real_models(world: Path, tmp_path: Path) -> None:
    """The logic is tested in test_arms.py; here every part is real."""
    file = arms.write(tmp_path / "one.yaml", match=["utility", "forgetting"],
                      tune=arms.tuning(tolerance=0.5, target=0.9), weightings={"uniform": {}})  # fmt: skip
    assert run(file, tmp_path / "out", world) == 0
    found = arms.outcomes(tmp_path / "out")
    tuned = {
        float(name.rpartition(".")[0].rpartition("-s0-")[2]): outcome
        for name, outcome in found.items() if name.startswith("measure.tune-npo")
    }  # fmt: skip
    chosen = {row["match"]: row["chosen"] for row in table(tmp_path / "out") if row["quantity"] == "forget"}
    at_utility = {setting for setting, outcome in tuned.items() if outcome["kl"] <= 0.05}
    assert chosen["utility"] in at_utility
    assert tuned[chosen["utility"]]["kl"] > 0.005
    assert tuned[chosen["forgetting"]]["accuracy"]["forget"] <= 0.9
    assert "too few seeds" not in (tmp_path / "out/results.md").read_text()  # no arm by scores


@pytest.mark.slow
def test_a_failed_task_is_told_with_its_dependents_and_the_others_go_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrograd.commands import experiment

    def unlearn(config: Any, console: Any) -> None:
        if config.train.seed == 1:
            raise OSError("the disk is on fire")
        real(config, console)

    real = experiment.unlearn
    monkeypatch.setattr(experiment, "unlearn", unlearn)
    file = arms.write(tmp_path / "one.yaml", weightings={"uniform": {}})
    assert run(file, tmp_path / "out", world) == 1
    text = (tmp_path / "out/results.md").read_text()
    assert "OSError: the disk is on fire" in text
    assert "needs train.npo-uniform-s1." in text
    assert "| npo | uniform |  | 1/2 |" in text
    assert run(file, tmp_path / "out", world) == 1  # it is not tried again unasked
    monkeypatch.setattr(experiment, "unlearn", real)
    assert run(file, tmp_path / "out", world, "--retry") == 0
    assert "fire" not in (tmp_path / "out/results.md").read_text()


def test_a_failed_evaluation_stays_missing(world: Path, tmp_path: Path) -> None:
    report = arms.asked("report")
    report["tasks"]["odd"] = {"dataset": "${world}/q_report_go.jsonl", "form": "cloze", "role": "forget", "expect": 9}
    file = arms.write(tmp_path / "one.yaml", weightings={"uniform": {}}, seeds=1, report=report)
    assert run(file, tmp_path / "out", world) == 0
    rows = table(tmp_path / "out")
    assert next(row for row in rows if row["quantity"] == "forget")["value"] is None
    text = (tmp_path / "out/results.md").read_text()
    assert "## Missing" in text
    assert "* `odd` of 3 models: " in text  # base, never, and the one seed
    assert "another set" in next(row for row in rows if row["quantity"] == "odd" and row["seed"] == 0)["missing"]
    assert next(row for row in rows if row["quantity"] == "retain")["value"] is not None


def test_an_analysis_of_two_score_sets(world: Path, tmp_path: Path) -> None:
    file = arms.write(tmp_path / "one.yaml", methods={}, weightings={},
                      analyses={"both": {"scores": "asked:go", "against": "asked:stay"}})  # fmt: skip
    assert run(file, tmp_path / "out", world) == 0
    assert kinds(tmp_path / "out") == ["analyse", "scores"]
    text = (tmp_path / "out/results.md").read_text()
    assert "* spearman" in text
    assert "a selection of documents is" in text


SAME = {"dataset": "${world}/q_report_go.jsonl", "form": "cloze"}


@pytest.mark.parametrize("more,told", [
    ({"methods": {"unheard": {}}}, "unknown method 'unheard'"),
    ({"methods": {"npo": {"train": {"lrr": 1}}}}, "settings that do not exist: lrr"),
    ({"methods": {"npo": {"evaluate": {"every": 1}}}}, "evaluate is set by the experiment itself"),
    ({"weightings": {"a": {"control": "random_count", "of": "b"}}}, "which is no weighting by scores"),
    ({"weightings": {"a": {"scores": "asked:gone"}}}, "asked asks go, stay"),
    ({"weightings": {"a": {"q": 0.5}}}, "q without `scores`"),
    ({"match": "utility"}, "needs `rows` in tune"),
    ({"match": "utility", "tune": arms.tuning(low=2)}, "all above 0, low below high"),
    ({"base": "${nothing}"}, "a word that `names` does not have"),
    ({"methods": {"npo": {"corpora": {"forget": ["${world}/tune.jsonl"]}}}}, "has corpora of its own to forget"),
    ({"report": {"tasks": {"d": {"dataset": "${world}/q_go.jsonl", "form": "depth"}}}},
     "query go of scores asked reads"),
    ({"report": {"tasks": {"k": {"dataset": "${world}/retain.jsonl", "form": "kl"}}}}, "corpora.retain reads"),
    ({"columns": ["depth:forget"]}, "with a task that it is a metric of: none"),
    ({"corpora": {"forget": ["${world}/report.jsonl"]}}, "4 documents or questions are in `report`"),
    ({"base": "${world}/never"}, "the model that never knew"),
    ({"methods": {"checkpoint_transfer": {"objective": {"teacher": "${world}/never"}}}},
     "method checkpoint_transfer reads"),
    ({"scores": {"asked": {"queries": {"go": SAME}}}, "weightings": {"uniform": {}}}, "query go of scores asked reads"),
    ({"match": "utility", "tune": {**arms.tuning(), "tasks": {"x": {**SAME, "role": "forget"}}}}, "tune task x reads"),
    ({"seeds": [1, 1]}, "seeds that differ"),
    ({"surprise": 1}, "settings that do not exist: surprise"),
])  # fmt: skip
def test_bad_input_is_refused_in_words_and_nothing_is_left(
    more: dict[str, Any], told: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arms.write(tmp_path / "one.yaml", **more), tmp_path / "out", world) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").write_text("x")
    assert run(arms.write(tmp_path.parent / "one.yaml"), tmp_path, world) == 2
    assert "is no experiment" in capsys.readouterr().err


@pytest.mark.slow
def test_scores_of_a_training_that_held_the_corpus_are_those_of_its_rows_there(world: Path, tmp_path: Path) -> None:
    """Rows in another order, among others, each with an end of sequence of its own."""
    from retrograd.runs.scores import read_scores

    texts = [json.loads(line)["text"] for line in (world / "forget.jsonl").read_text().splitlines()]
    others = [json.loads(line)["text"] for line in (world / "retain.jsonl").read_text().splitlines()]
    rows = [{"prompt": "", "completion": text, "file": "forget.jsonl", "line": n} for n, text in enumerate(texts)]
    rows += [{"prompt": "", "completion": text, "file": "retain.jsonl", "line": n} for n, text in enumerate(others)]
    rows = rows[::-1]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {**arms.settings()["scores"]["asked"], "within": str(tmp_path / "all.jsonl"), "start": "${world}/base"}
    more: dict[str, Any] = {
        "methods": {}, "weightings": {}, "scores": {"pretraining": scores},
        "analyses": {"both": {"scores": "pretraining:go", "against": "pretraining:stay"}},
    }  # fmt: skip
    assert run(arms.write(tmp_path / "one.yaml", **more), tmp_path / "out", world) == 0
    found = arms.outcomes(tmp_path / "out")
    places = {name.split(".")[0]: Path(outcome["place"]) for name, outcome in found.items()}
    table = pq.read_table(places["analyse"] / "scores-0.parquet").to_pylist()
    assert {row["row"] for row in table} == set(range(len(texts)))
    grid = read_scores(places["scores"] / "run/scores.pt", True)[0]
    for row in table:
        there = next(n for n, one in enumerate(rows) if (one["file"], one["line"]) == ("forget.jsonl", row["row"]))
        assert row["score"] == float(grid[there, row["position"]].double())
    assert len({row["score"] for row in table}) > len(table) / 2
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert run(tmp_path / "one.yaml", tmp_path / "out", world) == 1
    assert "no row there" in (tmp_path / "out/results.md").read_text()


def test_a_folder_is_an_experiment_s_from_its_first_file_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker that starts at the same moment must not take it for something else."""
    from retrograd.commands import experiment
    from retrograd.durable import make_folder

    seen: list[list[str]] = []

    def watched(folder: Path) -> bool:
        if (tmp_path / "out").exists():
            seen.append(sorted(path.name for path in (tmp_path / "out").iterdir()))
        return make_folder(folder)

    monkeypatch.setattr(experiment, "make_folder", watched)
    file = arms.write(tmp_path / "one.yaml", weightings={"uniform": {}}, seeds=1)
    assert run(file, tmp_path / "out", world) == 0
    assert seen
    assert all("experiment.yaml" in names for names in seen)


def test_scores_for_what_is_reported_are_refused_though_another_call_made_them(world: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    queries: dict[str, dict[str, Any]] = {
        name: {"dataset": str(world / f"q_{name}.jsonl")} for name in ("go", "report_go")
    }
    (tmp_path / "pages.jsonl").write_text('{"page": "what is read", "side": ""}\n')
    pages = str(tmp_path / "pages.jsonl")
    queries |= {
        "page": {"dataset": pages, "text_column": "page"},
        "named": {"dataset": pages, "columns": ["text=page"]},
    }
    (made / "run_config.yaml").write_text(json.dumps({"queries": queries}))

    def refused(query: str) -> str:
        file = arms.write(tmp_path / "one.yaml", scores={"asked": {"folders": [str(made)]}},
                          weightings={"value": {"scores": f"asked:{query}"}})  # fmt: skip
        spec = read_experiment(file, (f"world={world}",))
        try:
            refuse_oracles(spec)
        except ValueError as error:
            return str(error)
        return ""

    assert "query report_go of" in refused("report_go")
    assert not any(map(refused, ("go", "page", "named")))
