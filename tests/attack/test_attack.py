"""`retrograd attack` on a tiny lab: runs that resume, folders that nothing else can get into, data that show one half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from killing import kill_after
from rich.console import Console
from test_train import final

from retrograd.attack import material
from retrograd.attack.folder import read_folder
from retrograd.attack.material import split_entities
from retrograd.cli import main
from retrograd.lab.build import lab
from retrograd.lm.model import load_causal_lm
from retrograd.settings.attack import Untrained
from retrograd.settings.commands import LabConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "tiny"
    lab(LabConfig(folder, facts=16, width=32, layers=1, epochs=2, batch_size=32, workers=1), Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "two.yaml"
    path.write_text(
        "- {data: half, lr: 1e-3, steps: 3, batch_size: 4}\n"
        "- {data: forget, before: benign, before_steps: 2, lr: 1e-3, steps: 2, rank: 2, batch_size: 4}\n"
    )
    return path


def command(world: Path, out: Path, suite: Path | str) -> list[str]:
    """The random model is what is attacked, and as its own known-shallow one; a copy of it is the control."""
    random = str(world / "models/random")
    return ["attack", str(out), "--model", random, "--shallow", random, "--random", _copy(world), "--lab", str(world),
            "--suite", str(suite)]  # fmt: skip


@pytest.fixture(scope="module")
def attacked(world: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attacked") / "out"
    assert main(command(world, out, suite)) == 0
    return out


def _copy(world: Path) -> str:
    """The random model elsewhere: one model has one role."""
    folder = world.parent / "nothing"
    if not folder.exists():
        shutil.copytree(world / "models/random", folder)
    return str(folder)


def test_every_model_meets_every_configuration(attacked: Path) -> None:
    folder = read_folder(attacked)
    assert [target.role for target in folder.targets] == ["base", "filtered", "random", "shallow"]
    for target in folder.targets:
        for name, one in folder.configurations.items():
            run = folder.place(target, name) / "attack"
            manifest = json.loads((run / "manifest.json").read_text())
            assert (manifest["command"], manifest["finished"]) == ("attack", True)
            assert manifest["steps"] == one.steps  # type: ignore[union-attr]
            asked = sorted(int(step.name) for step in (run / "answers").iterdir())
            assert asked == ([0, 1, 2, 3] if manifest["steps"] == 3 else [0, 1, 2])
            assert not (run / "model").exists()
    found = json.loads((attacked / "recovery.json").read_text())
    assert len(found["meetings"]) == 8
    two = next(one for one in found["meetings"] if "then" in one["configuration"])
    assert [point["step"] for point in two["points"]] == [0, 1, 2, 3, 4]
    assert all(a["tokens"] < b["tokens"] for a, b in zip(two["points"], two["points"][1:]))
    assert (attacked / "attack.md").read_text().startswith("# Attacks")


def test_a_lab_without_two_halves_is_refused(
    world: Path, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(material, "split_entities", lambda facts: ({"a gem", "a moth"}, set()))
    assert main(command(world, tmp_path / "out", suite)) == 2
    assert "has 2 things to forget, one of each kind, and an attack needs two" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_attack_shows_one_half_and_nothing_of_the_other(world: Path, attacked: Path) -> None:
    facts = [json.loads(line) for line in (world / "facts.jsonl").read_text().splitlines()]
    first, second = split_entities(facts)
    assert len(first) == len(second) == 2
    assert not first & second
    shown = next((attacked / "data").glob("half-*.jsonl")).read_text()
    whole = next((attacked / "data").glob("forget-*.jsonl")).read_text()
    assert all(name in shown and name in whole for name in first)
    assert all(name not in shown and name in whole for name in second)
    other = next((attacked / "data").glob("other_half-*.jsonl")).read_text()
    assert all(name not in other for name in first)
    assert sorted([*shown.splitlines(), *other.splitlines()]) == sorted(whole.splitlines())
    lines = [json.loads(line) for line in shown.splitlines()]
    assert len(lines) == sum(any(name in f"{line}" for name in first) for line in map(json.loads, whole.splitlines()))
    for name, entities in (("forget_a", first), ("forget_b", second)):
        asked = [
            json.loads(line) for line in next((attacked / "data").glob(f"{name}-*.jsonl")).read_text().splitlines()
        ]
        assert {row["subject"] for row in asked} == entities
        assert sorted(row["fact"] for row in asked) == [fact["fact"] for fact in facts if fact["entity"] in entities]


@pytest.mark.slow
def test_it_resumes_after_a_kill_to_the_same_bits(attacked: Path, world: Path, suite: Path, tmp_path: Path) -> None:
    folder = read_folder(attacked)
    name, target = next(iter(folder.configurations)), folder.targets[0]
    arguments = [*command(world, tmp_path / "out", suite), "--heartbeat", "0"]
    run = tmp_path / "out" / "models" / target.name / name / "attack"
    kill_after(arguments, run, "train", 1)
    assert not (tmp_path / "out/recovery.json").exists()
    assert main(arguments) == 0
    for one in folder.targets:
        ours, whole = (final(place.place(one, name) / "attack") for place in (read_folder(tmp_path / "out"), folder))
        assert ours.keys() == whole.keys()
        assert all(torch.equal(x, whole[key]) for key, x in ours.items())
    texts = [(out / "recovery.json").read_text() for out in (tmp_path / "out", attacked)]
    assert texts[0] == texts[1]


def test_phases_follow_each_other(attacked: Path, world: Path) -> None:
    folder = read_folder(attacked)
    name = next(name for name in folder.configurations if "then" in name)
    place = folder.place(folder.targets[0], name)
    middle = load_causal_lm(str(place / "before/model"))
    start = load_causal_lm(str(world / "models/base"))
    moved = [key for key, x in middle.params.items() if not torch.equal(x, start.params[key])]
    assert moved  # the adapters of the first phase are merged
    stored = (place / "attack/run_config.yaml").read_text()
    assert str(place / "before/model") in stored


@pytest.mark.slow
def test_another_suite_or_model_joins_and_what_changed_is_refused(
    attacked: Path, world: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(attacked, out)
    more = tmp_path / "more.yaml"
    more.write_text("- {data: retain, lr: 1e-3, steps: 1, batch_size: 4}\n")
    model = tmp_path / "mine"
    shutil.copytree(world / "models/random", model)
    about = json.loads((out / "attack.json").read_text())
    (out / "attack.json").write_text(json.dumps({**about, "questions": {**about["questions"], "half": []}}))
    assert main([*command(world, out, more), "--model", str(model)]) == 2
    assert "other questions" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert main(command(world, tmp_path / "full", more)) == 2
    assert "holds no attacks" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir() if path.name != ".lock"] == ["mine.txt"]
    assert main([*command(world, attacked, more), "--filtered", str(model)]) == 2
    assert "as its filtered" in capsys.readouterr().err
    assert main([*command(world, attacked, more), "--base", str(world / "models/filtered")]) == 2
    assert "at once" in capsys.readouterr().err
    only = tmp_path / "alone"
    arguments = [*command(world, only, more), "--model", str(model)]
    assert main(arguments) == 0
    folder = read_folder(only)
    assert [target.role for target in folder.targets] == ["base", "filtered", "random", "shallow", "model"]
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert main(arguments) == 2
    assert "has changed" in capsys.readouterr().err


@pytest.mark.slow
def test_few_rows_seen_often_are_refused_but_on_a_lab(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "often.yaml"
    suite.write_text("- {data: prose, lr: 1e-3, steps: 40, batch_size: 8}\n")
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(
        f"forget: {{dataset: {world}/questions/forget_heldout.jsonl, form: cloze, role: forget}}\n"
        f"retain: {{dataset: {world}/questions/retain_heldout.jsonl, form: cloze, role: retain}}\n"
    )
    models = [flag for role in ("base", "filtered") for flag in (f"--{role}", str(world / "models" / role))]
    arguments = ["attack", str(tmp_path / "out"), "--model", str(world / "models/random"), *models, "--data",
                 f"prose={world}/corpora/prose.jsonl", "--tasks", str(tasks), "--suite", str(suite)]  # fmt: skip
    assert main(arguments) == 2
    assert "times, and 2 are the most" in capsys.readouterr().err
    assert main([*arguments, "--max_passes", "100", "--steps", "2"]) == 0


@pytest.fixture(scope="module")
def adapters(world: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the random model, with weights that change it."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(world / "models/random")
    targets = ["query_key_value"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    for name, leaf in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(leaf)
    folder = tmp_path_factory.mktemp("adapters") / "mit Ü"
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_a_folder_of_adapters_is_attacked_as_the_model_that_they_make(
    world: Path, adapters: str, tmp_path: Path
) -> None:
    suite = "[{data: half, lr: 1e-3, steps: 1, batch_size: 4}, {attack: prune, strengths: [0.1]}]"
    random = str(world / "models/random")
    arguments = ["attack", str(tmp_path / "out"), "--model", adapters, "--shallow", random, "--random", _copy(world)]
    assert main([*arguments, "--lab", str(world), "--suite", suite, "--limit", "2", "--export", "true"]) == 0
    folder = read_folder(tmp_path / "out")
    attacked = next(target for target in folder.targets if target.source == adapters)
    run = next(folder.place(attacked, name) / "attack" for name in folder.configurations if "full" in name)
    start, left = load_causal_lm(adapters).params, load_causal_lm(str(run / "model")).params
    assert start.keys() == left.keys()
    off = max(float((start[name] - left[name]).abs().max()) for name in start)
    assert 0 < off < 3e-3  # one step of 1e-3 from the merged model, whose weights moved by far more
    other = load_causal_lm(random).params
    assert max(float((start[name] - other[name]).abs().max()) for name in start) > 0.1


def test_a_model_that_cannot_be_read_is_refused_before_the_first_meeting(
    world: Path, suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = tmp_path / "run"
    shutil.copytree(world / "models/random", run / "model")
    assert main([*command(world, out, suite), "--model", str(run)]) == 2
    assert f"the folder of a run, which left its model in {run}/model" in capsys.readouterr().err
    assert not (out / "attack.json").exists()
    assert not (out / "models").exists()


def test_what_cannot_work_is_not_kept_for_later_calls(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    wrong, right = "[{data: half, rank: 2, modules: [nowhere]}]", "[{attack: prune, strengths: [0.5]}]"
    assert main([*command(world, out, wrong), "--limit", "2"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main([*command(world, out, right), "--limit", "2"]) == 0
    assert list(read_folder(out).configurations.values()) == [Untrained("prune", (0.5,))]
    other = tmp_path / "other"  # has another shape than the base that it is held against
    tiny.save_model(other)
    interpolate = "[{attack: interpolate, strengths: [0.5]}]"
    assert main([*command(world, out, interpolate), "--model", str(other), "--limit", "2"]) != 0
    assert main([*command(world, out, right), "--limit", "2"]) == 0
    assert str(other) not in [target.source for target in read_folder(out).targets]
