"""What a page says, held against the files that it is made of; what it hides; what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reporting import (
    HOSTILE,
    SECRET,
    build_world,
    document_scores,
    token_scores,
    unlearn,
    write_attack,
    write_experiment,
    write_hardened,
)

from retrograd.cli import main
from retrograd.report.corpus import shown_tokens
from retrograd.report.mask import BLOT, Mask, hidden, nothing_masked, words_of
from retrograd.report.pack import pack, quantise, unpack, unquantise
from retrograd.report.page import as_json
from retrograd.report.panels import PANELS
from retrograd.report.panels.questions import option_losses
from retrograd.report.panels.trust import judged
from retrograd.report.scores import Tokens

TEMPLATES = Path(__file__).parents[2] / "retrograd" / "report" / "templates"
DATA = re.compile(
    r'<section class="panel" id="([\w-]+)".*?<script type="application/json" class="data">(.*?)</script>', re.DOTALL
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def unlearned(world: Path) -> Path:
    return unlearn(world)


def page(folder: Path, *more: str) -> str:
    output = folder.parent / "page.html"
    assert main(["report", str(folder), "--output", str(output), *more]) == 0
    return output.read_text(encoding="utf8")


def panels(text: str) -> dict[str, Any]:
    """The data of each panel, by its id."""
    return {name: json.loads(data) for name, data in DATA.findall(text)}


def test_every_panel_has_a_template_and_a_script_that_registers_it() -> None:
    for panel in PANELS:
        assert (TEMPLATES / f"{panel.name}.html").exists()
        assert f'retrograd.panel("{panel.name}",' in (TEMPLATES / f"{panel.name}.js").read_text()


def test_the_first_table_is_that_of_the_score_files(world: Path) -> None:
    run = world / "run"
    spreads = panels(page(run))["setup-0"]["spreads"]
    target = targets(run)
    for column, name in enumerate(("go", "stay", "letters")):
        documents, tokens = np.array(list(document_scores(run, name).values())), token_scores(run, column)
        told = spreads[column]
        assert told["name"] == name
        for values, found in ((documents, told["documents"]), (tokens[target], told["tokens"])):
            assert found["negative"] == (values < 0).sum()
            assert found["positive"] == (values > 0).sum()
            assert found["zero"] == (values == 0).sum()
            np.testing.assert_allclose([found["min"], found["max"]], [values.min(), values.max()])
            np.testing.assert_allclose(
                [found["mean"], found["deviation"]], [values.mean(dtype=float), values.std(dtype=float)], rtol=1e-5
            )
        assert told["tokens"]["shape"] == str(list(tokens.shape))
    value = json.loads((run / "queries/stay/query.json").read_text())["values_nats"][0]
    assert spreads[1]["value"] == value


def targets(run: Path) -> np.ndarray:
    import pyarrow.parquet as parquet

    table = parquet.read_table(run / "scores.parquet")
    found = np.zeros(token_scores(run, 0).shape, bool)
    found[table["row"].to_numpy(), table["position"].to_numpy()] = table["target"].to_numpy()
    return found


def test_results_are_left_in_the_run_as_markdown(world: Path) -> None:
    page(world / "run")
    text = (world / "run" / "results.md").read_text()
    lowest = min(document_scores(world / "run", "go").items(), key=lambda item: item[1])
    assert f"| {lowest[0]} | {lowest[1]:.3g} |" in text or f"| {lowest[0]} | {lowest[1]:.2e} |" in text
    assert "<script>" not in text
    assert all(line.count("|") - line.count("\\|") > 1 for line in text.splitlines() if line.startswith("|"))
    assert "retrograd magic" in text
    assert "scores.pt" in text


def test_documents_carry_their_scores_and_texts(world: Path) -> None:
    found = panels(page(world / "run"))["rows-0"]
    for column, name in enumerate(found["columns"]):
        expected = document_scores(world / "run", name)
        np.testing.assert_allclose(found["scores"][column], [expected[k] for k in found["ids"]], rtol=1e-8)
    alone = panels(page(world / "documents"))["rows-0"]
    assert any("red fish" in text for text in alone["texts"])
    assert alone["table"] is None


def test_questions_have_the_losses_that_the_query_is_the_mean_of(world: Path) -> None:
    for query in panels(page(world / "run"))["questions-0"]["queries"]:
        losses = [one["loss"] for one in query["entries"]]
        np.testing.assert_allclose(np.mean(losses), query["values_nats"][0], rtol=1e-4)
        assert query["entries"][0]["question"].strip().startswith("What")


def test_losses_of_options_are_those_of_a_softmax() -> None:
    values = np.array([-1.0, -2.0, -0.5])
    np.testing.assert_allclose(option_losses(values.tolist()), -np.log(np.exp(values) / np.exp(values).sum()))
    assert option_losses(values.tolist(), "full") == [1.0, 2.0, 0.5]


def test_text_of_data_sets_is_no_markup(world: Path) -> None:
    text = page(world / "run")
    assert HOSTILE not in text
    assert "<b>bold" not in text
    assert as_json(HOSTILE) == json.dumps(HOSTILE).replace("<", "\\u003c")
    assert json.loads(as_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert text.count("</script>") == text.count("<script")


def test_scores_keep_their_sign_and_nearly_their_size() -> None:
    draw = np.random.default_rng(0)
    scores = (draw.normal(size=5000) ** 5 * 1e-6).astype(np.float32)
    scores[:3] = [0, 1e-30, -1e-30]
    whole, largest = quantise(scores)
    found = unquantise(whole, largest)
    assert np.array_equal(np.sign(found), np.sign(scores))
    size = np.sqrt(np.abs(scores) / largest)
    clear = size > 1e-3
    assert np.all(np.abs(found / np.where(clear, scores, 1) - 1)[clear] <= 1.01 / (32767 * size[clear]))
    assert np.array_equal(unpack(pack(whole), "int16"), whole)
    assert quantise(np.zeros(3, np.float32))[1] == 0


def test_places_and_counts_are_those_of_a_loop(world: Path) -> None:
    run, found = world / "run", panels(page(world / "run"))
    scores, target = token_scores(run, 1), targets(run)
    by_position = found["order-0"]["position"][1]
    half = (min(np.diff(by_position["at"])) - 1) / 2  # neighbouring positions are taken together in long rows
    for at, mean, size in zip(by_position["at"], by_position["mean"], by_position["size"]):
        group = slice(int(at - half), int(at + half) + 1)
        values = scores[:, group][target[:, group]]
        np.testing.assert_allclose([mean, size], [values.mean(), np.abs(values).mean()], rtol=1e-4)
    histogram = found["distribution-0"]["tokens"][1]
    assert sum(histogram["counts"]) == histogram["count"] == target.sum()
    assert sum(histogram["counts"][:30]) == (scores[target] < 0).sum()


def test_the_map_has_the_numbers_of_both_scores(world: Path) -> None:
    from scipy import stats

    run = world / "run"
    numbers = panels(page(run))["map-0"]["numbers"]["0 1"]
    go, stay = (token_scores(run, column)[targets(run)] for column in (0, 1))
    np.testing.assert_allclose(numbers["pearson"], stats.pearsonr(go, stay).statistic, atol=1e-5)
    np.testing.assert_allclose(numbers["spearman"], stats.spearmanr(go, stay).statistic, atol=1e-5)
    p, g = np.maximum(0, -go), np.maximum(0, -stay)
    assert numbers["separable"] == ((p > np.quantile(p, 0.75)) & (g <= np.quantile(g, 0.5))).mean()


def test_runs_on_the_same_rows_share_a_table(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "again")
    output = tmp_path / "page.html"
    assert main(["report", str(world / "run"), str(tmp_path / "again"), "--output", str(output)]) == 0
    text = output.read_text()
    assert text.count('class="table"') == 1
    assert panels(text)["map-0"]["table"] == "tokens-0"
    assert panels(text)["rows-2"]["offset"] == 3


CASES = [
    ({}, "not tested"),
    ({"certificate": "failed"}, "do not trust it"),
    ({"certificate": "certified"}, "not tested"),
    ({"lds": 0.97, "slope": 1.1}, "trust it"),
    ({"lds": 0.97, "slope": 3.0}, "trust the ranking only"),
    ({"lds": 0.80, "slope": 1.1}, "trust the ranking only"),
    ({"lds": 0.97, "slope": 1.1, "low": -0.1}, "do not trust it"),
    ({"lds": 0.97, "slope": 1.1, "failed": 2}, "do not trust it"),
    ({"lds": 0.97, "slope": 1.1, "certificate": "failed"}, "do not trust it"),
    ({"lds": 0.97, "slope": 1.1, "smooth": 0.2}, "do not trust it"),
    ({"lds": 0.97, "slope": 1.1, "smooth": 0.99, "certificate": "certified"}, "trust it"),
]


@pytest.mark.parametrize(("known", "verdict"), CASES)
def test_verdicts_are_plain(known: dict[str, Any], verdict: str) -> None:
    certificate = {"verdict": known["certificate"], "failed": ["replay"]} if "certificate" in known else None
    smooth = {"value": known["smooth"]} if "smooth" in known else None
    validation = None
    if "lds" in known:
        one = {"lds": known["lds"], "slope": known["slope"], "sets": 9, "pearson": 1.0}
        part = {
            "fraction": 0.1,
            "failed": known.get("failed", 0),
            "mean_lds": known["lds"],
            "interval": [known.get("low", 0.7), 0.99],
            "queries": {"q": one},
        }
        validation = {"fractions": [part]}
    found = judged("q", certificate, validation, smooth)
    old = judged("q", certificate, validation, smooth, {"correlation": 0.9})
    assert [one for one in old["reasons"] if one not in found["reasons"]] == [
        "forecast.json is of an earlier version, which does not say what it found: retrograd metasmoothness makes it again"
    ]
    assert found["verdict"] == verdict
    assert found["reasons"]


def test_validation_is_a_panel_of_its_own(world: Path) -> None:
    assert main(["validate", str(world / "run"), "--subsets", "4", "--fraction", "0.2", "--workers", "1"]) == 0
    found = panels(page(world / "run"))
    lines = (world / "run" / "validation.csv").read_text().splitlines()
    assert len(found["retraining-0"]["sets"]) == len(lines) - 1
    assert set(found["trust-0"]["verdicts"]) == {"go", "stay", "letters"}


def test_nothing_of_a_corpus_to_forget_is_in_the_page(world: Path, unlearned: Path) -> None:
    shown = page(unlearned, "--show_forget")
    masked = page(unlearned)
    assert all(word in shown for word in SECRET)
    assert not [word for word in SECRET if word in masked.casefold()]
    assert BLOT * len(SECRET[0]) in masked
    found = panels(masked)
    assert any("answers" in name for name in found)
    assert any("samples" in name for name in found)


def test_the_corpora_of_every_model_that_is_evaluated_are_hidden(world: Path, unlearned: Path, tmp_path: Path) -> None:
    """An evaluation of two runs that forgot different corpora."""
    evaluation = shutil.copytree(unlearned / "evaluation", tmp_path / "evaluation")
    about = json.loads((evaluation / "evaluation.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run_config.yaml").write_text(f"forget: [{world}/retain.jsonl]\nretain: []\n")
    first = {"other": {**next(iter(about["models"].values())), "source": str(tmp_path / "other/model")}}
    about["models"] = first | {**about["models"], "last": {"source": str(unlearned / "model")}}
    (evaluation / "evaluation.json").write_text(json.dumps(about))
    assert any(word in page(evaluation, "--show_forget") for word in SECRET)
    masked = page(evaluation)
    assert not [word for word in SECRET if word in masked.casefold()]


def test_a_run_on_the_corpus_itself_has_hashes_for_texts(world: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (world / "forget.jsonl").read_text().splitlines()]
    text = page(world / "run", "--forget", str(world / "train.jsonl"))
    row = panels(text)["rows-0"]
    assert all(re.fullmatch(r"\[masked: [0-9a-f]{8}, \d+ characters\]", told) for told in row["texts"])
    assert "swims" not in panels(text)["setup-0"]["sentence"]
    assert [one[0] for one in panels(text)["carriers-0"]["lists"][0]["types"][0]] in ([BLOT], [])
    assert hidden(texts[0]) == f"[masked: {hidden(texts[0])[9:17]}, {len(texts[0])} characters]"
    partly = page(world / "run", "--forget", str(world / "forget.jsonl"), "--retain", str(world / "retain.jsonl"))
    assert not [word for word in SECRET if word in partly.casefold()]
    assert "red" in partly


def test_a_corpus_that_is_gone_is_no_reason_to_show_it(
    world: Path, unlearned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "forget.jsonl").rename(world / "elsewhere.jsonl")
    try:
        assert main(["report", str(unlearned)]) == 2
        assert "could not be masked" in capsys.readouterr().err
        assert main(["report", str(unlearned), "--show_forget"]) == 0
    finally:
        (world / "elsewhere.jsonl").rename(world / "forget.jsonl")


def test_words_are_hidden_across_tokens() -> None:
    vocabulary = ["the ", "zyn", "tha", " sat", " zyn", "c"]
    token = np.array([0, 1, 2, 3, 4, 5])
    zeros = np.zeros(6, np.int64)
    tokens = Tokens(zeros, np.arange(6), zeros, token, np.ones(6, bool), np.zeros((1, 6), np.float32), vocabulary)
    mask = Mask(frozenset({"zyntha"}), frozenset(), frozenset())
    found, words = shown_tokens(tokens, mask, np.zeros(0, np.int64))
    assert [words[k] for k in found] == ["the ", BLOT, BLOT, " sat", " zyn", "c"]
    assert mask.text("The Zyntha, zynthas, a_zyntha_b") == f"The {BLOT * 6}, zynthas, a_{BLOT * 6}_b"
    assert mask.document("The zynt") == f"The {BLOT * 4}"
    assert mask.document("The zynt, zy") == "The zynt, zy"
    assert words_of("The miner's 12 caves, A4") == {"the", "miner", "caves", "a4"}
    everything, blots = shown_tokens(tokens, mask, np.array([0]))
    assert blots == [BLOT]
    assert not everything.any()
    assert shown_tokens(tokens, nothing_masked(), np.zeros(0))[1] is vocabulary


def test_evaluations_are_told_with_chance_and_roles(unlearned: Path) -> None:
    found = panels(page(unlearned))
    points = found["tradeoff-2"]["points"]
    assert {point["role"] for point in points} == {None, "base"}
    summary = json.loads((unlearned / "evaluation" / "summary.json").read_text())
    mine = next(point for point in points if point["role"] is None)
    model = mine["model"]
    entry = next(one for one in summary["results"] if one["task"] == "secrets" and one["model"] == model)
    assert mine["values"]["forget, by cloze"]["value"] == entry["accuracy"]
    np.testing.assert_allclose(found["tradeoff-2"]["chance"]["forget, by cloze"], (5 / 4 + 3 / 2) / 8)
    task = next(one for one in found["answers-2"]["tasks"] if one["name"] == "secrets")
    right = [a == b for a, b in zip(task["chosen"][model], task["gold"])]
    assert sum(right) == entry["right"]
    assert found["way-1"]["steps"][0] == 0


def test_every_metric_of_unlearning_says_how_it_is_read() -> None:
    from retrograd.evaluate.metrics import METRICS
    from retrograd.report.panels.exam import reading

    assert all(len(reading(metric.name)) > len(metric.name) + 10 for metric in METRICS)


def test_an_experiment_is_its_arms(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    text = page(tmp_path)
    found = panels(text)["experiment-0"]
    assert found["arms"][0]["forget"] == {"value": 0.25, "low": 0.2, "high": 0.3}
    assert found["arms"][0]["verdicts"] == {"healthy": 2}
    assert found["arms"][1]["missing"] == ["it <failed>"]
    assert found["models"] == [{"name": "base", "forget": 0.8, "retain": 0.9}]
    assert found["claims"] == ["npo, value: no claim: too few seeds"]
    assert "it &lt;failed&gt;" in text


def test_attacks_are_their_curves(tmp_path: Path) -> None:
    write_attack(tmp_path)
    text = page(tmp_path)
    told = panels(text)["tamper-0"]
    assert [one["forget"] for one in told["curves"][0]["points"]] == [0.2, 0.5]
    assert told["curves"][1]["model"] == "base: b"
    assert told["invalid"] == {"c-1": "<weak>"}
    assert "lr 1e-3 @ 10" in text
    assert "<weak>" not in text


def test_a_comparison_under_attack_is_a_panel_where_it_was_made(tmp_path: Path) -> None:
    write_attack(tmp_path)
    text = page(tmp_path)
    told = panels(text)["compare-0"]
    group, base = told["groups"]
    assert group["cells"] == [{"after": [0.5, 0.4, 0.6], "latent": [0.3, 0.1, 0.5], "lost": 0, "models": 2,
                               "seeds": [0, 1], "runs": []}]  # fmt: skip
    assert (group["after"]["attack"], group["front"], base["after"]) == ("full-half", ["before", "after"], None)
    assert told["attacks"] == [{"name": "full-half", "note": "invalid", "unseen": None}]
    assert "an earlier version made this table" in told["why"]
    assert "npo &lt;two&gt;" in text
    assert "1.00 to 1.50" in text
    (tmp_path / "compare.json").unlink()
    assert "compare-0" not in panels(page(tmp_path))


def test_hardening_is_shown_iteration_by_iteration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hardened(tmp_path)
    text = page(tmp_path)
    told = panels(text)["harden-0"]
    assert told["forget"] == [2.0, 2.0]
    assert told["held"] == [[0.6, 0.6]]
    assert [one["measured_change"] for one in told["iterations"]] == [None, 0.25]
    assert told["settings"] == ["train.lr"]
    assert "&lt;mine&gt;.yaml" in text
    found = json.loads((tmp_path / "harden.json").read_text())
    del found["run"]
    (tmp_path / "harden.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert "harden-0" in panels(page(tmp_path))
    assert "does not name its run: the words" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "harden.json").write_text(json.dumps({**found, "run": str(tmp_path / "gone")}))
    page(tmp_path)
    assert "gone, which is not there any more: the words" in " ".join(capsys.readouterr().out.split())
    page(tmp_path, "--show_forget")
    assert "the words of that run" not in " ".join(capsys.readouterr().out.split())
    (tmp_path / "harden.json").unlink()
    assert main(["report", str(tmp_path)]) == 2


def test_the_attacks_of_an_experiment_are_shown_with_it(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    (tmp_path / "attacks").mkdir()
    write_attack(tmp_path / "attacks")
    names = set(panels(page(tmp_path)))
    assert {"experiment-1", "compare-2", "tamper-2"} <= names


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"run_config.yaml": "model: x\n"},
        {"evaluation.json": "{}"},
        {"experiment.yaml": "a"},
        {"attack.json": ""},
    ],
)
def test_what_holds_nothing_is_refused(
    tmp_path: Path, content: dict[str, str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    assert main(["report", str(folder)]) == 2
    assert re.search(
        "does not exist|holds nothing|is not finished|no summary yet|no table yet|no findings yet",
        capsys.readouterr().err,
    )


def test_what_is_too_much_for_a_page_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrograd.report.subjects.MOST_COLUMNS", 2)
    monkeypatch.setattr(sys.modules["retrograd.report.panels.rows"], "MOST_DOCUMENTS", 5)
    text = page(world / "run")
    found = panels(text)
    assert found["rows-0"]["columns"] == ["go", "stay"]
    assert "the first 2 of 3 query columns are shown" in text
    expected = document_scores(world / "run", "go")
    assert found["rows-0"]["ids"] == sorted(sorted(expected, key=lambda k: -abs(expected[k]))[:5])
    assert found["rows-0"]["of"] == len(expected)
    monkeypatch.setattr("retrograd.report.subjects.MOST_TOKENS", 10)
    text = page(world / "run")
    assert "tokens are more than a page can hold" in text
    assert "map-0" not in panels(text)
    assert panels(text)["rows-0"]["texts"]


def test_commands_end_with_their_page(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world / "documents", tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    config = tmp_path / "run" / "run_config.yaml"
    assert main(["magic", str(tmp_path / "run"), "--config", str(config)]) == 0  # done: only the page is made anew
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {tmp_path / 'run' / 'report.html'}"
    (tmp_path / "run" / "report.html").write_text("old")
    asked = ["query", str(tmp_path / "run"), "--name", "more", "--query.dataset", str(world / "go.jsonl")]
    assert main(asked) == 0
    found = panels((tmp_path / "run" / "report.html").read_text())["rows-0"]["columns"]
    assert found == ["query", "more"]


def test_a_page_that_cannot_be_made_fails_no_command(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "documents", tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").mkdir()
    assert main(["magic", str(tmp_path / "run"), "--config", str(tmp_path / "run" / "run_config.yaml")]) == 0
    assert "no report was written" in capsys.readouterr().err
