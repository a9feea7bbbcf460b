"""Attacks on unlearned models as data: single configurations, suites of them, and the settings of `retrograd attack`.

A suite is a name of SUITES, a YAML file, or the list itself: configurations, settings by name. Several values of a
setting, as in `lr: [1e-3, 3e-3]`, stand for a configuration each. No heavy imports here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from retrograd.settings.attacks import Finetune, Untrained
from retrograd.settings.parse import build, load_yaml
from retrograd.settings.prompted import Prompted
from retrograd.settings.suites import SUITES
from retrograd.settings.train import (
    ExportConfig,
    ReplayConfig,
    TrainConfig,
    at_least_1,
    check_ranks,
    finite,
)

__all__ = [
    "CONTROLS", "AttackConfig", "Configuration", "Finetune", "PhaseConfig", "Untrained", "attack_steps", "check_attack",
    "configurations", "name_of", "read_suite",
]  # fmt: skip

CONTROLS = ("base", "filtered", "random", "shallow")
"""Roles of the models that are attacked beside the others."""

Configuration = Finetune | Untrained | Prompted


@dataclass(frozen=True)
class PhaseConfig(ExportConfig):
    """One training of an attack, as its run folder stores it."""

    sources: tuple[str, ...] = ()
    """Data sets, as of --data."""
    examples: int | None = None
    """The first documents of each only."""
    steps: int | None = None
    """Optimizer steps; all of the passes when None."""
    epochs: int | None = None
    """Passes over the data; as many as the steps need when None."""
    max_length: int | None = None
    """Cut documents to this many tokens."""
    chunk_length: int | None = None
    """Pack documents into chunks of this many tokens."""
    max_passes: float | None = None
    """Refuse more passes than this, unless `epochs` asks for them."""
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class AttackConfig:
    """Attack unlearned models: how fast does what was unlearned come back, and was it in the weights all the time?

    Every model meets every configuration of every suite, and so do the controls: a model that knows (base), one that
    never knew (filtered), one that knows nothing (random), and one whose unlearning is known to be shallow. The
    processes of a torchrun job take whole meetings or, with --parallel replicate or shard, share the steps of each.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Folder of the attacks. Running again does what is not done; further models and suites may join."""
    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Unlearned model: hub name or local folder; may be given several times."""
    suite: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """short, legacy, six, five, paper, few-step, strong, indirect, latent, untrained, prompts, or a YAML file of
    configurations, or the list itself, as in '[{data: half, lr: 1e-3}, {prompt: suffix}]'; may be given several
    times."""
    lab: Path | None = None
    """A folder of `retrograd lab`: its corpora, questions and models."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Or KEY=DATASET, with what to read of it, as in forget=papers.jsonl,text_column=text,limit=512; several of one key
    are joined. The suites name the keys forget, mixed, half, retain, benign, prose."""
    tasks: Path | None = None
    """With --data: a YAML file of tasks, as for `retrograd evaluate`; the forget tasks are what is to come back."""
    half: tuple[str, ...] = ()
    """With --data: the forget tasks or subjects that the data of the key half are about."""
    base: str | None = None
    """The model before unlearning; the lab's own when None. So for the other controls."""
    filtered: str | None = None
    """A model that never saw what is to be forgotten."""
    random: str | None = None
    """An untrained model."""
    shallow: str | None = None
    """A model whose unlearning is known to be shallow: what does not bring it back is no attack."""
    lr_scale: float = 1.0
    """Multiplies all learning rates: those of the suites are meant for models of 7B parameters."""
    steps: int | None = None
    """Steps of every phase of every configuration, in place of its own; warm-up shrinks in proportion."""
    seeds: int = 1
    """Each configuration with so many seeds, from its own on."""
    max_passes: float | None = None
    """Refuse a configuration that sees its data more often, unless it names its epochs; when None 2, and on a lab,
    whose data are few, no limit."""
    max_length: int | None = None
    """Cut documents to this many tokens; the model's context length when None."""
    chunk_length: int | None = None
    """Pack documents into chunks of this many tokens instead."""
    utility: tuple[float, ...] = (0.02, 0.05, 0.1)
    """For the worst case: how much general accuracy an attacker may lose against the base model."""
    limit: int | None = None
    """The first questions of each task only."""
    batch_size: int = 16
    """Questions read at once."""
    tokenizer: str | None = None
    """Tokenizer of all models, if not their own."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    heartbeat: float = 60.0
    """Seconds between durable resume points."""
    export: bool = False
    """Keep every attacked model too, in the folder of its run."""
    attribute: bool = False
    """Also pull the forget loss after each fine-tuning attack back through attack and unlearning: a score for every
    forget and retain token of the run of `retrograd unlearn` that left --model. Trains both again, full, in float32 or
    float64."""
    subsets: int = 0
    """With --attribute: retrain unlearning and attack without so many random sets of forget tokens: do the scores
    predict what happens? Asking for more later adds to them."""
    fraction: float = 0.1
    """Share of the forget tokens that such a set leaves out."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    parallel: Literal["auto", "replicate", "shard"] = "auto"
    """What the processes of a torchrun job share. auto: each takes whole meetings, best where a model fits on one;
    replicate, shard: all share every step of each fine-tuning meeting, as in `retrograd train`; rank 0 does the rest.
    shard is for models that need several."""
    replicas: int = 1
    """Copies of the pieces of --parallel shard, as in `retrograd train`."""
    shards: int | None = None
    """Logical shards of each fine-tuning meeting, as in `retrograd train`; a meeting that was begun keeps its own."""
    patience: float = 600.0
    """As in `retrograd train`, where steps are shared."""


