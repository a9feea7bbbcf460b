"""Large files past the system's cache: the same bytes, on every file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from retrograd.runs import files
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.states import direct
from retrograd.runs.states.direct import read_direct, write_direct

BLOCK = direct._BLOCK


def parts(*sizes: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, size, np.uint8) for size in sizes]


def refusing(name: str, times: int, error: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a call of the system fail for the first few times; returns the calls."""
    real: Callable[..., Any] = getattr(os, name)
    calls: list[int] = []

    def called(*given: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(error, os.strerror(error))
        return real(*given)

    monkeypatch.setattr(os, name, called)
    return calls


SIZES = [(0,), (1,), (4095, 1, 1), (4096,), (0, 5000, 0, 3), (BLOCK,), (BLOCK - 1, 2), (3, 2 * BLOCK + 17, 4096)]


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_written_is_there_and_is_read(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    written, path = parts(*sizes), tmp_path / "x"
    write_direct(path, written)
    whole = b"".join(part.tobytes() for part in written)
    assert path.read_bytes() == whole
    for start in {0, min(7, len(whole)), len(whole) // 2}:
        found = [np.zeros(len(whole[start:]) // 2, np.uint8), np.zeros(-(-len(whole[start:]) // 2), np.uint8)]
        read_direct(path, start, found)
        assert b"".join(part.tobytes() for part in found) == whole[start:]


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    write_direct(tmp_path / "x", parts(5000))
    with pytest.raises(OSError, match="it ends 100 bytes early"):
        read_direct(tmp_path / "x", 1000, [np.zeros(4000, np.uint8), np.zeros(100, np.uint8)])


@pytest.mark.parametrize("name", ["open", "write", "readv"])
def test_a_file_system_without_it_serves_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, (data,) = tmp_path / "x", parts(BLOCK + 10)
    if name == "readv":
        write_direct(path, [data])
    calls = refusing(name, 1, errno.EINVAL, monkeypatch)
    if name != "readv":
        write_direct(path, [data])
    found = np.zeros_like(data)
    read_direct(path, 0, [found])
    assert np.array_equal(found, data)
    assert len(calls) > 1


def test_a_write_in_parts_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, (data,) = os.write, parts(2 * BLOCK)
    monkeypatch.setattr(os, "write", lambda file, view: real(file, view[: max(1, len(view) // 3)]))
    write_direct(tmp_path / "x", [data])
    assert (tmp_path / "x").read_bytes() == data.tobytes()


@pytest.mark.parametrize(("name", "error"), [("write", errno.EIO), ("open", errno.EACCES), ("write", errno.ENOSPC)])
def test_other_failures_are_told_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    monkeypatch.setattr(files, "_LARGE", 0)
    refusing(name, 99, error, monkeypatch)
    told = "the disk is full while writing" if error == errno.ENOSPC else f"cannot write .*{os.strerror(error)}"
    with pytest.raises(RunError, match=told):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(10)}, {})
    assert not list(tmp_path.iterdir())


TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8), "half": torch.randn(3, 5).bfloat16(), "none": torch.zeros(0, 4),
    "wide": torch.randn(1001, 1003), "scalar": torch.tensor(3.5, dtype=torch.float64), "turned": torch.randn(4, 6).t(),
    "ids": torch.arange(9), "true": torch.tensor([True, False]),
}  # fmt: skip


@pytest.mark.parametrize("large", [0, 1 << 40])
def test_a_large_file_is_a_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(files, "_LARGE", large)
    path, about = tmp_path / "x.safetensors", {"step": "3", "who": "ä"}
    write_tensors(path, TENSORS, about)
    into, metadata = read_tensors(path, lambda mapped: {name: torch.full_like(x, 9) for name, x in mapped.items()})
    assert metadata == about
    for found in (load_file(path), into, read_tensors(path)[0]):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_a_large_file_that_is_cut_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LARGE", 0)
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1000)}, {})

    def cut(mapped: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        os.truncate(path, 2000)
        return {"a": torch.zeros(1000)}

    with pytest.raises(RunError, match=r"broken or truncated \(2000 bytes\): it ends .* bytes early"):
        read_tensors(path, cut)
