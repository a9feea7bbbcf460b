"""Multiple choice: the scorer against a naive twin, its gradient, its prompts and its refusals, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiz
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.core import check, tree
from retrograd.core.step import Batch, coefficients
from retrograd.lm.layout import _keep_float64
from retrograd.lm.model import CausalLM, load_causal_lm
from retrograd.query.choices import LOSSES, Scored, choice_columns, choice_objective, score_questions
from retrograd.query.columns import Queries, batch_columns
from retrograd.query.prompts import TEMPLATES, Template, find_template, render
from retrograd.query.questions import Questions, build_questions

FAMILIES = ["gpt-neox", "llama-tied", "cohere"]  # cohere scales its logits: no plain head
TOKENIZER = quiz.tokenizer()
ROWS = [*quiz.questions(5), *quiz.questions(3, seed=1, options=2), *quiz.questions(2, seed=2, options=5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CausalLM]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: load_causal_lm(str(quiz.save(folder / name, name)), dtype="float64", dropout=name == "gpt-neox")
        for name in FAMILIES
    }


def asked(form: str, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Questions:
    return build_questions(quiz.dataset(rows), TOKENIZER, form=form, **options)


def naive_logprobs(lm: CausalLM, form: str, rows: list[dict[str, Any]] = ROWS) -> list[Tensor]:
    """Option by option, unpadded, from the logits of the whole text."""
    found = []
    for row in rows:
        prompt = render(find_template(None, form), row["question"], row["choices"])
        scores = []
        for target in prompt.targets:
            ids, start = TOKENIZER.encode(prompt.text + target), len(TOKENIZER.encode(prompt.text))
            lm.module.eval()
            with torch.no_grad(), _keep_float64(torch.float64), sdpa_kernel(SDPBackend.MATH):
                logp = lm.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logp[k - 1, ids[k]] for k in range(start, len(ids))))
        found.append(torch.stack(scores))
    return found


def naive_loss(scores: Tensor, row: dict[str, Any], form: str, loss: str, normalise: bool) -> Tensor:
    if normalise and form == "cloze":
        scores = scores / torch.tensor([len(choice) for choice in row["choices"]])
    return -(scores.log_softmax(0) if loss == "four_way" else scores)[row["answer"]]


def asking(lm: CausalLM, columns: list[list[Batch]], loss: str, normalise: bool) -> Queries:
    return Queries(batch_columns(choice_objective(lm, loss, normalise=normalise), "quiz", columns))


def values(lm: CausalLM, questions: Questions, loss: str, normalise: bool = False, **options: Any) -> Tensor:
    columns = choice_columns(questions, dtype=torch.float64, **options)
    return asking(lm, columns, loss, normalise).values(lm.params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["letter", "cloze"])
def test_losses_equal_the_naive_twin(models: dict[str, CausalLM], family: str, form: str) -> None:
    lm, questions = models[family], asked(form)
    assert lm.fused == (family != "cohere")
    twin = naive_logprobs(lm, form)
    for loss in LOSSES:
        for normalise in (False, True):
            expected = torch.stack([naive_loss(s, row, form, loss, normalise) for s, row in zip(twin, ROWS)])
            each = values(lm, questions, loss, normalise, reduction="none")
            torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
            mean = values(lm, questions, loss, normalise, batch_size=4)
            torch.testing.assert_close(mean, expected.mean()[None], rtol=1e-12, atol=1e-12)


def test_four_way_of_letters_is_a_softmax_over_their_logits(models: dict[str, CausalLM]) -> None:
    lm, rows = models["llama-tied"], quiz.questions(1)
    ids = TOKENIZER.encode(render(TEMPLATES["plain"], rows[0]["question"], rows[0]["choices"]).text)
    letters = [TOKENIZER.encode(f" {letter}") for letter in "ABCD"]
    with _keep_float64(torch.float64):
        z = lm.module(input_ids=torch.tensor([ids])).logits[0, -1, [one for (one,) in letters]]
    found = values(lm, asked("letter", rows), "four_way")
    torch.testing.assert_close(found[0], -z.log_softmax(0)[rows[0]["answer"]].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["letter", "cloze"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalise", [False, True], ids=["plain", "normalised"])
def test_gradient_is_the_central_difference(
    models: dict[str, CausalLM], family: str, form: str, loss: str, normalise: bool
) -> None:
    lm = models[family]
    columns = choice_columns(asked(form), batch_size=4, dtype=torch.float64)
    query = asking(lm, columns, loss, normalise)
    draw = torch.Generator().manual_seed(0)
    v = tree.map(lambda x: torch.randn(x.shape, generator=draw, dtype=x.dtype), lm.params)
    grads, h = query(lm.params)[1], 1e-5
    slope = sum(torch.sum(grads[name][0] * v[name]) for name in v)
    up, down = (query({n: x + sign * h * v[n] for n, x in lm.params.items()})[0] for sign in (1, -1))
    measured = (up - down) / (2 * h)
    assert check.relative_error(slope, measured[0]) < 1e-6
    assert check.relative_error(1.001 * slope, measured[0]) > 1e-6


@pytest.mark.parametrize("form", ["letter", "cloze"])
def test_padding_and_batch_size_change_nothing(models: dict[str, CausalLM], form: str) -> None:
    lm, questions = models["gpt-neox"], asked(form)
    assert len(set(questions.lengths.tolist())) > 3, "rows of one length are not padded"
    alone = score_questions(lm, lm.params, questions, 1)
    for batch_size in (3, 100):
        scored = score_questions(lm, lm.params, questions, batch_size)
        torch.testing.assert_close(scored.logprobs, alone.logprobs, rtol=0, atol=1e-12)
        assert torch.equal(scored.chosen, alone.chosen)
    for loss in LOSSES:
        losses = torch.stack([values(lm, questions, loss, batch_size=size) for size in (1, 3, 100)])
        torch.testing.assert_close(losses, losses[:1].expand(3, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["letter", "cloze"])
def test_every_question_is_a_target_the_longest_too(models: dict[str, CausalLM], form: str) -> None:
    questions, lm = asked(form), models["llama-tied"]
    for reduction in ("mean", "none"):
        columns = choice_columns(questions, reduction, batch_size=4, dtype=torch.float64)
        seen = torch.cat([batch.index for column in columns for batch in column])
        assert sorted(seen.tolist()) == list(range(len(ROWS)))
        assert sum(float(batch.scale.sum()) for column in columns for batch in column) == pytest.approx(
            1 if reduction == "mean" else len(ROWS)
        )
    # the longest question of the first batch fills it to the brim; its weight still moves the sum by its own loss
    batch = choice_columns(questions, batch_size=4, dtype=torch.float64)[0][0]
    longest = int(questions.lengths.argmax())
    assert int(batch.index[0]) == longest
    assert int(questions.lengths[longest]) == batch.inputs["input_ids"].shape[-1]
    ones = torch.ones(len(ROWS), dtype=torch.float64)
    objective = choice_objective(lm, "full")
    without = ones.index_fill(0, torch.tensor([longest]), 0.0)
    with torch.no_grad():
        change = [objective(lm.params, batch.inputs, coefficients(batch, w)) for w in (ones, without)]
    expected = values(lm, questions, "full", reduction="none")[longest] / len(ROWS)
    torch.testing.assert_close(change[0] - change[1], expected, rtol=1e-10, atol=1e-12)


def test_left_truncation_is_counted_and_keeps_the_answer() -> None:
    for form in ("letter", "cloze"):
        whole, limit = asked(form), 40
        cut = asked(form, max_length=limit)
        assert whole.cut == 0
        assert cut.cut == int((whole.lengths > limit).sum())
        assert 0 < cut.cut < len(ROWS)
        assert int(cut.lengths.max()) == limit
        for q in range(len(ROWS)):
            assert all(np.array_equal(a, b) for a, b in zip(cut.targets[q], whole.targets[q], strict=True))
            for short, long in zip(cut.rows[q], whole.rows[q], strict=True):
                assert np.array_equal(short, long[-limit:])
    assert cut.digest() != whole.digest() == asked("cloze").digest()


def test_context_and_answer_are_tokenised_together() -> None:
    """Trailing space of the prompt belongs to the answer, and a row ends before the answer's last token."""
    rows = quiz.questions(1)
    spaced = asked("cloze", rows, template="Q: {question} A: ")
    text = f"Q: {rows[0]['question'].strip()} A:"
    start = TOKENIZER.encode(text)
    for choice, row, target in zip(rows[0]["choices"], spaced.rows[0], spaced.targets[0]):
        ids = TOKENIZER.encode(f"{text}  {choice}")
        assert [*start, *target.tolist()] == ids
        assert row.tolist() == ids[:-1]
    bos = quiz.tokenizer(bos=True)
    marked = build_questions(quiz.dataset(rows), bos, template="<bos>{question}\n{choices}\nAnswer:")
    assert marked.rows[0][0][:2].tolist().count(bos.bos_token_id) == 1


