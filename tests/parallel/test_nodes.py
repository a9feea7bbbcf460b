"""Two torchrun agents on one machine, as two nodes have one each: a job of four ranks that meet by their rendezvous."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from test_job import MESH, arguments, scores, world  # noqa: F401  (a fixture)

from retrograd.cli import main

LIMIT = 200  # seconds


@contextmanager
def nodes(asked: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """An agent with two ranks on each of two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}",
           "--rdzv-id", "retrograd"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *job, "-m", "retrograd", *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    given = {"text": True, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "env": environment}
    agents = [subprocess.Popen(command, **given) for _ in range(2)]  # type: ignore[call-overload]
    try:
        yield agents
    finally:
        for agent in agents:
            lose(agent)
            agent.communicate()


def lose(agent: subprocess.Popen[str]) -> None:
    """End an agent and its ranks, as if their node were gone."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    with suppress(OSError):
        for pid in (agent.pid, *map(int, children.read_text().split())):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_two_agents_have_a_replica_each(world: Path) -> None:  # noqa: F811
    run, whole = world / "nodes", world / "one-node"
    asked = arguments(world, run, "blocks", "--replay.heartbeat", "0", *MESH)
    with nodes(asked) as agents:
        until = time.monotonic() + LIMIT
        while not list(run.glob("checkpoints/of-2x2/rank-2/state-*")) and time.monotonic() < until:
            time.sleep(0.05)
        lose(agents[1])
        _, error = agents[0].communicate(timeout=LIMIT)
        assert agents[0].returncode == 1
        assert re.search("rank .* has stopped|the job's store is gone", error)
    with nodes(asked) as agents:
        codes = [(agent.communicate(timeout=LIMIT)[1], agent.returncode) for agent in agents]
        assert [code for _, code in codes] == [0, 0], codes
    assert main(arguments(world, whole, "blocks", "--shards", "4")) == 0
    assert torch.equal(scores(run), scores(whole))
