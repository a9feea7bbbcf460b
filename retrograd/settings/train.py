"""The recipe of a training and the configuration of `retrograd train`: what every command that trains has in common.

No heavy imports here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import tyro

from retrograd.settings.on_the_way import OnTheWayConfig, check_on_the_way
from retrograd.settings.question import Source

__all__ = [
    "GONE", "DataConfig", "ExportConfig", "LoraConfig", "LrSchedule", "RecipeConfig", "ReplayConfig", "RunConfig",
    "TrainConfig", "TrainRunConfig",
    "at_least_1", "check_precision", "check_ranks", "check_recipe", "check_train", "check_training", "difference",
    "finite", "to_dict",
]  # fmt: skip

LrSchedule = Literal["constant", "linear", "cosine", "polynomial", "one-cycle", "one-cycle-linear"]


@runtime_checkable
class Shared(Protocol):
    """How processes share steps: settings of every command that lets them."""

    @property
    def parallel(self) -> str: ...

    @property
    def replicas(self) -> int: ...

    @property
    def shards(self) -> int | None: ...

    @property
    def patience(self) -> float: ...


@dataclass(frozen=True)
class DataConfig(Source):
    """What the model is trained on."""

    dataset: str = tyro.MISSING
    """Hub name, folder saved by `datasets`, or a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or one of them with
    .gz or .zst behind it."""
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
class TrainConfig:
    """The recipe."""

    optimizer: Literal["sgd", "adam", "adamw", "muon"] = "adamw"
    """Optimizer; adam is adamw with coupled weight decay; muon acts on hidden matrices and AdamW on the rest."""
    lr: float = 1e-4
    """Peak learning rate."""
    lr_schedule: LrSchedule = "constant"
    """How the learning rate moves over the run; one-cycle along half cosines, one-cycle-linear along straight lines."""
    lr_start: float | None = None
    """Learning rate at the first step of the warmup; 0 when None (lr/25 for one-cycle)."""
    lr_end: float | None = None
    """Learning rate that the schedule ends at; 0 when None (lr_start/10,000 for one-cycle)."""
    lr_power: float | None = None
    """Exponent of polynomial; 2 when None."""
    warmup_ratio: float | None = None
    """Share of the steps in which the learning rate rises; 0 when None (0.3 for one-cycle)."""
    warmup_steps: int | None = None
    """The same in steps; one of the two."""
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
    """Decoupled for adamw and muon, added to the gradient for sgd and adam."""
    spare_norms: bool = False
    """Leave norms and biases without weight decay, as transformers' Trainer does."""
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
    adapter: Literal["merge", "continue"] | None = None
    """Where --model is a folder of adapters: merge them into their base and train the result as the other settings say,
    or continue to train them, as they are, on their base. None refuses such a folder."""


@dataclass(frozen=True)
class RunConfig:
    """What every run in a folder has in common, whatever it is trained on."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of the run. Running again continues, or answers that it is done."""
    model: str = tyro.MISSING
    """Causal language model: hub name or local folder."""
    tokenizer: str | None = None
    """Tokenizer, if not the model's."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of parameters and arithmetic. Scores in bfloat16 are mostly noise."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    tf32: bool = False
    """float32 products of TF32, on a GPU that has it: factors are rounded to 11 bits, and scores carry that."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluate: OnTheWayConfig = field(default_factory=OnTheWayConfig)
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also show the numbers of metrics.jsonl in tensorboard, wandb (offline) or trackio (local); several may be given.
    Each needs its extra: pip install "retrograd[tensorboard]"."""
    config: Path | None = None
    """YAML file of defaults, such as another run's run_config.yaml; flags override it."""
    overwrite: bool = False
    """Start afresh where the folder holds another run."""
    parallel: Literal["auto", "replicate", "shard"] = "auto"
    """How the processes of a torchrun job share a run. Each takes some of the rows of every micro-batch. replicate:
    rank 0 has the optimizer and the states between steps; shard: each has its pieces of them, and where the engine is
    blocks, two layers whole at a time. The bits are the same. auto is replicate; without torchrun there is one
    process."""
    replicas: int = 1
    """Copies of the pieces of --parallel shard, each over neighbouring ranks, which gather parameters from each other
    alone: with as many replicas as nodes only sums go between nodes, and a rank holds as many times more. The bits are
    the same."""
    shards: int | None = None
    """Logical shards: the parts of a micro-batch that sums over rows are taken in, whose order the bits depend on. Any
    number of processes that divides it goes on with the run. As many as processes when None."""
    patience: float = 600.0
    """Seconds that the processes of a job wait for one of them before they give up."""


