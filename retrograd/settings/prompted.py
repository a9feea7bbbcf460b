"""Attacks that find a prompt while the model stays as it is, as data. No heavy imports here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retrograd.settings.train import at_least_1, finite

__all__ = ["Prompted"]


@dataclass(frozen=True)
class Prompted:
    """Find what to put into every question, on half A's questions, with the model frozen."""

    prompt: Literal["suffix", "latent"] = "latent"
    """suffix: tokens, found by greedy coordinate gradient; latent: vectors in place of embeddings, found by Adam."""
    tokens: int = 8
    """Of the prompt, or vectors."""
    place: Literal["before", "after"] = "before"
    """Before the question, or after it, where the answer follows."""
    steps: int = 100
    """Exchanges of a token, or steps of Adam."""
    batch_size: int = 16
    """Questions of half A that a step reads."""
    candidates: int = 64
    """suffix: exchanges that a step tries."""
    best: int = 32
    """suffix: tokens of each place that it draws them from, the best by the gradient."""
    lr: float = 0.1
    """latent: learning rate, in units of the embeddings' own size (root mean square)."""
    seed: int = 0
    """Of the start, the questions of each step and the exchanges that are tried."""

    @property
    def probe(self) -> bool:
        return False

    @property
    def readable(self) -> str:
        """What tells it from its neighbours, for people."""
        rate = f"-{self.lr:g}" if self.prompt == "latent" else ""
        return f"{self.prompt}-{self.tokens}-{self.place}{rate}-{self.steps}-s{self.seed}"

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: With the setting, its value and what it has to be.
        """
        at_least_1({name: getattr(self, name) for name in ("tokens", "steps", "batch_size", "candidates", "best")})
        finite({"lr": self.lr})
