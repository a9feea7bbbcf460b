"""How a batch enters a model: row by row with padding, or joined to one row without any.

A state that no target of its row follows reaches no loss, and all that a decoder does outside attention it does to each
token alone. So the states that count, of all rows, enter as one row [1, N] with positions that restart, and attention
takes them apart again to [B, longest], each row attending to itself. Whether a model can be called like this is tried
out, not looked up; where not, rows are padded on the right, which a causal model does not look at.

The attention is plain matrix products and a softmax, twice differentiable by any mode. Unlike SDPA's MATH path it does
not ask whether a query sees nothing at all: each sees itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["Layout", "Predicting", "inner", "layout_of", "twice_differentiable"]

_NAME = "retrograd"  # of the attention, among those of transformers
_FOREIGN = ("alibi", "head_mask", "position_bias", "s_aux")  # what some attention adds that ours does not


class Predicting(NamedTuple):
    """The states that predict a target: where they are in what the model returns, whose they are, and the targets.

    states: index into [B, L, …] or [1, N, …]. coefficients: index into [B, L]. targets: [M] int64.
    """

    states: tuple[Any, Tensor]
    coefficients: tuple[Tensor, Tensor]
    targets: Tensor


class _Joined(NamedTuple):
    """ids, positions [1, N]; place [B, longest], N where there is no state; start [B] of each row among the N."""

    ids: Tensor
    positions: Tensor
    place: Tensor
    start: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """What a Hugging Face causal model is called with for a batch as `rows.pad` makes it.

    joins: Whether the model can be called with joined rows.
    """

    module: nn.Module
    joins: bool

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """Packed rows stay rows, with positions that restart and attention inside each document.

        Raises:
            ValueError: If packed rows are longer than the model's sliding window.
        """
        if (joined := self._joined(inputs)) is not None:
            ids, positions, place, _ = joined
            return {"input_ids": ids, "position_ids": positions, "attention_mask": place[None, None],
                    "use_cache": False}  # fmt: skip
        arguments = {"input_ids": inputs["input_ids"], "use_cache": False}
        if "segment_ids" not in inputs:
            return arguments
        segments = inputs["segment_ids"]
        length, window = segments.shape[1], _window(self.module)
        if window is not None and length > window:
            raise ValueError(
                f"chunk_length {length} is above the model's sliding attention window {window}; packing masks "
                f"attention by document and cannot combine both. Use a chunk_length of at most {window}."
            )
        causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        allowed = (segments[:, :, None] == segments[:, None, :]) & causal
        return {**arguments, "attention_mask": allowed[:, None], "position_ids": inputs["position_ids"]}

    def predicting(self, inputs: dict[str, Tensor]) -> Predicting:
        rows, columns = inputs["target_mask"][:, 1:].nonzero(as_tuple=True)
        after = (rows, columns + 1)
        joined = self._joined(inputs)
        states = (rows, columns) if joined is None else (0, joined.start[rows] + columns)
        return Predicting(states, after, inputs["input_ids"][after])

    @contextmanager
    def scope(self, dtype: torch.dtype) -> Iterator[None]:
        """In which the model is called and differentiated."""
        with twice_differentiable(dtype), _attending(self.module) if self.joins else nullcontext():
            yield

    def sizes(self, rows: int, length: int, packed: bool = False) -> tuple[int, ...]:
        """Of a batch: (rows, length), the leading sizes of its states; joined: (rows, states, longest)."""
        return (rows, rows * (length - 1), length - 1) if self._applies(length, packed) else (rows, length)

    def _applies(self, length: int, packed: bool) -> bool:
        """Whether such rows are joined."""
        window = _window(self.module)
        return self.joins and not packed and (window is None or length <= window)

    def _joined(self, inputs: dict[str, Tensor]) -> _Joined | None:
        """The batch as one row; None if it cannot be."""
        ids = inputs["input_ids"]
        if not self._applies(ids.shape[1], "segment_ids" in inputs):
            return None
        counts = inputs["target_mask"][:, 1:].flip(1).cumsum(1).flip(1) > 0  # a target follows
        lengths = counts.sum(1)
        total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist()
        if total == 0:
            return None
        columns = torch.arange(ids.shape[1], device=ids.device)
        start = lengths.cumsum(0) - lengths
        place = torch.where(columns < lengths[:, None], start[:, None] + columns, total)[:, :longest]
        positions = columns[:-1].expand_as(counts)[counts]
        return _Joined(ids[:, :-1][counts][None], positions[None], place, start)


def layout_of(module: nn.Module) -> Layout:
    """Joined rows where they give the model's own states on a small batch, padded ones where not.

    Args:
        module: A Hugging Face causal language model, or a peft wrapper of one.
    """
    joined, padded = Layout(module, True), Layout(module, False)
    model = inner(module)
    if model.base_model is model:
        return padded
    weight = next(module.parameters())
    mask = torch.ones((2, 6), dtype=torch.bool, device=weight.device)
    mask[:, 0] = mask[1, 4:] = False
    ids = torch.arange(1, 13, device=weight.device).view(2, 6) % len(model.get_input_embeddings().weight)
    inputs = {"input_ids": ids, "target_mask": mask}
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            found, expected = (_states(layout, inputs, weight.dtype) for layout in (joined, padded))
    except torch.OutOfMemoryError:  # says nothing of the model, and another run would take the other layout
        raise
    except Exception:  # a model that cannot be called like this raises what it likes
        return padded
    finally:
        for part in training:
            part.training = True
    near = 100 * torch.finfo(weight.dtype).eps * expected.norm()
    return joined if found.shape == expected.shape and (found - expected).norm() <= near else padded


@contextmanager
def twice_differentiable(dtype: torch.dtype) -> Iterator[None]:
    """Attention on SDPA's MATH path; in a float64 run, no casts to float32."""
    with sdpa_kernel(SDPBackend.MATH), _keep_float64(dtype):
        yield


