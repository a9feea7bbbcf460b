"""The configuration of a run: the dataclasses behind the command line and run_config.yaml. No heavy imports here."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from retrograd.settings.during import DuringConfig, check_during
from retrograd.settings.parse import build, parse_size, read_yaml
from retrograd.settings.question import ChoiceLoss, Question, Source

__all__ = [
    "DataConfig", "LoraConfig", "MagicConfig", "QueryConfig", "ReplayConfig", "TrainConfig",
    "check", "check_query", "difference", "from_yaml", "queries_of", "query_file", "refuse_code",
    "settings_from", "to_dict",
]  # fmt: skip


C = TypeVar("C")


@dataclass(frozen=True)
class DataConfig(Source):
    """What the model is trained on."""

    dataset: str = tyro.MISSING
    """Hub name, folder saved by `datasets`, or a .jsonl, .json, .csv, .tsv, .parquet or .txt file."""
    chunk_length: int | None = None
    """Pack documents into chunks of this many tokens instead; attention stays inside each document. 0, as None: one row
    a document."""
    min_chars: int = 0
    """Skip documents with fewer characters."""
    shuffle: bool = True
    """Visit rows in a new random order each epoch (true), or in file order (false)."""

    def __post_init__(self) -> None:
        if self.chunk_length == 0:
            object.__setattr__(self, "chunk_length", None)


@dataclass(frozen=True)
class QueryConfig(Question):
    """What is asked of the trained model, in nats: its loss on documents or on questions, or a function of yours."""

    form: Literal["text", "letter", "cloze"] = "text"
    """text: mean token loss. letter, cloze: multiple choice by answer letter, or by the answers' own texts; the data
    set then needs question, choices and answer."""
    reduction: Literal["mean", "none"] = "mean"
    """One score for the whole set (mean), or one score column for each document or question (none)."""
    loss: ChoiceLoss = "four_way"
    """four_way: −log of the right answer's share among the question's choices, what accuracy measures; full: −log p of
    the right answer, which also falls when all answers become more likely."""
    function: str | None = None
    """A Python function instead, module:name or file.py:name, called with (model, tokenizer); returns a scalar."""
    contrast: tuple[str, ...] = ()
    """Two other queries by name instead: the first minus the second."""


@dataclass(frozen=True)
class TrainConfig:
    """The recipe."""

    optimizer: Literal["sgd", "adamw", "muon"] = "adamw"
    """Optimizer; muon acts on hidden matrices and AdamW on the rest."""
    lr: float = 1e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine", "polynomial", "one-cycle"] = "constant"
    """How the learning rate moves over the run."""
    warmup_ratio: float | None = None
    """Share of the steps in which the learning rate rises; 0 when None (0.3 for one-cycle)."""
    momentum: float = 0.0
    """Momentum of sgd; muon uses 0.95 when this is 0."""
    nesterov: bool = False
    """Nesterov's form of sgd's momentum."""
    beta1: float = 0.9
    """AdamW's decay of the gradient mean."""
    beta2: float = 0.999
    """AdamW's decay of the squared-gradient mean."""
    eps: float = 1e-8
    """AdamW's ε outside the root."""
    eps_root: float = 1e-8
    """AdamW's ε inside the root; larger values make scores smoother."""
    weight_decay: float = 0.0
    """Decoupled for adamw and muon, added to the gradient for sgd."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm."""
    batch_size: int = 8
    """Rows in a step."""
    micro_batch_size: int | None = None
    """Rows a forward pass takes at once; the result is the same."""
    epochs: int = 1
    """Passes over the data."""
    seed: int = 0
    """Of the order of rows (epoch e uses seed + e), adapters' initialisation and dropout."""
    dropout: bool = False
    """Leave the model's dropout active. Scores then predict retraining badly unless its draws are replayed too."""


@dataclass(frozen=True)
class ReplayConfig:
    """What is kept of the training for the way back."""

    plan: Literal["auto", "all", "gradients", "interval", "sqrt", "log", "binomial"] = "auto"
    """auto keeps the gradients of all steps and few states where that takes two thirds of the room of all states or
    less (AdamW, SGD with momentum), else all states; on a GPU all states first; where neither fits, the binomial plan
    over the states that do."""
    memory: str = "auto"
    """Host memory for states and gradients, such as 8GiB; auto takes half of what is free. Those on disk take up to two
    states more, and so does what a step has done with, which is used again; at 0 little of it is kept."""
    disk: str = "auto"
    """Disk for states and gradients; auto takes half of what is free."""
    interval: int | None = None
    """Distance between held states, for the interval plan."""
    slots: int | None = None
    """States held at once, for the binomial and gradients plans; when None as many as fit, or as are of use."""
    keep: bool = False
    """Leave what the forward run kept on disk, for further queries."""
    heartbeat: float = 60.0
    """Seconds between durable resume points; 0 makes one at every step."""


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters only (off while rank is 0)."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model."""
    alpha: float = 16.0
    """Scale: adapters are multiplied by alpha/rank."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers to adapt; peft's choice for the architecture when empty."""


