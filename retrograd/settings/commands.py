"""The configurations of the commands other than `retrograd magic`. No heavy imports here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retrograd.settings.run import MagicConfig, QueryConfig
from retrograd.settings.select import Alignment
from retrograd.settings.unlearn import UnlearnConfig

__all__ = [
    "BankConfig", "CompareConfig", "EvaluateConfig", "LabConfig", "MetasmoothnessConfig", "PerturbationConfig",
    "QueryRunConfig",
    "ValidateConfig", "VerifyConfig", "perturbed",
]  # fmt: skip


@dataclass(frozen=True)
class QueryRunConfig:
    """Ask a trained run another question: its scores from the kept states, without training again."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a finished run. With `--replay.keep` its states or gradients are on disk; otherwise it is replayed."""
    name: str | None = None
    """Name of the query; its files go to RUN/queries/NAME."""
    query: QueryConfig = field(default_factory=QueryConfig)
    query_file: Path | None = None
    """YAML file of several queries in one sweep, settings by name, instead of --name and --query."""
    sharpness: bool = False
    """As in `retrograd magic`."""
    trust_code: bool = False
    """As in `retrograd magic`."""
    parallel: Literal["auto", "replicate", "shard"] = "auto"
    """How the processes of a torchrun job share the steps, as in `retrograd magic`; auto is as the run was begun. The
    bits are the same. Their number has to divide the run's logical shards."""
    replicas: int = 1
    """As in `retrograd magic`, of this query; those that the run was begun with do not count."""
    patience: float = 600.0
    """As in `retrograd magic`."""


@dataclass(frozen=True)
class ValidateConfig:
    """Retrain without random subsets and compare with what the scores predict: LDS, Pearson, slope."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a finished run."""
    subsets: int = 50
    """Random subsets for each fraction. Asking for more later reuses those that are done."""
    fraction: tuple[float, ...] = (0.01,)
    """Share of documents (or tokens) a subset leaves out; several may be given."""
    tokens: bool = False
    """Leave out sets of target tokens instead of documents; needs a run with --attribute tokens."""
    ends: tuple[int, ...] = ()
    """Also leave out the N lowest scores (proponents, as far as negative) and the N highest (detractors, as far as
    positive), for each N given."""
    sets: Path | None = None
    """Also leave out these: a text file with one set a line, document ids separated by spaces."""
    weight: tuple[float, ...] = (0.0,)
    """What the data weights of a set are multiplied by: 0 leaves it out, 0.2 or 1.8 weigh it down or up; several may be
    given."""
    top: tuple[float, ...] = ()
    """Also leave out the strongest proponents, this share of all, by each method and for each query column, against
    random sets of the size (QLD); with --tokens against sets of the same positions in the row too (per-token QLD)."""
    controls: int = 5
    """Random sets that --top is held against, at least 5."""
    scores: tuple[str, ...] = ()
    """Scores of other methods, held against the same retrainings: [NAME=]FILE[:COLUMN] of .pt, .npy, .parquet or .json,
    by document or token, or another run. A column for each query column, or one that is named."""
    higher_is: Literal["proponent", "detractor"] | None = None
    """What high numbers in the files of --scores mean; a proponent lowers the query loss. Needed unless a file says."""
    alignment: Alignment | None = None
    """Of scores by token in files: column t has the score of predicting token t (target), or t + 1 (prediction)."""
    rivals: tuple[Literal["bm25", "gradient_cosine", "tracin", "random"], ...] = ()
    """Also hold these against the same retrainings; tracin trains the run once more for its checkpoints."""
    seed: int = 0
    """Of the random subsets."""
    start: int = 0
    """First random subset of this call, to share a bank of retrainings among machines."""
    stop: int | None = None
    """Subset to stop before; the last when None."""
    workers: int = 0
    """Processes that retrain side by side; 0 takes what cores and memory allow. Under torchrun, each rank is one."""
    together: int = 0
    """Retrainings batched in one process with vmap; 1 retrains one by one, 0 chooses."""
    save_models: bool = False
    """Keep every retrained model in RUN/validation/models, as the bits in which it differs from the run's own: later
    queries are then asked of these models, without retraining."""
    trust_code: bool = False
    """As in `retrograd magic`."""


@dataclass(frozen=True)
class BankConfig:
    """List a bank of retrainings: what is there and what is missing, for each query, with which arithmetic, on what.

    Exit code 0 if it is whole and of one kind of hardware, 1 if not.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a run that `retrograd validate` has been called for."""


@dataclass(frozen=True)
class PerturbationConfig:
    """How the data weights of `retrograd metasmoothness` differ from the run's."""

    h: float = 0.1
    """Size of the perturbation of the data weights."""
    noise_seed: int = 0
    """Of its random direction."""


