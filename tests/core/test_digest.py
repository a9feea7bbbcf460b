"""The digest of a tree sees what a state can come to differ by, and is one number on every device."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from retrograd.core import tree

BLOCK = tree._BLOCK // 8  # words


def flipped(raw: Tensor, *bits: int) -> Tensor:
    """Bytes with these bits turned over."""
    found = raw.clone()
    for bit in bits:
        found[bit // 8] ^= 1 << bit % 8
    return found


def told_apart(trees: list[list[Tensor]]) -> None:
    """Trees have as many digests as there are different ones among them, bit for bit."""
    exact = {
        tuple((x.dtype, x.shape, bytes(x.contiguous().flatten().view(torch.uint8).numpy())) for x in leaves)
        for leaves in trees
    }
    assert len({tree.digest(leaves) for leaves in trees}) == len(exact)


def content(size: int, kind: str) -> Tensor:
    if kind == "random":
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    return torch.full((size,), {"zeros": 0, "ones": 255}[kind], dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["zeros", "ones", "random"])
@pytest.mark.parametrize("size", [1, 3, 8, 11, *(pytest.param(size, marks=pytest.mark.slow) for size in (13, 16, 24))])
def test_every_one_and_every_two_flipped_bits_of_a_small_tensor(size: int, kind: str) -> None:
    raw = content(size, kind)
    seen = {tree.digest(raw)}
    flips = list(itertools.combinations(range(8 * size), 1))
    flips += list(itertools.combinations(range(8 * size), 2)) if size <= 16 or kind == "random" else []
    for bits in flips:
        seen.add(tree.digest(flipped(raw, *bits)))
    assert len(seen) == 1 + len(flips)  # and all differ from each other


def test_every_two_flipped_bits_of_one_kind_in_a_whole_block() -> None:
    """What is left to chance in small tensors is settled by the factors: see `bit_sums`."""
    low = tree._factors("cpu") % (1 << 24)
    assert (low % 2 == 1).all()
    assert len(torch.cat([low, (1 << 24) - low]).unique()) == 2 * BLOCK


def test_pairs_of_flipped_bits_anywhere_in_several_blocks() -> None:
    raw = content(8 * (2 * BLOCK + 7) + 3, "random")
    draw = torch.Generator().manual_seed(0)
    plain = tree.bit_sums(raw)
    for _ in range(300):
        first, second = torch.randint(0, 8 * len(raw), (2,), generator=draw).tolist()
        high = first // 64 * 64 + 63, second // 64 * 64 + 63  # signs of float64
        for bits in ((first,), (first, second), high):
            if len(set(bits)) == len(bits):
                assert not torch.equal(tree.bit_sums(flipped(raw, *bits)), plain)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 64, 257, 4096])
def test_signs_orders_shapes_and_types(dtype: torch.dtype, size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    x = torch.randint(1, 100, (size,), generator=draw) * torch.randint(0, 2, (size,), generator=draw).sub(0.5).sign()
    x = x.to(dtype)
    others = [-x, x.view(1, -1), x.view(-1, 1, 1), torch.cat([x, x]), x[:-1]]
    if size > 1:
        halves = torch.where(torch.arange(size) % 2 == 0, x, -x)
        two = x.clone()
        two[:2] = -two[:2]
        others += [halves, -halves, two, x.roll(1), x.roll(size // 2)]
    if size % 4 == 0:
        others += [x.view(-1, 4), x.view(-1, 4).T, x.view(-1, 4).T.contiguous().view(-1)]
    trees = [[x], *([other] for other in others), [x, x], [x, -x], [-x, x], [torch.zeros_like(x), x], [x, x[:0]]]
    told_apart(trees)


@pytest.mark.parametrize("pattern", [(1, 1, -1, -1), (1, -1, -1, 1), (1, -1, 1, -1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_patterns_of_signs_and_their_opposites(dtype: torch.dtype, pattern: tuple[int, ...]) -> None:
    x = torch.tensor(pattern, dtype=dtype).repeat(1024)
    told_apart([[x], [-x], [x.abs()], [-x.abs()], [x.roll(1)], [2 * x.flip(0)]])


def test_swapped_elements_and_leaves() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    plain = tree.digest({"a": x, "b": -x})
    assert tree.digest({"a": -x, "b": x}) != plain
    assert tree.digest({"a": x.T.contiguous(), "b": -x}) != plain
    for i, j in itertools.combinations(range(40), 2):
        swapped = x.clone()
        swapped[[i, j]] = x[[j, i]]
        assert tree.digest({"a": swapped, "b": -x}) != plain


def test_equal_bits_have_equal_digests_whatever_their_memory() -> None:
    x = torch.randn(33, 5, dtype=torch.float64)
    assert tree.digest(x.T.contiguous().T) == tree.digest(x) == tree.digest((x, 3, None))
    assert tree.digest(torch.zeros(()).expand(4, 2)) == tree.digest(torch.zeros(4, 2))
    assert tree.digest(torch.tensor(0.0)) != tree.digest(torch.tensor(-0.0))
    nan = torch.tensor([float("nan"), 1.0])
    assert tree.digest(nan) == tree.digest(nan.clone())


def test_known_digests() -> None:
    """Folders of earlier runs are read by these; whoever changes them says so."""
    assert tree.digest([]) == EMPTY
    assert tree.digest(torch.arange(70_000, dtype=torch.int64)) == COUNTED


EMPTY, COUNTED = "cae66941d9efbd404e4d88758ea67670", "0bd55cb8166eaef4ad2ddb018ae9f44b"


@pytest.mark.parametrize("words", [1, 2, 3, BLOCK])
def test_the_sums_of_a_gpu_are_those_of_a_processor(words: int) -> None:
    blocks = content(3 * 8 * words, "random").view(3, -1)
    assert tree._sums(blocks).tolist() == [x for block in blocks for x in tree._sums_on_cpu(block)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [0, 1, 7, 9, 1000, BLOCK + 3, 5 * BLOCK + 1])
def test_a_gpu_gives_the_same_digest(size: int) -> None:
    x = torch.randn(size)
    assert tree.digest([x.cuda(), x[:3].cuda()]) == tree.digest([x, x[:3]]) == tree.digest([x.cuda(), x[:3]])
