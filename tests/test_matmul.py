"""Products of matrices by oneDNN: equal to rounding, the same in training and replay, and never in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import test_engine_choice
import torch
from test_engine_choice import magic, scores
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from retrograd import DataStream, Trainer
from retrograd.core import check, matmul
from retrograd.core.matmul import choose, preferring
from retrograd.optim import adamw
from retrograd.runs.replay import Replay
from retrograd.stages.assemble import assemble
from retrograd.stages.opened import finished

needs_onednn = pytest.mark.skipif(matmul.no_onednn() is not None, reason=str(matmul.no_onednn()))


world = test_engine_choice.world


@pytest.fixture(autouse=True)
def _torch_afterwards() -> Any:
    yield
    matmul.prefer("torch")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# tokens m that leave rests of all kinds, with others of n and k; each product beyond the least that oneDNN gets
M, N, K = 1021, 500, 256
X, W, G, B = drawn(M, K), drawn(N, K), drawn(M, N), drawn(N)
Q, S = drawn(16, 255, 64), drawn(16, 255, 255)
OURS: dict[str, Any] = {
    "x Wᵀ": lambda d: X.to(d) @ W.to(d).t(),
    "g W": lambda d: G.to(d) @ W.to(d),
    "gᵀ x": lambda d: G.to(d).t() @ X.to(d),
    "linear": lambda d: torch.nn.functional.linear(X.to(d)[None], W.to(d), B.to(d)),
    "into a given one": lambda d: torch.mm(X.to(d), W.to(d).t(), out=torch.empty(M, N, dtype=d)),
    "added to another": lambda d: torch.addmm(G.to(d), X.to(d), W.to(d).t()),
    "added into a given one": lambda d: torch.addmm(B.to(d), X.to(d), W.to(d).t(), out=torch.empty(M, N, dtype=d)),
    "added in place, rows": lambda d: G.to(d, copy=True).addmm_(X.to(d), W.to(d).t()),
    "added in place, sums": lambda d: W.to(d, copy=True).addmm_(G.to(d).t(), X.to(d)),
    "in place of another": lambda d: torch.full((N, K), torch.nan, dtype=d).addmm_(G.to(d).t(), X.to(d), beta=0),
    "a rest of few rows": lambda d: X[:990].to(d) @ W.to(d).t(),
    "a rest of few sums": lambda d: G[:990].to(d).t() @ X[:990].to(d),
    "many": lambda d: S.to(d) @ S.to(d).mT,
    "many, transposed": lambda d: S.to(d).mT @ Q.to(d),
    "many, into a given one": lambda d: torch.bmm(S.to(d), Q.to(d), out=torch.empty(16, 255, 64, dtype=d)),
}  # fmt: skip
TORCHS: dict[str, Any] = {
    "float64": lambda: X.double() @ W.double().t(),
    "half": lambda: X.bfloat16() @ W.bfloat16().t(),
    "scaled": lambda: torch.addmm(B, X, W.t(), alpha=2.0),
    "small": lambda: X[:100] @ W[:100].t(),
    "thin": lambda: X @ W[:60].t(),
    "strided": lambda: drawn(M, 2 * K)[:, ::2] @ W.t(),
    "into rows with gaps": lambda: torch.mm(X, W.t(), out=torch.empty(M, 2 * N)[:, :N]),
    "many of odd sizes": lambda: drawn(16, 250, 64) @ drawn(16, 64, 250),
    "none": lambda: X[:0] @ W.t(),
}  # fmt: skip


@needs_onednn
@pytest.mark.parametrize("name", OURS)
def test_products_are_those_of_torch_to_rounding(name: str) -> None:
    product = OURS[name]
    with preferring("onednn"):
        found, again = product(torch.float32), product(torch.float32)
    torchs, exact = product(torch.float32), product(torch.float64)
    assert torch.equal(found, again)
    assert not torch.equal(found, torchs)  # another library has computed it
    for one in (found, torchs):
        assert check.relative_error(one.double(), exact) < 1e-6
    assert check.relative_error(found.double() * 1.001, exact) > 1e-6


@needs_onednn
@pytest.mark.parametrize("name", TORCHS)
def test_what_onednn_does_not_take_is_torchs_to_the_bit(name: str) -> None:
    with preferring("onednn"):
        found = TORCHS[name]()
    assert torch.equal(found, TORCHS[name]())


@needs_onednn
def test_wrong_sizes_are_refused_as_ever() -> None:
    with preferring("onednn"):
        for wrong in (lambda: X @ W, lambda: torch.addmm(drawn(7), X, W.t()), lambda: S @ S[:, :64]):
            with pytest.raises(RuntimeError, match=r"size|shape|expand"):
                wrong()


def trained(library: str, plan: Replay) -> torch.Tensor:
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=128, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip
    lengths = torch.randint(90, 128, (12,)).tolist()
    stream = DataStream([torch.randint(512, (length,)).tolist() for length in lengths], 4)
    trainer, state = Trainer.initialize(model, adamw(1e-3, eps_root=1e-6), matmul=library)
    final = trainer.train(state, stream, replay=plan)
    found = trainer.backward(None, stream, trainer.evaluate(final, DataStream([list(range(100))], 1)))
    assert matmul._preferred == "torch"
    return found.weight_grads


@needs_onednn
def test_every_plan_gives_the_same_scores() -> None:
    expected = trained("onednn", Replay(plan="all"))
    for plan in (Replay(plan="binomial", slots=1), Replay(plan="gradients"), Replay(plan="interval", interval=2)):
        assert torch.equal(trained("onednn", plan), expected)
    torchs = trained("torch", Replay(plan="all"))
    assert not torch.equal(torchs, expected)
    assert check.relative_error(expected, torchs) < 1e-4
    assert check.relative_error(expected * 1.001, torchs) > 1e-4
    assert torch.equal(trained("auto", Replay(plan="all")), torchs)  # a small model


@needs_onednn
def test_a_run_goes_on_with_what_it_began_with(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert magic(world, "one", "--matmul", "onednn") == 0
    assert "matrices are multiplied by onednn (asked for)" in capsys.readouterr().out
    assert matmul._preferred == "onednn"
    assert magic(world, "other") == 0
    assert matmul._preferred == "torch"
    about = [json.loads((world / run / "manifest.json").read_text()) for run in ("one", "other")]
    assert [one["engine"].get("matmul", "torch") for one in about] == ["onednn", "torch"]
    assert about[0]["identity"] != about[1]["identity"]
    assert torch.allclose(scores(world, "one"), scores(world, "other"), rtol=1e-4)
    for run, library in (("one", "onednn"), ("other", "torch")):  # they are done; taken from their manifests
        assert magic(world, run) == 0
        assert matmul._preferred == library
        told = assemble(finished(world / run)[0]).engine.matmul_why  # what a run that goes on says
        assert told == {"onednn": "as the run was begun", "torch": ""}[library]
    wide = dataclasses.replace(finished(world / "one")[0], dtype="float64")  # as `retrograd verify` asks for it
    assert assemble(wide).engine.matmul == matmul._preferred == "torch"
    for run, asked, begun in (("one", "torch", "onednn"), ("other", "onednn", "torch")):
        assert magic(world, run, "--matmul", asked) == 2
        assert f"was begun with --matmul {begun}, now it is {asked}" in capsys.readouterr().err
    monkeypatch.setattr(matmul, "_loaded", lambda: "none of g++ is found")
    assert magic(world, "one") == 2
    told = capsys.readouterr().err
    assert "was begun with matrices multiplied by oneDNN" in told
    assert "none of g++ is found" in told


def sized(count: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"w": torch.zeros((), dtype=dtype).expand(count)}


def test_auto_takes_it_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    large = sized(1 << 22)
    monkeypatch.setattr(matmul, "_capability", lambda: "AVX512")
    monkeypatch.setattr(matmul, "_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(matmul, "no_onednn", lambda: None)
    assert choose("auto", large) == ("onednn", "AVX-512, which MKL leaves unused here")
    for params in (sized(1 << 21), sized(1 << 22, torch.float64), {"w": torch.zeros(1 << 22, device="meta")}):
        assert choose("auto", params) == ("torch", "")
    assert choose("torch", large) == ("torch", "asked for")
    monkeypatch.setattr(matmul, "no_onednn", lambda: "no compiler")
    assert choose("auto", large) == ("torch", "not oneDNN: no compiler")
    monkeypatch.setattr(matmul, "_maker", lambda: "GenuineIntel")
    assert choose("auto", large) == ("torch", "")
    monkeypatch.setattr(matmul, "_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(matmul, "_capability", lambda: "AVX2")
    assert choose("auto", large) == ("torch", "")


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="unknown library 'mkl' for products of matrices; there are auto, torch, onednn"
    ):
        choose("mkl", sized(8))
    with pytest.raises(ValueError, match="multiplies float32 on a CPU, and parameters are float64 on cpu"):
        choose("onednn", sized(8, torch.float64))
    monkeypatch.setattr(matmul, "_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match="torch finds AVX2 on this processor, not AVX-512"):
        choose("onednn", sized(8))
    with pytest.raises(ValueError, match="oneDNN cannot multiply float32 matrices here: torch finds AVX2"):
        matmul.prefer("onednn")


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("no-such-compiler", "none of no-such-compiler is found"),
        ("false", "false does not compile matmul.cpp: it says nothing"),
    ],
)
def test_a_compiler_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiler: str, told: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(OSError, match=told):
        matmul._compiled()
    assert ("compiling matmul.cpp with false, once" in capsys.readouterr().err) is (compiler == "false")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
