"""The file of an experiment, and the configuration of `retrograd experiment`. No heavy imports here.

A file is YAML. `names` gives words that stand elsewhere in it as ${word}; `--names word=value` gives others, so that a
file runs elsewhere by changing names. With an entry `lab` the word lab is the lab that is built first, in OUT/lab.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from retrograd.settings.attack import AttackConfig
from retrograd.settings.attacked import LAB, attack_settings, lab_settings
from retrograd.settings.commands import LabConfig
from retrograd.settings.parse import build, by_name, fill, named, read_yaml
from retrograd.settings.run import QueryConfig
from retrograd.settings.select import Alignment, Control, Rule, Sign, Use
from retrograd.settings.tasks import Task, tasks_from, tasks_of

__all__ = [
    "AskedSpec", "CorporaSpec", "ExperimentConfig", "ExperimentSpec", "Match", "MethodSpec", "ScoresSpec", "TuneSpec",
    "WeightingSpec", "lab_of", "read_experiment",
]  # fmt: skip

Match = Literal["none", "utility", "forgetting"]


@dataclass(frozen=True)
class ExperimentConfig:
    """Methods × weightings × seeds at one utility, with controls, by any number of workers; one table, and claims.

    Every call on the same folder is a worker: start as many as you like, on whatever machines see the folder. Killed
    and started again, they do what is missing.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")] = tyro.MISSING
    """YAML file: a grid of recipes whose scores are validated; or base, corpora, scores, weightings, methods, seeds,
    match, tune, report. See docs/experiment.md."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Folder of the experiment. A changed file may use the same folder: what is the same is not computed again."""
    workers: int = 1
    """Workers that this call starts, itself one of them."""
    lease: float = 120.0
    """Seconds without progress after which another worker takes a task over; longer than the longest step."""
    retry: bool = False
    """Try again what has failed."""
    names: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE, in place of what the file's `names` say; settings by name in braces: 'attack={lab: runs/lab}'."""


@dataclass(frozen=True)
class CorporaSpec:
    """Data sets, written as for `retrograd unlearn`."""

    forget: tuple[str, ...]
    retain: tuple[str, ...] = ()
    alternative: tuple[str, ...] = ()
    """One document for each to forget, for dpo."""


@dataclass(frozen=True)
class ScoresSpec:
    """A set of scores for every token of the forget corpora: `queries` asked of a fine-tuning of the base on each of
    them, or scores that are there."""

    queries: dict[str, QueryConfig] = field(default_factory=dict)
    """Of `retrograd magic`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings of `retrograd magic`, such as `train`; written beside the others."""
    folders: tuple[str, ...] = ()
    """Instead: a run or file for each forget corpus, as `retrograd select --scores` takes it."""
    sign: Sign | None = None
    """Of files, as `retrograd select --sign`."""
    alignment: Alignment | None = None
    """Of files, as `retrograd select --alignment`."""
    within: str | None = None
    """With queries: a data set that holds all the corpora, its columns `file` and `line` saying where, on which one run
    is trained instead of one on each corpus. The base's own pretraining, say."""
    start: str | None = None
    """With `within`: the model that run starts from; the base when None."""


@dataclass(frozen=True)
class WeightingSpec:
    """Weights of the forget tokens: ones where nothing is given, what a rule makes of scores, or a control of that."""

    scores: tuple[str, ...] = ()
    """NAME:query of `scores`; of what is to go. Several are averaged."""
    against: tuple[str, ...] = ()
    """NAME:query; of what is to stay."""
    rule: Rule = "value"
    use: Use = "removal"
    alpha: float = 1.0
    soft: float | None = None
    clip: float = 1.0
    q: float = 0.1
    k: int | None = None
    control: Control | None = None
    """The weights of the weighting `of` on other tokens; drawn anew for each seed where something is random."""
    of: str | None = None
    keywords: Path | None = None
    """For the control keyword; the one thing that may read the truth of a lab."""
    files: tuple[str, ...] = ()
    """Instead: a folder of weights for each forget corpus, as `retrograd select` and `harden` leave them."""


@dataclass(frozen=True)
class TuneSpec:
    """How a setting of each arm is found, on the first seed, by bisection of its logarithm between `low` and `high`."""

    setting: str = "train.lr"
    """Of `retrograd unlearn`: a step size, or a coefficient such as objective.forget. Larger means more change."""
    low: float = 1e-5
    high: float = 1e-2
    start: float | None = None
    """Tried first; the geometric middle when None."""
    steps: int = 6
    """Trainings at most."""
    measure: Literal["kl", "accuracy"] = "kl"
    """utility: retain KL from the base in nats per token, or the drop of the retain accuracy, 0 to 1."""
    budget: float = 0.02
    """utility: the largest setting is taken whose damage is at most this."""
    target: float = 0.5
    """forgetting: the smallest setting is taken whose forget accuracy is at most this."""
    tolerance: float = 0.2
    """Stop when within this share of the budget; and utilities within it count as the same."""


