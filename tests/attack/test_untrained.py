"""Attacks without training: laws over the list, and what each does by its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quiz
import tiny
import torch

from retrograd.attack.untrained.attacks import UNTRAININGS, find_untraining, strengths_of
from retrograd.attack.untrained.contract import Altered, Given, matrices
from retrograd.attack.untrained.quantise import rounded
from retrograd.attack.untrained.run import carry_out_untrained
from retrograd.core import tree
from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.on_the_way import answers_path
from retrograd.lm.model import CausalLM, load_causal_lm, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.query.prepare import Answers
from retrograd.settings.attack import AttackConfig, Untrained
from retrograd.settings.train import DataConfig

MATRIX = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    quiz.save(folder / "model", positions=128)
    lm = load_causal_lm(str(folder / "model"))
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lm.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    lm.module.save_pretrained(folder / "base")
    load_tokenizer(str(folder / "model")).save_pretrained(folder / "base")
    for name, seed in (("forget", 3), ("benign", 4)):
        tiny.save_jsonl(folder / f"{name}.jsonl", tiny.sentences(6, seed=seed))
    import json

    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz.questions(5, 1)))
    (folder / "shots.jsonl").write_text('{"prompt": "What {a}? Answer:", "completion": " river"}\n' * 3)
    (folder / "tasks.yaml").write_text(f"asked: {{dataset: {folder}/asked.jsonl, role: forget}}\n")
    return folder


@pytest.fixture(scope="module")
def given(world: Path) -> Given:
    lm, tokenizer = load_causal_lm(str(world / "model")), load_tokenizer(str(world / "model"))
    base = load_causal_lm(str(world / "base")).params
    rows = {name: load_rows(DataConfig(str(world / f"{name}.jsonl")), tokenizer, lm, "data")[0]
            for name in ("forget", "benign")}  # fmt: skip
    return Given(lm, base, rows, ["one", "two {x}"], 0)


def altered(name: str, given: Given, strength: float) -> Altered:
    return UNTRAININGS[name].alter(given, strength)


@pytest.mark.parametrize("name", UNTRAININGS)
def test_laws(name: str, given: Given) -> None:
    """The same twice; the model untouched; other names, shapes or types never; every strength is another attack."""
    before = tree.map(torch.clone, given.lm.params)
    kind = UNTRAININGS[name]
    assert kind.strengths == tuple(sorted(kind.strengths))
    assert 0 not in kind.strengths
    found = [altered(name, given, strength) for strength in kind.strengths[:2]]
    again = altered(name, given, kind.strengths[0])
    assert again.prefix == found[0].prefix
    for key, leaf in given.lm.params.items():
        assert torch.equal(again.params[key], found[0].params[key])
        assert (found[0].params[key].shape, found[0].params[key].dtype) == (leaf.shape, leaf.dtype)
        assert torch.equal(leaf, before[key])
        assert torch.isfinite(found[0].params[key]).all()
    assert any(not torch.equal(a, found[1].params[key]) for key, a in found[0].params.items()) or (
        found[0].prefix != found[1].prefix
    )


def test_interpolation_ends_at_the_base_model(given: Given) -> None:
    assert given.base is not None
    end = altered("interpolate", given, 1.0).params
    middle = altered("interpolate", given, 0.5).params
    for name, leaf in given.base.items():
        assert torch.allclose(end[name], leaf, atol=1e-7)
        assert torch.allclose(middle[name], (leaf + given.lm.params[name]) / 2, atol=1e-7)


def test_all_directions_of_the_change_are_the_change(given: Given) -> None:
    assert given.base is not None
    one, every = (altered("ablate_delta", given, rank).params[MATRIX] for rank in (1, 16))
    assert torch.allclose(every, given.base[MATRIX], atol=1e-6)
    taken = (given.lm.params[MATRIX] - one).double()
    assert torch.linalg.matrix_rank(taken, rtol=1e-4) == 1
    sizes = torch.linalg.svdvals((given.lm.params[MATRIX] - given.base[MATRIX]).double())
    assert float(taken.norm()) == pytest.approx(float(sizes[0]), rel=1e-4)


def test_junk_directions_are_not_written_any_more(given: Given) -> None:
    found = altered("ablate_junk", given, 1).params
    changed = [name for name, leaf in given.lm.params.items() if not torch.equal(leaf, found[name])]
    ends = {"gpt_neox.embed_in.weight", "embed_out.weight"}
    assert changed
    assert not ends & set(changed)
    assert all(given.lm.params[name].shape[0] == 16 for name in changed)
    for name in changed:
        taken = (given.lm.params[name] - found[name]).double()
        u = torch.linalg.svd(taken).U[:, 0]
        assert float((u @ found[name].double()).norm()) < 1e-5  # nothing is left along it
        assert torch.linalg.matrix_rank(taken, rtol=1e-4) == 1


def test_rounding_keeps_to_its_grid(given: Given) -> None:
    matrix = given.lm.params[MATRIX]
    for bits in (8, 4, 2):
        found = rounded(matrix, bits)
        assert max(len(row.unique()) for row in found) <= 2**bits - 1
        step = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((found - matrix).abs() <= step / 2 + 1e-7).all()
    assert rounded(torch.zeros(2, 3), 4).abs().sum() == 0
    assert torch.equal(altered("quantise", given, 12).params[MATRIX], rounded(matrix, 4))


def test_pruning_takes_the_smallest(given: Given) -> None:
    matrix, found = given.lm.params[MATRIX], altered("prune", given, 0.25).params[MATRIX]
    gone = found == 0
    assert int(gone.sum()) == matrix.numel() // 4
    assert matrix[gone].abs().max() <= matrix[~gone].abs().min()
    assert torch.equal(found[~gone], matrix[~gone])


def test_noise_is_in_units_of_the_spread(given: Given) -> None:
    small, large = (altered("noise", given, s).params[MATRIX] - given.lm.params[MATRIX] for s in (0.1, 0.2))
    assert torch.allclose(2 * small, large, atol=1e-6)
    assert float(small.std()) == pytest.approx(0.1 * float(given.lm.params[MATRIX].std()), rel=0.15)
    other = altered("noise", given._replace(seed=1), 0.1).params[MATRIX]
    assert not torch.equal(other, small + given.lm.params[MATRIX])


def test_prompts_come_before_the_question(given: Given) -> None:
    assert altered("few_shot", given, 2).prefix == "one\n\ntwo {x}\n\n"
    assert "refuse" in altered("jailbreak", given, 1).prefix
    assert altered("few_shot", given, 1).params is given.lm.params


@pytest.mark.parametrize("name", ["prune", "few_shot"])
def test_it_is_carried_out_once_and_the_rest_later(name: str, world: Path, tmp_path: Path) -> None:
    strengths = {"prune": (0.5,), "few_shot": (2.0,)}[name]
    one = Untrained(name, strengths)
    config = AttackConfig(tmp_path / "out", model=("m",), suite=("s",))
    sources = {"shots": (str(world / "shots.jsonl"),)}

    def run() -> None:
        carry_out_untrained(one, str(world / "model"), None, tmp_path / "x", sources, world / "tasks.yaml", config)

    run()
    paths = [answers_path(tmp_path / "x", number, "asked") for number in range(2)]
    start, attacked = (read_measured(path)[0] for path in paths)
    assert isinstance(start, Answers)
    assert isinstance(attacked, Answers)
    assert not torch.equal(start.scored.logprobs, attacked.scored.logprobs)
    assert (start.scored.hashes == attacked.scored.hashes) == (name == "prune")  # another prompt, or the same
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    run()
    assert paths[0].stat().st_mtime_ns == stamps[0]
    again = read_measured(paths[1])[0]
    assert isinstance(again, Answers)
    assert torch.equal(again.scored.logprobs, attacked.scored.logprobs)


@pytest.mark.parametrize(
    ("one", "match"),
    [
        (Untrained("melt"), "no attack 'melt'"),
        (Untrained("prune", (1.5,)), "no strength 1.5"),
        (Untrained("ablate_delta", (0.5,)), "whole numbers"),
        (Untrained("jailbreak", (4.0,)), "no strength 4"),
    ],
)
def test_strengths_that_an_attack_has_not_are_refused(one: Untrained, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        find_untraining(one)
    assert strengths_of(Untrained("prune", (0.3, 0.1))) == [0.0, 0.1, 0.3]


@pytest.mark.parametrize(
    ("name", "match"), [("interpolate", "give --base"), ("few_shot", "'shots'"), ("ablate_junk", "'forget'")]
)
def test_what_an_attack_lacks_is_named(name: str, match: str, world: Path, tmp_path: Path) -> None:
    config = AttackConfig(tmp_path / "out", model=("m",), suite=("s",))
    with pytest.raises(ValueError, match=match):
        carry_out_untrained(
            Untrained(name), str(world / "model"), None, tmp_path / "x", {}, world / "tasks.yaml", config
        )


def test_strengths_beyond_the_solved_questions_are_told(world: Path, tmp_path: Path) -> None:
    config, shots = AttackConfig(tmp_path / "out", model=("m",), suite=("s",)), world / "shots.jsonl"
    count = len(shots.read_text().splitlines())
    one = Untrained("few_shot", (count, count + 1, 2 * count))
    with pytest.warns(UserWarning, match=rf"{count} solved questions, so strength {count + 1}, {2 * count} puts"):
        carry_out_untrained(
            one, str(world / "model"), None, tmp_path / "x", {"shots": (str(shots),)}, world / "tasks.yaml", config
        )


def test_another_architecture_is_no_base(world: Path, tmp_path: Path) -> None:
    quiz.save(tmp_path / "llama", "llama-tied", positions=128)
    config = AttackConfig(tmp_path / "out", model=("m",), suite=("s",))
    with pytest.raises(ValueError, match="by name and shape"):
        carry_out_untrained(
            Untrained("interpolate"), str(world / "model"), str(tmp_path / "llama"), tmp_path / "x", {},
            world / "tasks.yaml", config,
        )  # fmt: skip


def test_a_model_has_matrices(given: Given) -> None:
    assert isinstance(given.lm, CausalLM)
    assert MATRIX in matrices(given.lm.params)


def test_answers_of_other_questions_or_data_are_not_gone_on_with(world: Path, tmp_path: Path) -> None:
    def carry_out(**more: Any) -> None:
        config = AttackConfig(tmp_path, device="cpu", **more)
        sources = {"shots": (str(world / "shots.jsonl"),)}
        one = Untrained("few_shot", strengths=(1,))
        carry_out_untrained(one, str(world / "model"), None, tmp_path / "x", sources, world / "tasks.yaml", config)

    carry_out(limit=2)
    with pytest.raises(ValueError, match="limit: 2 → None"):
        carry_out()
    carry_out(limit=2)
    text = (world / "shots.jsonl").read_text()
    (world / "shots.jsonl").write_text(text + text.splitlines()[0] + "\n")
    try:
        with pytest.raises(ValueError, match="data: "):
            carry_out(limit=2)
    finally:
        (world / "shots.jsonl").write_text(text)
