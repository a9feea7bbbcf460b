"""From scores to weights: rules and controls by hand, alignment, sign, analysis, files, the command on real runs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quiz
import tiny
import torch
import yaml
from scipy import stats
from torch import Tensor, tensor

from retrograd.cli import main
from retrograd.lm.rows import Rows
from retrograd.lm.stream import token_rows
from retrograd.select import weights as files
from retrograd.select.analysis import Answer, analyse, correlations, verdict
from retrograd.select.controls import drawn, groups, matched
from retrograd.select.files import Stated, file_scores, to_prediction, to_target, write_original
from retrograd.select.places import Places, places_of
from retrograd.select.rules import Weighing, finish, key, rises, weigh
from retrograd.select.words import bm25, keyword_tokens, read_keywords
from retrograd.settings.select import FeasibleConfig

ROWS = token_rows([[5, 6, 7, 8], [5, 6], [9, 5, 6]])  # real tokens: 3, 1 and 2
TAU = tensor([-2.0, 0.0, 1.0, -4.0, 3.0, -2.0], dtype=torch.float64)  # mean size 2
MU = tensor([-1.0, 1.0, -1.0, 0.0, 2.0, -3.0], dtype=torch.float64)
MODEL = "model"


def double(*values: float) -> Tensor:
    return tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- places


def test_real_tokens_are_the_valid_targets() -> None:
    found = places_of(ROWS)
    assert found.row.tolist() == [0, 0, 0, 1, 2, 2]
    assert found.column.tolist() == [1, 2, 3, 1, 1, 2]
    assert found.token.tolist() == [6, 7, 8, 6, 5, 6]
    grid = found.scatter(TAU)
    assert grid.tolist() == [[0, -2, 0, 1], [0, -4, 0, 0], [0, 3, -2, 0]]
    assert torch.equal(found.gather(grid), TAU)
    assert found.outside(grid) == 0
    assert found.outside(grid + 1) == 6  # the first tokens and the padding
    assert found.per_document(TAU).tolist() == [-1, -4, 1]


def test_documents_without_a_real_token_are_left_out() -> None:
    rows = Rows(
        [np.array([1, 2, 3]), np.array([4, 5])], [np.array([False, True, True]), np.array([False, True])],
        [np.array([1, 1, 1]), np.array([3, 3])], 5, {0: "blank", 2: "blank", 4: "blank"},
    )  # fmt: skip
    places = places_of(rows)
    assert places.present().tolist() == [1, 3]
    assert places.per_document(double(1, 2, 5)).tolist() == [3, 5]
    assert places.at_tokens(double(7, 9)).tolist() == [7, 7, 9]


# ---------------------------------------------------------------- rules


DESCENT: dict[str, list[float]] = {
    "value": [-1, 0, 0.5, -2, 1.5, -1],
    "sign": [-1, 0, 1, -1, 1, -1],
    "soft_sign": [math.tanh(x / 2) for x in (-2, 0, 1, -4, 3, -2)],
    "clipped": [-1, 0, 0.5, -1, 1, -1],
    "rank": [x / 6 for x in (-3.5, 0, 2, -6, 5, -3.5)],  # sizes 2 0 1 4 3 2, the two equal ones share 3 and 4
    "two_objective": [x * 6 / 10 for x in (-1, -1, 2, -4, 1, 1)],  # their mean size is 10/6
    "positive_only": [0, 0, 1, 0, 1, 0],
    "negative_only": [1, 0, 0, 1, 0, 1],
    "selective": [0, 0, 1, 0, 0, 0],
    "compatible": [0, 0, 1, 0, 0, 0],
    "all_tokens": [1] * 6,
}


@pytest.mark.parametrize("rule", DESCENT)
def test_every_rule_by_hand(rule: Any) -> None:
    places = places_of(ROWS)
    found = weigh(Weighing(rule), places, TAU, MU)
    torch.testing.assert_close(found, double(*DESCENT[rule]))
    assert torch.equal(finish("descent", found, places), found)


REMOVAL: dict[str, list[float]] = {
    "value": [2, 0, 0, 4, 0, 2],
    "sign": [1, 0, 0, 1, 0, 1],
    "soft_sign": [math.tanh(1), 0, 0, math.tanh(2), 0, math.tanh(1)],
    "clipped": [1, 0, 0, 1, 0, 1],
    "rank": [3.5, 0, 0, 6, 0, 3.5],
    "two_objective": [1, 0, 0, 4, 0, 0],  # max(0, p − g): 2 − 1, 0, 0 − 1, 4 − 0, 0, 2 − 3
    "negative_only": [1, 0, 0, 1, 0, 1],
    "all_tokens": [1] * 6,
}


@pytest.mark.parametrize("rule", REMOVAL)
def test_every_rule_as_strength_by_hand(rule: Any) -> None:
    places = places_of(ROWS)
    found = finish("removal", weigh(Weighing(rule, "removal"), places, TAU, MU), places)
    wanted = double(*REMOVAL[rule])
    torch.testing.assert_close(found, wanted * 6 / wanted.sum())
    assert float(found.sum()) == pytest.approx(6, rel=1e-15)


def test_compatible_and_selective_differ_where_the_other_score_is_zero() -> None:
    places = places_of(ROWS)
    mu = double(0, 0, 0, 0, -1, 0)
    assert weigh(Weighing("selective"), places, TAU, mu).tolist() == [0, 0, 1, 0, 1, 0]
    assert weigh(Weighing("compatible"), places, TAU, mu).tolist() == [0, 0, 0, 0, 1, 0]


def test_top_q_keeps_the_strongest_proponents() -> None:
    places = places_of(ROWS)
    assert weigh(Weighing("top_q", q=0.34), places, TAU, None).tolist() == [-1, 0, 0, -2, 0, 0]  # 2 of 6; ties in order
    assert weigh(Weighing("top_q", q=1), places, TAU, None).tolist() == [-1, 0, 0, -2, 0, -1]  # no detractor is kept
    assert weigh(Weighing("top_q", q=1), places, TAU, MU).tolist() == [-0.5, 0, 0, -2, 0, 0]  # p − g
    assert weigh(Weighing("top_q", q=0.01), places, TAU, None).tolist() == [0, 0, 0, -2, 0, 0]  # one at least


def test_settings_of_rules() -> None:
    places = places_of(ROWS)
    soft = weigh(Weighing("soft_sign", soft=0.5), places, TAU, None)
    torch.testing.assert_close(soft, torch.tanh(TAU / 0.5))
    assert weigh(Weighing("clipped", clip=0.25), places, TAU, None).tolist() == [-0.25, 0, 0.25, -0.25, 0.25, -0.25]
    plain = weigh(Weighing("two_objective", alpha=0.0), places, TAU, MU)
    assert torch.equal(plain, weigh(Weighing("value"), places, TAU, None))
    other = weigh(Weighing("two_objective", alpha=-2.0), places, TAU, MU)
    torch.testing.assert_close(other, (TAU + 2 * MU) / (TAU + 2 * MU).abs().mean())


def test_documents_by_hand() -> None:
    places = places_of(ROWS)
    # Σ (p − α g): 2 + 0 − (1 + 1)α, 4, 2 − 3α
    for alpha in (0.0, 0.5):
        assert weigh(Weighing("documents", alpha=alpha, k=2), places, TAU, MU).tolist() == [1, 1, 0]
    assert weigh(Weighing("documents", alpha=-1.0, k=2), places, TAU, MU).tolist() == [1, 0, 1]  # 4, 4, 5; ties in order
    assert weigh(Weighing("documents", k=1), places, -TAU, None).tolist() == [0, 0, 1]
    assert weigh(Weighing("documents", k=1), places, TAU, MU).tolist() == [0, 1, 0]
    assert weigh(Weighing("documents", k=3), places, TAU, None).tolist() == [1, 1, 1]
    found = finish("removal", weigh(Weighing("documents", "removal", k=2, alpha=0.5), places, TAU, MU), places)
    assert found.tolist() == [1.5, 1.5, 1.5, 1.5, 0, 0]
    with pytest.raises(ValueError, match=r"only 1 of 3 have Σ \(p − α g\) above 0 at α = 1"):
        weigh(Weighing("documents", k=2), places, TAU, MU)
    with pytest.raises(ValueError, match=r"--rule documents with --k 4; it keeps from 1 to 3"):
        weigh(Weighing("documents", k=4), places, TAU, MU)
    with pytest.raises(ValueError, match="--rule documents with no --k"):
        weigh(Weighing("documents"), places, TAU, MU)


def test_scores_of_documents_weigh_whole_documents() -> None:
    places = places_of(ROWS)
    found = weigh(Weighing("value", "removal"), places, double(-1, -3, 5), None)
    torch.testing.assert_close(finish("removal", found, places), double(1, 1, 1, 3, 0, 0))
    assert weigh(Weighing("documents", alpha=0.5, k=1), places, double(-1, -2, 3), double(-4, 0, 0)).tolist() == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("rule", ["positive_only", "selective", "compatible"])
def test_removing_detractors_is_a_confusion_of_signs(rule: Any) -> None:
    with pytest.raises(ValueError, match="keeps tokens with a positive score, detractors"):
        weigh(Weighing(rule, "removal"), places_of(ROWS), TAU, MU)


@pytest.mark.parametrize("rule", ["two_objective", "selective", "compatible"])
def test_a_rule_of_two_needs_two(rule: Any) -> None:
    with pytest.raises(ValueError, match="give the other one with --against"):
        weigh(Weighing(rule), places_of(ROWS), TAU, None)


def test_nothing_left_is_refused_with_the_numbers() -> None:
    places = places_of(ROWS)
    with pytest.raises(ValueError, match=r"nothing is left.*0 proponents and 5 detractors"):
        weigh(Weighing("negative_only"), places, TAU.abs(), None)
    with pytest.raises(ValueError, match=r"nothing is left.*two_objective for removal"):
        weigh(Weighing("two_objective", "removal", alpha=9.0), places, TAU, double(-1, -1, -1, -1, -1, -1))
    with pytest.raises(ValueError, match="all 6 values of --scores are 0"):
        weigh(Weighing("value"), places, TAU * 0, None)


# ---------------------------------------------------------------- controls


def _many(seed: int = 0) -> tuple[Places, Tensor, Tensor]:
    """Rows of different lengths, with tokens of different frequency, and scores without ties."""
    draw = np.random.default_rng(seed)
    rows = token_rows([draw.integers(0, 6, draw.integers(3, 9)).tolist() for _ in range(30)])
    places = places_of(rows)
    return places, torch.from_numpy(draw.normal(size=len(places))), torch.from_numpy(draw.normal(size=len(places)))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort().values, b.sort().values)


def in_groups(labels: Tensor, weights: Tensor) -> list[list[float]]:
    return [sorted(weights[labels == one].tolist()) for one in labels.unique()]


@pytest.mark.parametrize("rule", ["value", "top_q", "negative_only", "two_objective"])
@pytest.mark.parametrize("control", ["random_count", "random_position", "random_class", "permuted_in_row"])
def test_random_controls_keep_what_they_say(control: Any, rule: Any) -> None:
    places, tau, mu = _many()
    arm = weigh(Weighing(rule, q=0.3), places, tau, mu)
    found = [matched(control, arm, places, order=None, rising=True, seed=seed) for seed in (0, 1, 0)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    kept = {"random_count": torch.zeros(len(places)), "random_position": places.column,
            "permuted_in_row": places.row}.get(control)  # fmt: skip
    if control == "random_class":
        frequency = torch.bincount(places.token)[places.token].double().log2().floor()
        kept = places.column * 100 + frequency
    assert kept is not None
    for one in found:
        assert same_numbers(one, arm)
        assert not torch.equal(one, arm)
        assert in_groups(kept, one) == in_groups(kept, arm)
    if control == "random_count":  # and it does move between rows
        assert in_groups(places.row, found[0]) != in_groups(places.row, arm)


def test_random_orders_are_even() -> None:
    places = places_of(token_rows([[1, 2, 3, 4]]))
    hits = sum(matched("random_count", double(1, 0, 0), places, order=None, rising=True, seed=s) for s in range(600))
    assert torch.is_tensor(hits)
    assert all(150 < count < 250 for count in hits.tolist())


def test_ordered_controls_by_hand() -> None:
    places = places_of(ROWS)
    tau = double(-2, 0, 1, -4, 3, -1)
    arm = weigh(Weighing("value"), places, tau, None)

    def give(control: Any, order: Tensor, weights: Tensor = arm, rising: bool = True) -> list[float]:
        return matched(control, weights, places, order=order, rising=rising, seed=0).tolist()

    ordered = sorted(arm.tolist())
    # τ sorted: −4 −2 −1 0 1 3; place by place of τ, counted from the other end
    flipped = give("sign_flipped", -tau)
    assert flipped == [ordered[5 - rank] for rank in (1, 3, 4, 0, 5, 2)]
    assert flipped[4] == arm[3]  # the strongest detractor has the strongest proponent's weight
    assert give("retain_only", double(1, 2, 3, 4, 5, 6)) == ordered
    # a mask of proponents goes to the most negative of the other order, a mask of detractors to the most positive
    mask = weigh(Weighing("negative_only"), places, tau, None)
    assert give("retain_only", double(1, 2, 3, 4, 5, 6), mask, rises(Weighing("negative_only"))) == [1, 1, 1, 0, 0, 0]
    mask = weigh(Weighing("positive_only"), places, tau, None)
    assert give("retain_only", double(1, 2, 3, 4, 5, 6), mask, rises(Weighing("positive_only"))) == [0, 0, 0, 0, 1, 1]
    # strengths: the largest weights by magnitude
    norms = double(1, 2, 3, 4, 5, 6)
    assert np.abs(give("gradient_norm", norms)).tolist() == sorted(np.abs(arm.tolist()))
    assert give("gradient_norm", norms, mask) == [0, 0, 0, 0, 1, 1]
    assert give("uniform", norms) == [1] * 6


def test_a_keyword_oracle_fills_up_at_random() -> None:
    places = places_of(ROWS)
    mask = double(1, 1, 1, 0, 0, 0)
    keywords = double(0, 0, 0, 0, 1, 0)
    found = [matched("keyword", mask, places, order=keywords, rising=True, seed=s) for s in range(20)]
    assert all(one[4] == 1 and same_numbers(one, mask) for one in found)
    assert len({tuple(one.tolist()) for one in found}) > 3


def test_one_draw_where_no_tie_decides() -> None:
    weights, order = double(0, 0, 1), double(1, 2, 3)
    assert drawn("random_count", weights, None)
    assert not drawn("uniform", weights, None)
    assert not drawn("retain_only", weights, order)
    assert not drawn("retain_only", double(1, 1, 1), double(2, 2, 2))  # ties between equal weights
    assert drawn("retain_only", weights, double(1, 3, 3))
    assert drawn("gradient_norm", double(-1, 1, 0), order)  # equal in magnitude


def test_controls_of_documents() -> None:
    places = places_of(ROWS)
    arm = weigh(Weighing("documents", k=1), places, TAU, None)
    draws = [matched("random_count", arm, places, order=None, rising=False, seed=s).tolist() for s in range(30)]
    assert {tuple(one) for one in draws} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    flipped = matched("sign_flipped", arm, places, order=-key(Weighing("documents", k=1), places, TAU, None), rising=False,
                      seed=0)  # fmt: skip
    assert flipped.tolist() in ([1, 0, 0], [0, 0, 1])  # both have Σp = 2, the least
    for control in ("random_position", "random_class", "permuted_in_row"):
        with pytest.raises(ValueError, match="here whole documents are weighed"):
            groups(control, 3, places)  # type: ignore[arg-type]


# ---------------------------------------------------------------- rivals of words


class Spelled:
    """A tokenizer of letters; capitals and spaces are spellings of the same word."""

    letters = " abcdefgABC"

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[one] for one in ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [self.letters.index(one) for one in text]}


def test_bm25_by_hand() -> None:
    rows = token_rows([[7, 1, 1, 2], [7, 8, 3], [7, 2, 2, 2, 4]])  # a a b / A c / b b b d
    places = places_of(rows)
    found = bm25(places, [[1, 3], [1]], Spelled())
    a, c = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)  # a is in two of three documents, c in one
    mean = (3 + 2 + 4) / 3
    scale = [1.5 * (0.25 + 0.75 * length / mean) for length in (3, 2, 4)]
    twice, once = 2.5 / (2 + scale[0]), 2.5 / (1 + scale[1])
    wanted = [a * twice, a * twice, 0, a * once, c * once / 2, 0, 0, 0, 0]  # a asked by both queries, c by one
    torch.testing.assert_close(found, double(*wanted))
    full = places.per_document(found)
    assert float(full[0]) == pytest.approx(a * 2 * 2.5 / (2 + scale[0]))  # as Okapi has it


def test_keywords_cover_their_tokens(tmp_path: Path) -> None:
    rows = token_rows([[7, 1, 2, 3], [1, 8, 9], [2, 1, 4]])  # g abc → targets a b c / A B / a d
    places = places_of(rows)
    found = keyword_tokens(places, rows.input_ids, ["ab"], Spelled())
    assert found.tolist() == [1, 1, 0, 1, 1, 0, 0]  # in any case; the last row has no a followed by b
    with pytest.raises(ValueError, match="none of 1 keywords, such as 'gg', occurs among 7 real tokens"):
        keyword_tokens(places, rows.input_ids, ["gg"], Spelled())
    (tmp_path / "k.txt").write_text("red\n\n blue \n")
    assert read_keywords(tmp_path / "k.txt") == ["blue", "red"]
    facts = [{"side": "forget", "entity": "Ab", "value": "x"}, {"side": "retain", "entity": "No", "value": "y"}]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    assert read_keywords(tmp_path / "facts.jsonl") == ["Ab", "x"]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no keyword"):
        read_keywords(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot read keywords from"):
        read_keywords(tmp_path / "missing.txt")


# ---------------------------------------------------------------- analysis


def test_correlations_under_multiplicities_are_those_of_the_repeated_data() -> None:
    draw = np.random.default_rng(0)
    tau, mu = draw.integers(-3, 4, 50).astype(float), draw.normal(size=50).round(1)
    counts = draw.integers(0, 4, 50).astype(float)
    a, b = (np.repeat(values, counts.astype(int)) for values in (tau, mu))
    pearson, spearman = correlations(tau, mu, counts)
    assert pearson == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


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
    places, tau, _ = _many()
    noise = _many(1)[1][: len(tau)] if len(_many(1)[1]) >= len(tau) else torch.randn(len(tau), dtype=torch.float64)
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
    with pytest.raises(ValueError, match=r"cannot read scores from .*broken\.pt"):
        file_scores(grid / "broken.pt", None, places, stated)
    torch.save({"a": 1}, grid / "dict.pt")
    with pytest.raises(ValueError, match="holds dict; scores are one tensor"):
        file_scores(grid / "dict.pt", None, places, stated)
    (grid / "scores.csv").write_text("1")
    with pytest.raises(ValueError, match=r"scores are read from \.pt, \.npy and \.parquet files"):
        file_scores(grid / "scores.csv", None, places, stated)
    torch.save(torch.zeros(5), grid / "five.pt")
    with pytest.raises(ValueError, match="has 5 scores, and the data here are 3 documents, 3 of them"):
        file_scores(grid / "five.pt", None, places, stated)


def test_scores_of_documents_from_files(grid: Path) -> None:
    torch.save(double(1, 2, 3), grid / "docs.pt")
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


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the same rows: by token with three queries, by document with one; and one on other rows."""
    folder = tmp_path_factory.mktemp("select")
    quiz.save(folder / MODEL)
    texts = tiny.sentences(14)
    texts[3] = ""  # no target: ids are unchanged
    tiny.save_jsonl(folder / "train.jsonl", texts)
    tiny.save_jsonl(folder / "fewer.jsonl", texts[:9])
    tiny.save_jsonl(folder / "go.jsonl", tiny.sentences(2, seed=1))
    (folder / "stay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz.questions(3)))
    queries = {
        "go": {"dataset": str(folder / "go.jsonl"), "reduction": "none"},
        "stay": {"dataset": str(folder / "stay.jsonl"), "form": "cloze"},
        "gap": {"contrast": ["stay", "stay2"]}, "stay2": {"dataset": str(folder / "stay.jsonl"), "form": "letter"},
    }  # fmt: skip
    (folder / "queries.yaml").write_text(yaml.safe_dump(queries))
    assert magic(folder, "tokens", "train", "--query_file", str(folder / "queries.yaml"), "--attribute", "tokens") == 0
    one = ("--query.dataset", str(folder / "go.jsonl"))
    assert magic(folder, "documents", "train", *one) == 0
    assert magic(folder, "fewer", "fewer", *one, "--attribute", "tokens") == 0
    return folder


def magic(world: Path, run: str, data: str, *more: str) -> int:
    return main([
        "magic", str(world / run), "--model", str(world / MODEL), "--data.dataset", str(world / f"{data}.jsonl"),
        "--train.lr", "1e-2", "--train.batch_size", "7", "--train.eps_root", "1e-6", "--dtype", "float64", *more,
    ])  # fmt: skip


def call(world: Path, out: Path, scores: str, *more: str) -> int:
    return main(["select", str(out), "--scores", f"{world}/{scores}", *more])


def run_scores(world: Path, query: str) -> Tensor:
    return torch.load(world / "tokens/queries" / query / "scores.pt", weights_only=True).double()


def rows_of(world: Path, run: str = "tokens") -> Rows:
    from retrograd.stages.opened import open_run

    return open_run(world / run).loaded.rows


CONTROLS = [
    "random_count", "random_position", "random_class", "permuted_in_row", "sign_flipped", "retain_only",
    "gradient_norm", "gradient_cosine", "bm25", "keyword", "uniform",
]  # fmt: skip


def test_end_to_end_with_every_control(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "words.txt").write_text("cat\nred\n")
    out, against = tmp_path / "out", f"{world}/tokens:stay"
    more = ("--against", against, "--rule", "two_objective", "--alpha", "0.5", "--controls", *CONTROLS, "--keywords",
            str(tmp_path / "words.txt"), "--seeds", "2", "--original", "prediction")  # fmt: skip
    assert call(world, out, "tokens:go", *more) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "negative = proponent, training on it lowers the query's loss" in told
    assert "Selecting tokens is" in told
    rows = rows_of(world)
    go, stay = run_scores(world, "go").mean(-1), run_scores(world, "stay")
    mixed = go - 0.5 * stay
    found = files.read(out, rows)
    torch.testing.assert_close(found, (mixed / mixed.abs().sum() * rows.targets).float(), rtol=1e-5, atol=1e-7)
    info = json.loads((out / "info.json").read_text())
    assert info["scores"][0]["columns"] == 2
    assert info["scores"][0]["rows"] == "equal by hash"
    assert info["analysis"]["count"] == rows.targets == info["counts"]["real_tokens"]
    names = {path.name.split("-")[0] for path in (out / "controls").iterdir()}
    assert names == set(CONTROLS)
    assert (out / "controls/random_count-1").exists()
    for path in (out / "controls").iterdir():
        control = files.read(path, rows)
        if path.name == "uniform":
            assert control.sum() == rows.targets
        else:
            assert torch.equal(control.flatten().sort().values, found.flatten().sort().values), path.name
            assert not torch.equal(control, found), path.name
    theirs = torch.load(out / "original/per_token_scores.pt", weights_only=True)
    torch.testing.assert_close(theirs[:, :-1], go[:, 1:].float())
    before = (out / "weights.safetensors").read_bytes()
    assert call(world, out, "tokens:go", *more) == 0
    assert "is done" in capsys.readouterr().out
    assert (out / "weights.safetensors").read_bytes() == before
    assert call(world, out, "tokens:go", *more, "--rule", "value") == 2
    assert "rule: 'two_objective' → 'value'" in capsys.readouterr().err
    assert call(world, tmp_path / "again", "tokens:go", *more) == 0
    assert (tmp_path / "again/weights.safetensors").read_bytes() == before


def test_documents_end_to_end(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--against", f"{world}/tokens:stay", "--rule", "documents", "--k", "3", "--alpha", "0.1", "--use", "removal",
            "--controls", "random_count", "sign_flipped", "retain_only", "gradient_norm", "gradient_cosine",
            "bm25")  # fmt: skip
    assert call(world, out, "tokens:go/1", *more) == 0
    documents = torch.load(world / "tokens/doc_ids.pt", weights_only=True)
    go, stay = run_scores(world, "go")[..., 1], run_scores(world, "stay")
    strength = (-go).clamp_min(0) - 0.1 * (-stay).clamp_min(0)
    totals = torch.zeros(14, dtype=torch.float64).index_add_(0, documents.flatten(), strength.flatten())
    kept = sorted(totals.argsort(descending=True)[:3].tolist())
    assert files.documents(out) == kept
    rows = rows_of(world)
    found = files.read(out, rows, signed=False)
    assert float(found.sum()) == pytest.approx(rows.targets, rel=1e-6)
    assert {int(d) for d in documents[found > 0]} == set(kept)
    lines = (out / "documents.jsonl").read_text().splitlines()
    sources = (world / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [json.loads(sources[one]) for one in kept]
    for path in (out / "controls").iterdir():
        assert len(files.documents(path)) == 3, path.name
    assert magic(world, f"{tmp_path}/kept", "train", "--data.dataset", str(out / "documents.jsonl"), "--query.dataset",
                 str(world / "go.jsonl")) == 0  # fmt: skip


def test_gradient_rivals_are_the_gradients(world: Path, tmp_path: Path) -> None:
    """Norms and cosines of tokens against plain autograd on the trained model's own loss."""
    from torch.nn.functional import cosine_similarity, cross_entropy

    from retrograd.select.rivals import gradients, query_gradient
    from retrograd.stages.opened import open_run

    run = open_run(world / "tokens")
    places = places_of(run.loaded.rows)
    found = gradients(run, places, query_gradient(run, "stay", slice(0, 1)), by_document=False)
    summed = gradients(run, places, query_gradient(run, "stay", slice(0, 1)), by_document=True)
    model, params = run.loaded.model.module, run.trajectory().train().params
    model.eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if name in params:
                leaf.copy_(params[name])
    live = {name: leaf for name, leaf in model.named_parameters() if name in params}
    query = torch.cat([query_gradient(run, "stay", slice(0, 1))[name].flatten() for name in live])
    total: dict[int, Tensor] = {}
    for number in range(12):
        row, column = int(places.row[number]), int(places.column[number])
        ids = torch.from_numpy(run.loaded.rows.input_ids[row])[None]
        loss = cross_entropy(model(input_ids=ids).logits[0, column - 1], ids[0, column])
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(live.values()))]).double()
        assert float(found.norm[number]) == pytest.approx(float(flat.norm()), rel=1e-8)
        assert float(found.cosine[number]) == pytest.approx(float(cosine_similarity(flat, query, 0)), abs=1e-8)
        total[int(places.document[number])] = total.get(int(places.document[number]), 0) + flat
    first = int(places.document[0])
    assert int((places.document == first).sum()) <= 12
    assert float(summed.norm[0]) == pytest.approx(float(total[first].norm()), rel=1e-8)


