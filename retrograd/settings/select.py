"""The settings of `retrograd select`. No heavy imports here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from retrograd.settings.question import Source

__all__ = ["Alignment", "Control", "FeasibleConfig", "MaskConfig", "Rule", "SelectConfig", "Sign", "Use"]

Rule = Literal[
    "value", "sign", "soft_sign", "clipped", "rank", "top_q", "two_objective", "positive_only", "negative_only",
    "selective", "compatible", "all_tokens", "documents", "selection",
]  # fmt: skip
Control = Literal[
    "random_count", "random_position", "random_class", "permuted_in_row", "sign_flipped", "retain_only",
    "gradient_norm", "gradient_cosine", "bm25", "keyword", "uniform",
]  # fmt: skip
Sign = Literal["negative", "positive"]
Alignment = Literal["target", "prediction"]
Use = Literal["descent", "removal"]


@dataclass(frozen=True)
class FeasibleConfig:
    """With --against: what is called purely forget, and when a selection is called feasible."""

    forget_quantile: float = 0.75
    """A token is purely forget if its strength for --scores is above this quantile of all real tokens …"""
    retain_quantile: float = 0.5
    """… and its strength for --against is at or below this one. Documents likewise, by their sums."""
    correlation: float = 0.9
    """Separated: the Spearman correlation of the two attributions lies below this."""
    share: float = 0.01
    """Enough to act on: at least this share of real tokens is purely forget."""
    ratio: float = 10.0
    """Comparable at α = 1: mean |score| of one is at most this many times the other's. If not, an α is proposed."""
    resamples: int = 1000
    """Bootstrap resamples of rows; intervals are the middle 95 % of them."""


@dataclass(frozen=True)
class SelectConfig:
    """Turn scores into token weights or a selection of documents, with matched controls.

    The sign of a score: negative = proponent, training on it lowers the query's loss; positive = detractor, training on
    it raises that loss. Strengths: p = max(0, −score) of --scores, g = max(0, −score) of --against.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Folder of the selection. Running again answers that it is done."""
    scores: tuple[str, ...] = tyro.MISSING
    """Scores of what is to go: RUN, RUN:query or RUN:query/column, or a file of another method: .pt, .npy, .parquet
    (FILE:column), or a folder in the original layout (per_token_scores.pt). Several are averaged."""
    against: tuple[str, ...] = ()
    """Scores of what is to stay, likewise. With them the two attributions are compared, and a verdict says whether a
    selection is feasible."""
    rule: Rule = "value"
    """value: score/mean|score|. sign, soft_sign: its sign; tanh(score/s). clipped: value within ±c. rank: sign·rank/n.
    top_q: value where the strength is among the largest share q. two_objective: score − α·against, rescaled.
    positive_only, negative_only: mask of detractors; of proponents. selective, compatible: detractors for --scores that
    are no detractors, are proponents, for --against. all_tokens: ones. documents: the top k by Σ(p − α·g).
    selection: the tokens of --selection."""
    use: Use = "descent"
    """descent: weights of the token loss, which training descends: negative on proponents means ascent. Signed, for
    `unlearn weighted_sft`. removal: how much of a forget term a token gets, 0 or more, larger for stronger proponents,
    as many in sum as there are real tokens: for every other method."""
    alpha: float = 1.0
    """α of two_objective, documents, and with --against of top_q: what a unit of retain strength costs."""
    soft: float | None = None
    """s of soft_sign, in units of the score; mean|score| when None."""
    clip: float = 1.0
    """c of clipped, in units of mean|score|."""
    q: float = 0.1
    """Share of real tokens that top_q keeps."""
    k: int | None = None
    """Documents that the rule documents keeps."""
    selection: Path | None = None
    """Tokens that the rule selection keeps: a file that the map of `retrograd report` has saved."""
    controls: tuple[Control, ...] | None = None
    """Controls with the arm's own weights on other tokens: random_count (anywhere), random_position (at the same
    positions in the row), random_class (there, of the same frequency), permuted_in_row; those ordered by something
    else: sign_flipped, retain_only, gradient_norm, gradient_cosine, bm25, keyword; and uniform. When None, those that
    need neither model nor text. Give none with `--controls` alone."""
    seeds: int = 3
    """Draws of each control that has something random."""
    seed: int = 0
    """Of the first draw; also of the bootstrap."""
    keywords: Path | None = None
    """For the control keyword: a text file with one keyword a line, or the facts.jsonl of a lab, whose forget side
    gives its names and values."""
    rows: Path | None = None
    """For scores from files: a run on the same data, or a YAML file with `model` and `data` as in a run_config.yaml."""
    sign: Sign | None = None
    """For --scores from files: the sign that a proponent has there."""
    alignment: Alignment | None = None
    """For --scores from files by token: whether column t belongs to predicting token t (target) or t + 1
    (prediction)."""
    against_sign: Sign | None = None
    """As --sign, for --against."""
    against_alignment: Alignment | None = None
    """As --alignment, for --against."""
    original: Alignment | None = None
    """Also write --scores in the original layout, so aligned: OUT/original/per_token_scores.pt, attribution_scores.pt
    and, if they are one run's, eval_grads.pt."""
    trust_code: bool = False
    """Let gradient_norm and gradient_cosine run the functions that a run's queries name."""
    feasible: FeasibleConfig = field(default_factory=FeasibleConfig)


@dataclass(frozen=True)
class MaskedSource(Source):
    """The data set to forget, read as `retrograd unlearn` reads it: the same cuts and skips."""

    min_chars: int = 0
    """Skip documents with fewer characters."""


@dataclass(frozen=True)
class MaskConfig:
    """Token weights without scores: the words of a list, or the tokens at which a model is in a state like at them.

    OUT goes to --weights of `retrograd unlearn`, for every method: weights above 0 on the mask, 0 elsewhere, as many in
    sum as there are real tokens.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Folder of the weights. Running again answers that it is done."""
    model: str = tyro.MISSING
    """The model that is to be unlearned: hub name or local folder; its tokenizer cuts the rows."""
    data: MaskedSource = field(default_factory=MaskedSource)
    keywords: Path = tyro.MISSING
    """A text file with one keyword a line, or the facts.jsonl of a lab, whose forget side gives its names and values.
    Compared without case, token by token, as whole tokens."""
    depth: float | None = None
    """Instead of the keywords' own tokens, those whose hidden state there, at the block of this share of the depth (0
    the first, 1 the last), has a cosine of at least `threshold` with the mean state of the keywords' tokens."""
    threshold: float = 0.2
    """Of the cosine."""
    tokenizer: str | None = None
    """Tokenizer, if not the model's own."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
