"""Methods that edit parameters before the first step, against the edit written out on the plain model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_unlearn_by_hand import mean, rows_of
from test_unlearn_methods import drawn
from torch.nn import functional as F
from unlearning import FORGET, RETAIN, language_model, pairs

from retrograd.cli import main
from retrograd.data.pairs import PairStream
from retrograd.lm.model import load_causal_lm
from retrograd.lm.outputs import outputs_of
from retrograd.unlearn import guards
from retrograd.unlearn.method import Method
from retrograd.unlearn.methods import METHODS
from retrograd.unlearn.reference import reference_of
from retrograd.unlearn.weights import repselect
from retrograd.unlearn.weights.representation_edit import telling_directions

EDIT, SELECT = METHODS["representation_edit"], METHODS["repselect"]


def test_the_directions_are_those_of_the_generalised_eigenproblem() -> None:
    from scipy.linalg import eigh, subspace_angles

    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    x, y = a.T @ a / 30, b.T @ b / 30
    found = telling_directions(x, y, 3, 0.2)
    expected = eigh(x.numpy(), (y + 0.2 * y.trace() / 8 * torch.eye(8)).numpy())[1][:, -3:]
    assert torch.allclose(found.T @ found, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert subspace_angles(found.numpy(), expected).max() < 1e-7
    assert subspace_angles(telling_directions(y, x, 3, 0.2).numpy(), expected).max() > 0.1


def test_the_edit_by_hand() -> None:
    """The states of block 0, weighted; its two writing layers lose one direction, and nothing else changes."""
    lm, rank = language_model(), 2 / 16
    rows = [[ids[:4] for ids in side if len(ids) >= 4][:3] for side in (FORGET, RETAIN)]
    drawn_weights = drawn(torch.Size([sum(map(len, rows)), 4]))
    stream = PairStream(
        *rows, forget_batch=1, retain_batch=1, epochs=2, weights=drawn_weights, shuffle=False, dtype=torch.float64
    )
    settings = replace(EDIT.defaults, blocks=(0,), rank=rank, ridge=0.3)
    found = EDIT.edit(settings, lm, reference_of(lm), stream)
    x, y = torch.zeros(2, 16, 16, dtype=torch.float64)
    for step in range(len(stream) // 2):
        for total, side in zip((x, y), rows_of(lm, lm.params, stream, stream.weights, step)):
            for h, *_, w in side:
                total += sum(wi * torch.outer(hi, hi) for wi, hi in zip(w, h.detach())) / len(w)
    v = telling_directions(x, y, 2, 0.3)
    for name, before in lm.params.items():
        if name.startswith("gpt_neox.layers.0.") and (".dense." in name or "dense_4h_to_h" in name):
            part = torch.tensordot(before, v, dims=([0], [0]))  # what it writes along each direction
            expected = before - torch.tensordot(v, part, dims=([1], [part.ndim - 1]))
            assert torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12)
            assert not torch.equal(found[name], before)
        else:
            assert torch.equal(found[name], before)


@pytest.mark.parametrize("family", ["gpt-neox", "gpt2-tied", "llama-gqa", "gemma"])
def test_edited_blocks_write_nothing_along_their_directions(family: str) -> None:
    """What the second block adds has lost as many dimensions as directions were taken."""
    lm, stream = language_model(family), pairs(EDIT, forget_batch=5, retain_batch=3)
    ranks = []
    for params in (lm.params, EDIT.edit(replace(EDIT.defaults, rank=0.25), lm, reference_of(lm), stream)):
        states = outputs_of(lm, (0, 1))(params, stream[0].inputs).states
        ranks.append(int(torch.linalg.matrix_rank(states[1] - states[0], rtol=1e-6)))
    assert ranks == [16, 12]


def test_models_and_runs_it_is_not_made_for_are_refused() -> None:
    lm, stream = language_model(layers=1), pairs(EDIT)
    with pytest.raises(ValueError, match=r"still writes .* of the norm of its output along the directions"):
        olmo = language_model("olmo2")
        EDIT.edit(EDIT.defaults, olmo, reference_of(olmo), stream)
    adapted = language_model(lora=True, layers=1)
    with pytest.raises(ValueError, match=r"leave adapters out, with --lora.rank 0"):
        EDIT.edit(EDIT.defaults, adapted, reference_of(adapted), stream)
    alone = PairStream([[1, 2, 3]], None, forget_batch=1, retain_batch=1, dtype=torch.float64)
    with pytest.raises(ValueError, match="give retain rows, --retain"):
        EDIT.edit(EDIT.defaults, lm, reference_of(lm), alone)
    with pytest.raises(ValueError, match="runs of representation_edit cannot be attributed: it edits the parameters"):
        guards.check_attributable(EDIT)
    with pytest.raises(ValueError, match="say in no_gradient why"):
        Method("mine", "F", "nowhere", EDIT.defaults, EDIT.forget, edit=EDIT.edit)
    for wrong in ({"rank": 0.0}, {"ridge": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            replace(EDIT.defaults, **wrong)


@pytest.mark.parametrize("collapse", ["soft", "quadratic", "hard"])
def test_a_collapsed_gradient_by_hand(collapse: str) -> None:
    """One singular vector after the other, the right ones of all and then the left ones."""
    draw = torch.Generator().manual_seed(0)
    gradient, shared = (torch.randn(6, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    u, s, vh = torch.linalg.svd(shared)
    expected = gradient.clone()
    factors = {"soft": s[2] / s, "quadratic": (s[2] / s) ** 2, "hard": 0 * s}[collapse]
    for i in range(3):
        expected += (factors[i] - 1) * torch.outer(expected @ vh[i], vh[i])
    for i in range(3):
        expected += (factors[i] - 1) * torch.outer(u[:, i], u[:, i] @ expected)
    assert torch.allclose(repselect.collapsed(gradient, shared, 3, collapse), expected, rtol=1e-10, atol=1e-12)


def test_repselect_by_hand() -> None:
    """Without elicitation: ascent on the plain cross-entropy, collapsed, as far as the budget goes and no further."""
    lm, budget = language_model(layers=1), 0.02
    stream = pairs(SELECT, forget_batch=5, retain_batch=3, weights=drawn(torch.Size([8, 6])))
    settings = replace(SELECT.defaults, elicit_lr=0.0, budget=budget, collapse="quadratic")
    found = SELECT.edit(settings, lm, reference_of(lm), stream)
    matrices = [name for name in lm.params if "mlp.dense" in name and name.endswith("weight")]
    assert {name for name, x in found.items() if not torch.equal(x, lm.params[name])} == set(matrices)
    assert len(matrices) == 2
    live = {name: x.detach().requires_grad_() for name, x in lm.params.items()}
    sides = rows_of(lm, live, stream, stream.weights, 0)
    slopes = []
    for side in sides:
        loss = sum(torch.sum(w * F.cross_entropy(z, y, reduction="none")) for *_, z, y, w in side)
        loss = loss / sum(len(w) for *_, w in side)
        slopes.append(torch.autograd.grad(loss, [live[name] for name in matrices], retain_graph=True))
    along = {name: repselect.collapsed(-g, -shared, 2, "quadratic") for name, g, shared in zip(matrices, *slopes)}
    sizes = [float(((lm.params[n] - found[n]) * along[n]).sum() / along[n].square().sum()) for n in matrices]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-9)
    for name in matrices:
        assert torch.allclose(lm.params[name] - found[name], sizes[0] * along[name], rtol=1e-9, atol=1e-13)

    def divergence(s: float) -> float:
        params = {**lm.params, **{name: lm.params[name] - s * step for name, step in along.items()}}
        ones = torch.ones_like(stream.weights)
        pairs_of = zip(*(rows_of(lm, p, stream, ones, 0)[1] for p in (params, lm.params)))
        rows = [(now[2], then[2], None, None, now[4]) for now, then in pairs_of]
        return mean(rows, lambda z, z0: F.kl_div(z.log_softmax(-1), z0.log_softmax(-1), reduction="none", log_target=True).sum(-1))  # fmt: skip

    assert budget * 0.98 < divergence(sizes[0]) <= budget < divergence(1.01 * sizes[0])


def test_elicitation_says_the_forget_rows_again_and_turns_the_direction() -> None:
    lm, stream = language_model(layers=1), pairs(SELECT, forget_batch=5, retain_batch=3)
    settings = replace(SELECT.defaults, elicit_lr=0.5)
    names = repselect._matrices(settings, lm.module)
    elicited = repselect._elicited(settings, lm, stream, names)
    losses = [float(repselect._loss(lm, params, stream[0], stream.weights, 0)) for params in (lm.params, elicited)]
    assert losses[1] < losses[0] - 1e-3
    assert all(torch.linalg.matrix_rank(elicited[n] - lm.params[n], rtol=1e-9) == 2 for n in names)
    edits = [SELECT.edit(replace(settings, elicit_lr=rate), lm, reference_of(lm), stream) for rate in (0.5, 0.0)]
    assert any(not torch.allclose(edits[0][n], edits[1][n], rtol=1e-3) for n in names)


def test_what_repselect_cannot_do_is_refused() -> None:
    lm, stream = language_model(layers=1), pairs(SELECT, forget_batch=5, retain_batch=3)
    with pytest.raises(ValueError, match=r"is more than the budget, 1e-20 nats a token: raise --objective.budget"):
        SELECT.edit(replace(SELECT.defaults, budget=1e-20), lm, reference_of(lm), stream)
    with pytest.raises(ValueError, match="gradient is 0 at every matrix"):
        silent = pairs(SELECT, weights=torch.zeros(8, 6, dtype=torch.float64))
        SELECT.edit(SELECT.defaults, lm, reference_of(lm), silent)
    adapted = language_model(lora=True, layers=1)
    with pytest.raises(ValueError, match=r"leave adapters out, with --lora.rank 0"):
        SELECT.edit(SELECT.defaults, adapted, reference_of(adapted), stream)
    alone = PairStream([[1, 2, 3]], None, forget_batch=1, retain_batch=1, dtype=torch.float64)
    with pytest.raises(ValueError, match="keeps a budget on the retain rows and there are none"):
        SELECT.edit(SELECT.defaults, lm, reference_of(lm), alone)
    with pytest.raises(ValueError, match="runs of repselect cannot be attributed: its direction comes from"):
        guards.check_attributable(SELECT)
    with pytest.raises(ValueError, match="rank is 0"):
        replace(SELECT.defaults, rank=0)


def test_from_the_command_to_an_edited_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate of 0 the writing layers alone have changed; resumed and attributed runs are what they should be."""
    tiny.save_model(tmp_path / "model")
    for name, seed in (("forget", 3), ("retain", 4)):
        tiny.save_jsonl(tmp_path / f"{name}.jsonl", tiny.sentences(6, seed=seed))
    arguments = [
        "unlearn", "representation_edit", str(tmp_path / "run"), "--model", str(tmp_path / "model"), "--forget",
        str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl"), "--train.batch_size", "3",
        "--train.lr", "0",
    ]  # fmt: skip
    assert main([*arguments, "--attribute", "tokens", "--query.dataset", str(tmp_path / "retain.jsonl")]) == 2
    assert "cannot be attributed: it edits the parameters" in " ".join(capsys.readouterr().err.split())
    assert main(arguments) == 0
    before, after = load_causal_lm(str(tmp_path / "model")), load_causal_lm(str(tmp_path / "run/model"))
    changed = {name for name, x in before.params.items() if not torch.equal(x, after.params[name])}
    writers = {name for name in before.params if "attention.dense." in name or "dense_4h_to_h" in name}
    assert {name for name in writers if name.endswith("weight")} <= changed <= writers
    assert json.loads((tmp_path / "run/manifest.json").read_text())["method"] == "representation_edit"
    assert main(arguments) == 0
    assert "is done" in " ".join(capsys.readouterr().out.split())