def test_scores_of_documents_end_to_end(world: Path, tmp_path: Path) -> None:
    assert call(world, tmp_path / "out", "documents", "--use", "removal") == 0
    scores = torch.load(world / "documents/scores.pt", weights_only=True).double()
    documents = torch.load(world / "tokens/doc_ids.pt", weights_only=True)
    rows = rows_of(world, "documents")
    mask = torch.zeros(len(rows), rows.max_length, dtype=torch.bool)
    for number, one in enumerate(rows.target_mask):
        mask[number, : len(one)] = torch.from_numpy(one)
    wanted = torch.where(mask, (-scores).clamp_min(0)[documents], torch.zeros((), dtype=torch.float64))
    found = files.read(tmp_path / "out", rows)
    torch.testing.assert_close(found, (wanted * rows.targets / wanted.sum()).float(), rtol=1e-5, atol=1e-7)
    names = {path.name.split("-")[0] for path in (tmp_path / "out/controls").iterdir()}
    assert names == {"random_count", "sign_flipped", "uniform"}


def test_statistics_ignore_padding(world: Path, tmp_path: Path) -> None:
    """The same tokens with more padding have the same weights: a longer row of another document only adds zeros."""
    places = places_of(ROWS)
    wide = torch.zeros(3, 50)
    wide[:, :4] = places.scatter(TAU)
    torch.save(wide, tmp_path / "wide.pt")
    tau = file_scores(tmp_path / "wide.pt", None, places, Stated("negative", "target"))[0]
    for rule in ("value", "rank", "top_q", "soft_sign"):
        assert torch.equal(weigh(Weighing(rule), places, tau, None), weigh(Weighing(rule), places, TAU, None))  # type: ignore[arg-type]


