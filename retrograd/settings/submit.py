"""The configuration of `retrograd submit`: what a job asks of SLURM. No heavy imports here."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from retrograd.settings.train import at_least_1

__all__ = ["PARALLEL", "SUBMITTED", "SubmitConfig", "SubmitOf", "check_submit"]

SUBMITTED = ("train", "magic", "query", "unlearn", "validate", "verify", "metasmoothness", "attack", "evaluate",
             "experiment", "harden", "select", "compare")  # fmt: skip
PARALLEL = ("train", "magic", "unlearn", "validate", "evaluate")  # commands that ranks share


@dataclass(frozen=True)
class SubmitConfig:
    """Hand a command to SLURM, as a job that survives preemption and its own time limit.

    After the options of the job come the command and its arguments, as they would be typed. The script is written,
    shown with --dry_run, and given to sbatch. When time is nearly over, or the job is preempted, the command comes to a
    durable point and the job is put back into the queue; started again, it goes on.
    """

    name: str | None = None
    """Of the job; the command's when None."""
    folder: Path = Path("slurm")
    """Where scripts and logs go."""
    nodes: int = 1
    """Nodes of a job; more than one are ranks of one command."""
    gpus: int = 1
    """GPUs of a node, each with a process; 0 for a job of processors."""
    workers: int = 1
    """Jobs of an array, each running the command: workers of an experiment, or slices of a validation."""
    cpus: int = 8
    """Processors for each process."""
    memory: str | None = None
    """Memory of a node, as SLURM writes it, such as 200G."""
    time: str = "04:00:00"
    """Time limit, as SLURM writes it. A run that takes longer goes on in the same job, started again."""
    notice: int = 120
    """Seconds before the limit at which the command is asked to come to a durable point."""
    partition: str | None = None
    account: str | None = None
    extra: tuple[str, ...] = ()
    """Further options of sbatch without their dashes, such as constraint=h100."""
    setup: str | None = None
    """Lines of shell before the command, such as "module load cuda; source .venv/bin/activate"."""
    python: str = "python"
    """The interpreter on the nodes."""
    via: Literal["sbatch", "submitit"] = "sbatch"
    """Who submits: sbatch with a script, or submitit (the extra `submitit`) with files of its own, for one process."""
    dry_run: bool = False
    """Print the script, write and submit nothing."""


class SubmitOf(NamedTuple):
    """A job of a command, with that command's arguments as they were typed, and the configuration they come to."""

    submit: SubmitConfig
    command: str
    arguments: tuple[str, ...]
    config: Any

    @property
    def words(self) -> str:
        """The command as a shell reads it."""
        return shlex.join([self.command, *self.arguments])


def check_submit(asked: SubmitOf) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    job, command = asked.submit, asked.command
    at_least_1({"nodes": job.nodes, "workers": job.workers, "cpus": job.cpus, "notice": job.notice})
    if odd := [option for option in job.extra if not re.fullmatch(r"[a-z][\w-]*=.+", option)]:
        raise ValueError(f"--extra is {odd[0]!r}; write an option of sbatch as name=value, such as constraint=h100")
    if job.gpus < 0:
        raise ValueError(f"--gpus is {job.gpus}; it has to be 0 or more")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", job.time):
        raise ValueError(f"--time is {job.time!r}; write it as SLURM does: minutes, hours:minutes:seconds, days-hours")
    if 0 < (limit := _seconds(job.time)) <= job.notice:
        raise ValueError(
            f"--notice is {job.notice} seconds and --time {job.time} is {limit}: the job would be stopped and requeued "
            "as soon as it starts, for ever; give a longer time or a shorter notice"
        )
    if job.name is not None and not re.fullmatch(r"[\w.-]+", job.name):
        raise ValueError(f"--name is {job.name!r}; use letters, digits, '.', '_' and '-', for it names files")
    ranks = job.nodes * max(1, job.gpus)
    if ranks > 1 and command not in PARALLEL:
        raise ValueError(
            f"{command} runs in one process, and --nodes {job.nodes} with --gpus {job.gpus} are {ranks}: give --gpus "
            "1, and --workers for an experiment"
        )
    replicas = getattr(asked.config, "replicas", 1)
    if ranks % replicas:
        raise ValueError(
            f"--replicas is {replicas}, and --nodes {job.nodes} with --gpus {job.gpus} are {ranks} ranks, which it "
            f"does not divide: with --replicas {job.nodes} each node is a replica"
        )
    if job.workers > 1 and command not in ("experiment", "validate"):
        raise ValueError(f"--workers {job.workers} would run the same {command} {job.workers} times; leave it out")
    if job.workers > 1 and ranks > 1:
        raise ValueError(
            f"--workers {job.workers} jobs of {ranks} ranks: an array is of single processes; give one of the two"
        )


def _seconds(time: str) -> int:
    """Of a time limit as SLURM writes it; 0 is no limit."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(part * unit for part, unit in zip(parts, units))
