"""Comparing two attributions; scores in files of any method; the weights file and whom it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from selecting import MU, ROWS, TAU, double, many
from torch import tensor

from retrograd.data.stream import token_rows
from retrograd.select import weights as files
from retrograd.select.analysis import Answer, analyse, spearman_of, verdict
from retrograd.select.files import Stated, file_scores, to_prediction, to_target, write_original
from retrograd.select.places import places_of
from retrograd.settings.select import FeasibleConfig

# ---------------------------------------------------------------- analysis


def test_spearman_under_multiplicities_is_that_of_the_repeated_data() -> None:
    draw = np.random.default_rng(0)
    tau, mu = draw.integers(-3, 4, 50).astype(float), draw.normal(size=50).round(1)
    counts = draw.integers(0, 4, 50).astype(float)
    a, b = (np.repeat(values, counts.astype(int)) for values in (tau, mu))
    assert spearman_of(tau, mu)(counts) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_analysis_by_hand() -> None:
    places = places_of(token_rows([[0, 1, 2]] * 4))
    tau, mu = double(-4, -3, -2, -1, 1, 2, 3, 4), double(0, -1, 5, -9, 1, 1, 1, -1)
    found = analyse(tau, mu, places, FeasibleConfig(forget_quantile=0.5, retain_quantile=0.5, resamples=200))
    # p = 4 3 2 1 0 0 0 0, median 0.5; g = 0 1 0 9 0 0 0 1, median 0
    assert found["thresholds"]["p_above"] == 0.5
    assert found["thresholds"]["g_at_most"] == 0
    assert found["purely_forget"]["value"] == 2 / 8
    assert found["independent_share"] == 4 / 8 * 5 / 8
    assert found["proponent_and_not"] == 2 / 8
    assert found["magnitude_ratio"]["value"] == 20 / 19
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(tau, mu).statistic)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(tau, mu).statistic)
    # Σp = 7 3 0 0, median 1.5; Σg = 1 9 0 1, median 1
    assert found["documents"]["purely_forget"] == [0]
    assert found["documents"]["net_proponent_and_not"] == 0 + (0 - 1 >= 0) + (5 - 9 >= 0)
    assert found["verdict"]["tokens"].startswith("undecided")
    assert "The intervals are of 4 rows, too few" in found["verdict"]["tokens"]
    for name in ("pearson", "spearman", "purely_forget", "magnitude_ratio"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name


def test_the_bootstrap_draws_rows() -> None:
    """Tokens that repeat within a row add no certainty: the interval is that of the rows."""
    draw = np.random.default_rng(1)
    tau, mu = draw.normal(size=(2, 40))
    once = analyse(torch.from_numpy(tau), torch.from_numpy(mu), places_of(token_rows([[0, 1]] * 40)), FeasibleConfig())
    rows = places_of(token_rows([[0] * 11] * 40))
    often = analyse(
        torch.from_numpy(tau.repeat(10)), torch.from_numpy(mu.repeat(10)), rows, FeasibleConfig()
    )  # fmt: skip
    for name in ("pearson", "spearman", "magnitude_ratio"):
        assert often[name]["low"] == pytest.approx(once[name]["low"], abs=1e-9), name
        assert often[name]["high"] == pytest.approx(once[name]["high"], abs=1e-9), name


def test_the_interval_covers_what_is_true() -> None:
    """Of 40 samples of rows with a known correlation, about 95 % of the intervals hold it."""
    draw, hits = np.random.default_rng(3), 0
    for _ in range(40):
        common = draw.normal(size=80)
        pair = [torch.from_numpy(common + draw.normal(size=80)) for _ in range(2)]  # correlation 1/2
        found = analyse(*pair, places_of(token_rows([[0, 1]] * 80)), FeasibleConfig(resamples=200))["pearson"]
        hits += found["low"] <= 0.5 <= found["high"]
    assert hits >= 33


def test_verdicts() -> None:
    documents = {"purely_forget": [3], "count": 10, "interval": [0.01, 0.4]}
    good = {
        "spearman": Answer(0.3, 0.2, 0.4, 0.9, True), "purely_forget": Answer(0.2, 0.1, 0.3, 0.01, True),
        "magnitude_ratio": Answer(2.0, 1.5, 2.5, 10.0, True),
    }  # fmt: skip
    assert verdict(good, documents)["tokens"].startswith("feasible: the two attributions are separated (Spearman 0.3")
    same = {**good, "spearman": Answer(0.97, 0.95, 0.99, 0.9, False)}
    assert verdict(same, documents)["tokens"].startswith("not feasible: the two attributions name the same tokens")
    few = {**good, "purely_forget": Answer(0.01, 0.005, 0.02, 0.01, None)}
    assert "undecided" in verdict(few, documents)["tokens"]
    far = {**good, "magnitude_ratio": Answer(50.0, 40.0, 60.0, 10.0, False)}
    assert "--alpha 50 weighs them alike" in verdict(far, documents)["tokens"]
    opposed = {**good, "spearman": Answer(-0.8, -0.9, -0.7, 0.9, True)}
    assert "is the sign of one the other way round?" in verdict(opposed, documents)["tokens"]
    assert verdict(good, {**documents, "purely_forget": []})["documents"].startswith("not feasible: 0 of 10")


def test_verdicts_follow_the_data() -> None:
    places, tau, _ = many()
    noise = many(1)[1][: len(tau)] if len(many(1)[1]) >= len(tau) else torch.randn(len(tau), dtype=torch.float64)
    apart = analyse(tau, noise, places, FeasibleConfig(resamples=200))
    assert apart["verdict"]["tokens"].startswith("feasible")
    alike = analyse(tau, tau + 1e-3 * noise, places, FeasibleConfig(resamples=200))
    assert alike["verdict"]["tokens"].startswith("not feasible")
    against = analyse(tau, -tau, places, FeasibleConfig(resamples=200))
    assert "the other way round?" in against["verdict"]["tokens"]


@pytest.mark.parametrize(("setting", "told"), [
    ({"forget_quantile": 1.0}, "--feasible.forget_quantile is 1.0"),
    ({"retain_quantile": 0.0}, "--feasible.retain_quantile is 0.0"),
    ({"resamples": 10}, "--feasible.resamples is 10"), ({"correlation": 2.0}, "--feasible.correlation is 2.0"),
    ({"share": 0.0}, "--feasible.share is 0.0"), ({"ratio": 0.5}, "--feasible.ratio is 0.5"),
], ids=str)  # fmt: skip
def test_thresholds_out_of_range(setting: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        analyse(TAU, MU, places_of(ROWS), FeasibleConfig(**setting))


def test_scores_that_do_not_vary_are_not_compared() -> None:
    with pytest.raises(ValueError, match="the 6 scores of --against do not vary"):
        analyse(TAU, MU * 0, places_of(ROWS), FeasibleConfig())


# ---------------------------------------------------------------- files of other methods


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Scores of ROWS by token in every kind of file, target-aligned, negative = proponent."""
    places = places_of(ROWS)
    values = places.scatter(TAU)
    torch.save(values, tmp_path / "target.pt")
    torch.save(to_prediction(values), tmp_path / "prediction.pt")
    torch.save(torch.stack([values, 2 * values], -1), tmp_path / "several.pt")
    np.save(tmp_path / "target.npy", values.numpy())
    table = {
        "row": places.row.numpy(), "position": places.column.numpy(), "token_id": places.token.numpy(),
        "score": TAU.numpy(), "mine": -TAU.numpy(),
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "target.parquet")
    return tmp_path