def test_scores(models: dict[str, CausalLM]) -> None:
    lm = models["llama-tied"]
    rows = quiz.questions(40, seed=3)
    for form in ("letter", "cloze"):
        scored = score_questions(lm, lm.params, asked(form, rows), 16)
        twin = torch.stack(naive_logprobs(lm, form, rows))
        torch.testing.assert_close(scored.logprobs, twin, rtol=0, atol=1e-12)
        gold = torch.tensor([row["answer"] for row in rows])
        assert torch.equal(scored.chosen, twin.argmax(1))
        assert len(set(scored.chosen.tolist())) > 2
        assert scored.accuracy == float((twin.argmax(1) == gold).double().mean())
        lengths = torch.tensor([[len(choice) for choice in row["choices"]] for row in rows])
        if form == "cloze":
            assert scored.mass is None
            assert torch.equal(scored.chosen_norm, (twin / lengths).argmax(1))
            assert not torch.equal(scored.chosen_norm, scored.chosen)
        else:
            torch.testing.assert_close(scored.mass, twin.exp().sum(1), rtol=1e-12, atol=0)
            assert scored.accuracy_norm == scored.accuracy
    assert len(set(scored.hashes)) == 40
    assert all(len(one) == 16 for one in scored.hashes)


def test_questions_with_fewer_options_have_no_such_option(models: dict[str, CausalLM]) -> None:
    for form in ("letter", "cloze"):
        scored = score_questions(models["cohere"], models["cohere"].params, asked(form))
        counts = torch.isfinite(scored.logprobs).sum(1)
        assert counts.tolist() == [len(row["choices"]) for row in ROWS]
        assert not scored.failed.any()
        assert (scored.chosen < counts).all()
        assert (scored.chosen_norm < counts).all()


