"""The processes of one job: the first runs the command, the others serve it.

    torchrun --nproc-per-node 4 -m retrograd magic runs/x …

Every rank loads model and rows by the same code, with whatever could differ taken from rank 0 (`agreed`), and shows
that it has the same bits (`collected`). Then rank 0 goes on alone; it has the folder, the states, the optimizer and the
journal. The others wait in `serve` for its calls: a name, and arguments whose tensors are broadcast. So a run on many
ranks is the run on one, but for whoever takes a step's rows.

Small things go through the job's key-value store, tensors by gloo on a CPU and NCCL on a GPU. A rank that dies or hangs
is missed within `patience` seconds by all others, which then say so and end: every rank has a pulse in the store.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from retrograd.parallel.pulses import Pulses
from retrograd.parallel.wire import Pickler, Unpickler, as_bytes, neighbours

__all__ = ["ALONE", "Group", "RankError", "alone", "here", "joined"]

T = TypeVar("T")

_PULSE = 1.0  # seconds between two beats
_DISMISSED = "dismissed"  # a call that ends serving


class RankError(RuntimeError):
    """A process of the job is gone, hangs or has failed; the same command resumes."""


class Group:
    """This process among those of its job. Every method but those of rank 0 alone is called by all ranks, in one order.

    Args:
        rank, world: Which it is, of how many.
        store: Of the job; None for a job of one process.
        patience: Seconds to wait for another rank.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None, patience: float = 600.0) -> None:
        self.rank, self.world, self.patience, self._store = rank, world, patience, store
        self._calls = self._values = 0
        self._sets: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._stop = threading.Event()
        if store is not None:
            threading.Thread(target=self._beat, args=(store.clone(),), daemon=True).start()

    def agreed(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        key = self._next_value()
        if self.rank == 0:
            self._store.set(key, pickle.dumps(value))
            return value
        return pickle.loads(self._wait(key))

    def collected(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; of rank 0's use only, the others get none."""
        if self.world == 1:
            return [value]
        key = self._next_value()
        if self.rank:
            with _reaching():
                self._store.set(f"{key}/{self.rank}", pickle.dumps(value))
            return []
        values = [value]
        for rank in range(1, self.world):
            values.append(pickle.loads(self._wait(f"{key}/{rank}")))
            self._store.delete_key(f"{key}/{rank}")
        return values

    def everywhere(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        return self.agreed(self.collected(value))

    def common(self, values: Iterable[int]) -> list[int]:
        """Those that every rank has, ascending, on every rank."""
        every = self.everywhere(list(values))
        return sorted(set(every[0]).intersection(*every[1:]))

    def call(self, name: str, *arguments: Any) -> None:
        """Have the other ranks do what they have under this name. Of rank 0's use alone; what they do calls nobody."""
        if self.world == 1 or self.rank:
            return
        text = io.BytesIO()
        pickler = Pickler(text)
        pickler.dump(arguments)
        layouts = [(x.shape, x.dtype, x.device.type) for x in pickler.tensors]
        self._calls += 1
        self._store.set(f"call/{self._calls}", pickle.dumps((name, layouts, text.getvalue())))
        self._broadcast(pickler.tensors)
        self._store.delete_key(f"call/{self._calls - 1}")

    def dismiss(self) -> None:
        """Let the other ranks go on to what comes after `serve`. Of rank 0's use alone."""
        self.call(_DISMISSED)

    def serve(self, doing: Mapping[str, Callable[..., Any]]) -> bool:
        """Do what rank 0 calls for. By the other ranks.

        Returns:
            Whether rank 0 has dismissed them, and goes on to something else; else it has ended.
        """
        while True:
            self._calls += 1
            called = self._wait(f"call/{self._calls}", ends=True)
            if called is None:
                return False
            name, arguments = self._called(called)
            if name == _DISMISSED:
                return True
            doing[name](*arguments)
            del arguments  # or they would live until the next

    def _called(self, called: bytes) -> tuple[str, Any]:
        name, layouts, text = pickle.loads(called)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in layouts]
        self._broadcast(tensors)
        return name, Unpickler(io.BytesIO(text), tensors).load()

    def parted(self, sets: Sequence[Sequence[int]]) -> Any:
        """What `among` takes, of this process's set of ranks; every rank is in one."""
        import torch.distributed as dist

        key, wait = tuple(map(tuple, sets)), timedelta(seconds=self.patience)
        if key not in self._sets:  # a job may train several models
            with self._together():
                made = [dist.new_group(list(ranks), timeout=wait) for ranks in sets]
            self._sets[key] = next(group for group, ranks in zip(made, sets) if self.rank in ranks)
        return self._sets[key]

    def exchanged(self, parts: Tensor, among: Any = None) -> Tensor:
        """Of every rank's [world, n], whose row q is for rank q, the rows for this one, in the order of ranks.

        Args:
            among: The ranks of a set (`parted`); all if not given.
        """
        if len(parts) == 1:
            return parts
        import torch.distributed as dist

        rows = torch.empty_like(parts)
        with self._together():
            dist.all_to_all_single(rows, parts, group=among)
        return rows

    def shared(self, part: Tensor, among: Any = None) -> list[Tensor]:
        """Every rank's tensor of one shape, in the order of ranks, on every rank; `among` as for `exchanged`."""
        return self.sharing(part, among)()

    def sharing(self, part: Tensor, among: Any = None) -> Callable[[], list[Tensor]]:
        """As `shared`, begun: what this returns waits for the others, and may be called later."""
        import torch.distributed as dist

        count = self.world if among is None else dist.get_world_size(among)
        if count == 1:
            return lambda: [part]
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(count)]
        with self._together():
            work = dist.all_gather(parts, part, group=among, async_op=True)

        def arrived() -> list[Tensor]:
            with self._together():
                work.wait()
            return parts

        return arrived

    def gathered(self, part: Tensor) -> list[Tensor]:
        """Every rank's tensor of one shape, in the order of ranks; of rank 0's use only, the others get none."""
        if self.world == 1:
            return [part]
        import torch.distributed as dist

        parts = [torch.empty_like(part) for _ in range(self.world)] if self.rank == 0 else None
        with self._together():
            dist.gather(part, parts)
        return parts or []

    def sent(self, tensor: Tensor, rank: int = 0) -> None:
        """Send a tensor to a rank, which has to know its shape (`received`)."""
        import torch.distributed as dist

        with self._together():
            dist.send(tensor.contiguous(), rank)

    def received(self, like: Tensor, rank: int) -> Tensor:
        """What a rank has sent, of the shape and dtype of `like`."""
        import torch.distributed as dist

        tensor = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        with self._together():
            dist.recv(tensor, rank)
        return tensor

    def told(self, tensor: Tensor, rank: int, among: Any) -> None:
        """A rank's tensor, into that of all others of its set."""
        import torch.distributed as dist

        with self._together():
            dist.broadcast(tensor, rank, group=among)

    def end(self, error: BaseException | None = None) -> bool:
        """Nothing more comes from this rank; of rank 0, the others then end too.

        Returns:
            Whether rank 0 has failed too, and says what of.
        """
        reported = False
        with contextlib.suppress(RuntimeError):  # whoever has the store may be gone
            if self.rank == 0:
                self._store.set("ended", "")
                self._store.wait([f"left/{rank}" for rank in range(1, self.world)], timedelta(seconds=5))
            elif error is not None and not self._ended():
                self._store.set("failed", f"rank {self.rank} failed: {type(error).__name__}: {error}")
                self._store.set(f"left/{self.rank}", "")
            else:
                reported = error is not None
                self._store.set(f"left/{self.rank}", "")
        self._stop.set()
        return reported

    def _ended(self) -> bool:
        """Whether rank 0 ends too, in a moment."""
        with contextlib.suppress(RuntimeError):
            self._store.wait(["ended"], timedelta(seconds=3 * _PULSE))
            return True
        return False

    def _next_value(self) -> str:
        self._values += 1
        if self.rank == 0:
            with contextlib.suppress(Exception):
                self._store.delete_key(f"value/{self._values - 8}")
        return f"value/{self._values}"

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Rank 0's tensors, into the others' of the same shapes; small ones together."""
        import torch.distributed as dist

        for group in neighbours(tensors):
            flat = as_bytes(group[0]) if len(group) == 1 else torch.cat([as_bytes(x) for x in group])
            with self._together():
                dist.broadcast(flat, 0)
            start = 0
            for x in group if self.rank and len(group) > 1 else ():
                as_bytes(x).copy_(flat[start : start + x.nbytes])
                start += x.nbytes

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around what takes all ranks: a failure is told by its cause."""
        try:
            yield
        except RuntimeError as error:
            self._missed(error)

    def _wait(self, key: str, *, ends: bool = False) -> Any:
        """The value of a key, once another rank has set it; None once rank 0 has ended, if that may be."""
        with _reaching():
            pulses = Pulses(self)
            while True:
                try:
                    self._store.wait([key], timedelta(seconds=_PULSE))
                    return self._store.get(key)
                except RuntimeError as error:
                    if self._store.check(["failed"]):
                        self._missed(error)
                    if self.rank and self._store.check(["ended"]):
                        if ends:
                            return None
                        raise SystemExit(0) from None  # rank 0 has said why
                    if late := pulses.late():
                        raise RankError(late) from None

    def _missed(self, error: RuntimeError) -> NoReturn:
        """Why something did not come about."""
        with _reaching():
            pulses = Pulses(self)
            until = time.monotonic() + 4 * _PULSE
            while time.monotonic() < until:
                if self._store.check(["failed"]):
                    raise RankError(f"{self._store.get('failed').decode()} The same command resumes.")
                time.sleep(_PULSE / 4)
            still = pulses.still()
        who = f"rank {', '.join(map(str, still))} has stopped" if still else "a rank is late"
        raise RankError(
            f"{who}: {str(error).strip().splitlines()[0]}. It was waited for {self.patience:g} s at most "
            "(--patience). The same command resumes."
        ) from error

    def _beat(self, store: Any) -> None:
        count = 0
        while not self._stop.wait(_PULSE):
            count += 1
            try:
                store.set(f"pulse/{self.rank}", str(count))
            except RuntimeError:
                return  # the store is gone: whoever waits will see


ALONE = Group()
_here = ALONE


def here() -> Group:
    """The group of this process."""
    return _here


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """This process does something by itself, though it is one of a job; the others wait at what comes next."""
    global _here
    before, _here = _here, Group()
    try:
        yield
    finally:
        _here = before


@contextlib.contextmanager
def joined(patience: float) -> Iterator[Group]:
    """The processes of this job, by the environment that torchrun sets; the group of this process meanwhile.

    Raises:
        RankError: If they do not come together in time.
    """
    global _here
    import torch.distributed as dist

    wait = timedelta(seconds=patience)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=wait))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # what one that failed has left is in the store
        store = dist.PrefixStore(f"retrograd {attempt}", store)
        dist.init_process_group(
            backend, store=dist.PrefixStore("torch", store), rank=rank, world_size=world, timeout=wait
        )
        _here = Group(rank, world, store, patience)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"the processes of this job did not come together within {patience:g} s: {error}. Start them with torchrun"
        ) from error
    try:
        yield _here
    except BaseException as error:
        if _here.end(None if isinstance(error, SystemExit) and not error.code else error):
            raise SystemExit(0) from None
        raise
    else:
        _here.end()
    finally:
        _here = ALONE
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Around what asks the job's store, which is in the process of rank 0."""
    try:
        yield
    except RankError:
        raise
    except RuntimeError as error:
        raise RankError("the job's store is gone, and with it rank 0; see what that one says") from error