def test_alignment_moves_scores_to_their_targets() -> None:
    theirs = tensor([[1.0, 2.0, 3.0, 0.0]])
    assert to_target(theirs).tolist() == [[0, 1, 2, 3]]
    assert to_prediction(to_target(theirs)).tolist() == theirs.tolist()


@pytest.mark.parametrize(("name", "part", "alignment"), [
    ("target.pt", None, "target"), ("prediction.pt", None, "prediction"), ("target.npy", None, "target"),
    ("target.parquet", None, "target"), ("several.pt", "0", "target"),
])  # fmt: skip
def test_every_kind_of_file(grid: Path, name: str, part: str | None, alignment: Any) -> None:
    for sign in ("negative", "positive"):
        stated = Stated(sign, alignment)  # type: ignore[arg-type]
        values, per_token, record = file_scores(grid / name, part, places_of(ROWS), stated)
        assert torch.equal(values, TAU if sign == "negative" else -TAU)
        assert per_token
        assert record["sign"] == sign
        assert record["alignment"] == alignment
        assert record["rows"] == "by shape and zeros alone"


@pytest.mark.parametrize(("stated", "remedy"), [
    (Stated("negative", "target"), "give the right --rows"),
    (Stated("negative", "target", by_end=True), "Give scores of this run's rows$"),
])  # fmt: skip
def test_scores_of_other_rows_are_refused_with_what_the_command_takes(
    tmp_path: Path, stated: Stated, remedy: str
) -> None:
    torch.save(torch.zeros(7, 9), tmp_path / "others.pt")
    with pytest.raises(ValueError, match=remedy):
        file_scores(tmp_path / "others.pt", None, places_of(ROWS), stated)


