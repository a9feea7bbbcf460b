"""The files in recipes/ are read and planned, those of real names on a tiny world by changing names."""

from __future__ import annotations

from pathlib import Path

import arms
import pytest
from rich.console import Console

from retrograd.cli import main
from retrograd.evaluate.metrics import check_column
from retrograd.experiment.lease import Queue
from retrograd.experiment.plan import planned
from retrograd.experiment.seen import refuse_oracles
from retrograd.experiment.tasks import Maker
from retrograd.lab.build import lab
from retrograd.settings.attack import configurations
from retrograd.settings.commands import LabConfig
from retrograd.settings.experiment import read_experiment
from retrograd.unlearn.methods import METHODS

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = arms.save_world(tmp_path_factory.mktemp("world"))
    (folder / "tasks.yaml").write_text(
        "forget: {dataset: q_report_go.jsonl, form: cloze, role: forget}\n"
        "retain: {dataset: q_report_stay.jsonl, form: cloze, role: retain}\n"
    )
    return folder


def names(world: Path, split: bool, recipe: str = "phase2") -> list[str]:
    """The real names of the original recipes changed to those of the tiny world."""
    found = {
        "base": "base", "never": "never", "forget": "forget.jsonl", "retain": "retain.jsonl", "wmdp": "q_go.jsonl",
        "mmlu": "q_stay.jsonl", "report_tasks": "tasks.yaml", "tune_rows": "tune.jsonl", "high_g": "retain.jsonl", "report_rows": "report.jsonl",
    }  # fmt: skip
    plain = {"max_length": "", "k": "3", "batch_size": "4", "lr": "1e-3", "wmdp_split": "train", "wmdp_form": "cloze",
             "mmlu_split": "train", "mmlu_form": "cloze", "mmlu_subset": "", "high": "1", "budget": "100", "steps": "1", "train_lr": "1e-3", "budget_first": "100",
             **{f"wmdp_{n}": "" for n in range(1, 7)}}  # fmt: skip
    if "approaches" not in recipe:
        plain = {name: value for name, value in plain.items() if name not in ("train_lr", "budget_first")}
        del found["high_g"]
    if not split:
        found = {name: value for name, value in found.items() if name not in ("never", "tune_rows", "report_rows")}
    return [f"{name}={world / value}" for name, value in found.items()] + [f"{n}={v}" for n, v in plain.items()]


@pytest.mark.parametrize("recipe,match,kinds", [
    ("phase1", False, {"scores", "analyse"}), ("phase2", True, {"scores", "select", "train", "measure"}),
    ("approaches", True, {"scores", "select", "train", "measure"}),
])  # fmt: skip
def test_the_original_phases_are_planned_under_other_names(
    recipe: str, match: bool, kinds: set[str], world: Path, tmp_path: Path
) -> None:
    spec = read_experiment(RECIPES / f"original/{recipe}.yaml", tuple(names(world, match, recipe)))
    refuse_oracles(spec)
    plan = planned(Maker(spec), Queue(tmp_path, 60))
    assert {task.kind for task in plan.tasks.values()} == kinds
    scores = next(task for task in plan.tasks.values() if task.kind == "scores")
    assert list(scores.what["settings"]["queries"]) == [*(f"wmdp_{n}" for n in range(1, 7)), "mmlu"]
    assert scores.what["settings"]["data"]["max_length"] is None


@pytest.mark.parametrize("recipe", ["phase1", "phase2", "approaches"])
def test_the_original_phases_name_real_models_and_split_their_questions(recipe: str) -> None:
    spec = read_experiment(RECIPES / f"original/{recipe}.yaml")
    assert spec.base == "EleutherAI/deep-ignorance-unfiltered"
    asked = {(query.dataset, query.subset, query.split) for query in spec.scores["asked"].queries.values()}
    reported = {(task.dataset, task.subset, task.split) for task in spec.report.tasks.values()}
    assert {(dataset, subset) for dataset, subset, _ in asked} == {(dataset, subset) for dataset, subset, _ in reported}
    assert not asked & reported


