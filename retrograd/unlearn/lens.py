"""A tuned lens: what the model would say if it stopped after block l.

    lens_l(h) = head(norm(h + A_l h + b_l))        A_l, b_l: least KL(final predictions ‖ lens_l) on forget rows, AdamW

Belrose et al., arXiv:2303.08112. Norm and head are the model's own and fixed. The last block needs no A and b. h is the
output of block l here, the `hidden_states[l + 1]` of transformers, and a published lens of index i is ours of i − 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from retrograd.core import tree
from retrograd.data.pairs import PairStream
from retrograd.lm.model import CausalLM, evaluating
from retrograd.lm.outputs import Outputs, decoder_blocks, outputs_of
from retrograd.lm.spans import inner
from retrograd.unlearn.reference import Fitted, Reference
from retrograd.unlearn.view import Side, View

__all__ = ["Lens", "fit_lens", "read_out"]


@dataclass(frozen=True, eq=False)
class Lens:
    """A lens for each of some blocks.

    maps: (A [D, D], b [D]) by block; the last block has none.
    end: states [m, D] → logits [m, V], norm and head.
    """

    maps: dict[int, tuple[Tensor, Tensor]]
    end: Callable[[Tensor], Tensor]

    def __call__(self, block: int, h: Tensor) -> Tensor:
        if block in self.maps:
            a, b = self.maps[block]
            h = h + (h.to(a) @ a.T + b).to(h)
        return self.end(h)


def fit_lens(
    lm: CausalLM, reference: Reference, stream: PairStream, blocks: tuple[int, ...], *, epochs: int, rate: float
) -> Fitted:
    """The lenses of some blocks, trained on the forget rows of a stream's batches.

    Args:
        epochs: Passes over the stream.
        rate: AdamW's learning rate; its weight decay is 0.01.
    Raises:
        ValueError: If the model's logits are more than norm and head of its last states.
    """
    last = len(decoder_blocks(lm.module)) - 1
    wanted = sorted({*blocks, last})
    outputs, end = outputs_of(lm, wanted), read_out(lm.module)
    like = next(iter(lm.params.values()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    width = inner(lm.module).get_input_embeddings().weight.shape[1]
    maps: Any = {
        block: tuple(torch.zeros(size, dtype=dtype, device=like.device, requires_grad=True)
                     for size in ((width, width), (width,)))
        for block in blocks if block != last
    }  # fmt: skip
    lens = Lens(maps, end)
    leaves = [leaf for pair in maps.values() for leaf in pair]
    optimizer = torch.optim.AdamW(leaves, rate, weight_decay=0.01) if leaves else None
    for step in range(epochs * len(stream)):
        side = _forget_side(lm, reference, stream, step % len(stream), outputs)
        if not step:
            _check_end(side, end, last)
        if optimizer is None:
            break
        optimizer.zero_grad()
        with torch.enable_grad():
            _distance(lens, side).backward()
        optimizer.step()
    fitted = {block: (a.detach(), b.detach()) for block, (a, b) in maps.items()}
    return Fitted(Lens(fitted, end), tree.digest({str(block): list(pair) for block, pair in fitted.items()}))


def _distance(lens: Lens, side: Side) -> Tensor:
    """Σ_l mean KL(final ‖ lens_l)."""
    final = side.logits.log_softmax(-1)
    each = [
        torch.sum(final.exp() * (final - lens(block, side.now.states[block]).log_softmax(-1)), -1).mean()
        for block in lens.maps
    ]
    return torch.stack(each).sum()


def _forget_side(
    lm: CausalLM, reference: Reference, stream: PairStream, step: int, outputs: Callable[..., Outputs]
) -> Side:
    batch = stream[step]
    with torch.no_grad(), evaluating(lm.module):
        now = outputs(reference.params, batch.inputs, reference.adapters)
    side = View(now, None, batch.inputs, batch.scale).forget
    assert side is not None, "every batch has forget rows"
    return side


def read_out(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """States after the last block [m, D] → logits [m, V]: the final norm and the head, as the module has them.

    Raises:
        ValueError: If there is no final norm beside the blocks.
    """
    model, blocks = inner(module), decoder_blocks(module)
    body = next(part for part in model.modules() if blocks in [list(x) for x in part.children() if _is_list(x)])
    norms = [
        part for part in body.children()
        if not _is_list(part) and (own := list(part.parameters())) and all(p.ndim == 1 for p in own)
    ]  # fmt: skip
    if not norms:
        raise ValueError(f"{type(model).__name__} has no norm beside its blocks, so no lens can be read through one")
    norm, head = norms[-1], model.get_output_embeddings()

    def end(h: Tensor) -> Tensor:
        for part in (norm, head):
            h = functional_call(part, {name: p.detach() for name, p in part.named_parameters()}, (h,))
        return h.to(torch.promote_types(h.dtype, torch.float32))

    return end


def _is_list(part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList)


def _check_end(side: Side, end: Callable[[Tensor], Tensor], last: int) -> None:
    with torch.no_grad():
        far = float((end(side.now.states[last]) - side.logits).norm() / side.logits.norm())
    if not far <= 0.02:  # half precision is that coarse
        raise ValueError(
            f"norm and head of the last block's states are not the model's logits, but {far:.2g} of their norm away: "
            "it scales or caps them, and a lens through norm and head alone would read something else"
        )