def test_wider_files_are_cut_where_they_are_zero(grid: Path) -> None:
    places = places_of(ROWS)
    wide = torch.zeros(3, 9)
    wide[:, :4] = places.scatter(TAU)
    torch.save(wide, grid / "wide.pt")
    assert torch.equal(file_scores(grid / "wide.pt", None, places, Stated("negative", "target"))[0], TAU)
    torch.save(to_prediction(wide), grid / "wide.pt")
    assert torch.equal(file_scores(grid / "wide.pt", None, places, Stated("negative", "prediction"))[0], TAU)


REFUSED_FILES = {
    "no sign": ("target.pt", None, Stated(None, "target"), "say --sign negative if its scores are negative for prop"),
    "no alignment": ("target.pt", None, Stated("negative"), "say --alignment prediction if column t has the score"),
    "against": ("target.pt", None, Stated(None, "target", "against_"), "say --against_sign negative"),
    "said target": ("prediction.pt", None, Stated("negative", "target"), "as prediction-aligned they fit"),
    "said prediction": ("target.pt", None, Stated("negative", "prediction"), "as target-aligned they fit"),
    "columns": ("several.pt", None, Stated("negative", "target"), "has 2 columns of scores; name one as"),
    "no such column": ("several.pt", "7", Stated("negative", "target"), "has 2 columns"),
    "table column": (
        "target.parquet",
        "yours",
        Stated("negative", "target"),
        "has the columns row, position, token_id",
    ),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_files_that_do_not_say_or_do_not_fit(grid: Path, case: str) -> None:
    name, part, stated, told = REFUSED_FILES[case]
    with pytest.raises(ValueError, match=told):
        file_scores(grid / name, part, places_of(ROWS), stated)


def test_files_of_other_rows(grid: Path) -> None:
    stated = Stated("negative", "target")
    with pytest.raises(
        ValueError, match="scores of 3 rows of 4 tokens, and the data here are 2 rows of up to 4: 4 real"
    ):
        file_scores(grid / "target.pt", None, places_of(token_rows([[5, 6, 7, 8], [5, 6]])), stated)
    with pytest.raises(ValueError, match=r"at 1 places.*scores of other rows, or padding was scored"):
        file_scores(grid / "target.pt", None, places_of(token_rows([[5, 6], [5, 6, 7, 8], [9, 5, 6]])), stated)
    with pytest.raises(ValueError, match="1 of 6 token ids are not those of the data"):
        file_scores(grid / "target.parquet", None, places_of(token_rows([[5, 6, 7, 9], [5, 6], [9, 5, 6]])), stated)
    with pytest.raises(ValueError, match="2 of 6 lines point outside"):
        file_scores(grid / "target.parquet", None, places_of(token_rows([[5, 6, 7, 8], [5, 6]])), stated)
    table = pq.read_table(grid / "target.parquet")
    pq.write_table(table.slice(0, 4), grid / "few.parquet")
    with pytest.raises(ValueError, match="no line for 2 of 6 real tokens"):
        file_scores(grid / "few.parquet", None, places_of(ROWS), stated)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), grid / "twice.parquet")
    with pytest.raises(ValueError, match="7 lines for 6 different places"):
        file_scores(grid / "twice.parquet", None, places_of(ROWS), stated)


