"""The command, end to end: files, resume, refusals. Real models and data from disk, no network."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from killing import kill_after

from retrograd.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    texts = tiny.sentences(20)
    texts[3], texts[7] = "", "cat"  # no target: skipped, ids unchanged
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    return folder


def command(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "magic", str(run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.lr", "1e-2", "--train.epochs", "2",
        "--train.batch_size", "4", "--train.eps_root", "1e-6", *more,
    ]  # fmt: skip


def scores(run: Path) -> torch.Tensor:
    return torch.load(run / "scores.pt", weights_only=True)


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    assert main(command(world, world / "done")) == 0
    return world / "done"


def test_a_run_leaves_every_file(done: Path, world: Path) -> None:
    assert scores(done).shape == (20,)
    assert scores(done)[[3, 7]].tolist() == [0, 0]
    manifest = json.loads((done / "manifest.json").read_text())
    assert manifest["rows"]["skipped"] == {"3": "blank", "7": "one token"}
    assert set(manifest["phases"]) == {"train", "query", "reverse", "scores"}
    assert "Negative: a proponent" in manifest["meaning"]
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "train"] == list(range(10))
    assert [line["step"] for line in lines if line["phase"] == "reverse"] == list(range(9, -1, -1))
    lowest, highest = (json.loads((done / f"{end}_attribution.json").read_text()) for end in ("lowest", "highest"))
    assert lowest["examples"][0]["score"] == pytest.approx(float(scores(done).min()))
    assert highest["examples"][0]["score"] == pytest.approx(float(scores(done).max()))
    table = pq.read_table(done / "scores.parquet").to_pydict()
    assert len(table["doc_id"]) == 18
    assert table["score"] == pytest.approx(scores(done)[table["doc_id"]].tolist())
    assert json.loads((done / "queries/query/query.json").read_text())["documents"] == [0, 1, 2]
    assert yaml.safe_load((done / "run_config.yaml").read_text())["train"]["lr"] == 0.01


def test_rerunning_answers_done_and_another_configuration_is_refused(
    done: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "scores.pt").read_bytes()
    assert main(command(world, done)) == 0
    assert "is done" in capsys.readouterr().out
    assert main(command(world, done, "--train.seed", "5", "--attribute", "tokens")) == 2
    error = capsys.readouterr().err
    assert "train.seed: 0 → 5" in error
    assert "attribute: 'examples' → 'tokens'" in error
    assert (done / "scores.pt").read_bytes() == before


def test_changed_data_under_the_same_name_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copy(world / "train.jsonl", tmp_path / "train.jsonl")
    arguments = command(world, tmp_path / "run", "--data.dataset", str(tmp_path / "train.jsonl"))
    assert main(arguments) == 0
    text = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(text.replace("cat", "dog"))
    assert main(arguments) == 2
    assert "rows: " in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_the_stored_configuration_repeats_the_run(done: Path, world: Path) -> None:
    again = world / "again"
    assert main(["magic", str(again), "--config", str(done / "run_config.yaml")]) == 0
    assert (again / "scores.pt").read_bytes() == (done / "scores.pt").read_bytes()


@pytest.mark.parametrize("more", [
    ("--replay.plan", "binomial", "--replay.slots", "2"), ("--replay.plan", "log"),
    ("--replay.memory", "0", "--replay.disk", "1GiB"), ("--replay.keep",), ("--replay.keep", "--replay.plan", "all"),
    ("--replay.heartbeat", "0"),
    ("--replay.plan", "sqrt", "--replay.memory", "100KB"),
], ids=" ".join)  # fmt: skip
def test_every_plan_and_tier_gives_the_same_bits(
    done: Path, world: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    assert main(command(world, tmp_path / "run", *more)) == 0
    assert (tmp_path / "run/scores.pt").read_bytes() == (done / "scores.pt").read_bytes()
    kept = [len(list((tmp_path / "run/checkpoints").glob(f"{name}-*"))) for name in ("state", "gradient")]
    assert kept == ([0, 0] if "--replay.keep" not in more else [9, 0] if "all" in more else [2, 10])


def test_tokens_and_several_queries(done: Path, world: Path, tmp_path: Path) -> None:
    assert main(command(world, tmp_path / "run", "--attribute", "tokens", "--query.reduction", "none")) == 0
    found, documents = scores(tmp_path / "run"), torch.load(tmp_path / "run/doc_ids.pt", weights_only=True)
    assert found.shape == (18, 9, 3)
    values = json.loads((tmp_path / "run/queries/query/query.json").read_text())["values_nats"]
    assert len(values) == 3
    for k in range(3):
        assert main(command(world, tmp_path / f"one{k}", "--query.split", f"train[{k}:{k + 1}]")) == 0
        sums = torch.zeros(20).scatter_add_(0, documents.flatten(), found[..., k].flatten())
        torch.testing.assert_close(sums, scores(tmp_path / f"one{k}"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", [
    ("--train.optimizer", "muon", "--lora.rank", "2", "--lora.target_modules", "query_key_value"),
    ("--train.optimizer", "sgd", "--train.momentum", "0.9", "--train.max_grad_norm", "0.5",
     "--train.micro_batch_size", "3"),
    ("--data.chunk_length", "8", "--data.shuffle", "false", "--train.lr_schedule", "one-cycle"),
    ("--dtype", "float64", "--train.dropout", "--train.lr_schedule", "cosine", "--train.warmup_ratio", "0.2"),
], ids=["muon-lora", "sgd-clip-micro", "packed", "float64-dropout"])  # fmt: skip
def test_options_run(world: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert main(command(world, tmp_path / "run", *more)) == 0
    assert scores(tmp_path / "run").isfinite().all()
    assert scores(tmp_path / "run").abs().max() > 0


BAD = {
    "missing dataset": (("--data.dataset", "nothing.jsonl"), 2, "nothing exists there"),
    "missing column": (("--data.text_column", "body"), 2, "text"),
    "missing split": (("--data.split", "test"), 2, "Splits there: train"),
    "missing config": (("--config", "nowhere.yaml"), 2, "cannot read the configuration"),
    "batch size 0": (("--train.batch_size", "0"), 2, "--train.batch_size is 0"),
    "learning rate": (("--train.lr", "nan"), 2, "--train.lr is nan"),
    "size": (("--replay.memory", "8potatoes"), 2, "size '8potatoes' is not understood"),
    "too long": (("--data.max_length", "99"), 2, "exceed the model's context of 32"),
    "device": (("--device", "cuda:7"), 2, "--device cuda:7 cannot be used here"),
    "no room": (("--replay.plan", "all", "--replay.memory", "1KB", "--replay.disk", "0"), 2, "Raise --replay.memory"),
    "momentum": (("--train.optimizer", "sgd", "--train.momentum", "2"), 2, "momentum is 2.0"),
    "diverged": (("--train.optimizer", "sgd", "--train.lr", "1e30"), 1, "left the finite numbers at step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_paragraph_with_its_exit_code(
    world: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, code, message = BAD[case]
    assert main(command(world, tmp_path / "run", *more)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("texts,name,message", [
    ([], "data", "empty"), (["cat", "", "dog"], "query", "no valid target in any of 3 documents"),
])  # fmt: skip
def test_data_with_nothing_in_it(
    world: Path, tmp_path: Path, texts: list[str], name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_jsonl(tmp_path / "bad.jsonl", texts)
    assert main(command(world, tmp_path / "run", f"--{name}.dataset", str(tmp_path / "bad.jsonl"))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # everything checkable is checked before the run begins


def test_token_ids_outside_the_vocabulary(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [1, 99, 3]}\n')
    assert main(command(world, tmp_path / "run", "--data.dataset", str(tmp_path / "ids.jsonl"))) == 2
    assert "99" in capsys.readouterr().err


@pytest.mark.parametrize("flag,value", [("--train.optimizer", "adagrad"), ("--train.lr_schedule", "square")])
def test_unknown_choices_end_with_exit_code_2(world: Path, tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command(world, tmp_path / "run", flag, value))
    assert stopped.value.code == 2


def test_yaml_with_unknown_or_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        ("tran: {lr: 1}", "settings that do not exist: tran"),
        ("train: {optimizer: adagrad}", "has to be one of sgd, adam, adamw, muon"),
        ("train: {lr: fast}", "has to be of type float"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        assert main(["magic", str(tmp_path / "run"), "--config", str(tmp_path / "c.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_with_other_things_is_not_touched(world: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert main(command(world, tmp_path)) == 2
    assert main(command(world, tmp_path, "--overwrite")) == 2
    assert (tmp_path / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", [pytest.param("truncate", marks=pytest.mark.slow), "flip"])
def test_a_broken_snapshot_is_refused_and_the_run_resumes_without_it(
    done: Path, world: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(world, tmp_path / "run", "--replay.memory", "0", "--replay.heartbeat", "0")
    kill_after(arguments, tmp_path / "run", "train", 6)
    states = sorted((tmp_path / "run/checkpoints").glob("state-*.safetensors"))
    raw = bytearray(states[-1].read_bytes())
    if damage == "truncate":
        raw = raw[: len(raw) // 2]
    else:
        raw[-5] ^= 1
    states[-1].write_bytes(raw)
    assert main(arguments) == 1
    assert "Delete this file" in capsys.readouterr().err
    states[-1].unlink()
    assert main(arguments) == 0
    assert (tmp_path / "run/scores.pt").read_bytes() == (done / "scores.pt").read_bytes()


def test_a_full_disk_stops_with_the_numbers_and_the_run_resumes(
    done: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from retrograd.runs import files

    arguments = command(world, tmp_path / "run", "--replay.memory", "0", "--replay.disk", "1GiB")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert "1,000 bytes are free" in error
    monkeypatch.undo()
    assert main(arguments) == 0
    assert (tmp_path / "run/scores.pt").read_bytes() == (done / "scores.pt").read_bytes()


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from retrograd.cli import main; main(['--help']); print({'torch', 'transformers'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "magic" in found
    assert found.splitlines()[-1] == "set()"


def _killed_run_resumes(done: Path, world: Path, run: Path, phase: str, step: int, more: tuple[str, ...]) -> None:
    arguments = command(world, run, *more)
    kill_after(arguments, run, phase, step)
    assert main(arguments) == 0
    assert (run / "scores.pt").read_bytes() == (done / "scores.pt").read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted((line["phase"], line["step"]) for line in lines) == sorted(
        (name, t) for name in ("train", "reverse") for t in range(10)
    )


LAYOUTS = [
    ("--replay.heartbeat", "0"),
    ("--replay.heartbeat", "1000"),
    ("--replay.heartbeat", "0", "--replay.plan", "binomial", "--replay.slots", "3", "--replay.memory", "0"),
    ("--replay.heartbeat", "0.01", "--replay.plan", "sqrt"),
]


@pytest.mark.parametrize("phase,step,layout", [("train", 4, 2), ("reverse", 6, 0)])
def test_killed_runs_resume_to_the_same_bits(
    done: Path, world: Path, tmp_path: Path, phase: str, step: int, layout: int
) -> None:
    _killed_run_resumes(done, world, tmp_path / "run", phase, step, LAYOUTS[layout])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(16))
def test_sixteen_random_kills_resume_to_the_same_bits(done: Path, world: Path, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    phase, step = ("train", "reverse")[number % 2], draw.randrange(10)
    _killed_run_resumes(done, world, tmp_path / "run", phase, step, LAYOUTS[draw.randrange(len(LAYOUTS))])