@dataclass(frozen=True)
class ExportConfig(RunConfig):
    """A run that is trained and leaves its model."""

    heartbeat: float = 60.0
    """Seconds between durable resume points; 0 makes one at every step."""
    export: bool = True
    """Leave the final model in RUN/model, as `from_pretrained` reads it; adapters are merged."""


@dataclass(frozen=True)
class RecipeConfig(RunConfig):
    """A model, the documents it is trained on, and how."""

    engine: Literal["auto", "double", "blocks"] = "auto"
    """How a step is differentiated twice: double is faster and holds the whole graph; blocks holds one layer's. auto
    takes double where it fits in memory. Results are equal to rounding."""
    compile: bool = False
    """Compile the passes over a layer, once for all layers and lengths: takes minutes before the first step. Takes the
    engine blocks, and for its way back keeps more than blocks does alone."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class TrainRunConfig(RecipeConfig, ExportConfig):
    """Train a model by a recipe, without attribution, and leave it as a Hugging Face folder."""


# Where a run is and how it is carried out do not change what it computes.
# The engine that training took, compiled or not, is in the manifest; it is compared there, for "auto" does not tell.
_NOT_THE_RUN = (
    "run", "config", "overwrite", "trust_code", "replay", "heartbeat", "sharpness", "engine", "compile", "evaluate",
    "log", "export", "parallel", "replicas", "shards", "patience",
)  # fmt: skip
_NOT_STORED = {"run", "config", "overwrite", "query_file", "trust_code"}
_PHASE = re.compile(r"^chain\.\d+\.")  # of an attack that follows: settings of a run of its own
GONE = ("matmul",)  # settings of earlier versions; a run's manifest says what it took


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration of a run as plain values, without the folder and the flags about it."""
    values = _plain(dataclasses.asdict(config))
    return {name: value for name, value in values.items() if name not in _NOT_STORED}


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines "name: old → new" for all that makes two configurations different runs."""
    flat_new = _flatten(new)
    # a run that was begun before there was such a setting did without
    off: dict[type, Any] = {bool: False, list: []}
    without = {name: off[type(value)] for name, value in flat_new.items() if type(value) in off}
    flat_old = {**without, **_flatten(old)}
    names = [n for n in {**flat_old, **flat_new} if _PHASE.sub("", n).split(".")[0] not in (*_NOT_THE_RUN, *GONE)]
    return [
        f"{name}: {flat_old.get(name)!r} → {flat_new.get(name)!r}"
        for name in names
        if flat_old.get(name) != flat_new.get(name)
    ]


def check_train(config: TrainRunConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    check_recipe(config)
    finite({"heartbeat": config.heartbeat})


def check_precision(config: RunConfig) -> None:
    """As `check_train`, for the precision of products.

    Raises:
        ValueError: As `check_train`.
    """
    if config.tf32 and config.dtype != "float32":
        raise ValueError(
            f"--tf32 rounds the factors of float32 products, and --dtype is {config.dtype}: it would change nothing. "
            "Leave --tf32 out, or take --dtype float32"
        )


def check_recipe(config: RecipeConfig) -> None:
    """As `check_train`, for what all commands that train on rows have in common.

    Raises:
        ValueError: As `check_train`.
    """
    data = config.data
    check_precision(config)
    check_training(config.train, config.lora)
    at_least_1({"data.limit": data.limit, "data.max_length": data.max_length, "data.chunk_length": data.chunk_length})
    if config.compile and config.engine == "double":
        raise ValueError(
            "--compile with --engine double cannot work: a compiled function has no double backward. Leave --engine "
            "out, or take blocks"
        )
    if config.compile and config.train.dropout:
        raise ValueError("--compile takes --engine blocks, which --train.dropout excludes; leave one of the two out")
    if data.max_length is not None and data.chunk_length is not None:
        raise ValueError("--data.max_length and --data.chunk_length exclude each other: cut documents, or pack them")
    check_on_the_way(config.evaluate)
    check_ranks(config)


def check_ranks(config: Shared) -> None:
    """As `check_train`, for how processes share a run.

    Raises:
        ValueError: As `check_train`.
    """
    at_least_1({"shards": config.shards, "replicas": config.replicas})
    if config.replicas > 1 and config.parallel != "shard":
        raise ValueError(
            f"--replicas {config.replicas} makes copies of the pieces of --parallel shard, and --parallel is "
            f"{config.parallel}: give --parallel shard, or leave --replicas out"
        )
    if not 0 < config.patience < math.inf:
        raise ValueError(f"--patience is {config.patience}; it has to be a number of seconds above 0")


def check_training(train: TrainConfig, lora: LoraConfig) -> None:
    """As `check_train`, for a recipe and its adapters.

    Raises:
        ValueError: As `check_train`.
    """
    at_least_1({"train.batch_size": train.batch_size, "train.epochs": train.epochs,
                "train.micro_batch_size": train.micro_batch_size})  # fmt: skip
    _check_schedule(train)
    if train.max_grad_norm is not None and not train.max_grad_norm > 0:
        raise ValueError(f"--train.max_grad_norm is {train.max_grad_norm}; it has to be above 0")
    if lora.rank is not None and lora.rank < 0:  # None: the method's own, of unlearning
        raise ValueError(f"--lora.rank is {lora.rank}; it has to be at least 1, or 0 for no adapters")
    if lora.adapter == "continue" and (lora.rank != 0 or lora.target_modules):
        raise ValueError(
            f"--lora.adapter continue trains the adapters of --model, and --lora.rank is {lora.rank}, with "
            f"{len(lora.target_modules)} target modules: leave both out (rank 0), or merge and train new ones"
        )


def _check_schedule(train: TrainConfig) -> None:
    finite({"train.lr": train.lr})
    ratio, steps, cycle = train.warmup_ratio, train.warmup_steps, train.lr_schedule.startswith("one-cycle")
    if ratio is not None and steps is not None:
        raise ValueError(f"--train.warmup_ratio is {ratio} and --train.warmup_steps {steps}; give one of the two")
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"--train.warmup_ratio is {ratio}; it has to be at least 0 and below 1")
    if steps is not None and steps < 0:
        raise ValueError(f"--train.warmup_steps is {steps}; it has to be at least 0")
    for name, rate in (("lr_start", train.lr_start), ("lr_end", train.lr_end)):
        if rate is not None and not 0 <= rate <= train.lr:
            raise ValueError(f"--train.{name} is {rate}; it has to be from 0 to the peak, --train.lr {train.lr}")
    if train.lr_start is not None and not (ratio or steps or (cycle and ratio is steps is None)):
        raise ValueError(
            f"--train.lr_start is {train.lr_start}, where the warmup begins, and there is none: give "
            "--train.warmup_steps or --train.warmup_ratio, or leave it out"
        )
    if train.lr_end is not None and train.lr_schedule == "constant":
        raise ValueError(
            f"--train.lr_end is {train.lr_end}, and a constant learning rate ends where it is: take "
            "--train.lr_schedule linear, cosine, polynomial or one-cycle, or leave it out"
        )
    if train.lr_power is not None and not (train.lr_schedule == "polynomial" and 0 < train.lr_power < math.inf):
        raise ValueError(
            f"--train.lr_power is {train.lr_power} with --train.lr_schedule {train.lr_schedule}; it is the exponent of "
            "polynomial, above 0"
        )


def at_least_1(numbers: Mapping[str, int | None]) -> None:
    """Refuse settings, by flag, that are below 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} is {number}; it has to be at least 1")


def finite(numbers: Mapping[str, float]) -> None:
    """Refuse settings, by flag, that are negative or no number."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name} is {value}; it has to be a finite number, 0 or more")


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as text, as YAML has them."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name; a list of dicts is taken apart by number."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
