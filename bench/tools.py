"""What the benchmarks share: a model of random weights, seconds and peak memory of a call, and JSON with its machine."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Measured", "gpt_neox", "idle", "machine", "measured", "peak_of", "resident", "table", "trim", "write_json"]


class Measured(NamedTuple):
    """Median seconds of a call, every repeat's, the most bytes of tensors (a process, on a CPU), and the last result."""

    seconds: float
    each: list[float]
    peak_bytes: int
    result: Any

    def record(self) -> dict[str, Any]:
        """All but the result, as plain values."""
        return {"seconds": self.seconds, "each": self.each, "peak_bytes": self.peak_bytes}


def gpt_neox(
    *, layers: int, width: int, heads: int, vocabulary: int, length: int, dtype: Any = None, device: Any = "cpu"
) -> Any:
    """A GPT-NeoX of random weights, the same ones each time on one device; dropout off."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, max_position_embeddings=length, hidden_dropout=0.0, attention_dropout=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device(device):  # made where it is needed: drawing billions of numbers on a CPU takes minutes
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32).eval().to(device)


def measured(
    function: Callable[[], Any], device: Any, *, warm: int = 1, repeats: int = 5, until: float = float("inf")
) -> Measured:
    """Time a call, the device idle before and after each; at least once, and not again past `until` (time.monotonic).

    The peak is that of the first call, and counts what was allocated before it.
    """
    peak, result = peak_of(function, device)
    for _ in range(warm - 1):
        result = None  # two results at once may not fit
        result = function()
    each: list[float] = []
    while not each or (len(each) < repeats and time.monotonic() < until):
        result = None
        idle(device)
        start = time.perf_counter()
        result = function()
        idle(device)
        each.append(time.perf_counter() - start)
    return Measured(statistics.median(each), each, peak, result)


def peak_of(function: Callable[[], Any], device: Any) -> tuple[int, Any]:
    """(most bytes during a call, its result): of tensors on a GPU, of the whole process on a CPU (Linux)."""
    import torch

    if torch.device(device).type == "cuda":
        idle(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        idle(device)
        return torch.cuda.max_memory_allocated(device), result
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    result = function()
    return resident("VmHWM"), result


def trim() -> None:
    """Give freed memory of the process back (glibc): it would hide growth."""
    ctypes.CDLL(None).malloc_trim(0)


def resident(name: str = "VmRSS") -> int:
    """Bytes of this process in memory, now (VmRSS) or at most since the mark was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def idle(device: Any) -> None:
    """Wait until a GPU has nothing left to do."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: Any = "cpu") -> dict[str, Any]:
    """What figures depend on, besides the code."""
    import torch
    import transformers

    found: dict[str, Any] = {
        "processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "commit": commit(), "device": "cpu",
    }  # fmt: skip
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"device": torch.cuda.get_device_name(device), "device_bytes": total, "device_free_bytes": free,
                  "cuda": torch.version.cuda}  # fmt: skip
    return found


def commit() -> str:
    """The repository's commit, or "unknown" where there is no git."""
    try:
        told = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"


def write_json(path: Path, values: Any) -> None:
    """The file is there whole or not at all: a benchmark may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf8")
    temporary.replace(path)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