@dataclass(frozen=True)
class MagicConfig:
    """Train a model, pull the query loss back through every step, and write each training example's exact score."""

    run: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """Folder of the run. Running again continues, or answers that it is done."""
    model: str = tyro.MISSING
    """Causal language model: hub name or local folder."""
    tokenizer: str | None = None
    """Tokenizer, if not the model's."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of parameters and arithmetic. Scores in bfloat16 are mostly noise."""
    engine: Literal["auto", "double", "blocks"] = "auto"
    """How a step is differentiated twice: double is faster and holds the whole graph; blocks holds one layer's. auto
    takes double where it fits in memory. Results are equal to rounding."""
    compile: bool = False
    """Compile the passes over a layer, once for all layers and lengths: takes minutes before the first step. Takes the
    engine blocks, and for its way back keeps more than blocks does alone."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    data: DataConfig = field(default_factory=DataConfig)
    query: QueryConfig = field(default_factory=QueryConfig)
    query_file: Path | None = None
    """YAML file of several queries for one sweep, settings by name: {a: {dataset: …}, gap: {contrast: [a, b]}}."""
    queries: tyro.conf.Suppress[dict[str, QueryConfig]] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    attribute: Literal["examples", "tokens"] = "examples"
    """One score per document, or one per training token."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sharpness: bool = False
    """Estimate lr·λ_max of the Hessian by step; costs one more Hessian-vector product a step."""
    evaluate: DuringConfig = field(default_factory=DuringConfig)
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also show the numbers of metrics.jsonl in tensorboard, wandb (offline) or trackio (local); several may be given.
    Each needs its extra: pip install "retrograd[tensorboard]"."""
    config: Path | None = None
    """YAML file of defaults, such as another run's run_config.yaml; flags override it."""
    overwrite: bool = False
    """Start afresh where the folder holds another run."""
    trust_code: bool = False
    """Run the Python functions that a file names: a run's own settings, --config or --query_file. They run with your
    rights, so read them first. A --query.function typed in the command needs no such word."""


# Where a run is and how it is carried out do not change what it computes.
# The engine that training took, compiled or not, is in the manifest; it is compared there, for "auto" does not tell.
_NOT_THE_RUN = (
    "run",
    "config",
    "overwrite",
    "trust_code",
    "replay",
    "sharpness",
    "engine",
    "compile",
    "evaluate",
    "log",
)
_GONE = ("matmul",)  # settings of earlier versions; a run's manifest says what it took