@dataclass(frozen=True)
class AskedSpec:
    """Questions and held-out rows. Those of `tune` are all that tuning sees, those of `report` all that is reported."""

    tasks: dict[str, Task] = field(default_factory=dict)
    """As a file of `retrograd evaluate --tasks`, or the name of one. `role` says what is to go and what to stay."""
    rows: tuple[str, ...] = ()
    """Data sets on which the divergence from the base is measured, written as for `retrograd unlearn`."""


@dataclass(frozen=True)
class MethodSpec:
    """A method of unlearning with its settings."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `retrograd unlearn`, written beside the others: train, objective, lora, …"""
    weightings: tuple[str, ...] = ()
    """Which ones it takes; all when empty."""
    corpora: CorporaSpec | None = None
    """Its own; with weights by scores, the experiment's to forget, which those are of."""
    tune: TuneSpec = field(default_factory=TuneSpec)
    """What differs from the experiment's."""


@dataclass(frozen=True)
class ExperimentSpec:
    """What a file says."""

    base: str
    corpora: CorporaSpec
    report: AskedSpec
    methods: dict[str, MethodSpec] = field(default_factory=dict)
    weightings: dict[str, WeightingSpec] = field(default_factory=dict)
    scores: dict[str, ScoresSpec] = field(default_factory=dict)
    analyses: dict[str, WeightingSpec] = field(default_factory=dict)
    """Pairs of score sets, `scores` and `against`, whose separation is analysed."""
    columns: tuple[str, ...] = ()
    """Further columns of the table: METRIC:TASK of docs/metrics.md, such as forget_quality:forget_paraphrase."""
    match: tuple[Match, ...] = ("none",)
    tune: AskedSpec = field(default_factory=AskedSpec)
    seeds: tuple[int, ...] = (0,)
    never: str | None = None
    """A model that never knew: position 0. Nothing but the report reads it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of `retrograd unlearn` for all methods: train, dtype, max_length, …"""
    threads: int = 1
    """Of every worker, whatever it runs on: the bits of a sum depend on it."""
    batch_size: int = 16
    """Questions read at once."""
    attack: dict[str, Any] = field(default_factory=dict)
    """Settings of `retrograd attack`: every model of every arm meets its attacks, controls beside them; see `attacked`.
    """

    def attacked(self, out: Path = Path()) -> AttackConfig | None:
        """The attacks' settings, with their folder; None if nothing is attacked."""
        if not self.attack:
            return None
        return attack_settings(self.attack, self.base, self.never, self.settings, out, "attack")


def lab_of(path: Path, names: tuple[str, ...], folder: Path) -> LabConfig | None:
    """The lab that an experiment builds first; None if it builds none, or `names` give one.

    Raises:
        ValueError: If its settings cannot work.
    """
    values = read_yaml(path)
    given = by_name(values.get("names"), f"{path}: names") | dict(named(text) for text in names)
    if LAB not in values or LAB in given:
        return None
    return lab_settings(fill(values[LAB], given, str(path)), folder, f"{path}: {LAB}")


def read_experiment(path: Path, names: tuple[str, ...] = ()) -> ExperimentSpec:
    """An experiment from its file.

    Args:
        names: NAME=VALUE; of a file that builds a lab its folder too, as lab=DIR.
    Raises:
        ValueError: If the file is none, or anything in it cannot work as far as is known before data are read.
    """
    values = read_yaml(path)
    known = {**by_name(values.pop("names", None), f"{path}: names"), **dict(named(text) for text in names)}
    values.pop(LAB, None)
    values = fill(values, known, str(path))
    common = {name: values.pop(name) for name in list(values) if name in _UNLEARN}
    if str(values.get("seeds", "")).isdecimal():
        values["seeds"] = list(range(int(values["seeds"])))
    tune = by_name(values.pop("tune", None), f"{path}: tune")
    asked = {name: tune.pop(name) for name in ("tasks", "rows") if name in tune}
    for name in ("report", "corpora"):
        if not isinstance(values.get(name), dict):
            raise ValueError(f"{path} has no `{name}`, settings by name; see docs/experiment.md")
    for name, settings in (("report", values["report"]), ("tune", asked)):
        values[name] = {**settings, "tasks": _tasks(settings.get("tasks"), path, name)}
    values["scores"] = {name: _split(settings, ScoresSpec) for name, settings in _each(values, "scores", path)}
    values["methods"] = {name: _method(name, settings, tune) for name, settings in _each(values, "methods", path)}
    spec: ExperimentSpec = build(ExperimentSpec, {**values, "settings": common}, str(path))
    _check(spec, path)
    return spec


