"""States on their way to disk and back: what a person sees is what a store without a thread would do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
import worlds

from retrograd.core import memory, tree
from retrograd.core.optim import AdamW, Moments, Params, Updated
from retrograd.core.step import Recipe, State, initial_state
from retrograd.core.sweep import Event, Reversed, seed_cotangent
from retrograd.runs import resume
from retrograd.runs.errors import RunError
from retrograd.runs.files import read_tensors, write_tensors
from retrograd.runs.identity import EDITION
from retrograd.runs.states import store
from retrograd.runs.states import transfers as copies
from retrograd.runs.states.budget import Replay
from retrograd.runs.states.buffers import copy_alone, packed
from retrograd.runs.states.store import Gradients, Store
from retrograd.runs.states.transfers import Copies
from retrograd.runs.trajectory import Trajectory


def state(step: int) -> State:
    draw = torch.Generator().manual_seed(step)
    params = {"x": torch.randn(7, 5, generator=draw), "y": torch.randn(3, generator=draw).bfloat16()}
    return State(step, params, {"count": torch.tensor(step), "m": torch.randn(0), "v": params["x"] ** 2})


def bits(found: State) -> str:
    return f"{found.step} {tree.digest((found.params, found.moments))}"


def opened(folder: Path | None, on_disk: int = 99) -> Store:
    """A store that holds the initial state."""
    found = Store(state(0), folder, "run", on_disk)
    found.put(state(0))
    return found


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """State files are written once this is set."""
    real, gate = store.write_tensors, threading.Event()

    def write(*given) -> None:
        assert gate.wait(30)
        real(*given)

    monkeypatch.setattr(store, "write_tensors", write)
    yield gate
    gate.set()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of the files read, in order."""
    real, log = Store._read, []

    def read(self: Store, step: int) -> State:
        log.append(step)
        return real(self, step)

    monkeypatch.setattr(Store, "_read", read)
    return log


def until(done) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_state_under_way_is_there_already(tmp_path: Path, gate: threading.Event) -> None:
    held, given = opened(tmp_path), state(1)
    held.put(given)
    assert held.get(1) is given
    assert (held.has(1), files(tmp_path)) == (True, [])
    gate.set()
    held.settle()
    assert files(tmp_path) == ["state-000001.safetensors"]
    found = held.get(1)
    assert found is not given
    assert bits(found) == bits(given)


def test_a_state_dropped_under_way_leaves_no_file(tmp_path: Path, gate: threading.Event) -> None:
    held = opened(tmp_path)
    held.put(state(1))
    threading.Timer(0.05, gate.set).start()
    held.drop(1)
    assert files(tmp_path) == []
    assert held.durable() == []


def test_a_kept_state_dropped_under_way_leaves_its_file_and_no_memory(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = opened(tmp_path)
    held.kept = {1}
    held.put(state(1))
    threading.Timer(0.05, gate.set).start()
    held.drop(1)
    held.on_disk = 0  # as on the way back
    monkeypatch.setattr(store, "_SMALL", 0)
    held.put(state(1))
    held.drop(1)
    assert (held.durable(), held.memory.keys()) == ([1], {0})


def test_copies_to_host_memory_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), store.packed
    monkeypatch.setattr(store, "packed", lambda *given: gate.wait(30) and real(*given))
    monkeypatch.setattr(store, "_SMALL", 0)
    held, given = opened(None), state(1)
    held.put(given)
    assert held.get(1) is given
    gate.set()
    held.settle()
    assert held.get(1) is not given
    assert bits(held.get(1)) == bits(given)


def test_one_state_is_on_its_way_at_most(tmp_path: Path, gate: threading.Event) -> None:
    held, given = opened(tmp_path), [state(1), state(2)]
    gone = weakref.ref(given[0].params["x"])

    def both() -> None:
        while given:
            held.put(given.pop(0))

    thread = threading.Thread(target=both)
    thread.start()
    until(lambda: not given)
    thread.join(0.05)
    assert thread.is_alive()  # the second waits for the first
    assert gone() is not None
    gate.set()
    thread.join(30)
    held.settle()
    assert gone() is None
    assert held.durable() == [1, 2]


@pytest.mark.parametrize("then", ["put", "get", "drop", "settle", "durable"])
def test_a_full_disk_is_told_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    held = opened(tmp_path)
    held.put(state(1))
    held.settle()

    def full(*given) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    held.put(state(2))
    assert isinstance(held._last.exception(), RunError)  # it has failed by now
    calls = {"put": (state(3),), "get": (1,), "drop": (2,)}
    for _ in range(2):  # and again, if somebody does not listen
        with pytest.raises(RunError, match=r"the disk is full while writing .*state-000002.*Nothing was lost"):
            getattr(held, then)(*calls.get(then, ()))
    monkeypatch.undo()
    assert files(tmp_path) == ["state-000001.safetensors"]
    again = Store(state(0), tmp_path, "run")
    assert bits(again.get(again.durable()[-1])) == bits(state(1))


