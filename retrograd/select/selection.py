"""A selection of tokens by hand: the file that the map of `retrograd report` saves.

JSON: {"kind": "retrograd selection", "version": 1, "rows": hash of the rows, "length": L, "runs": [start, count, …]},
runs of tokens at flat places row·L + column, ascending; what else it says (how it was chosen) is for people.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograd.select.places import Places

__all__ = ["KIND", "read_selection"]

KIND = "retrograd selection"


def read_selection(path: Path, places: Places) -> Tensor:
    """Whether each real token is in the selection, [n] bool.

    Raises:
        ValueError: If it is no selection, one of other rows, empty, or of places that are no real tokens.
    """
    selection = _read(path)
    rows, length = places.shape
    if selection["rows"] != places.digest or selection["length"] != length:
        raise ValueError(
            f"{path} selects from other rows (hash {selection['rows']}, length {selection['length']}) than the data "
            f"here (hash {places.digest}, {rows} rows of up to {length}); take the map of these scores"
        )
    runs = np.array(selection["runs"], dtype=np.int64).reshape(-1, 2)
    grid = np.zeros(rows * length, bool)
    for start, count in runs:
        if start < 0 or count < 1 or start + count > len(grid):
            raise ValueError(f"{path} selects {count} places from {start}, and there are {len(grid)}; save it again")
        grid[start : start + count] = True
    chosen = places.gather(torch.from_numpy(grid).view(rows, length))
    if not chosen.any() or int(chosen.sum()) != int(grid.sum()):
        raise ValueError(
            f"{path} selects {int(grid.sum())} places, of which {int(chosen.sum())} are real tokens: it has to be "
            "some, and all of them; save it again"
        )
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        selection = json.loads(path.read_text(encoding="utf8"))
        good = (
            selection["kind"] == KIND and selection["version"] == 1 and {"rows", "length", "runs"} <= selection.keys()
        )
        good = good and len(selection["runs"]) % 2 == 0 and all(type(number) is int for number in selection["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--selection {path} cannot be read: {type(error).__name__}: {error}") from error
    if not good:
        raise ValueError(f"--selection {path} is no selection that the map of `retrograd report` has saved")
    return selection
