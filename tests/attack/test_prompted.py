"""Prompts that are searched: gradients against differences, a suffix against trying everything, and resuming."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiz
import torch
from torch import Tensor

from retrograd.attack.prompted import run as running
from retrograd.attack.prompted import suffix
from retrograd.attack.prompted.contract import Given
from retrograd.attack.prompted.insert import inserted, joined, some
from retrograd.attack.prompted.run import SEARCHES, carry_out_prompted, given_of
from retrograd.cli import main
from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.on_the_way import answers_path
from retrograd.lm.layout import twice_differentiable
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.lm.virtual import embedded, embedding_rows, virtual_tokens
from retrograd.query.prepare import Answers, prepare
from retrograd.query.questions import Questions, build_questions
from retrograd.settings.attack import AttackConfig
from retrograd.settings.prompted import Prompted
from retrograd.settings.tasks import Task

HALF = (quiz.SUBJECTS[0],)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family, bos in (("gpt-neox", False), ("llama-tied", True)):
        folder = tmp_path_factory.mktemp(family)
        quiz.save(folder / "model", family, bos=bos)
        for name, count, seed in (("asked", 8, 1), ("kept", 3, 2)):
            rows = "".join(json.dumps(row) + "\n" for row in quiz.questions(count, seed))
            (folder / f"{name}.jsonl").write_text(rows)
        (folder / "tasks.yaml").write_text(
            f"asked: {{dataset: {folder}/asked.jsonl, role: forget, form: cloze, normalise: true}}\n"
            f"kept: {{dataset: {folder}/kept.jsonl, role: retain}}\n"
            f"text: {{dataset: {folder}/kept.jsonl, form: text, text_column: question, limit: 2}}\n"
        )
        found[family] = folder
    return found


def given(folder: Path, one: Prompted, form: Any = "cloze", dtype: str = "float64") -> Given:
    lm, tokenizer = load_causal_lm(str(folder / "model"), dtype=dtype), load_tokenizer(str(folder / "model"))
    task = Task(str(folder / "asked.jsonl"), form=form, role="forget", normalise=form == "cloze")
    return given_of(one, lm, tokenizer, {"asked": prepare(task, lm, tokenizer, 4)}, HALF, 3)


def loss_of(found: Given, questions: Questions, embeds: Any) -> float:
    """The loss by the model itself, row by row: no virtual tokens, no batches."""
    losses = []
    for rows, targets, gold, widths in zip(questions.rows, questions.targets, questions.gold, questions.widths):
        scores = []
        for row, target in zip(rows, targets if questions.form == "cloze" else [targets[0]]):
            with twice_differentiable(torch.float64):  # else norms are in float32
                z = found.lm.module.eval()(inputs_embeds=embeds(row)[None]).logits[0].log_softmax(1)  # type: ignore[operator]
            if questions.form == "cloze":
                ends = range(len(row) - len(target), len(row))
                scores.append(sum(z[at, token] for at, token in zip(ends, target)))
            else:
                scores += [z[len(row) - 1, token] for token in target]
        values = torch.stack(scores)
        if found.parts[0].normalise:
            values = values / torch.from_numpy(widths)
        losses.append(-values.log_softmax(0)[gold])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("family", ["gpt-neox", "llama-tied"])
@pytest.mark.parametrize(("form", "place"), [("cloze", "before"), ("cloze", "after"), ("letter", "after")])
def test_the_gradient_of_a_latent_prompt_is_that_of_differences(
    family: str, form: str, place: Any, worlds: dict[str, Path]
) -> None:
    found = given(worlds[family], Prompted("latent", 3, place), form)
    vectors = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value, gradient, read = found.descent(found.parts, vectors)
    questions = found.put(found.parts[0], found.virtual())
    assert read == sum(len(row) for rows in questions.rows for row in rows)

    def embeds(at: Tensor) -> Any:
        def of(row: np.ndarray) -> Tensor:
            ids = torch.from_numpy(row)
            own = ids >= embedding_rows(found.lm)
            table = embedded(found.lm, ids.where(~own, 0))
            return table.masked_scatter(own[:, None], at.to(table))

        return of

    with torch.no_grad():
        assert value == pytest.approx(loss_of(found, questions, embeds(vectors)), rel=1e-12)
        step = 1e-5
        for place_of, k in ((0, 1), (1, 7), (2, 15)):
            shift = torch.zeros_like(vectors)
            shift[place_of, k] = step
            up, down = (loss_of(found, questions, embeds(vectors + sign * shift)) for sign in (1, -1))
            assert float(gradient[place_of, k]) == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("family", ["gpt-neox", "llama-tied"])
def test_a_virtual_token_with_a_tokens_embedding_is_that_token(family: str, worlds: dict[str, Path]) -> None:
    found = given(worlds[family], Prompted("latent", 2), dtype="float32")
    ids = torch.tensor([5, 9])
    questions = found.parts[0].questions
    real, virtual = (inserted(questions, k, "after", first=None, longest=None) for k in (ids.numpy(), found.virtual()))
    from retrograd.query.choices import score_questions

    plain = score_questions(found.lm, found.lm.params, real).logprobs
    with virtual_tokens(found.lm, embedded(found.lm, ids)):
        same = score_questions(found.lm, found.lm.params, virtual).logprobs
    with virtual_tokens(found.lm, embedded(found.lm, ids.flip(0))):
        other = score_questions(found.lm, found.lm.params, virtual).logprobs
    assert torch.equal(plain, same)
    assert not torch.equal(plain, other)
    again = score_questions(found.lm, found.lm.params, real).logprobs  # the hooks are gone
    assert torch.equal(plain, again)


def test_a_suffix_never_gets_worse_on_its_half_and_says_its_loss(worlds: dict[str, Path]) -> None:
    found = given(worlds["gpt-neox"], Prompted("suffix", 3, batch_size=2, candidates=8, best=6, steps=8))
    search = SEARCHES["suffix"]
    state, losses = search.start(found), []
    for _ in range(8):
        losses.append(state.loss)
        questions = found.put(found.parts[0], search.ids(found, state))
        with torch.no_grad():
            own = loss_of(found, questions, lambda row: embedded(found.lm, torch.from_numpy(row)))
        assert state.loss == pytest.approx(own, rel=1e-9)
        state = search.advance(found, state)
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    assert found.allowed[state.tensors["ids"]].all()


def test_one_token_is_the_best_of_all_that_the_gradient_allows(worlds: dict[str, Path]) -> None:
    """With every exchange tried on every question, a step finds what trying all tokens finds."""
    found = given(worlds["gpt-neox"], Prompted("suffix", 1, batch_size=8, candidates=60, best=10_000))
    allowed = found.allowed.nonzero()[:, 0][:6]
    found = dataclasses.replace(found, allowed=torch.zeros_like(found.allowed).index_fill(0, allowed, True))
    state = SEARCHES["suffix"].start(found)
    losses, _ = suffix._losses(found, found.parts, allowed[:, None])
    gradient = found.descent(found.parts, embedded(found.lm, state.tensors["ids"]))[1]
    tried = suffix._exchanges(found, state.tensors["ids"], gradient, 0)
    assert set(tried[:, 0].tolist()) == set(allowed.tolist())
    found = dataclasses.replace(found, one=dataclasses.replace(found.one, candidates=60))
    state = SEARCHES["suffix"].advance(found, state)
    assert int(state.tensors["ids"][0]) == int(allowed[losses.argmin()])
    assert state.loss == pytest.approx(float(losses.min()))


def test_the_gradient_names_the_tokens_that_lower_a_linear_loss_most(worlds: dict[str, Path]) -> None:
    found = given(worlds["gpt-neox"], Prompted("suffix", 2, candidates=64, best=1))
    gradient = torch.zeros(2, 16, dtype=torch.float64)
    gradient[0], gradient[1] = -embedded(found.lm, torch.tensor(40)), embedded(found.lm, torch.tensor(41))
    table = embedded(found.lm, torch.arange(len(found.allowed)))
    change = (gradient @ table.T).masked_fill(~found.allowed, torch.inf)
    tried = suffix._exchanges(found, torch.tensor([30, 31]), gradient, 0)
    assert {tuple(row) for row in tried.tolist()} == {(int(change[0].argmin()), 31), (30, int(change[1].argmin()))}


def test_where_a_prompt_lies_and_what_a_long_row_loses() -> None:
    rows = [{"question": "one two three four", "choices": ["river", "old town"], "answer": 1}]
    questions = build_questions(quiz.dataset(rows), quiz.tokenizer(bos=True), form="cloze", template="{question}")
    ids = np.array([900, 901])
    for row, target, with_before, with_after in zip(
        questions.rows[0], questions.targets[0], inserted(questions, ids, "before", first=1, longest=None).rows[0],
        inserted(questions, ids, "after", first=1, longest=None).rows[0],
    ):  # fmt: skip
        assert with_before.tolist() == [1, 900, 901, *row[1:].tolist()]
        end = len(row) - (len(target) - 1)
        assert with_after.tolist() == [*row[:end].tolist(), 900, 901, *row[end:].tolist()]
    longest = max(len(row) for row in questions.rows[0])
    for place in ("before", "after"):
        for whole, cut in zip(questions.rows[0], inserted(questions, ids, place, first=1, longest=longest).rows[0]):
            assert len(cut) == min(longest, len(whole) + 2)
            assert {900, 901} <= set(cut.tolist())
            assert cut[-1] == whole[-1] or (place == "after" and cut[-1] == 901)
    with pytest.raises(ValueError, match="a prompt of 2 tokens and the answers to question 0 do not fit"):
        inserted(questions, ids, "after", first=1, longest=2)
    both = joined([questions, some(questions, [0])])
    assert (len(both), both.gold.tolist(), both.digest() != questions.digest()) == (2, [1, 1], True)


@pytest.mark.parametrize("prompt", ["suffix", "latent"])
def test_it_goes_on_where_it_was_left_to_the_same_bits(
    prompt: Any, worlds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds["llama-tied"]
    one = Prompted(prompt, 2, steps=5, batch_size=2, candidates=4, best=4)
    config = AttackConfig(tmp_path / "out", model=("m",), suite=("s",), heartbeat=0)

    def carry_out(folder: str) -> None:
        carry_out_prompted(one, str(world / "model"), tmp_path / folder, world / "tasks.yaml", HALF, config)

    carry_out("whole")
    real = SEARCHES[prompt]

    def dies(found: Given, state: Any) -> Any:
        if state.step == 3:
            raise KeyboardInterrupt
        return real.advance(found, state)

    monkeypatch.setitem(running.SEARCHES, prompt, dataclasses.replace(real, advance=dies))
    with pytest.raises(KeyboardInterrupt):
        carry_out("killed")
    monkeypatch.undo()
    carry_out("killed")
    told = [json.loads((tmp_path / folder / "search.json").read_text()) for folder in ("whole", "killed")]
    assert told[0] == told[1]
    assert list(told[0]["found"]) == ["0", "1", "2", "5"]
    answers = [
        [read_measured(answers_path(tmp_path / folder, step, "asked"))[0] for step in (0, 1, 2, 5)]
        for folder in ("whole", "killed")
    ]
    for a, b in zip(*answers):
        assert isinstance(a, Answers)
        assert isinstance(b, Answers)
        assert torch.equal(a.scored.logprobs, b.scored.logprobs)
    start, end = (a.scored.logprobs for a in (answers[0][0], answers[0][-1]) if isinstance(a, Answers))
    assert not torch.equal(start, end)
    texts = [read_measured(answers_path(tmp_path / "whole", step, "text"))[0] for step in (0, 5)]
    assert texts[0] == texts[1]  # a text has no question to put a prompt into
    answers_path(tmp_path / "killed", 1, "asked").unlink()  # behind the resume point: from the start again
    carry_out("killed")
    again = read_measured(answers_path(tmp_path / "killed", 1, "asked"))[0]
    assert isinstance(again, Answers)
    assert torch.equal(again.scored.logprobs, answers[0][1].scored.logprobs)  # type: ignore[union-attr]


def test_a_half_that_is_all_or_nothing_is_refused_before_a_model_is_loaded(
    worlds: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(suite: str, *half: str) -> str:
        arguments = [
            "--data",
            "half=nowhere.jsonl",
            "--tasks",
            str(worlds["gpt-neox"] / "tasks.yaml"),
            "--base",
            "gone",
        ]
        assert main(["attack", str(tmp_path / "out"), "--model", "gone", "--suite", suite, *arguments,
                     "--half", *half]) == 2  # fmt: skip
        assert not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    searched, trained = "[{prompt: suffix, steps: 1}]", "[{data: half, steps: 1}]"
    assert "--half asked has 8 of the 8 that are asked" in refusal(searched, "asked")
    assert f"--half {' '.join(quiz.SUBJECTS)} has 8 of the 8" in refusal(searched, *quiz.SUBJECTS)
    for suite in (searched, trained):  # questions that no name covers would count as never shown
        assert "--half 'aked' is no forget task" in refusal(suite, quiz.SUBJECTS[0], "aked")


def test_a_prompt_has_tokens() -> None:
    with pytest.raises(ValueError, match="tokens is 0"):
        Prompted(tokens=0).check()
