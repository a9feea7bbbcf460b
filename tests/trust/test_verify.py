"""`retrograd verify`: good runs pass, and each kind of damage fails with its name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from retrograd.cli import main
from retrograd.core import check
from retrograd.core.step import State
from retrograd.runs.errors import RunError
from retrograd.runs.files import file_digest
from retrograd.runs.run_folder import open_run
from retrograd.runs.states.relay import relay
from retrograd.trust import verify as verifying
from retrograd.trust.certificate import REQUIRED, Check, attempt, certified, compare, missing


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    texts = tiny.sentences(12)
    texts[3] = ""  # no target: its score is 0
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(3, seed=1))
    return folder


def command(world: Path, run: Path, *more: str) -> list[str]:
    return [
        "magic", str(run), "--model", str(world / "model"), "--data.dataset", str(world / "train.jsonl"),
        "--query.dataset", str(world / "query.jsonl"), "--train.lr", "1e-2", "--train.batch_size", "4",
        "--train.eps_root", "1e-4", *more,
    ]  # fmt: skip


def certificate(run: Path, *more: str, code: int) -> dict[str, dict[str, Any]]:
    """The checks of a run by name, after `verify` has ended with this exit code."""
    assert main(["verify", str(run), "--steps", "2", "--directions", "1", *more]) == code
    found = json.loads((run / "verify.json").read_text())
    lines = {check["name"]: check for check in found["checks"]}
    assert found["verdict"] == ("failed" if code == 1 else "partly certified" if found["missing"] else "certified")
    assert set(found["failed"]) == failed(lines)
    assert found["missing"] == [name for name in REQUIRED if lines.get(name, NEVER)["verdict"] == "not checked"]
    return lines


NEVER = {"verdict": "not checked"}


def failed(checks: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, check in checks.items() if check["verdict"] == "failed"}


@pytest.fixture(scope="module")
def done(world: Path) -> Path:
    assert main(command(world, world / "done", "--replay.keep", "--replay.plan", "all")) == 0
    return world / "done"


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of a good run, to be damaged."""
    return Path(shutil.copytree(done, tmp_path / "run"))


ALL = {"scores file", "inputs", "states", "objective", "replay", "query", "adjoint", "retraining"}
SHORT = {"float64 adjoint", "float64 retraining"}

GOOD = {
    "full": (),
    "lora-muon": ("--lora.rank", "2", "--lora.target_modules", "query_key_value", "--train.optimizer", "muon"),
    "tokens": ("--attribute", "tokens", "--query.reduction", "none"),
    "sgd-clip-micro": ("--train.optimizer", "sgd", "--train.lr", "0.1", "--train.momentum", "0.9",
                       "--train.max_grad_norm", "0.5", "--train.micro_batch_size", "3"),
    "muon": ("--train.optimizer", "muon"),
    "dropout": ("--train.dropout",),
    "float64": ("--dtype", "float64"),
}  # fmt: skip
SLOW = {"full", "dropout", "muon", "sgd-clip-micro", "float64", "lora-muon"}  # "tokens" has all that "full" has


@pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in GOOD])
def test_good_runs_pass(world: Path, tmp_path: Path, case: str) -> None:
    assert main(command(world, tmp_path / "run", *GOOD[case])) == 0
    checks = certificate(tmp_path / "run", code=0)
    assert set(checks) == ALL | SHORT
    unchecked = {name for name, check in checks.items() if check["verdict"] == "not checked"}
    assert unchecked <= {"retraining"}  # rough runs hide float32's central differences; the words say so
    assert checks["adjoint"]["error"] < (1e-12 if case == "float64" else 2e-5)
    assert checks["float64 adjoint"]["error"] < 1e-12
    assert checks["float64 retraining"]["error"] < 1e-6


def test_kept_states_and_the_printed_certificate(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = certificate(done, "--steps", "0", "--directions", "0", code=0)
    assert checks["states"]["words"].startswith("3 on disk")
    printed = capsys.readouterr().out
    assert "left out by --directions 0" in " ".join(printed.split())
    assert "PARTLY CERTIFIED: nothing failed, but not all was checked." in printed
    assert "retraining, float64 adjoint, float64 retraining." in " ".join(printed.split())
    certificate(done, "--steps", "0", "--directions", "0", "--strict", code=3)


def test_in_little_memory_directions_are_carried_one_by_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = certificate(run, "--directions", "0", code=0)
    passes = list[int]()
    carry = check.forward_tangent
    monkeypatch.setattr(check, "forward_tangent", lambda *given: passes.append(len(given[2])) or carry(*given))
    monkeypatch.setattr(verifying, "free_on", lambda device: 0)
    apart = certificate(run, "--directions", "0", code=0)
    assert set(passes) == {1}
    assert len(passes) >= 6  # three directions at least, of the run and of its first steps in float64
    for name in ("adjoint", "float64 adjoint"):
        assert apart[name]["verdict"] == together[name]["verdict"] == "passed"
        assert apart[name]["error"] == pytest.approx(together[name]["error"], abs=1e-6)


def test_directions_are_carried_where_the_parameters_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "free_on", lambda device: 0 if device.type == "meta" else 1 << 40)
    for device, groups in (("meta", 3), ("cpu", 1)):
        state = State(0, {"x": torch.zeros(2, device=device)}, {})
        assert len(verifying._groups(torch.ones(3, 2), state)) == groups


