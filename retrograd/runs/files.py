"""Files that are there whole or not at all, and logs of whole lines; `retrograd.durable` has the rules."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograd.durable import make_folder, rename, temporary_name, to_disk
from retrograd.runs.errors import RunError
from retrograd.runs.states.buffers import as_bytes
from retrograd.runs.states.direct import read_direct, write_direct

__all__ = [
    "append_line",
    "file_digest",
    "read_about",
    "read_lines",
    "read_tensors",
    "sync",
    "write_atomic",
    "write_in_turn",
    "write_json",
    "write_tensors",
    "write_torch",
]

_LARGE = 16 << 20  # bytes; such a file goes past the system's cache
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it; it counts from then on, whatever happens.

    Raises:
        RunError: If the disk is full or the file cannot be written; nothing is left behind.
    """
    temporary = temporary_name(path)
    with _machine_errors(path):
        try:
            make_folder(path.parent)
            write(temporary)
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, atomically."""
    write_atomic(path, lambda t: t.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8"))


def write_torch(path: Path, tensor: Tensor) -> None:
    """Write one tensor for `torch.load`, atomically and with the same bytes for the same tensor."""
    buffer = io.BytesIO()  # a file's own name would go into its bytes
    torch.save(tensor.contiguous().clone(), buffer)
    write_atomic(path, lambda t: t.write_bytes(buffer.getvalue()))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically."""
    from safetensors.torch import save_file

    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that every tensor lies aligned
    flat = {name: tensor.detach().contiguous() for name, tensor in ordered}
    need = _refuse_full(path, flat)
    if need < _LARGE or any(tensor.dtype not in _CODES for tensor in flat.values()):
        write_atomic(path, lambda t: save_file(flat, t, metadata))
        return
    parts = [np.frombuffer(_header(flat, metadata), np.uint8), *(as_bytes(tensor) for tensor in flat.values())]
    write_atomic(path, lambda t: write_direct(t, parts))


def write_in_turn(path: Path, like: dict[str, Tensor], tensors: Iterable[Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, atomically, whose tensors are made one by one.

    Args:
        like: Tensors of their names, shapes and dtypes, in the order in which they come; wide ones before narrow ones.
    """
    _refuse_full(path, like)
    parts = (as_bytes(tensor.detach().cpu().contiguous()) for tensor in tensors)
    header = np.frombuffer(_header(like, metadata), np.uint8)
    write_atomic(path, lambda t: write_direct(t, itertools.chain([header], parts)))


def read_tensors(
    path: Path, rooms: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Args:
        rooms: Tensors like those given, to read into; fresh ones when None. A copy of what is mapped would for a while
            take the memory twice.
    Raises:
        RunError: If the file is truncated or not of this format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            if rooms is None:
                return {name: tensor.clone() for name, tensor in mapped.items()}, metadata
        return _read_into(rooms(mapped), path), metadata
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, error) from error


def read_about(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        RunError: As `read_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 16 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def append_line(path: Path, line: str, *, durable: bool = False) -> None:
    """Append a line, after what a write that was interrupted left of another is cut off.

    Args:
        durable: Sync the file with it.
    """
    with _machine_errors(path), path.open("ab+", buffering=0) as file:
        _cut_torn(file)
        text = memoryview(f"{line}\n".encode())
        while text:  # a disk that is almost full takes a part, and refuses the next
            text = text[file.write(text) :]
        if durable:
            os.fsync(file.fileno())


def _cut_torn(file: io.FileIO) -> None:
    end = file.seek(0, os.SEEK_END)
    if not end or os.pread(file.fileno(), 1, end - 1) == b"\n":
        return
    start, whole = end, 0
    while start and not whole:
        start = max(0, start - 4096)
        whole = os.pread(file.fileno(), min(4096, end - start), start).rfind(b"\n") + 1
    file.truncate(start + whole)


def read_lines(path: Path) -> list[str]:
    """The complete lines of a file; none if it does not exist."""
    if not path.exists():
        return []
    return [line.decode(errors="replace") for line in path.read_bytes().split(b"\n")[:-1] if line]


def sync(path: Path) -> None:
    """Wait until what a file has grown by is on disk, if there is one."""
    if path.exists():
        with _machine_errors(path):
            to_disk(path)


def _refuse_full(path: Path, tensors: dict[str, Tensor]) -> int:
    """Bytes of tensors, for which there is room: a memory-mapped write to a full disk would kill the process."""
    need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    make_folder(path.parent)
    free = shutil.disk_usage(path.parent).free
    if need > free:
        raise RunError(_full(path, need, free))
    return need


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What comes before the tensors' bytes in a safetensors file; github.com/huggingface/safetensors#format."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_into(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Fill contiguous tensors, all that a safetensors file has."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        names = sorted(tensors, key=lambda name: header[name]["data_offsets"])
        parts = [as_bytes(tensors[name]) for name in names]
        if path.stat().st_size >= _LARGE:
            read_direct(path, 8 + length, parts)
            return tensors
        for name, part in zip(names, parts):
            if file.readinto(part.data) != len(part):
                raise OSError(f"it ends within tensor {name}")
    return tensors


@contextmanager
def _machine_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        if getattr(error, "errno", None) == 28 or "No space left" in str(error):
            raise RunError(_full(path, None, free)) from error
        why = f"cannot write {path}: {error}. Nothing was lost; run the same command again to resume."
        raise RunError(why) from error


def _broken(path: Path, error: Exception) -> RunError:
    size = path.stat().st_size if path.exists() else 0
    return RunError(
        f"{path} is broken or truncated ({size} bytes): {error}. Delete this file and run the same command again; "
        "what it held is computed again from an earlier state."
    )


def _full(path: Path, need: int | None, free: int) -> str:
    wanted = f"{need:,} bytes are needed, " if need else ""
    return (
        f"the disk is full while writing {path}: {wanted}{free:,} bytes are free. Nothing was lost; free some "
        "space (or start "
        "with a smaller --replay.disk) and run the same command again to resume."
    )
