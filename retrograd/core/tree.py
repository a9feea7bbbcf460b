"""Pytrees of tensors: the one door to nested states.

A tree is any nesting of dicts, tuples, NamedTuples and lists. Functions act on its tensors; other leaves (a step
count, a None) pass through unchanged, so that mapping over a state cannot forget a field.

Every number that a step makes of several leaves, such as a norm, goes through `across` or `total`, and what is no
function of a leaf's entries one by one through `of_whole`. Where leaves lie over several processes, whoever knows how
hands that in (`lying`).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = [
    "Frame", "Lying", "across", "bit_sums", "cut", "digest", "digest_of", "dot", "frame", "leaves", "lying", "map",
    "named", "nbytes", "nonfinite", "norm", "of_whole", "stacked", "total", "unnamed",
]  # fmt: skip

T = TypeVar("T")
_HOLE = type("Hole", (), {"__repr__": lambda _: "tensor"})()


@runtime_checkable
class Lying(Protocol):
    """How the leaves of trees lie over processes, which all call the same functions in the same order."""

    def across(self, parts: Tensor) -> Tensor:
        """As `tree.across`."""

    def total(self, part: Tensor) -> Tensor:
        """As `tree.total`."""

    def of_whole(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        names: Sequence[str],
        given: Callable[[str], tuple[Tensor, ...]],
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """As `tree.of_whole`."""


class _Here:
    """All leaves are in this process."""

    def across(self, parts: Tensor) -> Tensor:
        return parts

    def total(self, part: Tensor) -> Tensor:
        return part

    def of_whole(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        names: Sequence[str],
        given: Callable[[str], tuple[Tensor, ...]],
    ) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        for name in names:
            yield name, function(*given(name))


_lying: Lying = _Here()


@contextmanager
def lying(how: Lying) -> Iterator[None]:
    """Within it, leaves of trees lie over processes so."""
    global _lying
    before, _lying = _lying, how
    try:
        yield
    finally:
        _lying = before


def across(parts: Tensor) -> Tensor:
    """One number (or row) for each leaf that is here, [n, …] → for every leaf wherever it is, in one order, [N, …]."""
    return _lying.across(parts)


def total(part: Tensor) -> Tensor:
    """What comes of the leaves that are here, added up over processes."""
    return _lying.total(part)


def of_whole(
    function: Callable[..., tuple[Tensor, ...]], names: Sequence[str], given: Callable[[str], tuple[Tensor, ...]]
) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """A function of whole leaves, leaf by leaf, wherever their pieces lie. It is asked for a few leaves at a time.

    Args:
        function: Tensors of a leaf, [*shape] or [K, *shape] each → as many of the same shapes.
        names: The leaves that are here.
        given: What the function is given of a leaf.
    Yields:
        What it gives, in an order of its own.
    """
    return _lying.of_whole(function, names, given)


def map(function: Callable[..., Any], tree: T, *rest: Any) -> T:
    """Apply `function` to every tensor of `tree`, and to the tensors at the same places of `rest`."""

    def apply(leaf: Any, *others: Any) -> Any:
        return function(leaf, *others) if isinstance(leaf, Tensor) else leaf

    return _pytree.tree_map(apply, tree, *rest)


def cut(leaf: Tensor, pieces: int, dim: int = 0) -> list[Tensor]:
    """Copies of a leaf's pieces: ⌈n/pieces⌉ of a dimension each, the last ones shorter or empty. A scalar is one row.

    >>> [x.tolist() for x in cut(torch.arange(5), 4)]
    [[0, 1], [2, 3], [4], []]
    """
    if pieces == 1:
        return [leaf]
    rows = leaf.unsqueeze(dim) if leaf.ndim == dim else leaf
    height = -(-rows.shape[dim] // pieces)
    starts = [min(s * height, rows.shape[dim]) for s in range(pieces + 1)]
    return [
        rows.narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)
        for start, stop in itertools.pairwise(starts)
    ]


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
    flat, spec = _pytree.tree_flatten(tree)
    return Frame([_HOLE if isinstance(leaf, Tensor) else leaf for leaf in flat], spec)


def dot(first: Any, second: Any) -> Tensor:
    """Σ ⟨a, b⟩ over two trees of the same structure, [], accumulated in float64."""
    pairs = zip(leaves(first), leaves(second), strict=True)
    return total(sum((torch.sum(a.double() * b.double()) for a, b in pairs), torch.zeros((), dtype=torch.float64)))


def norm(tree: Any, batch_dims: int = 0) -> Tensor:
    """Euclidean norm over all tensors of a tree, in float64; one norm for each index of the leading dimensions."""
    floating = [leaf for leaf in leaves(tree) if leaf.is_floating_point()]
    if not floating:
        return torch.zeros(())
    parts = [torch.linalg.vector_norm(leaf.reshape(*leaf.shape[:batch_dims], -1), dim=-1).double() for leaf in floating]
    return across(torch.stack(parts)).square().sum(0).sqrt()


def nonfinite(tree: Any) -> float:
    """Fraction of the tree's entries that are NaN or infinite."""
    floating = [leaf for leaf in leaves(tree) if leaf.is_floating_point()]
    entries, bad = sum(leaf.numel() for leaf in floating), sum(int((~torch.isfinite(x)).sum()) for x in floating)
    entries, bad = total(torch.tensor([entries, bad])).tolist()
    return bad / max(1, entries)


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

    blake2b of each tensor's type, shape and `bit_sums`, in order. Not cryptographic, for the sums are not.
    """
    return digest_of(leaves(tree))


def digest_of(tensors: Iterable[Tensor]) -> str:
    """The digest of a tree with these tensors, which are asked for one by one."""
    sums, kinds = [], []
    for leaf in tensors:
        sums.append(bit_sums(leaf))
        kinds.append(f"{leaf.dtype}{tuple(leaf.shape)};")
    hashed = hashlib.blake2b(digest_size=16)
    if sums:
        one_device = len({x.device for x in sums}) == 1
        together = torch.cat(sums if one_device else [x.cpu() for x in sums])  # a GPU is waited for once
        hashed.update("".join(kinds).encode())
        hashed.update(together.cpu().numpy().data)
    return hashed.hexdigest()


_BLOCK = 1 << 19  # bytes
_AHEAD = 5  # bytes


def bit_sums(leaf: Tensor) -> Tensor:
    """What `digest` hashes, [n] int64 on the tensor's device, which is not waited for: equal bits give equal sums.

    For each block of 64-bit words, Σ yᵢ·rᵢ modulo 2⁶⁴ and its last word; then the bytes that fill no word. y are the
    words but the last after each byte was xor-ed with the one 5 further on: a product modulo 2⁶⁴ keeps little of a
    word's high bits, such as the sign of a float, so each bit gets a second place, and one of its two is below 2⁴⁰.
    Sums of integers do not depend on the order of summation.

    Every one and every two flipped bits change what is hashed. Where neither is in a last word: both places of a bit
    are 24 bits or more apart; so if the lower places of the two are in different words, ±rᵢ ± rⱼ ≢ 0 modulo 2²⁴ says it
    (`_factors`), and if they are one place, where the flips cancel, then the other places differ.
    """
    raw = leaf.detach().contiguous().flatten().view(torch.uint8)
    if leaf.device.type == "cpu":
        return torch.tensor(_sums_on_cpu(raw), dtype=torch.int64)
    size = raw.numel() // 8 * 8
    whole = size // _BLOCK * _BLOCK
    parts = [part for part in (raw[:whole].view(-1, _BLOCK), raw[whole:size].view(1, -1)) if part.numel()]
    return torch.cat([*map(_sums, parts), raw[size:].long()])


def _sums(blocks: Tensor) -> Tensor:
    """Sum and last word of each block, [2n] from bytes [n, 8·words]."""
    mixed = (blocks[:, :-8] ^ blocks[:, _AHEAD : _AHEAD - 8]).flatten().view(torch.int64)
    words = mixed.view(len(blocks), blocks.shape[1] // 8 - 1)
    sums = (words * _factors(str(blocks.device))[: words.shape[1]]).sum(1)
    return torch.stack([sums, blocks[:, -8:].contiguous().view(torch.int64)[:, 0]], dim=1).flatten()


def _sums_on_cpu(raw: Tensor) -> list[int]:
    """All that is hashed of a tensor's bytes: the same, a block at a time, which stays in the cache.

    By numpy's products, which are twice as fast as torch's.
    """
    bits, factors, sums = raw.numpy(), _factors("cpu").numpy(), []
    size = len(bits) // 8 * 8
    for start in range(0, size, _BLOCK):
        block = bits[start : min(start + _BLOCK, size)]
        words = (block[:-8] ^ block[_AHEAD : _AHEAD - 8]).view("int64")
        words *= factors[: len(words)]
        sums += [int(words.sum()), int(block[-8:].view("int64")[0])]
    return sums + bits[size:].tolist()


@lru_cache
def _factors(device: str) -> Tensor:
    """Fixed factors of the words of a block: no two are equal modulo 2²⁴, or each other's negatives.

    Their low 24 bits are 2k + 1 with different k below 2²², of a mixing that can be undone; the bits above are those of
    splitmix64.
    """
    place = torch.arange(_BLOCK // 8, dtype=torch.int64, device=device)
    low = place * 2_654_435 % (1 << 22)
    low = (low ^ (low >> 11)) * 1_540_483_477 % (1 << 22)
    high = (place + 1) * -7046029254386353131
    high = (high ^ (high >> 30)) * -4658895280553007687
    high = (high ^ (high >> 27)) * -7723592293110705685
    return (high ^ (high >> 31)) & -(1 << 24) | (2 * low + 1)


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
