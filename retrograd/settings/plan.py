"""The configuration of `retrograd plan`: for what machine, and what stands in for what is not there.

No heavy imports here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from retrograd.settings.parse import parse_size
from retrograd.settings.train import at_least_1

__all__ = ["HARDWARE", "PLANNED", "Hardware", "PlanConfig", "PlanOf", "Precision", "check_plan"]

Precision = Literal["float32", "tf32", "bfloat16"]
PLANNED = ("train", "magic", "unlearn", "validate", "experiment")  # commands


class Hardware(NamedTuple):
    """A GPU by its data sheet.

    memory, host: bytes on it, and on its host. bandwidth, link: bytes/s of its memory, and to the host. peak: dense
    operations a second, a multiply-add counted as two.
    """

    memory: int
    host: int
    bandwidth: float
    link: float
    peak: dict[Precision, float]


_H100: dict[Precision, float] = {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12}

# NVIDIA's data sheets of H100 SXM, H200 SXM and GH200 (96 GB); rates without sparsity. The host's memory is what nodes
# of eight have for each (2 TB), and the 480 GB of a GH200. Links: PCIe 5.0 ×16, and NVLink-C2C in one direction.
HARDWARE: dict[str, Hardware] = {
    "h100": Hardware(80 * 10**9, 250 * 10**9, 3.35e12, 64e9, _H100),
    "h200": Hardware(141 * 10**9, 250 * 10**9, 4.8e12, 64e9, _H100),
    "gh200": Hardware(96 * 10**9, 480 * 10**9, 4.0e12, 450e9, _H100),
}
"""By name."""


@dataclass(frozen=True)
class PlanConfig:
    """What a command would take, before it is run: rows, steps, states, replays, memory, disk, time. Nothing is trained
    or written.

    After COMMAND (train, magic, unlearn, validate or experiment) come its own arguments. By default model and data are
    loaded as the command loads them, and three steps are taken and pulled back, to time them. With --rate, --hardware,
    --rows or --model_only only the configuration of the model is read, which need not be there, and time is arithmetic.
    """

    hardware: Literal["here", "h100", "h200", "gh200"] = "here"
    """The GPU it is to run on, by its data sheet; here: this machine."""
    rate: float | None = None
    """Operations a second of one rank, such as 5e13, a multiply-add counted as two, in place of steps timed here."""
    model_only: bool = False
    """Take no step: memory, disk and replays alone, from the model's configuration."""
    efficiency: float = 0.4
    """Share of the data sheet's rate that --hardware is taken to reach. A guess: this version has not measured it."""
    ranks: int = 1
    """Processes that share each step, one a device."""
    layout: Literal["auto", "replicate", "shard"] = "auto"
    """What ranks divide: the rows of a step alone, or parameters, states, gradients and cotangents too; auto takes the
    run's --parallel, and where that is auto, replicate."""
    memory: str | None = None
    """Memory of one device, such as 80GB; what --hardware has, or this machine has free, when None."""
    host: str | None = None
    """Host memory for one rank; likewise."""
    disk: str | None = None
    """Disk for one rank; what is free where the run would be when None."""
    disk_rate: float | None = None
    """Bytes a second that states are written and read with. When None: 5e9 with --hardware, a guess; here a file of 64
    MB is written where states would be, timed and removed, if any would be on disk."""
    rows: int | None = None
    """As if each data set had so many rows: none is read."""
    row_tokens: int | None = None
    """Tokens of each of those rows."""
    questions: int | None = None
    """As if the queries asked so many rows in all."""
    question_tokens: int | None = None
    """Tokens of each of those."""
    json: Path | None = None
    """Also write all numbers here."""

    @property
    def by_arithmetic(self) -> bool:
        """Whether nothing is timed."""
        return self.rate is not None or self.hardware != "here" or self.model_only or self.rows is not None


class PlanOf(NamedTuple):
    """A plan of a command, with that command's own configuration."""

    plan: PlanConfig
    command: str
    config: Any


def check_plan(config: PlanConfig) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    at_least_1({"ranks": config.ranks, "rows": config.rows, "questions": config.questions})
    for name, size in (("memory", config.memory), ("host", config.host), ("disk", config.disk)):
        if size is not None and parse_size(size) < 0:
            raise ValueError(f"--{name} is {size}; it has to be a size, such as 80GB")
    if config.rate is not None and not (math.isfinite(config.rate) and config.rate > 0):
        raise ValueError(f"--rate is {config.rate}; it is operations a second, above 0, such as 5e13")
    if config.disk_rate is not None and not (math.isfinite(config.disk_rate) and config.disk_rate > 0):
        raise ValueError(f"--disk_rate is {config.disk_rate}; it is bytes a second, above 0, such as 2e9")
    if not 0 < config.efficiency <= 1:
        raise ValueError(
            f"--efficiency is {config.efficiency}; it is a share of the data sheet's rate, above 0 up to 1"
        )
    for count, tokens in (("rows", "row_tokens"), ("questions", "question_tokens")):
        given = (getattr(config, count), getattr(config, tokens))
        if (given[0] is None) != (given[1] is None):
            raise ValueError(f"--{count} is {given[0]} and --{tokens} {given[1]}: give both, or neither")
        if given[1] is not None and given[1] < 2:
            raise ValueError(f"--{tokens} is {given[1]}; a row without a token to predict is no row, so at least 2")
