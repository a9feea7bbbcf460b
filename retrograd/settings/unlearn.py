"""The configuration of `retrograd unlearn`. No heavy imports here."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from retrograd.settings.on_the_way import check_on_the_way
from retrograd.settings.parse import build
from retrograd.settings.question import COLUMNS
from retrograd.settings.run import AttributedConfig, QueryConfig, ReplayConfig, check_attributed
from retrograd.settings.train import (
    DataConfig,
    ExportConfig,
    LoraConfig,
    LrSchedule,
    TrainConfig,
    at_least_1,
    check_precision,
    check_ranks,
    check_training,
    finite,
)

__all__ = [
    "ONES", "UnlearnConfig", "UnlearnLoraConfig", "UnlearnTrainConfig", "check_unlearn", "parse_source",
    "refuse_method", "with_objective", "ChainConfig",
]  # fmt: skip

ONES = "ones"
_SOURCE = ("subset", "split", "text_column", "limit", "assistant_only_loss")


@dataclass(frozen=True)
class UnlearnTrainConfig(TrainConfig):
    """The recipe, on forget and retain rows."""

    lr: float = 2e-4
    """Peak learning rate."""
    lr_schedule: LrSchedule = "linear"
    """How the learning rate moves over the run; one-cycle along half cosines, one-cycle-linear along straight lines."""
    weight_decay: float = 0.01
    """Decoupled for adamw and muon, added to the gradient for sgd and adam."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm."""
    batch_size: int = 16
    """Forget rows in a step."""
    retain_batch_size: int | None = None
    """Retain rows in a step; as many as forget rows when None."""
    micro_batch_size: int | None = None
    """Rows of all sides that a forward pass takes at once; it takes no pair of forget and retain rows apart."""
    epochs: int = 1
    """Passes over the longer side; the shorter one starts over."""


@dataclass(frozen=True)
class UnlearnLoraConfig(LoraConfig):
    """Train low-rank adapters, which are merged into the model that is left, or the whole model (rank 0)."""

    rank: int | None = 0  # type: ignore[assignment]
    """Rank of the adapters; 0 trains the whole model. None, where the method's source trains adapters: its rank there,
    as a share of the model's width."""
    alpha: float | None = 16.0  # type: ignore[assignment]
    """Scale: adapters are multiplied by alpha/rank. None, where the method's source trains adapters: as the rank."""


@dataclass(frozen=True)
class UnlearnConfig(AttributedConfig, ExportConfig):
    """Make a model forget some documents and keep others, by a method of unlearning.

    The methods: grad_ascent, grad_diff, npo, simnpo, dpo, undial, wga, satimp, ce_u, max_entropy, topk_entropy,
    weighted_sft, two_phase, circuit_breakers, orth_circuit_breakers, rmu, weighted_ascent_orth, sequential,
    tuned_lens, checkpoint_transfer, task_arithmetic, representation_edit, repselect, or a Python file with a METHOD.
    Each has settings of its own, --objective.*: `retrograd unlearn METHOD --help` shows them.

    A data set is a hub name or a file, and may be followed by what to read of it, as in
    `--retain EleutherAI/wikitext_document_level,subset=wikitext-103-raw-v1,text_column=page,limit=1024`, or with what
    its columns are: `--retain dialogues.jsonl,messages=dialogue,assistant_only_loss=true`.

    With `--attribute tokens --query.dataset …` it also gives the exact score of every forget and retain token for the
    unlearned model's loss on that query.
    """

    method: tyro.conf.Suppress[str] = ""
    objective: tyro.conf.Suppress[Any] = None
    forget: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Data set to forget; may be given several times."""
    retain: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Data set to keep; may be given several times."""
    alternative: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """dpo: data set of what is to be said instead, a document for each one to forget, in the same order."""
    weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder of `retrograd select` with token weights of a forget data set, or "ones"; one for each --forget, in the
    same order. Ones everywhere when none is given."""
    max_length: int | None = None
    """Cut documents to this many tokens; the model's context length when None."""
    min_chars: int = 0
    """Skip documents with fewer characters."""
    shuffle: bool = True
    """Visit rows in a new random order in each pass, or in file order."""
    order: Literal["heaviest", "lightest"] | None = None
    """A curriculum for any method: in each pass forget rows come by the mean weight of their tokens, the heaviest first
    or last, and only retain rows are shuffled. As `shuffle` says when None."""
    horizon: int | None = None
    """Steps until the progress of the ramps is 1; those of the run when None."""
    lora: UnlearnLoraConfig = field(default_factory=UnlearnLoraConfig)
    train: UnlearnTrainConfig = field(default_factory=UnlearnTrainConfig)
    attribute: Literal["examples", "tokens"] | None = None
    """Also pull the query loss of the unlearned model back through every step: one score per token of the forget and
    retain rows, or one per document."""


