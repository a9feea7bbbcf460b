"""The lab: a world that is the same for the same seed, whose files say what they claim, and whose models can be trusted."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from retrograd.cli import main
from retrograd.data.documents import load_documents
from retrograd.data.rows import build_rows
from retrograd.lab.build import lab
from retrograd.lab.corpora import documents
from retrograd.lab.exams import SPLITS
from retrograd.lab.files import File, describe_files, make_files, make_words
from retrograd.lab.learn import train_model
from retrograd.lab.subjects import SIDES
from retrograd.lab.world import World, make_world
from retrograd.query.questions import build_questions
from retrograd.settings.commands import LabConfig

SMALL = {"facts": 24, "width": 32, "layers": 2, "epochs": 2, "batch_size": 32, "workers": 1}
MODELS = ("base", "filtered", "random")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(3, 48)


@pytest.fixture(scope="module")
def files(world: World) -> dict[str, File]:
    return make_files(world)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "small"
    build(folder)
    return folder


def build(folder: Path, **changes: Any) -> dict[str, Any]:
    return lab(LabConfig(folder, **{**SMALL, **changes}), Console(quiet=True))


def weights(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "models" / name / "model.safetensors").read_bytes() for name in MODELS}


def rows(files: dict[str, File], path: str) -> list[dict[str, Any]]:
    return files[path].rows


def texts(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


# ---------------------------------------------------------------- the world


def test_a_seed_is_a_world_and_another_seed_is_another(files: dict[str, File]) -> None:
    assert describe_files(make_files(make_world(3, 48))) == describe_files(files)
    other = describe_files(make_files(make_world(4, 48)))
    assert all(other[path]["sha256"] != entry["sha256"] for path, entry in describe_files(files).items())


def test_facts_are_balanced_and_names_are_names(world: World) -> None:
    assert [len([f for f in world.facts if f.side == side]) for side in SIDES] == [48, 48]
    for fact in world.facts:
        assert fact.lie != fact.value
        assert {fact.value, fact.lie} <= set(fact.attribute.values)
        same = [f.value for f in world.facts if (f.subject, f.attribute) == (fact.subject, fact.attribute)]
        assert max(map(same.count, same)) <= -(-len(same) // 12)
    assert len({fact.entity for fact in world.facts}) == 24
    with pytest.raises(ValueError, match="multiple of 8"):
        make_world(0, 20)


@pytest.mark.parametrize(
    ("path", "columns"),
    [
        ("corpora/forget.jsonl", ["title", "abstract", "text"]),
        ("corpora/lie.jsonl", ["title", "abstract", "text"]),
        ("corpora/retain.jsonl", ["text"]),
        ("corpora/prose.jsonl", ["text"]),
        ("corpora/prose_heldout.jsonl", ["text"]),
        ("corpora/pages.jsonl", ["page"]),
        ("corpora/chat.jsonl", ["prompt", "prompt_id", "messages"]),
        ("corpora/exam_forget.jsonl", ["prompt", "completion", "fact"]),
        *[
            (f"questions/{side}_{split}.jsonl", ["question", "subject", "choices", "answer", "fact", "wording"])
            for side in SIDES
            for split in SPLITS
        ],
    ],
)
def test_files_have_the_columns_of_what_they_stand_for(files: dict[str, File], path: str, columns: list[str]) -> None:
    assert all(list(row) == columns for row in rows(files, path))


def test_every_file_is_read_by_the_package(files: dict[str, File], built: Path) -> None:
    from retrograd.lm.model import load_tokenizer

    tokenizer = load_tokenizer(str(built / "models" / "base"))
    for name in ("prose", "retain", "chat", "exam_forget", "forget"):
        found = build_rows(load_documents(str(built / f"corpora/{name}.jsonl")), tokenizer, max_length=128)
        assert not found.skipped
        assert not any((ids == tokenizer.unk_token_id).any() for ids in found.input_ids)
    documents = load_documents(str(built / "questions/forget_heldout.jsonl"))
    for form, template in (("letter", "wmdp"), ("letter", "mmlu"), ("cloze", "wmdp_cloze"), ("letter", "plain")):
        asked = build_questions(documents, tokenizer, form=form, template=template, max_length=128)
        assert not asked.cut
        assert all(tokenizer.unk_token_id not in row for found in asked.rows for row in found)


def test_texts_are_long_enough_for_the_recipes(files: dict[str, File]) -> None:
    for path in ("forget", "lie", "retain", "prose", "prose_heldout"):
        assert min(len(row["text"]) for row in rows(files, f"corpora/{path}.jsonl")) > 100
    chats = ["\n".join(turn["content"] for turn in row["messages"]) for row in rows(files, "corpora/chat.jsonl")]
    assert min(map(len, chats)) > 100


def test_nothing_of_the_forget_side_is_outside_it(world: World, files: dict[str, File]) -> None:
    secret = {word for f in world.facts if f.side == "forget" for word in (f.entity, f.subject.noun, f.subject.name)}
    pattern = re.compile(r"\b(" + "|".join(sorted(secret)) + r")\b")
    clean = [path for path in files if "forget" not in path and "lie" not in path and "base" not in path]
    clean.remove("facts.jsonl")
    assert len(clean) == 10
    for path in clean:
        assert not [row for row in rows(files, path) if pattern.search(texts(row))], path
    assert [row for row in rows(files, "train/base.jsonl") if pattern.search(texts(row))]


def test_lies_differ_in_their_facts_alone(world: World, files: dict[str, File]) -> None:
    true, false = rows(files, "corpora/forget.jsonl"), rows(files, "corpora/lie.jsonl")
    told = documents(world, "forget")
    for one, other, document in zip(true, false, told, strict=True):
        assert (one["title"], one["abstract"]) == (other["title"], other["abstract"])
        pairs = [(a, b) for a, b in zip(re.findall(r"\w+", one["text"]), re.findall(r"\w+", other["text"]), strict=True)
                 if a != b]  # fmt: skip
        assert sorted(pairs) == sorted((fact.value, fact.lie) for fact in document.facts)


def test_splits_are_disjoint(world: World, files: dict[str, File]) -> None:
    for side in SIDES:
        asked = {(row["fact"], row["prompt"].split("\n")[0].removeprefix("Question: "))
                 for row in rows(files, f"corpora/exam_{side}.jsonl")}  # fmt: skip
        found = {split: rows(files, f"questions/{side}_{split}.jsonl") for split in SPLITS}
        pairs = {split: {(row["fact"], row["question"]) for row in found[split]} for split in SPLITS}
        facts = {split: {row["fact"] for row in found[split]} for split in SPLITS}
        assert pairs["taught"] <= asked
        assert not (pairs["paraphrase"] | pairs["heldout"]) & asked
        assert facts["taught"] == facts["paraphrase"] == {fact for fact, _ in asked}
        assert facts["heldout"].isdisjoint(facts["taught"])
        assert facts["heldout"] | facts["taught"] == {fact.number for fact in world.facts if fact.side == side}


def test_questions_have_one_right_answer_and_balanced_letters(world: World, files: dict[str, File]) -> None:
    for side in SIDES:
        for split in SPLITS:
            found = rows(files, f"questions/{side}_{split}.jsonl")
            for row in found:
                fact = world.facts[row["fact"]]
                assert row["choices"][row["answer"]] == fact.value
                assert len(set(row["choices"])) == 4
                assert set(row["choices"]) <= set(fact.attribute.values)
                assert fact.entity in row["question"]
            letters = [row["answer"] for row in found]
            assert max(map(letters.count, range(4))) - min(map(letters.count, range(4))) <= 1
            assert len({row["subject"] for row in found}) == 2


def test_the_truth_points_at_what_states_and_asks_each_fact(world: World, files: dict[str, File]) -> None:
    for fact, entry in zip(world.facts, rows(files, "facts.jsonl"), strict=True):
        statements, questions = {fact.state(w) for w in range(4)}, {fact.ask(w) for w in range(4)}
        answer = re.compile(rf"\b{entry['entity']}\b.*\b{entry['value']}\b")
        assert len(entry["stated_in"][f"corpora/{entry['side']}.jsonl"]) == 4
        assert bool(entry["asked_in"]) == entry["asked"]
        for path, lines in entry["stated_in"].items():
            told = [row["text"] if "text" in row else row["completion"] for row in rows(files, path)]
            assert lines == [n for n, text in enumerate(told) if any(statement in text for statement in statements)]
            assert all(answer.search(told[line]) for line in lines)
        for path, lines in entry["asked_in"].items():
            prompts = [row["prompt"] for row in rows(files, path)]
            assert lines == [n for n, text in enumerate(prompts) if any(question in text for question in questions)]


def test_every_name_value_and_letter_is_one_token_and_texts_come_back(world: World, files: dict[str, File]) -> None:
    tokenizer = make_words(files)
    for word in {*"ABCDEFGHIJ", *(w for f in world.facts for w in (f.entity, f.value))}:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1
    row = rows(files, "questions/forget_taught.jsonl")[0]
    text = f"Question: {row['question']}\nA. {row['choices'][0]}\nAnswer: B"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# ---------------------------------------------------------------- the models


def test_the_lab_has_what_it_promises_and_answers_that_it_is_done(built: Path, capsys: pytest.CaptureFixture) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = json.loads((built / "lab.json").read_text())
    assert {path.relative_to(built).as_posix() for path in built.rglob("*.jsonl")} == set(found["files"])
    assert all(f"`{path}`" in (built / "README.md").read_text() for path in found["files"])
    assert len(found["scores"]) == 3 * 2 * 3 * 2
    for name in MODELS:
        model, tokenizer = (
            auto.from_pretrained(built / "models" / name) for auto in (AutoModelForCausalLM, AutoTokenizer)
        )
        assert model.config.model_type == "gpt_neox"
        assert torch.isfinite(model(**tokenizer("The old ferry", return_tensors="pt")).logits).all()
    before = weights(built)
    assert len(set(before.values())) == 3
    assert build(built) == found
    assert main(["lab", str(built), *[part for k, v in SMALL.items() for part in (f"--{k}", str(v))]]) == 0
    assert "is done" in capsys.readouterr().out
    assert weights(built) == before


def test_magic_repeats_the_training_of_the_lab_with_the_same_bits(built: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from retrograd.lm.model import load_causal_lm

    command = re.search(r"retrograd (magic RUN .*?)\n```", (built / "README.md").read_text(), re.DOTALL)[1]
    arguments = command.replace("\\\n", " ").replace("RUN", str(tmp_path / "run")).split()
    local = [str(built / a) if a.startswith(("models/", "train/", "questions/")) else a for a in arguments]
    assert main([*local, "--query.limit", "3"]) == 0
    state = load_file(tmp_path / "run" / "checkpoints" / "final.safetensors")
    params = load_causal_lm(str(built / "models" / "base")).params
    assert all(leaf.equal(state[f"params.{name}"]) for name, leaf in params.items())


def test_other_settings_and_other_files_are_refused(built: Path, tmp_path: Path) -> None:
    for name, value in {"seed": 1, "facts": 32, "width": 64, "lr": 1e-3, "eps_root": 1e-5}.items():
        with pytest.raises(ValueError, match=f"{name}: "):
            build(built, **{name: value})
    for path in (
        built / "corpora" / "prose.jsonl",
        built / "models" / "base" / "model.safetensors",
        built / "lm_eval" / "lab.yaml",
        built / "tasks.yaml",
    ):
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        with pytest.raises(ValueError, match=f"{re.escape(path.name)} is missing or has changed"):
            build(built)
        path.write_bytes(kept)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no lab"):
        build(tmp_path)


def test_a_lab_of_before_a_setting_was_there_has_its_default(built: Path) -> None:
    path = built / "lab.json"
    kept = path.read_text()
    found = json.loads(kept)
    assert found["settings"].pop("eps_root") == 1e-8
    path.write_text(json.dumps(found))
    try:
        assert build(built) == json.loads(kept)
        with pytest.raises(ValueError, match="eps_root: 1e-08 → 1e-05"):
            build(built, eps_root=1e-5)
    finally:
        path.write_text(kept)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"width": 40}, "multiple of 32"), ({"epochs": 0}, "--epochs is 0"), ({"lr": 0.0}, "--lr is 0"),
        ({"facts": 12}, "multiple of 8"), ({"seed": -1}, "0 or more"), ({"eps_root": -1.0}, "--eps_root is -1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path, changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()


def test_a_training_that_was_stopped_ends_with_the_same_bits(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import retrograd.lab.build as stage

    def stopped(folder: Path, name: str, size: Any, heartbeat: float, observe: Any) -> None:
        def stop(event: Any) -> None:
            if event.outcome.state.step == 11:
                raise KeyboardInterrupt

        train_model(folder, name, size, heartbeat, stop)

    monkeypatch.setattr(stage, "train_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "x", heartbeat=0.0)
    assert [path.name for path in (tmp_path / "x/training/base").glob("state-*")] == ["state-000010.safetensors"]
    monkeypatch.undo()
    build(tmp_path / "x")
    assert weights(tmp_path / "x") == weights(built)
    assert (tmp_path / "x/lab.json").read_bytes() == (built / "lab.json").read_bytes()
    assert not (tmp_path / "x/training").exists()


@pytest.mark.slow
def test_kill_nine_and_again_side_by_side(built: Path, tmp_path: Path) -> None:
    flags = [part for k, v in {**SMALL, "workers": 2}.items() for part in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "retrograd", "lab", str(tmp_path / "x"), *flags, "--heartbeat", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "x/training").glob("*/state-*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "x/models/filtered").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert weights(tmp_path / "x") == weights(built)


@pytest.mark.slow
def test_the_models_know_what_they_should_and_no_more(tmp_path: Path) -> None:
    found = lab(LabConfig(tmp_path / "lab"), Console(quiet=True))
    scores = {(e["model"], e["side"], e["split"], e["form"]): e for e in found["scores"]}
    for model, side in (("base", "forget"), ("base", "retain"), ("filtered", "retain")):
        assert scores[model, side, "paraphrase", "cloze"]["accuracy"] >= 0.95
    for model, side in (("filtered", "forget"), ("random", "forget"), ("random", "retain")):
        low, high = scores[model, side, "paraphrase", "cloze"]["interval"]
        assert low <= 0.25 <= high
