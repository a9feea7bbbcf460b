"""From scores to weights: every rule and control by hand, and what each control keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from selecting import MU, ROWS, TAU, double, many
from torch import Tensor

from retrograd.data.rows import Rows
from retrograd.data.stream import token_rows
from retrograd.select.controls import drawn, groups, matched
from retrograd.select.places import places_of
from retrograd.select.rules import Weighing, finish, key, rises, weigh
from retrograd.select.words import bm25, keyword_tokens, read_keywords

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
    assert weigh(Weighing("documents", alpha=-1.0, k=2), places, TAU, MU).tolist() == [
        1,
        0,
        1,
    ]  # 4, 4, 5; ties in order
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


def same_numbers(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.sort().values, b.sort().values)


def in_groups(labels: Tensor, weights: Tensor) -> list[list[float]]:
    return [sorted(weights[labels == one].tolist()) for one in labels.unique()]


@pytest.mark.parametrize("rule", ["value", "top_q", "negative_only", "two_objective"])
@pytest.mark.parametrize("control", ["random_count", "random_position", "random_class", "permuted_in_row"])
def test_random_controls_keep_what_they_say(control: Any, rule: Any) -> None:
    places, tau, mu = many()
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


@pytest.mark.parametrize("use", ["descent", "removal"])
@pytest.mark.parametrize("rule", [
    "value", "sign", "soft_sign", "clipped", "rank", "two_objective", "top_q", "positive_only", "negative_only",
    "documents",
])  # fmt: skip
def test_in_its_own_order_an_arm_is_itself(rule: Any, use: Any) -> None:
    """Which end of an order gets the large weights follows from rule and use alone."""
    places, tau, mu = many()
    if rule == "positive_only" and use == "removal":
        pytest.skip("refused")
    retain = mu if rule == "documents" else None if rule != "two_objective" or use == "removal" else mu
    if rule == "two_objective" and use == "removal":
        retain = torch.zeros_like(tau)  # else max(0, p − α g) and τ − α μ differ where μ > 0
    weighing = Weighing(rule, use, q=0.2, k=4)
    arm = weigh(weighing, places, tau, retain)
    order = key(weighing, places, tau, retain)
    again = matched("retain_only", arm, places, order=order, rising=rises(weighing), seed=0)
    assert torch.equal(again, arm)
    other_end = matched("sign_flipped", arm, places, order=-order, rising=rises(weighing), seed=0)
    assert not torch.equal(other_end, arm)
    assert same_numbers(other_end, arm)


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