@dataclass(frozen=True)
class MetasmoothnessConfig(PerturbationConfig, MagicConfig):
    """Train at perturbed data weights: is this training smooth enough for its scores to mean much?

    Takes the arguments of `retrograd magic`; for the folder of a run, of `magic` or `unlearn`, that run's settings are
    the defaults.
    """


def perturbed(kind: type[UnlearnConfig]) -> type[UnlearnConfig]:
    """The configuration of `retrograd metasmoothness` for a run of `retrograd unlearn` whose configuration this is."""
    made: type[UnlearnConfig] = dataclasses.make_dataclass(
        MetasmoothnessConfig.__name__, [], bases=(PerturbationConfig, kind), frozen=True
    )
    made.__doc__ = MetasmoothnessConfig.__doc__
    return made


@dataclass(frozen=True)
class VerifyConfig:
    """An independent certificate for a finished run: files, objective, replay, adjoint identity, central differences.

    The verdict is certified, partly certified (with what is missing) or failed.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Folder of a finished run."""
    steps: int = 6
    """Steps of the shortened run that is checked in float64; 0 leaves that check out."""
    directions: int = 2
    """Directions of data weights for the central differences, four to ten retrainings each; 0 leaves them out."""
    seed: int = 0
    """Of the directions."""
    strict: bool = False
    """Exit code 3 instead of 0 where the run is certified only partly."""
    trust_code: bool = False
    """As in `retrograd magic`."""


@dataclass(frozen=True)
class CompareConfig:
    """Compare unlearned models under attack: a table of models and attacks, pairs of models, fronts and ranks."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH…")] = tyro.MISSING
    """Folders of `retrograd attack`."""
    output: Path | None = None
    """Where compare.json, .parquet and .md go; the first folder when None."""
    utility: float = 0.05
    """How much general accuracy an attacker may lose against the base model."""


@dataclass(frozen=True)
class LabConfig:
    """Build a fictional world: corpora, questions, a model that knows it and one that never saw a part of it."""

    dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = tyro.MISSING
    """Folder of the lab. Running again continues, or answers that it is done."""
    seed: int = 0
    """Of the world, the untrained model and the order of training rows."""
    facts: int = 240
    """Facts of each side, a multiple of 8."""
    aliases: bool = False
    """Give everything a second name, which few documents and no exam use, and ask under it too."""
    width: int = 96
    """Of the models, a multiple of 32."""
    layers: int = 4
    """Of the models."""
    epochs: int = 10
    """Passes over the training rows."""
    batch_size: int = 64
    """Rows in a training step."""
    lr: float = 3e-3
    """Peak learning rate."""
    eps_root: float = 1e-8
    """AdamW's ε inside the root; 1e-5 where scores have to predict retraining."""
    workers: int = 0
    """Models trained side by side, in processes of one thread; 0 takes two where there are two cores. Same bits."""
    heartbeat: float = 20.0
    """Seconds between durable resume points of a training; 0 makes one at every step."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Ask models the same questions and say which of them are broken.

    Exit code 0 if everything was measured, 1 if something is missing; the same command tries what is missing again.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL…")] = tyro.MISSING
    """Causal language models: hub names or local folders."""
    output: Path = tyro.MISSING
    """Folder of the results. Running again does what is not done; further models may join."""
    lab: Path | None = None
    """A folder of `retrograd lab`: all its questions, its held-out prose and its base and filtered models."""
    tasks: str | Path | None = None
    """Or a YAML file of tasks, settings by name: {mmlu: , mine: {dataset: questions.jsonl, form: cloze}}.
    With --backend lm-eval: names of its tasks, tags and groups, and YAML files of its tasks, as a,b,c."""
    metrics: bool = False
    """With --lab: also what the metrics of unlearning need, docs/metrics.md: documents by heart, KL, depth, probes."""
    reference: str | None = None
    """The model that the others are compared with; the lab's base model, or else the first, when None."""
    knows: str | None = None
    """A model that knows what the forget tasks ask; the lab's base model when None."""
    never: str | None = None
    """A model that never knew it; the lab's filtered model when None."""
    tokenizer: str | None = None
    """Tokenizer of all models, if not their own."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of parameters and arithmetic."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    batch_size: int = 16
    """Questions read at once; by text, each with all its answers. lm-eval: rows."""
    backend: Literal["retrograd", "lm-eval"] = "retrograd"
    """Who asks: this package, or lm-evaluation-harness with everything it offers (the extra `eval`)."""
    include_path: Path | None = None
    """lm-eval: folder of YAML files of further tasks."""
    num_fewshot: int | None = None
    """lm-eval: examples before each question, where a task does not fix them at 0; each task's own number when None."""
    limit: int | None = None
    """lm-eval: the first questions of each task only."""
    forget: str | None = None
    """lm-eval: which of --tasks ask what is to go, as a,b,c: no damage if it does."""
    trust_code: bool = False
    """lm-eval: run the Python functions that YAML files of tasks name (!function). They run with your rights."""
