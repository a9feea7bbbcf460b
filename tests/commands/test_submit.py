"""`retrograd submit`, with a SLURM of three stubs on the path: scripts, notices, requeues, arrays, refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch

from retrograd.cli import _parse, main
from retrograd.commands.submit import Resumed, script
from retrograd.runs.errors import RunError

ROOT = Path(__file__).parent.parent.parent
MAGIC = ("magic", "runs/attribution", "--config", "recipes/original/attribution_wikitext_corrected.yaml")
EXAMPLES = {
    "one_node": ("--gpus", "4", "--memory", "400G", *MAGIC),
    "nodes": ("--nodes", "4", "--gpus", "4", *MAGIC),
    "workers": ("--workers", "8", "experiment", "recipes/original/phase2.yaml", "runs/phase2"),
}
# sbatch runs the script at once, again after each requeue, once for each job of an array; srun starts a process for
# each task and passes signals on; with NOTICE it also sends the script USR1 once the run's journal has so many lines
STUBS = {
    "sbatch": """
        for last; do :; done
        tasks=$(sed -n 's/^#SBATCH --ntasks-per-node=//p' "$last"); nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$last")
        array=$(sed -n 's/^#SBATCH --array=0-//p' "$last")
        for number in $(seq 0 "${array:-0}"); do
            export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=here SLURM_NTASKS=$((tasks * nodes)) SLURM_CPUS_PER_TASK=1
            if [ -n "$array" ]; then export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$number; fi
            rm -f "$STUBS/requeued"
            while :; do
                bash "$last" >> "$STUBS/log.txt" 2>&1 & job=$!
                echo $job > "$STUBS/job"
                wait $job; echo "exit $?" >> "$STUBS/exits"
                [ -e "$STUBS/requeued" ] || break
                rm "$STUBS/requeued"
            done
        done
        echo 7
    """,
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        started=()
        for ((task = 0; task < SLURM_NTASKS; task++)); do
            SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & started+=($!)
        done
        trap 'kill -USR1 "${started[@]}"' USR1
        if [ -n "${NOTICE:-}" ] && [ ! -e "$STUBS/noticed" ]; then
            while [ "$(cat "$JOURNAL" 2>/dev/null | wc -l)" -lt "$NOTICE" ]; do sleep 0.02; done
            touch "$STUBS/noticed"; kill -USR1 "$(cat "$STUBS/job")"
        fi
        worst=0
        for one in "${started[@]}"; do
            while :; do wait "$one"; code=$?; kill -0 "$one" 2>/dev/null || break; done
            wait "$one" 2>/dev/null; again=$?; [ $again = 127 ] || code=$again
            [ $code -gt $worst ] && worst=$code
        done
        exit $worst
    """,
    "scontrol": """
        if [ "$1" = requeue ]; then echo "$2" >> "$STUBS/requeues"; touch "$STUBS/requeued"; else echo here; fi
    """,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text("#!/bin/bash\n" + textwrap.dedent(text))
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUBS", str(stubs))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as a task of one processor has it
    monkeypatch.chdir(tmp_path)
    return stubs


def magic(folder: Path, run: str) -> list[str]:
    if not (folder / "model").exists():
        tiny.save_model(folder / "model")
        tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(40))
        tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    return ["magic", run, "--model", "model", "--data.dataset", "train.jsonl", "--query.dataset", "query.jsonl",
            "--train.batch_size", "2", "--train.epochs", "2", "--device", "cpu", "--replay.heartbeat", "3600"]  # fmt: skip


def submitted(*arguments: str) -> int:
    return main(["submit", "--gpus", "0", "--python", sys.executable, *arguments])


def lines(run: Path, phase: str) -> list[int]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in found if line["phase"] == phase]


