"""The proof of a run's first step, which a wish to end the process interrupts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retrograd.core.engine import Double
from retrograd.core.step import Engine, Objective, State, Training
from retrograd.lm.model import CausalLM
from retrograd.parallel.group import here
from retrograd.proofs import first_step
from retrograd.runs.errors import StoppedError, asked_to_stop

__all__ = ["prove_first_step"]


def prove_first_step(
    training: Training, initial: State, model: CausalLM, objective: Objective | None, *, attributed: bool
) -> None:
    """The first step is a function; of an attributed run, that its pullback is that function's derivative too.

    It may take minutes, and nothing is begun that would have to be made durable: a wish to end is obeyed on the way.
    """
    module = model.module
    if attributed:
        # the model's own loss takes each row by itself; of another one that is not known
        rows = 2 if objective is None else None
        double = Double(model.objective if objective is None else objective)
        first_step.prove(training._replace(engine=_heeding(double)), initial, module, objective, rows=rows)
        return
    if objective is not None:
        first_step.prove_reached(training, initial, objective, module)
    first_step.prove_pure(training._replace(engine=_heeding(training.engine)), initial, module)


@dataclass(frozen=True)
class _Heeding:
    """An engine that ends before a gradient or a pullback if somebody asked the process to."""

    engine: Engine

    @property
    def linear(self) -> bool:
        return self.engine.linear

    def gradient(self, *given: Any) -> Any:
        self._heed()
        return self.engine.gradient(*given)

    def linearize(self, *given: Any) -> Any:
        self._heed()
        return self.engine.linearize(*given)

    def pullback(self, *given: Any) -> Any:
        self._heed()
        return self.engine.pullback(*given)

    def _heed(self) -> None:
        if asked_to_stop():
            raise StoppedError


def _heeding(engine: Engine) -> Any:
    return _Heeding(engine) if here().world == 1 else engine  # ranks end together, at a step
