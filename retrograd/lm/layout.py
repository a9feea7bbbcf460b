"""How a batch enters a model: row by row, or, where rows differ in length, joined to one row without padding.

A state that no target of its row follows reaches no loss, and all that a decoder does outside attention it does to each
token alone. So the states that count, of all rows, enter as one row [1, N] with positions that restart, and attention
takes them apart again to [B, longest], each row attending to itself. Where all rows have as many of them they enter as
they are, [B, longest]. Packed rows enter masked by document, or their documents as rows of their own. Rows that a model
does not keep apart enter it one after the other. Which of these give a model's own losses is tried out, not looked up
(`Form`, found by `proof`); what is left is padded on the right, which a causal model does not look at.

The attention is plain matrix products and a softmax, twice differentiable by any mode. Unlike SDPA's MATH path it does
not ask whether a query sees nothing at all: each sees itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from retrograd.lm.loss import token_ce
from retrograd.lm.spans import beside, inner, windows

__all__ = ["Form", "Layout", "Predicting", "twice_differentiable"]

_NAME = "retrograd"  # of the attention, among those of transformers
_FOREIGN = ("alibi", "head_mask", "position_bias", "s_aux")  # what some attention adds that ours does not


class Form(NamedTuple):
    """What a model's own losses have been found to be equal to.

    fused: logits are a bare linear layer of the hidden states, however large. joins: rows may be joined to one.
    masks: packed rows may enter masked by document. batches: rows may enter together at all.
    """

    fused: bool = False
    joins: bool = False
    masks: bool = False
    batches: bool = True


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


class _Rows(NamedTuple):
    """Rows as they enter: tokens and targets [B, L], and the length [B] of each.

    origin: of documents taken apart, the packed row of each and where it starts there.
    """

    ids: Tensor
    mask: Tensor
    lengths: Tensor
    origin: tuple[Tensor, Tensor] | None = None

    def place(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens of these rows stand in the batch."""
        return (rows, columns) if self.origin is None else (self.origin[0][rows], self.origin[1][rows] + columns)


