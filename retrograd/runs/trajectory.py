"""Run, resume, replay: THE loop. A trajectory is a training and the states kept from it.

What is durable of it, and how it comes back after a kill, is `runs/resume.py`. The bits are the same because replay is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograd.core import memory, tree
from retrograd.core import plan as plans
from retrograd.core.optim import Cotangent, Moments
from retrograd.core.residuals import Residuals
from retrograd.core.slots import BlankLedger, Ledger
from retrograd.core.step import State, Training, initial_state, micro_batches_of, needs_gradient, recovered
from retrograd.core.sweep import Advanced, Event, Remade, Reversed, Turned, accumulate, seed_cotangent, sweep
from retrograd.durable import make_folder
from retrograd.parallel.group import ALONE, here
from retrograd.parallel.pieces import PieceLedger, Pieces
from retrograd.parallel.shard import Sharded
from retrograd.parallel.split import Split
from retrograd.runs.gradients import StoredGradient
from retrograd.runs.resume import Durable, first_missing, read_digests
from retrograd.runs.states.budget import Replay, layout_of
from retrograd.runs.states.relay import part_of, relay
from retrograd.runs.states.store import Gradients, Store

__all__ = ["InPieces", "Ready", "Trajectory"]


class Trajectory:
    """One run of a training with the states kept from it.

    Args:
        training: Recipe, engine, stream and data weights.
        initial: State 0; or a later one, from which the run goes on: the steps before it are not this run's.
        replay: Which states are kept, and where.
        folder: For durable states; None keeps all in memory, and a kill loses the run.
        identity: Hash of what the run is made of; state files of another are refused.
        observe: Called with every event.
        logs: Files that `observe` appends to; they are synced before a resume point that comes after.
        ledger: What replayed states are held against; that of the folder when None.
        pieces: How states lie over processes, each of which has a trajectory of its pieces; None where they are whole.
    """

    def __init__(
        self,
        training: Training,
        initial: State,
        replay: Replay | None = None,
        folder: Path | None = None,
        identity: str = "",
        observe: Callable[[Event], None] = lambda event: None,
        logs: Sequence[Path] = (),
        ledger: Ledger | None = None,
        pieces: Pieces | None = None,
    ) -> None:
        self.training, self.initial, self.folder, self.observe = training, initial, folder, observe
        self.replay = replay or Replay()
        if folder is not None:
            make_folder(folder)
        self.start, self.steps = initial.step, len(training.stream)
        group = ALONE if pieces is None else pieces.group
        on_host = all(leaf.device.type == "cpu" for leaf in tree.leaves(initial))
        fitting = layout_of(self.replay, training.recipe, initial, self.steps - self.start, on_host=on_host)
        self.layout = group.agreed(fitting)  # pieces are not all of one size
        digests = read_digests(folder) if folder else {}
        digests = {step: digests[step] for step in group.common(digests)}
        count = training.recipe.pieces
        self.ledger = ledger or (Ledger(digests, count) if pieces is None else PieceLedger(digests, pieces))
        self.residuals = Residuals.of(training, initial)
        known = self.ledger.digests if self.ledger.pieces == 1 else {}  # a store's are of what it holds
        self.store = Store(initial, folder, identity, self.layout.on_disk, known)
        self.gradients = Gradients(initial.params, folder, identity, self.layout.gradients_on_disk, group)
        kept = (self.layout, self.store, self.gradients, self.ledger.digests)
        self.durable = Durable(folder, self.steps, self.replay, *kept, logs, group)
        self._pending: tuple[plans.Plan, State] | None = None  # the plan past its Turn, and the working state
        self._final: State | None = None

    def first(self) -> State:
        """The state that training starts from."""
        return self.initial

    def train(self) -> State:
        """The final state: trained, resumed from the highest durable state, or read if training is done."""
        with self._quiet_after():
            return self._train()

    def _train(self) -> State:
        self.durable.refuse_other()
        self._final = self.durable.read_final()
        if self._final is not None:
            self.durable.keep(self.store.durable() if self.replay.keep else ())
            return self._final
        self.durable.back_to(first_missing(self.ledger.digests, start=self.start + 1) - 1)
        actions = self.durable.forward_plan()
        turn = next(i for i, action in enumerate(actions) if isinstance(action, plans.Turn)) + 1
        state, final = self.initial, None
        if self.replay.keep:
            slots = (a.step for a in actions[:turn] if isinstance(a, plans.Snapshot))
            self.durable.keep([*slots, *self.store.durable()])
        for event in self._sweep(actions[:turn], state=state):
            if isinstance(event, Turned):
                final = event.outcome.state
                self.observe(event)
                self.durable.record(final)
            elif isinstance(event, Advanced):
                state = event.outcome.state
                self.observe(event)  # first: a step with a durable digest counts as told when a run resumes
                self.durable.record(state)
                self.durable.forward_heartbeat(state)
                self.durable.stop_if_asked()
            elif isinstance(event, Remade):
                state = event.state
                self.observe(event)
        assert final is not None, "a forward plan ends with its Turn"
        if self.replay.keep:
            self.store.on_disk = 0  # the way back holds its states in memory
        if state.step != self.steps - 1:  # resumed at the last state itself
            state = self.store.get(self.steps - 1)
        self._pending = (actions[turn:], state)
        self.store.as_is = self.gradients.keeps
        self.store.settle()  # a final state on disk says that all the others are
        self.gradients.store.settle()
        self.durable.write_final(final)
        self._final = final
        return final

    def reverse(
        self,
        gradient: dict[str, Tensor] | StoredGradient,
        key: str = "",
        *,
        curvature: bool = False,
        moments: Moments | None = None,
        reached: Callable[[Cotangent], None] = lambda cotangent: None,
        query: str | None = None,
    ) -> Tensor:
        """Scores [K, *weights.shape] for the query gradients [K, *shape], from the last durable cotangent if any.

        Args:
            key: Tells this sweep's durable cotangent from another query's.
            curvature: Estimate the preconditioned Hessian's largest eigenvalue on the way; see `sweep`.
            moments: λ_T's part for the moments, [K, *shape]; zero when None, as for every query of the parameters.
            reached: Shown the cotangent of the first state.
            query: What tells the gradient, where this is a part of it; its digest when None.
        """
        assert isinstance(gradient, dict), "the gradient of a run in pieces is on disk"
        gradient = {name: gradient[name] for name in self.initial.params}  # files have their own order
        query = query or tree.digest((gradient, moments))
        queries = next(iter(gradient.values())).shape[0]
        cotangent = seed_cotangent(gradient, self.initial)
        if moments is not None:
            cotangent = cotangent._replace(moments=moments)
        weights = self.training.weights
        scores = torch.zeros((queries, *weights.shape), dtype=weights.dtype)
        cotangent, scores, left = self.durable.read_reverse(cotangent, scores, key, query)
        actions, state = self._reverse_plan(left)
        if left < self.steps:
            self.durable.let_go(left)
        self.durable.rest()
        events = self._sweep(actions, state=state, cotangent=cotangent, after=self._final, curvature=curvature)
        self._final = None
        if left == self.start:
            reached(cotangent)
        del gradient, moments, cotangent, state  # the sweep's alone: it lets go of each as soon as it can
        with self._quiet_after():
            for event in events:
                if isinstance(event, Reversed):
                    accumulate(scores, event)
                    if event.step == self.start:
                        reached(event.cotangent)
                elif isinstance(event, Advanced) and not event.replayed:
                    self.durable.record(event.outcome.state)  # its line was lost
                self.observe(event)
                if isinstance(event, Reversed):
                    self.durable.reverse_heartbeat(event, scores, key, query)
                    self.durable.stop_if_asked()
                del event  # or its cotangent would outlast the next step
        return scores

    def clean(self, key: str = "") -> None:
        """Remove what only a resume would need. See `Durable.clean`."""
        self.durable.clean(key)

    @contextmanager
    def _quiet_after(self) -> Iterator[None]:
        """A computation that an error ends writes nothing any more: the next may be in this process."""
        try:
            yield
        except BaseException:
            for store in (self.store, self.gradients.store):
                store.stop()
            raise

    def _sweep(self, actions: Sequence[plans.Action], **given: Any) -> Iterator[Event]:
        self.store.follow(action.step for action in actions if isinstance(action, plans.Restore))
        self.gradients.follow(self._asked(actions))
        kept = (self.store, self.ledger, self.residuals)
        idle = 1 << 62  # on the way forward: the way back takes more memory anyway
        if "cotangent" in given:
            idle = max(self.replay.memory, tree.nbytes(self.initial.params))
        return memory.reusing(sweep(actions, self.training, *kept, gradients=self.gradients, **given), idle)

    def _asked(self, actions: Iterable[plans.Action]) -> Iterator[int]:
        """The steps whose gradients a sweep asks for, if they are kept."""
        recipe, engine = self.training.recipe, self.training.engine
        unknown = recovered(recipe, self.initial, self.initial.moments) is None
        wanted = unknown and engine.repeats(micro_batches_of(self.training, self.start)[0])
        for action in actions:
            match action:
                case plans.Advance(start, stop):
                    yield from range(start, stop)
                case plans.Reverse(step) if wanted and needs_gradient(self.training, step):
                    yield step

    def _reverse_plan(self, left: int) -> tuple[plans.Plan, State | None]:
        if left == self.start:
            return (), None
        if self._pending is not None and left == self.steps:
            actions, state = self._pending
            self._pending = None
            return actions, state
        return self.durable.resumed(left, turn=False), None


class InPieces(Trajectory):
    """A trajectory whose states lie in pieces: every process of a job has one, of its own pieces in its own folder.

    Rank 0's is called by whoever trains, and the others follow it: they are made, train and reverse when it does. What
    it is given, and gives, is whole. Arguments as for `Trajectory`; of the first state the engine has the pieces.

    Args:
        shown: Steps; in training the events that have their states come with parameters that are whole.
    """

    def __init__(
        self,
        training: Training,
        initial: State,
        replay: Replay,
        folder: Path | None = None,
        identity: str = "",
        observe: Callable[[Event], None] = lambda event: None,
        logs: Sequence[Path] = (),
        shown: Collection[int] = (),
    ) -> None:
        engine = training.engine
        assert isinstance(engine, Sharded), "parameters in pieces have an engine that gathers them"
        self.lying, group = engine.lying, engine.group
        self._whole = (folder, initial, training.recipe, identity)
        training = training._replace(recipe=self.lying.recipe_of(training.recipe))
        own = initial_state(training.recipe, engine.first)._replace(step=initial.step)
        part = None if folder is None else part_of(folder, *self.lying.mesh.form, group.rank)
        super().__init__(training, own, replay, part, identity, self._seen, logs, None, self.lying)
        self._observe, self._shown, self._forward = observe, frozenset(shown), False

    def first(self) -> State:
        """As `Trajectory.first`, whole where it is to be shown."""
        if self.initial.step not in self._shown:
            return self.initial
        self.lying.group.call("first")
        return self._whole_state(self.initial)

    def train(self) -> State:
        """As `Trajectory.train`; the parameters are whole, the moments are not."""
        self.lying.group.call("train")
        self._forward = True
        with tree.lying(self.lying):
            final = super().train()
        self._forward = False
        return self._whole_state(final)

    def reverse(
        self, gradient: dict[str, Tensor] | StoredGradient, key: str = "", *, curvature: bool = False, **more: Any
    ) -> Tensor:
        """As `Trajectory.reverse`, of a gradient on disk; nothing else can be asked for."""
        assert isinstance(gradient, StoredGradient), "cotangents are in pieces"
        assert not more, "nothing else is"
        group = self.lying.group
        group.call("reverse", gradient, key, curvature)
        query = group.agreed("" if group.rank else gradient.digest())
        own = memory.Owned(gradient.own(self.lying, next(iter(self.initial.params.values())).device))
        with tree.lying(self.lying):
            return super().reverse(own.take(), key, curvature=curvature, query=query)

    def _seen(self, event: Event) -> None:
        """Have an event seen. Every process comes here with the same one."""
        if self._forward and not isinstance(event, Reversed):
            state = event.state if isinstance(event, Remade) else event.outcome.state
            if state.step in self._shown:
                whole = self._whole_state(state)
                event = event._replace(state=whole) if isinstance(event, Remade) else _with(event, whole)
        self._observe(event)

    def _whole_state(self, state: State) -> State:
        return state._replace(params=self.lying.whole(state.params))

    def clean(self, key: str = "") -> None:
        """As `Trajectory.clean`; what is left is whole."""
        group, (folder, initial, recipe, identity) = self.lying.group, self._whole
        group.call("clean", key)
        super().clean(key)
        group.collected(None)  # all have
        if folder is not None and group.rank == 0:
            relay(folder, initial, recipe, (1, 1), identity)


def _with(event: Advanced | Turned, state: State) -> Event:
    return event._replace(outcome=event.outcome._replace(state=state))


@dataclass(frozen=True, eq=False)
class Ready:
    """A training ready for its first step: the one place that makes a `Trajectory`.

    identity: hash of what it is made of.
    """

    training: Training
    initial: State
    identity: str

    def trajectory(
        self,
        replay: Replay,
        folder: Path | None = None,
        observe: Callable[[Event], None] = lambda event: None,
        logs: Sequence[Path] = (),
        *,
        weights: Tensor | None = None,
        identity: str | None = None,
        shown: Collection[int] = (),
    ) -> Trajectory:
        """Its trajectory, to train it, to read states from or to reverse it.

        Args:
            replay, folder, observe, logs: As for `Trajectory`.
            shown: Steps whose states `observe` looks at, as for `InPieces`.
            weights: Other data weights than the run's own; `identity` then tells that run from this one.
        """
        training = self.training if weights is None else self.training._replace(weights=weights)
        given = (replay, folder, identity or self.identity)
        engine = training.engine
        form = engine.lying.mesh.form if isinstance(engine, Sharded) else (1, 1)
        if folder is not None:
            relay(folder, self.initial, training.recipe, form, given[-1])
        if isinstance(engine, Sharded):
            engine.group.call("trajectory", *given, tuple(shown))
            return InPieces(training, self.initial, *given, observe, logs, shown)
        return Trajectory(training, self.initial, *given, observe, logs)

    def settle(self, folder: Path) -> None:
        """Lay out whole what a finished run may have left in pieces, killed before it had."""
        relay(folder, self.initial, self.training.recipe, (1, 1), self.identity)

    def follow(self) -> None:
        """Do what rank 0 does with this training, until it is done with it. By the other ranks of a job.

        Raises:
            SystemExit: If rank 0 has ended.
        """
        if not here().serve(self.doing):
            raise SystemExit(0)

    @property
    def doing(self) -> dict[str, Callable[..., Any]]:
        """What the other ranks of a job do for rank 0, by name."""
        engine = self.training.engine
        assert isinstance(engine, Split), "a job of several processes has several shards"
        if not isinstance(engine, Sharded):
            return engine.doing
        made = list[InPieces]()

        def make(replay: Replay, folder: Path | None, identity: str, shown: Collection[int]) -> None:
            made.append(InPieces(self.training, self.initial, replay, folder, identity, shown=shown))

        return {
            "trajectory": make,
            "first": lambda: made[-1].first(),
            "train": lambda: made[-1].train(),
            "reverse": lambda gradient, key, curvature: made[-1].reverse(gradient, key, curvature=curvature),
            "clean": lambda key: made[-1].clean(key),
        }

    def final(self, weights: Tensor) -> State:
        """The final state at these data weights. Of the way there nothing is kept: for retraining.

        Raises:
            NonFiniteError: If training diverges; it names the step.
        """
        training = self.training._replace(weights=weights)
        return Trajectory(training, self.initial, Replay(plan="binomial", slots=1), ledger=BlankLedger()).train()
