"""Numbers as a page carries them: 16 bits each, deflated, in base64, read by the browser's DecompressionStream.

A score x is kept as the whole number sign(x)·⌈32767·√(|x|/max|x|)⌋, at least 1 in size where x is not 0: its sign is
exact, and its relative error at most 1/(32767·√(|x|/max|x|)), 0.3 % for a ten-thousandth of the largest. `unquantise`
is what the page's script does.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np

__all__ = ["pack", "quantise", "unpack", "unquantise"]

LIMIT = 32767


def quantise(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Whole numbers of 16 bits, and the largest |score|, which stands for 32767."""
    largest = float(np.abs(scores).max(initial=0.0))
    if largest == 0:
        return np.zeros(scores.shape, np.int16), 0.0
    size = np.rint(LIMIT * np.sqrt(np.abs(scores, dtype=np.float64) / largest))
    return (np.sign(scores) * np.maximum(size, scores != 0)).astype(np.int16), largest


def unquantise(numbers: np.ndarray, largest: float) -> np.ndarray:
    """The scores that a page shows, float64."""
    root = numbers.astype(np.float64) / LIMIT
    return root * np.abs(root) * largest


def pack(values: np.ndarray) -> str:
    """An array's bytes, little-endian, deflated, in base64."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 4)).decode()


def unpack(text: str, dtype: str) -> np.ndarray:
    """What `pack` was given."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.dtype(dtype).newbyteorder("<"))