def test_broken_files(grid: Path) -> None:
    stated, places = Stated("negative", "target"), places_of(ROWS)
    (grid / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.pt holds no array of numbers that can be read"):
        file_scores(grid / "broken.pt", None, places, stated)
    torch.save({"a": 1}, grid / "dict.pt")
    with pytest.raises(ValueError, match="holds dict; scores are one tensor"):
        file_scores(grid / "dict.pt", None, places, stated)
    (grid / "scores.csv").write_text("1")
    with pytest.raises(ValueError, match=r"scores are read from \.pt, \.npy, \.parquet and \.json files"):
        file_scores(grid / "scores.csv", None, places, stated)
    torch.save(torch.zeros(5), grid / "five.pt")
    with pytest.raises(ValueError, match="has 5 scores, and the data here are 3 documents, 3 of them"):
        file_scores(grid / "five.pt", None, places, stated)


def test_scores_of_documents_from_files(grid: Path) -> None:
    torch.save(double(1, 2, 3), grid / "docs.pt")
    torch.save(double(1, 2, 3), grid / "old.pt", _use_new_zipfile_serialization=False)
    assert file_scores(grid / "old.pt", None, places_of(ROWS), Stated("positive"))[0].tolist() == [-1, -2, -3]
    values, per_token, record = file_scores(grid / "docs.pt", None, places_of(ROWS), Stated("positive"))
    assert values.tolist() == [-1, -2, -3]
    assert not per_token
    assert record["alignment"] is None
    pq.write_table(pa.table({"doc_id": [2, 0, 1], "score": [3.0, 1.0, 2.0]}), grid / "docs.parquet")
    assert file_scores(grid / "docs.parquet", None, places_of(ROWS), Stated("negative"))[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("alignment", ["prediction", "target"])
def test_the_original_layout_and_back(tmp_path: Path, alignment: Any) -> None:
    places = places_of(ROWS)
    write_original(tmp_path, TAU, alignment, places)
    theirs = torch.load(tmp_path / "per_token_scores.pt", weights_only=True)
    grid = places.scatter(TAU).float()
    assert torch.equal(theirs[:, :-1] if alignment == "prediction" else theirs[:, 1:], grid[:, 1:])
    assert torch.equal(theirs, torch.load(tmp_path / "attribution_scores.pt", weights_only=True))
    values, _, record = file_scores(tmp_path, None, places, Stated())  # what is beside it says sign and alignment
    assert torch.equal(values, TAU)
    assert record["rows"] == "equal by hash"
    with pytest.raises(ValueError, match=r"--sign positive contradicts .* says sign negative"):
        file_scores(tmp_path, None, places, Stated("positive"))
    other = "target" if alignment == "prediction" else "prediction"
    with pytest.raises(ValueError, match=f"--alignment {other} contradicts"):
        file_scores(tmp_path, None, places, Stated(None, other))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are of the rows with hash"):
        file_scores(tmp_path, None, places_of(token_rows([[5, 6, 7, 9], [5, 6], [9, 5, 6]])), Stated())
    (tmp_path / "info.json").unlink()
    with pytest.raises(ValueError, match="say --alignment prediction if"):
        file_scores(tmp_path, None, places, Stated())
    assert torch.equal(file_scores(tmp_path, None, places, Stated(None, alignment))[0], TAU)
    torch.save(theirs + 1, tmp_path / "attribution_scores.pt")
    with pytest.raises(ValueError, match=r"differ, and one is to be the other's copy"):
        file_scores(tmp_path, None, places, Stated(None, alignment))
    (tmp_path / "info.json").write_text("{")
    with pytest.raises(ValueError, match=r"info\.json is not JSON"):
        file_scores(tmp_path / "per_token_scores.pt", None, places, Stated("negative", alignment))


# ---------------------------------------------------------------- the weights file


def test_a_weights_file_comes_back_for_its_own_rows_alone(tmp_path: Path) -> None:
    places = places_of(ROWS)
    files.write(tmp_path, TAU, None, places, {"use": "descent", "rule": "value"})
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        assert torch.equal(files.read(path, ROWS), places.scatter(TAU).float())
    assert "ascent" in files.info(tmp_path)["meaning"]
    other = token_rows([[5, 6, 7, 9], [5, 6], [9, 5, 6]])
    with pytest.raises(ValueError, match=r"weighs another data set: 3 rows of up to 4 tokens, 6 of them targets"):
        files.read(tmp_path, other)
    with pytest.raises(ValueError, match=r"3 of 6 weights in .* are negative, which means ascent"):
        files.read(tmp_path, ROWS, signed=False)
    with pytest.raises(ValueError, match="has token weights by rule value; documents are kept by --rule documents"):
        files.documents(tmp_path)
    with pytest.raises(ValueError, match="is no weights file of `retrograd select`"):
        files.read(tmp_path / "nowhere", ROWS)  # though its folder is one
    files.write(tmp_path, TAU.abs(), [1, 4], places, {"use": "removal", "rule": "documents"})
    assert files.documents(tmp_path) == [1, 4]
    assert files.read(tmp_path, ROWS, signed=False).min() == 0
    (tmp_path / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"has SHA-256 .* \(6 real tokens\): select again"):
        files.read(tmp_path, ROWS)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is missing, and its info.json"):
        files.read(tmp_path, ROWS)
