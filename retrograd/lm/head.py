"""The fused vocabulary head: the last projection and the weighted next-token loss in one.

`fused_ce` works in chunks of tokens, so that logits [M, V] never exist.
With z = hWᵀ + b, p = softmax(z), P = p − 1_y, coefficients c, and tangents (ḣ, Ẇ, ḃ):

    loss = Σ c·(lse(z) − z_y)     ∂c = ce     ∂h = c∘(P W)     ∂W = Pᵀ(c∘h)
    ż = ḣWᵀ + hẆᵀ + ḃ            ⟨P, ż⟩ = ⟨ḣ, P W⟩ + ⟨h, P Ẇ⟩ + P ḃ          D = p∘(ż − ż_y − ⟨P, ż⟩)
    second:  ∂c = ⟨P, ż⟩          ∂h = c∘(D W + P Ẇ)           ∂W = Dᵀ(c∘h) + Pᵀ(c∘ḣ)

The gradient is taken in the forward pass, where p is at hand: 3 products of the head's size for a gradient and 7 more
for its pullback, or 8 for the pullback alone, against 3 and 6 for autograd, and a fraction of its memory traffic, which
is what the time goes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.autograd.function import once_differentiable

from retrograd.core import memory

__all__ = ["fused_ce", "fused_ce_again", "fused_ce_leaving", "head_first", "head_second"]

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # P W, ∂W, ∂b
_Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]  # h [M, D], W [V, D], b [V] or None, y [M], c [M]
_Tangents = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of (h, W, b, c); None for zero

# of one [chunk, V] buffer: below, the products lose a tenth of their rate; on a GPU small ones do not fill it
_CHUNK_BYTES = {"cpu": 44 << 20, "cuda": 256 << 20}


def fused_ce(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, coefficients: Tensor, chunk: int | None = None
) -> Tensor:
    """Σ_m c_m · cross-entropy(softmax(hidden_m Wᵀ + b), target_m), [], twice differentiable by reverse mode.

    Args:
        hidden: [M, D].
        weight: [V, D].
        bias: [V] or None.
        targets: [M] int64.
        coefficients: [M].
        chunk: Tokens whose logits exist at once; chosen by size if not given.
    """
    return fused_ce_leaving(hidden, weight, bias, targets, coefficients, chunk)[0]


def fused_ce_leaving(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, coefficients: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """`fused_ce`, and what it leaves for `fused_ce_again`: P W [M, D], or None."""
    chunk = chunk or _chunk(weight)
    if is_batchedtensor(hidden):
        return _Stacked.apply(hidden, weight, bias, targets, coefficients, chunk), None
    return _FusedCE.apply(hidden, weight, bias, targets, coefficients, chunk, False, None)


def fused_ce_again(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    residual: Tensor | None,
    chunk: int | None = None,
) -> Tensor:
    """0, with the graph of `fused_ce`: for the pullback of a gradient that is known.

    Of the gradient only ∂h has a value; ∂W, ∂b and ∂c are 0. The pullback of all of them is that of `fused_ce`.

    Args:
        residual: What `fused_ce_leaving` left at the same operands; computed, to the same bits, if None.
    """
    chunk = chunk or _chunk(weight)
    return _FusedCE.apply(hidden, weight, bias, targets, coefficients, chunk, True, residual)[0]


class _Stacked(torch.autograd.Function):
    """The fused head under vmap: member by member, each on its own tensors, where plain autograd sees it."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        raise AssertionError("only reached through vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        raise AssertionError("only reached through vmap")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        members = [
            [x if dim is None else x.select(dim, s) for x, dim in zip(arguments, in_dims)]
            for s in range(info.batch_size)
        ]
        return torch.stack([fused_ce(*member) for member in members]), 0


class _FusedCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, y: Tensor, c: Tensor, chunk: int, again: bool,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.chunk, ctx.again = chunk, again
        ce, pw, ctx.unscaled = _FusedCE.found((h, w, b, y, c), ctx.needs_input_grad, chunk, again, residual)
        ctx.save_for_backward(h, w, b, y, c, ce, pw)
        if pw is not None:
            ctx.mark_non_differentiable(pw)
        return torch.dot(ce, c.to(ce)).to(c.dtype), pw

    @staticmethod
    def found(
        operands: _Operands, wanted: Sequence[bool], chunk: int, again: bool, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None, _Grads]:
        """As `head_first`; `again`, without what nobody asks for."""
        if not again:
            return head_first(operands, wanted[:3], chunk)
        h, w, b, _, c = operands
        pw = residual
        if residual is None and wanted[0]:
            pw = head_first(operands, (True, False, False), chunk)[1]
        # zeros that take no room
        dw, db = (None if x is None or not want else x.new_zeros(()).expand(x.shape) for x, want in
                  zip((w, b), wanted[1:3]))  # fmt: skip
        return _work(operands)[3].new_zeros(len(h)), pw, (None if pw is None else c.to(pw)[:, None] * pw, dw, db)

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        h, w, b, y, c, ce, pw = ctx.saved_tensors
        # given away once: whoever gets a gradient may write into it, so a retained graph computes its own
        unscaled, ctx.unscaled = ctx.unscaled, None
        if unscaled is None:
            unscaled = _FusedCE.found((h, w, b, y, c), ctx.needs_input_grad, ctx.chunk, ctx.again, pw)[2]
        dh, dw, db, dc = _FusedGrad.apply(h, w, b, c, scale, y, ce, pw, ctx.chunk, unscaled)
        return dh, dw, db, None, dc, None, None, None