def test_a_failed_question_is_missing_and_never_a_letter(models: dict[str, CausalLM]) -> None:
    lm, questions = models["gpt-neox"], asked("letter")
    used = [set(rows[0].tolist()) for rows in questions.rows]
    rare = next(token for token in sorted(set.union(*used)) if 0 < sum(token in ids for ids in used) < 5)
    hit = [q for q in range(len(ROWS)) if rare in used[q]]
    broken = {name: x.clone() for name, x in lm.params.items()}
    broken["gpt_neox.embed_in.weight"][rare] = torch.nan
    with pytest.raises(
        ValueError, match=rf"{len(hit)} of 10 questions have no finite log-probability, .* {hit[0]} first"
    ):
        score_questions(lm, broken, questions)
    scored, whole = score_questions(lm, broken, questions, failures="mark"), score_questions(lm, lm.params, questions)
    assert scored.failed.nonzero()[:, 0].tolist() == hit
    assert (scored.chosen == torch.where(scored.failed, -1, whole.chosen)).all()
    assert (scored.chosen_norm == scored.chosen).all()
    assert np.isnan(scored.accuracy)
    assert np.isnan(scored.accuracy_norm)
    one = Scored(torch.tensor([[torch.nan, 0.0], [-1.0, -2.0]]).double(), torch.ones(2, 2).double(),
                 torch.tensor([0, 0]), None, ["", ""])  # fmt: skip
    assert one.chosen.tolist() == [-1, 0]
    assert one.correct[1] == 1
    assert one.correct.isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match="failures is 'drop'"):
        score_questions(lm, lm.params, asked("letter"), failures="drop")


def test_dropout_is_off_and_the_mode_is_left_alone(models: dict[str, CausalLM]) -> None:
    lm = models["gpt-neox"]
    lm.module.train()
    lm.module.gpt_neox.layers[0].eval()
    first, second = (values(lm, asked("letter"), "full") for _ in range(2))
    assert torch.equal(first, second)
    assert lm.module.training
    assert not lm.module.gpt_neox.layers[0].training
    lm.module.eval()
    assert torch.equal(values(lm, asked("letter"), "full"), first)


def test_no_logits_of_the_whole_text(models: dict[str, CausalLM]) -> None:
    """With a plain head, the head sees one row per letter question and one per answer token, no more."""
    lm, seen = models["llama-tied"], []
    handle = lm.module.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    try:
        questions = asked("cloze")
        score_questions(lm, lm.params, questions, 100)
        score_questions(lm, lm.params, asked("letter"), 100)
    finally:
        handle.remove()
    answers = sum(len(target) for targets in questions.targets for target in targets)
    assert [tuple(shape) for shape in seen] == [(answers, 16), (len(ROWS), 16)]


