"""Suites as data: what is in them, what is refused, and names that two configurations never share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from retrograd.attack.beforehand import check_data
from retrograd.settings.attack import (
    AttackConfig,
    Finetune,
    Untrained,
    attack_steps,
    check_attack,
    configurations,
    name_of,
    read_suite,
)
from retrograd.settings.prompted import Prompted
from retrograd.settings.suites import SUITES


def config(**changes: Any) -> AttackConfig:
    values: dict[str, Any] = {"model": ("m",), "suite": ("short",), "lab": Path("lab"), **changes}
    return AttackConfig(Path("out"), **values)


def test_the_suites_are_those_of_the_original_experiments() -> None:
    sizes = {name: len(read_suite(name)) for name in SUITES}
    assert {name: sizes[name] for name in ("short", "legacy", "six", "five", "paper", "few-step")} == {
        "short": 1, "legacy": 1, "six": 6, "five": 5, "paper": 2, "few-step": 6,
    }  # fmt: skip
    assert sizes["strong"] == 5 * 2 * 3 * 3 + 5 * 3  # rates, schedules, sizes, data; and the warm-up that broke TAR
    legacy = read_suite("legacy")[0]
    assert isinstance(legacy, Finetune)
    assert (legacy.examples, legacy.lr, legacy.epochs, legacy.dtype) == (512, 2e-5, 30, "bfloat16")
    assert {one.seed for one in read_suite("paper")} == {42, 43}
    assert all(isinstance(one, Untrained) for one in read_suite("untrained"))


def test_two_configurations_never_share_a_name() -> None:
    every = [one for name in SUITES for one in read_suite(name)]
    assert len({name_of(one) for one in every}) == len(set(every))
    one = Finetune()
    others: dict[str, Any] = {
        "steps": 101, "epochs": 1, "examples": 3, "before": "benign", "before_steps": 3, "rank": 1, "modules": ("a",),
        "optimizer": "sgd", "lr": 2.0000001e-5, "lr_schedule": "cosine", "warmup_ratio": 0.1, "warmup_steps": 3,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "batch_size": 15, "micro_batch_size": 4, "dtype": "bfloat16",
        "seed": 1, "data": "half", "eps_root": 1e-5,
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(Finetune)}
    names = {name_of(dataclasses.replace(one, **{name: value})) for name, value in others.items()}
    assert len({*names, name_of(one)}) == len(others) + 1


def test_searches_for_a_prompt_have_names_of_their_own_and_keep_their_rate() -> None:
    one = Prompted()
    others: dict[str, Any] = {"prompt": "suffix", "tokens": 9, "place": "after", "steps": 101, "batch_size": 15,
                              "candidates": 65, "best": 33, "lr": 0.2, "seed": 1}  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(Prompted)}
    names = {name_of(dataclasses.replace(one, **{name: value})) for name, value in others.items()}
    assert len({*names, name_of(one)}) == len(others) + 1
    found = configurations(config(suite=("prompts",), lr_scale=10.0, steps=7, seeds=2))
    assert [(two.prompt, two.steps, two.lr, two.seed) for two in found if isinstance(two, Prompted)] == [
        ("suffix", 7, 0.1, 0), ("suffix", 7, 0.1, 1), ("latent", 7, 0.1, 0), ("latent", 7, 0.1, 1)]  # fmt: skip
    with pytest.raises(ValueError, match="candidates is 0"):
        configurations(config(suite=("[{prompt: suffix, candidates: 0}]",)))
    with pytest.raises(ValueError, match="prompt is 'bold'"):
        configurations(config(suite=("[{prompt: bold}]",)))


def test_a_search_for_a_prompt_without_a_half_is_refused_before_anything_is_loaded() -> None:
    own = {"lab": None, "data": ("half=x.jsonl",), "tasks": Path("t.yaml"), "base": "b", "suite": ("prompts",)}
    with pytest.raises(ValueError, match=r"suffix-8-before-100-s0 searches a prompt on one half .* give --half"):
        check_attack(config(**own))
    check_attack(config(**own, half=("asked",)))
    check_attack(config(suite=("prompts",)))  # a lab has halves of its own


def test_rates_steps_and_seeds_are_scaled() -> None:
    found = configurations(config(suite=("six",), lr_scale=10.0, steps=300, seeds=2))
    assert len(found) == 12
    assert all(isinstance(one, Finetune) and one.steps == 300 for one in found)
    assert {one.seed for one in found} == {0, 1}
    rates = sorted({one.lr for one in found if isinstance(one, Finetune)})
    assert rates == pytest.approx([2e-4, 2e-3, 1e-2])
    warm = sorted(one.warmup_steps for one in found if isinstance(one, Finetune) and one.warmup_steps)
    assert warm == [3, 3, 10, 10]  # 30 and 100 of 3000
    once = configurations(config(suite=("short", "short")))
    assert len(once) == 1


def test_warm_up_is_by_share_or_by_steps() -> None:
    by_steps, by_share = Finetune(warmup_steps=30).train(), Finetune(warmup_ratio=0.1).train()
    assert (by_steps.warmup_steps, by_steps.warmup_ratio) == (30, None)
    assert (by_share.warmup_steps, by_share.warmup_ratio) == (None, 0.1)


def test_a_file_of_configurations_is_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- {data: [forget, half], lr: [1e-3, 3e-3], rank: 4}\n- {attack: prune, strengths: [0.1, 0.2]}\n")
    found = read_suite(str(path))
    assert len(found) == 5
    assert found[-1] == Untrained("prune", (0.1, 0.2))
    assert {(one.data, one.lr, one.rank) for one in found if isinstance(one, Finetune)} == {
        (data, lr, 4) for data in ("forget", "half") for lr in (1e-3, 3e-3)
    }


def test_attacks_are_asked_at_geometric_steps() -> None:
    assert attack_steps(200) == [0, 1, 2, 5, 10, 20, 50, 100, 200]
    assert attack_steps(7) == [0, 1, 2, 5, 7]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": ()}, "nothing to attack"),
        ({"suite": ()}, "no attack"),
        ({"suite": ("sixx",)}, "no suite 'sixx'"),
        ({"suite": ("",)}, "no suite ''"),
        ({"lab": None}, "either --lab DIR or --data"),
        ({"data": ("forget=a.jsonl",)}, "either --lab DIR or --data"),
        ({"lab": None, "data": ("forget=a.jsonl",)}, "needs --tasks"),
        ({"lab": None, "data": ("forget=a.jsonl",), "tasks": Path("t.yaml")}, "needs --base"),
        ({"lab": None, "data": ("a.jsonl",), "tasks": Path("t.yaml"), "base": "b"}, "KEY=DATASET"),
        ({"half": ("x",)}, "halves of its own"),
        ({"steps": 0}, "steps is 0"),
        ({"lr_scale": -1.0}, "lr_scale is -1"),
        ({"max_length": 3, "chunk_length": 3}, "exclude each other"),
        ({"subsets": 3}, "give --attribute too"),
        ({"subsets": 1, "attribute": True}, "2 sets or more"),
        ({"subsets": 3, "attribute": True, "fraction": 1.0}, "between 0 and 1"),
        ({"suite": ("prompts",), "attribute": True}, "of the 2 attacks of --suite none trains"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_attack(config(**changes))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: 1", "list of configurations"),
        ("- {lr: 1e-3, speed: 3}", "speed"),
        ("- {lr: -1}", "lr is -1"),
        ("- {warmup_steps: 100, steps: 100}", "warm-up steps leave none"),
        ("- {warmup_steps: 3, warmup_ratio: 0.1}", "give one of them"),
        ("- {steps: 5, epochs: 2}", "steps and epochs"),
        ("- {steps: 2.5}", "steps is 2.5; it has to be of type int"),
        ("- {rank: true}", "rank is True"),
        ("- {attack: prune, strengths: [many]}", "strengths is 'many'; it has to be of type float"),
        ("[", "cannot read"),
    ],
)
def test_a_suite_that_cannot_work_is_refused(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        configurations(config(suite=(str(path),)))


def test_strengths_are_numbers_however_yaml_reads_them() -> None:
    assert read_suite("[{attack: prune, strengths: [1e-1]}]") == [Untrained("prune", (0.1,))]


@pytest.mark.parametrize(
    ("suite", "match"),
    [
        ("[{data: hlaf}]", "reads data of the key 'hlaf'; there are forget, documents"),
        ("[{before: nothing}]", "key 'nothing'"),
        ("[{attack: melt}]", "no attack 'melt'"),
    ],
)
def test_what_an_attack_lacks_is_told_before_anything_is_loaded(suite: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_data(config(suite=(suite,)))


def test_an_attack_that_needs_the_model_before_needs_a_word() -> None:
    with pytest.raises(ValueError, match="interpolate needs the model before unlearning"):
        check_data(config(suite=("[{attack: interpolate}]",), lab=None, data=("forget=a.jsonl",)))
