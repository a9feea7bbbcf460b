"""`retrograd submit`: a command as a job of SLURM that is put back into the queue until it is done.

The job's shell gets the notice (`--signal=B:`) and sends it on to srun, which sends it to the command. That comes to a
durable point and ends with 143; the shell then requeues the job, which starts anew and goes on. What is killed without
notice goes on from its last durable point too. Ranks are processes of srun with what `torchrun` would tell them in
their environment: no agent stands between them and the signal.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

from rich.console import Console

from retrograd.runs.errors import RunError
from retrograd.runs.files import write_atomic
from retrograd.settings.submit import SubmitOf, check_submit

__all__ = ["Resumed", "script", "submit"]

_PORT = 29_500
_BODY = """\
set -uo pipefail
{setup}export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}
{ranks}
signals=0 again=0
pass_on() {{ signals=$((signals + 1)); kill -USR1 "$step" 2>/dev/null; }}
trap 'again=1; pass_on' USR1   # time is nearly over
trap pass_on TERM   # cancelled; or preempted, and then SLURM requeues the job itself
srun {srun} &
step=$!
while :; do   # a signal ends a wait, not the step
    before=$signals; wait "$step"; code=$?
    [ "$signals" = "$before" ] && break
done
if [ "$again" = 1 ] && [ "$code" != 0 ]; then
    echo "stopped with exit code $code; requeued"
    scontrol requeue "{job}"
    exit 0
fi
exit "$code"
"""
_RANKS = """\
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$(({port} + SLURM_JOB_ID % 1000)) WORLD_SIZE=$SLURM_NTASKS"""
_RANK = "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "


def submit(asked: SubmitOf, console: Console | None = None) -> None:
    """Write a job's script and hand it to SLURM.

    Raises:
        ValueError: If the job cannot work, or there is no SLURM here.
    """
    console = console or Console()
    check_submit(asked)
    if asked.submit.via == "submitit" and not asked.submit.dry_run:
        console.print(f"job {_by_submitit(asked)}, by submitit; its files are in {asked.submit.folder}")
        return
    text = script(asked)
    if asked.submit.dry_run:
        console.print(text, markup=False, highlight=False, soft_wrap=True, end="")
        return
    path = asked.submit.folder / f"{_name(asked)}.sbatch"
    asked.submit.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf8"))
    console.print(f"job {_by_sbatch(path)}: {path}")


def script(asked: SubmitOf) -> str:
    """The job as sbatch takes it."""
    job = asked.submit
    ranks = job.nodes * max(1, job.gpus)
    log = "%x-%A_%a.txt" if job.workers > 1 else "%x-%j.txt"
    options = [
        f"--job-name={_name(asked)}", f"--output={job.folder}/{log}", "--open-mode=append", f"--nodes={job.nodes}",
        f"--ntasks-per-node={max(1, job.gpus) if ranks > 1 else 1}", f"--cpus-per-task={job.cpus}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []), *([f"--mem={job.memory}"] if job.memory else []),
        *([f"--array=0-{job.workers - 1}"] if job.workers > 1 else []), f"--time={job.time}", "--requeue",
        f"--signal=B:USR1@{job.notice}", *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []), *(f"--{option}" for option in job.extra),
    ]  # fmt: skip
    head = "".join(f"#SBATCH {option}\n" for option in options)
    command = f"{job.python} -m retrograd {asked.words}"
    if ranks > 1:
        inner = f"{_RANK}{command}".replace("'", "'\\''")
        srun = f"--kill-on-bad-exit=1 bash -c '{inner}'"
    else:
        srun = command + (_slice(asked) if asked.command == "validate" else "")
    number = "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" if job.workers > 1 else "$SLURM_JOB_ID"
    given = f"{job.setup}\n" if job.setup else ""
    body = _BODY.format(setup=given, ranks=_RANKS.format(port=_PORT) if ranks > 1 else "", srun=srun, job=number)
    return f"#!/bin/bash\n{head}{re.sub(chr(10) + '{2,}', chr(10), body)}"


def _slice(asked: SubmitOf) -> str:
    """Of a validation's subsets, those of this job of the array."""
    if asked.submit.workers == 1:
        return ""
    count, jobs = asked.config.subsets, asked.submit.workers
    if (asked.config.start, asked.config.stop) != (0, None):
        raise ValueError(
            f"--workers {jobs} gives each job a slice of the {count} subsets, and --start {asked.config.start} --stop "
            f"{asked.config.stop} is one slice already; leave these or --workers out"
        )
    if jobs > count:
        raise ValueError(f"--workers {jobs} for {count} subsets leaves some without any; give at most {count}")
    first, after = (f"$(({count} * (SLURM_ARRAY_TASK_ID{more}) / {jobs}))" for more in ("", " + 1"))
    return f" --start {first} --stop {after}"


def _name(asked: SubmitOf) -> str:
    return asked.submit.name or f"retrograd-{asked.command}"


def _by_sbatch(path: Path) -> str:
    _need("sbatch", f"; {path} is written")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"sbatch refused {path}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]


class Resumed:
    """A command for submitit: asked to make a checkpoint, it lets the command end durably and is submitted anew."""

    def __init__(self, command: list[str], setup: str | None) -> None:
        self.command, self.setup = command, setup
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run it; a failure is raised.

        Raises:
            RunError: If it ends with another code than 0.
        """
        first = f"{self.setup}\n" if self.setup else ""
        self.process = subprocess.Popen(["bash", "-c", f"{first}exec {shlex.join(self.command)}"])
        code = self.process.wait()
        if code:
            raise RunError(f"{shlex.join(self.command)} ended with exit code {code}; what it said is in the log")
        return code

    def checkpoint(self, *_: object) -> object:
        """The command again, once it has come to a durable point."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.send_signal(signal.SIGUSR1)
            self.process.wait()
        return DelayedSubmission(Resumed(self.command, self.setup))


def _by_submitit(asked: SubmitOf) -> str:
    """By submitit, as often put back into the queue as it takes.

    Raises:
        ValueError: If it is not installed, there is no SLURM, or the job is of several ranks or workers.
    """
    job = asked.submit
    try:
        from submitit import SlurmExecutor
    except ModuleNotFoundError as error:
        raise ValueError(
            '--via submitit needs the extra: pip install "retrograd[submitit]"; or leave it out'
        ) from error
    if job.nodes * max(1, job.gpus) * job.workers > 1:
        raise ValueError("--via submitit takes jobs of one process; leave it out for ranks and arrays")
    _need("srun", "")
    executor = SlurmExecutor(job.folder, max_num_timeout=1_000_000, python=job.python)
    extra = dict(option.split("=", 1) for option in job.extra)
    executor.update_parameters(
        job_name=_name(asked), time=job.time, cpus_per_task=job.cpus, signal_delay_s=job.notice,
        **({"gpus_per_node": job.gpus} if job.gpus else {}), **({"mem": job.memory} if job.memory else {}),
        **({"partition": job.partition} if job.partition else {}), **({"account": job.account} if job.account else {}),
        additional_parameters=extra,
    )  # fmt: skip
    return str(
        executor.submit(Resumed([job.python, "-m", "retrograd", asked.command, *asked.arguments], job.setup)).job_id
    )


def _need(program: str, more: str) -> None:
    if shutil.which(program) is None:
        raise ValueError(
            f"there is no {program} here{more}: submit where SLURM is, or look at the script with --dry_run"
        )