def test_the_lab_s_recipes_are_read() -> None:
    methods = read_experiment(RECIPES / "lab/unlearn_methods.yaml")
    assert methods.attacked() is None
    then = "attack={lab: runs/lab, suite: [recipes/attack/lab_strong.yaml]}"  # as the recipe says
    assert then in (RECIPES / "lab/unlearn_methods.yaml").read_text()
    attacks = read_experiment(RECIPES / "lab/unlearn_methods.yaml", (then,)).attacked()
    assert attacks is not None
    assert (attacks.lab, attacks.suite) == (Path("runs/lab"), ("recipes/attack/lab_strong.yaml",))
    with pytest.raises(ValueError, match="braces cannot be read as YAML"):
        read_experiment(RECIPES / "lab/unlearn_methods.yaml", ("attack={lab: runs/lab",))
    with pytest.raises(ValueError, match="attack is 'strong'; it has to be settings by name"):
        read_experiment(RECIPES / "lab/unlearn_methods.yaml", ("attack=strong",))
    pretraining = read_experiment(RECIPES / "lab/pretraining.yaml")
    assert pretraining.scores["pretraining"].start == "runs/lab/models/random"
    weightings = read_experiment(RECIPES / "lab/weightings.yaml", ("lab=elsewhere",))
    assert {one.method for one in methods.methods.values()} == set(METHODS) - {"weighted_sft"}
    for column in methods.columns:
        check_column(column, methods.report.tasks)
    assert methods.methods["dpo"].corpora is not None
    assert weightings.base == "elsewhere/models/base"
    assert len(weightings.seeds) >= 5
    assert set(weightings.methods) == {"grad_diff", "npo", "orth_circuit_breakers", "max_entropy"}


def test_the_recipe_of_all_methods_under_attack_has_them_all() -> None:
    spec = read_experiment(RECIPES / "lab/attacked_methods.yaml", ("lab=elsewhere", "attack_seeds=2"))
    assert set(spec.methods) == set(METHODS) - {"weighted_sft"}  # which removes nothing
    attacks = spec.attacked()
    assert attacks is not None
    assert (attacks.lab, attacks.filtered) == (Path("elsewhere"), "elsewhere/models/filtered")
    assert len(configurations(attacks)) == 24
    for name, one in spec.methods.items():
        Maker(spec).config(name, 0, None)
        assert one.method == name


def test_the_recipe_of_beliefs_changes_one_thing_at_a_time() -> None:
    spec = read_experiment(RECIPES / "lab/beliefs.yaml", ("seeds=2", "steps=1"))
    configs = {name: Maker(spec).config(name, 0, None) for name in spec.methods}
    assert spec.seeds == (0, 1)
    assert [configs[f"rank_{rank}"].lora.rank for rank in (2, 4, 8, 16)] == [2, 4, 8, 16]
    assert {name: one.lora.rank for name, one in configs.items() if not name.startswith("rank")} == dict.fromkeys(
        ("full", "cb_all", "cb_one", "orth_on", "orth_off", "output", "hidden"), 0
    )
    for one, other, setting in (("cb_all", "cb_one", "depths"), ("orth_on", "orth_off", "orth")):
        a, b = (vars(configs[name].objective) for name in (one, other))
        assert [name for name in a if a[name] != b[name]] == [setting]


def test_the_recipe_of_hardened_weights_has_its_matched_control() -> None:
    spec = read_experiment(RECIPES / "lab/hardened.yaml", ("hard=elsewhere",))
    assert spec.weightings["hardened"].files == ("elsewhere/best/0", "elsewhere/best/1")
    assert spec.weightings["matched"].files == ("elsewhere/matched/0", "elsewhere/matched/1")
    assert (len(spec.seeds), spec.match) == (5, ("utility",))


