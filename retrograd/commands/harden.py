"""`retrograd harden`: weights of forget documents, learnt through unlearning and attack. Running again goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from retrograd.attack import harden as core
from retrograd.attack.chain import Link, check_chain, forget_queries, pulled_back, unlearning_of
from retrograd.attack.chain_validation import begins, retrained
from retrograd.attack.finetune import After, phases, set_up_phase
from retrograd.attack.material import Material, material_of
from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.step import State
from retrograd.data.pairs import PairStream
from retrograd.durable import foreign, remove
from retrograd.evaluate.folder import content
from retrograd.query.columns import Column, Queries
from retrograd.runs.files import read_tensors, write_atomic, write_json, write_tensors
from retrograd.runs.identity import identify
from retrograd.runs.journal import read_journal, recipe_gradients
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest
from retrograd.runs.phases import trained
from retrograd.runs.run_folder import replay_of
from retrograd.runs.session import Session, open_session
from retrograd.runs.setup import Loaded, Setup
from retrograd.select import weights as weights_file
from retrograd.select.places import places_of
from retrograd.settings.attack import Finetune, PhaseConfig, name_of
from retrograd.settings.harden import HardenConfig, attack_config, attacks_of, check_harden
from retrograd.settings.on_the_way import OnTheWayConfig
from retrograd.settings.parse import dump_yaml, load_yaml
from retrograd.settings.run import QueryConfig
from retrograd.settings.tasks import tasks_from
from retrograd.settings.train import difference, to_dict
from retrograd.settings.unlearn import UnlearnConfig, parse_source
from retrograd.trust.smoothness import metasmoothness
from retrograd.unlearn.methods import find_method
from retrograd.unlearn.setup import assemble

__all__ = ["harden"]

SETTINGS = ("objective.forget", "objective.retain", "train.lr")  # what may be learnt besides weights


class _Attack(NamedTuple):
    """An attack: its phases, and the forget questions that it does not show."""

    configuration: Finetune
    runs: list[PhaseConfig]
    columns: list[Column]


class _World(NamedTuple):
    """What all iterations have in common. make: an attack of its configuration."""

    config: HardenConfig
    unlearning: UnlearnConfig
    loaded: Loaded
    documents: core.Documents
    kl: Column
    make: Callable[[Finetune], _Attack]
    learnt: list[_Attack]
    held_out: list[_Attack]

    def attacks(self, number: int) -> list[_Attack]:
        """Those that an iteration learns against."""
        if self.config.sample is None:
            return self.learnt
        every = [attack.configuration for attack in self.learnt]
        return [self.make(drawn) for drawn in core.drawn(every, number, self.config.sample, self.config.jitter)]


def harden(config: HardenConfig, console: Console | None = None) -> dict[str, Any]:
    """Learn weights, keep the best by the held-out attacks, and write them for `retrograd unlearn --weights`.

    Args:
        config: The resolved configuration.
        console: Where each iteration is told; standard output when None.
    Returns:
        What harden.json says.
    Raises:
        ValueError: For anything the user can mend.
        RunError: For a failure of the machine; the same call resumes.
    """
    console = console or Console()
    check_harden(config)
    with locked(config.out):
        _check_folder(config)
        world = _world(config)
        text = dump_yaml(to_dict(config))  # what was refused has not claimed the folder
        write_atomic(config.out / "run_config.yaml", partial(Path.write_text, data=text, encoding="utf8"))
        _claim_world(config.out, _made_of(world))
        iterations = [_iteration(world, number, console) for number in range(config.iterations + 1)]
        best = max(iterations, key=lambda iteration: (iteration["held_out"], -iteration["iteration"]))
        _write_weights(world, best["iteration"])
        record = {"run": str(config.run.resolve()), "best": best["iteration"], "iterations": iterations}
        write_json(config.out / "harden.json", record)
    start = iterations[0]
    gain = best["held_out"] - start["held_out"]
    console.print(
        f"The best is iteration {best['iteration']}: held-out objective {best['held_out']:.4f}, uniform weights "
        f"{start['held_out']:.4f} ({gain:+.4f} nats)."
    )
    if not best["iteration"]:
        console.print("No weights better than uniform ones were found.")
    flags = "".join(f" --{name} {best[name]:.4g}" for name in SETTINGS if name in best)
    console.print(
        f"{config.out}: harden.json; the weights are in best/N and matched/N of the Nth --forget, as in "
        f"`retrograd unlearn … --weights {config.out}/best/0{flags}`."
    )
    return record


def _check_folder(config: HardenConfig) -> None:
    """Refuse a folder of something else, or of another configuration; more iterations may be asked for."""
    path = config.out / "run_config.yaml"
    if not path.exists():
        if set(foreign(config.out)) - {"data"}:
            raise ValueError(f"{config.out} exists and is no folder of `retrograd harden`; choose another one")
    else:
        skipped = ("out", "iterations", "device", "heartbeat", "replay")
        old, new = load_yaml(path.read_text(encoding="utf8")), to_dict(config)
        parts = ({k: v for k, v in settings.items() if k not in skipped} for settings in (old, new))
        if changed := difference(*parts):
            lines = "\n  ".join(changed)
            raise ValueError(f"{config.out} was begun otherwise:\n  {lines}\nUse another folder, or put it back.")


def _made_of(world: _World) -> dict[str, Any]:
    """What iterations are made of besides the configuration: the unlearning, its questions, and the attacks' data."""
    runs = [run for attack in (*world.learnt, *world.held_out) for run in attack.runs]
    sources = sorted({str(parse_source(text, world.unlearning).dataset) for run in runs for text in run.sources})
    return {"unlearning": world.loaded.identity, "questions": [query.digest for query in world.loaded.asked],
            "data": {source: content(source) for source in sources}}  # fmt: skip


