"""The proof of a run's first step, which a wish to end the process interrupts.

With parameters in pieces and the `blocks` engine all processes prove it together, one block whole at a time. What takes
the model's own forward pass is done before its parameters are let go of: the chain's proof (`lm/chain_proof.py`), and
the loss of the first rows, which the engine in pieces has to give too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retrograd.core import tree
from retrograd.core.engine import Double
from retrograd.core.step import Engine, Objective, State, Training
from retrograd.lm.model import CausalLM
from retrograd.parallel.group import here
from retrograd.parallel.shard import ByBlock
from retrograd.proofs import first_step
from retrograd.runs.errors import StoppedError, asked_to_stop

__all__ = ["prove_by_block", "prove_first_step"]

_ROWS = 2  # are enough where each is taken by itself, as by the model's own loss


def prove_first_step(
    training: Training, initial: State, model: CausalLM, objective: Objective | None, *, attributed: bool
) -> None:
    """The first step is a function; of an attributed run, that its pullback is that function's derivative too.

    It may take minutes, and nothing is begun that would have to be made durable: a wish to end is obeyed on the way.
    """
    module = model.module
    if attributed:
        rows = _ROWS if objective is None else None  # of another one that is not known
        double = Double(model.objective if objective is None else objective)
        first_step.prove(training._replace(engine=_heeding(double)), initial, module, objective, rows=rows)
        return
    if objective is not None:
        first_step.prove_reached(training, initial, objective, module)
    first_step.prove_pure(training._replace(engine=_heeding(training.engine)), initial, module)


def prove_by_block(
    training: Training, initial: State, model: CausalLM, divide: Callable[[], Engine], *, attributed: bool
) -> Training:
    """Divide a training among processes and prove its first step with what each then has.

    Args:
        divide: Gives the engine over pieces, and lets go of the whole parameters.
        attributed: Whether a query is to come.
    Returns:
        The training with that engine.
    Raises:
        ValueError: As `first_step.prove`.
    """
    loss = first_step.loss_of(training, initial, model.objective, model.module, _ROWS) if attributed else None
    engine = divide()
    assert isinstance(engine, ByBlock), "what goes by block is divided by block"
    training = training._replace(engine=engine)
    with tree.lying(engine.lying):
        _prove(training, initial._replace(params=engine.first), model.module, loss)
    return training


def _prove(training: Training, own: State, module: nn.Module, loss: Tensor | None) -> None:
    if loss is not None:
        first_step.prove(training, own, module, rows=_ROWS, loss=loss)
    else:
        first_step.prove_pure(training, own, module)


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