def test_a_resume_point_goes_when_the_newer_one_is_durable(tmp_path: Path, gate: threading.Event) -> None:
    held = opened(tmp_path)
    gate.set()
    held.save(state(1))
    held.settle()
    gate.clear()
    held.save(state(2), instead_of={1})
    assert files(tmp_path) == ["state-000001.safetensors"]
    gate.set()
    assert held.durable() == [2]


def test_a_resume_point_stays_when_the_newer_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = opened(tmp_path)
    held.save(state(1))
    held.settle()
    monkeypatch.setattr(store.Path, "unlink", lambda *_, **__: pytest.fail("removed"))
    monkeypatch.setattr(store, "write_tensors", lambda *_: (_ for _ in ()).throw(RunError("the disk is full")))
    held.save(state(2), instead_of={1})
    with pytest.raises(RunError, match="the disk is full"):
        held.settle()
    assert files(tmp_path) == ["state-000001.safetensors"]


def test_a_state_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(store, "write_tensors", lambda path, *_: written.append(path.name))
    held = opened(tmp_path)
    held.save(state(1))  # a resume point
    held.put(state(1))  # then the same state in a slot
    held.drop(1)
    held.put(state(1))
    held.settle()
    assert written == ["state-000001.safetensors"] * 2


def test_the_next_restore_is_read_ahead_and_nothing_else(tmp_path: Path, reads: list[int]) -> None:
    held = opened(tmp_path)
    for step in (1, 2, 3):
        held.put(state(step))
    held.settle()
    held.follow([3, 2, 2, 1, 0])
    until(lambda: reads == [3])
    held.get(3)
    until(lambda: reads == [3, 2])
    held.drop(3)
    assert bits(held.get(2)) == bits(held.get(2)) == bits(state(2))  # held on to: it is restored again
    until(lambda: reads == [3, 2, 1])
    held.drop(2)
    assert bits(held.get(1)) == bits(state(1))
    assert bits(held.get(0)) == bits(state(0))
    assert reads == [3, 2, 1]


def test_going_back_takes_two_states_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, alive, most = opened(tmp_path), weakref.WeakSet(), 0
    steps = range(8, 0, -1)
    for step in reversed(steps):
        held.put(state(step))
    held.settle()
    real = Store._read

    def read(self: Store, step: int) -> State:
        found = real(self, step)
        alive.add(found.params["x"])
        return found

    monkeypatch.setattr(Store, "_read", read)
    held.follow(steps)
    for step in steps:
        found = held.get(step)
        until(lambda step=step: step == 1 or held._coming[1].done())
        most = max(most, len(alive))
        held.drop(step)
        del found
    assert most == 2  # the working state and the next; the loop lets go of one before it takes another


def test_a_broken_file_read_ahead_is_told_when_it_is_restored(tmp_path: Path) -> None:
    held = opened(tmp_path)
    for step in (1, 2):
        held.put(state(step))
    held.settle()
    raw = bytearray(held.path(1).read_bytes())
    raw[-5] ^= 1
    held.path(1).write_bytes(raw)
    held.follow([2, 1])
    assert bits(held.get(2)) == bits(state(2))
    with pytest.raises(RunError, match=r"state-000001.* does not have the bits that were written"):
        held.get(1)