def _claim_world(out: Path, made_of: dict[str, Any]) -> None:
    """Let iterations be of one unlearning and one set of attacks, or refuse.

    Raises:
        ValueError: If those in the folder are of another.
    """
    path = out / "made_of.json"
    if not path.exists():
        write_json(path, made_of)
        return
    if changed := difference(json.loads(path.read_text(encoding="utf8")), made_of):
        lines = "\n  ".join(changed)
        raise ValueError(f"what {out} is made of has changed:\n  {lines}\nUse another folder, or put it back.")


def _world(config: HardenConfig) -> _World:
    attack, source = attack_config(config), str(config.run / "model")
    given = unlearning_of(source)
    method = find_method(given.method)
    if "coefficients" in config.learn and not method.linear:
        raise ValueError(
            f"{config.run}: {given.method} is not linear in its weights, so a factor of them is no coefficient: leave "
            "coefficients out of --learn"
        )
    if given.weights:
        raise ValueError(f"{config.run} has --weights of its own, which learnt ones would replace: give a run without")
    for finetune in (*attacks_of(config.suite, config), *attacks_of(config.held_out, config)):
        check_chain(finetune, given, whole=method.trained is None)
    material = material_of(attack)
    unlearning = dataclasses.replace(
        given, run=config.out / "unlearn", attribute="tokens", query=QueryConfig(), evaluate=OnTheWayConfig(), log=(),
        queries=forget_queries(tasks_from(material.tasks), config.limit), export=False, heartbeat=config.heartbeat,
        replay=dataclasses.replace(config.replay, keep=False),
    )  # fmt: skip
    loaded = assemble(unlearning)
    assert isinstance(loaded.stream, PairStream)

    make = partial(_attack, config=config, material=material, loaded=loaded, source=source)
    learnt, held_out = (
        [make(attack) for attack in attacks_of(names, config)] for names in (config.suite, config.held_out)
    )
    kl = core.retain_kl(loaded, config.rows)
    return _World(config, unlearning, loaded, core.documents_of(loaded.stream), kl, make, learnt, held_out)


def _attack(attack: Finetune, config: HardenConfig, material: Material, loaded: Loaded, source: str) -> _Attack:
    runs = phases(attack, source, config.out / name_of(attack), material.sources, material.tasks, attack_config(config))
    shown = set[str]()
    if "half" in (attack.before, attack.data):
        shown |= set(material.half)
    if "other_half" in (attack.before, attack.data):
        shown |= {asked.name for asked in loaded.asked} - set(material.half)
    columns = [column for asked in loaded.asked if asked.name not in shown for column in asked.columns]
    if not columns:
        shows = f"attack {attack.readable} shows the answers to all forget tasks"
        raise ValueError(f"{shows}: there is nothing left to ask")
    bare = [dataclasses.replace(phase.config, evaluate=OnTheWayConfig(), export=False) for phase in runs]
    return _Attack(attack, bare, columns)


