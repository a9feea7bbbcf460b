"""Leaves of what is proved: named in messages with the modules that own them, wherever the leaf lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from retrograd.core import tree
from retrograd.core.optim import Params

__all__ = ["anywhere", "named", "refuse_infinite", "some", "wide"]


def anywhere(leaves: dict[str, bool]) -> list[str]:
    """Names of the leaves of which something is true; one of a parameter's pieces, where those lie over processes."""
    names = list(leaves)
    every = tree.across(torch.tensor([leaves[name] for name in names], dtype=torch.uint8))
    processes = len(every) // max(1, len(names))
    return list(dict.fromkeys(names[place // processes] for place in every.nonzero().flatten().tolist()))


def refuse_infinite(what: str, derivative: Params, module: nn.Module | None = None) -> None:
    """Refuse a derivative that is not finite.

    Raises:
        ValueError: With the first such leaf.
    """
    bad = anywhere({name: not bool(torch.isfinite(x).all()) for name, x in derivative.items()})
    if bad:
        raise ValueError(
            f"{what} is not finite in {named(module, bad[0])} at the first step, where the gradient is: a function "
            "there has no finite slope, as √ at 0 (the cure for Adam is eps_root above 0)"
        )


def named(module: nn.Module | None, name: str) -> str:
    """A parameter or buffer with the type of the module that owns it; a piece goes by its parameter's name."""
    name = name.partition("@")[0]
    parts = dict(module.named_modules()) if module is not None else {}
    owner = parts.get(name.rpartition(".")[0])
    if owner is None:
        return name
    held = list(owner) if isinstance(owner, ParametrizationList) else [owner]
    return f"{name} ({', '.join(type(part).__name__.lstrip('_') for part in held)})"


def some(names: Sequence[str], module: nn.Module | None = None) -> str:
    """The first three names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(named(module, name) for name in names[:3]) + more


def wide(x: Tensor) -> Tensor:
    """In float64, if it is a floating-point number."""
    return x.double() if x.is_floating_point() and x.dtype != torch.float64 else x
