"""What a causal language model computes where a valid target is predicted: logits and hidden states, differentiable.

act(l) is the output of block l, l = 0 … L−1, taken by a hook: the equal of `hidden_states[l + 1]` of transformers but
for the last, which may carry the final norm there. Everything is given at the M positions of a batch that predict a
valid target, in the order of rows and columns, so that no padding and no unsupervised position enters a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from retrograd.core.optim import Params
from retrograd.lm.layout import Layout
from retrograd.lm.model import CausalLM, trainable
from retrograd.lm.proof import form_of
from retrograd.lm.spans import inner

__all__ = ["Outputs", "decoder_blocks", "outputs_of", "recorded", "replaced"]


class Outputs(NamedTuple):
    """What is computed where M valid targets are predicted.

    logits: [M, V], float32 at least; None if not asked for.
    states: act(l) by block number l, [M, D] each.
    rows, columns: of the targets in the batch, [M] int64 each.
    targets: token ids, [M] int64.
    """

    logits: Tensor | None
    states: dict[int, Tensor]
    rows: Tensor
    columns: Tensor
    targets: Tensor


def outputs_of(lm: CausalLM, blocks: Sequence[int] = (), *, logits: bool = True) -> Callable[..., Outputs]:
    """(params, inputs as made by `rows.pad`, adapters=True) → `Outputs`. Dropout is as the module has it.

    With adapters=False the adapters of a LoRA model are off: the model that they were added to.

    Args:
        blocks: Numbers l of the blocks whose states are wanted.
        logits: Whether logits are wanted.
    Raises:
        ValueError: If the model has no such block.
    """
    layers = decoder_blocks(lm.module)
    if absent := [block for block in blocks if not 0 <= block < len(layers)]:
        raise ValueError(
            f"there is no block {absent[0]}: {type(inner(lm.module)).__name__} has {len(layers)}, numbered 0 to "
            f"{len(layers) - 1}"
        )
    layout = Layout(lm.module, form_of(lm.module))
    wrapped = _Watched({block: layers[block] for block in blocks}, layout, logits)
    readers = trainable(lm.module)[1]

    def outputs(params: Params, inputs: dict[str, Tensor], adapters: bool = True) -> Outputs:
        placed = {f"module.{name}": params[leaf] for name, leaf in readers.items()}
        dtype = next(iter(params.values())).dtype
        with layout.scope(dtype), nullcontext() if adapters else _without_adapters(lm.module):
            return functional_call(wrapped, placed, (inputs,), tie_weights=False)

    return outputs


def decoder_blocks(module: nn.Module) -> list[nn.Module]:
    """The decoder's blocks in order: the largest `ModuleList` of modules of one type.

    Raises:
        ValueError: If there is none.
    """
    lists = [
        list(part)
        for part in inner(module).modules()
        if isinstance(part, nn.ModuleList) and len({type(block) for block in part}) == 1
    ]
    if not lists:
        raise ValueError(f"{type(inner(module)).__name__} has no list of blocks of one type, so no hidden states")
    return max(lists, key=lambda blocks: sum(p.numel() for block in blocks for p in block.parameters()))


class _Watched(nn.Module):
    """Model, head and hooks as one module, so that parameters are substituted in all of it."""

    def __init__(self, blocks: dict[int, nn.Module], layout: Layout, logits: bool) -> None:
        super().__init__()
        self.module, self.layout, self.logits = layout.module, layout, logits
        self.blocks = blocks  # a dict, so that they are not registered a second time

    def forward(self, inputs: dict[str, Tensor]) -> Outputs:
        model, calls = inner(self.module), self.layout.calls(inputs)
        place, (rows, columns), targets = self.layout.predicting(inputs)
        logits: Tensor | None
        with recorded(self.blocks) as states:
            if self.layout.form.fused:
                hidden = torch.cat([model.base_model(**call).last_hidden_state for call in calls], 1)
                logits = model.get_output_embeddings()(hidden[place]) if self.logits else None
            else:
                logits = torch.cat([model(**call).logits for call in calls], 1)[place]
        if logits is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = {block: torch.cat(parts, 1)[place] for block, parts in states.items()}
        return Outputs(logits, each, rows, columns, targets)


@contextmanager
def recorded(blocks: dict[int, nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """The outputs of blocks by number, one for each time that the model is called."""
    states: dict[int, list[Tensor]] = {number: [] for number in blocks}

    def recorder(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(block: nn.Module, arguments: Any, output: Any) -> None:
            states[number].append(output if isinstance(output, Tensor) else output[0])

        return hook

    handles = [block.register_forward_hook(recorder(number)) for number, block in blocks.items()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The output of a block is changed before anything reads it."""

    def hook(block: nn.Module, arguments: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_adapters(module: nn.Module) -> Iterator[None]:
    if not hasattr(module, "disable_adapter"):
        raise ValueError(f"{type(module).__name__} has no adapters to turn off; take a frozen copy as the reference")
    with module.disable_adapter():  # type: ignore[operator]
        yield
