"""What fresh memory costs, and how to keep that out of a measurement.

A virtual machine's host may take back what is free and give it again at first touch, zeroed page by page. A run that
keeps states touches much of it, a plain loop little. `--hold` keeps the free memory of the machine, all but some, and
lets go of it as others take it, so that they get what the machine has already.

    python bench/memory.py                # seconds per GiB, touched first and touched again
    python bench/memory.py --hold 1       # until killed or nothing is left to give; prints a line once it holds
"""

from __future__ import annotations

import argparse
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from sys import executable

GIB, CHUNK = 1 << 30, 128 << 20


def touched(size: int) -> mmap.mmap:
    """Memory in huge pages, every page written."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for place in range(0, size, mmap.PAGESIZE):
        memory[place] = 1
    return memory


def free() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))


def hold(left: int) -> None:
    """Keep all but `left` bytes free, and never less than that while there is something to give."""
    held = []
    while free() > left + CHUNK:
        held.append(touched(CHUNK))
    print(f"holding {len(held) * CHUNK / GIB:.1f} GiB", flush=True)
    while held:
        short = left - free()
        for _ in range(min(len(held), -(-short // CHUNK))):
            held.pop().close()
        time.sleep(0.01)


@contextmanager
def holding(gibibytes: float | None) -> Iterator[None]:
    """In which another process holds the machine's memory but for so much; None for not."""
    if gibibytes is None:
        yield
        return
    with Popen([executable, __file__, "--hold", str(gibibytes)], stdout=PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hold", type=float, metavar="GIB", help="hold all free memory but so much")
    arguments = parser.parse_args()
    if arguments.hold is not None:
        return hold(int(arguments.hold * GIB))
    for turn in ("first", "again"):
        start = time.perf_counter()
        touched(GIB).close()
        print(f"touched {turn}: {time.perf_counter() - start:.2f} s per GiB")


if __name__ == "__main__":
    main()