def test_a_file_cut_while_it_is_read_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1000), "b": torch.ones(1000)}, {})

    def cut(mapped: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        os.truncate(path, 6000)
        return {name: torch.zeros(1000) for name in mapped}

    with pytest.raises(RunError, match=r"broken or truncated \(6000 bytes\): it ends within tensor b"):
        read_tensors(path, cut)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    for identity, told in (
        (f"{EDITION}-run", rf"another run \({EDITION}-run; this run is {EDITION}-other\)"),
        ("run", "an earlier version"),
    ):
        held = Store(state(0), tmp_path, identity, 1)
        held.put(state(1))
        held.settle()
        with pytest.raises(RunError, match=f"was written by {told}.*another folder"):
            Store(state(0), tmp_path, f"{EDITION}-other").get(1)


@pytest.mark.parametrize("shape", [(3, 7), (700, 401)])
def test_initial_moments_take_no_room_and_no_bit_depends_on_it(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    params, grads = ({"w": torch.randn(shape, generator=draw)} for _ in range(2))
    optimizer = AdamW(1e-2)
    moments = initial_state(Recipe(optimizer), params).moments
    assert all(leaf.untyped_storage().nbytes() == 4 and leaf.shape == shape for leaf in tree.leaves(moments))
    dense = tree.map(torch.Tensor.contiguous, moments)
    bar = {"w": torch.randn(1, *shape, generator=draw)}
    for found, expected in (
        (optimizer.update(params, moments, grads, 0), optimizer.update(params, dense, grads, 0)),
        (_pulled(optimizer, params, moments, grads, bar), _pulled(optimizer, params, dense, grads, bar)),
    ):
        assert tree.digest(found) == tree.digest(expected)
        assert all(leaf.is_contiguous() for leaf in tree.leaves(found))


def _pulled(optimizer: AdamW, params: Params, moments: Moments, grads: Params, bar: Params) -> Updated:
    return optimizer.pullback(params, moments, grads, 0, seed_cotangent(bar, State(1, params, moments)))


def test_a_large_state_is_one_aligned_buffer() -> None:
    given = {"a": torch.randn(3), "b": torch.randn(1 << 20).requires_grad_(), "c": torch.randn(1000, 999).T}
    with torch.no_grad():
        found = packed(given, torch.Tensor.copy_, memory.held)
    assert tree.digest(found) == tree.digest(given)
    assert len({leaf.untyped_storage().data_ptr() for leaf in found.values()}) == 1
    assert all(leaf.data_ptr() % 64 == 0 for leaf in found.values())
    assert packed({}, copy_alone, memory.held) == {}  # plain SGD has no moments


class Stream:
    """Stands for a GPU's stream; writes down what it is asked."""

    def __init__(self) -> None:
        self.device, self.asked = "cuda:0", []

    def record_event(self) -> torch.cuda.Event:
        return Mock(spec=torch.cuda.Event)

    def wait_event(self, event: torch.cuda.Event) -> None:
        self.asked.append("event")

    def synchronize(self) -> None:
        self.asked.append("end")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """The way of a GPU, with host memory in its place."""
    stream, init = Stream(), Copies.__init__

    def begin(self: Copies, like: State) -> None:
        init(self, like)
        self.on_host, self.stream = False, stream

    monkeypatch.setattr(Copies, "__init__", begin)
    monkeypatch.setattr(copies, "pinned", memory.held)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return stream


@pytest.mark.parametrize("on_disk", [0, 99])
def test_the_way_of_a_gpu(tmp_path: Path, gpu: Stream, gate: threading.Event, on_disk: int) -> None:
    held, given = opened(tmp_path, on_disk), [state(step) for step in (1, 2, 3)]
    held.put(given[0])
    if on_disk:
        assert held.get(1) is given[0]
    gate.set()
    for one in given[1:]:
        held.put(one)
    held.settle()
    assert gpu.asked == ["event", "end"] * 3
    held.follow([3, 2, 1])
    for one in reversed(given):
        found = held.get(one.step)
        assert bits(found) == bits(one)  # also those that shared a buffer on the way
        assert found.params["x"] is not one.params["x"]
        held.drop(one.step)
    assert gpu.asked == ["event", "end"] * 6
    assert (held.memory.keys(), files(tmp_path)) == ({0}, [])


@pytest.mark.parametrize("on_disk", [0, 99])
def test_gradients_by_the_way_of_a_gpu(tmp_path: Path, gpu: Stream, on_disk: int) -> None:
    held, given = Gradients(state(0).params, tmp_path, "run", on_disk), [state(step).params for step in range(4)]
    for step, one in enumerate(given):
        held.put(step, one)
        held.put(step, one)  # taken again: it is there
    held.store.settle()
    assert gpu.asked == ["event", "end"] * 4
    held.follow([2, 3, 1, 0])
    for step in (3, 2, 3, 1, 0):  # not as expected, and twice
        found = held.get(step)
        assert found is not None
        assert tree.digest(found) == tree.digest(given[step])
    held.drop(3)
    assert held.get(3) is None
    assert Gradients(state(0).params, None, "run").get(0) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("on_disk", [0, 99])
def test_a_gpu(tmp_path: Path, on_disk: int) -> None:
    given = [tree.map(lambda x: x.cuda(), state(step)) for step in range(4)]
    held = Store(given[0], tmp_path, "run", on_disk)
    for one in given:
        held.put(one)
    held.follow([3, 2, 1, 0])
    for one in reversed(given):
        found = held.get(one.step)
        assert bits(found) == bits(one)
        assert all(leaf.is_cuda for leaf in tree.leaves(found))
        held.drop(one.step)


def run(folder: Path | None, replay: Replay) -> torch.Tensor:
    training = worlds.training(Recipe(AdamW(1e-2, eps_root=1e-6)))
    whole = Trajectory(training, initial_state(training.recipe, worlds.params()), replay, folder, "run")
    final = whole.train()
    scores = whole.reverse(worlds.query(final.params)[1])
    whole.clean()
    return scores


def test_after_an_error_nothing_is_written_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = store.write_tensors, list[Path]()

    def slowly(path: Path, *given: Any) -> None:
        time.sleep(0.2)
        real(path, *given)
        done.append(path)

    def fail(event: Event) -> None:
        if event.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_tensors", slowly)
    training = worlds.training(Recipe(AdamW(1e-2, eps_root=1e-6)))
    replay = Replay("binomial", slots=2, memory=0, disk=1 << 30, heartbeat=0.0)
    whole = Trajectory(training, initial_state(training.recipe, worlds.params()), replay, tmp_path, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        whole.train()
    before = list(done)
    time.sleep(0.5)
    assert done == before
    assert [path.name for path in before] == [f"state-00000{step}.safetensors" for step in (1, 2, 3)]


def test_a_state_that_a_kill_left_behind_is_removed(tmp_path: Path) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Reversed) and event.step == 2:
            raise KeyboardInterrupt

    def trajectory(heartbeat: float, observe: Any = lambda event: None) -> Trajectory:
        training = worlds.training(Recipe(AdamW(1e-2, eps_root=1e-6)))
        replay = Replay("all", memory=0, disk=1 << 30, heartbeat=heartbeat)
        return Trajectory(training, initial_state(training.recipe, worlds.params()), replay, tmp_path, "run", observe)

    whole = trajectory(0.0, fail)
    gradient = worlds.query(whole.train().params)[1]
    stale = tmp_path / "state-000004.safetensors"
    content = stale.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        whole.reverse(gradient)
    assert not stale.exists()
    stale.write_bytes(content)
    whole = trajectory(1e6)
    whole.train()
    scores = whole.reverse(gradient)
    assert not list(tmp_path.glob("state-*"))
    assert torch.equal(scores, run(None, Replay("all")))


ALL_ON_DISK = Replay("all", memory=0, disk=1 << 30)


@pytest.mark.parametrize("replay", [
    ALL_ON_DISK, Replay("all", memory=8_000, disk=1 << 30), Replay("binomial", slots=3, memory=0, disk=1 << 30),
    Replay("sqrt", memory=0, disk=1 << 30, heartbeat=0.0), Replay("all", memory=1 << 30, disk=1 << 30, keep=True),
], ids=["disk", "both", "binomial", "heartbeats", "kept"])  # fmt: skip
@pytest.mark.parametrize("delay", [0.0, 0.005])
def test_the_same_bits_from_every_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: Replay, delay: float
) -> None:
    real = store.write_tensors
    monkeypatch.setattr(store, "write_tensors", lambda *given: (time.sleep(delay), real(*given)))
    expected = run(None, Replay("all"))
    monkeypatch.setattr(store, "_SMALL", 0)  # so that no state is
    assert torch.equal(run(tmp_path, replay), expected)
    kept = [f"state-{step:06d}.safetensors" for step in range(1, 6)] if replay.keep else []
    assert files(tmp_path) == ["digests.txt", "final.safetensors", *kept]


def test_the_final_state_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = resume.write_tensors, []
    slow = store.write_tensors
    monkeypatch.setattr(store, "write_tensors", lambda *given: (time.sleep(0.02), slow(*given)))

    def write(path: Path, *given) -> None:
        seen.extend(files(path.parent))
        real(path, *given)

    monkeypatch.setattr(resume, "write_tensors", write)
    run(tmp_path, ALL_ON_DISK)
    assert seen == ["digests.txt", *(f"state-{step:06d}.safetensors" for step in range(1, 6))]


def test_a_kill_while_a_state_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forking = multiprocessing.get_context("fork")
    half, real = forking.Event(), safetensors.torch.save_file

    def halved(tensors: Any, path: Path, metadata: Any) -> None:
        real(tensors, path, metadata)
        if "state-000003" in str(path):
            raw = path.read_bytes()
            path.write_bytes(raw[: len(raw) // 2])
            half.set()
            threading.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", halved)
        process = forking.Process(target=run, args=(tmp_path, ALL_ON_DISK))
        process.start()
    try:
        assert half.wait(120)
    finally:
        process.kill()
        process.join()
    found = files(tmp_path)
    assert found[0].startswith(".state-000003.safetensors.")
    assert found[-2:] == ["state-000001.safetensors", "state-000002.safetensors"]
    assert torch.equal(run(tmp_path, ALL_ON_DISK), run(None, Replay("all")))
    assert files(tmp_path) == ["digests.txt", "final.safetensors"]
