"""What a run is planned for: memory, disk and, where nothing is timed, rates."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from retrograd.runs.run_folder import free_disk
from retrograd.runs.states.budget import free_memory
from retrograd.settings.parse import parse_size
from retrograd.settings.plan import HARDWARE, PlanConfig, Precision

__all__ = ["Machine", "machine_of", "resident"]


class Machine(NamedTuple):
    """One rank's share of what there is.

    Args:
        name: For people.
        memory: Bytes of the device; None where it is the host's.
        host, disk: Bytes free.
        ranks, shards: Processes, and how many of them, those of a replica, divide states and parameters.
        rate: Operations a second that are counted on; None where steps are timed, or nothing is.
        peak: Those of the data sheet.
        bandwidth, link: Bytes/s of the device's memory, and to the host; None where not known.
        base: Bytes that a process takes before it has a model.
        disk_rate: Bytes/s that states are written and read with; None where not known, and then no time is counted.
    """

    name: str
    memory: int | None
    host: int
    disk: int
    ranks: int
    shards: int
    rate: float | None
    peak: float | None
    bandwidth: float | None
    link: float | None
    base: int
    disk_rate: float | None = None

    @property
    def replicas(self) -> int:
        """Copies of what is divided; 1 where nothing is."""
        return self.ranks // self.shards if self.shards > 1 else 1


DISK = 5e9  # bytes/s of an NVMe disk: a guess
_CONTEXT = 10**9  # bytes of a GPU that CUDA and its libraries take: a guess


def machine_of(
    config: PlanConfig,
    run: Path,
    device: torch.device,
    precision: Precision | None,
    parallel: str = "auto",
    replicas: int = 1,
) -> Machine:
    """The machine of a configuration; `device` is that of a run here, `precision` that of its products.

    Args:
        parallel, replicas: The run's own.
    Raises:
        ValueError: If the data sheet has no rate of that precision and none is given, or the ranks are not so many
            replicas.
    """
    if config.ranks % replicas:
        raise ValueError(
            f"--ranks is {config.ranks} and the run's --replicas {replicas}, which has to divide it: each replica is "
            "as many ranks"
        )
    divided = "shard" in (config.layout, parallel if config.layout == "auto" else "")
    shards = config.ranks // replicas if divided else 1
    disk = parse_size(config.disk) if config.disk else free_disk(run)
    memory, host = (parse_size(size) if size else None for size in (config.memory, config.host))
    if config.hardware == "here":
        if memory is None and device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        host = host or free_memory()
        base = _process() if device.type == "cpu" else _CONTEXT
        return Machine(
            "this machine",
            memory,
            host,
            disk,
            config.ranks,
            shards,
            config.rate,
            None,
            None,
            None,
            base,
            config.disk_rate,
        )
    sheet = HARDWARE[config.hardware]
    if precision is None and config.rate is None:
        raise ValueError(
            f"--hardware {config.hardware} has rates of {', '.join(sheet.peak)} only, and this run is in float64: give "
            "--rate, or plan it in float32"
        )
    peak = None if precision is None else sheet.peak[precision]
    return Machine(
        config.hardware.upper(), memory or sheet.memory, host or sheet.host, disk, config.ranks, shards,
        config.rate or config.efficiency * (peak or 0.0), peak, sheet.bandwidth, sheet.link, _CONTEXT,
        config.disk_rate or DISK,
    )  # fmt: skip


def _process() -> int:
    """Bytes of a process that has its libraries and no model yet."""
    import datasets  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    return resident()


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory now (VmRSS) or at its peak (VmHWM); 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