class _FusedGrad(torch.autograd.Function):
    """The gradient, as a function of what it depends on: its forward returns what the loss's forward found."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, b: Tensor | None, c: Tensor, scale: Tensor, y: Tensor, ce: Tensor,
        pw: Tensor | None, chunk: int, unscaled: _Grads,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.save_for_backward(h, w, b, c, scale, y, ce, pw)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        unit = scale.device.type == "cpu" and float(scale) == 1.0  # spare three passes over the gradient
        grads = (
            None if x is None or like is None else x.detach().to(like.dtype) if unit else (x * scale).to(like.dtype)
            for x, like in zip(unscaled, (h, w, b))
        )
        return *grads, (ce * scale).to(c.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, uh: Tensor | None, uw: Tensor | None, ub: Tensor | None, uc: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        h, w, b, c, scale, y, ce, pw = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        _, [(dh, dw, db, slopes)] = head_second((h, w, b, y, c), [(uh, uw, ub, uc)], wanted, pw, ctx.chunk)
        dscale = torch.dot(slopes, c.to(slopes)) + (torch.dot(uc.to(ce), ce) if uc is not None else 0)
        unit = scale.device.type == "cpu" and float(scale) == 1.0
        outs = [None if x is None else (x if unit else x * scale).to(like.dtype) for x, like in
                ((dh, h), (dw, w), (db, b), (slopes, c))]  # fmt: skip
        return (*outs, dscale.to(scale), None, None, None, None, None)


def head_first(
    operands: _Operands, wanted: Sequence[bool], chunk: int | None = None
) -> tuple[Tensor, Tensor | None, _Grads]:
    """The head's loss and gradient in one pass over the chunks.

    Args:
        operands: (h [M, D], W [V, D], b [V] or None, targets [M], coefficients [M]).
        wanted: Which of ∂h, ∂W, ∂b to compute.
        chunk: Tokens whose logits exist at once; chosen by size if not given.
    Returns:
        ce [M] in nats; P W [M, D], which `head_second` can use again, None where ∂h is not wanted; and (∂h, ∂W, ∂b),
        None where not wanted.
    """
    y = operands[3]
    h, w, b, c = _work(operands)
    chunk = chunk or _chunk(w)
    ce = h.new_empty(len(h))
    pw, dw, db = _accumulators(h, w, b, wanted)
    room = _room(h, w, chunk)
    for start in range(0, len(h), chunk):
        part = slice(start, start + chunk)
        place = y[part, None]
        p, z = _probabilities(h[part], w, b, room)
        # the largest probability is at least 1/V, so its logarithm is exact to rounding
        ce[part] = z.amax(1) - p.amax(1).log() - z.gather(1, place).squeeze(1)
        if any(wanted):
            p.scatter_(1, place, p.gather(1, place) - 1)  # P = p − 1_y
            if pw is not None:
                torch.mm(p, w, out=pw[part])
            if dw is not None:
                dw.addmm_(p.t(), c[part, None] * h[part], beta=min(start, 1))
            if db is not None:
                db.addmv_(p.t(), c[part])
    return ce, pw, (None if pw is None else c[:, None] * pw, dw, db)


def head_second(
    operands: _Operands,
    tangents: Sequence[_Tangents],
    wanted: Sequence[bool],
    known: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]]]:
    """Tangents of the head's gradient; by the symmetry of the Hessian, also the gradient's pullback.

    Args:
        operands: As for `head_first`.
        tangents: Of (h, W, b, c), one tuple for each direction; p is computed once for all of them.
        wanted: Which of ∂h, ∂W, ∂b are functions of something: their tangents are computed.
        known: P W, as `head_first` found it at the same operands; computed, to the same bits, if not given.
        chunk: Tokens whose logits exist at once; chosen by size if not given.
    Returns:
        ∂h [M, D]; and for each direction its tangent, those of ∂W and ∂b, and ⟨P, ż⟩ [M], the tangent of ce. None
        where not wanted.
    """
    y = operands[3]
    h, w, b, c = _work(operands)
    chunk = chunk or _chunk(w)
    moved = [[None if u is None else u.to(h) for u in each] for each in tangents]
    sums = [(*_accumulators(h, w, b, wanted), h.new_empty(len(h))) for _ in tangents]
    first = torch.empty_like(h) if wanted[0] else None
    room = _room(h, w, chunk)
    for start in range(0, len(h), chunk):
        part = slice(start, start + chunk)
        hk, ck, place = h[part], c[part, None], y[part, None]
        p, buffer = _probabilities(hk, w, b, room)
        both = room[: 2 * len(hk) * len(w)].view(2 * len(hk), len(w))  # P, and d below it
        ours = p.gather(1, place)
        p.scatter_(1, place, ours - 1)  # P = p − 1_y
        pw = None
        if first is not None:
            pw = first[part]
            if known is None:
                torch.mm(p, w, out=pw)
            else:
                pw.copy_(known[part])
        for (uh, uw, ub, uc), (dh, dw, db, slopes) in zip(moved, sums, strict=True):
            uhk, uck = None if uh is None else uh[part], None if uc is None else uc[part, None]
            pu = None if uw is None else p @ uw
            slope = _dots(h.new_zeros(len(p)) if ub is None else p @ ub, (uhk, pw), (hk, pu))
            slopes[part] = slope
            begin = h.new_zeros(len(p)) if ub is None else ub[y[part]]
            ours_dot = _dots(begin, (uhk, w[y[part]]), (hk, None if uw is None else uw[y[part]]))
            d = _tangent(hk, w, uhk, uw, ub, -(ours_dot + slope), buffer)  # ż − ⟨p, ż⟩
            d = d.mul_(p).scatter_(1, place, -ours * slope[:, None])
            if dh is not None:
                dh[part] = ck * (d @ w if pu is None else torch.addmm(pu, d, w))
                if uck is not None and pw is not None:
                    dh[part] += uck * pw
            moved_ch = _sum(None if uhk is None else ck * uhk, None if uck is None else uck * hk)
            if dw is not None:
                rows, factors = (d, ck * hk) if moved_ch is None else (both, torch.cat([moved_ch, ck * hk]))
                dw.addmm_(rows.t(), factors, beta=min(start, 1))
            if db is not None:
                db.addmv_(d.t(), c[part])
                if uc is not None:
                    db.addmv_(p.t(), uc[part])
    return None if first is None else c[:, None] * first, sums


def _dots(start: Tensor, *pairs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """start + Σ ⟨a_m, b_m⟩ over the pairs that are there, [chunk]."""
    return sum((torch.linalg.vecdot(a, b) for a, b in pairs if a is not None and b is not None), start=start)


def _room(h: Tensor, w: Tensor, chunk: int) -> Tensor:
    """Memory for two [chunk, V] buffers, the second right below the first."""
    return memory.empty((2 * min(chunk, len(h)) * len(w),), h)


def _probabilities(h: Tensor, w: Tensor, b: Tensor | None, room: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(z) and z, [chunk, V] each."""
    p, z = room[: 2 * len(h) * len(w)].view(2, len(h), len(w))
    z = torch.mm(h, w.t(), out=z) if b is None else torch.addmm(b, h, w.t(), out=z)
    return torch.softmax(z, 1, out=p), z