def inner(module: nn.Module) -> Any:
    """The Hugging Face model inside a peft wrapper; its adapters are in place there."""
    base = getattr(module, "get_base_model", None)
    return module if base is None else base()


def _states(layout: Layout, inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    with layout.scope(dtype):
        hidden = inner(layout.module).base_model(**layout.arguments(inputs)).last_hidden_state
    return hidden[layout.predicting(inputs).states]


def _window(module: nn.Module) -> int | None:
    """The fewest tokens that some layer looks back at; None if all see all."""
    config = inner(module).config
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in found if size), default=None)


@contextmanager
def _attending(module: nn.Module) -> Iterator[None]:
    """The model with our attention."""
    _register()
    found: dict[int, Any] = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    configs = [config for config in found.values() if hasattr(config, "_attn_implementation")]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of joined rows, each to itself; SDPA for what is not joined.

    Args:
        query: [1, H, N, E]; key and value may have fewer heads, each for H/H' of the queries'.
        attention_mask: Of joined rows their place [1, 1, B, longest], int64.
    Returns:
        [1, N, H, E], and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **others
        )
    if foreign := [name for name in _FOREIGN if others.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(foreign)} is not known here")
    place, (rows, longest), (heads, states) = attention_mask.flatten(), attention_mask.shape[2:], query.shape[1:3]
    read = place.clamp(max=states - 1)  # what stands in for padding, nobody sees
    # no `len` of a size that varies: it would fix it where this is traced
    spots = torch.arange(place.shape[0], device=place.device)
    written = place.new_empty(states + 1).scatter(0, place, spots)[:states]
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    wide = torch.promote_types(query.dtype, torch.float32)

    def apart(x: Tensor) -> Tensor:
        """[1, H', N, E] as [H B, longest, E]."""
        found = x[0].index_select(1, read).to(wide)
        found = found if len(found) == heads else found.repeat_interleave(heads // len(found), 0)
        return found.view(heads * rows, longest, -1)

    scores = apart(query) @ apart(key).transpose(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.full((longest, longest), -torch.inf, dtype=wide, device=scores.device).triu(1)
    weights = F.dropout(_Softmax.apply(scores + ahead), dropout, module.training)
    mixed = (weights @ apart(value)).view(heads, rows * longest, -1).index_select(1, written)
    return mixed.to(value.dtype).transpose(0, 1)[None], None


class _Softmax(torch.autograd.Function):
    """torch.softmax along the last dimension, its tangent by one kernel, where torch's own formula writes seven times.

    The Jacobian is symmetric, so that the tangent is what a cotangent's pullback would be.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch._softmax_backward_data(bar, y, -1, y.dtype)

    jvp = backward


def _keep_float64(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return _KeepFloat64() if dtype == torch.float64 else nullcontext()


class _KeepFloat64(TorchFunctionMode):
    """Ignores casts of float64 to float32: model code has them in norms, rotary embeddings and attention.

    Without this a float64 run carries float32 rounding, and finite differences of it are noise.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].dtype == torch.float64:
            if function is Tensor.float:
                return arguments[0]
            arguments = tuple(torch.float64 if argument is torch.float32 else argument for argument in arguments)
            if options.get("dtype") is torch.float32:
                options["dtype"] = torch.float64
        return function(*arguments, **options)