def stand_in(folder: Path, text: str) -> str:
    """A program that is called in place of Python."""
    path = folder / "python.sh"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_job_that_a_notice_ends_is_put_back_once(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real commands in its place are slow; that they obey the signal is tested in test_train.py."""
    monkeypatch.setenv("NOTICE", "1")
    monkeypatch.setenv("JOURNAL", "journal")
    text = """
        [ -e stopped ] && exit 0
        trap 'touch stopped; exit 143' USR1
        echo begun > journal
        for ((k = 0; k < 600; k++)); do sleep 0.1; done
    """
    assert main(["submit", "--gpus", "0", "--python", stand_in(tmp_path, text), *magic(tmp_path, "jobs")]) == 0
    assert "stopped with exit code 143; requeued" in (slurm / "log.txt").read_text()
    assert (slurm / "requeues").read_text() == "7\n"
    assert (slurm / "exits").read_text() == "exit 0\nexit 0\n"


@pytest.mark.slow
@pytest.mark.parametrize("notice", [pytest.param(10, id="training"), pytest.param(50, id="on the way back")])
def test_a_job_whose_time_is_over_goes_on_to_the_same_bits(
    notice: int, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No heartbeat passes: all that there is to go on from is what the notice made durable."""
    monkeypatch.setenv("NOTICE", str(notice))
    monkeypatch.setenv("JOURNAL", "jobs/metrics.jsonl")
    assert submitted(*magic(tmp_path, "jobs")) == 0
    log = (slurm / "log.txt").read_text()
    assert "stopped at a durable point; the same command goes on" in log
    assert "stopped with exit code 143; requeued" in log
    assert (slurm / "requeues").read_text() == "7\n"
    assert (slurm / "exits").read_text() == "exit 0\nexit 0\n"
    monkeypatch.delenv("NOTICE")
    assert main(magic(tmp_path, "whole")) == 0
    ours, whole = (torch.load(tmp_path / run / "scores.pt", weights_only=True) for run in ("jobs", "whole"))
    assert torch.equal(ours, whole)
    assert sorted(lines(tmp_path / "jobs", "train")) == list(range(40)), "it went on and did not start over"


def test_a_job_that_fails_is_not_put_back(slurm: Path, tmp_path: Path) -> None:
    python = stand_in(tmp_path, "exit 2")
    assert main(["submit", "--gpus", "0", "--python", python, *magic(tmp_path, "jobs")]) == 0
    assert (slurm / "exits").read_text() == "exit 2\n"
    assert not (slurm / "requeues").exists()


def test_ranks_know_who_they_are_and_arrays_take_slices(slurm: Path, tmp_path: Path) -> None:
    """The command is a stand-in that says what it was told."""
    told = tmp_path / "told.sh"
    told.write_text('#!/bin/bash\necho "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> told.txt\n')
    told.chmod(0o755)
    job = ["submit", "--python", str(told), "--gpus", "2", "--nodes", "2"]
    assert main([*job, "train", "x", "--model", "an 'odd' name", "--data.dataset", "d"]) == 0
    assert sorted((tmp_path / "told.txt").read_text().splitlines()) == [
        f"{rank} {rank} 4 here 29507 -m retrograd train x --model an 'odd' name --data.dataset d" for rank in range(4)
    ]
    for subsets in (["--subsets", "10"], ["--subsets=10"]):
        (tmp_path / "told.txt").unlink()
        assert main(["submit", "--python", str(told), "--workers", "3", "validate", "run", *subsets]) == 0
        slices = re.findall(r"--start (\d+) --stop (\d+)", (tmp_path / "told.txt").read_text())
        assert slices == [("0", "3"), ("3", "6"), ("6", "10")]


def test_a_value_spelled_like_a_command_is_none() -> None:
    words = ["--name", "select", "--partition=train", "--extra", "constraint=h100", "--dry_run", "validate", "train"]
    found = _parse("submit", words)
    assert (found.submit.name, found.command, found.words) == ("select", "validate", "validate train")
    with pytest.raises(ValueError, match="takes a command after its own options"):
        _parse("submit", ["--name", "select"])


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_the_command_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = script(_parse("submit", ["--name", name, *EXAMPLES[name]]))
    assert (ROOT / f"examples/slurm/{name}.sbatch").read_text() == text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_every_recipe_with_a_command_has_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script's own words, given to a stand-in of `retrograd`; each is then parsed as the command line parses it."""
    stand_in = tmp_path / "retrograd"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> "$TOLD"; printf "\\n" >> "$TOLD"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MODELS", "a b")
    monkeypatch.chdir(ROOT)
    subprocess.run(["bash", "examples/slurm/recipes.sh", "--partition", "gpu"], check=True)
    jobs = [line.split("\0")[:-1] for line in (tmp_path / "told").read_text().splitlines()]
    asked = [_parse("submit", words[1:]) for words in jobs]
    assert all(one.submit.partition == "gpu" for one in asked)
    heads = {"magic": 0, "unlearn": 0, "experiment": 0, "attack": 0}
    for one in asked:
        assert script(one)
        heads[one.command] += 1
    head = re.compile(r"^# +retrograd (magic|unlearn|experiment) [^#\\\n]*$", re.MULTILINE)
    found = [match[1] for path in Path("recipes").rglob("*.yaml") if (match := head.search(path.read_text()))]
    for command in ("magic", "unlearn", "experiment"):
        assert heads[command] == found.count(command) > 0
    assert heads["attack"] == len(list(Path("recipes/attack").glob("*.yaml")))
    assert len({one.submit.name for one in asked}) == len(asked), "names are files"


REFUSED = {
    "takes a command after its own options, one of train, magic": ["--gpus", "2"],
    "and none is in 'report runs/x'": ["report", "runs/x"],
    "--notice is 120 seconds and --time 00:02:00 is 120": ["--time", "00:02:00", "verify", "x"],
    "--notice is 300 seconds and --time 4:59 is 299": ["--notice", "300", "--time", "4:59", "verify", "x"],
    "--time 0-01 is 3600": ["--notice", "3600", "--time", "0-01", "verify", "x"],
    "--workers 2 gives each job a slice of the 50 subsets, and --start 5": ["--workers", "2", "validate", "x", "--start", "5"],
    "cannot be parsed, see above": ["magic", "x", "--no_such_setting", "1"],
    "--nodes is 0": ["--nodes", "0", "verify", "x"],
    "--extra is '--qos'; write an option": ["--extra=--qos", "verify", "x"],
    "--gpus is -1; it has to be 0 or more": ["--gpus", "-1", "verify", "x"],
    "--time is 'soon'; write it as SLURM does": ["--time", "soon", "verify", "x"],
    "--name is 'a b'; use letters": ["--name", "a b", "verify", "x"],
    "verify runs in one process, and --nodes 1 with --gpus 4 are 4": ["--gpus", "4", "verify", "x"],
    "--workers 3 would run the same verify 3 times": ["--workers", "3", "verify", "x"],
    "--workers 2 jobs of 2 ranks": ["--workers", "2", "--gpus", "2", "validate", "x"],
    "--workers 60 for 50 subsets leaves some without any": ["--workers", "60", "validate", "x"],
    "--replicas is 2, and --nodes 3 with --gpus 1 are 3 ranks": [
        "--nodes", "3", "train", "x", "--model", "m", "--data.dataset", "d", "--parallel", "shard", "--replicas", "2"
    ],
    "there is no sbatch here": ["verify", "x"],
    "--via submitit": ["--via", "submitit", "--gpus", "2", "validate", "x"],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_submitted_is_refused(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *REFUSED[message]]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_sbatch_refuses_is_told(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm / "sbatch").write_text("#!/bin/bash\necho invalid partition >&2; exit 1\n")
    assert main(["submit", "verify", "x"]) == 2
    assert "sbatch refused slurm/retrograd-verify.sbatch: invalid partition" in capsys.readouterr().err


def test_a_command_of_submitit_ends_durably_and_is_submitted_anew(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    waits = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143)); print(1, flush=True); time.sleep(60)"
    job = Resumed([sys.executable, "-c", waits], None)
    job.process = subprocess.Popen(job.command, stdout=subprocess.PIPE)
    assert job.process.stdout is not None
    job.process.stdout.readline()
    again = job.checkpoint()
    assert job.process.returncode == 143
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function.command == job.command
    assert Resumed([sys.executable, "-c", ""], "true")() == 0
    with pytest.raises(RunError, match="ended with exit code 3"):
        Resumed([sys.executable, "-c", "raise SystemExit(3)"], None)()


def test_submitit_gets_the_job(slurm: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    (slurm / "sbatch").write_text('#!/bin/bash\ncp "$1" "$STUBS/given"; echo Submitted batch job 12\n')
    assert (
        main(
            [
                "submit",
                "--via",
                "submitit",
                "--gpus",
                "0",
                "--time",
                "60",
                "--account",
                "me",
                "--extra",
                "qos=low",
                "verify",
                "x",
            ]
        )
        == 0
    )
    text = (slurm / "given").read_text()
    for option in ("--job-name=retrograd-verify", "--account=me", "--qos=low", "--signal=USR2@120"):
        assert f"#SBATCH {option}" in text
