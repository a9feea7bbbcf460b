"""The arithmetic of plans against numbers worked out by hand, and the run of 6.86 billion parameters."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retrograd import cli
from retrograd.lm.engines import Curve
from retrograd.plan.cost import (
    Forecast,
    apart_bytes,
    device_bytes,
    floor_of,
    forecast,
    kept_of,
    pace_by_rate,
    pullback_units,
    step_bytes,
)
from retrograd.plan.machine import Machine
from retrograd.plan.run import Planned, plan_run
from retrograd.plan.work import Asks, Matter, Model, Steps, Work
from retrograd.runs.states.budget import Replay, layout

ROOT = Path(__file__).parent.parent.parent
GB = 10**9


def work(queries: int = 1, *, head: int = 0, body: int = 100, needed: bool = False, again: bool = False) -> Work:
    steps = Steps(rows=8, steps=4, tokens=80, positions=80, pairs=0, batch=2, largest=(2, 10), parts=1)
    model = Model(head + body, 0, 4 * (head + body), 0, 2, 8, body, head, 4, Curve(0, 10, 0), Curve(0, 2, 0))
    return Work(
        steps,
        model,
        Matter(12 * (head + body), 4 * (head + body), needed, again),
        Asks(queries, 6, 1),
        queries,
        "double",
    )


def machine(**more: Any) -> Machine:
    given = {"name": "x", "memory": 10**6, "host": 10**6, "disk": 10**6, "ranks": 1, "shards": 1, "rate": 1e3, "peak": None,
             "bandwidth": None, "link": None, "base": 0}  # fmt: skip
    return Machine(**{**given, **more})


@pytest.mark.parametrize("queries", [1, 4])
def test_units_of_a_step_and_its_pullback_are_those_of_the_engines(queries: int) -> None:
    """lm/engines.py: double (10 + 7(K−1))h + (12 + 6(K−1))b, blocks (10 + 6(K−1))h + (16 + 8(K−1))b, step included."""
    k = queries - 1
    assert 3 + pullback_units(work(queries, head=100, body=0), "double", parts=1) == 10 + 7 * k
    assert 3 + pullback_units(work(queries), "double", parts=1) == 12 + 6 * k
    assert 3 + pullback_units(work(queries, head=100, body=0), "blocks", parts=1) == 10 + 6 * k
    assert 3 + pullback_units(work(queries), "blocks", parts=1) == 16 + 8 * k
    clipped = work(queries, needed=True, again=True)
    assert pullback_units(clipped, "double", parts=1) == pullback_units(work(queries), "double", parts=1)
    assert pullback_units(clipped, "double", parts=2) == pullback_units(work(queries), "double", parts=1) + 3


def test_time_is_operations_by_the_rate() -> None:
    """2 · 100 multiplications a token, 20 tokens a step, 1000 operations a second: a forward pass takes 4 s."""
    one = work()
    pace = pace_by_rate(one, machine(), "double", 2)
    assert pace[:4] == (12.0, 12.0, 36.0, 3 * 2 * 100 * 6 / 1e3)
    assert pace_by_rate(one, machine(ranks=2), "double", 1).step == 6.0
    assert pace_by_rate(dataclasses.replace(one, references=1), machine(), "double", 2).step == 16.0
    assert floor_of(one) == 12 * 4 * 4e3 + 3 * 1200
    slow = pace_by_rate(one, machine(bandwidth=1000.0), "double", 2)
    assert slow.step == pytest.approx(12 + (3 * 1200 + 2 * 400) / 800)


def test_memory_of_a_pullback_is_what_it_holds() -> None:
    """AdamW: a state is 3 P. λ pulled through the update is one, ḡ and Hḡ are two P, the moments after two, g one."""
    assert sum(step_bytes(work(needed=True), 1).values()) == 400 * (3 + 2 + 2 + 1)
    assert sum(step_bytes(work(needed=True), 2).values()) == 200 * (3 + 2 + 2 + 1)
    assert sum(step_bytes(work(2, needed=True), 1).values()) == 400 * (2 * 3 + 2 * 2 + 2 + 1)
    assert step_bytes(work(0), 1) == {"next state": 1200, "gradient": 400}
    plain = dataclasses.replace(work(), matter=Matter(400, 400, False, False))  # SGD: λ, ḡ and Hḡ, nothing else
    assert sum(step_bytes(plain, 1).values()) == 3 * 400


def test_what_is_kept_lies_where_the_layout_puts_it() -> None:
    every = layout(Replay("all", memory=1000, disk=10_000), 8, 300, 100, elementwise=True)
    found = kept_of(every, 100)
    assert (found.memory, found.disk) == (
        3 * 300 + 2 * 300,
        4 * 300,
    )  # two more on their way; the first is never written
    assert found.moved == (every.cost.snapshots + every.cost.restores) * 300
    assert found.written == int(found.moved * 4 / 8)
    grads = layout(Replay("gradients", slots=2), 8, 300, 100, elementwise=True)
    assert kept_of(grads, 100).memory == 2 * 300 + 8 * 100
    assert kept_of(None, 100) == (0, 0, 0, 0)


def test_ranks_divide_time_and_shards_memory() -> None:
    one = work()
    every = layout(Replay("all"), 4, 1200, 400, elementwise=True)
    half = layout(Replay("all"), 4, 600, 200, elementwise=True)

    def of(made: Machine, kept: Any) -> Forecast:
        return forecast(one, made, kept, pace_by_rate(one, made, "blocks", 1), "blocks", 1)

    alone, spread, divided = of(machine(), every), of(machine(ranks=2), every), of(machine(ranks=2, shards=2), half)
    assert spread.total == alone.total / 2
    assert spread.device_hours == pytest.approx(alone.device_hours)
    assert spread.device == alone.device
    for name in ("model", "state", "cotangents", "ḡ and H ḡ"):
        assert divided.device[name] * 2 == alone.device[name]
    assert divided.host["states and gradients kept"] * 2 == alone.host["states and gradients kept"]
    assert divided.device["gathered"] == 3 * 400, "of a model that is no chain of layers"
    assert "gathered" not in spread.device
    layers = dataclasses.replace(one, model=one.model._replace(block=40))
    pace = pace_by_rate(layers, machine(), "blocks", 1)
    for engine, whole in (("blocks", 6 * 40), ("double", 3 * 400)):
        assert forecast(layers, machine(ranks=2, shards=2), half, pace, engine, 1).device["gathered"] == whole


def test_proofs_and_the_query_count_where_parameters_are_divided() -> None:
    layers = dataclasses.replace(work(), model=work().model._replace(block=40))
    eighth, params, state = 400 // 8, 400 // 4, 1200 // 4
    query = 400 + 100 + 2 * state + params + 2 * eighth
    assert apart_bytes(layers, 4, "blocks") == max(query, 100 + 2 * (5 * params + 6 * 40)), "proved in float64"
    assert apart_bytes(layers, 4, "double") == 400 + 2 * 6 * 400, "the copy in float64 is the sixth"
    spread = device_bytes(layers, machine(ranks=4, shards=4), "double", 0)
    assert sum(spread.values()) == apart_bytes(layers, 4, "double"), "more than a step takes"
    frozen = dataclasses.replace(layers, model=layers.model._replace(frozen=10, frozen_bytes=40))
    assert apart_bytes(frozen, 4, "double") == 400 + 2 * 6 * 400 + 40 + 2 * 40
    assert apart_bytes(frozen, 4, "blocks") == max(query, 100 + 2 * (5 * params + 6 * 40) + 2 * 40) + 40
    large = dataclasses.replace(layers, model=layers.model._replace(trained=2**26 + 1))
    assert apart_bytes(large, 4, "double") == 6 * 400, "at the run's own precision"
    assert apart_bytes(large, 4, "blocks") == max(query, 400 + 3 * eighth, 100 + 5 * params + 6 * 40)
    half = dataclasses.replace(layers, model=layers.model._replace(itemsize=2))
    assert apart_bytes(half, 4, "double") == max(query, 3 * 400), "two gradients, which are not compared"


def test_micro_batches_of_a_rank_go_through_a_chain_together_where_parameters_are_divided() -> None:
    one = dataclasses.replace(work(), steps=work().steps._replace(batch=8, parts=4))
    kept = layout(Replay("all"), 4, 600, 200, elementwise=True)
    pace = pace_by_rate(one, machine(), "blocks", 2)
    whole, divided = (
        forecast(one, made, kept, pace, "blocks", 2).device["activations"]
        for made in (machine(ranks=2), machine(ranks=2, shards=2))
    )
    hidden = 2 * 10 * 8 * 4  # of two rows
    assert divided - whole == (1 + 1) * (2 + 2) * hidden, "of a second micro-batch, with one tangent"


def test_copies_are_waited_for_where_they_take_longer() -> None:
    every, one = layout(Replay("all"), 4, 1200, 400, elementwise=True), work()
    pace = pace_by_rate(one, machine(), "double", 2)
    free = forecast(one, machine(), every, pace, "double", 2).seconds
    slow = forecast(one, machine(link=1.0), every, pace, "double", 2).seconds
    assert free["train"] == 48
    assert slow["train"] == slow["reverse"] == kept_of(every, 400).moved / 2
    with_disk = forecast(one, machine(disk_rate=1.0), every, pace, "double", 2).seconds
    assert with_disk == free  # nothing is on disk


def headline(*more: str) -> Planned:
    asked = cli._parse("plan", [
        "--rows", "1000", "--row_tokens", "104", "--questions", "868", "--question_tokens", "150", "--disk", "2TB",
        "magic", "runs/headline", "--config", str(ROOT / "recipes/original/headline.yaml"), "--model",
        str(ROOT / "recipes/original/model"), *more,
    ])  # fmt: skip
    return plan_run(asked.config, asked.plan)


@pytest.fixture(scope="module")
def on_one() -> Planned:
    return headline("--hardware", "h100")


def test_the_headline_run_has_the_numbers_of_its_paper(on_one: Planned) -> None:
    found = on_one.forecast
    assert found.work.steps[:4] == (1000, 250, 104_000, 104_000)
    assert round(found.work.model.trained / 1e9, 2) == 6.86
    assert found.work.matter.state == found.work.model.trained_bytes  # plain SGD
    assert round(3 * found.work.matter.params / GB) == 82  # parameters, cotangent and Hessian product alone
    assert found.floor is not None
    products = 12 * 2 * (found.work.model.trained - 50304 * 4096) * 104_000  # but the input embedding is looked up
    assert found.floor == pytest.approx((products + 3 * found.work.asked) / 67e12, rel=0.05)  # attention is the rest
    assert found.missing["device"] == sum(found.device.values()) - 80 * GB


def test_the_change_that_makes_it_fit_is_the_one_with_the_fewest_ranks(on_one: Planned) -> None:
    assert on_one.remedy is not None
    assert on_one.remedy.changes[0] == "--hardware h200"
    assert on_one.remedy.machine.ranks == 1
    of_80 = headline("--hardware", "h100", "--ranks", "4", "--layout", "shard").forecast
    assert not of_80.missing
    assert of_80.device["gathered"] == 6 * 50304 * 4096 * 4, "of the head, the largest block"
    given = ("--hardware", "h100", "--memory", "120GB")
    remedy = headline(*given, "--dtype", "float32").remedy
    assert remedy is not None
    assert not remedy.missing
    assert remedy.machine.ranks == 1
    assert remedy.machine.name == "H200"
    whole = (*given, "--engine", "double", "--layout", "shard")
    apart = {ranks: headline(*whole, "--ranks", ranks).forecast for ranks in ("2", "8")}
    assert apart["2"].missing, "parameters, ḡ and H ḡ are whole on each"
    assert apart["8"].missing, "and the proofs are"
    assert apart["8"].device["gathered"] == apart["2"].device["gathered"]
    assert not headline("--hardware", "h100", "--layout", "shard", "--ranks", "8").forecast.missing, "by block"
    two = headline("--hardware", "h100", "--ranks", "8", "--parallel", "shard", "--replicas", "2").forecast
    assert (two.machine.ranks, two.machine.shards, two.machine.replicas) == (8, 4, 2)
    assert two.device == of_80.device | {"activations": two.device["activations"]}, "as four ranks have it"
    here = headline(
        "--rate", "1e13", "--memory", "120GB", "--host", "250GB"
    ).remedy  # no data sheet: no other GPU to name
    assert here is not None
    assert here.machine.ranks == 2
    assert "2 ranks, shard" in here.changes


@pytest.mark.slow
def test_the_table_of_the_page_is_what_its_command_prints() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/plan.py"), "--headline"], capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs/plan.md").read_text(encoding="utf8")
    table = re.search(r"<!-- bench/plan.py --headline -->\n(.*?)<!-- end", page, re.DOTALL)
    assert table is not None
    assert table[1] == done.stdout
