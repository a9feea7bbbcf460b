"""The gradients of queries on disk, read and written leaf by leaf: as large as the model, K times.

queries/NAME/gradient.safetensors        values [K], gradient.LEAF [K, *shape]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.parallel.pieces import Pieces
from retrograd.runs.errors import RunError
from retrograd.runs.files import write_in_turn

__all__ = ["StoredGradient", "values_of", "write_gradient"]


class StoredGradient(NamedTuple):
    """The gradient [K, *shape] of all columns of some queries, by the files of each and the names of leaves."""

    paths: tuple[Path, ...]
    names: tuple[str, ...]

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        """Leaf by leaf, as it is mapped."""
        with ExitStack() as stack:
            files = [stack.enter_context(_opened(path)) for path in self.paths]
            for name in self.names:
                parts = [file.get_tensor(f"gradient.{name}") for file in files]
                yield name, parts[0] if len(parts) == 1 else torch.cat(parts)

    def digest(self) -> str:
        """As `tree.digest` of the whole gradient."""
        return tree.digest_of(leaf for _, leaf in self.leaves())

    def own(self, lying: Pieces, device: torch.device) -> Params:
        """This process's pieces."""
        pieces: Params = {}
        for name, leaf in self.leaves():
            pieces.update({label: piece.to(device) for label, piece in lying.own({name: leaf}).items()})
        return pieces


def write_gradient(path: Path, values: Tensor, like: Params, leaves: Iterable[Tensor], identity: str) -> None:
    """Write the gradient of a query whose leaves [K, *shape] are made one by one.

    Args:
        like: Parameters, in the order of the leaves.
    """
    kinds = {
        f"gradient.{name}": theta.new_empty((len(values), *theta.shape), device="meta") for name, theta in like.items()
    }
    whole = {"identity": identity, "layout": "whole"}
    write_in_turn(path, {"values": values, **kinds}, chain([values], leaves), whole)


def values_of(path: Path, identity: str) -> Tensor | None:
    """The values [K] of a query whose gradient is there; None where it is not, or another query's."""
    if not path.exists():
        return None
    with _opened(path) as file:
        values: Tensor = file.get_tensor("values").clone()
        return values if (file.metadata() or {}).get("identity") == identity else None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of a gradient, mapped.

    Raises:
        RunError: If it is truncated or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{path} is broken or truncated: {error}. Delete this file and run the same command again; the query "
            "is asked again."
        ) from error