@dataclass(frozen=True)
class ChainConfig(UnlearnConfig):
    """An unlearning whose queries are asked after an attack, as `retrograd attack --attribute` leaves it."""

    chain: tyro.conf.Suppress[tuple[Any, ...]] = ()
    """The attack's phases, as plain settings, each with the hashes of what it trains on."""


def with_objective(defaults: Any, *, adapters: bool = False) -> type[UnlearnConfig]:
    """The configuration with the settings of a method, by its defaults, as `objective`.

    Args:
        adapters: Whether the method trains adapters unless it is told a rank.
    """
    own: list[Any] = [("objective", type(defaults), field(default=defaults))]
    if adapters:
        own.append(("lora", UnlearnLoraConfig, field(default=UnlearnLoraConfig(rank=None, alpha=None))))
    kind: type[UnlearnConfig] = dataclasses.make_dataclass("UnlearnConfig", own, bases=(UnlearnConfig,), frozen=True)
    kind.__doc__ = UnlearnConfig.__doc__
    return kind


def parse_source(text: str, config: UnlearnConfig) -> DataConfig:
    """A data set with what to read of it.

    Raises:
        ValueError: If a setting is not understood.

    >>> parse_source("x.jsonl,limit=3,split=train[:9]", UnlearnConfig()).limit
    3
    """
    if Path(text).exists():
        return DataConfig(text, max_length=config.max_length, min_chars=config.min_chars)
    name, *settings = re.split(rf",(?=(?:{'|'.join((*_SOURCE, *COLUMNS))})=)", text)
    if not Path(name).exists() and (unknown := re.search(r",(\w+)=", name)):
        raise ValueError(
            f"data set {text!r} has a setting {unknown[1]!r} that does not exist; there are "
            f"{', '.join((*_SOURCE, *COLUMNS))}"
        )
    values: dict[str, Any] = dict(setting.split("=", 1) for setting in settings)
    columns = tuple(f"{role}={values.pop(role)}" for role in COLUMNS if role in values)
    if "assistant_only_loss" in values:
        values["assistant_only_loss"] = {"true": True, "false": False}.get(values["assistant_only_loss"].lower())
    given = {"max_length": config.max_length, "min_chars": config.min_chars, "columns": columns}
    merged = {"dataset": name, **given, **values}
    source: DataConfig = build(DataConfig, merged, f"data set {text!r}")
    return source


def refuse_method(method: str, file: Path, trusted: bool) -> None:
    """Refuse to run a method's Python file that another file names, unless whoever runs the command trusts it.

    Raises:
        ValueError: With the method and the file that names it.
    """
    if method.endswith(".py") and not trusted:
        raise ValueError(
            f"{file} names Python code: its method is {method}, which would run with your rights. Read it; then give "
            "--trust_code to run it"
        )


def check_unlearn(config: UnlearnConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    check_precision(config)
    check_training(config.train, config.lora)
    check_ranks(config)
    check_on_the_way(config.evaluate)
    _check_attribution(config)
    at_least_1({"train.retain_batch_size": config.train.retain_batch_size, "max_length": config.max_length,
                "horizon": config.horizon})  # fmt: skip
    finite({"heartbeat": config.heartbeat})
    if not config.forget:
        raise ValueError("nothing to forget: give --forget, a data set; several may be given")
    for source in (*config.forget, *config.retain, *config.alternative):
        limit = parse_source(source, config).limit
        at_least_1({f"forget/retain {source}: limit": limit})
    if config.weights and len(config.weights) != len(config.forget):
        raise ValueError(
            f"{len(config.weights)} --weights for {len(config.forget)} --forget: give one for each, in the same order, "
            f"and --weights {ONES} for a data set whose tokens all count alike"
        )


def _check_attribution(config: UnlearnConfig) -> None:
    """Refuse attribution without a query, and settings of an attribution that was not asked for."""
    if config.replay.heartbeat != ReplayConfig.heartbeat:
        raise ValueError(f"--replay.heartbeat {config.replay.heartbeat:g}: `retrograd unlearn` takes --heartbeat")
    if config.attribute is not None:
        check_attributed(config)
        return
    asked = {
        "query": config.query != QueryConfig() or config.queries, "replay": config.replay != ReplayConfig(),
        "sharpness": config.sharpness,
    }  # fmt: skip
    if unread := [f"--{name}" for name, given in asked.items() if given]:
        raise ValueError(
            f"{' and '.join(unread)} belong to a run that is attributed: give --attribute tokens (or examples) too, or "
            "leave that out"
        )
