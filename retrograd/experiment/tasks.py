"""A task of an experiment: what it is made of, and its name, which is a hash of that behind a readable prefix.

    scores    a fine-tuning of the base on one forget corpus, attributed to questions           a run of `magic`
    select    weights of one forget corpus's tokens, by a rule or as a control                  a weights file
    analyse   how separated two score sets of one corpus are                                    numbers
    train     an unlearning                                                                     a run of `unlearn`
    measure   a model's answers, and its divergence from the base on held-out rows              files and numbers
    attribute a recipe's scores, its metasmoothness, and how they predict retraining (`grid`)   a run of `magic`
    attack    one configuration of an attack against one model                                  runs of `attack`

Two tasks that are made of the same are one; two that are not have different names.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from retrograd.attack.folder import values_of
from retrograd.attack.material import shallow_unlearning
from retrograd.evaluate.folder import content
from retrograd.settings.attack import AttackConfig, Configuration
from retrograd.settings.experiment import AskedSpec, CorporaSpec, ExperimentSpec, WeightingSpec
from retrograd.settings.parse import build
from retrograd.settings.run import MagicConfig, to_dict
from retrograd.settings.tasks import tasks_from
from retrograd.settings.unlearn import ONES, UnlearnConfig, check_unlearn, parse_source, with_objective
from retrograd.unlearn.methods import find_method

__all__ = ["Kind", "Maker", "Task", "dataset_of", "merged", "named", "nested", "texts_in", "unlearn_config"]

T = TypeVar("T")
Kind = Literal["scores", "select", "analyse", "train", "measure", "attack", "attribute"]
_RULE = ("rule", "use", "alpha", "soft", "clip", "q", "k")
_MEETING = ("lab", "data", "tasks", "half", "base", "max_passes", "max_length", "chunk_length", "limit", "batch_size",
            "tokenizer", "device")  # of an attack's settings, what makes a meeting another one  # fmt: skip


class Task(NamedTuple):
    """needs: names of tasks that have to be done before; what: all that makes it another task, as JSON has it."""

    kind: Kind
    name: str
    needs: tuple[str, ...]
    what: dict[str, Any]

    @property
    def label(self) -> str:
        """The readable part of its name."""
        return self.name.partition(".")[2].rpartition(".")[0]


def _once(make: Callable[..., T]) -> Callable[..., T]:
    """The same task is asked for whenever somebody looks what is to be done."""

    @functools.wraps(make)
    def made(maker: Maker, *given: Any) -> T:
        key = (make.__name__, *(argument.name if isinstance(argument, Task) else argument for argument in given))
        if key not in maker.made:
            maker.made[key] = make(maker, *given)
        kept: T = maker.made[key]
        return kept

    return made


class Maker:
    """Makes the tasks of an experiment; what they read is hashed once."""

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec, self.contents, self.made = spec, dict[str, str | None](), dict[tuple, Any]()
        self.common = build(UnlearnConfig, {**spec.settings, **_corpora(spec)}, "settings of all methods")

    @_once
    def scores(self, name: str, corpus: int) -> Task:
        """The run that scores one corpus's tokens."""
        given = self.spec.scores[name]
        source = parse_source(given.within or self.spec.corpora.forget[corpus], self.common)
        start = given.start or self.spec.base
        settings = merged(
            given.settings,
            {"model": start, "attribute": "tokens", "data": asdict(source), "dtype": self.common.dtype,
             "device": self.common.device, "tokenizer": self.common.tokenizer,
             "queries": {query: asdict(asked) for query, asked in given.queries.items()}},
        )  # fmt: skip
        config = to_dict(build(MagicConfig, settings, f"scores {name}"))
        read = [start, str(source.dataset), *(str(asked.dataset) for asked in given.queries.values())]
        label = name if given.within else f"{name}-{corpus}"
        return self._task("scores", label, (), {"settings": config}, read)

    @_once
    def select(self, name: str, corpus: int, seed: int) -> tuple[Task, list[Task]]:
        """The weights of one corpus's tokens, and the runs that they are made of."""
        weighting = self.spec.weightings[name]
        rule, more, label = weighting, dict[str, Any](), f"{name}-{corpus}"
        if weighting.control is not None:
            rule = self.spec.weightings[str(weighting.of)]
            keywords = None if weighting.keywords is None else str(weighting.keywords)
            more, label = {"controls": [weighting.control], "seed": seed, "keywords": keywords}, f"{label}-s{seed}"
        what, needs = self._sources(rule, corpus)
        what["select"] = {**{name: getattr(rule, name) for name in _RULE}, "controls": [], **more}
        read = [str(weighting.keywords)] if weighting.keywords else []
        return self._task("select", label, [task.name for task in needs], what, read), needs

    @_once
    def analyse(self, name: str, corpus: int) -> tuple[Task, list[Task]]:
        """The comparison of two score sets of one corpus."""
        rule = self.spec.analyses[name]
        what, needs = self._sources(rule, corpus)
        what["alpha"] = rule.alpha
        return self._task("analyse", f"{name}-{corpus}", [task.name for task in needs], what, []), needs

    @_once
    def train(self, method: str, weighting: str, seed: int, setting: tuple[str, float] | None) -> list[Task]:
        """An unlearning, behind all that has to be done before it."""
        config = self.config(method, seed, setting)
        before, files = list[Task](), self.spec.weightings[weighting].files
        weights = list[str]()
        if not files and self.spec.weightings[weighting] != WeightingSpec():
            for corpus in range(len(self.spec.corpora.forget)):
                made, needs = self.select(weighting, corpus, seed)
                before += [*needs, made]
                weights.append(made.name)
        chosen = f"-{setting[1]:g}" if setting else ""
        read = [self.spec.base, *(dataset_of(text) for text in (*config.forget, *config.retain, *config.alternative))]
        what: dict[str, Any] = {
            "method": config.method,
            "settings": to_dict(config),
            "weights": weights or list(files) or [ONES] * len(config.forget),
        }
        read += files
        if config.method.endswith(".py"):
            read.append(config.method)
        read += [text for text in texts_in(what["settings"]["objective"]) if Path(text).exists()]  # a teacher, say
        return [*before, self._task("train", f"{method}-{weighting}-s{seed}{chosen}", weights, what, read)]

    @_once
    def measure(self, model: Task | str, split: Literal["tune", "report"]) -> Task:
        """Ask a model, or the model of a training, what belongs to a split, and that alone."""
        asked: AskedSpec = self.spec.tune if split == "tune" else self.spec.report
        trained = isinstance(model, Task)
        label = model.label if isinstance(model, Task) else model.rstrip("/").rpartition("/")[2]
        what = {
            "split": split, "model": {"task": model.name} if isinstance(model, Task) else {"folder": model},
            "base": self.spec.base, "tasks": {name: asdict(task) for name, task in asked.tasks.items()},
            "rows": list(asked.rows), "dtype": self.common.dtype, "device": self.common.device,
            "tokenizer": self.common.tokenizer, "batch_size": self.spec.batch_size,
        }  # fmt: skip
        read = [self.spec.base, *(task.dataset for task in asked.tasks.values()), *map(dataset_of, asked.rows)]
        needs = [model.name] if isinstance(model, Task) else []
        return self._task("measure", f"{split}-{label}", needs, what, read if trained else [*read, str(model)])

    @_once
    def shallow(self, lab: Path) -> Task:
        """The unlearning of a lab that is known to be shallow: attacks have to bring its model back."""
        settings = {**shallow_unlearning(lab), "dtype": self.common.dtype, "device": self.common.device}
        config = unlearn_config("grad_diff", settings, "the shallow control")
        read = [config.model, *map(dataset_of, (*config.forget, *config.retain))]
        what = {"method": config.method, "settings": to_dict(config), "weights": [ONES] * len(config.forget)}
        return self._task("train", "shallow", (), what, read)

    @_once
    def attack(self, model: Task | str, configuration: Configuration) -> Task:
        """A configuration of the attacks against a model, or the model of a training."""
        config = self.spec.attacked()
        assert config is not None, "only what is attacked gets such tasks"
        trained = isinstance(model, Task)
        label = model.label if isinstance(model, Task) else model.rstrip("/").rpartition("/")[2]
        what = {
            "model": {"task": model.name} if isinstance(model, Task) else {"folder": model},
            "configuration": values_of(configuration), "settings": {name: getattr(config, name) for name in _MEETING},
        }  # fmt: skip
        read = [self.spec.base, *_read_by(config), *([] if trained else [str(model)])]
        return self._task(
            "attack", f"{label}-{configuration.readable}", [model.name] if isinstance(model, Task) else [], what, read
        )

    def config(self, method: str, seed: int, setting: tuple[str, float] | None) -> UnlearnConfig:
        """The configuration of an unlearning but for its folder and weights."""
        own = self.spec.methods[method]
        values = merged(self.spec.settings, own.settings, _corpora(self.spec, own.corpora))
        values = merged(values, {"train": {"seed": seed}})
        if not find_method(own.method).alternatives:
            values["alternative"] = ()
        if setting is not None:
            values = merged(values, nested(setting[0], setting[1]))
        return unlearn_config(own.method, values, f"method {method}")

    def _sources(self, weighting: WeightingSpec, corpus: int) -> tuple[dict[str, Any], list[Task]]:
        what: dict[str, Any] = {"corpus": self.spec.corpora.forget[corpus]}
        runs: list[Task] = []
        for side in ("scores", "against"):
            what[side] = []
            for text in getattr(weighting, side):
                name, _, query = text.partition(":")
                given = self.spec.scores[name]
                entry: dict[str, Any] = {"query": query, "sign": given.sign, "alignment": given.alignment}
                if given.folders:
                    entry |= {"folder": given.folders[corpus], "content": self._content(given.folders[corpus])}
                else:
                    runs.append(self.scores(name, corpus))
                    entry |= {"task": runs[-1].name, "within": bool(given.within)}
                what[side].append(entry)
        what |= {"base": self.spec.base, "max_length": self.common.max_length, "min_chars": self.common.min_chars}
        return what, list({run.name: run for run in runs}.values())

    def _task(self, kind: Kind, label: str, needs: Sequence[str], what: dict[str, Any], read: Sequence[str]) -> Task:
        contents = {source: self._content(source) for source in sorted(set(read))}
        return named(kind, label, needs, what, contents, self.spec.threads)

    def _content(self, source: str) -> str | None:
        if source not in self.contents:
            self.contents[source] = content(source)
        return self.contents[source]


