"""From a configuration to everything a run is made of: rows, model, stream, recipe, query."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch

from retrograd.core import tree
from retrograd.core.engine import Double
from retrograd.core.muon import Muon
from retrograd.core.optim import SGD, AdamW, Optimizer
from retrograd.core.schedule import Schedule
from retrograd.core.step import Recipe, State, Training, initial_state
from retrograd.lm.data import load_documents
from retrograd.lm.model import DTYPES, CausalLM, load_causal_lm, load_tokenizer
from retrograd.lm.query import query_columns
from retrograd.lm.rows import Rows, build_rows
from retrograd.lm.stream import DataStream
from retrograd.runs.config import MagicConfig, TrainConfig
from retrograd.runs.manifest import fingerprint
from retrograd.runs.scores import EXCERPT

__all__ = ["Loaded", "assemble", "optimizer"]


class Loaded(NamedTuple):
    """Everything a run is made of, loaded and checked before the first step."""

    rows: Rows
    texts: list[str]
    model: CausalLM
    tokenizer: Any
    stream: DataStream
    training: Training
    initial: State
    columns: list[Any]
    query_rows: Rows
    identity: str


def assemble(config: MagicConfig) -> Loaded:
    """Load and check everything a run is made of.

    Raises:
        ValueError: For whatever cannot work, before anything is computed or written.
    """
    device = _device(config.device)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    model = _load_model(config, device)
    rows, texts = _rows(config.data, tokenizer, model, config.data.chunk_length, config.data.min_chars, "data")
    query_rows, _ = _rows(config.query, tokenizer, model, None, 0, "query")
    stream = DataStream(
        rows,
        config.train.batch_size,
        epochs=config.train.epochs,
        shuffle=config.data.shuffle,
        seed=config.train.seed,
        weight_shape=(len(rows), rows.max_length) if config.attribute == "tokens" else None,
        dtype=torch.promote_types(DTYPES[config.dtype], torch.float32),
        device=device,
    )
    train = config.train
    recipe = Recipe(
        optimizer(train, len(stream), _embeddings(model)), train.max_grad_norm, train.micro_batch_size, train.seed,
        train.dropout,
    )  # fmt: skip
    training = Training(recipe, Double(model.objective), stream, stream.weights)
    initial = initial_state(recipe, model.params)
    size = train.micro_batch_size or train.batch_size
    columns = query_columns(query_rows, config.query.reduction, batch_size=size, dtype=stream.dtype, device=device)
    identity = fingerprint(
        recipe, rows.digest(), query_rows.digest(), tree.digest(initial.params), stream.shuffle, stream.seed,
        stream.batch_size, stream.epochs, config.attribute, config.query.reduction, config.dtype,
    )  # fmt: skip
    return Loaded(rows, texts, model, tokenizer, stream, training, initial, columns, query_rows, identity)


def optimizer(train: TrainConfig, steps: int, exclude: tuple[str, ...] = ()) -> Optimizer:
    """The optimizer of a configuration; `exclude` names the matrices that Muon leaves to AdamW."""
    ratio = train.warmup_ratio if train.warmup_ratio is not None else 0.3 if train.lr_schedule == "one-cycle" else 0.0
    warmup = min(steps - 1, math.ceil(ratio * steps))
    lr = Schedule(train.lr_schedule, train.lr, steps, warmup)
    adam = (train.beta1, train.beta2, train.eps, train.eps_root)
    match train.optimizer:
        case "sgd":
            return SGD(lr, train.momentum, train.nesterov, train.weight_decay)
        case "adamw":
            return AdamW(lr, *adam, train.weight_decay)
        case "muon":
            return Muon(lr, train.momentum or 0.95, True, train.weight_decay, 5, *adam, exclude)
    raise ValueError(f"unknown optimizer {train.optimizer!r}; the optimizers are sgd, adamw, muon")


def _load_model(config: MagicConfig, device: torch.device) -> CausalLM:
    adapters = None
    if config.lora.rank:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
            target_modules=list(config.lora.target_modules) or None, task_type="CAUSAL_LM",
        )  # fmt: skip
    if config.dtype == "bfloat16":
        warnings.warn(
            "bfloat16 parameters swallow small updates (at |w| = 0.02 neighbours are 1e-4 apart): scores are mostly "
            "noise; a cosine of -0.42 with float32 was measured elsewhere. Use --dtype float32 for scores you act on.",
            stacklevel=2,
        )
    if config.train.optimizer != "sgd" and config.train.eps_root < 1e-10:
        warnings.warn(
            f"--train.eps_root {config.train.eps_root:g} leaves the update rough where gradients are near 0: scores "
            "will be finite but will predict retraining badly. 1e-8 or more is smoother.",
            stacklevel=2,
        )
    return load_causal_lm(
        config.model, dtype=config.dtype, device=device, lora=adapters, seed=config.train.seed,
        dropout=config.train.dropout,
    )  # fmt: skip


def _rows(
    source: Any, tokenizer: Any, model: CausalLM, chunk_length: int | None, min_chars: int, name: str
) -> tuple[Rows, list[str]]:
    """Token rows of a data or query source, and an excerpt of each document."""
    documents = load_documents(source.dataset, split=source.split, subset=source.subset, limit=source.limit)
    settings = getattr(model.module, "config")  # noqa: B009
    context = getattr(settings, "max_position_embeddings", None)
    longest = source.max_length or (None if chunk_length else context)
    if context and max(longest or 0, chunk_length or 0) > context:
        raise ValueError(f"--{name}: rows of {longest or chunk_length} tokens exceed the model's context of {context}")
    try:
        rows = build_rows(
            documents, tokenizer, text_column=source.text_column, max_length=longest, chunk_length=chunk_length,
            min_chars=min_chars, vocab_size=settings.vocab_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--{name}.dataset {source.dataset}: {error}") from error
    return rows, _excerpts(documents, source.text_column, tokenizer)


def _excerpts(documents: Any, column: str | None, tokenizer: Any) -> list[str]:
    names = documents.column_names
    for columns in ([column], ["messages"], ["prompt", "completion"], ["text"], ["input_ids"]):
        if all(name in names for name in columns):
            found = zip(*(documents[name] for name in columns))
            return [_excerpt(values, tokenizer) for values in found]
    raise AssertionError("build_rows has chosen a column")


def _excerpt(values: tuple[Any, ...], tokenizer: Any) -> str:
    parts = []
    for value in values:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(" ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in value))
        elif isinstance(value, list):
            parts.append(tokenizer.decode(value[:EXCERPT]))
        else:
            parts.append(str(value or ""))
    text = " ".join(" ".join(parts).split())
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def _embeddings(model: CausalLM) -> tuple[str, ...]:
    """Names of the input and output embeddings, which Muon leaves to AdamW."""
    ends = [m for m in (model.module.get_input_embeddings(), model.module.get_output_embeddings()) if m is not None]  # type: ignore[operator]
    weights = {end.weight.untyped_storage().data_ptr() for end in ends if hasattr(end, "weight")}
    return tuple(name for name, leaf in model.params.items() if leaf.untyped_storage().data_ptr() in weights)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device
