"""Copies of states between host memory and the device that computes, beside the computation.

On a GPU a copy goes through a page-locked buffer, one each way, on a stream of its own, after an event of the computing
stream. The thread that copies waits for the end before it lets go of what it copies, so that no memory is reused under
way. On a CPU a state is in host memory already, and handed on as it is: nothing in a step writes in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.step import State
from retrograd.runs.states.buffers import copy_alone, leave_empty, packed, pinned

__all__ = ["Copies"]


class Copies:
    """Between host memory and the devices of one run's states; `down` and `up` are for one thread.

    Args:
        like: A state, for its devices and shapes.
    """

    def __init__(self, like: State) -> None:
        devices = {leaf.device for leaf in tree.leaves(like)}
        self.on_host = all(device.type == "cpu" for device in devices)
        self.like = like
        self.stream: torch.cuda.Stream | None = None
        if len(devices) == 1 and not self.on_host and next(iter(devices)).type == "cuda":
            self.stream = torch.cuda.Stream(next(iter(devices)))
        self._pinned: dict[str, State] = {}  # made when first used

    def begin(self) -> torch.cuda.Event | None:
        """What the calling thread's stream has been given so far: a copy has to come after it."""
        return None if self.stream is None else torch.cuda.current_stream(self.stream.device).record_event()

    def room(self) -> State | None:
        """Device memory for a state, taken by the thread that will use it; None where no copy is needed."""
        return None if self.stream is None else tree.map(torch.empty_like, self.like)

    def down(self, state: State, after: torch.cuda.Event | None) -> State:
        """A state in host memory; on a GPU in a buffer that is valid until the next call."""
        if self.stream is None or after is None:
            return tree.map(Tensor.cpu, state)  # on a CPU the state itself
        return self._copied(state, self._pin("down"), after)._replace(step=state.step)

    def up(self, host: State, room: State | None, after: torch.cuda.Event | None) -> State:
        """A state of host memory on the devices of the run's states, in `room` where there is one."""
        if room is None or after is None:
            return tree.map(lambda x, like: x.to(like.device), host, self.like)
        buffer = self._pin("up")
        tree.map(copy_alone, buffer, host)
        return self._copied(buffer, room, after)._replace(step=host.step)

    def _copied(self, source: State, target: State, after: torch.cuda.Event) -> State:
        assert self.stream is not None, "only a GPU's copies go by a stream"
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            tree.map(lambda to, x: to.copy_(x, non_blocking=True), target, source)
        self.stream.synchronize()
        return target

    def _pin(self, way: str) -> State:
        if way not in self._pinned:
            self._pinned[way] = packed(self.like, leave_empty, pinned)
        return self._pinned[way]
