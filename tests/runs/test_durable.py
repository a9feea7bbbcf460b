"""What is on disk after a kill or a power failure, and who may write: `retrograd.durable` and `runs.lock`."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_magic import command, done, world  # noqa: F401  # fixtures
from torch import nn

from retrograd import durable, optim
from retrograd.cli import main
from retrograd.data.stream import DataStream
from retrograd.runs import files, journal
from retrograd.runs.errors import RunError
from retrograd.runs.files import append_line, read_lines, write_json
from retrograd.runs.lock import locked
from retrograd.trainer import Trainer
from retrograd.trust.bank import Bank

# Files


@pytest.mark.parametrize("torn", [b"3 0a1b", b"x" * 10_000, b"\0\0\0", "ä".encode()[:1]])
def test_a_torn_line_is_cut_off_before_anything_is_appended(tmp_path: Path, torn: bytes) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"1 one\n2 two\n" + torn)
    assert read_lines(log) == ["1 one", "2 two"]
    append_line(log, "3 three")
    append_line(log, "4 four")
    assert log.read_bytes() == b"1 one\n2 two\n3 three\n4 four\n"
    log.write_bytes(torn)  # the first line of all
    append_line(log, "1 one")
    assert log.read_bytes() == b"1 one\n"


def test_a_bank_with_a_torn_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "retrains.jsonl").write_bytes(b'{"key": "ab')
    from retrograd.trust.bank import LeftOut, Retrained

    one = LeftOut("0", 0.5, torch.tensor([1]).numpy())
    Bank(tmp_path, "id", {"q": "of q"}, ["q"]).add([(one, Retrained([1.0], [2.0]))], {"threads": 1})
    assert Bank(tmp_path, "id", {"q": "of q"}, ["q"]).known[one.key] == Retrained([1.0], [2.0])


@pytest.mark.parametrize("megabytes", [1, 16])
def test_what_a_write_cut_off_leaves_is_taken_away(tmp_path: Path, megabytes: int) -> None:
    """The writer dies of SIGXFSZ in the middle, as of any kill; safetensors has a temporary name of its own."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        files.write_tensors(tmp_path / "state.safetensors", {"x": torch.zeros(megabytes << 18)}, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert list(tmp_path.iterdir())
    assert not list(durable.foreign(tmp_path))
    durable.remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every sync and rename, in order: ("sync" or "rename", name of the file)."""
    found: list[tuple[str, str]] = []
    sync, replace = durable.to_disk, os.replace

    def to_disk(path: Path) -> None:
        temporary = path.name.endswith(".tmp")
        found.append(("sync", f"temporary {path.name[1:].rsplit('.', 2)[0]}" if temporary else path.name))
        sync(path)

    def renamed(old: Path, new: Path) -> None:
        found.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(durable, "to_disk", to_disk)
    monkeypatch.setattr(files, "to_disk", to_disk)
    monkeypatch.setattr(os, "replace", renamed)
    return found


def test_a_file_is_synced_then_named_then_its_folder_is_synced(tmp_path: Path, calls: list) -> None:
    write_json(tmp_path / "new" / "a.json", 1)
    assert calls == [
        ("sync", tmp_path.name), ("sync", "temporary a.json"), ("rename", "a.json"), ("sync", "new"),
    ]  # fmt: skip


def test_lines_are_synced_before_what_stands_on_them(world: Path, tmp_path: Path, calls: list) -> None:  # noqa: F811
    assert main(command(world, tmp_path / "run", "--replay.heartbeat", "0")) == 0
    names = ["state-000001.safetensors", "state-000009.safetensors", "final.safetensors", "reverse.safetensors"]
    for name in names:
        place = calls.index(("rename", name))
        before = calls[:place]
        last = max(place for place, call in enumerate(before) if call[0] == "rename")
        assert {("sync", "metrics.jsonl"), ("sync", "digests.txt")} <= set(before[last:]), name
        assert calls[place - 1] == ("sync", f"temporary {name}")
        assert calls[place + 1] == ("sync", "checkpoints")


def test_temporary_names_differ_and_a_failed_write_leaves_none(tmp_path: Path) -> None:
    names = {durable.temporary_name(tmp_path / "a") for _ in range(100)}
    assert len(names) == 100

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("broken")

    with pytest.raises(RunError, match=r"cannot write .*a: broken"):
        files.write_atomic(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


# Accidents of a run


class Died(BaseException):
    """Stands for kill -9: nothing in the product catches it, and no clean-up of the product would change what it has
    written."""


def dying(real: Callable[..., Any], when: Callable[..., bool], *, after: bool) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        if not after and when(*given):
            raise Died
        found = real(*given, **named)
        if after and when(*given):
            raise Died
        return found

    return call


def told(run: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((line["phase"], line["step"]) for line in lines)


def is_whole(run: Path, done: Path) -> None:  # noqa: F811
    assert (run / "scores.pt").read_bytes() == (done / "scores.pt").read_bytes()
    assert (run / "recipe_gradients.json").read_bytes() == (done / "recipe_gradients.json").read_bytes()
    assert told(run) == sorted((name, t) for name in ("train", "reverse") for t in range(10))
    digests = [sorted(read_lines(one / "checkpoints" / "digests.txt")) for one in (run, done)]
    assert digests[0] == digests[1]
    assert not list(run.rglob(".*"))


@pytest.mark.parametrize("number", [1, 4])
def test_dead_directly_after_a_cotangent_got_its_name(
    done: Path, world: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    arguments, seen = command(world, tmp_path / "run", "--replay.heartbeat", "0"), []

    def last(old: Path, new: Path) -> bool:
        return Path(new).name == "reverse.safetensors" and not seen.append(new) and len(seen) == number

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(os, "replace", dying(os.replace, last, after=True))
        main(arguments)
    assert main(arguments) == 0
    is_whole(tmp_path / "run", done)


@pytest.mark.parametrize("lost", [
    "a line of training", "a line of the sweep", pytest.param("a digest", marks=pytest.mark.slow),
    pytest.param("all digests", marks=pytest.mark.slow), "a cut word",
])  # fmt: skip
def test_a_lost_line_costs_work_and_no_run(
    done: Path, world: Path, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    run = tmp_path / "run"
    arguments = command(world, run, "--replay.heartbeat", "0", "--replay.plan", "all")
    step, last = (3, "reverse") if "sweep" in lost else (7, "train")
    with monkeypatch.context() as patch, pytest.raises(Died):
        at = f'"phase": "{last}", "step": {step},'
        patch.setattr(journal, "append_line", dying(append_line, lambda path, line: at in line, after=True))
        main(arguments)
    name = "checkpoints/digests.txt" if "digest" in lost or "word" in lost else "metrics.jsonl"
    lines = (run / name).read_text().splitlines()
    gone = {"a line of training": '"train", "step": 4,', "a line of the sweep": '"reverse", "step": 6,'}.get(lost, "5 ")
    kept = [line for line in lines if not (gone in line if gone != "5 " else line.startswith(gone))]
    if lost == "all digests":
        kept = []
    if lost == "a cut word":  # as older versions left it
        kept = [line[:9] if line.startswith("5 ") else line for line in lines]
    assert kept != lines
    (run / name).write_text("".join(f"{line}\n" for line in kept))
    assert main(arguments) == 0
    found = run / "checkpoints/digests.txt"
    if lost == "a cut word":
        found.write_text("".join(f"{line}\n" for line in read_lines(found) if len(line) > 9))
    is_whole(run, done)


def test_a_run_that_is_started_afresh_is_never_half_done(
    done: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    arguments = command(world, tmp_path / "run")
    assert main(arguments) == 0
    for number in (1, 4):
        removed: list[Path] = []
        with monkeypatch.context() as patch, pytest.raises(Died):
            real, many = durable.remove, number
            patch.setattr(
                sys.modules["retrograd.runs.begin"],
                "remove",
                dying(real, lambda path: not removed.append(path) and len(removed) == many, after=True),
            )
            main([*arguments, "--overwrite"])
        assert not (tmp_path / "run/manifest.json").exists()
        assert main(arguments) == 0
        is_whole(tmp_path / "run", done)


def test_a_kill_before_the_first_name_leaves_a_folder_that_can_be_used(
    world: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run_config.yaml.12-0123abcd.tmp").write_text("half")
    (run / ".lock").write_text('{"pid": 1, "host": "gone"}\n')
    assert main(command(world, run)) == 0
    assert not list(run.rglob(".*"))


# One writer a folder

HOLDER = """
import sys, time
from pathlib import Path
from retrograd.runs.lock import locked
with locked(Path(sys.argv[1]), shared=len(sys.argv) > 2):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that holds a folder."""
    begun: list[subprocess.Popen] = []

    def start(folder: Path, *more: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True, env=environment
        )
        begun.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path, holder: Callable) -> None:
    folder = tmp_path / "new" / "run"
    other = holder(folder)
    with (
        pytest.raises(ValueError, match=rf"new/run is in use by process {other.pid} on .+ since 20\d\d.*wait until"),
        locked(folder),
    ):
        pass
    with pytest.raises(ValueError, match="is in use by process"), locked(folder, shared=True):
        pass
    with locked(folder, ".lock-other"):  # of something else in it
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (folder / ".lock").exists()  # stale: its holder is dead
    (folder / ".a.json.99-0123abcd.tmp").write_text("half")
    (folder / ".mine.tmp").write_text("not ours")
    with locked(folder):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert [path.name for path in folder.iterdir()] == [".mine.tmp"]


def test_several_may_share_and_none_has_it_alone_meanwhile(tmp_path: Path, holder: Callable) -> None:
    one, other = (holder(tmp_path, "shared") for _ in range(2))
    with pytest.raises(ValueError, match=rf"process {one.pid} on .*; process {other.pid} on "), locked(tmp_path):
        pass
    one.kill()
    one.wait()
    with pytest.raises(ValueError, match=rf"in use by process {other.pid} on [^;]*$"), locked(tmp_path):
        pass
    with locked(tmp_path, shared=True):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_waits_as_long_as_it_is_told(tmp_path: Path, holder: Callable) -> None:
    other = holder(tmp_path)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {other.pid}"])
    with locked(tmp_path, patience=60.0):
        pass


def test_a_forked_child_does_not_hold_on_to_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), locked(tmp_path / "new"):
        raise ValueError("mine")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a folder"), locked(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*given: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("retrograd.runs.lock.fcntl.flock", none)
    with pytest.warns(UserWarning, match="this file system has no locks: see to it yourself"), locked(tmp_path):
        pass


def test_every_command_that_writes_takes_the_lock(
    done: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    recipe = command(world, done)[2:]
    writers = {
        done: [command(world, done), ["query", str(done), "--name", "more", "--query.dataset", "x"],
               ["verify", str(done)], ["validate", str(done)], ["metasmoothness", str(done), *recipe]],
        tmp_path / "exam": [["evaluate", str(world / "model"), "--tasks", str(tmp_path / "t.yaml"), "--output", str(tmp_path / "exam")]],
        tmp_path / "lab": [["lab", str(tmp_path / "lab")]],
    }  # fmt: skip
    (tmp_path / "t.yaml").write_text(f"prose: {{form: text, dataset: {world / 'query.jsonl'}}}\n")
    for folder, commands in writers.items():
        with locked(folder):
            for arguments in commands:
                assert main(arguments) == 2, arguments
                assert f"{folder} is in use by process {os.getpid()} on" in capsys.readouterr().err, arguments


def test_a_trainer_locks_its_folder(tmp_path: Path) -> None:
    model, rows = nn.Linear(2, 1), {"x": torch.randn(4, 2), "y": torch.randn(4, 1)}

    def loss(params: Any, batch: Any) -> torch.Tensor:
        return (torch.func.functional_call(model, params, (batch["x"],)) - batch["y"]).square().sum(1)

    trainer, state = Trainer.initialize(model, optim.SGD(0.1), loss)
    stream = DataStream(rows, 2)
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        trainer.train(state, stream, tmp_path)
    final = trainer.train(state, stream, tmp_path)
    query = trainer.evaluate(final, stream)
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        trainer.backward(tmp_path, stream, query)
    assert trainer.backward(tmp_path, stream, query).weight_grads.shape == (4,)


# Kills for real


def killed(tmp_path: Path, *more: str) -> dict[str, Any]:
    """What bench/kills.py finds, in a process of its own, for it forks."""
    bench, output = Path(__file__).parents[2] / "bench", tmp_path / "kills.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(bench.parent)}
    found = subprocess.run(
        [sys.executable, str(bench / "kills.py"), "--seed", "1", "--output", str(output), *more],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return json.loads(output.read_text())


def test_killed_at_random_and_every_run_ends_with_its_bits(tmp_path: Path) -> None:
    found = killed(tmp_path, "--run", "trainer", "--kills", "4")
    assert found["kills"] >= 4
    assert found["wrong"] == []


@pytest.mark.slow
def test_the_command_killed_at_random(tmp_path: Path) -> None:
    found = killed(tmp_path, "--kills", "60")
    assert found["kills"] >= 60
    assert found["wrong"] == []


@pytest.mark.slow
def test_the_trainer_killed_more_often(tmp_path: Path) -> None:
    found = killed(tmp_path, "--run", "trainer", "--kills", "40")
    assert found["kills"] >= 40
    assert found["wrong"] == []