def test_means_of_queries_and_files_beside_runs(world: Path, tmp_path: Path) -> None:
    several = [
        "select",
        str(tmp_path / "mean"),
        "--scores",
        f"{world}/tokens:stay",
        f"{world}/tokens:stay2",
        "--controls",
    ]
    assert main(several) == 0
    mean = (run_scores(world, "stay") + run_scores(world, "stay2")) / 2
    rows = rows_of(world)
    wanted = (mean / mean.abs().sum() * rows.targets).float()
    torch.testing.assert_close(files.read(tmp_path / "mean", rows), wanted, rtol=1e-5, atol=1e-7)
    assert not (tmp_path / "mean/controls").exists()
    torch.save(-mean, tmp_path / "mine.pt")
    mine = ["select", str(tmp_path / "mine"), "--scores", str(tmp_path / "mine.pt"), "--rows", str(world / "tokens"),
            "--sign", "positive", "--alignment", "target", "--controls", "random_count"]  # fmt: skip
    assert main(mine) == 0
    assert torch.equal(files.read(tmp_path / "mine", rows), files.read(tmp_path / "mean", rows))
    table = ["select", str(tmp_path / "table"), "--scores", f"{world}/tokens/scores.parquet:score_stay", "--rows",
             str(world / "tokens"), "--controls"]  # fmt: skip
    assert main(table) == 0  # our own table says its sign and alignment
    stay = run_scores(world, "stay")
    wanted = (stay / stay.abs().sum() * rows.targets).float()
    torch.testing.assert_close(files.read(tmp_path / "table", rows), wanted, rtol=1e-5, atol=1e-7)
    settings = yaml.safe_load((world / "tokens/run_config.yaml").read_text())
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({name: settings[name] for name in ("model", "data")}))
    other = ["select", str(tmp_path / "yaml"), "--scores", str(tmp_path / "mine.pt"), "--rows",
             str(tmp_path / "rows.yaml"), "--sign", "positive", "--alignment", "target", "--controls"]  # fmt: skip
    assert main(other) == 0
    assert torch.equal(files.read(tmp_path / "yaml", rows), files.read(tmp_path / "mean", rows))


