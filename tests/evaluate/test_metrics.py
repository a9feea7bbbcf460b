"""Metrics of unlearning: the published definitions on numbers made by hand, and models whose values are known."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import arms
import numpy as np
import pytest
import quiz
import tiny
import torch
from breaking import changed, noise
from rich.console import Console
from scipy.stats import ks_2samp, mannwhitneyu

from retrograd.cli import main
from retrograd.data.rows import build_rows, pad
from retrograd.evaluate.answers import read_measured
from retrograd.evaluate.depth import LEAST, depths, patched
from retrograd.evaluate.divergence import divergence
from retrograd.evaluate.evaluate import evaluate
from retrograd.evaluate.memory import Memory, by_heart, extraction, largest
from retrograd.evaluate.metrics import METRICS, Given, Sampled, auc, check_column, estimated, metrics_of, truth_ratios
from retrograd.evaluate.on_the_way import prepare_on_the_way
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.aliases import renamed
from retrograd.query.choices import Scored, build_questions
from retrograd.query.prepare import Answers
from retrograd.settings.commands import EvaluateConfig, LabConfig
from retrograd.settings.on_the_way import OnTheWayConfig
from retrograd.settings.tasks import Task, check_tasks, tasks_of

DOCS = Path(__file__).parents[2] / "docs/metrics.md"


def answers(logprobs: list[list[float]], tokens: list[list[int]], gold: list[int], failed: bool = False) -> Answers:
    scores = torch.tensor(logprobs, dtype=torch.float64)
    if failed:
        scores[0, 0] = torch.nan
    hashes = [str(n) for n in range(len(gold))]
    scored = Scored(scores, torch.ones_like(scores), torch.tensor(gold), None, hashes, torch.tensor(tokens))
    return Answers(scored, [None] * len(gold))


# ---------------------------------------------------------------- by hand


def test_the_truth_ratio_is_that_of_tofu() -> None:
    # right: p = 0.25 of two tokens, √ = 0.5; wrong: 0.1 of one token and 0.027 of three, ∛ = 0.3
    found = truth_ratios(answers([[math.log(0.1), math.log(0.25), math.log(0.027)]], [[1, 2, 3]], [1]))
    assert found == pytest.approx([(0.1 + 0.3) / 2 / 0.5])


@pytest.mark.parametrize(("role", "expected"), [("forget", (0.4 + 1 / 2.5) / 2), ("retain", (0.6 + 0) / 2)])
def test_truth_ratios_are_aggregated_as_their_side_wants(role: Any, expected: float) -> None:
    one = [[math.log(0.5), math.log(0.2)], [math.log(0.2), math.log(0.5)]]
    results = {"q": answers(one, [[1, 1], [1, 1]], [0, 0])}  # R is 0.4 and 2.5
    found = metrics_of(Given("q", {"q": Task("x", form="cloze", role=role)}, results, None))
    assert found["truth_ratio"]["value"] == pytest.approx(expected)


def test_forget_quality_is_scipys_test() -> None:
    draw = np.random.default_rng(0)
    x, y = (draw.normal(shift, 1.0, 40) for shift in (0.0, 0.8))
    ones = [[1, 1]] * 40
    results = [{"q": answers([[0.0, v] for v in values], ones, [0] * 40)} for values in (x, y)]
    tasks = {"q": Task("x", form="cloze", role="forget")}
    found = metrics_of(Given("q", tasks, results[0], results[1]))
    expected = ks_2samp(np.exp(x), np.exp(y))
    assert found["ks"]["value"] == pytest.approx(expected.statistic)
    assert found["forget_quality"]["value"] == pytest.approx(expected.pvalue)
    low, high = found["forget_quality"]["interval"]
    assert low < expected.pvalue < high
    assert found["ks"]["interval"][0] == pytest.approx(max(0, expected.statistic - 2 * math.sqrt(math.log(80) / 80)))
    assert metrics_of(Given("q", tasks, results[0], results[0]))["forget_quality"]["value"] == 1.0


def test_the_auc_is_that_of_mann_and_whitney() -> None:
    draw = np.random.default_rng(1)
    members, others = draw.integers(0, 6, 30), draw.integers(0, 5, 20)
    assert auc(members, others) == pytest.approx(mannwhitneyu(members, others).statistic / 600)


def memory(nats: list[float], min_k: list[float], size: int = 10) -> Memory:
    n = len(nats)
    return Memory(nats, [4] * n, [0.0] * n, [0.0] * n, min_k, min_k, [size * (k + 1) for k in range(n)], list(range(n)))


def test_membership_is_guessed_from_losses_as_published() -> None:
    tasks = {"in": Task("x", form="memory", against="out"), "out": Task("x", form="memory")}
    model = {"in": memory([1.0, 2.0], [1.0, 4.0]), "out": memory([1.5, 3.0], [3.0, 5.0])}
    never = {"in": memory([2.0, 2.0], [2.0, 2.0]), "out": memory([2.0, 2.5], [2.0, 1.0])}
    found = {name: one["value"] for name, one in metrics_of(Given("in", tasks, model, never)).items()}
    assert found["mia_loss"] == 3 / 4  # 1 below 1.5 and 3, 2 below 3 alone
    assert found["mia_zlib"] == 1.0  # 1/10 and 2/20 nats a byte, against 1.5/10 and 3/20
    assert found["mia_min_k"] == 3 / 4
    assert found["mia_reference"] == 3 / 4  # 1 and 0 above the other model, against 0.5 and −0.5
    assert found["privleak"] == pytest.approx((1 / 4 - 3 / 4) / (3 / 4))  # of the one that never knew the AUC is 1/4


def test_extraction_strength_is_the_share_that_need_not_be_given() -> None:
    assert extraction(torch.tensor([True, True])) == 1.0
    assert extraction(torch.tensor([True, False])) == 0.0
    assert extraction(torch.tensor([False, True, True, True])) == 0.75
    assert largest(torch.arange(10.0)) == 8.5


def test_depth_is_clipped_and_counts_layers_that_lack_the_answer() -> None:
    never = [[LEAST / 2, 1.0, 3.0], [0.0, 0.0, 0.0]]
    assert depths([[9.0, 2.0, 1.5], [1.0, 1.0, 1.0]], never)[0] == pytest.approx((1 + 1.5) / 4)
    assert np.isnan(depths([[9.0, 2.0, 1.5], [1.0, 1.0, 1.0]], never)[1])
    assert depths([[0.0, -1.0, 0.0]], never[:1]).tolist() == [0.0]
    assert depths(never[:1], never[:1]).tolist() == [1.0]


def test_the_interval_of_a_mean_is_that_of_drawing_items() -> None:
    values = np.random.default_rng(2).random(80)
    found = estimated([Sampled((80,), lambda i: float(values[i].mean()))])
    assert not isinstance(found, str)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(80)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.01)


def test_several_models_are_drawn_too() -> None:
    far = [Sampled((50,), lambda i, v=value: v + 0.0 * len(i)) for value in (0.0, 1.0)]
    found = estimated(far)
    assert not isinstance(found, str)
    assert found == (0.5, 0.0, 1.0)
    assert estimated([Sampled((3,), lambda i: math.nan)]) == "it is no number for these answers"


# ---------------------------------------------------------------- against a naive reading


def test_what_is_known_by_heart_is_what_the_logits_say(tmp_path: Path) -> None:
    model = quiz.save(tmp_path / "m", positions=64)
    lm, tokenizer = load_causal_lm(str(model), dtype="float64"), load_tokenizer(str(model))
    rows = build_rows(quiz.dataset([{"text": text} for text in tiny.sentences(3, 4)]), tokenizer)
    found = by_heart(lm, lm.params, rows, tokenizer)
    for n, ids in enumerate(rows.input_ids):
        with torch.no_grad():
            logp = lm.module(torch.tensor(ids)[None]).logits[0, :-1].log_softmax(-1)
        target = torch.tensor(ids[1:])
        loss = -logp.gather(1, target[:, None])[:, 0]
        hit = logp.argmax(-1) == target
        suffixes = [k for k in range(len(hit)) if hit[k:].all()]
        assert found.nats[n] == pytest.approx(float(loss.mean()), rel=1e-9)
        assert found.right[n] == pytest.approx(float(hit.double().mean()))
        assert found.extraction[n] == pytest.approx(1 - min(suffixes, default=len(hit)) / len(hit))
        assert found.bytes[n] == len(zlib.compress(tokenizer.decode(ids).encode()))
        mean = (logp.exp() * logp).sum(-1)
        spread = (logp.exp() * (logp - mean[:, None]).square()).sum(-1).sqrt()
        z = ((-loss - mean) / spread).sort().values
        assert found.min_k_plus[n] == pytest.approx(-float(z[: max(1, len(z) // 5)].mean()), rel=1e-6)
        assert pad(rows, [n])["lengths"].item() == len(ids)


def test_patching_puts_states_where_the_answer_is_predicted(tmp_path: Path) -> None:
    base = quiz.save(tmp_path / "base", positions=128)
    other = changed(base, "other", lambda weights: noise(weights, 0.3))
    lm, knows = (load_causal_lm(str(folder), dtype="float64") for folder in (other, base))
    asked = build_questions(quiz.dataset(quiz.questions(3, 5)), load_tokenizer(str(base)), form="cloze")
    found = patched(lm, knows, asked)
    assert np.abs(patched(knows, knows, asked).lost).max() == 0.0
    for q in range(3):
        ids, answer = (torch.tensor(part[q][asked.gold[q]])[None] for part in (asked.rows, asked.targets))
        first = ids.shape[1] - answer.shape[1]
        with torch.no_grad():
            own = lm.module(ids, output_hidden_states=True).hidden_states
            state = knows.module(ids, output_hidden_states=True).hidden_states[1].clone()
            state[:, first:] = own[1][:, first:]
            mask, rotary = None, knows.module.gpt_neox.rotary_emb(state, torch.arange(ids.shape[1])[None])
            body = knows.module.gpt_neox
            last = body.layers[1](state, attention_mask=mask, position_embeddings=rotary)
            last = last if isinstance(last, torch.Tensor) else last[0]
            logp = knows.module.get_output_embeddings()(body.final_layer_norm(last))[0, first:].log_softmax(-1)
            whole = knows.module(ids).logits[0, first:].log_softmax(-1)
        expected = (whole - logp).gather(1, answer.T).mean()
        assert found.lost[q][0] == pytest.approx(float(expected), abs=1e-9)
    assert len(found.lost[0]) == 2


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its questions, one that does not, and the model half way between."""
    folder = arms.save_world(tmp_path_factory.mktemp("metrics"))
    shutil.copytree(folder / "base", folder / "copy")
    half(folder / "base", folder / "never", folder / "half")
    (folder / "names.json").write_text(json.dumps({word: word for word in tiny.WORDS}))
    (folder / "tasks.yaml").write_text(
        f"""
plain: {{dataset: {folder}/q_go.jsonl, form: cloze, role: forget}}
same: {{dataset: {folder}/q_go.jsonl, form: cloze, role: forget, probe_of: plain, alias: {folder}/names.json}}
stay: {{dataset: {folder}/q_stay.jsonl, form: cloze, role: retain}}
seen: {{dataset: {folder}/forget.jsonl, form: memory, role: forget, against: unseen}}
unseen: {{dataset: {folder}/retain.jsonl, form: memory}}
kept: {{dataset: {folder}/report.jsonl, form: kl}}
deep: {{dataset: {folder}/q_go.jsonl, form: depth, role: forget}}
"""
    )
    return folder