def _iteration(world: _World, number: int, console: Console) -> dict[str, Any]:
    """One evaluation of J and its gradient, and the step that follows; read if it is done."""
    folder = world.config.out / "iterations" / f"{number:03d}"
    path = folder / "result.json"
    if path.exists():
        entry: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
        return entry
    state = _start(world, folder, number)
    attacks, mu = world.attacks(number), world.config.mu
    measured = _measured(world, folder, state.u, attacks, number)
    value = sum(measured.forget) / len(measured.forget) - mu * measured.kl
    gradient = core.gradient_of(measured.scores.double(), state.u, world.documents, measured.slope, world.config.learn)
    following = core.ascended(state, gradient, world.config.lr)
    own = state.u[: world.documents.number]
    entry = {
        "iteration": number, "objective": value, "forget_after_attack": measured.forget, "retain_kl": measured.kl,
        "attacks": [attack.configuration.readable for attack in attacks],
        "held_out": sum(measured.held) / len(measured.held) - mu * measured.kl, "held_out_forget": measured.held,
        "gradient_norm": float(gradient.norm()), "predicted_change": float((following.u - state.u) @ gradient),
        "metasmoothness": _smoothness(world, state.u, attacks[0], number),
        "largest_weight": float((own - own.logsumexp(0)).exp().max() * len(own)), **_settings(world, state.u),
    }  # fmt: skip
    entry["measured_change"] = None
    if number:
        before = json.loads((folder.parent / f"{number - 1:03d}" / "result.json").read_text(encoding="utf8"))
        entry["measured_change"] = sum(measured.before) / len(measured.before) - mu * measured.kl - before["objective"]
        entry["expected_change"] = before["predicted_change"]
    _write_state(folder.parent / f"{number + 1:03d}", following)
    write_json(path, entry)
    for left in ("unlearn", *(name_of(attack.configuration) for attack in attacks)):
        remove(folder / left)
    _tell(entry, world.config.iterations, console)
    return entry


class _Measured(NamedTuple):
    """Of an iteration: φ of its attacks, of those of the iteration before, and of the held-out ones; the retain KL;
    ∂J/∂w [rows, length] and ∂J/∂ log lr."""

    forget: list[float]
    before: list[float]
    held: list[float]
    kl: float
    scores: Tensor
    slope: float


def _measured(world: _World, folder: Path, u: Tensor, attacks: list[_Attack], number: int) -> _Measured:
    loaded, run = _at(world, u), folder / "unlearn"
    last = world.attacks(number - 1) if world.config.sample is not None and number else []
    with _session(loaded, run, world) as session:
        final = session.train()
        (kl,), slope = core.mean_query([world.kl])(final.params)
        forget, parts = list[float](), [(-world.config.mu, slope)]
        for attack in attacks:
            phi, gradient = _through(world, loaded, attack, folder / name_of(attack.configuration), final)
            forget.append(float(phi))
            parts.append((1 / len(attacks), gradient))
        before, held = ([_after(loaded, attack, final.params) for attack in some] for some in (last, world.held_out))
        del final
        with session.reversing() as trajectory:
            scores = trajectory.reverse(core.combined(parts))[0]
    numbers = [*forget, *before, float(kl), *held]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"the objective's parts are {numbers}: lower the learning rates of unlearning or attack")
    return _Measured(forget, before or forget, held, float(kl), scores, _rate_slope(world, loaded, run))


def _after(loaded: Loaded, attack: _Attack, params: Params) -> float:
    """φ after an attack, of which no derivative is wanted."""
    return float(Queries(attack.columns).values(trained(begins(loaded, attack.runs), params)).mean())


def _rate_slope(world: _World, loaded: Loaded, run: Path) -> float:
    """∂J/∂ log lr, out of the sweep's journal."""
    if "lr" not in world.config.learn:
        return 0.0
    rate: Any = getattr(loaded.training.recipe.optimizer, "lr")  # noqa: B009
    rates = [rate(step) for step in range(len(loaded.stream))]
    gradients = recipe_gradients(rates, read_journal(run / "metrics.jsonl")[1], ["J"])
    if gradients is None:
        raise ValueError(f"{type(loaded.training.recipe.optimizer).__name__} does not tell its learning rate's "
                         "derivative: leave lr out of --learn")  # fmt: skip
    return float(max(rates) * gradients["queries"]["J"]["peak_lr"])


def _through(world: _World, loaded: Loaded, attack: _Attack, folder: Path, final: State) -> tuple[Tensor, Params]:
    """φ after an attack, and its gradient at the attack's start."""
    ask = core.mean_query(attack.columns)

    def set_up(run: PhaseConfig, params: Params) -> Setup:
        return set_up_phase(run, After(loaded.model, loaded.tokenizer, params, 1))[0]

    links = []
    for run in attack.runs:
        placed = dataclasses.replace(run, run=folder / run.run.name)
        links.append(Link(partial(set_up, placed), partial(_session, run=placed.run, world=world)))
    values, gradient = pulled_back(links, final.params, lambda setup, state: ask(state.params))
    return values[0], gradient


def _session(setup: Setup, run: Path, world: _World) -> AbstractContextManager[Session]:
    manifest = Manifest(run / "manifest.json")
    manifest.update(
        command="harden", identity=setup.identity, arithmetic=dataclasses.asdict(setup.arithmetic),
        steps=len(setup.stream), engine_why=setup.engine.why,
    )  # fmt: skip
    return open_session(setup, run, manifest, replay_of(dataclasses.replace(world.unlearning, run=run)))


