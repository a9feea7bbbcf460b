"""bench/gpu.py on toy shapes: its arithmetic against counted products, its sections, its report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import gpu
import gpu_report
import gpu_shapes
import head
import shapes
from gpu_setup import Bench, world
from tools import gpt_neox

from retrograd.core import plan as plans
from retrograd.core.step import initial_state, pullback
from retrograd.core.sweep import seed_cotangent
from retrograd.runs.arithmetic import deterministic


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, 2·m·k·n each."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, tensors = function._overloadpacket.__name__.rstrip("_"), [x for x in arguments if torch.is_tensor(x)]
        if name in ("mm", "bmm"):
            self.operations += 2 * tensors[0].numel() * tensors[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.operations += 2 * tensors[1].numel() * tensors[2].shape[-1]
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("engine", ["double", "blocks"])
def test_a_pullback_does_the_products_that_the_arithmetic_says(engine: str) -> None:
    shape = shapes.Shape(3, 32, 2, 320, 2, 24)
    one = world(shape, "cpu", steps=2)
    training, start = one.training(engine), initial_state(one.recipe, one.params)
    cotangent = seed_cotangent({name: theta[None] for name, theta in one.params.items()}, start)
    with Products() as counted:
        pullback(training, start, cotangent)
    assert counted.operations == pytest.approx(shape.done(engine), rel=1e-4)  # rotary angles are products too
    assert shape.operations(engine) <= shape.done(engine)


def test_a_gradient_takes_three_forward_passes() -> None:
    shape = shapes.Shape(3, 32, 2, 320, 2, 24)
    one = world(shape, "cpu", steps=2)
    with Products() as counted:
        one.training("double").engine.gradient(one.params, [one.stream[0]], one.stream.weights, None)
    assert counted.operations == pytest.approx(shape.operations("train"), rel=1e-4)


@pytest.mark.parametrize("name", list(shapes.SHAPES))
def test_shapes_have_the_parameters_they_say(name: str) -> None:
    shape = shapes.SHAPES[name]
    model = gpt_neox(**shape.sizes(), device="meta")
    assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_a_run_is_extrapolated_action_by_action() -> None:
    costs = shapes.Costs(step=1.0, digest=0.1, pullback=10.0, waited=100.0, put=100.0, get=1000.0)
    plan = plans.make("all", 5)
    puts = sum(isinstance(action, plans.Snapshot) and action.step > 0 for action in plan)
    gets = sum(isinstance(action, plans.Restore) and action.step > 0 for action in plan)
    found = shapes.extrapolated(plan, 5, costs)
    assert found["train"] == pytest.approx(5 * 1.1 + puts * 100)
    assert found["whole"] == pytest.approx(5 * 1.1 + 5 * 10 + puts * 100 + gets * 1000)
    few = shapes.extrapolated(plans.make("binomial", 5, slots=2), 5, costs._replace(waited=0.0, put=0.0, get=0.0))
    assert few["whole"] == pytest.approx((5 + few["replays"]) * 1.1 + 5 * 10)
    assert few["replays"] > 0


def test_copies_beside_the_steps_cost_what_the_steps_do_not_cover() -> None:
    costs = shapes.Costs(step=1.0, digest=0.0, pullback=0.0, waited=0.0, put=1.0, get=0.0)
    plan = plans.make("all", 5)
    puts = sum(isinstance(action, plans.Snapshot) and action.step > 0 for action in plan)
    assert shapes.extrapolated(plan, 5, costs)["train"] == pytest.approx(5)  # as long as a step: covered
    slow = shapes.extrapolated(plan, 5, costs._replace(put=3.0))["train"]
    assert slow == pytest.approx(1 + puts * 3)  # one at a time, the first after a step


@pytest.mark.slow
def test_the_sections_run_and_report(tmp_path: Path) -> None:
    for name in ("rates", "exact", "160M", "engines", "queries", "head"):
        gpu.run(name, tmp_path, device="cpu", toy=True, seconds=60)
    values = json.loads((tmp_path / "gpu.json").read_text())
    sections = values["sections"]
    assert all(found["finished"] for found in sections.values())
    assert sections["exact"]["float64, double against blocks"] < 1e-10
    assert sections["exact"]["blocks: states replayed to the same digest, and scores to the same bits"] > 0
    assert sections["exact"]["lower precision"]["bfloat16"]["relative difference"] > 1e-3
    for mode in sections["160M"]["modes"].values():
        assert {"plain", "train", "digest", "double", "blocks", "runs"} <= mode.keys()
        assert mode["runs"]["double, states on the host"]["whole"] > 0
    assert sections["160M"]["modes"]["float32"]["double against blocks"] < 1e-4
    whole = sections["160M"]["whole run"]
    assert whole["whole"] == pytest.approx(whole["train"] + whole["reverse"])
    text = gpu_report.report(values)
    assert text.startswith("Toy sizes, which say nothing about speed.")
    assert "Not measured: 1.4B, 6.9B." in text
    assert set(gpu_report._ALL) == set(gpu.SECTIONS) == set(gpu.BUDGETS)
    for title in (
        "Square products",
        "rank correlation",
        "blocks ÷ double",
        "of 8 pullbacks",
        "fused_ce",
        "extrapolated",
    ):
        assert title in text
    with pytest.raises(SystemExit, match="toy sizes say nothing about speed"):
        gpu_report.written(tmp_path, docs=True)


def test_what_does_not_fit_is_left_out_with_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict] = []
    monkeypatch.setattr(gpu_shapes, "free_bytes", lambda device: 1 << 30)
    gpu_shapes.shape_section("1.4B", Bench("cpu", True, float("inf"), saved.append))
    assert saved[-1]["modes"] == {}
    memory = saved[-1]["memory"]["float32"]
    assert memory["needed_bytes"]["plain"] > memory["free_bytes"] == 1 << 30
    assert "plain 1.5 GiB of 1.0 GiB" in gpu_report._left_out({"1.4B": saved[-1]})


def test_after_a_section_that_ends_its_process_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []
    ends = iter([("160M", gpu._LATE), ("engines", 1), ("head", 0)])  # too slow; failed; well

    def ended(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command[2 : command.index("--output")])
        last, status = next(ends)
        path = tmp_path / "gpu.json"
        begun = json.loads(path.read_text())["sections"] if path.exists() else {}
        path.write_text(json.dumps({"sections": {**begun, last: {}}}))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", ended)
    names = ["160M", "1.4B", "engines", "head"]
    failed = gpu.supervise(names, argparse.Namespace(output=tmp_path, minutes=8.0, toy=True, device=None))
    assert asked == [names, ["1.4B", "engines", "head"], ["head"]]
    assert failed == ["engines"]
    assert "160M: stopped, too slow" in capsys.readouterr().out


def test_the_report_goes_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    gpu_report.write_docs("new\n", page)
    assert page.read_text() == f"before\n{gpu_report.BEGIN}\n\nnew\n\n{gpu_report.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each and in this order"):
        gpu_report.write_docs("new", page)
    assert gpu_report.PAGE.read_text(encoding="utf8").count(gpu_report.BEGIN) == 1


def test_a_gpu_is_made_to_repeat_itself_and_a_cpu_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        deterministic(torch.device("cpu"))
        assert not torch.are_deterministic_algorithms_enabled()
        deterministic(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_head_bench_sees_what_each_way_can_do() -> None:
    found = head.abilities()
    for work in head.WORK:
        assert head.able(found, "plain", work)
        assert head.able(found, "fused_ce", work)
    if "torch, chunks of ours" in found:  # torch ≥ 2.12
        assert head.able(found, "torch", "pullback")
        assert not head.able(found, "torch, chunks of ours", "pullback")
    size = {"tokens": 24, "width": 8, "vocabulary": 64}
    assert head.assert_equal(size, found) < 1e-4


def test_the_head_bench_refuses_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., dict] = head.ways

    def wrong(chunk: int | None = None) -> dict:
        ways = real(chunk)
        return {**ways, "fused_ce": lambda *given: 1.001 * ways["fused_ce"](*given)}

    found = head.abilities()
    monkeypatch.setattr(head, "ways", wrong)
    with pytest.raises(AssertionError, match="fused_ce: the gradient differs"):
        head.assert_equal({"tokens": 24, "width": 8, "vocabulary": 64}, found)