def test_no_question_is_no_mean(models: dict[str, CausalLM]) -> None:
    some = asked("letter")
    none = replace(some, rows=[], targets=[], gold=some.gold[:0], widths=[], hashes=[], subjects=[])
    scored = score_questions(models["cohere"], models["cohere"].params, none)
    assert scored.logprobs.shape == (0, 1)
    assert np.isnan(scored.accuracy)
    with pytest.raises(ValueError, match="0 questions have no mean loss"):
        choice_columns(none)
    with pytest.raises(AssertionError, match="every question has one target"):
        replace(some, gold=some.gold[:-1])


def test_prompts_letter_for_letter() -> None:
    question, choices = " Which river runs north?\n", ["Nile", "Po ", "Elbe", "Ob"]
    body = "Which river runs north?\nA. Nile\nB. Po \nC. Elbe\nD. Ob\nAnswer:"
    intro = "The following are multiple choice questions (with answers) about {}.\n\n"
    expected = {
        "plain": body,
        "wmdp": intro.format("biology") + body,
        "wmdp_chem": intro.format("chemistry") + body,
        "wmdp_cyber": intro.format("cybersecurity") + body,
        "mmlu": intro.format("high school geography") + body,
        "legacy": "Question: Which river runs north?\nA) Nile\nB) Po \nC) Elbe\nD) Ob\nAnswer:",
        "plain_cloze": "Question: Which river runs north?\nAnswer:",
        "wmdp_cloze": "Complete the following biology questions with the correct answer.\n\n"
        "Question: Which river runs north?\nAnswer:",
    }
    assert set(expected) == set(TEMPLATES)
    for name, text in expected.items():
        found = render(TEMPLATES[name], question, choices, "high_school_geography")
        assert found.text == text
        lettered = (" A", " B", " C", " D")
        assert found.targets == (lettered if TEMPLATES[name].form == "letter" else (" Nile", " Po ", " Elbe", " Ob"))
    braces = render(Template("t", "letter", "{{q}} {question}\n{choices}"), "{question}?", ["{choices}", "}"])
    assert braces.text == "{q} {question}?\nA. {choices}\nB. }"
    assert find_template("{question}{choices}", "letter").name == "custom"


@pytest.mark.parametrize("answer,place", [(2, 2), ("C", 2), (" D ", 3), ("0", 0)])
def test_answers_by_place_or_letter(answer: Any, place: int) -> None:
    rows = [{**quiz.questions(1)[0], "answer": answer}]
    assert asked("letter", rows).gold.tolist() == [place]
    assert asked("letter", [*rows, *rows, *rows], limit=2).gold.tolist() == [place, place]


@pytest.mark.parametrize("change,message", [
    ({"answer": 4}, r"row 1: answer is 4, and there are 4 choices; .* from 0 to 3, or a letter from A to D"),
    ({"answer": -1}, r"row 1: answer is -1"),
    ({"answer": None}, r"row 1: answer is None"),
    ({"question": " "}, r"row 1: question is ' ', not a text"),
    ({"question": None}, r"row 1: question is 'None', not a text"),
    ({"choices": ["one"]}, r"row 1: 1 choices; a question needs 2 to 26"),
    ({"choices": ["x"] * 27}, r"row 1: 27 choices; a question needs 2 to 26"),
    ({"choices": None}, r"row 1: choices is NoneType 'None', not a list"),
    ({"choices": ["a", " ", "c", "d"]}, r"row 1: choice 1 is ' ', not a text"),
    ({"choices": ["a", None, "c", "d"]}, r"row 1: choice 1 is 'None', not a text"),
])  # fmt: skip
def test_bad_rows_are_refused(change: dict[str, Any], message: str) -> None:
    good = quiz.questions(1)[0]
    with pytest.raises(ValueError, match=message):
        asked("letter", [good, {**good, **change}])


@pytest.mark.parametrize("answer", ["E", "AB", "", "a", "4", "²"])
def test_bad_letters_are_refused(answer: str) -> None:
    with pytest.raises(ValueError, match=f"row 0: answer is {answer!r}, and there are 4 choices"):
        asked("letter", [{**quiz.questions(1)[0], "answer": answer}])


