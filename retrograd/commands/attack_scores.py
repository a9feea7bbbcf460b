"""`retrograd attack --attribute`: scores of the unlearning's forget and retain tokens for the loss after an attack."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from retrograd.attack.chain import Link, check_chain, forget_queries, pulled_back, unlearning_of
from retrograd.attack.chain_validation import validate_chain
from retrograd.attack.chained import chain_config
from retrograd.attack.finetune import After, phases, set_up_phase
from retrograd.attack.folder import Attacked, Folder
from retrograd.attack.material import Material
from retrograd.commands.training import open_folder
from retrograd.core.optim import Params
from retrograd.core.step import State
from retrograd.durable import remove
from retrograd.runs.attribute import Outcome, ask, stored, summarise, write_results
from retrograd.runs.files import file_digest, read_tensors, write_tensors
from retrograd.runs.manifest import SIGN, Manifest
from retrograd.runs.progress import counting
from retrograd.runs.run_folder import replay_of
from retrograd.runs.session import Session, open_session
from retrograd.runs.setup import Loaded, Setup
from retrograd.settings.attack import AttackConfig, Finetune, PhaseConfig
from retrograd.settings.on_the_way import OnTheWayConfig
from retrograd.settings.run import QueryConfig
from retrograd.settings.tasks import tasks_from
from retrograd.settings.unlearn import UnlearnConfig
from retrograd.unlearn.methods import find_method
from retrograd.unlearn.setup import assemble

__all__ = ["attribute", "check_attribution"]

_COTANGENT = "cotangent.safetensors"  # λ at the end of the unlearning; a resume point


def check_attribution(config: AttackConfig, attack: Finetune) -> None:
    """Refuse, before anything is trained, a model or configuration that derivatives cannot pass through.

    Raises:
        ValueError: With what it is.
    """
    for model in config.model:
        unlearning = unlearning_of(model)
        check_chain(attack, unlearning, whole=find_method(unlearning.method).trained is None)


def attribute(
    config: AttackConfig, folder: Folder, material: Material, target: Attacked, name: str, console: Console
) -> None:
    """Train the unlearning and the attack again, pull the forget loss back through both, and write the scores.

    Raises:
        ValueError: For anything the user can mend.
        RunError: For a failure of the machine; the same call resumes.
    """
    attack = folder.configurations[name]
    assert isinstance(attack, Finetune), "an attack without training is not differentiated"
    place = folder.path / "attributed" / target.name / name
    runs = phases(attack, target.source, place, material.sources, material.tasks, config)
    chained = [_alone(phase.config) for phase in runs]
    unlearning = chain_config(_unlearning(config, place / "unlearn", target.source, folder.tasks), chained)

    def begun() -> tuple[Loaded, dict[str, Any]]:
        loaded = assemble(unlearning)
        about = {"meaning": SIGN, "then": name, "parts": [part._asdict() for part in loaded.parts]}
        return loaded, about

    def done(manifest: Manifest) -> str:
        return "; these are its scores." if manifest.done("scores") else ""

    with open_folder(unlearning, "attack", begun, done, console) as opened:
        loaded, manifest = opened.setup, opened.manifest
        if opened.done:
            outcome = stored(unlearning.run, unlearning.run, loaded, loaded.asked)
            summarise(outcome, loaded, loaded.asked, console)
            _validate(config, unlearning, loaded, chained, outcome, console)
            return
        with open_session(loaded, unlearning.run, manifest, replay_of(unlearning)) as session:
            final = session.train()
            values, gradient = _through(chained, unlearning, loaded, final, console)
            del final
            with session.reversing() as trajectory:
                scores = trajectory.reverse(gradient)
        del gradient
        with manifest.phase("scores") as record:
            outcome = write_results(unlearning.run, unlearning.run, loaded, loaded.asked, values, scores)
            record["sha256"] = file_digest(unlearning.run / "scores.pt")
        session.trajectory.clean()
        remove(unlearning.run / _COTANGENT)
        summarise(outcome, loaded, loaded.asked, console)
        _validate(config, unlearning, loaded, chained, outcome, console)


def _validate(
    config: AttackConfig, unlearning: UnlearnConfig, loaded: Loaded, runs: list[PhaseConfig], outcome: Outcome,
    console: Console,
) -> None:  # fmt: skip
    if not config.subsets:
        return
    with counting("retrain", config.subsets) as tick:
        validation = validate_chain(
            loaded, runs, outcome.scores, outcome.values, config.subsets, config.fraction, unlearning.run,
            lambda number: tick(1),
        )  # fmt: skip
    low, high = validation["interval"]
    console.print(f"LDS over {validation['sets']} sets of {validation['fraction']:.0%} of the forget tokens: "
                  f"{validation['lds']:.3f} ({low:.3f} to {high:.3f})")  # fmt: skip


def _unlearning(config: AttackConfig, run: Path, source: str, tasks: Path) -> UnlearnConfig:
    """The unlearning once more, in a folder of its own, with the forget tasks as queries."""
    return dataclasses.replace(
        unlearning_of(source), run=run, attribute="tokens", query=QueryConfig(), evaluate=OnTheWayConfig(),
        export=False, queries=forget_queries(tasks_from(tasks), config.limit), log=(), heartbeat=config.heartbeat,
        replay=dataclasses.replace(config.replay, keep=False),
    )  # fmt: skip


def _alone(config: PhaseConfig) -> PhaseConfig:
    """A phase without evaluation and in one process, whose model goes to the next one in memory."""
    return dataclasses.replace(
        config,
        evaluate=OnTheWayConfig(),
        export=False,
        parallel="auto",
        replicas=1,
        shards=None,
        patience=PhaseConfig.patience,
    )


def _through(
    runs: list[PhaseConfig], unlearning: UnlearnConfig, loaded: Loaded, final: State, console: Console
) -> tuple[Tensor, Params]:
    """φ after the attack, and its gradient at the end of the unlearning; read again if it is on disk."""
    path, identity = unlearning.run / _COTANGENT, f"{loaded.identity} {[query.digest for query in loaded.asked]}"
    if path.exists():
        tensors, about = read_tensors(path)
        if about.get("identity") == identity:
            values, gradient = tensors.pop("values"), {n.removeprefix("gradient."): leaf for n, leaf in tensors.items()}
            _leave_gradients(unlearning, loaded, values, gradient)
            return values, gradient
    queries = sum(len(query.columns) for query in loaded.asked)
    links = [Link(partial(_set_up, run, loaded, queries), partial(_open, run, unlearning, console)) for run in runs]

    def asked(setup: Setup, state: State) -> tuple[Tensor, Params]:
        phi, slopes = ask(unlearning.run, setup, loaded.asked, state)
        assert isinstance(slopes, dict), "one process has them whole"
        return phi, slopes

    values, gradient = pulled_back(links, final.params, asked)
    named = {f"gradient.{name}": leaf for name, leaf in gradient.items()}
    write_tensors(path, {"values": values, **named}, {"identity": identity})
    for run in runs:
        remove(run.run / "checkpoints")
    _leave_gradients(unlearning, loaded, values, gradient)
    return values, gradient


def _leave_gradients(unlearning: UnlearnConfig, loaded: Loaded, values: Tensor, gradient: Params) -> None:
    """The queries' values and gradients at the end of the unlearning, as any attributed run has them on disk."""
    start = 0
    for query in loaded.asked:
        columns = slice(start, start := start + len(query.columns))
        named = {f"gradient.{name}": leaf[columns] for name, leaf in gradient.items()}
        path = unlearning.run / "queries" / query.name / "gradient.safetensors"
        about = {"identity": f"{loaded.identity}/{query.digest}", "layout": "whole"}
        write_tensors(path, {"values": values[columns], **named}, about)


def _set_up(run: PhaseConfig, loaded: Loaded, queries: int, params: Params) -> Setup:
    return set_up_phase(run, After(loaded.model, loaded.tokenizer, params, queries))[0]


def _open(
    run: PhaseConfig, unlearning: UnlearnConfig, console: Console, setup: Setup
) -> AbstractContextManager[Session]:
    manifest = Manifest(run.run / "manifest.json")
    manifest.update(
        command="attack", identity=setup.identity, arithmetic=dataclasses.asdict(setup.arithmetic),
        steps=len(setup.stream), engine_why=setup.engine.why,
    )  # fmt: skip
    return open_session(setup, run.run, manifest, replay_of(unlearning))
