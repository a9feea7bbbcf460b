"""Recipes as the field publishes them: settings → torch's optimizers and transformers' schedules, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, Trainer, get_polynomial_decay_schedule_with_warmup

from retrograd.cli import main
from retrograd.core.optim import AdamW, Schedule
from retrograd.lm.model import load_causal_lm, norms_and_biases, trainable
from retrograd.runs.files import read_tensors
from retrograd.runs.identity import canonical
from retrograd.runs.recipe import optimizer
from retrograd.settings.attack import PhaseConfig
from retrograd.settings.train import LoraConfig, RecipeConfig, TrainConfig, check_training, difference, to_dict

PUBLISHED = {
    "--train.optimizer": "adam", "--train.lr": "1e-2", "--train.lr_schedule": "polynomial", "--train.lr_power": "1.5",
    "--train.lr_end": "1e-3", "--train.warmup_steps": "2", "--train.weight_decay": "0.1", "--train.eps_root": "0",
    "--train.epochs": "2", "--train.batch_size": "4", "--dtype": "float64", "--data.shuffle": "False",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(10))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    return folder


def command(world: Path, verb: str, run: Path, *more: str) -> list[str]:
    recipe = [word for pair in PUBLISHED.items() for word in pair]
    query = ["--query.dataset", str(world / "query.jsonl")] if verb == "magic" else []
    data = ["--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl")]
    return [verb, str(run), *data, *query, *recipe, *more]


def test_a_published_recipe_ends_where_torch_does(world: Path, tmp_path: Path) -> None:
    """Adam with coupled decay that spares norms, polynomial from a warmup in steps to an end: a plain loop of torch."""
    assert main(command(world, "train", tmp_path / "run", "--train.spare_norms")) == 0
    assert main(command(world, "train", tmp_path / "all")) == 0
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float64)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = [{"params": [p for n, p in model.named_parameters() if (n in decayed) == there], "weight_decay": decay}
              for there, decay in ((True, 0.1), (False, 0.0))]  # fmt: skip
    reference = torch.optim.Adam(groups, 1e-2)
    schedule = get_polynomial_decay_schedule_with_warmup(reference, 2, 6, lr_end=1e-3, power=1.5)
    ids = load_tokens(world)
    for step in range(6):
        batch = ids[step % 3 * 4 : step % 3 * 4 + 4]
        losses = [
            torch.nn.functional.cross_entropy(model(x[None]).logits[0, :-1], x[1:], reduction="sum") for x in batch
        ]
        reference.zero_grad()
        (sum(losses) / sum(len(x) - 1 for x in batch)).backward()
        reference.step()
        schedule.step()
    expected = dict(model.named_parameters())
    ours, other = (read_tensors(tmp_path / run / "checkpoints/final.safetensors")[0] for run in ("run", "all"))
    for name, parameter in expected.items():
        torch.testing.assert_close(ours[f"params.{name}"], parameter.detach(), rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(ours[name], other[name]) for name in ours)


def load_tokens(world: Path) -> list[torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    return [tokenizer(text, return_tensors="pt").input_ids[0] for text in tiny.sentences(10)]


def test_its_scores_are_the_same_with_both_engines_and_from_kept_gradients(world: Path, tmp_path: Path) -> None:
    found = {}
    for name, more in {
        "double": ("--engine", "double", "--replay.plan", "all"),
        "blocks": ("--engine", "blocks", "--replay.plan", "all"),
        "gradients": ("--engine", "double", "--replay.plan", "gradients"),
    }.items():
        assert main(command(world, "magic", tmp_path / name, "--train.eps_root", "1e-6", "--train.spare_norms",
                            "--train.lr_start", "1e-3", *more)) == 0  # fmt: skip
        found[name] = torch.load(tmp_path / name / "scores.pt", weights_only=True)
    assert found["double"].abs().max() > 0
    assert torch.equal(found["gradients"], found["double"])
    torch.testing.assert_close(found["blocks"], found["double"], rtol=1e-8, atol=1e-12)
    assert main(["verify", str(tmp_path / "gradients")]) == 0


@pytest.mark.parametrize("family,lora", [*((one, False) for one in tiny.configurations()), ("qwen2-tied", True)])
def test_what_is_spared_is_what_transformers_spares(family: str, lora: bool, tmp_path: Path) -> None:
    from peft import LoraConfig as Adapters

    tiny.save_model(tmp_path, family)
    adapters = Adapters(r=2, task_type="CAUSAL_LM", bias="all") if lora else None
    module = load_causal_lm(str(tmp_path), dtype="float32", device=torch.device("cpu"), lora=adapters).module
    decayed = set(Trainer.get_decay_parameter_names(None, module))
    spared = norms_and_biases(module)
    assert set(spared) == set(trainable(module)[0]) - decayed
    assert spared


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two warmups": ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio is 0.1 and --train.warmup_steps 3; give one"),
    "negative warmup": ({"warmup_steps": -1}, "--train.warmup_steps is -1"),
    "end above the peak": ({"lr": 1e-3, "lr_schedule": "linear", "lr_end": 2e-3}, "lr_end is 0.002; it has to be from 0"),
    "start above the peak": ({"lr": 1e-3, "warmup_steps": 2, "lr_start": 2e-3}, "lr_start is 0.002"),
    "no number": ({"lr_schedule": "linear", "lr_end": float("nan")}, "lr_end is nan"),
    "no warmup": ({"lr_start": 0.0, "lr_schedule": "cosine"}, "where the warmup begins, and there is none"),
    "one-cycle without warmup": (
        {"lr_start": 0.0, "lr_schedule": "one-cycle", "warmup_steps": 0}, "where the warmup begins",
    ),
    "constant end": ({"lr_end": 0.0, "warmup_steps": 2}, "a constant learning rate ends where it is"),
    "power of a line": ({"lr_power": 1.0, "lr_schedule": "linear"}, "the exponent of polynomial"),
    "power 0": ({"lr_power": 0.0, "lr_schedule": "polynomial"}, "the exponent of polynomial, above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_words(case: str) -> None:
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_training(TrainConfig(**given), LoraConfig())


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    train = TrainConfig(warmup_steps=5, lr_schedule="one-cycle-linear", lr_start=1e-5)
    check_training(train, LoraConfig())
    with pytest.raises(ValueError, match="5 warmup steps of 5 in all"):
        optimizer(train, 5)
    lr = optimizer(train, 6).lr
    assert (lr(0), lr(4)) == (1e-5, 1e-4)


def test_settings_that_came_later_leave_earlier_runs_what_they_were() -> None:
    recipe = AdamW(Schedule("linear", 0.1, 9), weight_decay=0.1)
    named = {"kind": "linear", "lr": 0.1, "total_steps": 9, "warmup_steps": 0, "power": 2.0}
    assert "spared" not in canonical(replace(recipe, lr=1.0))
    assert canonical(recipe) != canonical(replace(recipe, spared=("bias",)))
    assert canonical(Schedule(**named)) != canonical(Schedule(**named, end=0.01))
    old = to_dict(RecipeConfig(model="m"))
    for name in ("spare_norms", "lr_start", "lr_end", "lr_power", "warmup_steps"):
        del old["train"][name]
    assert difference(old, to_dict(RecipeConfig(model="m"))) == []
    changed = to_dict(RecipeConfig(model="m", train=TrainConfig(spare_norms=True)))
    assert difference(old, changed) == ["train.spare_norms: False → True"]


def test_a_setting_that_a_begun_run_did_not_know_and_that_is_off_is_no_difference() -> None:
    new = to_dict(RecipeConfig(model="m"))
    for name, off, on in (("columns", [], ["text=body"]), ("assistant_only_loss", False, True)):
        old = {**new, "data": {key: value for key, value in new["data"].items() if key != name}}
        assert difference(old, new) == []
        assert difference(old, {**new, "data": {**new["data"], name: on}}) == [f"data.{name}: {off} → {on}"]


def test_how_processes_share_a_phase_of_an_attack_is_no_difference() -> None:
    phase = to_dict(PhaseConfig(model="m"))
    earlier = {key: value for key, value in phase.items() if key not in ("parallel", "replicas", "shards", "patience")}
    assert difference({"chain": [earlier]}, {"chain": [phase]}) == []
    other = {**phase, "train": {**phase["train"], "lr": 0.5}}
    assert difference({"chain": [earlier, phase]}, {"chain": [phase, other]}) == [
        f"chain.1.train.lr: {phase['train']['lr']} → 0.5"
    ]