@pytest.fixture(scope="module")
def tiny_lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "tiny"
    lab(LabConfig(folder, facts=16, width=32, layers=2, epochs=2, batch_size=32, workers=1), Console(quiet=True))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe,more", [
    ("attacked_methods", ["suite=[{data: half, lr: 1e-3, steps: 1}]", "epochs=1"]),
    ("beliefs", ["suite=[{data: half, lr: 1e-3, steps: 1}]", "epochs=1", "seeds=1", "steps=1", "budget=100"]),
])  # fmt: skip
def test_recipes_under_attack_run_on_a_tiny_lab(recipe: str, more: list[str], tiny_lab: Path, tmp_path: Path) -> None:
    flags = [word for name in (f"lab={tiny_lab}", *more) for word in ("--names", name)]
    assert main(["experiment", str(RECIPES / f"lab/{recipe}.yaml"), str(tmp_path / "out"), *flags]) == 0
    text = (tmp_path / "out/results.md").read_text()
    assert "### Latent recovery" in text
    assert "## Missing" not in text


@pytest.mark.slow
def test_every_method_runs_on_a_tiny_lab(tiny_lab: Path, tmp_path: Path) -> None:
    text = (RECIPES / "lab/unlearn_methods.yaml").read_text()
    for old, new in {"seeds: 3": "seeds: 1", "match: utility": "match: none"}.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "methods.yaml").write_text(text)
    assert (
        main(["experiment", str(tmp_path / "methods.yaml"), str(tmp_path / "out"), "--names", f"lab={tiny_lab}"]) == 0
    )
    told = (tmp_path / "out/results.md").read_text()
    assert told.count(" | 1/1 | ") == len(read_experiment(RECIPES / "lab/unlearn_methods.yaml").methods)
    assert "## Missing" not in told


SIX = {"guided_breakers", "selected_corpus", "two_phases", "representation", "ascent_orth", "curriculum"}


@pytest.mark.parametrize("recipe", ["lab", "original"])
def test_each_approach_stands_against_its_unweighted_form_and_matched_random_tokens(recipe: str) -> None:
    spec = read_experiment(RECIPES / recipe / "approaches.yaml")
    assert set(spec.methods) == SIX | {"ascent_orth_high_g", "curriculum_reversed", "curriculum_shuffled"}
    assert len(spec.seeds) >= 5
    for name in SIX:
        arms_of = spec.methods[name].weightings
        assert "uniform" in arms_of
        by_scores = [one for one in arms_of if spec.weightings[one].scores]
        assert len(by_scores) == 1
        assert {spec.weightings[one].of for one in arms_of if spec.weightings[one].control} == set(by_scores)
    orders = {name: spec.methods[name].settings.get("order") for name in spec.methods if "curriculum" in name}
    assert orders == {"curriculum": "heaviest", "curriculum_reversed": "lightest", "curriculum_shuffled": None}


@pytest.mark.slow
def test_the_approaches_run_small(world: Path, tmp_path: Path) -> None:
    text = (RECIPES / "original/approaches.yaml").read_text().replace("seeds: 5", "seeds: 1")
    (tmp_path / "approaches.yaml").write_text(text)
    flags = [word for name in names(world, True, "approaches") for word in ("--names", name)]
    assert main(["experiment", str(tmp_path / "approaches.yaml"), str(tmp_path / "out"), *flags]) == 0
    lines = (tmp_path / "out/results.md").read_text().splitlines()
    assert "## Missing" not in lines
    for name in SIX:
        assert sum(line.startswith(f"| {name} |") for line in lines) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["phase1", "phase2"])
def test_the_original_phases_run_under_other_names(recipe: str, world: Path, tmp_path: Path) -> None:
    flags = [word for name in names(world, recipe == "phase2") for word in ("--names", name)]
    assert main(["experiment", str(RECIPES / f"original/{recipe}.yaml"), str(tmp_path / "out"), *flags]) == 0
    text = (tmp_path / "out/results.md").read_text()
    assert "* spearman" in text if recipe == "phase1" else "| npo | documents_alpha_half |" in text
    assert "## Missing" not in text