def test_a_run_that_a_query_by_replicas_left_in_pieces_is_no_broken_one(run: Path) -> None:
    loaded = open_run(run).loaded
    settings = yaml.safe_load((run / "run_config.yaml").read_text())
    settings.update(parallel="shard", replicas=2)
    (run / "run_config.yaml").write_text(yaml.safe_dump(settings))
    relay(run / "checkpoints", loaded.initial, loaded.training.recipe, (2, 1), loaded.identity)
    assert not (run / "checkpoints" / "digests.txt").exists()
    checks = certificate(run, "--steps", "0", "--directions", "0", code=0)
    assert checks["inputs"]["verdict"] == checks["states"]["verdict"] == checks["replay"]["verdict"] == "passed"
    assert (run / "checkpoints" / "digests.txt").exists()


@pytest.mark.parametrize("sealed", [False, True], ids=["bytes", "bytes-and-hash"])
def test_scores_altered_by_a_tenth_of_a_percent_fail(run: Path, sealed: bool) -> None:
    scores = torch.load(run / "scores.pt", weights_only=True)
    torch.save(scores * 1.001, run / "scores.pt")
    if sealed:
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["phases"]["scores"]["sha256"] = file_digest(run / "scores.pt")
        (run / "manifest.json").write_text(json.dumps(manifest))
    checks = certificate(run, "--steps", "0", "--directions", "0", code=1)
    assert failed(checks) == ({"adjoint"} if sealed else {"adjoint", "scores file"})
    assert checks["adjoint"]["error"] == pytest.approx(1e-3, rel=0.1)


def test_scores_of_the_other_sign_fail_by_retraining_too(run: Path) -> None:
    scores = torch.load(run / "scores.pt", weights_only=True)
    torch.save(-scores, run / "scores.pt")
    assert {"adjoint", "retraining"} <= failed(certificate(run, "--steps", "0", code=1))


def test_scores_that_are_no_scores_fail(run: Path) -> None:
    (run / "scores.pt").write_bytes(b"nothing")
    checks = certificate(run, "--steps", "0", code=1)
    assert failed(checks) == {"scores file", "scores"}
    assert checks["replay"]["verdict"] == "passed"
    torch.save(torch.full((12,), torch.nan), run / "scores.pt")
    assert "NaN" in certificate(run, "--steps", "0", code=1)["scores"]["words"]
    torch.save(torch.zeros(5), run / "scores.pt")
    assert "12" in certificate(run, "--steps", "0", code=1)["scores"]["words"]


@pytest.mark.parametrize("name", ["state-000001", "final"])
def test_one_flipped_bit_in_a_state_fails(run: Path, name: str) -> None:
    path = run / "checkpoints" / f"{name}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    load_file(path)  # still a file that opens
    checks = certificate(run, "--steps", "0", "--directions", "0", code=1)
    assert failed(checks) == {"states"}
    assert f"{name}.safetensors: not the bits that were written" in checks["states"]["words"]


