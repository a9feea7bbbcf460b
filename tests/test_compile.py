"""`--compile`: the passes over a layer, compiled once for all layers, against eager ones; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_blocks import build, results, stream

from retrograd.core.engine import Blocks, Compiled
from retrograd.core.engine import compiled as passes
from retrograd.lm.blocks import decoder_chain
from retrograd.lm.engines import compiled_engine
from retrograd.lm.model import trainable
from retrograd.runs.config import DataConfig, MagicConfig, QueryConfig, TrainConfig, check


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ["gpt-neox", "llama-gqa"])
def test_layers_of_one_structure_share_a_function(family: str, lora: bool) -> None:
    """Frozen parameters are each layer's own: what is computed through the first layer's function is the same."""
    data, module = stream(), build(family, lora=lora)
    shared = decoder_chain(module, alike=True)
    assert len({link.call for link in shared.links[:-1]}) == 1
    params, found = trainable(module)[0], []
    for chain in (decoder_chain(module), shared):
        found.append(results(Blocks(chain), params, [data[0]], data.weights, 2))
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())


def test_layers_that_differ_do_not_share() -> None:
    module = build("llama-gqa")
    module.model.layers[1].input_layernorm.variance_epsilon *= 10
    calls = [link.call for link in decoder_chain(module, alike=True).links]
    assert calls[0] is calls[2]
    assert calls[0] is not calls[1]
    assert Compiled(decoder_chain(module, alike=True).links).calls.isdisjoint({calls[1]})


_AGREES = """
import torch
from test_blocks import TOLERANCE, build, error, results, stream
from retrograd.core.engine import Blocks
from retrograd.lm.blocks import decoder_chain
from retrograd.lm.engines import compiled_engine
from retrograd.lm.model import trainable

dtype = torch.{dtype}
data, module = stream(dtype), build("{family}", dtype)
params, batches = trainable(module)[0], [data[0]]
choice = compiled_engine(module, batches, {queries})
assert choice.compiled.graphs == 4, choice.compiled.graphs
expected = results(Blocks(decoder_chain(module)), params, batches, data.weights, {queries})
found, again = (results(choice.engine, params, batches, data.weights, {queries}) for _ in range(2))
assert choice.compiled.graphs == 4, choice.compiled.graphs
difference = error(found, expected)
print("difference", difference, choice.why)
assert difference < TOLERANCE[dtype]
assert error({{**found, "scores": found["scores"] * 1.001}}, expected) > TOLERANCE[dtype]
assert all(torch.equal(again[name], x) for name, x in found.items())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype", "queries"),
    [("gpt-neox", "float64", 1), ("gpt-neox", "float32", 1), ("llama-gqa", "float64", 3)],
)
def test_compiled_equals_eager_and_itself(family: str, dtype: str, queries: int) -> None:
    """One compilation of each pass for three layers; the same bits again. Without run-time checks: they do not compile."""
    code = _AGREES.format(family=family, dtype=dtype, queries=queries)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_no_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"--compile cannot be used here: .* C\+\+ compiler"):
        compiled_engine(build("gpt-neox"), [], 1)


def test_a_single_layer_is_refused() -> None:
    module = build("gpt-neox", num_hidden_layers=1)
    with pytest.raises(ValueError, match="no two layers are of one structure"):
        compiled_engine(module, [], 1)


@pytest.mark.parametrize("changes", [{"engine": "double"}, {"train": TrainConfig(dropout=True)}], ids=str)
def test_what_excludes_it(changes: dict) -> None:
    given = MagicConfig(run=Path("r"), model="m", data=DataConfig("d"), query=QueryConfig("q"), compile=True, **changes)
    with pytest.raises(ValueError, match=r"--compile .*--engine|--compile takes"):
        check(given)
