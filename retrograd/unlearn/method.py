"""The contract of an unlearning method: a record whose objective is (params, inputs, coefficients) → scalar.

    L(θ; w) = forget(p_k) · F(θ; w) + retain(p_k) · R(θ; w)

Data, side and progress come with the batch (`retrograd.data.pairs.PairStream`), so that a step is a function of its
number and the sweep needs nothing new. Coefficients are c = w·scale; a method declares whether L is linear in them and
whether w may be negative. A method is one file with one `Method`; `retrograd.unlearn.methods.METHODS` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.core.optim.elementwise import is_traced
from retrograd.data.pairs import PairStream
from retrograd.lm.model import CausalLM
from retrograd.lm.outputs import Outputs, decoder_blocks, outputs_of
from retrograd.unlearn.latent import LatentAttack
from retrograd.unlearn.reference import Fitted, Reference
from retrograd.unlearn.settings import Settings, chosen_blocks
from retrograd.unlearn.terms import Term, Terms, ramped, retain_value
from retrograd.unlearn.view import Side, View

__all__ = ["Method", "Unlearning"]


@dataclass(frozen=True)
class Method:
    """An unlearning method.

    Args:
        name: What the command calls it.
        formula: F, the forget term, in the notation of docs/unlearning.md.
        source: Where formula and defaults are from.
        defaults: Its settings, a `Settings` or a subclass with more.
        forget: (settings, view, its forget side) → the terms of F by name, each with its coefficient. Called where
            there is a forget row.
        family: Of the file's folder.
        linear: Whether the objective is linear in the coefficients.
        signed: Whether data weights may be negative: only where w multiplies a token's cross-entropy.
        descends: Whether descending F descends w·CE, as weights of `select --use descent` mean it. Where F ascends,
            their negative weights would teach what is to go, and are refused.
        reference: Whether F needs a reference.
        states: Whether F needs hidden states.
        logits: Whether F needs logits.
        token_mean: Whether F is a mean over tokens, so that it does not grow with the rows' length.
        additive: Whether micro-batches add up to the whole batch; not where pairs of rows of one are compared.
        least_rows: Forget rows that every micro-batch needs.
        alternatives: Whether each forget row needs an alternative one.
        perturb: Size of the noise that the parameters start with, as `reference.perturbed` takes it; above 0 where F
            has no slope at the reference.
        adapters: Whether its source trains adapters, so that it does unless --lora.rank says otherwise.
        rank: Rank of adapters as a share of the model's width, see `adapter_rank`.
        fault: What `as_run` permits, in a sentence; empty where there is nothing.
        trained: (settings, module) → names of the parameters that are trained, where the source trains a few and there
            are no adapters; all where it is None.
        schedule: (settings, progress) → what the coefficients of F and R are multiplied by besides their ramps.
        at: (settings, params, reference, progress, module) → the parameters that F is computed at; the current ones
            where it is None.
        fit: (settings, model, reference, stream) → what F needs besides, made before the first step of the model as it
            is and of the rows, whatever they weigh; nothing where it is None.
        edit: (settings, model, reference, stream) → the parameters that training starts from, where the method makes a
            change instead of descending F; its runs cannot be attributed.
        inner: settings → an attack under which F is computed, see `latent`; None where they ask for none. Runs with
            one cannot be attributed.
        penalty: (settings, params, reference) → terms of the parameters alone, such as L2-SP; F is not linear in the
            coefficients with them. A micro-batch has its share of the forget rows of them.
        refers: Whether settings need a reference where the method as such does not.
        no_gradient: Why its updates are no gradient of the objective, in a clause, such as "it overwrites weights
            between steps": attribution is then refused with it. Empty where they are, and runs can be attributed.
    """

    name: str
    formula: str
    source: str
    defaults: Settings
    forget: Callable[[Any, View, Side], Terms]
    family: Literal["likelihood", "activation", "weights"] = "likelihood"
    linear: bool = True
    signed: bool = False
    descends: bool = False
    reference: bool = False
    states: bool = False
    logits: bool = True
    token_mean: bool = True
    additive: bool = True
    least_rows: int = 1
    alternatives: bool = False
    perturb: float = 0.0
    adapters: bool = False
    rank: float = 1 / 64
    fault: str = ""
    trained: Callable[[Any, torch.nn.Module], Collection[str]] | None = None
    schedule: Callable[[Any, Tensor], tuple[Tensor | float, Tensor | float]] | None = None
    at: Callable[[Any, Params, Reference, Tensor, torch.nn.Module], Params] | None = None
    fit: Callable[[Any, CausalLM, Reference, PairStream], Fitted] | None = None
    edit: Callable[[Any, CausalLM, Reference, PairStream], Params] | None = None
    inner: Callable[[Any], LatentAttack | None] | None = None
    penalty: Callable[[Any, Params, Reference], Terms] | None = None
    refers: Callable[[Any], bool] | None = None
    no_gradient: str = ""

    def __post_init__(self) -> None:
        if self.edit is not None and not self.no_gradient:
            raise ValueError(f"{self.name} edits parameters: say in no_gradient why its runs cannot be attributed")

    def objective(
        self,
        lm: CausalLM,
        reference: Reference | None = None,
        settings: Settings | None = None,
        fitted: Fitted | None = None,
    ) -> Unlearning:
        """(params, inputs, coefficients) → scalar, for `Double`.

        Args:
            reference: From `reference_of(lm)` before the first step; unused where `needs_reference` says no.
            settings: The method's defaults if not given.
            fitted: From `fitted_to`, where the method has something to fit.
        Raises:
            ValueError: If a reference or what is fitted is missing, a block is absent, or settings are another's.
        """
        settings = self.defaults if settings is None else settings
        if not isinstance(settings, type(self.defaults)):
            raise ValueError(
                f"{self.name} takes {type(self.defaults).__name__} settings, not {type(settings).__name__}: it has "
                f"{', '.join(field.name for field in fields(self.defaults))}"
            )
        if settings.as_run and not self.fault and settings.retain_term != "kl":
            raise ValueError(f"{self.name} has no historical fault that as_run would permit; leave it out")
        if not self.needs_reference(settings):
            reference = None
        elif reference is None:
            why = "its forget term" if self.reference else f"retain_term {settings.retain_term!r}"
            raise ValueError(
                f"{self.name} needs a reference for {why}: reference_of(lm) before training, which is the frozen copy "
                "of a model or, for adapters, the model without them"
            )
        if self.fit is not None and fitted is None:
            raise ValueError(f"{self.name} needs what it fits before the first step: fitted_to(…), given as `fitted`")
        hold = settings.retain > 0
        compares = settings.retain_term in ("l2", "mse")
        states = self.states or (hold and compares)
        blocks = chosen_blocks(settings, len(decoder_blocks(lm.module))) if states else ()
        logits = self.logits or (hold and not compares) or self.attack(settings) is not None
        outputs = outputs_of(lm, blocks, logits=logits)
        return Unlearning(self, settings, outputs, lm.module, reference, fitted)

    def fitted_to(
        self, lm: CausalLM, reference: Reference | None, stream: PairStream, settings: Settings | None = None
    ) -> Fitted | None:
        """What it needs of the model as it is and the rows, besides the reference; None for most methods.

        Raises:
            ValueError: If that cannot be made of them.
        """
        if self.fit is None:
            return None
        assert reference is not None, "a method that fits has a reference"
        return self.fit(self.defaults if settings is None else settings, lm, reference, stream)

    def attack(self, settings: Settings) -> LatentAttack | None:
        """The attack under which settings want F."""
        return None if self.inner is None else self.inner(settings)

    def refusal(self, settings: Settings | None = None) -> str:
        """Why a run cannot be attributed, in a clause; empty where each update is a gradient of the objective."""
        if self.attack(self.defaults if settings is None else settings) is not None:
            return "its latent attack is found by steps of its own at every step, through which nothing is pulled back"
        return self.no_gradient

    @property
    def row(self) -> str:
        """What the table of the docs says of it: F, reference, weights, linear in w, source."""
        needs = "yes" if self.reference else "no"
        weights = "w·CE, signed" if self.signed else "share, w ≥ 0"
        formula = self.formula.replace("|", "\\|")
        return " | ".join((formula, needs, weights, "yes" if self.linear else "no", self.source))

    def needs_reference(self, settings: Settings | None = None) -> bool:
        """Whether the objective looks at a reference: its forget term, or every retain term but ce."""
        settings = self.defaults if settings is None else settings
        asked = self.refers is not None and self.refers(settings)
        return self.reference or asked or (settings.retain > 0 and settings.retain_term != "ce")

    def adapter_rank(self, width: int) -> int:
        """The default rank of adapters on a model of this width, at least 2."""
        return max(2, round(self.rank * width))


@dataclass(frozen=True, eq=False)
class Unlearning:
    """A method's objective on one model."""

    method: Method
    settings: Settings
    outputs: Callable[..., Outputs]
    module: torch.nn.Module
    reference: Reference | None
    fitted: Fitted | None = None
    chained: ClassVar[bool] = False  # read by `choose_engine`: the chain of `blocks` ends in a cross-entropy

    def __post_init__(self) -> None:
        object.__setattr__(self, "_noted", {})  # no field: what was computed last is no part of the function

    @property
    def linear(self) -> bool:
        """Read by the kernel: whether anything may be inferred from linearity in the coefficients."""
        penalised = self.method.penalty is not None and bool(self._penalties())
        return self.method.linear and not penalised

    def _penalties(self, params: Params | None = None) -> Terms:
        assert self.method.penalty is not None, "asked where there is one"
        assert self.reference is not None, "a method that looks at a reference says so"
        return self.method.penalty(self.settings, params or self.reference.params, self.reference)

    def __call__(self, params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        terms, now = self._terms(params, inputs, coefficients)
        self._note(terms, coefficients)
        if not terms:  # a micro-batch of a side whose coefficient is 0
            anchor = now.logits if now.logits is not None else next(iter(now.states.values()))
            return 0 * anchor.sum()
        first, *rest = [term.coefficient * term.value for term in terms.values()]
        return sum(rest, start=first)

    def noted(self) -> dict[str, float]:
        """The value of each term, not multiplied yet, summed over the gradients since this was asked last.

        Asked after each step, as the journal does, it is that step's: a term's value is a share of the batch's, so that
        micro-batches add up. Second derivatives are not noted.
        """
        noted: dict[str, Tensor] = getattr(self, "_noted")  # noqa: B009
        values = {name: float(value) for name, value in noted.items()}
        noted.clear()
        return values

    def _note(self, terms: Terms, coefficients: Tensor) -> None:
        noted: dict[str, Tensor] = getattr(self, "_noted")  # noqa: B009
        for name, term in terms.items():
            value = term.value.detach()
            if not (is_traced(coefficients) or is_traced(value)):
                noted[name] = noted[name] + value if name in noted else value

    @torch.no_grad()
    def terms(self, params: Params, inputs: Any, coefficients: Tensor) -> dict[str, tuple[float, float]]:
        """(coefficient, value) of each term on a micro-batch, for the journal: the value is not multiplied yet."""
        terms = self._terms(params, inputs, coefficients)[0]
        return {name: (float(term.coefficient), float(term.value)) for name, term in terms.items()}

    def _terms(self, params: Params, inputs: Any, coefficients: Tensor) -> tuple[Terms, Outputs]:
        method, settings, terms = self.method, self.settings, Terms()
        made = None if self.fitted is None else self.fitted.value
        view = forgetting = View(self.outputs(params, inputs), self._then(inputs), inputs, coefficients, made)
        if method.at is not None:
            assert self.reference is not None, "a method that looks at a reference says so"
            moved = method.at(settings, params, self.reference, view.progress, self.module)
            forgetting = View(self.outputs(moved, inputs), view.then, inputs, coefficients, made)
        attack = method.attack(settings)
        if attack is not None and forgetting.forget is not None:
            attacked = attack(self.outputs, params if method.at is None else moved, inputs, self.module)
            forgetting = View(attacked, view.then, inputs, coefficients, made)
        if forgetting.forget is not None:
            terms |= method.forget(settings, forgetting, forgetting.forget)
        if settings.retain > 0 and view.retain is not None:
            coefficient = ramped(settings.retain, settings.retain_ramp, view.progress)
            terms["retain"] = Term(coefficient, retain_value(settings, view.retain))
        if method.penalty is not None and view.forget is not None:
            share = view.forget.share.sum()
            terms |= {
                name: Term(penalty.coefficient, share * penalty.value)
                for name, penalty in self._penalties(params).items()
            }
        if method.schedule is not None:
            forget, retain = method.schedule(settings, view.progress)
            factors = {name: retain if name == "retain" else forget for name in terms}
            terms = {name: Term(factors[name] * term.coefficient, term.value) for name, term in terms.items()}
        return terms, view.now

    def _then(self, inputs: Any) -> Outputs | None:
        """The reference's outputs, dropout off."""
        if self.reference is None:
            return None
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            with torch.no_grad():
                return self.outputs(self.reference.params, inputs, self.reference.adapters)
        finally:
            for module in training:
                module.training = True
