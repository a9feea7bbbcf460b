"""A module as a function of its trainable parameters, and Hugging Face causal language models as objectives.

Parameters that share storage (tied embeddings) are one leaf: seen as two, each would get half of the second-order
terms. Dropout is off unless asked for, attention that is SDPA runs on its MATH path, the only one that is twice
differentiable, and the vocabulary projection is fused with its cross-entropy where the model's structure allows it. No
objective is given out that has not been held against the model's own logits (`proof`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from retrograd.core.optim import Params
from retrograd.core.residuals import Residual
from retrograd.lm.adapters import Adapter, base_of
from retrograd.lm.checkpoint import DTYPES, load_module, refuse_no_folder, told
from retrograd.lm.head import fused_ce_again, fused_ce_leaving
from retrograd.lm.layout import Layout, twice_differentiable
from retrograd.lm.spans import inner

__all__ = [
    "DTYPES",
    "CausalLM",
    "adapted",
    "bound_model",
    "causal_logits",
    "causal_objective",
    "evaluating",
    "load_causal_lm",
    "load_tokenizer",
    "norms_and_biases",
    "objective_of",
    "only_trained",
    "trainable",
]


@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal language model ready to be differentiated twice.

    params: trainable leaves by name, one per storage.
    objective: (params, inputs, coefficients [B, L]) → Σ c·ce in nats; inputs as made by `rows.pad`.
    """

    module: nn.Module
    params: Params
    objective: Callable[[Params, Any, Tensor], Tensor]
    fused: bool

    def evaluated(self, params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        """The objective with dropout off: what a query asks, however the model is trained."""
        with evaluating(self.module):
            return self.objective(params, inputs, coefficients)


def trainable(module: nn.Module) -> tuple[Params, dict[str, str]]:
    """The trainable leaves of a module, one per storage, and every parameter name that reads each of them.

    Returns:
        leaves by name, detached; and {parameter name: leaf name} for all names, tied ones included.
    Raises:
        ValueError: If nothing is trainable, or two parameters overlap in memory without being the same tensor.
    """
    groups: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.untyped_storage().data_ptr() or id(parameter), []).append((name, parameter))
    leaves: Params = {}
    readers: dict[str, str] = {}
    for members in groups.values():
        if not any(parameter.requires_grad for _, parameter in members):
            continue
        owner, first = members[0]
        for name, parameter in members:
            if (parameter.shape, parameter.stride(), parameter.storage_offset()) != (
                first.shape,
                first.stride(),
                first.storage_offset(),
            ):
                raise ValueError(
                    f"parameters {owner} and {name} overlap in memory but are not the same tensor; give each its own "
                    "storage, or tie them whole"
                )
            readers[name] = owner
        leaves[owner] = first.detach()
    if not leaves:
        raise ValueError("the model has no trainable parameter: every requires_grad is False")
    return leaves, readers


