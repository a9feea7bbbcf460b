"""Replay plans: laws over every plan, optimality, an oracle, and a run of each plan on real values."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrograd.core.plan import (
    Advance,
    Cost,
    Drop,
    Plan,
    Restore,
    Reverse,
    Snapshot,
    Turn,
    binomial,
    binomial_advances,
    check,
    interval,
    log,
    make,
    resumed,
    save_all,
    sqrt,
)

# Every kind of plan, each with a few settings: a new one joins this list and gets every law.
PLANS: dict[str, Callable[[int], Plan]] = {
    "all": save_all,
    "sqrt": sqrt,
    "log": log,
    **{f"interval-{k}": lambda steps, k=k: interval(steps, k) for k in (1, 2, 3, 7, 16, 1000)},
    **{f"binomial-{s}": lambda steps, s=s: binomial(steps, s) for s in (1, 2, 3, 5, 10, 100)},
}
STEPS = [*range(1, 65), 100, 127, 128, 129, 250]

plan_kinds = pytest.mark.parametrize("build", PLANS.values(), ids=PLANS.keys())


def typed(plan: Plan) -> list[tuple[type, Plan]]:
    """For comparing plans: as tuples alone, Snapshot(3) == Drop(3)."""
    return [(type(action), action) for action in plan]


def assert_stack(plan: Plan, held: Iterable[int] = ()) -> None:
    """Only the state held last is ever restored or dropped, and a later state is held than all before it."""
    stack = sorted(held)
    for action in plan:
        if isinstance(action, Snapshot):
            assert not stack or action.step > stack[-1]
            stack.append(action.step)
        elif isinstance(action, Restore):
            assert action.step == stack[-1]
        elif isinstance(action, Drop):
            assert action.step == stack.pop()
    assert not stack


PRIME = 1_000_003


def train_step(state: int, step: int) -> int:
    return state * (step + 2) % PRIME


def true_states(steps: int) -> list[int]:
    states = [7]
    for step in range(steps):
        states.append(train_step(states[-1], step))
    return states


def assert_runs(plan: Plan, steps: int, held: Iterable[int] = ()) -> None:
    """Run a plan on a toy training run: each Reverse, and the Turn, finds the state training went through."""
    truth = true_states(steps)
    slots = {step: truth[step] for step in held}
    state = None if slots else truth[0]
    reversed_steps = []
    for action in plan:
        match action:
            case Advance(start, stop):
                assert state is not None
                for step in range(start, stop):
                    state = train_step(state, step)
            case Snapshot(step):
                slots[step] = state
            case Restore(step):
                state = slots[step]
            case Drop(step):
                del slots[step]
            case Turn():
                assert train_step(state, steps - 1) == truth[steps]
            case Reverse(step):
                assert state == truth[step]
                reversed_steps.append(step)
    assert reversed_steps == list(range(steps))[::-1]


# Laws of every plan


@plan_kinds
def test_plans_are_legal_stacks_that_find_the_true_states(build):
    for steps in STEPS:
        plan = build(steps)
        cost = check(plan, steps)
        assert_stack(plan)
        assert_runs(plan, steps)
        assert plan[0] == Snapshot(0)
        assert isinstance(plan[0], Snapshot)
        assert [a.step for a in plan if isinstance(a, Reverse)] == list(range(steps))[::-1]
        assert cost.advances == sum(a.stop - a.start for a in plan if isinstance(a, Advance))
        assert cost.replays == cost.advances - (steps - 1) >= 0
        assert cost.snapshots == sum(isinstance(a, Snapshot) for a in plan) >= cost.slots
        assert cost.restores == sum(isinstance(a, Restore) for a in plan) == steps - 1


@plan_kinds
def test_no_plan_beats_the_binomial_one_of_as_many_slots(build):
    for steps in STEPS:
        cost = check(build(steps), steps)
        assert cost.advances >= binomial_advances(steps, cost.slots)


@plan_kinds
def test_two_thousand_steps(build):
    plan = build(2_000)
    check(plan, 2_000)
    assert_stack(plan)


# Costs of each kind


def test_save_all_holds_every_state_and_replays_none():
    for steps in STEPS:
        assert check(save_all(steps), steps) == Cost(steps - 1, 0, steps, steps, steps - 1)


def test_interval_replays_each_segment_but_the_last_once():
    for steps in STEPS:
        for every in (1, 2, 3, 7, 16, 1000):
            segments = math.ceil(steps / every)
            cost = check(interval(steps, every), steps)
            assert cost.replays == (segments - 1) * (every - 1)
            assert cost.slots == max(segments - 1 + (steps - 1) % every + 1, (segments > 1) * (segments + every - 2))
            assert cost.snapshots == steps


def test_interval_holds_its_bases_and_the_last_segment_in_training():
    plan = interval(10, 4)
    before = plan[: next(i for i, action in enumerate(plan) if isinstance(action, Turn))]
    assert [a.step for a in before if isinstance(a, Snapshot)] == [0, 4, 8, 9]


def test_one_segment_or_segments_of_one_hold_every_state():
    for steps in STEPS:
        assert typed(interval(steps, steps)) == typed(interval(steps, 1)) == typed(save_all(steps))


def test_sqrt_is_the_interval_of_the_root_rounded_up():
    assert typed(sqrt(16)) == typed(interval(16, 4))
    assert typed(sqrt(17)) == typed(interval(17, 5))
    assert check(sqrt(10_000), 10_000) == Cost(19_800, 9_801, 199, 10_000, 9_999)


def test_log_holds_as_many_states_as_steps_can_be_halved():
    for steps in STEPS:
        assert check(log(steps), steps).slots == max(1, math.ceil(math.log2(steps)))
    for power in range(1, 12):
        # a(n) = n/2 + 2 a(n/2)
        assert check(log(2**power), 2**power).advances == power * 2 ** (power - 1)


def assert_closed_form(steps: int, slots: int) -> None:
    cost = check(binomial(steps, slots), steps)
    assert cost.advances == binomial_advances(steps, slots), (steps, slots)
    assert cost.slots == max(1, min(slots, steps - 1)), (steps, slots)


def test_binomial_takes_exactly_the_closed_form():
    for slots in range(1, 21):
        for steps in [*range(1, 31), *range(31 + slots, 301, 20)]:
            assert_closed_form(steps, slots)


@pytest.mark.slow
def test_binomial_takes_exactly_the_closed_form_on_the_whole_grid():
    for slots in range(1, 21):
        for steps in range(1, 301):
            assert_closed_form(steps, slots)


@cache
def fewest(steps: int, slots: int) -> tuple[int, int]:
    """Fewest advances, and among those fewest snapshots, to reverse `steps` from a held state: every stack tried."""
    straight = (steps * (steps - 1) // 2, 0)
    if slots == 1 or steps == 1:
        return straight
    choices = [straight]
    for split in range(1, steps):
        left, right = fewest(split, slots), fewest(steps - split, slots - 1)
        choices.append((split + left[0] + right[0], 1 + left[1] + right[1]))
    return min(choices)


def test_binomial_is_optimal_by_brute_force():
    for steps in range(1, 51):
        for slots in range(1, 11):
            cost = check(binomial(steps, slots), steps)
            # the snapshot of state 0 is not the recursion's
            assert (cost.advances, cost.snapshots - 1) == fewest(steps, slots), (steps, slots)


def fewest_of_any_plan(steps: int, slots: int) -> int:
    """Fewest advances of all legal plans, stacks or not: the shortest path over (working state, held, left)."""
    queue = deque([(0, 0, frozenset[int](), steps)])
    done = set()
    while queue:
        advances, here, held, left = queue.popleft()
        if left == 0:
            return advances
        if (here, held, left) in done:
            continue
        done.add((here, held, left))
        free = [(here, held - {step}, left) for step in held] + [(step, held, left) for step in held]
        if len(held) < slots:
            free.append((here, held | {here}, left))
        if here == left - 1:
            free.append((here, held, left - 1))
        queue.extendleft((advances, *to) for to in free)
        if here < left - 1:
            queue.append((advances + 1, here + 1, held, left))
    raise AssertionError("no plan")


def test_no_legal_plan_at_all_beats_the_binomial_one():
    for steps in range(1, 9):
        for slots in (1, 2, 3, 4):
            assert fewest_of_any_plan(steps, slots) == binomial_advances(steps, slots), (steps, slots)


@pytest.mark.parametrize(
    "steps, slots, extra",
    [
        *zip([250] * 4, (10, 16, 21, 32), (1.69, 1.32, 0.91, 0.87)),
        *zip([1250] * 4, (10, 16, 32, 49), (2.91, 2.09, 1.52, 0.96)),
        *zip([10_000] * 4, (10, 16, 32, 140), (4.76, 3.40, 2.29, 0.99)),
    ],
)
def test_binomial_table(steps, slots, extra):
    """The figures of the mathematics page, section 5."""
    cost = check(binomial(steps, slots), steps)
    assert cost.slots == slots
    assert round(cost.replays / steps, 2) == extra


def test_binomial_with_few_slots_does_not_recurse_deeply():
    for slots in (1, 2, 3):
        assert check(binomial(10_000, slots), 10_000).advances == binomial_advances(10_000, slots)
    assert binomial_advances(10_000, 1) == 9_999 * 10_000 // 2


def test_slots_beyond_the_states_change_nothing():
    for steps in (1, 2, 3, 10, 50):
        full = typed(binomial(steps, max(1, steps - 1)))
        assert full == typed(binomial(steps, steps)) == typed(binomial(steps, 10**9))
        assert binomial_advances(steps, 10**9) == steps - 1


@pytest.mark.parametrize("trajectory", ["maximum", "revolve"])
def test_binomial_agrees_with_checkpoint_schedules(trajectory):
    """Their forward step that keeps adjoint data is for the reverse right after it: part of our Reverse or Turn."""
    oracle = pytest.importorskip("checkpoint_schedules")
    for steps in [*range(2, 40), 100, 250]:
        for slots in (1, 2, 3, 4, 7, 12, 30):
            advances = snapshots = slots_now = peak = 0
            schedule = oracle.MultistageCheckpointSchedule(steps, slots, 0, trajectory=trajectory)
            for action in schedule:
                if isinstance(action, oracle.Forward):
                    advances += 0 if action.write_adj_deps else len(action)
                    snapshots += action.write_ics
                    slots_now += action.write_ics
                    peak = max(peak, slots_now)
                elif isinstance(action, oracle.Move):
                    slots_now -= 1
                elif isinstance(action, oracle.EndReverse):
                    break
            cost = check(binomial(steps, slots), steps)
            assert (cost.advances, cost.slots, cost.snapshots) == (advances, peak, snapshots), (steps, slots)


# Resumed plans


@given(st.integers(1, 120), st.sets(st.integers(1, 150), max_size=12), st.integers(0, 12), st.booleans())
def test_resumed_plans_are_legal_from_any_held_states(steps, more, slots, turn):
    held = {0, *more}
    below = sorted(t for t in held if t < steps)
    plan = resumed(steps, held, slots, turn=turn)
    cost = check(plan, steps, held=held, turn=turn)
    assert_stack(plan, below)
    assert_runs(plan, steps, below)
    assert typed(plan[:1]) == [(Restore, (below[-1],))]
    assert cost.slots <= len(below) + slots
    lengths = [stop - base for base, stop in zip(below, [*below[1:], steps])]
    assert cost.advances == cost.replays == sum(binomial_advances(length, slots + 1) for length in lengths)
    assert sum(isinstance(a, Turn) for a in plan) == turn


@pytest.mark.parametrize("turn", [True, False])
def test_resuming_from_the_initial_state_costs_as_much_as_training(turn):
    for steps in STEPS:
        for slots in (0, 1, 2, 9, 200):
            whole = check(binomial(steps, slots + 1), steps)
            again = check(resumed(steps, [0], slots, turn=turn), steps, held=[0], turn=turn)
            assert (again.advances, again.slots) == (whole.advances, whole.slots)
            # the initial state is restored, where training snapshots it
            assert (again.snapshots, again.restores) == (whole.snapshots - 1, whole.restores + 1)


def test_resumed_does_not_reuse_the_room_of_dropped_bases():
    held = {0, 50, 100}
    new = most = 0
    for action in resumed(150, held, 3, turn=False):
        new += isinstance(action, Snapshot)
        new -= isinstance(action, Drop) and action.step not in held
        most = max(most, new)
    assert most == 3


def test_resumed_turns_in_the_last_segment():
    plan = resumed(6, iter([0, 4, 6, 9]), 1, turn=True)
    assert typed(plan[:4]) == [(Restore, (4,)), (Advance, (4, 5)), (Turn, ()), (Reverse, (5,))]


@pytest.mark.parametrize(
    "steps, held, slots, match",
    [
        (5, [3, 4], 2, r"held below step 5 are 3, 4, and the lowest has to be state 0"),
        (5, [-1, 0], 2, r"held below step 5 are -1, 0, and the lowest"),
        (5, [7], 2, r"held below step 5 are none"),
        (50, range(1, 20), 2, r"are 1, 2, 3, 4, 5, 6, 7, 8, … \(19 states\)"),
        (5, [0], -1, r"slots is -1; .* at least 0"),
        (0, [0], 1, r"steps is 0; it has to be at least 1"),
    ],
)
def test_resumed_refuses(steps, held, slots, match):
    with pytest.raises(ValueError, match=match):
        resumed(steps, held, slots, turn=True)


# Illegal plans

SNAP, TURN = Snapshot(0), Turn()


@pytest.mark.parametrize(
    "plan, steps, match",
    [
        ([Advance(1, 2)], 4, r"for 4 steps: action 0, Advance\(start=1, stop=2\): the working state is 0, not 1"),
        ([SNAP, Advance(0, 0)], 4, r"action 1, .*: an advance goes up, within states 0 to 3"),
        ([Advance(0, 2), Advance(2, 1)], 4, r"action 1, .*: an advance goes up"),
        ([Advance(0, 4)], 4, r"stop=4\): an advance goes up, within states 0 to 3"),
        ([Advance(-1, 2)], 4, r"start=-1, stop=2\): an advance goes up, within"),
        ([Snapshot(2)], 4, r"action 0, Snapshot\(step=2\): the working state is 0, not 2"),
        ([SNAP, SNAP], 4, r"action 1, Snapshot\(step=0\): state 0 is held already"),
        ([SNAP, Restore(2)], 4, r"action 1, Restore\(step=2\): state 2 is not held; held are 0$"),
        ([Restore(0)], 4, r"Restore\(step=0\): state 0 is not held; held are none"),
        ([SNAP, Drop(1)], 4, r"action 1, Drop\(step=1\): state 1 is not held; held are 0$"),
        ([SNAP, Drop(0), Drop(0)], 4, r"action 2, Drop\(step=0\): state 0 is not held; held are none"),
        ([SNAP, TURN], 4, r"action 1, Turn\(\): the working state is 0, not 3"),
        ([TURN, TURN], 1, r"action 1, Turn\(\): the cotangent exists already; there is one Turn at most"),
        ([TURN, Reverse(0), TURN], 1, r"action 2, Turn\(\): the cotangent exists already"),
        ([Reverse(0)], 1, r"action 0, Reverse\(step=0\): there is no cotangent before the Turn"),
        ([Advance(0, 1), TURN, Reverse(0)], 2, r"action 2, Reverse\(step=0\): the next step to reverse is 1"),
        ([TURN, Reverse(0), Reverse(0)], 1, r"action 2, .*: all steps are reversed"),
        ([SNAP, Advance(0, 1), TURN, Restore(0), Reverse(1)], 2, r"action 4, .*: the working state is 0, not 1"),
        ([], 3, r"ends after 0 actions with 3 of 3 steps not reversed and the Turn never came"),
        ([Advance(0, 2), TURN, Reverse(2)], 3, r"ends after 3 actions with 2 of 3 steps not reversed$"),
        ([SNAP, TURN, Reverse(0)], 1, r"ends after 3 actions still holding 0$"),
        ([], 0, r"steps is 0; it has to be at least 1"),
    ],
)
def test_illegal_plans_are_refused(plan, steps, match):
    with pytest.raises(ValueError, match=match):
        check(plan, steps)


@pytest.mark.parametrize(
    "plan, turn, match",
    [
        ([Advance(0, 1)], True, r"action 0, .*: there is no working state, 0 is needed"),
        ([Snapshot(1)], True, r"action 0, .*: there is no working state, 1 is needed"),
        ([Turn()], True, r"action 0, Turn\(\): there is no working state, 1 is needed"),
        ([Reverse(1)], False, r"action 0, .*: there is no working state, 1 is needed"),
        ([Restore(0), Advance(0, 1), Turn()], False, r"action 2, Turn\(\): the cotangent exists already"),
        ([Restore(5)], False, r"state 5 is not held; held are 0$"),
        ([Drop(5)], False, r"state 5 is not held; held are 0$"),
        ([Restore(0), Snapshot(0)], False, r"state 0 is held already"),
    ],
)
def test_illegal_resumed_plans_are_refused(plan, turn, match):
    with pytest.raises(ValueError, match=match):
        check(plan, 2, held=[0, 5], turn=turn)


@plan_kinds
def test_a_plan_with_any_one_action_left_out_is_refused(build):
    plan = build(13)
    for index in range(len(plan)):
        with pytest.raises(ValueError, match="illegal plan"):
            check(plan[:index] + plan[index + 1 :], 13)


def test_keep_allows_slots_held_at_the_end():
    kept = [action for action in save_all(3) if not isinstance(action, Drop)]
    assert check(kept, 3, keep=True) == Cost(2, 0, 3, 3, 2)
    with pytest.raises(ValueError, match=r"still holding 0, 1, 2$"):
        check(kept, 3)


# By name


def test_make_builds_each_kind():
    assert typed(make("all", 9)) == typed(save_all(9))
    assert typed(make("sqrt", 9)) == typed(sqrt(9))
    assert typed(make("log", 9, slots=2, every=3)) == typed(log(9))
    assert typed(make("interval", 9, every=4)) == typed(interval(9, 4))
    assert typed(make("binomial", 9, slots=3)) == typed(binomial(9, 3))


@pytest.mark.parametrize(
    "kind, steps, settings, match",
    [
        ("revolve", 5, {}, r"unknown kind of plan 'revolve'; the kinds are all, interval, sqrt, log, binomial"),
        ("binomial", 5, {}, r"binomial plan needs `slots`.*got None"),
        ("binomial", 5, {"slots": 0}, r"slots is 0; it has to be at least 1"),
        ("interval", 5, {"slots": 3}, r"interval plan needs `every`.*got None"),
        ("interval", 5, {"every": 0}, r"every is 0; it has to be at least 1"),
        *(
            (kind, 0, {"slots": 2, "every": 2}, r"steps is 0")
            for kind in ("all", "interval", "sqrt", "log", "binomial")
        ),
    ],
)
def test_make_refuses(kind, steps, settings, match):
    with pytest.raises(ValueError, match=match):
        make(kind, steps, **settings)


def test_builders_refuse_numbers_below_one():
    with pytest.raises(ValueError, match=r"slots is 0"):
        binomial(5, 0)
    with pytest.raises(ValueError, match=r"every is -2"):
        interval(5, -2)
    with pytest.raises(ValueError, match=r"slots is 0"):
        binomial_advances(5, 0)
    with pytest.raises(ValueError, match=r"steps is 0"):
        binomial_advances(0, 5)