def named(
    kind: Kind, label: str, needs: Sequence[str], what: dict[str, Any], read: Mapping[str, str | None], threads: int
) -> Task:
    """A task under the name that what it is made of gives it; read: hashes of what it reads."""
    plain = json.loads(json.dumps(what, default=str))
    made_of = {"kind": kind, "what": plain, "threads": threads, "read": dict(read)}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return Task(kind, f"{kind}.{label}.{digest}", tuple(dict.fromkeys(needs)), plain)


def unlearn_config(method: str, values: Mapping[str, Any], where: str) -> UnlearnConfig:
    """The configuration of `retrograd unlearn METHOD` from plain values.

    Raises:
        ValueError: If there is no such method, or a setting does not exist or cannot work.
    """
    unlearning = find_method(method)
    kind: Any = with_objective(unlearning.defaults, adapters=unlearning.adapters)
    config: UnlearnConfig = build(kind, {**values, "method": method}, where)
    check_unlearn(config)
    return config


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over settings, those inside too.

    >>> merged({"train": {"lr": 1, "seed": 2}}, {"train": {"lr": 3}})
    {'train': {'lr': 3, 'seed': 2}}
    """
    settings: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            inner = isinstance(value, Mapping) and isinstance(settings.get(name), Mapping)
            settings[name] = merged(settings[name], value) if inner else value
    return settings


def texts_in(value: Any) -> Iterator[str]:
    """All texts in plain values, such as settings, that may name a file or a model; an empty one names no folder."""
    if isinstance(value, str):
        yield from (value,) if value else ()
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in texts_in(inner))
    elif isinstance(value, (list, tuple)):
        yield from (text for inner in value for text in texts_in(inner))


def dataset_of(text: str) -> str:
    """The data set of a text that may go on with what to read of it."""
    return str(parse_source(text, UnlearnConfig()).dataset)


def _read_by(config: AttackConfig) -> list[str]:
    """What attacks train on and ask."""
    if config.lab is not None:
        return [str(config.lab / name) for name in ("facts.jsonl", "corpora", "questions")]
    assert config.tasks is not None, "checked by the settings"
    asked = [str(task.dataset) for task in tasks_from(config.tasks).values()]
    return [str(config.tasks), *asked, *(dataset_of(text.partition("=")[2]) for text in config.data)]


def _corpora(spec: ExperimentSpec, own: CorporaSpec | None = None) -> dict[str, Any]:
    return {"model": spec.base, **asdict(own or spec.corpora)}


def nested(name: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of a.b."""
    first, dot, rest = name.partition(".")
    return {first: nested(rest, value) if dot else value}
