"""How a batch enters a model: row by row, or, where rows differ in length, joined to one row without padding.

A state that no target of its row follows reaches no loss, and all that a decoder does outside attention it does to each
token alone. So the states that count, of all rows, enter as one row [1, N] with positions that restart, and attention
takes them apart again to [B, longest], each row attending to itself. Where all rows have as many of them they enter as
they are, [B, longest]. Whether a model can be called like this is tried out, not looked up; where not, rows are padded
on the right, which a causal model does not look at.

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


class _Reaching(NamedTuple):
    """The states that a target of their row follows: which [B, L − 1], how many [B], of all rows, of the longest."""

    which: Tensor
    counts: Tensor
    total: int
    longest: int

    @property
    def even(self) -> bool:
        return self.total == len(self.counts) * self.longest

    @property
    def start(self) -> Tensor:
        """[B], of each row among those of all rows."""
        return self.counts.cumsum(0) - self.counts


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
        if (found := self._reaching(inputs)) is not None:
            return {**_entering(inputs["input_ids"], found), "use_cache": False}
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
        found = self._reaching(inputs)
        states = (rows, columns) if found is None or found.even else (0, found.start[rows] + columns)
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

    def _reaching(self, inputs: dict[str, Tensor]) -> _Reaching | None:
        """What enters the model; None where rows enter whole."""
        if not self._applies(inputs["input_ids"].shape[1], "segment_ids" in inputs):
            return None
        which = inputs["target_mask"][:, 1:].flip(1).cumsum(1).flip(1) > 0
        counts = which.sum(1)
        total, longest = torch.stack([counts.sum(), counts.max()]).tolist()
        return _Reaching(which, counts, total, longest) if total else None


def _entering(ids: Tensor, found: _Reaching) -> dict[str, Tensor]:
    """Rows [B, longest] if they are even, else one row [1, N] with its positions.

    As a mask the joined row has the place of each state, [1, 1, B, longest], N where there is none.
    """
    if found.even:
        return {"input_ids": ids[:, : found.longest]}
    columns, counts = torch.arange(ids.shape[1], device=ids.device), found.counts[:, None]
    place = torch.where(columns < counts, found.start[:, None] + columns, found.total)[:, : found.longest]
    positions = columns[:-1].expand_as(found.which)[found.which]
    return {
        "input_ids": ids[:, :-1][found.which][None],
        "position_ids": positions[None],
        "attention_mask": place[None, None],
    }


def layout_of(module: nn.Module) -> Layout:
    """Joined rows where they give the model's own states on small batches, padded ones where not.

    Args:
        module: A Hugging Face causal language model, or a peft wrapper of one.
    """
    joined, padded = Layout(module, True), Layout(module, False)
    model = inner(module)
    if model.base_model is model:
        return padded
    weight = next(module.parameters())
    ids = torch.arange(1, 13, device=weight.device).view(2, 6) % len(model.get_input_embeddings().weight)
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        same = all(_agree(joined, padded, ids, second, weight.dtype) for second in (4, 6))
    except torch.OutOfMemoryError:  # says nothing of the model, and another run would take the other layout
        raise
    except Exception:  # a model that cannot be called like this raises what it likes
        return padded
    finally:
        for part in training:
            part.training = True
    return joined if same else padded


def _agree(one: Layout, other: Layout, ids: Tensor, second: int, dtype: torch.dtype) -> bool:
    """Whether two layouts give the same states where the second row ends after `second` tokens."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = mask[1, second:] = False
    with torch.no_grad():
        found, expected = (_states(x, {"input_ids": ids, "target_mask": mask}, dtype) for x in (one, other))
    near = 100 * torch.finfo(dtype).eps * expected.norm()
    return found.shape == expected.shape and bool((found - expected).norm() <= near)


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
    """Causal attention of rows, or of joined rows each to itself; SDPA for what has another mask.

    Args:
        query: [B, H, T, E], joined [1, H, N, E]; key and value may have fewer heads, each for H/H' of the queries'.
        attention_mask: None for rows; of joined rows their place [1, 1, B, longest], int64.
    Returns:
        [B, T, H, E] or [1, N, H, E], and no weights.
    """
    rows = attention_mask is None and query.shape[2] == key.shape[2] and getattr(module, "is_causal", True)
    if not rows and (attention_mask is None or attention_mask.dtype != torch.int64):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **others
        )
    if foreign := [name for name in _FOREIGN if others.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(foreign)} is not known here")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    heads, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)

    def shared(x: Tensor, dim: int) -> Tensor:
        """With a copy of each head for all that share it."""
        found = x.to(wide)
        return found if found.shape[dim] == heads else found.repeat_interleave(heads // found.shape[dim], dim)

    def mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[*, T, E] each."""
        scores = query @ key.transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.full(scores.shape[-2:], -torch.inf, dtype=wide, device=scores.device).triu(1)
        return F.dropout(_Softmax.apply(scores + ahead), dropout, module.training) @ value

    if attention_mask is None:
        return mixed(*(shared(x, 1) for x in (query, key, value))).to(value.dtype).transpose(1, 2), None
    place, (several, longest), states = attention_mask.flatten(), attention_mask.shape[2:], query.shape[2]
    read = place.clamp(max=states - 1)  # what stands in for padding, nobody sees
    # no `len` of a size that varies: it would fix it where this is traced
    spots = torch.arange(place.shape[0], device=place.device)
    written = place.new_empty(states + 1).scatter(0, place, spots)[:states]

    def apart(x: Tensor) -> Tensor:
        """[1, H', N, E] as [H B, longest, E]."""
        return shared(x[0].index_select(1, read), 0).view(heads * several, longest, -1)

    found = mixed(*(apart(x) for x in (query, key, value))).view(heads, several * longest, -1)
    return found.index_select(1, written).to(value.dtype).transpose(0, 1)[None], None


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