def norms_and_biases(module: nn.Module) -> tuple[str, ...]:
    """The leaves that transformers' Trainer leaves without weight decay: norms and biases, of `trainable`'s.

    They are the parameters inside an `nn.LayerNorm`, and those whose name has "bias", "layernorm" or "rmsnorm" in it, a
    part "norm", or a part that ends in "_norm".
    """
    inside = {place for place, part in module.named_modules() if isinstance(part, nn.LayerNorm)}

    def spared(name: str) -> bool:
        parts = name.split(".")
        above = any(".".join(parts[:n]) in inside for n in range(1, len(parts)))
        return above or bool(re.search(r"bias|layernorm|rmsnorm|(?:^|\.|_)norm(?:$|\.)", name.lower()))

    return tuple(name for name in trainable(module)[0] if spared(name))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub name or local folder; of adapters without one, their base's.

    Raises:
        ValueError: If there is none.
    """
    from transformers import AutoTokenizer

    base = base_of(name)
    if base and not (Path(name).expanduser() / "tokenizer_config.json").is_file():
        name = base
    refuse_no_folder(name, "a tokenizer from")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"cannot load a tokenizer from {name!r}: check the spelling and the network, or give a local folder with "
            f"--tokenizer. {told(error)}"
        ) from error


def load_causal_lm(
    name: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    lora: Any | None = None,
    adapter: Adapter | None = "merge",
    seed: int = 0,
    dropout: bool = False,
) -> CausalLM:
    """Load a causal language model by hub name or local folder.

    Args:
        dtype: "float32", "float64" or "bfloat16", of parameters and of all arithmetic.
        lora: A peft `LoraConfig`; then only the adapters are trained and differentiated.
        adapter: As for `load_module`: what to make of a folder of adapters.
        seed: Of the adapters' random initialisation.
        dropout: Leave dropout active; its draws are then replayed.
    Raises:
        ValueError: If the model cannot be loaded, is not causal, or lacks weights, its objective cannot be
            proved to be its own, or the LoRA targets do not exist.
    """
    module = load_module(name, DTYPES[dtype], adapter)
    if lora is not None:
        module = adapted(module, lora, seed)
    module.to(device).train(dropout)
    objective, fused = causal_objective(module)
    return CausalLM(module, trainable(module)[0], objective, fused)


def only_trained(model: CausalLM, names: Collection[str]) -> CausalLM:
    """The model with these parameters alone to train, by the names of its module; the others are frozen.

    Raises:
        ValueError: If the model has no such parameter, or none is named.
    """
    known = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    if absent := sorted(set(names) - known):
        raise ValueError(f"{len(absent)} parameters to train are not in the model, such as {absent[0]}")
    for name, parameter in model.module.named_parameters():
        parameter.requires_grad_(name in names)
    objective, fused = causal_objective(model.module)
    return CausalLM(model.module, trainable(model.module)[0], objective, fused)


def causal_objective(module: nn.Module) -> tuple[Callable[[Params, Any, Tensor], Tensor], bool]:
    """The objective Σ c·ce of a Hugging Face causal model, and whether its vocabulary head is fused.

    Parameters of the objective go by the names of `trainable(module)`.

    Raises:
        ValueError: If no way to call the model gives the losses of its own plain forward pass, one document at a time,
            or a token's loss depends on the tokens after it.
    """
    from retrograd.lm.proof import form_of  # which tries objectives of this module

    layout = Layout(module, form_of(module))
    return objective_of(layout), layout.form.fused


def objective_of(layout: Layout) -> Callable[[Params, Any, Tensor], Tensor]:
    """Σ c·ce of the layout's model, called as the layout says, proved or not."""
    call = _functional(_Scored(layout), layout.scope)
    if layout.form.fused:
        return _Objective(call)

    def objective(params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        return call(params, coefficients.dtype, inputs, coefficients)[0]

    return objective


def bound_model(module: nn.Module) -> Callable[[Params], Callable[..., Any]]:
    """params, named as by `trainable` → the module as a function of its inputs with them in place, dropout off.

    The function has the module's `config` and `device`, and nothing that would read the module's own parameters.
    """
    readers = trainable(module)[1]

    def bind(params: Params) -> Callable[..., Any]:
        placed = {name: params[leaf] for name, leaf in readers.items()}
        first = next(iter(params.values()))

        def model(*arguments: Any, **options: Any) -> Any:
            with twice_differentiable(first.dtype), evaluating(module):
                return functional_call(module, placed, arguments, options, tie_weights=False)

        vars(model).update(config=getattr(module, "config", None), device=first.device)
        return model

    return bind


def causal_logits(lm: CausalLM) -> Callable[[Params, Tensor, Tensor, Tensor], Tensor]:
    """Logits at chosen positions only, differentiable, dropout off whatever the module's mode.

    Returns:
        (params, input_ids [R, L], rows [M], columns [M]) → [M, V], the prediction of the token after each position;
        float32 at least. Rows are padded on the right. With a plain head, no other logits exist.
    """
    from retrograd.lm.proof import form_of

    call = _functional(_Chosen(Layout(lm.module, form_of(lm.module))), twice_differentiable)

    def logits(params: Params, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        with evaluating(lm.module):
            chosen = call(params, next(iter(params.values())).dtype, input_ids, rows, columns)
        return chosen.to(torch.promote_types(chosen.dtype, torch.float32))

    return logits


def _functional(
    wrapped: _Scored | _Chosen, scope: Callable[[torch.dtype], AbstractContextManager[None]]
) -> Callable[..., Any]:
    """(params, dtype, *arguments) → wrapped(*arguments), with the leaves of `trainable` in their places."""
    readers = trainable(wrapped.module)[1]

    def call(params: Params, dtype: torch.dtype, *arguments: Any) -> Any:
        placed = {f"module.{name}": params[leaf] for name, leaf in readers.items()}
        with scope(dtype):
            return functional_call(wrapped, placed, arguments, tie_weights=False)

    return call


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@dataclass(frozen=True, eq=False)
class _Objective:
    """Σ c·ce with a fused head, which leaves P W for the pullback."""

    call: Callable[..., Any]

    def __call__(self, params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        return self.leaving(params, inputs, coefficients)[0]

    def leaving(self, params: Params, inputs: Any, factors: Tensor) -> tuple[Tensor, Residual | None]:
        return self.call(params, factors.dtype, inputs, factors)

    def again(self, params: Params, inputs: Any, factors: Tensor, residual: Residual | None) -> Tensor:
        return self.call(params, factors.dtype, inputs, factors, True, residual)[0]


class _Scored(nn.Module):
    """Model and loss as one module, so that the head's weight is substituted like any other parameter."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.module = layout.module
        self.layout = layout

    def forward(
        self, inputs: dict[str, Tensor], coefficients: Tensor, again: bool = False, residual: Residual | None = None
    ) -> tuple[Tensor, Residual | None]:
        model, fused, calls = inner(self.module), self.layout.form.fused, self.layout.calls(inputs)
        outputs = [model.base_model(**call).last_hidden_state if fused else model(**call).logits for call in calls]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if not fused:
            return self.layout.loss(whole, inputs, coefficients), None
        head = model.get_output_embeddings()
        states, place, targets = self.layout.predicting(inputs)
        hidden = whole[states]
        operands = (hidden, head.weight, head.bias, targets, coefficients[place])
        if again:
            known = None if residual is None else residual.at(hidden)
            return fused_ce_again(*operands, known), None
        loss, pw = fused_ce_leaving(*operands)
        return loss, Residual.of(hidden, pw)


class _Chosen(nn.Module):
    """Model and head at chosen positions, as one module for the same reason."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.module = layout.module
        self.layout = layout

    def forward(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if not self.layout.alone(input_ids.shape[1]):
            return self._read(input_ids, rows, columns)
        parts, places = [], []
        for row in rows.unique().tolist():
            places.append((rows == row).nonzero()[:, 0])
            mine = columns[places[-1]]
            # a row ends where the last of its predictions is asked for
            parts.append(self._read(input_ids[row, None, : int(mine.max()) + 1], torch.zeros_like(mine), mine))
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _read(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        model = inner(self.module)
        if not self.layout.form.fused:
            return model(input_ids=input_ids, use_cache=False).logits[rows, columns]
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden[rows, columns])


def has_plain_head(module: nn.Module) -> bool:
    """Whether logits are exactly head(hidden), head a bare linear layer: tried out, not looked up by name."""
    from retrograd.lm.proof import form_of

    return form_of(module).fused


def adapted(module: nn.Module, lora: Any, seed: int) -> nn.Module:
    """The module with low-rank adapters, the only parameters that train; `lora` is a peft `LoraConfig`.

    Raises:
        ValueError: If the layers to adapt do not exist.
    """
    from peft import get_peft_model

    linear = sorted({name.rsplit(".", 1)[-1] for name, m in module.named_modules() if isinstance(m, nn.Linear)})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(module, lora)
        except ValueError as error:
            raise ValueError(
                f"LoRA cannot be added: {error} Linear layers of this model: {', '.join(linear)}. Name those to adapt "
                "with --lora.target_modules, or train the whole model with --lora.rank 0."
            ) from error
