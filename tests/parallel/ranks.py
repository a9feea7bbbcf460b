"""Several ranks of a test: forked processes with gloo on this machine, which have torch loaded already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrograd.cli import main
from retrograd.parallel.group import joined

LIMIT = 300  # seconds for all that the ranks of one call do


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any, patience: float = 30.0) -> list[Any]:
    """function(group, *arguments) on every rank of a job of `world` processes: its results, in the order of ranks."""

    def run(rank: int) -> Any:
        with joined(patience) as group:
            return function(group, *arguments)

    return forked(world, run)


def command(world: int, arguments: list[str]) -> list[int]:
    """The exit codes of a command of `world` ranks."""
    return forked(world, lambda rank: main(arguments))


def forked(
    world: int,
    function: Callable[[int], Any],
    stopped: Path | None = None,
    during: Callable[[list[Any]], None] = lambda processes: None,
) -> list[Any]:
    """function(rank) in `world` processes with the environment of torchrun; a SystemExit's code counts as a result.

    A process that died has the negative number of its signal as its result. The one whose number is in the file
    `stopped` is killed once rank 0 is done; `during` is given the processes once all have started.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, function, theirs))
        process.start()
        theirs.close()
        jobs.append((process, ours))
    during([process for process, _ in jobs])
    found = [_result(*jobs[0])]
    if stopped is not None:
        os.kill(int(stopped.read_text()), signal.SIGKILL)
    found += [_result(*job) for job in jobs[1:]]
    for process, _ in jobs:
        process.join(LIMIT)
    failed = [one for one in found if isinstance(one, _Failed)]
    if failed:
        raise AssertionError("\n".join(one.text for one in failed))
    return found


class _Failed:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(rank: int, world: int, port: int, function: Callable[[int], Any], pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo", TORCH_CPP_LOG_LEVEL="ERROR",
    )  # fmt: skip
    try:
        found = function(rank)
    except SystemExit as end:
        found = end.code
    except BaseException:
        found = _Failed(f"rank {rank}: {traceback.format_exc()}")
    with contextlib.suppress(OSError):
        pipe.send_bytes(pickle.dumps(found))
    os._exit(0)


def _result(process: Any, pipe: Any) -> Any:
    if not pipe.poll(LIMIT):
        process.kill()
        return _Failed(f"a rank was not done in {LIMIT} s")
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return process.exitcode
