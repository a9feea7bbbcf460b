"""Who multiplies float32 matrices on a CPU: the library that torch calls, or oneDNN.

torch calls MKL, which takes AVX2 on a processor that is not Intel's. oneDNN, which is in torch too, takes AVX-512
there: twice the rate on an EPYC of the fifth generation. torch calls it for half precision only, so a page of C++
(matmul.cpp) does it for float32. It is compiled when first asked for, some ten seconds once for each version of torch.

The choice holds for the whole process. Results differ by rounding, so a run and its replays take the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from retrograd.core.optim import Params

__all__ = ["LIBRARIES", "Library", "applies", "choose", "no_onednn", "prefer", "preferring"]

Library = Literal["torch", "onednn"]
LIBRARIES = ("auto", "torch", "onednn")

_WORTH = 1 << 22  # parameters; products of fewer take no time worth saving
_KERNELS = "256"  # that oneDNN has at hand, of 0.6 MB each; 1,024 by itself

_preferred: Library = "torch"


def choose(asked: str, params: Params) -> tuple[Library, str]:
    """The library for a model, and why, where there is something to tell.

    Args:
        asked: "torch", "onednn" or "auto": oneDNN for 4 million float32 parameters or more on a CPU that has AVX-512
            and is not Intel's, if it can be used.
    Raises:
        ValueError: If there is no such library, or oneDNN is asked for and cannot be used here.
    """
    if asked not in LIBRARIES:
        raise ValueError(f"unknown library {asked!r} for products of matrices; there are {', '.join(LIBRARIES)}")
    if asked == "torch":
        return "torch", "asked for"
    if asked == "auto":
        small = sum(leaf.numel() for leaf in params.values()) < _WORTH
        if small or not applies(params) or _maker() == "GenuineIntel" or _capability() != "AVX512":
            return "torch", ""
        reason = no_onednn()
        return ("torch", f"not oneDNN: {reason}") if reason else ("onednn", "AVX-512, which MKL leaves unused here")
    kinds = ", ".join(sorted(_kinds(params)))
    reason = no_onednn() if applies(params) else f"it multiplies float32 on a CPU, and parameters are {kinds}"
    if reason:
        raise ValueError(f"matmul onednn cannot be used here: {reason}. Leave it out.")
    return "onednn", "asked for"


def applies(params: Params) -> bool:
    """Whether a model's matrices are of the kind that oneDNN may multiply here."""
    return _kinds(params) == {"float32 on cpu"}


def no_onednn() -> str | None:
    """Why oneDNN cannot multiply float32 matrices here, or None; compiles and loads what is needed for it."""
    if sys.platform != "linux" or not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN for it"
    if _capability() != "AVX512":
        return f"torch finds {_capability()} on this processor, not AVX-512"
    found = _loaded()
    return found if isinstance(found, str) else None


def prefer(library: Library) -> None:
    """Multiply by this library from now on.

    Raises:
        ValueError: If it is oneDNN and cannot be used here.
    """
    global _preferred
    if library == _preferred:
        return
    found = no_onednn() or _loaded()
    if isinstance(found, str):
        raise ValueError(f"oneDNN cannot multiply float32 matrices here: {found}")
    found.retrograd_matmul_use(library == "onednn")
    _preferred = library


@contextmanager
def preferring(library: Library) -> Iterator[None]:
    """Multiply by this library inside the block."""
    before = _preferred
    prefer(library)
    try:
        yield
    finally:
        prefer(before)


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The compiled library, in torch's place; or why there is none."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    library.retrograd_matmul_use.argtypes = [ctypes.c_bool]
    library.retrograd_matmul_begin()
    return library


def _compiled() -> Path:
    """The compiled library of this version of torch; compiled where it is not there yet.

    Raises:
        OSError: If there is no compiler, or it does not succeed, or there is no place for its result.
    """
    source, torch_files = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    key = hashlib.sha256(f"{torch.__version__} {torch.__file__}".encode() + source.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retrograd"
    path = cache / f"matmul-{key}.so"
    if path.exists():
        return path
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which(name)), None)
    if compiler is None:
        raise OSError(
            f"it takes a C++ compiler, and none of {', '.join(names)} is found; install g++, or name one in CXX"
        )
    cache.mkdir(parents=True, exist_ok=True)
    print(f"compiling {source.name} with {compiler}, once for this torch: ten seconds", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        result = Path(folder) / path.name
        include, library = f"-I{torch_files / 'include'}", f"-L{torch_files / 'lib'}"
        command = [compiler, "-O2", "-std=c++20", "-shared", "-fPIC", include, str(source), "-o", str(result), library,
                   "-ltorch_cpu", "-lc10"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[:1]
            raise OSError(f"{compiler} does not compile {source.name}: {(said or ['it says nothing'])[0]}")
        os.replace(result, path)
    return path


def _kinds(params: Params) -> set[str]:
    return {f"{leaf.dtype}".removeprefix("torch.") + f" on {leaf.device.type}" for leaf in params.values()}


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _maker() -> str:
    """The processor's vendor, as it says; empty where Linux is not asked."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