def test_kept_gradients_are_checked_and_one_flipped_bit_fails(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(command(world, run, "--replay.keep", "--replay.plan", "gradients")) == 0
    checks = certificate(run, "--steps", "0", "--directions", "0", code=0)
    assert "; 3 gradients on disk, each with its own digest" in checks["states"]["words"]
    path = run / "checkpoints/gradient-000002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    checks = certificate(run, "--steps", "0", "--directions", "0", code=1)
    assert failed(checks) == {"states"}
    assert "1 of 4 states and gradients on disk are broken. gradient-000002" in checks["states"]["words"]


def test_a_truncated_state_and_other_digests_fail(run: Path) -> None:
    path = run / "checkpoints/state-000002.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    digests = run / "checkpoints/digests.txt"
    digests.write_text(re.sub(r"(?<=\n3 )(.*)", lambda digest: digest[0][::-1], digests.read_text()))
    checks = certificate(run, "--steps", "0", "--directions", "0", code=1)
    assert failed(checks) == {"states", "replay"}
    assert "state-000002.safetensors: RunError" in checks["states"]["words"]
    assert "state 3 has another digest" in checks["replay"]["words"]


def test_another_query_gradient_fails(run: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = run / "queries/query/gradient.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: leaf * 1.001 for name, leaf in load_file(path).items()}
    save_file(tensors, path, metadata)
    assert failed(certificate(run, "--steps", "0", "--directions", "0", code=1)) == {"query"}


def test_changed_and_missing_data_fail(world: Path, tmp_path: Path) -> None:
    data = shutil.copy(world / "train.jsonl", tmp_path / "train.jsonl")
    run = tmp_path / "run"
    assert main(command(world, run, "--data.dataset", str(data))) == 0
    text = data.read_text()
    data.write_text(text.replace("cat", "dog", 1))
    checks = certificate(run, code=1)
    assert failed(checks) == {"inputs"}
    assert "rows: " in checks["inputs"]["words"]
    assert checks["adjoint"]["verdict"] == "not checked"
    data.unlink()
    checks = certificate(run, code=1)
    assert failed(checks) == {"inputs"}
    assert "nothing exists there" in checks["inputs"]["words"]
    data.write_text(text)
    certificate(run, "--steps", "0", "--directions", "0", code=0)


def test_added_queries_are_part_of_the_certificate(world: Path, run: Path) -> None:
    tiny.save_jsonl(run.parent / "more.jsonl", tiny.sentences(2, seed=5))
    assert main(["query", str(run), "--name", "more", "--query.dataset", str(run.parent / "more.jsonl")]) == 0
    checks = certificate(run, "--steps", "0", "--directions", "0", code=0)
    assert checks["states"]["words"].startswith("3 on disk")  # the query has left the kept states alone
    assert "2 query columns" in checks["adjoint"]["words"]
    assert "1 ± 3.0e-04 would be seen" in checks["adjoint"]["words"]
    scores = torch.load(run / "queries/more/scores.pt", weights_only=True)
    torch.save(scores * 1.001, run / "queries/more/scores.pt")
    assert failed(certificate(run, "--steps", "0", "--directions", "0", code=1)) == {"scores file", "adjoint"}


def test_what_bfloat16_hides_is_said(world: Path, tmp_path: Path) -> None:
    assert main(command(world, tmp_path / "run", "--dtype", "bfloat16")) == 0
    checks = certificate(tmp_path / "run", "--steps", "1", code=0)
    assert checks["adjoint"]["verdict"] == checks["retraining"]["verdict"] == "not checked"
    assert checks["float64 adjoint"]["verdict"] == "passed"


@pytest.mark.parametrize("more,message", [((), "holds no run"), (("--steps", "-1"), "0 or more")])
def test_bad_calls(done: Path, tmp_path: Path, more: tuple[str, ...], message: str, capsys: Any) -> None:
    assert main(["verify", str(done if more else tmp_path), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_verdict_names_what_is_missing() -> None:
    every = [Check(name, "passed", "") for name in REQUIRED]
    assert (certified(every), missing(every)) == ("certified", [])
    for place, name in enumerate(REQUIRED):
        for rest in ([], [Check(name, "not checked", "")], [every[place], Check(name, "not checked", "a column")]):
            found = every[:place] + every[place + 1 :] + rest
            assert (certified(found), missing(found)) == ("partly certified", [name])
        broken = [*every[:place], Check(name, "failed", "")]
        assert (certified(broken), missing(broken)) == ("failed", list(REQUIRED[place + 1 :]))
    assert certified([*every, Check("scores", "failed", "")]) == "failed"
    assert (certified([]), missing([])) == ("partly certified", list(REQUIRED))


def _compare(predicted: float, measured: float, noise: float) -> list[Check]:
    one = torch.ones(1, 1, dtype=torch.float64)
    return compare("x", "a against b", predicted * one, measured * one, noise * one, one, 1e-3)


@pytest.mark.parametrize("measured,noise,verdict", [
    (1.0005, 1e-4, "passed"), (1.002, 1e-4, "failed"), (1.002, 6e-4, "not checked"), (1.0005, 6e-4, "not checked"),
    (1.02, 6e-4, "failed"), (5.0, float("inf"), "not checked"), (float("nan"), 1e-4, "failed"),
])  # fmt: skip
def test_noise_is_no_failure_and_no_pass(measured: float, noise: float, verdict: str) -> None:
    assert [check.verdict for check in _compare(1.0, measured, noise)] == [verdict]


def test_an_error_in_one_check_is_a_line_of_its_own() -> None:
    def stops(error: Exception) -> list[Check]:
        raise error

    assert attempt("x", lambda: stops(RunError("broken")))[0].verdict == "failed"
    (check,) = attempt("x", lambda: stops(NotImplementedError("no forward AD\nfor this")))
    assert (check.verdict, check.words) == ("not checked", "stopped by NotImplementedError: no forward AD")
