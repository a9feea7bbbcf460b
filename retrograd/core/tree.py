"""Pytrees of tensors: the one door to nested states.

A tree is any nesting of dicts, tuples, NamedTuples and lists. Functions act on its tensors; other leaves (a step
count, a None) pass through unchanged, so that mapping over a state cannot forget a field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = [
    "Frame", "bit_sums", "digest", "dot", "frame", "leaves", "map", "named", "nbytes", "nonfinite", "norm", "stacked",
    "unnamed",
]  # fmt: skip

T = TypeVar("T")
_HOLE = type("Hole", (), {"__repr__": lambda _: "tensor"})()


def map(function: Callable[..., Any], tree: T, *rest: Any) -> T:
    """Apply `function` to every tensor of `tree`, and to the tensors at the same places of `rest`."""

    def apply(leaf: Any, *others: Any) -> Any:
        return function(leaf, *others) if isinstance(leaf, Tensor) else leaf

    return _pytree.tree_map(apply, tree, *rest)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in a fixed order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class Frame:
    """A tree without its tensors: what two trees of one form have in common, and `key` says."""

    others: list[Any]
    spec: Any

    @property
    def key(self) -> str:
        return f"{self.others} {self.spec}"

    @property
    def count(self) -> int:
        """How many tensors."""
        return sum(x is _HOLE for x in self.others)

    def around(self, tensors: Iterable[Tensor]) -> Any:
        """The tree of this form that holds `tensors`."""
        given = iter(tensors)
        return _pytree.tree_unflatten([next(given) if x is _HOLE else x for x in self.others], self.spec)


def frame(tree: Any) -> Frame:
    """What is left of a tree without its tensors; `leaves` are the tensors, in order."""
    found, spec = _pytree.tree_flatten(tree)
    return Frame([_HOLE if isinstance(leaf, Tensor) else leaf for leaf in found], spec)


def dot(first: Any, second: Any) -> Tensor:
    """Σ ⟨a, b⟩ over two trees of the same structure, [], accumulated in float64."""
    pairs = zip(leaves(first), leaves(second), strict=True)
    return sum((torch.sum(a.double() * b.double()) for a, b in pairs), torch.zeros((), dtype=torch.float64))


def norm(tree: Any, batch_dims: int = 0) -> Tensor:
    """Euclidean norm over all tensors of a tree, in float64; one norm for each index of the leading dimensions."""
    floating = [leaf for leaf in leaves(tree) if leaf.is_floating_point()]
    if not floating:
        return torch.zeros(())
    parts = [torch.linalg.vector_norm(leaf.reshape(*leaf.shape[:batch_dims], -1), dim=-1).double() for leaf in floating]
    return torch.stack(parts).square().sum(0).sqrt()


def nonfinite(tree: Any) -> float:
    """Fraction of the tree's entries that are NaN or infinite."""
    floating = [leaf for leaf in leaves(tree) if leaf.is_floating_point()]
    total = sum(leaf.numel() for leaf in floating)
    return sum(int((~torch.isfinite(leaf)).sum()) for leaf in floating) / max(1, total)


def nbytes(tree: Any) -> int:
    """Bytes of all tensors of a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(tree))


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a tree by their path, such as "params.embed.weight"."""
    flat, _ = _pytree.tree_flatten_with_path(tree)
    return {".".join(_key(k) for k in path): leaf for path, leaf in flat if isinstance(leaf, Tensor)}


def unnamed(like: T, tensors: dict[str, Tensor], *, move: bool = True) -> T:
    """The tree of the structure `like` whose tensors are given by path; inverse of `named`.

    Args:
        move: Bring every tensor to the device of its like.
    Raises:
        ValueError: If a tensor is missing, unknown, or of another shape or dtype.
    """
    wanted = named(like)
    if wanted.keys() != tensors.keys():
        missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ValueError(f"tensors do not fit this state: missing {missing[:3]}, unknown {unknown[:3]}")
    for name, leaf in wanted.items():
        if (leaf.shape, leaf.dtype) != (tensors[name].shape, tensors[name].dtype):
            raise ValueError(
                f"tensor {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, "
                f"this state has {tuple(leaf.shape)} {leaf.dtype}"
            )
    ordered = iter([tensors[name].to(leaf.device) if move else tensors[name] for name, leaf in wanted.items()])
    return map(lambda _: next(ordered), like)


def stacked(group: Sequence[Tensor]) -> Tensor:
    """[K, *shape] of K tensors; of a single one a view instead of a copy."""
    return group[0].unsqueeze(0) if len(group) == 1 else torch.stack(list(group))


def digest(tree: Any) -> str:
    """A fingerprint of the exact bits of a tree: equal bits give equal digests on any device and thread count.

    For each tensor, Σ xᵢ·rᵢ modulo 2⁶⁴ over its bits read as integers, with fixed odd rᵢ: integer sums do not depend on
    the order of summation, and the factors make opposite drifts and swapped entries visible. Not cryptographic.
    """
    given, total = leaves(tree), 0
    if not given:
        return f"{total:032x}"
    found = [bit_sums(leaf) for leaf in given]
    one_device = len({x.device for x in found}) == 1
    together = torch.cat(found if one_device else [x.cpu() for x in found])  # a GPU is waited for once
    numbers = iter(together.tolist())
    for leaf, sums in zip(given, found):
        rest = leaf.numel() * leaf.element_size() % 8
        share = sum(next(numbers) * (2 * place + 1) for place in range(len(sums) - rest))
        share += sum(next(numbers) << (8 * place) for place in range(1, rest + 1))
        total = (total * 1_000_003 + share % (1 << 64) + leaf.numel()) % (1 << 128)
    return f"{total:032x}"


_BLOCK = 1 << 16


def bit_sums(leaf: Tensor) -> Tensor:
    """What `digest` sums up, [n] int64 on the tensor's device, which is not waited for: equal bits give equal sums.

    Σ xᵢ·rᵢ of each block of 64-bit words and of the words left over, then the bytes left over.
    """
    raw = leaf.detach().contiguous().flatten().view(torch.uint8)
    words = raw.numel() // 8
    whole = words // _BLOCK * _BLOCK
    body, rest = raw[: words * 8].view(torch.int64), raw[words * 8 :]
    blocks, tail, ramp = body[:whole].view(-1, _BLOCK), body[whole:], _ramp(str(leaf.device))
    factors = ramp[: words - whole]
    if leaf.device.type == "cpu":  # a GPU has no product of integer matrices
        found = torch.from_numpy(blocks.numpy().dot(ramp.numpy()))  # twice as fast as torch's
        return torch.cat([found, torch.dot(tail, factors)[None], rest.long()])
    return torch.cat([(blocks * ramp).sum(1), (tail * factors).sum()[None], rest.long()])


@lru_cache
def _ramp(device: str) -> Tensor:
    """Fixed odd 64-bit factors (splitmix64's increment, wrapped)."""
    return (torch.arange(_BLOCK, dtype=torch.int64, device=device) * -7046029254386353131) | 1


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
