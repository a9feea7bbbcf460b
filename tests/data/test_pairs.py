"""Forget and retain rows under one tensor of weights, as a function of the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from unlearning import ALTERNATIVES, FORGET, RETAIN

from retrograd.core import tree
from retrograd.core.step import coefficients, micro_batches
from retrograd.data.pairs import ALTERNATIVE, PairStream, joined
from retrograd.data.pairs import FORGET as FORGET_SIDE
from retrograd.data.pairs import RETAIN as RETAIN_SIDE
from retrograd.data.rows import Rows
from retrograd.data.stream import DataStream, token_rows


def stream(**options: Any) -> PairStream:
    return PairStream(FORGET, RETAIN, **{"forget_batch": 2, "retain_batch": 2, "dtype": torch.float64, **options})


def test_one_tensor_holds_the_weights_of_both_sides() -> None:
    """Entry (row, k) multiplies the loss of token k of that row: forget rows first, then retain rows."""
    pairs = stream(forget_batch=1, retain_batch=1, shuffle=False)
    assert pairs.weights.shape == (8, max(map(len, FORGET + RETAIN)))
    for step in range(len(pairs)):
        batch = pairs[step]
        for place, (row, side) in enumerate(zip(pairs.rows_at(step), batch.inputs["side"])):
            tokens = FORGET[row] if side == FORGET_SIDE else RETAIN[row - len(FORGET)]
            assert (row < len(FORGET)) == (side == FORGET_SIDE)
            assert batch.inputs["input_ids"][place, : len(tokens)].tolist() == tokens
            assert batch.index[place].tolist() == [
                row * pairs.weights.shape[1] + k for k in range(batch.index.shape[1])
            ]


def test_each_side_has_the_normaliser_of_the_whole_batch() -> None:
    pairs = stream()
    for step in range(len(pairs)):
        batch = pairs[step]
        for side in (FORGET_SIDE, RETAIN_SIDE):
            of_side = batch.scale[batch.inputs["side"] == side]
            assert float(of_side.sum()) == pytest.approx(1, abs=1e-12)
            assert len(of_side[of_side > 0].unique()) == 1
        parts = micro_batches(batch, pairs.unit)
        assert torch.equal(torch.cat([part.scale for part in parts]), batch.scale)
        assert torch.equal(batch.inputs["scale"], batch.scale)
        assert float(batch.inputs["share"][batch.inputs["side"] == FORGET_SIDE].sum()) == 1


def test_weights_of_one_come_out_of_their_coefficients_to_the_bit() -> None:
    batch = stream(dtype=torch.float32)[0]
    w = (coefficients(batch, stream(dtype=torch.float32).weights) / batch.inputs["scale"])[batch.scale > 0]
    assert torch.equal(w, torch.ones_like(w))


def test_the_longer_side_sets_the_length_and_the_shorter_one_starts_over() -> None:
    """5 forget rows by 2 for 2 epochs are 5 steps; the 3 retain rows go round, each pass in an order of its own."""
    pairs = stream(epochs=2)
    assert len(pairs) == 5
    rows = np.concatenate([pairs.rows_at(t) for t in range(5)])
    forget, retain = rows[rows < 5], rows[rows >= 5]
    assert np.bincount(forget).tolist() == [2] * 5
    assert sorted(retain[:3]) == sorted(retain[3:6]) == sorted(retain[6:9]) == [5, 6, 7]
    assert sorted(np.bincount(retain - 5).tolist()) == [3, 3, 4]
    assert len(stream(retain_batch=1)) == 3
    assert [len(steps) for steps in pairs.steps_of_rows()] == [2] * 5 + np.bincount(retain - 5).tolist()


def test_a_last_batch_is_whole() -> None:
    """3 batches of 2 from 5 forget rows: the last takes one row of the next pass, so that no pair goes missing."""
    pairs = stream()
    rows = np.concatenate([pairs.rows_at(t) for t in range(3)])
    assert len(pairs) == 3
    assert sorted(np.bincount(rows[rows < 5]).tolist()) == [1, 1, 1, 1, 2]
    assert {len(pairs.rows_at(t)) for t in range(3)} == {4}


def test_the_forget_side_has_the_order_of_a_data_stream() -> None:
    pairs, plain = stream(seed=3, forget_batch=5), DataStream(token_rows(FORGET), 5, seed=3)
    rows = pairs.rows_at(0)
    assert rows[rows < 5].tolist() == plain.rows_at(0).tolist()
    unshuffled = stream(shuffle=False, forget_batch=5).rows_at(0)
    assert unshuffled[unshuffled < 5].tolist() == [0, 1, 2, 3, 4]


def test_batches_are_a_function_of_step_and_seed() -> None:
    one, other = stream(seed=1, epochs=3), stream(seed=1, epochs=3)
    digests = [tree.digest(other[t]) for t in reversed(range(len(other)))]
    assert [tree.digest(one[t]) for t in range(len(one))] == digests[::-1]
    assert [one.rows_at(t).tolist() for t in range(6)] != [
        stream(seed=2, epochs=3).rows_at(t).tolist() for t in range(6)
    ]
    with pytest.raises(IndexError, match="step 8 is outside this stream of 8 steps"):
        one[8]


def test_micro_batches_keep_units_together_and_number_them_over_the_run() -> None:
    """4 forget and 2 retain rows: units of 2 and 1, two of them a batch."""
    pairs = stream(forget_batch=4, retain_batch=2)
    assert (pairs.units, pairs.unit, pairs.batch_size) == (2, 3, 6)
    numbers = []
    for step in range(len(pairs)):
        for part in micro_batches(pairs[step], pairs.unit):
            assert part.inputs["side"].tolist() == [FORGET_SIDE, FORGET_SIDE, RETAIN_SIDE]
            assert len(part.inputs["pair"].unique()) == 1
            numbers.append(int(part.inputs["pair"][0]))
    assert numbers == list(range(2 * len(pairs)))


def test_an_alternative_goes_with_its_forget_row() -> None:
    pairs = PairStream(FORGET, RETAIN, ALTERNATIVES, forget_batch=2, retain_batch=1)
    assert pairs.weights.shape[0] == 13
    for step in range(len(pairs)):
        rows, side = pairs.rows_at(step), pairs[step].inputs["side"].numpy()
        assert (rows[side == ALTERNATIVE] - 8).tolist() == rows[side == FORGET_SIDE].tolist()
    with pytest.raises(ValueError, match="4 alternative rows do not pair with 5 forget rows"):
        PairStream(FORGET, RETAIN, ALTERNATIVES[:4], forget_batch=2, retain_batch=1)


def test_progress_is_counted_in_steps_and_capped() -> None:
    assert [float(stream(epochs=2)[t].inputs["progress"][0]) for t in range(5)] == [0, 0.2, 0.4, 0.6, 0.8]
    assert [float(stream(horizon=2)[t].inputs["progress"][0]) for t in range(3)] == [0, 0.5, 1]


def test_rows_joined_keep_their_documents_apart() -> None:
    both = joined([token_rows(FORGET), token_rows(RETAIN)])
    assert both.documents == 8
    assert [int(documents[0]) for documents in both.doc_ids] == list(range(8))
    assert len(both) == 8


def test_retain_rows_may_be_left_out() -> None:
    pairs = PairStream(FORGET, None, forget_batch=2, retain_batch=1)
    assert pairs.weights.shape[0] == 5
    assert pairs[0].inputs["side"].tolist() == [FORGET_SIDE] * 2


def test_weights_may_be_wider_than_the_rows() -> None:
    wide = stream(weights=torch.arange(8 * 9, dtype=torch.float64).view(8, 9))
    batch = wide[0]
    found = wide.weights.flatten()[batch.index]
    expected = torch.stack([wide.weights[row, : batch.index.shape[1]] for row in wide.rows_at(0)])
    assert torch.equal(found, expected)


def test_the_weights_of_a_side_are_cut_out_of_all() -> None:
    pairs = stream()
    pairs = stream(weights=torch.arange(pairs.weights.numel(), dtype=torch.float64).view_as(pairs.weights))
    assert torch.equal(pairs.side_weights(FORGET_SIDE), pairs.weights[:5])
    assert torch.equal(pairs.side_weights(RETAIN_SIDE), pairs.weights[5:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_batch": 0}, "forget_batch is 0; it has to be at least 1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"horizon": 0}, "horizon is 0; progress needs at least 1 step"),
        ({"weights": torch.ones(5, 6).double()}, r"weights of shape \(5, 6\) do not fit: .*\(8, L\)"),
        ({"weights": torch.ones(8).double()}, r"weights of shape \(8,\) do not fit"),
        ({"weights": torch.ones(8, 4).double()}, r"weights of shape \(8, 4\) do not fit: .* at least 6"),
        ({"weights": torch.full((8, 6), torch.nan).double()}, "48 of 48 data weights are NaN"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stream(**change)


def test_sides_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no forget row: nothing is left after selection"):
        PairStream([], RETAIN, forget_batch=1, retain_batch=1)
    rows = token_rows(RETAIN)
    packed = Rows(rows.input_ids, rows.target_mask, rows.doc_ids, rows.documents, {}, packed=True)
    with pytest.raises(ValueError, match="the retain rows are packed"):
        PairStream(FORGET, packed, forget_batch=1, retain_batch=1)


def test_a_curriculum_visits_forget_rows_by_the_mean_weight_of_their_targets() -> None:
    """The weight of the first token, which predicts nothing, and of columns beyond a row count for nothing."""
    means = [0.5, 2.0, 1.0, 2.0, 0.1]
    weights = torch.ones(8, 6, dtype=torch.float64)
    for row, mean in enumerate(means):
        weights[row, 1 : len(FORGET[row])] = mean
        weights[row, 0] = weights[row, len(FORGET[row]) :] = 50.0 - 10 * row
    heavy, light = ([1, 3, 2, 0, 4], [4, 0, 2, 1, 3])

    def visited(**options: Any) -> tuple[list[int], list[int]]:
        pairs = stream(weights=weights, forget_batch=1, retain_batch=1, epochs=2, **options)
        rows = [pairs.rows_at(step) for step in range(len(pairs))]
        return [int(pair[0]) for pair in rows], [int(pair[1]) for pair in rows]

    assert visited(order="heaviest")[0] == heavy * 2
    assert visited(order="lightest", shuffle=False)[0] == light * 2
    shuffled = visited()
    assert sorted(shuffled[0][:5]) == [0, 1, 2, 3, 4]
    assert shuffled[0][:5] not in (heavy, light)
    assert visited(order="heaviest")[1] == shuffled[1]  # retain rows as before
