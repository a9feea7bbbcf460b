"""The rule of random numbers: a function of (seed, step, micro-batch), so that replay draws the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["random_draws"]


@contextmanager
def random_draws(seed: str | None, part: int) -> Iterator[None]:
    """Random numbers as a function of (seed, step, micro-batch), without disturbing the caller's."""
    if seed is None:
        yield
        return
    drawn = hashlib.blake2b(f"{seed}/{part}".encode(), digest_size=7).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(drawn))
        yield