def test_a_query_that_was_added_later(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "documents", tmp_path / "run")
    assert main(["query", str(tmp_path / "run"), "--name", "late", "--query.dataset", str(world / "stay.jsonl"),
                 "--query.form", "cloze"]) == 0  # fmt: skip
    assert main(["select", str(tmp_path / "out"), "--scores", f"{tmp_path}/run:late", "--controls"]) == 0
    scores = torch.load(tmp_path / "run/queries/late/scores.pt", weights_only=True)
    documents = torch.load(world / "tokens/doc_ids.pt", weights_only=True)
    found = files.read(tmp_path / "out", rows_of(world, "documents"))
    there = found != 0
    assert torch.equal(found[there] > 0, scores[documents][there] > 0)
    torch.save(scores + 1, tmp_path / "run/queries/late/scores.pt")
    with pytest.raises(ValueError, match=r"it has changed since. Run again"):
        refuse("select", str(tmp_path / "two"), "--scores", f"{tmp_path}/run:late")


def refuse(*arguments: str) -> None:
    """Run the command, which has to fail as the user's fault, and raise what it says."""
    import os
    from unittest import mock

    assert main(list(arguments)) == 2
    with mock.patch.dict(os.environ, {"RETROGRAD_TRACEBACK": "1"}):
        main(list(arguments))


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "several queries": (("--scores", "W/tokens"), r"has several queries: .*Name one: .*tokens:"),
    "no such query": (("--scores", "W/tokens:none"), "has no query 'none'; it has"),
    "no such run": (("--scores", "W/nowhere:go"), "nothing exists at"),
    "no run": (("--scores", "W/model"), "scores from files do not say which rows they belong to"),
    "other folder": (("--scores", "W/model", "--rows", "W/tokens"), "is neither a run .* nor in the original layout"),
    "other rows": (
        ("--scores", "W/tokens:go", "--against", "W/fewer"),
        r"are of other rows \(hash \w+, 8 rows, \d+ targets\) than the data here \(hash \w+, 13 rows, \d+ targets\)",
    ),
    "mixed": (("--scores", "W/tokens:go", "W/documents"), r"scores of tokens and of documents do not mix"),
    "levels": (("--scores", "W/tokens:go", "--against", "W/documents"), "--scores are of tokens and --against of doc"),
    "sign of a run": (("--scores", "W/tokens:go", "--sign", "positive"), "its scores are negative for proponents"),
    "alignment of a run": (
        ("--scores", "W/tokens:go", "--against", "W/tokens:stay", "--against_alignment", "prediction"),
        "--against_sign or --against_alignment says otherwise",
    ),
    "against nothing": (("--scores", "W/tokens:go", "--against_sign", "negative"), "speak of --against, which names"),
    "no scores": (("--scores",), "--scores names nothing"),
    "paired": (("--scores", "W/tokens:go", "--rule", "selective"), "give the other one with --against"),
    "k": (("--scores", "W/tokens:go", "--k", "3"), "--k is for --rule documents, and the rule is value"),
    "too many": (("--scores", "W/documents", "--rule", "documents", "--k", "50"), "it keeps from 1 to 13 documents"),
    "q": (("--scores", "W/tokens:go", "--q", "0"), "--q is 0.0"),
    "alpha": (("--scores", "W/tokens:go", "--alpha", "nan"), "--alpha is nan"),
    "clip": (("--scores", "W/tokens:go", "--clip", "0"), "--clip is 0.0; it has to be above 0"),
    "seeds": (("--scores", "W/tokens:go", "--seeds", "0"), "--seeds is 0"),
    "original": (("--scores", "W/documents", "--original", "target"), "--original writes scores of tokens"),
    "retain only": (("--scores", "W/tokens:go", "--controls", "retain_only"), "give them with --against"),
    "keyword": (("--scores", "W/tokens:go", "--controls", "keyword"), "control keyword needs --keywords"),
    "no text": (("--scores", "W/tokens:gap", "--controls", "bm25"), "query 'gap' has no text for control bm25"),
    "positions": (
        ("--scores", "W/documents", "--controls", "permuted_in_row"), "here whole documents are weighed",
    ),
    "file rival": (
        ("--scores", "W/tokens/scores.parquet:score_stay", "--rows", "W/tokens", "--controls", "gradient_norm"),
        "need a trained model, and .* is a file",
    ),
    "not finite": (("--scores", "W/nan.pt", "--rows", "W/tokens", "--sign", "negative"), "2 of 13 scores of .* NaN"),
    "no model": (("--scores", "W/nan.pt", "--rows", "W/bad.yaml"), "cannot load a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(world: Path, tmp_path: Path, case: str) -> None:
    torch.save(torch.full((14,), float("nan")).index_fill_(0, torch.arange(1, 14), 1.0).index_fill_(
        0, tensor([5]), float("nan")), world / "nan.pt")  # fmt: skip
    settings = yaml.safe_load((world / "tokens/run_config.yaml").read_text())
    (world / "bad.yaml").write_text(yaml.safe_dump({"model": str(world / "nothing.d"), "data": settings["data"]}))
    arguments, told = BAD[case]
    with pytest.raises(ValueError, match=told):
        refuse("select", str(tmp_path / "out"), *(one.replace("W/", f"{world}/") for one in arguments))
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else(world: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ValueError, match="exists and is no selection"):
        refuse("select", str(tmp_path / "other"), "--scores", f"{world}/tokens:go")
    shutil.copytree(world / "documents", tmp_path / "run")
    arguments = ("select", str(tmp_path / "out"), "--scores", str(tmp_path / "run"), "--controls")
    assert main(list(arguments)) == 0
    scores = torch.load(tmp_path / "run/scores.pt", weights_only=True)
    torch.save(scores * 2, tmp_path / "run/scores.pt")
    with pytest.raises(ValueError, match=r"was selected from .* with SHA-256"):
        refuse(*arguments)
    with pytest.raises(ValueError, match=r"it has changed since. Run again"):
        refuse("select", str(tmp_path / "two"), *arguments[2:])
