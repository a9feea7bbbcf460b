"""The most bytes of tensors that a process has at once, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from retrograd.core import tree


class Peak(TorchDispatchMode):
    """Bytes of storage that operations have made since it was entered: `now`, and the `most` at once.

    What one operation takes for itself alone is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), made=False)  # what was there before
        found = func(*args, **(kwargs or {}))
        self._see(found, made=True)
        return found

    def during(self, function: Callable[..., Any], told: Callable[[int], None]) -> Callable[..., Any]:
        """The function; and after every call `told` gets the most bytes that there were at once during it."""

        def watched(*given: Any, **options: Any) -> Any:
            before, self.most = self.most, self.now
            try:
                return function(*given, **options)
            finally:
                told(self.most)
                self.most = max(before, self.most)

        return watched

    def _see(self, given: Any, *, made: bool) -> None:
        for x in tree.leaves(given):
            storage = x.untyped_storage()
            if storage._cdata not in self._known and storage.device.type != "meta":
                self._count(storage, storage.nbytes() if made else 0)

    def _count(self, storage: Any, size: int) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
