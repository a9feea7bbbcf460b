"""Groups of models under the same attacks: cells, pairs, fronts and ranks, against plain loops over draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from attacking import COURSES, FORGET, HALF, lay_out

from retrograd.attack.compare import _after, compared, front
from retrograd.attack.faced import Faced, read_faced
from retrograd.attack.folder import read_folder
from retrograd.cli import main
from retrograd.settings.attack import Finetune, name_of


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("attacks") / "out", [HALF, FORGET])


def group_of(found: dict[str, Any], word: str) -> str:
    return next(group for group in found["groups"] if group == word or group.split("-")[-2:-1] == [word])


def test_models_are_compared_on_the_same_questions(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(read_faced([out], 0.05))
    deep, leaky, filtered = (group_of(found, word) for word in ("deep", "leaky", "filtered"))
    pair = next(
        p for p in found["pairs"] if p["attack"] == name_of(HALF) and {p["first"], p["second"]} == {deep, leaky}
    )
    sign = 1 if pair["second"] == leaky else -1
    assert sign * pair["difference"] > 0.1
    assert np.ptp(pair["interval"]) > 0
    assert filtered in found["fronts"]["after"]["front"]
    assert group_of(found, "shallow") not in found["fronts"]["after"]["front"]
    ranks = found["ranks"]
    assert set(ranks) == {group_of(found, word) for word in ("deep", "whole", "leaky")}
    assert found["unranked"] == [group_of(found, "broken")]  # it has lost its ability
    assert ranks[deep]["rank"] < ranks[leaky]["rank"]
    assert ranks[deep]["interval"][0] <= ranks[deep]["rank"] <= ranks[deep]["interval"][1]
    assert found["latent"][deep][0] == 0
    assert found["latent"][group_of(found, "shallow")][1] > 0.3
    assert main(["compare", str(out)]) == 0
    assert {"compare.json", "compare.md", "compare.parquet"} <= {path.name for path in out.iterdir()}
    text = (out / "compare.md").read_text()
    assert "general ability is lost" in text
    assert "Without a rank" in text
    assert main(["compare", str(out.parent)]) == 2
    assert "no folder of" in capsys.readouterr().err


SEEDS = [Finetune(data="half", steps=2, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> list[Faced]:
    """Two groups of two models, of which one leaks, under an attack of three seeds; `deep` differs from model to model."""
    courses = {**{name: COURSES[name] for name in ("base", "filtered", "shallow")},
               "first": [(10, 10), (20, 10), (40, 9)], "second": [(10, 10), (20, 20), (40, 20)],
               "third": [(10, 10), (30, 30), (40, 34)], "fourth": [(10, 10), (30, 30), (40, 38)]}  # fmt: skip
    out = lay_out(tmp_path_factory.mktemp("seeded") / "out", list(SEEDS), courses)
    about = json.loads((out / "attack.json").read_text())
    for name, one in about["models"].items():
        if one["role"] == "model":
            one["groups"] = ["deep × uniform" if name.split("-")[-2] in ("first", "second") else "leaky × uniform"]
    (out / "attack.json").write_text(json.dumps(about))
    return read_faced([out], 0.05)


def test_a_cell_means_over_models_seeds_and_entities_and_its_interval_draws_all_three(seeded: list[Faced]) -> None:
    found = compared(seeded)
    (cell,) = (one for one in found["cells"] if one["group"] == "deep × uniform")
    assert (cell["models"], cell["seeds"], cell["lost"]) == (2, [0, 1, 2], 0)
    own = [one for one in seeded if one.groups == ("deep × uniform",)]
    ends = {(one.model, one.seed): _after(one) for one in own}
    right = np.array([[ends[model, seed].right for seed in range(3)] for model in dict.fromkeys(m for m, _ in ends)])
    assert cell["after"][0] == pytest.approx(right.mean())
    clusters = own[0].course.clusters[ends[own[0].model, 0].reported]
    names, draw, means = np.unique(clusters), np.random.default_rng(3), []
    for _ in range(4000):
        models, seeds, drawn = draw.integers(0, 2, 2), draw.integers(0, 3, 3), draw.choice(names, len(names))
        of = np.concatenate([np.flatnonzero(clusters == name) for name in drawn])
        means.append(right[models][:, seeds][:, :, of].mean())
    assert cell["after"][1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_intervals_do_not_shrink_with_seeds_that_say_the_same(seeded: list[Faced]) -> None:
    """Three seeds of an attack with the same answers: no wider and no narrower than one, for the questions are the same."""
    (three,) = (one for one in compared(seeded)["cells"] if one["group"] == "leaky × uniform")
    (single,) = (
        one for one in compared([f for f in seeded if f.seed == 0])["cells"] if one["group"] == "leaky × uniform"
    )
    assert three["after"] == pytest.approx(single["after"], abs=0.02)


def test_pairs_ranks_and_latent_recovery_are_of_groups(seeded: list[Faced]) -> None:
    found = compared(seeded)
    pair = next(p for p in found["pairs"] if {p["first"], p["second"]} == {"deep × uniform", "leaky × uniform"})
    assert pair["difference"] > 0.1
    assert pair["interval"][0] > 0
    assert found["ranks"]["deep × uniform"]["rank"] == 1
    assert found["ranks"]["leaky × uniform"]["rank"] == 2
    assert found["ranks"]["deep × uniform"]["seeds"] == 3
    rise = ((9 - 10) + (20 - 10)) / 2 / 40 - (9 - 10) / 40
    assert found["latent"]["deep × uniform"][0] == pytest.approx(rise)
    assert found["latent"]["deep × uniform"][2] > 0.2  # one of its two models leaks: it may be drawn twice


def test_runs_that_differ_by_seed_alone_are_a_group(out: Path, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "out", [HALF])
    about = json.loads((folder / "attack.json").read_text())
    for seed, name in enumerate(["deep", "leaky", "whole"]):
        run = tmp_path / f"run{seed}"
        shutil.copytree(tmp_path / name, run / "model")
        (run / "manifest.json").write_text(json.dumps({"command": "unlearn", "method": "npo"}))
        settings = {"run": str(run), "train": {"seed": seed, "lr": 1e-3 if seed < 2 else 1e-4}}
        (run / "run_config.yaml").write_text(yaml.safe_dump(settings))
        key = next(key for key in about["models"] if key.split("-")[-2] == name)
        about["models"][key]["source"] = str(run / "model")
    (folder / "attack.json").write_text(json.dumps(about))
    found = compared(read_faced([folder], 0.05))
    named = {group: one for group, one in found["groups"].items() if group.startswith("npo-")}
    assert sorted(len(one["models"]) for one in named.values()) == [1, 2]
    assert len({one["label"] for one in named.values()}) == 2


def test_a_seed_of_an_attack_that_does_not_bring_the_shallow_model_back_is_left_out(seeded: list[Faced]) -> None:
    one_bad = [one._replace(valid=one.seed != 1) for one in seeded]
    found = compared(one_bad)
    assert next(one for one in found["cells"] if one["group"] == "deep × uniform")["seeds"] == [0, 2]
    (attack,) = found["attacks"].values()
    assert (attack["valid"], attack["invalid_seeds"]) == (True, [1])


def test_a_comparison_without_a_valid_attack_says_what_it_leaves_out(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invalid = [one._replace(valid=False) for one in read_faced([out], 0.05)]
    monkeypatch.setattr("retrograd.commands.compare.read_faced", lambda *_: invalid)
    assert main(["compare", str(out)]) == 0
    text = (out / "compare.md").read_text()
    assert "## Ranks" not in text
    assert "No pairs, fronts, ranks: they take attacks that" in text
    assert "(invalid)" in text


def test_the_front_holds_what_nothing_beats() -> None:
    assert front({"a": (0.3, 0.9), "b": (0.3, 0.8), "c": (0.2, 0.5)}) == ["a", "c"]
    assert front({"a": (0.3, 0.9), "b": (0.3, 0.9)}) == ["a", "b"]


def test_folders_of_other_questions_are_not_compared(out: Path, tmp_path: Path) -> None:
    other = lay_out(tmp_path / "out", [HALF])
    about = json.loads((other / "attack.json").read_text())
    about["questions"]["content"] = "other"
    (other / "attack.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="different questions"):
        read_faced([out, other], 0.05)


def test_an_attack_of_other_rows_is_another_one_and_a_meeting_counts_once(out: Path, tmp_path: Path) -> None:
    other = shutil.copytree(out, tmp_path / "other")
    assert len(read_faced([out, other], 0.05)) == len(read_faced([out], 0.05))
    folder = read_folder(other)
    for target in folder.targets:
        path = folder.place(target, name_of(HALF)) / "attack/manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "hashes": {"rows": "other"}}))
    with pytest.raises(ValueError, match="trained on other rows"):
        read_faced([out, other], 0.05)


def test_controls_alone_are_nothing_to_compare(tmp_path: Path) -> None:
    controls = {name: COURSES[name] for name in ("base", "filtered", "shallow")}
    out = lay_out(tmp_path / "out", [FORGET], controls)
    with pytest.raises(ValueError, match=r"beside the controls \(base, filtered, shallow\)"):
        read_faced([out], 0.05)
