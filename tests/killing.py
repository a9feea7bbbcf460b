"""A command that is killed on its way: a forked process, which has torch loaded already."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from retrograd.cli import main

__all__ = ["kill_after"]


def kill_after(
    arguments: list[str], run: Path, phase: str, step: int, *, patience: float = 120, fresh: bool = False
) -> None:
    """Start the command and kill -9 it once its journal shows this step.

    Args:
        fresh: In a new interpreter, for what cannot be forked.
    """
    wanted, deadline = f'"phase": "{phase}", "step": {step},', time.monotonic() + patience
    journal = run / "metrics.jsonl"
    end = _start(arguments, fresh=fresh)
    while end.alive() and time.monotonic() < deadline:
        if journal.exists() and wanted in journal.read_text():
            break
        time.sleep(0.001)
    end.kill()


class _Started:
    def __init__(self, process: Any, *, fresh: bool) -> None:
        self.process, self.fresh = process, fresh

    def alive(self) -> bool:
        return self.process.poll() is None if self.fresh else self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        if self.fresh:
            self.process.wait()
        else:
            self.process.join()


def _start(arguments: list[str], *, fresh: bool) -> _Started:
    if fresh:
        command = [sys.executable, "-m", "retrograd", *arguments]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return _Started(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet), fresh=True)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments,))
    process.start()
    return _Started(process, fresh=False)


def _run(arguments: list[str]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os._exit(main(arguments))
