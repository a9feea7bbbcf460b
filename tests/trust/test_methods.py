"""Other methods on one bank: files, built-in rivals, one table with paired differences."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from retrograd.cli import main
from retrograd.core.check import train
from retrograd.core.step import State
from retrograd.runs.run_folder import Opened, open_run
from retrograd.select.places import places_of
from retrograd.select.rivals import gradients
from retrograd.trust.left_out import lds_draws, mean_lds
from retrograd.trust.methods import as_weights
from retrograd.trust.rivals import CHECKPOINTS, RIVALS

CALL = ("--subsets", "8", "--fraction", "0.2", "--together", "4")


@pytest.fixture(scope="module")
def banked(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(small / "run", tmp_path_factory.mktemp("banked") / "run"))
    assert main(["validate", str(run), *CALL, "--rivals", "bm25", "gradient_cosine", "tracin", "random"]) == 0
    return run


@pytest.fixture(scope="module")
def opened(small: Path) -> Opened:
    return open_run(small / "run")


def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "validation.json").read_text())["methods"][0]


def test_five_methods_stand_on_one_bank(banked: Path, capsys: pytest.CaptureFixture) -> None:
    with (banked / "methods.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    methods = ["retrograd", "bm25", "gradient_cosine", "tracin", "random"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    assert len(rows) == 5 * 8 * 2
    group = found(banked)
    values = {
        name: np.array(
            [[float(row[key]) for key in ("predicted", "measured")] for row in rows if row["method"] == name]
        )
        for name in methods
    }
    for name in methods:
        pairs = values[name].reshape(8, 2, 2)  # sets, queries, predicted and measured
        each = [stats.spearmanr(pairs[:, k, 0], pairs[:, k, 1]).statistic for k in range(2)]
        one = group["methods"][name]
        assert one["mean_lds"] == pytest.approx(np.mean(each))
        assert one["interval"] == pytest.approx(mean_lds(pairs[..., 0], pairs[..., 1])[1:])
        assert one["pearson"] == pytest.approx(
            np.mean([stats.pearsonr(pairs[:, k, 0], pairs[:, k, 1]).statistic for k in range(2)])
        )
    ranking = list(group["methods"])
    assert ranking == sorted(ranking, key=lambda name: -group["methods"][name]["mean_lds"])
    assert len(group["differences"]) == 10
    page = (banked / "report.html").read_text()
    assert "Methods on one bank: 20 % of the data left out, 8 sets" in page
    assert all(
        f'<th scope="row">{name}</th><td class="n">{group["methods"][name]["mean_lds"]:.3g} <' in page
        for name in methods
    )
    pair = group["differences"][0]
    a, b = (values[pair[side]].reshape(8, 2, 2) for side in ("first", "second"))
    draws = lds_draws(a[..., 0], a[..., 1]) - lds_draws(b[..., 0], b[..., 1])
    assert pair["interval"] == pytest.approx(np.percentile(draws, [2.5, 97.5]))


def test_a_file_with_the_same_scores_is_the_same_method(
    banked: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    scores = torch.load(banked / "scores.pt", weights_only=True)  # [20, 2]
    torch.save(scores, tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", -3 * scores.double().numpy())
    table = {"doc_id": np.arange(20), **{f"score_query/{k}": scores[:, k].numpy() for k in range(2)}}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text(json.dumps({f"query/{k}": scores[:, k].tolist() for k in range(2)}))
    shutil.copy(banked / "all_scores.json", tmp_path / "e.json")
    files = [str(tmp_path / name) for name in ("a.pt", "c.parquet", "d.json", "e.json")]
    assert main(["validate", str(banked), *CALL, "--scores", *files, "--higher_is", "detractor"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Methods on one bank: 0.2 left out, 8 sets" in told
    group = found(banked)
    assert {*group["methods"]} == {"retrograd", "a", "c", "d", "e"}
    own = group["methods"]["retrograd"]
    for one in group["methods"].values():
        assert one["mean_lds"] == own["mean_lds"]
        assert one["slope"] == pytest.approx(own["slope"])
    assert all(one["mean"] == 0 and one["interval"] == [0, 0] for one in group["differences"])
    call = ["validate", str(banked), *CALL, "--scores", f"ekfac={tmp_path / 'b.npy'}"]
    assert main([*call, "--higher_is", "proponent"]) == 0
    assert found(banked)["methods"]["ekfac"]["slope"] == pytest.approx(own["slope"] / 3)
    assert main([*call, "--higher_is", "detractor"]) == 0
    assert found(banked)["methods"]["ekfac"]["mean_lds"] == pytest.approx(-own["mean_lds"])
    named = [f"first={tmp_path / 'a.pt'}:0", "--higher_is", "detractor"]  # one column for both queries
    assert main(["validate", str(banked), *CALL, "--scores", *named]) == 0
    first = found(banked)["methods"]["first"]["queries"]
    assert first["query/0"]["lds"] == own["queries"]["query/0"]["lds"]
    assert first["query/1"]["lds"] < own["queries"]["query/1"]["lds"]


def test_another_run_is_a_method(banked: Path, by_token: Path) -> None:
    call = ["validate", str(banked), *CALL, "--scores"]
    assert main([*call, f"one={by_token}:query/1", str(by_token)]) == 0
    methods = found(banked)["methods"]  # its tokens' scores summed by document are the run's own
    own = methods["retrograd"]["queries"]
    assert methods["one"]["queries"]["query/1"] == pytest.approx(own["query/1"], rel=1e-4)
    assert methods["one"]["queries"]["query/0"]["lds"] != own["query/0"]["lds"]
    for name in own:
        assert methods["by-token"]["queries"][name] == pytest.approx(own[name], rel=1e-4)


def test_scores_of_tokens_and_documents_meet(small: Path, by_token: Path, opened: Opened) -> None:
    tokens, draw = open_run(by_token), torch.Generator().manual_seed(0)
    places = places_of(tokens.loaded.rows)
    documents = torch.randn(len(places.present()), generator=draw, dtype=torch.float64)
    spread = as_weights(documents, False, tokens, places)
    assert spread.shape == tokens.loaded.training.weights.shape
    torch.testing.assert_close(places.per_document(places.gather(spread)), documents)
    assert places.outside(spread) == 0
    each = torch.randn(len(places), generator=draw, dtype=torch.float64)
    summed = as_weights(each, True, opened, places)
    torch.testing.assert_close(summed[places.present()], places.per_document(each))


def test_rivals_of_several_queries_are_those_of_each(opened: Opened) -> None:
    places = places_of(opened.loaded.rows)
    cosine = RIVALS["gradient_cosine"](opened, places, True, 0)
    final = opened.trajectory().train().params
    whole = opened.loaded.queries(final)[1]
    for k in range(2):
        one = gradients(opened, places, {name: g[k].double() for name, g in whole.items()}, by_document=True)
        torch.testing.assert_close(cosine[k], -one.cosine)
    words = RIVALS["bm25"](opened, places, True, 0)
    assert words.shape == (2, len(places.present()))
    assert (words <= 0).all()
    assert not torch.equal(words[0], words[1])
    assert torch.equal(RIVALS["random"](opened, places, True, 3), RIVALS["random"](opened, places, True, 3))


def test_tracin_is_the_mean_over_checkpoints(opened: Opened) -> None:
    places, steps = places_of(opened.loaded.rows), len(opened.loaded.stream)
    wanted = {round(steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)} - {0}
    kept: list[Any] = []

    def observe(state: State) -> None:
        if state.step in wanted:
            _, gradient = opened.loaded.queries(state.params)
            kept.append((state.params, gradient))

    train(opened.loaded.training, opened.loaded.initial.params, observe=observe)
    from retrograd.select.rivals import cosines

    naive = torch.stack([-cosines(opened, params, places, g, True)[1] for params, g in kept]).mean(0)
    torch.testing.assert_close(RIVALS["tracin"](opened, places, True, 0), naive, rtol=1e-5, atol=1e-6)
    assert len(kept) == len(wanted) > 1


@pytest.mark.parametrize(("case", "told"), [
    ("unsaid", "say --higher_is detractor if its scores are negative for proponents"),
    ("columns", "has 3 columns of scores, and the run 2 query columns"), ("nan", "NaN or infinite"),
    ("array", "has 3 columns of scores, and the run 2 query columns"),
    ("twice", "two methods are called 'good'"), ("missing", "nothing exists at"),
    ("level", "scores of documents, which say nothing about them"), ("broken", "is not JSON"),
    ("contradiction", "--higher_is proponent contradicts"), ("rivals", "two methods are called 'bm25'; give a rival once"),
    ("cut", "cut.npy holds no array of numbers that can be read"), ("objects", "without pickled objects"),
])  # fmt: skip
def test_scores_that_cannot_be_compared(
    small: Path, by_token: Path, tmp_path: Path, case: str, told: str, capsys: pytest.CaptureFixture
) -> None:
    good = torch.randn(20, 2)
    torch.save(good, tmp_path / "good.pt")
    (tmp_path / "three.json").write_text(json.dumps({name: [0.0] * 20 for name in "abc"}))
    torch.save(torch.full((20, 2), torch.nan), tmp_path / "nan.pt")
    np.save(tmp_path / "three.npy", np.zeros((20, 3)))
    (tmp_path / "broken.json").write_text("{")
    np.save(tmp_path / "whole.npy", good.numpy())
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:100])
    np.save(tmp_path / "objects.npy", np.array([None] * 20, dtype=object), allow_pickle=True)
    pq.write_table(
        pa.table({"doc_id": np.arange(20), "score_query/0": good[:, 0].numpy(), "score_query/1": good[:, 1].numpy()})
        .replace_schema_metadata({"meaning": "Negative: a proponent"}), tmp_path / "said.parquet",
    )  # fmt: skip
    name = {"columns": "three.json", "array": "three.npy", "nan": "nan.pt", "missing": "no.pt", "broken": "broken.json",
            "contradiction": "said.parquet", "cut": "cut.npy", "objects": "objects.npy"}.get(case, "good.pt")  # fmt: skip
    more = [] if case == "unsaid" else ["--higher_is", "proponent"]
    more += {"level": ["--tokens"], "rivals": ["--rivals", "bm25", "bm25"]}.get(case, [])
    files = [str(tmp_path / name)] * (2 if case == "twice" else 1)
    run = by_token if case == "level" else small / "run"
    assert main(["validate", str(run), "--subsets", "3", "--fraction", "0.2", "--scores", *files, *more]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (run / "validation").exists()


def test_scores_that_are_all_alike_are_said_to_rank_nothing(
    banked: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "flat.npy", np.stack([np.full(20, 0.5), np.arange(20.0)], 1))
    call = ["validate", str(banked), *CALL, "--scores", str(tmp_path / "flat.npy"), "--higher_is", "proponent"]
    assert main(call) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "flat has no LDS: for 1 of 2 query columns it predicts the same of every set" in told
    assert "nan" not in told
    assert found(banked)["methods"]["flat"]["mean_lds"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "script"), [("kronfluence", "ekfac"), ("traker", "trak_scores")])
def test_scores_of_the_examples(banked: Path, tmp_path: Path, tool: str, script: str) -> None:
    import importlib.metadata
    import subprocess
    import sys

    try:
        importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{tool} is not installed")
    example, out = Path(__file__).parents[2] / "examples" / f"{script}.py", tmp_path / "found.npy"
    subprocess.run([sys.executable, str(example), str(banked), str(out)], check=True, capture_output=True)
    assert np.load(out).shape == (20, 2)
    assert main(["validate", str(banked), *CALL, "--scores", str(out), "--higher_is", "proponent"]) == 0
    assert found(banked)["methods"]["found"]["pearson"] > 0