@dataclass(frozen=True, eq=False)
class Layout:
    """What a Hugging Face causal model is called with for a batch as `rows.pad` makes it."""

    module: nn.Module
    form: Form

    def calls(self, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
        """The arguments of each call; what the calls return goes together along the second dimension."""
        if not self._masked(inputs):
            rows = _rows(inputs)
            if self.alone(rows.ids.shape[1]):
                ends = rows.lengths.tolist()
                return [{"input_ids": row[None, :end], "use_cache": False} for row, end in zip(rows.ids, ends)]
        return [self.arguments(inputs)]

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of a single call.

        Raises:
            ValueError: If rows of this length have to enter one after the other, and there are several.
        """
        if self._masked(inputs):
            segments = inputs["segment_ids"]
            causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
            allowed = (segments[:, :, None] == segments[:, None, :]) & causal
            rest = {"attention_mask": allowed[:, None], "position_ids": inputs["position_ids"]}
            return {"input_ids": inputs["input_ids"], "use_cache": False, **rest}
        rows = _rows(inputs)
        if self.alone(rows.ids.shape[1]):
            if len(rows.ids) > 1:
                raise ValueError(
                    f"rows of {rows.ids.shape[1]} tokens have to enter {type(inner(self.module)).__name__} one after "
                    f"the other ({self.why_alone}): use the engine 'double' for them, or one row at a time"
                )
            return {"input_ids": rows.ids[:, : int(rows.lengths[0])], "use_cache": False}
        if (reaching := self._reaching(rows)) is not None:
            return {**_entering(rows.ids, reaching), "use_cache": False}
        return {"input_ids": rows.ids, "use_cache": False}

    def predicting(self, inputs: dict[str, Tensor]) -> Predicting:
        """In what `calls` or `arguments` lead to."""
        masked = self._masked(inputs)
        rows = _rows(inputs, apart=not masked)
        places, columns = rows.mask[:, 1:].nonzero(as_tuple=True)
        states: tuple[Any, Tensor] = (places, columns)
        if not masked and self.alone(rows.ids.shape[1]):
            states = (0, (rows.lengths.cumsum(0) - rows.lengths)[places] + columns)
        elif not masked and (reaching := self._reaching(rows)) is not None and not reaching.even:
            states = (0, reaching.start[places] + columns)
        return Predicting(states, rows.place(places, columns + 1), rows.ids[places, columns + 1])

    def loss(self, logits: Tensor, inputs: dict[str, Tensor], coefficients: Tensor) -> Tensor:
        """Σ c·ce in nats, [], from the logits that `calls` or `arguments` lead to."""
        if logits.shape[:2] == coefficients.shape and ("segment_ids" not in inputs or self._masked(inputs)):
            return torch.sum(token_ce(logits, inputs["input_ids"]) * coefficients)
        states, place, targets = self.predicting(inputs)
        chosen = logits[states]
        wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        return torch.sum(F.cross_entropy(wide, targets, reduction="none") * coefficients[place])

    @contextmanager
    def scope(self, dtype: torch.dtype) -> Iterator[None]:
        """In which the model is called and differentiated."""
        with twice_differentiable(dtype), _attending(self.module) if self.form.joins else nullcontext():
            yield

    def sizes(self, rows: int, length: int, packed: bool = False) -> tuple[int, ...]:
        """Of a batch: (rows, length), the leading sizes of its states; joined: (rows, states, longest)."""
        masked = packed and self._masks(length)
        return (rows, rows * (length - 1), length - 1) if not masked and self._joins(length) else (rows, length)

    def alone(self, length: int) -> bool:
        """Whether rows of this length have to enter one after the other.

        Raises:
            ValueError: If the model's frequencies then depend on what it read before.
        """
        if length > (bound := self.beside.get("dynamic", length)):
            raise ValueError(
                f"rows of {length} tokens are longer than the {bound} from which on this model's dynamic rotary "
                "embedding depends on the longest row it has read before: the loss of a row would be no function "
                f"of the row. Use rows of at most {bound} tokens."
            )
        return not self.form.batches or length > min(self.beside.values(), default=length)

    @property
    def why_alone(self) -> str:
        if not self.form.batches:
            return "the loss of a row changes with the rows beside it"
        bound, kinds = min(self.beside.values()), ", ".join(self.beside)
        return f"beyond {bound} tokens a row's loss depends on those beside it: {kinds}"

    @cached_property
    def beside(self) -> dict[str, int]:
        """As `spans.beside`."""
        return beside(self.module)

    @cached_property
    def window(self) -> int | None:
        """The fewest tokens that some layer looks back at; None if all see all."""
        return min(windows(self.module), default=None)

    def _within(self, length: int) -> bool:
        return self.window is None or length <= self.window

    def _joins(self, length: int) -> bool:
        """Whether such rows are joined."""
        return self.form.joins and self._within(length)

    def _masks(self, length: int) -> bool:
        """Whether packed rows enter masked; a mask of ours takes the place of the model's windows."""
        bound = min(self.beside.values(), default=length)
        return self.form.masks and self.form.batches and self._within(length) and length <= bound

    def _masked(self, inputs: dict[str, Tensor]) -> bool:
        return "segment_ids" in inputs and self._masks(inputs["segment_ids"].shape[1])

    def _reaching(self, rows: _Rows) -> _Reaching | None:
        """What enters the model; None where rows enter whole."""
        if not self._joins(rows.ids.shape[1]):
            return None
        which = rows.mask[:, 1:].flip(1).cumsum(1).flip(1) > 0
        counts = which.sum(1)
        total, longest = torch.stack([counts.sum(), counts.max()]).tolist()
        return _Reaching(which, counts, total, longest) if total else None


def _rows(inputs: dict[str, Tensor], apart: bool = True) -> _Rows:
    """The rows of a batch; of packed rows their documents, one a row, without those that have no target."""
    ids, mask = inputs["input_ids"], inputs["target_mask"]
    if "segment_ids" not in inputs or not apart:
        lengths = inputs.get("lengths")
        if lengths is None:  # what no target follows reaches no loss
            lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp(min=1)
        return _Rows(ids, mask, lengths)
    there = inputs["segment_ids"] >= 0
    first = there & (inputs["position_ids"] == 0)
    row, start = first.nonzero(as_tuple=True)
    lengths = (first.flatten().cumsum(0) - 1)[there.flatten()].bincount(minlength=len(row))
    columns = torch.arange(int(lengths.max()), device=ids.device)
    at = (row[:, None], (start[:, None] + columns).clamp(max=ids.shape[1] - 1))
    inside = columns < lengths[:, None]
    targets = mask[at] & inside
    kept = targets.any(1) if targets.any() else torch.ones_like(row, dtype=torch.bool)
    kept_ids = ids[at].where(inside, 0)[kept]
    return _Rows(kept_ids, targets[kept], lengths[kept], (row[kept], start[kept]))


def _entering(ids: Tensor, reaching: _Reaching) -> dict[str, Tensor]:
    """Rows [B, longest] if they are even, else one row [1, N] with its positions.

    As a mask the joined row has the place of each state, [1, 1, B, longest], N where there is none.
    """
    if reaching.even:
        return {"input_ids": ids[:, : reaching.longest]}
    columns, counts = torch.arange(ids.shape[1], device=ids.device), reaching.counts[:, None]
    place = torch.where(columns < counts, reaching.start[:, None] + columns, reaching.total)[:, : reaching.longest]
    positions = columns[:-1].expand_as(reaching.which)[reaching.which]
    return {
        "input_ids": ids[:, :-1][reaching.which][None],
        "position_ids": positions[None],
        "attention_mask": place[None, None],
    }


@contextmanager
def twice_differentiable(dtype: torch.dtype) -> Iterator[None]:
    """Attention on SDPA's MATH path; in a float64 run, no casts to float32."""
    with sdpa_kernel(SDPBackend.MATH), _keep_float64(dtype):
        yield


@contextmanager
def _attending(module: nn.Module) -> Iterator[None]:
    """The model with our attention."""
    _register()
    by_id: dict[int, Any] = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    configs = [config for config in by_id.values() if hasattr(config, "_attn_implementation")]
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
        widened = x.to(wide)
        return widened if widened.shape[dim] == heads else widened.repeat_interleave(heads // widened.shape[dim], dim)

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

    attended = mixed(*(apart(x) for x in (query, key, value))).view(heads, several * longest, -1)
    return attended.index_select(1, written).to(value.dtype).transpose(0, 1)[None], None


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