@pytest.mark.parametrize("options,message", [
    ({"template": "gpqa"}, r"no template 'gpqa'; there are plain, wmdp, .*or write one out"),
    ({"template": "wmdp_cloze"}, r"template 'wmdp_cloze' is of form cloze, and form letter is asked for"),
    ({"form": "essay"}, r"form 'essay' is unknown"),
    ({"form": "essay", "template": "wmdp"}, r"form 'essay' is unknown"),
    ({"template": "{question}"}, r"template 'custom', text has no \{choices\}"),
    ({"template": "{question} {choices} {answer}"}, r"unknown field \{answer\}; there are .*doubled"),
    ({"template": "{question} {choices} {"}, r"template 'custom', text .*braces are doubled"),
    ({"template": "{question!r} {choices}"}, r"\{question\} is filled in as it stands"),
    ({"template": "{question} {choices:>9}"}, r"\{choices\} is filled in as it stands"),
    ({"template": "{question}\n{choices}\nAnswer: "}, r"letter 'A' is 2 tokens \['Ġ', 'ĠA'\]"),
    ({"max_length": 0}, r"max_length is 0; it has to be at least 1"),
    ({"limit": 0}, r"limit is 0; it has to be at least 1"),
    ({"vocab_size": 100}, r"row 0 has token id \d+, outside the vocabulary of 100"),
    ({"form": "cloze", "max_length": 2}, r"row 0: an answer of \d+ tokens does not fit into max_length 2"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(**{"form": "letter", **options})


def test_bad_data_sets_and_tokenizers_are_refused() -> None:
    rows = quiz.questions(2)
    with pytest.raises(ValueError, match=r"no column 'choices'; the data set has question, answer, subject"):
        build_questions(quiz.dataset(rows).remove_columns("choices"), TOKENIZER)
    with pytest.raises(ValueError, match="the data set has no question"):
        build_questions(quiz.dataset(rows).select([]), TOKENIZER)
    with pytest.raises(ValueError, match=r"row 0: template 'mmlu' names the subject and this question has none"):
        build_questions(quiz.dataset(rows).remove_columns("subject"), TOKENIZER, template="mmlu")
    with pytest.raises(ValueError, match=r"row 0: letter 'C' is 2 tokens \['Ġ', 'C'\] after the prompt and has to be"):
        build_questions(quiz.dataset(rows), quiz.tokenizer("AB"))
    with pytest.raises(ValueError, match=r"row 0: subject is 3, not a text"):
        asked("letter", [{**rows[0], "subject": 3}], template="mmlu")
    with pytest.raises(ValueError, match=r"row 0: choices is str .*not a list of texts"):
        asked("letter", [{**rows[0], "choices": "a, b"}])
    with pytest.raises(ValueError, match="template 't' has form 'essay'"):
        Template("t", "essay", "{question}")
    with pytest.raises(ValueError, match="27 options and 26 letters"):
        render(TEMPLATES["plain"], "?", ["x"] * 27)


def test_the_automatic_template_names_the_subject_where_every_question_has_one() -> None:
    rows = quiz.questions(3)
    assert asked("letter", rows, template="auto").template is TEMPLATES["mmlu"]
    assert asked("cloze", rows, template="auto").template is TEMPLATES["plain_cloze"]
    bare = [rows[0], {**rows[1], "subject": None}, {**rows[2], "subject": " "}]
    assert asked("letter", bare, template="auto").template is TEMPLATES["plain"]
    assert asked("letter", bare, template="auto", limit=1).template is TEMPLATES["mmlu"]
    nameless = build_questions(quiz.dataset(rows).remove_columns("subject"), TOKENIZER, template="auto")
    assert nameless.template is TEMPLATES["plain"]


def test_bad_queries_are_refused(models: dict[str, CausalLM]) -> None:
    with pytest.raises(ValueError, match="unknown choice loss 'margin'"):
        choice_objective(models["cohere"], "margin")
    with pytest.raises(ValueError, match="unknown query reduction 'sum'"):
        choice_columns(asked("letter"), "sum")
    with pytest.raises(ValueError, match="batch_size is 0"):
        choice_columns(asked("letter"), batch_size=0)


def test_a_model_of_a_local_folder_scores_in_float32(tmp_path: Path) -> None:
    lm = load_causal_lm(str(quiz.save(tmp_path)))
    exact = load_causal_lm(str(tmp_path), dtype="float64")
    for form in ("letter", "cloze"):
        a, b = (score_questions(x, x.params, asked(form)) for x in (lm, exact))
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)