def _chunk(weight: Tensor) -> int:
    return max(16, _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES["cpu"]) // (4 * len(weight)))


def _tangent(
    h: Tensor, w: Tensor, uh: Tensor | None, uw: Tensor | None, ub: Tensor | None, shift: Tensor, buffer: Tensor
) -> Tensor:
    """ḣWᵀ + hẆᵀ + ḃ + shift [M], summed in this order from the last."""
    out = buffer[: len(h)].copy_(shift[:, None])
    if ub is not None:
        out.add_(ub)
    for rows, columns in ((uh, w), (h, uw)):
        if rows is not None and columns is not None:
            out.addmm_(rows, columns.t())
    return out


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _work(operands: _Operands) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(h, W, b, c) in the dtype of the arithmetic: float32 for half precision, their own otherwise."""
    h, w, b, _, c = operands
    dtype = torch.promote_types(h.dtype, torch.float32)
    return h.detach().to(dtype), w.detach().to(dtype), None if b is None else b.detach().to(dtype), c.detach().to(dtype)


def _accumulators(h: Tensor, w: Tensor, b: Tensor | None, wanted: Sequence[bool]) -> _Grads:
    return (
        torch.empty_like(h) if wanted[0] else None,
        (memory.empty_like(w) if len(h) else torch.zeros_like(w)) if wanted[1] else None,
        torch.zeros_like(b) if b is not None and wanted[2] else None,
    )