_UNLEARN = ("train", "lora", "dtype", "device", "tokenizer", "max_length", "min_chars", "shuffle", "horizon",
            "heartbeat")  # fmt: skip


def _tasks(given: Any, path: Path, name: str) -> dict[str, Task]:
    if isinstance(given, str):
        return tasks_from(Path(given))
    return tasks_of(given, path.parent, f"{path}: {name}") if given else {}


def _each(values: dict[str, Any], name: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    entries = values.get(name) or {}
    if not isinstance(entries, dict) or not all(entry is None or isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path}: {name} has to be settings by name, such as {{first: {{…}}, second: {{…}}}}")
    return [(key, entry or {}) for key, entry in entries.items()]


def _split(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    """Its own settings, and all others under `settings`."""
    own = {f.name for f in dataclasses.fields(kind)}
    return {**{name: value for name, value in values.items() if name in own},
            "settings": {name: value for name, value in values.items() if name not in own}}  # fmt: skip


def _method(name: str, values: dict[str, Any], tune: dict[str, Any]) -> dict[str, Any]:
    split = _split({"method": name, **values}, MethodSpec)
    return {**split, "tune": {**tune, **(split.get("tune") or {})}}


def _check(spec: ExperimentSpec, path: Path) -> None:
    for kind in ("methods", "weightings", "scores", "analyses"):
        for name in getattr(spec, kind):
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
                raise ValueError(f"{path}: {kind}: {name!r} names folders; use letters, digits, '.', '_', '+' and '-'")
    if not (spec.methods and spec.weightings) and not spec.analyses:
        raise ValueError(f"{path} has nothing to do: give `methods` and `weightings`, or `analyses`")
    if spec.threads < 1 or spec.batch_size < 1 or not spec.seeds or len(set(spec.seeds)) < len(spec.seeds):
        raise ValueError(
            f"{path}: threads is {spec.threads}, batch_size {spec.batch_size}, seeds {list(spec.seeds)}: at least 1, "
            "and seeds that differ"
        )
    _check_settings(spec, path)
    _check_scores(spec, path)
    for name, weighting in spec.weightings.items():
        _check_weighting(name, weighting, spec, path)
    for name, analysis in spec.analyses.items():
        if not (analysis.scores and analysis.against):
            raise ValueError(f"{path}: analysis {name} compares two score sets: give `scores` and `against`")
        _check_source(f"analysis {name}", analysis, spec, path)
    spec.attacked()
    for name, method in spec.methods.items():
        if unknown := set(method.weightings) - set(spec.weightings):
            raise ValueError(f"{path}: method {name} takes the weighting {min(unknown)!r}, and there is none")
        weighed = [
            chosen for chosen in method.weightings or spec.weightings if spec.weightings[chosen] != WeightingSpec()
        ]
        if method.corpora is not None and method.corpora.forget != spec.corpora.forget and weighed:
            raise ValueError(
                f"{path}: method {name} has corpora of its own to forget, and weighting {weighed[0]} is of the "
                "experiment's: give it `weightings` without scores"
            )
        _check_tuning(f"{path}: method {name}", method.tune, spec)


_NOT_OF_SCORES = ("run", "model", "data", "attribute", "query", "query_file", "evaluate", "log", "config", "overwrite",
                  "trust_code")  # fmt: skip
_NOT_OF_METHODS = ("run", "model", "forget", "retain", "alternative", "weights", "evaluate", "log", "config", "export",
                   "overwrite", "attribute", "query", "query_file", "queries", "trust_code")  # fmt: skip


def _check_settings(spec: ExperimentSpec, path: Path) -> None:
    """What an experiment sets itself; evaluation on the way, say, could choose by what is reported."""
    of_scores = [(f"scores {name}", scores.settings, _NOT_OF_SCORES) for name, scores in spec.scores.items()]
    of_methods = [(f"method {name}", method.settings, _NOT_OF_METHODS) for name, method in spec.methods.items()]
    for where, settings, own in of_scores + of_methods:
        if taken := [name for name in settings if name in own]:
            raise ValueError(f"{path}: {where}: {taken[0]} is set by the experiment itself; leave it out")
    for name, scores in spec.scores.items():
        if named := [query for query, asked in scores.queries.items() if asked.function]:
            raise ValueError(f"{path}: scores {name}: query {named[0]} names a function; run `retrograd magic`, and "
                             "give its folder")  # fmt: skip


def _check_scores(spec: ExperimentSpec, path: Path) -> None:
    for name, scores in spec.scores.items():
        if bool(scores.queries) == bool(scores.folders):
            raise ValueError(f"{path}: scores {name}: give `queries` for a run, or `folders`; one of them")
        if scores.folders and (scores.settings or len(scores.folders) != len(spec.corpora.forget)):
            raise ValueError(
                f"{path}: scores {name}: {len(scores.folders)} folders for {len(spec.corpora.forget)} forget corpora; "
                "one for each, in the same order, and no settings of a run"
            )
        if (scores.start and not scores.within) or (scores.within and scores.folders):
            raise ValueError(f"{path}: scores {name}: `start` goes with `within`, and `within` with `queries`")
        if scores.queries and (scores.sign or scores.alignment):
            raise ValueError(f"{path}: scores {name}: sign and alignment are of files; a run has its own")


def _check_weighting(name: str, weighting: WeightingSpec, spec: ExperimentSpec, path: Path) -> None:
    where = f"{path}: weighting {name}"
    if weighting.files and (weighting != WeightingSpec(files=weighting.files)
                            or len(weighting.files) != len(spec.corpora.forget)):  # fmt: skip
        raise ValueError(f"{where}: `files` stands alone, one for each of {len(spec.corpora.forget)} forget corpora")
    if (weighting.control is None) != (weighting.of is None):
        raise ValueError(f"{where}: `control` and `of` belong together: which weighting's weights go elsewhere?")
    if weighting.control is None:
        changed = [f.name for f in dataclasses.fields(weighting) if getattr(weighting, f.name) != f.default]
        if not weighting.scores and not weighting.files and changed:
            raise ValueError(f"{where}: {changed[0]} without `scores`; give NAME:query, or nothing for weights of one")
        if weighting.keywords is not None:
            raise ValueError(f"{where}: keywords are for control: keyword")
        _check_source(where, weighting, spec, path)
        return
    other = spec.weightings.get(str(weighting.of))
    if other is None or other.control is not None or not other.scores:
        raise ValueError(f"{where}: `of` is {weighting.of!r}, which is no weighting by scores; there are "
                         f"{', '.join(n for n, w in spec.weightings.items() if w.scores) or 'none'}")  # fmt: skip
    if weighting != WeightingSpec(control=weighting.control, of=weighting.of, keywords=weighting.keywords):
        raise ValueError(f"{where}: a control has the rule of {weighting.of}; leave other settings out")
    if (weighting.control == "keyword") != (weighting.keywords is not None):
        raise ValueError(f"{where}: `keywords` and control keyword belong together")
    if weighting.control == "retain_only" and not other.against:
        raise ValueError(f"{where}: retain_only needs `against` in {weighting.of}")


def _check_source(where: str, weighting: WeightingSpec, spec: ExperimentSpec, path: Path) -> None:
    for side in (weighting.scores, weighting.against):
        sets = [spec.scores[name] for source in side if (name := source.partition(":")[0]) in spec.scores]
        if len({(scores.sign, scores.alignment) for scores in sets}) > 1:
            raise ValueError(f"{where}: {', '.join(side)} are averaged, and their signs or alignments differ")
    for source in (*weighting.scores, *weighting.against):
        name, _, query = source.partition(":")
        if name not in spec.scores:
            raise ValueError(f"{where}: scores {source!r} name no set of `scores`: {', '.join(spec.scores) or 'none'}")
        queries = spec.scores[name].queries
        if queries and query not in queries:
            raise ValueError(f"{where}: scores {source!r}: {name} asks {', '.join(queries)}; write {name}:QUERY")


def _check_tuning(where: str, tune: TuneSpec, spec: ExperimentSpec) -> None:
    if set(spec.match) - set(get_args(Match)) or not spec.match:
        raise ValueError(f"{where}: match is {list(spec.match)}; it has to be of {', '.join(get_args(Match))}")
    if set(spec.match) == {"none"}:
        return
    numbers = (tune.low, tune.high, tune.budget, tune.tolerance, tune.start or tune.low)
    if not all(math.isfinite(x) and x > 0 for x in numbers) or not tune.low < tune.high or tune.steps < 1:
        raise ValueError(
            f"{where}: tune from {tune.low} to {tune.high}, start {tune.start}, budget {tune.budget}, tolerance "
            f"{tune.tolerance}, {tune.steps} steps: all above 0, low below high"
        )
    if tune.start is not None and not tune.low <= tune.start <= tune.high:
        raise ValueError(f"{where}: tune starts at {tune.start}, outside {tune.low} to {tune.high}")
    roles = {task.role for task in spec.tune.tasks.values() if task.choices}
    if "utility" in spec.match:
        if tune.measure == "kl" and not spec.tune.rows:
            raise ValueError(f"{where}: match utility by kl needs `rows` in tune: held-out rows to stay")
        if tune.measure == "accuracy" and "retain" not in roles:
            raise ValueError(f"{where}: match utility by accuracy needs a task of role retain in tune")
    if "forgetting" in spec.match and "forget" not in roles:
        raise ValueError(f"{where}: match forgetting needs a task of role forget in tune")
