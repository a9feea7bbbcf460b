"""The processes of a torchrun job that each do whole pieces of work: models asked, sets left out, attacks carried out.

    torchrun --nproc-per-node 4 -m retrograd attack runs/x …

They meet only where one needs what the others have made. A process that dies is torchrun's to see: it ends the others.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from retrograd.parallel.group import ALONE, here

__all__ = ["Deal", "dealt"]

T = TypeVar("T")


class Deal:
    """This process among those of its job; alone without torchrun."""

    def __init__(self) -> None:
        if here() is not ALONE:  # rank 0 of a job whose steps are shared deals with nobody: the others serve it
            self.rank, self.world = 0, 1
            return
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def mine(self, work: Sequence[T]) -> Sequence[T]:
        """This process's share: every Nth piece of N processes."""
        return work[self.rank :: self.world]

    def neighbours(self, work: Sequence[T]) -> Sequence[T]:
        """This process's share, of pieces that follow each other."""
        return work[self.rank * len(work) // self.world : (self.rank + 1) * len(work) // self.world]

    def meet(self) -> None:
        """Wait until every process is here, for as long as it takes."""
        self.told(None)

    def told(self, value: T) -> T:
        """Rank 0's value on every process, once all are here."""
        from torch import distributed

        if self.world == 1:
            return value
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=datetime.timedelta(days=14))
        distributed.barrier()
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]


@contextlib.contextmanager
def dealt() -> Iterator[Deal]:
    """The job's processes while they deal out a command's work, each with a GPU of its own where there are several."""
    place = int(os.environ.get("LOCAL_RANK", 0))
    if 0 < place < torch.cuda.device_count():
        torch.cuda.set_device(place)
    deal = Deal()
    try:
        yield deal
    finally:
        from torch import distributed

        if deal.world > 1 and distributed.is_initialized():
            distributed.destroy_process_group()
