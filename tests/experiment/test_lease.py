"""Leases: one owner, takeover of the dead, the stopped and those that gave back, and what a late owner cannot do."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from retrograd.experiment.lease import Lease, LeaseLostError, Queue
from retrograd.experiment.owner import Owner, is_dead, myself

ELSEWHERE = Owner(1, "another machine", "another start", 1)


def test_one_has_it_until_it_gives_it_back(tmp_path: Path) -> None:
    one, two = Queue(tmp_path, 60), Queue(tmp_path, 60, ELSEWHERE)
    lease = one.take("task")
    assert lease == Lease("task", 1)
    assert two.take("task") is None
    assert one.take("task") is None
    (one.place(lease) / "state").write_text("half")
    one.give_back(lease)
    other = two.take("task")
    assert other == Lease("task", 2)
    assert (two.place(other) / "state").read_text() == "half"
    assert not one.place(lease).exists()
    with pytest.raises(LeaseLostError):
        one.beat(lease)


def test_without_a_beat_it_is_taken_over_and_the_late_owner_changes_nothing(tmp_path: Path) -> None:
    late, other = Queue(tmp_path, 0.05, ELSEWHERE), Queue(tmp_path, 0.05)
    lease = late.take("task")
    assert lease is not None
    folder = late.place(lease)
    (folder / "run").mkdir()
    (folder / "run/state.safetensors").write_text("state")
    (folder / "run/.lock").write_text("held")
    assert other.take("task") is None  # it has only just been seen
    late.beat(lease)
    while (taken := other.take("task")) is None:
        pass
    assert taken.number == 2
    assert (other.place(taken) / "run/state.safetensors").read_text() == "state"
    assert not (other.place(taken) / "run/.lock").exists()
    (folder / "run/state.safetensors").write_text("written late")
    assert (other.place(taken) / "run/state.safetensors").read_text() == "state"
    for write in (lambda: late.beat(lease), lambda: late.finish(lease, {"x": 1}), lambda: late.fail(lease, "why")):
        with pytest.raises(LeaseLostError):
            write()
    other.finish(taken, {"x": 2})
    assert late.result("task") == {"owner": 2, "x": 2, "place": str(tmp_path / "task/2")}
    assert late.take("task") is None


def test_a_beat_that_goes_on_is_not_taken_over(tmp_path: Path) -> None:
    one, other = Queue(tmp_path, 0.05, ELSEWHERE), Queue(tmp_path, 0.05)
    lease = one.take("task")
    assert lease is not None
    for _ in range(100):
        one.beat(lease)
        assert other.take("task") is None


def test_a_dead_owner_is_known_at_once_and_one_elsewhere_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me = myself()
    dead = me._replace(pid=gone.pid, started=1)
    assert is_dead(dead._asdict())
    assert is_dead(me._replace(started=me.started + 1)._asdict())  # another process has had the number since
    assert not is_dead(me._asdict())
    assert not is_dead(dead._replace(host="another")._asdict())
    assert not is_dead(dead._replace(boot="another")._asdict())
    assert Queue(tmp_path, 60, dead).take("task") == Lease("task", 1)
    assert Queue(tmp_path, 60).take("task") == Lease("task", 2)
    assert Queue(tmp_path, 60, dead._replace(host="another")).take("other") == Lease("other", 1)
    assert Queue(tmp_path, 60).take("other") is None


def test_a_failure_is_kept_until_all_are_forgotten(tmp_path: Path) -> None:
    queue = Queue(tmp_path, 60)
    lease = queue.take("task")
    assert lease is not None
    queue.fail(lease, "no disk")
    assert Queue(tmp_path, 60).failure("task") == "no disk"
    assert Queue(tmp_path, 60).take("task") is None
    queue.forget_failures()
    assert queue.failure("task") is None
    assert queue.take("task") == Lease("task", 2)


def test_the_next_but_one_finds_what_was_left_although_one_between_died_at_once(tmp_path: Path) -> None:
    first, last = Queue(tmp_path, 60), Queue(tmp_path, 60)
    lease = first.take("task")
    assert lease is not None
    (first.place(lease) / "state").write_text("half")
    first.give_back(lease)
    # a second owner that died between its lease and its folder
    dead = myself()._replace(pid=2**22 + 1)._asdict()
    import json

    (tmp_path / "task/lease-2.json").write_text(json.dumps(dead))
    taken = last.take("task")
    assert taken == Lease("task", 3)
    assert (last.place(taken) / "state").read_text() == "half"


def test_one_that_wakes_between_its_lease_and_its_folder_takes_nothing_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, other = Queue(tmp_path, 0), Queue(tmp_path, 0)
    inherit = Queue._inherit

    def slept(queue: Queue, lease: Lease) -> None:
        monkeypatch.setattr(Queue, "_inherit", inherit)
        taken = other.take("task")
        assert taken == Lease("task", 2)
        (other.place(taken) / "model").write_text("done")
        other.finish(taken, {})
        other.give_back(taken)
        inherit(queue, lease)

    monkeypatch.setattr(Queue, "_inherit", slept)
    assert late.take("task") == Lease("task", 1)
    result = Queue(tmp_path, 0).result("task")
    assert result is not None
    assert (Path(result["place"]) / "model").read_text() == "done"


def _takes(folder: str, number: int) -> list[str]:
    queue = Queue(Path(folder), 60)
    return [name for name in map(str, range(60)) if queue.take(name) is not None and os.getpid()]


def test_of_many_processes_each_task_has_one_owner(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        taken = pool.starmap(_takes, [(str(tmp_path), number) for number in range(4)], chunksize=1)
    assert sorted(name for names in taken for name in names) == sorted(map(str, range(60)))