def check_attack(config: AttackConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    if not config.model:
        raise ValueError("nothing to attack: give --model, a folder or a hub name; several may be given")
    if not config.suite:
        raise ValueError(f"no attack: give --suite, one of {', '.join(SUITES)} or a YAML file")
    if (config.lab is None) == (not config.data):
        raise ValueError("give either --lab DIR or --data KEY=DATASET, which attacks train on")
    if config.data and config.tasks is None:
        raise ValueError("--data needs --tasks FILE.yaml: the questions that tell whether anything comes back")
    if config.lab is not None and (config.tasks is not None or config.half):
        raise ValueError("--lab has questions and halves of its own; leave --tasks and --half out")
    if config.data and config.base is None:
        raise ValueError("--data needs --base, the model before unlearning: recovery is measured against it")
    at_least_1({"steps": config.steps, "seeds": config.seeds, "limit": config.limit, "batch_size": config.batch_size,
                "max_length": config.max_length, "chunk_length": config.chunk_length})  # fmt: skip
    if config.max_length is not None and config.chunk_length is not None:
        raise ValueError("--max_length and --chunk_length exclude each other: cut documents, or pack them")
    finite({"lr_scale": config.lr_scale, "heartbeat": config.heartbeat})
    check_ranks(config)
    _check_scores(config)
    for bound in config.utility:
        finite({"utility": bound})
    for text in config.data:
        if not re.match(r"[a-z]\w*=.", text):
            raise ValueError(f"--data {text!r} is not understood; write KEY=DATASET, such as forget=papers.jsonl")
    searched = [attack.readable for attack in configurations(config) if isinstance(attack, Prompted)]
    if searched and config.lab is None and not config.half:
        raise ValueError(
            f"attack {searched[0]} searches a prompt on one half of the forget questions and is told on the other: "
            "give --half, some of the forget tasks or subjects"
        )


def _check_scores(config: AttackConfig) -> None:
    if config.subsets and not config.attribute:
        raise ValueError("--subsets asks whether scores predict: give --attribute too")
    if config.subsets < 0 or config.subsets == 1 or not 0 < config.fraction < 1:
        raise ValueError(
            f"--subsets {config.subsets} of --fraction {config.fraction}: give 0, or 2 sets or more, of a share "
            "between 0 and 1"
        )
    attacks = configurations(config)
    if config.attribute and not any(isinstance(attack, Finetune) for attack in attacks):
        raise ValueError(
            f"--attribute goes back through fine-tuning, and of the {len(attacks)} attacks of --suite none trains the "
            "model: leave it out, or give a suite that fine-tunes, such as short"
        )


def configurations(config: AttackConfig) -> list[Configuration]:
    """All configurations of the suites, scaled, with all seeds, each once.

    Raises:
        ValueError: If a suite is unknown or a configuration cannot work.
    """
    wanted = [scaled(configuration, config) for name in config.suite for configuration in read_suite(name)]
    seeded = [
        dataclasses.replace(configuration, seed=configuration.seed + k)
        for configuration in wanted
        for k in range(config.seeds)
    ]
    for configuration in seeded:
        try:
            configuration.check()
        except ValueError as error:
            raise ValueError(f"attack {configuration.readable}: {error}") from error
    return list(dict.fromkeys(seeded))


def scaled(configuration: Configuration, config: AttackConfig) -> Configuration:
    """A configuration with --lr_scale and --steps in place."""
    if isinstance(configuration, Untrained):
        return configuration
    if isinstance(configuration, Prompted):  # its rate is in units of the model's embeddings
        return dataclasses.replace(configuration, steps=config.steps or configuration.steps)
    changes: dict[str, Any] = {"lr": configuration.lr * config.lr_scale}
    if config.steps is not None:
        changes |= {
            "steps": config.steps,
            "epochs": None,
            "before_steps": config.steps if configuration.before else configuration.before_steps,
        }
        if configuration.warmup_steps is not None and configuration.epochs is None:
            changes["warmup_steps"] = max(
                1, math.floor(configuration.warmup_steps * config.steps / configuration.steps)
            )
    return dataclasses.replace(configuration, **changes)


def read_suite(name: str) -> list[Configuration]:
    """The configurations of a suite by name, of a YAML file, or of a list as text.

    Raises:
        ValueError: If there is no such suite, or what is given is no list of configurations.
    """
    if name in SUITES:
        return [configuration for entry in SUITES[name] for configuration in _expanded(entry, f"suite {name}")]
    path, written = Path(name), name.lstrip().startswith("[")
    if not written and not path.is_file():
        raise ValueError(f"there is no suite {name!r}; there are {', '.join(SUITES)}, or give a YAML file")
    where = "--suite" if written else str(path)
    try:
        entries = load_yaml(name if written else path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the suite {where}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise ValueError(f"the suite {where} has to be a list of configurations, such as - {{data: forget, lr: 1e-3}}")
    return [
        configuration
        for place, entry in enumerate(entries, 1)
        for configuration in _expanded(entry, f"{where}, configuration {place}")
    ]


def name_of(configuration: Configuration) -> str:
    """The name of a configuration's folder: readable, and another one for every other configuration.

    >>> name_of(Finetune(lr=1e-3)) == name_of(Finetune(lr=1e-3, weight_decay=0.0))
    False
    """
    text = json.dumps([type(configuration).__name__, dataclasses.asdict(configuration)], sort_keys=True)
    return f"{configuration.readable}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def attack_steps(last: int) -> list[int]:
    """The steps that are asked at: 0, 1, 2, 5, 10, 20, 50, … and the last.

    >>> attack_steps(30)
    [0, 1, 2, 5, 10, 20, 30]
    """
    series: Iterable[int] = (digit * 10**power for power in range(len(str(last))) for digit in (1, 2, 5))
    return sorted({0, last, *(step for step in series if step <= last)})


def _expanded(entry: dict[str, Any], where: str) -> list[Configuration]:
    """A configuration for each combination of the settings that have several values."""
    kind: Any = Untrained if "attack" in entry else Prompted if "prompt" in entry else Finetune
    if {"steps", "epochs"} <= entry.keys():
        raise ValueError(f"{where} has steps and epochs: one of them says how long it is")
    own = ("modules", "strengths")  # settings that are lists themselves
    names = list(entry)
    values: list[Sequence[Any]] = [
        entry[name] if isinstance(entry[name], (list, tuple)) and name not in own else [entry[name]] for name in names
    ]
    return [build(kind, dict(zip(names, chosen)), where) for chosen in itertools.product(*values)]