def half(one: Path, other: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(one, folder)
    a, b = (load_file(part / "model.safetensors") for part in (one, other))
    save_file({name: (a[name] + b[name]) / 2 for name in a}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def told(world: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Metrics by model, task and name."""
    assert run(world, world / "out", "base") == 0
    return metrics_in(world / "out")


def run(world: Path, out: Path, knows: str | None = None, *, names: str = "base copy half never", **more: Any) -> int:
    models = tuple(str(world / name) for name in names.split())
    between = {"knows": str(world / knows), "never": str(world / "never")} if knows else {}
    config = EvaluateConfig(models, out, tasks=str(world / "tasks.yaml"), **between, **more)
    return evaluate(config, Console(quiet=True))


def metrics_in(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    summary = json.loads((out / "summary.json").read_text())
    return {
        (entry["model"], entry["task"], name): one
        for entry in summary["results"]
        for name, one in entry["of_unlearning"].items()
    }


def test_the_model_that_knows_its_copy_and_the_one_that_never_did_have_known_values(told: dict) -> None:
    for name in ("base", "copy"):
        assert told[name, "kept", "kl"]["value"] == 0.0
        assert told[name, "deep", "depth"]["value"] == 0.0
        assert told[name, "same", "probe"] == {"value": 0.0, "interval": [0.0, 0.0], "better": "neither"}
    assert told["never", "deep", "depth"] == {"value": 1.0, "interval": [1.0, 1.0], "better": "higher"}
    assert told["never", "plain", "forget_quality"]["value"] == 1.0
    assert told["never", "plain", "ks"]["value"] == 0.0
    assert told["never", "seen", "privleak"]["value"] == 0.0
    assert told["never", "seen", "mia_reference"]["value"] == 0.5
    assert told["copy", "plain", "ks"] == told["base", "plain", "ks"]


def test_half_of_the_way_lies_between(told: dict) -> None:
    for task, name in (("kept", "kl"), ("deep", "depth")):
        ends = [told[model, task, name]["value"] for model in ("base", "half", "never")]
        assert ends[0] < ends[1] < ends[2]


def test_every_metric_has_an_interval_around_its_value(told: dict) -> None:
    assert {name for _, _, name in told} == {metric.name for metric in METRICS}
    for one in told.values():
        low, high = one["interval"]
        assert low - 1e-12 <= one["value"] <= high + 1e-12


def test_files_hold_what_was_measured(world: Path, told: dict) -> None:
    kinds = {name: type(read_measured(world / f"out/half/{name}.parquet")[0]).__name__
             for name in ("plain", "seen", "kept", "deep")}  # fmt: skip
    assert kinds == {"plain": "Answers", "seen": "Memory", "kept": "Divergence", "deep": "Patched"}
    memory, _ = read_measured(world / "out/half/seen.parquet")
    assert told["half", "seen", "exact_memorisation"]["value"] == pytest.approx(np.mean(memory.right))


def test_what_has_no_inputs_is_missing_with_its_reason(world: Path, tmp_path: Path) -> None:
    assert run(world, tmp_path / "out", names="base half") == 1  # depth cannot be asked
    told = metrics_in(tmp_path / "out")
    for task, name in (("plain", "ks"), ("plain", "forget_quality"), ("seen", "privleak"), ("seen", "mia_reference"),
                       ("deep", "depth")):  # fmt: skip
        assert told["half", task, name]["value"] is None
        assert "no model that never knew (--never)" in told["half", task, name]["missing"]
    assert "give --knows" in (tmp_path / "out/half/deep.failed.txt").read_text()
    assert told["half", "kept", "kl"]["value"] > 0
    failed = answers([[0.0, -1.0]], [[1, 1]], [0], failed=True)
    tasks = {"q": Task("x", form="cloze"), "m": Task("x", form="memory")}
    assert "failed questions" in metrics_of(Given("q", tasks, {"q": failed}, None))["truth_ratio"]["missing"]
    assert metrics_of(Given("m", tasks, {}, None))["extraction_strength"]["missing"] == "m is missing"


def test_another_model_to_compare_with_is_another_evaluation(world: Path, told: dict) -> None:
    with pytest.raises(ValueError, match=r"kept\.reference: .*base.* → .*half"):
        run(world, world / "out", "base", reference=str(world / "half"))


def test_the_table_and_the_page_show_them(world: Path, told: dict, tmp_path: Path, capsys: Any) -> None:
    console = Console(width=200)
    config = EvaluateConfig((str(world / "half"),), world / "out", tasks=str(world / "tasks.yaml"),
                            knows=str(world / "base"), never=str(world / "never"), reference=str(world / "base"))  # fmt: skip
    evaluate(config, console)
    shown = capsys.readouterr().out
    assert "Metrics of unlearning" in shown
    assert "extraction_strength" in shown
    assert main(["report", str(world / "out"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Metrics of unlearning" in page
    assert "mia_min_k_plus" in page


def test_an_experiment_has_them_as_columns(world: Path, tmp_path: Path) -> None:
    asked = arms.asked("report")
    asked["tasks"]["deep"] = {"dataset": "${world}/q_go.jsonl", "form": "depth", "role": "forget"}
    asked["tasks"]["seen"] = {"dataset": "${world}/forget.jsonl", "form": "memory", "role": "forget"}
    file = arms.write(
        world / "columns.yaml", report=asked, weightings={"uniform": {}}, scores={},
        columns=["forget_quality:forget", "depth:deep", "extraction_strength:seen"],
    )  # fmt: skip
    assert main(["experiment", str(file), str(tmp_path / "out"), "--names", f"world={world}"]) == 0
    lines = (tmp_path / "out/results.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith(("| b", "| ne", "| np"))]
    place = head.split("|").index(" depth deep ")
    assert cells[0][place] == "0.000 [0.000, 0.000]"
    assert cells[1][place] == "1.000 [1.000, 1.000]"
    assert cells[1][place - 1].startswith("1.000 [")
    assert "[" in cells[2][place]
    page = (tmp_path / "out/report.html").read_text()
    assert '<th scope="col" class="n">depth deep</th>' in page


# ---------------------------------------------------------------- refusals and docs


def test_tasks_that_cannot_work_are_refused() -> None:
    for tasks, match in (
        ({"a": Task("x", form="memory", against="b")}, "against is 'b', which is no other task of form memory; there"),
        ({"a": Task("x", form="cloze", probe_of="b"), "b": Task("x")}, "there are none"),
        ({"a": Task("x", form="kl", against="a")}, "form kl has no use for against"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            check_tasks(tasks, "here")
    with pytest.raises(ValueError, match="there is no metric 'deep'"):
        check_column("deep:x", {})
    with pytest.raises(ValueError, match="with a task that it is a metric of: m"):
        check_column("exact_memorisation:q", {"m": Task("x", form="memory"), "q": Task("x", form="cloze")})


def test_flags_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--metrics asks what a lab has"):
        run(world, tmp_path, metrics=True)
    lm, tokens = load_causal_lm(str(world / "base")), load_tokenizer(str(world / "base"))
    with pytest.raises(ValueError, match="'seen' of form memory is not asked on the way"):
        prepare_on_the_way(OnTheWayConfig(tasks=world / "tasks.yaml", every=1), lm, tokens)
    with pytest.raises(ValueError, match="this package's own"):
        evaluate(EvaluateConfig(("x",), tmp_path / "y", tasks="mmlu", backend="lm-eval", metrics=True))


def test_other_names_are_whole_words_and_none_is_left_out(world: Path, tmp_path: Path) -> None:
    assert renamed("Anna and Ann", {"Ann": "B", "Anna": "C"}) == "C and B"
    (tmp_path / "a.json").write_text('{"nowhere": "elsewhere"}')
    (tmp_path / "b.json").write_text("[]")
    lm, tokens = load_causal_lm(str(world / "base")), load_tokenizer(str(world / "base"))
    from retrograd.query.prepare import prepare

    for name, match in (("a", "8 of 8 questions have no name"), ("b", "texts both"), ("c", "cannot be read as JSON")):
        task = Task(str(world / "q_go.jsonl"), form="cloze", alias=str(tmp_path / f"{name}.json"))
        with pytest.raises(ValueError, match=match):
            prepare(task, lm, tokens, 4)


def test_models_of_other_depths_or_widths_cannot_be_patched(tmp_path: Path) -> None:
    base = quiz.save(tmp_path / "base", positions=128)
    lm, asked = load_causal_lm(str(base)), build_questions(
        quiz.dataset(quiz.questions(1, 5)), load_tokenizer(str(base)), form="cloze"
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    for change, match in (({"num_hidden_layers": 1}, "has 2 blocks and the one that knows 1"),
                          ({"hidden_size": 8}, "two models of one architecture")):  # fmt: skip
        config = lm.module.config.__class__(**{**lm.module.config.to_dict(), **change})
        other = tmp_path / next(iter(change))
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
        with pytest.raises(ValueError, match=match):
            patched(lm, load_causal_lm(str(other)), asked)
    wider = lm.module.config.__class__(**{**lm.module.config.to_dict(), "vocab_size": lm.module.config.vocab_size + 8})
    AutoModelForCausalLM.from_config(wider).save_pretrained(tmp_path / "wider")
    rows = build_rows(quiz.dataset([{"text": text} for text in tiny.sentences(2, 4)]), load_tokenizer(str(base)))
    other = load_causal_lm(str(tmp_path / "wider"))
    with pytest.raises(ValueError, match="a divergence needs two models of one vocabulary"):
        divergence(lm, other, rows)
    rows.input_ids[0][:] = lm.module.config.vocab_size  # which the first model has no token for
    with pytest.raises(ValueError, match="a divergence needs two models of one vocabulary"):
        divergence(other, lm, rows)
    with pytest.raises(ValueError, match="depth asks both the same tokens"):
        patched(other, lm, asked)


def test_every_metric_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf8")
    assert [name for name in (metric.name for metric in METRICS) if f"`{name}`" not in text] == []


def test_tasks_of_a_file_keep_their_pairs(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text("{}")
    values = {"a": {"dataset": "x", "form": "letter"},
              "b": {"dataset": "x", "form": "letter", "probe_of": "a", "alias": "names.json"}}  # fmt: skip
    assert tasks_of(values, tmp_path, "here")["b"].alias == str(tmp_path / "names.json")


@pytest.mark.slow
def test_on_a_lab_the_models_whose_knowledge_is_known_are_told_apart(tmp_path: Path) -> None:
    from retrograd.lab.build import lab

    folder, quiet = tmp_path / "lab", Console(quiet=True)
    lab(LabConfig(folder, facts=48, width=64, layers=2, epochs=16, batch_size=16, workers=1), quiet)
    half(folder / "models/base", folder / "models/filtered", tmp_path / "half")
    models = (str(tmp_path / "half"), str(folder / "models/random"))
    assert evaluate(EvaluateConfig(models, tmp_path / "out", lab=folder, metrics=True), quiet) == 0
    told = metrics_in(tmp_path / "out")

    def value(model: str, task: str, name: str) -> float:
        return told[model, task, name]["value"]

    paraphrase = "forget_paraphrase_cloze"
    assert value("base", paraphrase, "forget_quality") < 0.01 < value("filtered", paraphrase, "forget_quality") == 1.0
    assert value("base", "memory_forget", "mia_min_k") > 0.9
    assert abs(value("filtered", "memory_forget", "mia_min_k") - 0.5) < 0.15
    assert value("base", "memory_forget", "extraction_strength") > value(
        "filtered", "memory_forget", "extraction_strength"
    )
    assert value("random", "memory_forget", "exact_memorisation") < 0.05
    assert value("base", "memory_forget", "privleak") < -0.5
    assert value("base", "depth_forget", "depth") == 0.0
    assert value("filtered", "depth_forget", "depth") == 1.0
    assert 0.0 < value("half", "depth_forget", "depth") <= 1.0
    assert (
        value("base", "kl_retain", "kl") == 0.0 < value("half", "kl_retain", "kl") < value("random", "kl_retain", "kl")
    )