def to_dict(config: MagicConfig) -> dict[str, Any]:
    """The configuration as plain values, without the folder and the flags about it."""
    values = _plain(dataclasses.asdict(config))
    return {name: value for name, value in values.items() if name in _STORED}


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "name: old → new" for all that makes two configurations different runs."""
    flat_old, flat_new = _flatten(old), _flatten(new)
    names = [name for name in {**flat_old, **flat_new} if name.split(".")[0] not in (*_NOT_THE_RUN, *_GONE)]
    return [
        f"{name}: {flat_old.get(name)!r} → {flat_new.get(name)!r}"
        for name in names
        if flat_old.get(name) != flat_new.get(name)
    ]


def settings_from(kind: type[C], path: Path) -> C:
    """Defaults from a YAML file; the folder of the run is left to be given.

    Raises:
        ValueError: If the file is missing or not YAML, or names a setting that does not exist.
    """
    values = read_yaml(path)
    return build(kind, {name: value for name, value in values.items() if name not in _GONE}, str(path))


def from_yaml(path: Path) -> MagicConfig:
    """The configuration of a run, from its run_config.yaml."""
    return settings_from(MagicConfig, path)


def query_file(path: Path) -> dict[str, QueryConfig]:
    """Queries by name, from a YAML file."""
    values = read_yaml(path)
    for name, settings in values.items():
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: query {name!r} is {settings!r}; it has to be settings, such as {{dataset: …}}")
    return {str(name): build(QueryConfig, settings, f"{path}: {name}") for name, settings in values.items()}


def queries_of(config: MagicConfig) -> dict[str, QueryConfig]:
    """All queries of a run by name; the one of --query.* is called "query"."""
    given = config.query
    main = {"query": given} if given.dataset or given.function or given.contrast else {}
    return {**main, **config.queries}


def refuse_code(queries: dict[str, QueryConfig], file: Path, trusted: bool) -> None:
    """Refuse to run functions that a file names, unless whoever runs the command trusts them.

    Raises:
        ValueError: With the function, its query and the file.
    """
    named = [(name, query.function) for name, query in queries.items() if query.function]
    if named and not trusted:
        (name, function), more = named[0], f" ({len(named) - 1} more)" if len(named) > 1 else ""
        raise ValueError(
            f"{file} names Python code: query {name!r} runs {function}{more}, with your rights. Read it; then give "
            "--trust_code to run it"
        )


def check(config: MagicConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    train, data, replay = config.train, config.data, config.replay
    for name, number in (("train.batch_size", train.batch_size), ("train.epochs", train.epochs),
                         ("train.micro_batch_size", train.micro_batch_size), ("data.limit", data.limit),
                         ("data.max_length", data.max_length), ("data.chunk_length", data.chunk_length),
                         ("replay.interval", replay.interval), ("replay.slots", replay.slots)):  # fmt: skip
        if number is not None and number < 1:
            raise ValueError(f"--{name} is {number}; it has to be at least 1")
    for name, value in (("train.lr", train.lr), ("replay.heartbeat", replay.heartbeat)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name} is {value}; it has to be a finite number, 0 or more")
    if train.warmup_ratio is not None and not 0 <= train.warmup_ratio < 1:
        raise ValueError(f"--train.warmup_ratio is {train.warmup_ratio}; it has to be at least 0 and below 1")
    if train.max_grad_norm is not None and not train.max_grad_norm > 0:
        raise ValueError(f"--train.max_grad_norm is {train.max_grad_norm}; it has to be above 0")
    if replay.plan == "interval" and replay.interval is None:
        raise ValueError("--replay.plan interval needs --replay.interval, the distance between held states")
    if config.compile and config.engine == "double":
        raise ValueError(
            "--compile with --engine double cannot work: a compiled function has no double backward. Leave --engine "
            "out, or take blocks"
        )
    if config.compile and train.dropout:
        raise ValueError("--compile takes --engine blocks, which --train.dropout excludes; leave one of the two out")
    if config.lora.rank < 0:
        raise ValueError(f"--lora.rank is {config.lora.rank}; it has to be at least 1, or 0 for no adapters")
    if data.max_length is not None and data.chunk_length is not None:
        raise ValueError("--data.max_length and --data.chunk_length exclude each other: cut documents, or pack them")
    for size in (replay.memory, replay.disk):
        if size != "auto":
            parse_size(size)
    check_during(config.evaluate)
    queries = queries_of(config)
    if "query" in config.queries and config.query != QueryConfig():
        raise ValueError("--query_file has a query named 'query', which is the one of --query; give it another name")
    if not queries:
        raise ValueError("no query: give --query.dataset (or --query.function, or several in --query_file)")
    for name, query in queries.items():
        check_query(name, query, queries)


def check_query(name: str, query: QueryConfig, known: dict[str, QueryConfig]) -> None:
    """Refuse a query that cannot work."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"query name {name!r} is used as a folder; use letters, digits, '.', '_' and '-'")
    sources = {"dataset": query.dataset, "function": query.function, "contrast": query.contrast}
    given = [source for source, value in sources.items() if value]
    if len(given) != 1:
        found = f"it has {' and '.join(given)}" if given else "it has none"
        raise ValueError(f"query {name!r} needs exactly one of dataset, function and contrast; {found}")
    for setting, number in (("limit", query.limit), ("max_length", query.max_length)):
        if number is not None and number < 1:
            raise ValueError(f"query {name!r}: {setting} is {number}; it has to be at least 1")
    if query.contrast:
        if len(query.contrast) != 2 or len(set(query.contrast)) != 2:
            raise ValueError(f"query {name!r} contrasts {', '.join(query.contrast)}; it takes two different queries")
        for other in query.contrast:
            if other not in known or known[other].contrast:
                raise ValueError(
                    f"query {name!r} contrasts {other!r}, which is no other plain query; there are "
                    f"{', '.join(n for n in known if not known[n].contrast) or 'none'}"
                )
    changed = [f.name for f in dataclasses.fields(query) if getattr(query, f.name) != f.default]
    _check_belongs(name, query, given[0], changed)
    if query.normalise and query.form != "cloze":
        raise ValueError(f"query {name!r}: normalise belongs to --query.form cloze; a letter is one token")


def _check_belongs(name: str, query: QueryConfig, source: str, changed: list[str]) -> None:
    """Refuse settings that this kind of query would ignore."""
    if source != "dataset":
        unread = [setting for setting in changed if setting != source]
        kind = f"a {source}"
    elif query.form == "text":
        unread, kind = [s for s in changed if s in ("template", "loss", "normalise")], "--query.form text"
    else:
        unread, kind = [s for s in changed if s == "text_column"], f"--query.form {query.form}"
    if unread:
        raise ValueError(f"query {name!r}: {kind} has no use for {', '.join(unread)}; leave that out")


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as text, as YAML has them."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


_STORED = {f.name for f in dataclasses.fields(MagicConfig)} - {"run", "config", "overwrite", "query_file", "trust_code"}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