def _at(world: _World, u: Tensor) -> Loaded:
    """The same unlearning at other data weights, coefficients and learning rate."""
    training = world.loaded.training
    weights = core.weights_of(u, world.documents, world.loaded.stream.weights)
    recipe = training.recipe if u[-1] == 0 else core.faster(training.recipe, math.exp(u[-1]))
    identity = identify({"run": world.loaded.identity, "rate": float(u[-1])}, tree.digest(weights))
    return dataclasses.replace(
        world.loaded, training=training._replace(weights=weights, recipe=recipe), identity=identity
    )


def _settings(world: _World, u: Tensor) -> dict[str, float]:
    """What is learnt besides weights, as settings of the unlearning."""
    given, (forget, retain, rate) = world.unlearning, u[-len(core.COEFFICIENTS) :].exp().tolist()
    own = given.objective if isinstance(given.objective, dict) else vars(given.objective)
    every = dict(zip(SETTINGS, (own["forget"] * forget, own["retain"] * retain, given.train.lr * rate)))
    learnt = dict(zip(SETTINGS, ("coefficients", "coefficients", "lr")))
    return {name: value for name, value in every.items() if learnt[name] in world.config.learn}


def _smoothness(world: _World, u: Tensor, attack: _Attack, seed: int) -> float | None:
    """Metasmoothness of the chain of unlearning and an attack, along a random direction of what is learnt."""
    if not world.config.h:
        return None
    direction = torch.randn(len(u), generator=torch.Generator().manual_seed(seed), dtype=u.dtype)
    direction *= core.asked(u, world.config.learn)
    finals = []
    for k in range(3):
        loaded = _at(world, u + k * world.config.h * direction)
        finals.append(retrained(loaded, attack.runs, loaded.training.weights))
    return metasmoothness(*finals)


def _start(world: _World, folder: Path, number: int) -> core.Ascent:
    if not number:
        zero = torch.zeros(world.documents.number + len(core.COEFFICIENTS), dtype=torch.float64)
        return core.Ascent(zero, zero, zero)
    tensors, about = read_tensors(folder / "start.safetensors")
    return core.Ascent(tensors["u"], tensors["mean"], tensors["square"], int(about["step"]))


def _write_state(folder: Path, state: core.Ascent) -> None:
    tensors = {"u": state.u, "mean": state.mean, "square": state.square}
    write_tensors(folder / "start.safetensors", tensors, {"step": str(state.step)})


def _write_weights(world: _World, best: int) -> None:
    """The best weights by forget data set, and the same ones on other documents."""
    out, stream = world.config.out, world.loaded.stream
    state = _start(world, out / "iterations" / f"{best:03d}", best)
    for kind, u in (("best", state.u), ("matched", core.shuffled(state.u, 0))):
        own = torch.cat([u[:-3], torch.zeros_like(u[-3:])])  # coefficients are settings of their own
        weights = core.weights_of(own, world.documents, stream.weights).cpu()
        _write_parts(
            world.loaded, weights, out / kind, {"use": "removal", "rule": f"harden: {kind}", "iteration": best}
        )


def _write_parts(loaded: Loaded, weights: Tensor, folder: Path, record: dict[str, Any]) -> None:
    forget: Sequence[Any] = [part for part in loaded.parts if part.side == "forget"]
    for place, part in enumerate(forget):
        rows = slice(part.first_row, part.first_row + part.rows)
        places = places_of(core.part_rows(loaded.rows, part))
        weights_file.write(
            folder / f"{place}", places.gather(weights[rows]), None, places, {**record, "dataset": part.dataset}
        )


def _tell(iteration: dict[str, Any], last: int, console: Console) -> None:
    smooth = "" if iteration["metasmoothness"] is None else f", metasmoothness {iteration['metasmoothness']:.3f}"
    moved = ""
    if iteration["measured_change"] is not None:
        moved = f", {iteration['measured_change']:+.4f} ({iteration['expected_change']:+.4f} expected)"
    forget = sum(iteration["forget_after_attack"]) / len(iteration["forget_after_attack"])
    console.print(
        f"{iteration['iteration']}/{last} objective {iteration['objective']:.4f}{moved}: forget {forget:.4f}, "
        f"retain KL {iteration['retain_kl']:.4f}; held out {iteration['held_out']:.4f}; "
        f"|gradient| {iteration['gradient_norm']:.3g}{smooth}"
        + "".join(f", {name} {iteration[name]:.3g}" for name in SETTINGS if name in iteration)
    )
