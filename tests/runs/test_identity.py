"""What the hash of a run covers: everything its result depends on, and nothing else."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from retrograd.core.optim import Pair
from retrograd.optim import SGD, AdamW, Schedule
from retrograd.runs.identity import _installed, architecture, canonical, fingerprint, held_tensors, identify, told_apart

FACTOR = 2.0


def scaled(x: float) -> float:
    return FACTOR * x


class Scale:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Any) -> Any:
        return self.by * x


class GradientTransformation(NamedTuple):
    init: Callable[..., Any]
    update: Callable[..., Any]


class Net(nn.Module):
    def __init__(self, factor: float = 1.0, held: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(3, 3), factor
        self.register_buffer("held", torch.tensor(held))


def closing_over(value: Any) -> Callable[..., Any]:
    return lambda x: (value, x)


def foreign(lr: float) -> Pair:
    return Pair(GradientTransformation(lambda p: {}, lambda g, s, params=None: ({n: -lr * x for n, x in g.items()}, s)))


SAME = {
    "a lambda written twice": lambda: lambda x: x + 1,
    "a closure": lambda: closing_over({"b": 1, "a": [2.0, "c"]}),
    "an object": lambda: Scale(3.0),
    "a partial": lambda: partial(scaled, x=1.0),
    "a bound method": lambda: Scale(3.0).__call__,
    "a module": lambda: Net(),
    "a foreign optimizer": lambda: foreign(0.1),
    "a callable learning rate": lambda: SGD(lambda step: 0.1 / (1 + step)),
    "sets": lambda: closing_over({"x", "y", "z", "long enough to hash"}),
    "a tensor": lambda: torch.arange(5.0),
}
OTHER = {
    "code": (lambda x: x + 1, lambda x: x + 2),
    "an operation": (lambda x: x + FACTOR, lambda x: x * FACTOR),
    "a library's function": (lambda x: F.relu(x), lambda x: F.gelu(x)),
    "what is closed over": (closing_over(1.0), closing_over(2.0)),
    "a tensor closed over": (closing_over(torch.zeros(3)), closing_over(torch.ones(3))),
    "a dtype": (closing_over(torch.zeros(2)), closing_over(torch.zeros(2, dtype=torch.float64))),
    "a default": (lambda x, y=1: x * y, lambda x, y=2: x * y),
    "an attribute": (Scale(1.0), Scale(2.0)),
    "a bound object": (Scale(1.0).__call__, Scale(2.0).__call__),
    "a partial's argument": (partial(scaled, x=1.0), partial(scaled, x=2.0)),
    "a setting": (AdamW(1e-3), AdamW(1e-3, eps_root=1e-6)),
    "a schedule": (SGD(Schedule("linear", 0.1, 4)), SGD(Schedule("cosine", 0.1, 4))),
    "a callable learning rate": (SGD(lambda step: 0.1), SGD(lambda step: 0.2)),
    "a foreign optimizer's setting": (foreign(0.3), foreign(0.01)),
    "a module's weights": (closing_over(Net()), closing_over(nn.Linear(3, 3))),
    "a module's buffer": (closing_over(Net(held=1)), closing_over(Net(held=2))),
    "a module's own number": (Net(1.0), Net(2.0)),
    "a library module's number": (nn.LayerNorm(3, eps=1e-5), nn.LayerNorm(3, eps=1e-6)),
    "a flag that is not printed": (
        nn.TransformerEncoderLayer(4, 2, norm_first=True),
        nn.TransformerEncoderLayer(4, 2, norm_first=False),
    ),
    "text and number": (1, "1"),
    "nesting": ([1, [2]], [[1], 2]),
}


@pytest.mark.parametrize("name", SAME)
def test_what_computes_the_same_has_one_hash(name: str) -> None:
    one, other = SAME[name](), SAME[name]()
    assert fingerprint(one) == fingerprint(other)
    assert " at 0x" not in canonical(one)


@pytest.mark.parametrize("name", OTHER)
def test_what_computes_something_else_has_another(name: str) -> None:
    one, other = OTHER[name]
    assert fingerprint(one) != fingerprint(other)


def test_globals_and_functions_of_other_modules_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(scaled)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert fingerprint(scaled) != before
    found = []
    for body in ("return x", "return 2 * x", "return x  # a comment"):
        helpers = types.ModuleType("helpers")
        exec(f"def loss(x):\n    {body}\n", vars(helpers))
        monkeypatch.setitem(globals(), "helpers", helpers)
        found.append(fingerprint(lambda x: helpers.loss(x)))  # type: ignore[name-defined]
    assert found[0] == found[2] != found[1]


def test_a_package_of_another_environment_is_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment may take packages from another one (system site packages, the user's own, a .pth)."""
    prints = []
    for place, factor in (("lib/site-packages", 2), ("lib/site-packages", 3), ("own", 2), ("own", 3)):
        folder = tmp_path / str(factor) / place
        folder.mkdir(parents=True)
        (folder / "borrowed.py").write_text(f"def loss(x):\n    return {factor} * x\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "borrowed", raising=False)
        _installed.cache_clear()
        prints.append(fingerprint(importlib.import_module("borrowed").loss))
        monkeypatch.undo()
    _installed.cache_clear()
    monkeypatch.delitem(sys.modules, "borrowed", raising=False)
    assert prints[0] == prints[1] != prints[2] != prints[3]


def test_a_hook_and_a_changed_forward_are_seen() -> None:
    class Other(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    hooked = Net()
    hooked.linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert len({architecture(Net()), architecture(hooked), architecture(Other())}) == 3


def test_what_contains_itself_has_a_hash() -> None:
    def loop(x: int) -> int:
        return loop(x - 1) if x else 0

    ring: list[Any] = [1]
    ring.append(ring)
    assert fingerprint(loop) == fingerprint(loop) != fingerprint(ring)


def test_frozen_parameters_and_buffers_are_held_and_trainable_ones_are_not() -> None:
    net = Net()
    net.linear.weight.requires_grad_(False)
    assert held_tensors(net).keys() == {"linear.weight", "held"}
    before = fingerprint(held_tensors(net))
    with torch.no_grad():
        net.linear.bias.add_(1)
        assert fingerprint(held_tensors(net)) == before
        net.linear.weight[0, 0] += 1e-3
    assert fingerprint(held_tensors(net)) != before


def test_where_a_model_came_from_does_not_count_and_its_configuration_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny.save_model(tmp_path / "one", "gpt-neox")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    one.save_pretrained(tmp_path / "moved")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert architecture(moved) == architecture(one)
    one.config.layer_norm_eps = 1e-3
    assert architecture(moved) != architecture(one)


def test_the_hash_is_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    program = """
        import torch, torchopt
        from torch import nn
        from retrograd.core.optim import Pair
        from retrograd.runs.identity import fingerprint
        net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        torch.nn.init.ones_(net[0].weight), torch.nn.init.ones_(net[0].bias)
        def loss(p, b):
            return net(b) if b in {"one", "two", "three", "four"} else {"x": 1, "y": {"p", "q", "r"}}
        print(fingerprint(loss, Pair(torchopt.adam(1e-3)), {"b", "a", "c"}, torchopt.adam(lr=lambda t: 0.1 * t)))
    """
    program = textwrap.dedent(program)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # this process has another
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout
    exec(compile(program, "<string>", "exec", dont_inherit=True), {"__name__": "elsewhere"})
    assert capsys.readouterr().out == found != ""


def test_torchopt_optimizers_are_told_apart() -> None:
    torchopt = pytest.importorskip("torchopt")
    made = [
        torchopt.adam(1e-3), torchopt.adam(1e-4), torchopt.adamw(1e-3), torchopt.adam(1e-3, betas=(0.9, 0.95)),
        torchopt.sgd(1e-3), torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(1e-3)),
        torchopt.chain(torchopt.clip_grad_norm(2.0), torchopt.adam(1e-3)),
    ]  # fmt: skip
    assert len({fingerprint(Pair(one)) for one in made}) == len(made)
    assert fingerprint(Pair(torchopt.adam(1e-3))) == fingerprint(Pair(made[0]))


def test_what_was_written_by_another_run_or_version_is_told() -> None:
    here = identify("this")
    assert "earlier version of retrograd (run 0123456789abcdef)" in told_apart("0123456789abcdef", here)
    assert f"another run ({identify('that')}; this run is {here})" in told_apart(identify("that"), here)
