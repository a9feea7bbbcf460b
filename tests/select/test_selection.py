"""Selections by hand: the file of the map, read, refused, and turned into weights with their controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from selecting import ROWS, TAU, double

from retrograd.select.places import places_of
from retrograd.select.rules import Weighing, finish, weigh
from retrograd.select.selection import KIND, read_selection

PLACES = places_of(ROWS)  # real tokens at (0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2) of rows of 4


def saved(folder: Path, **values: Any) -> Path:
    whole = {"kind": KIND, "version": 1, "rows": PLACES.digest, "length": 4, "runs": [2, 2, 9, 1], **values}
    path = folder / "selection.json"
    path.write_text(json.dumps(whole))
    return path


def test_a_selection_is_a_mask_of_its_places(tmp_path: Path) -> None:
    chosen = read_selection(saved(tmp_path), PLACES)
    assert chosen.tolist() == [False, True, True, False, True, False]
    weights = weigh(Weighing("selection", chosen=chosen), PLACES, TAU, None)
    assert torch.equal(weights, double(0, 1, 1, 0, 1, 0))
    removal = weigh(Weighing("selection", "removal", chosen=chosen), PLACES, TAU, None)
    assert torch.equal(finish("removal", removal, PLACES), double(0, 2, 2, 0, 2, 0))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rows": "0" * 16}, "selects from other rows"),
        ({"length": 5}, "selects from other rows"),
        ({"runs": [11, 2]}, "2 places from 11, and there are 12"),
        ({"runs": [0, 2]}, "selects 2 places, of which 1 are real tokens"),
        ({"runs": []}, "selects 0 places"),
        ({"runs": [1]}, "is no selection"),
        ({"runs": [1.5, 1]}, "is no selection"),
        ({"kind": "weights"}, "is no selection"),
    ],
)
def test_what_is_no_selection_of_these_rows_is_refused(tmp_path: Path, values: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_selection(saved(tmp_path, **values), PLACES)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        read_selection(tmp_path / "absent.json", PLACES)
