"""What a selection holds, for people: signs in words, the arm and its controls, and the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

__all__ = ["counted", "show"]

RULES = {
    "value": "score / mean|score|", "sign": "sign of the score", "soft_sign": "tanh(score / s)",
    "clipped": "score / mean|score|, clipped", "rank": "sign · rank of |score| / n",
    "top_q": "score / mean|score| on the strongest proponents",
    "two_objective": "score − α·against, rescaled", "positive_only": "detractors only",
    "negative_only": "proponents only", "selective": "detractors that are none of what is to stay",
    "compatible": "detractors that are proponents of what is to stay", "all_tokens": "all tokens",
    "documents": "documents with the largest Σ (p − α·g)",
    "selection": "the tokens of --selection",
}  # fmt: skip
SIGNS = (
    "Scores: negative = proponent, training on it lowers the query's loss; positive = detractor, training on it raises "
    "that loss."
)


def counted(weights: Tensor, kept: list[int] | None) -> dict[str, Any]:
    """Counts and sums of token weights, [n]."""
    return {
        "real_tokens": len(weights), "nonzero": int((weights != 0).sum()), "positive": int((weights > 0).sum()),
        "negative": int((weights < 0).sum()), "sum": float(weights.sum()), "mean_size": float(weights.abs().mean()),
        "min": float(weights.min()), "max": float(weights.max()),
        **({} if kept is None else {"documents": len(kept)}),
    }  # fmt: skip


def show(info: dict[str, Any], out: Path, console: Console) -> dict[str, Any]:
    """Print what the info.json in `out` says, and what takes the weights; return it."""
    data, signs = info["data"], info["signs"]
    items = "documents" if signs["items"] != data["real_tokens"] else "real tokens"
    console.print(Text(
        f"{data['real_tokens']} real tokens in {data['rows']} rows. Of {signs['items']} {items}, {signs['proponents']} "
        f"are proponents of what is to go, {signs['detractors']} detractors, {signs['zero']} neither."
    ))  # fmt: skip
    console.print(Text(SIGNS, style="dim"))
    if "analysis" in info:
        _show_analysis(info["analysis"], console)
    table = Table(title=f"{info['rule']}: {RULES[info['rule']]}", title_justify="left")
    for name in ("weights", "w ≠ 0", "w > 0", "w < 0", "Σ w", "mean |w|", "as arm"):
        table.add_column(name, justify="left" if name == "weights" else "right", no_wrap=True)
    for name, counts in {"the arm": info["counts"], **info["controls"]}.items():
        same = counts.get("same_as_arm")
        table.add_row(
            name, str(counts["nonzero"]), str(counts["positive"]), str(counts["negative"]), f"{counts['sum']:.4g}",
            f"{counts['mean_size']:.4g}", "" if same is None else f"{same:.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(Text(info["meaning"], style="dim"))
    if info["rule"] == "documents":
        kept = info["counts"]["documents"]
        console.print(Text(f"{kept} documents are kept; they are also in {out}/documents.jsonl."))
    method = "weighted_sft" if info["use"] == "descent" else "METHOD"
    console.print(Text(
        f"For the same data set: `retrograd unlearn {method} … --weights {out}`"
        + (f", or a control's, {out}/controls/{next(iter(info['controls']))}" if info["controls"] else "")
    ))  # fmt: skip
    return info


def _show_analysis(analysis: dict[str, Any], console: Console) -> None:
    table = Table(title="What is to go against what is to stay", title_justify="left")
    for name in ("question", "value", "95 % interval", "threshold"):
        table.add_column(name, justify="left" if name == "question" else "right")
    limits = analysis["thresholds"]
    share = (
        f"purely forget: p above its {limits['forget_quantile']:g} quantile, g at most its "
        f"{limits['retain_quantile']:g} quantile; {analysis['independent_share']:.3g} if independent"
    )
    questions = {
        "pearson": ("Pearson correlation of the scores", ""),
        "spearman": ("Spearman correlation of the scores", "below {:g}"),
        "purely_forget": (share, "at least {:g}"),
        "magnitude_ratio": ("mean|to go| / mean|to stay|", "within a factor {:g}"),
    }
    for name, (words, bound) in questions.items():
        answer = analysis[name]
        limit = bound.format(answer["threshold"]) if bound else ""
        table.add_row(words, f"{answer['value']:.3g}", f"{answer['low']:.3g} to {answer['high']:.3g}", limit)
    documents = analysis["documents"]
    count, (low, high) = len(documents["purely_forget"]), documents["interval"]
    words = f"documents entirely forget-specific, by the same quantiles of Σp and Σg ({count} of {documents['count']})"
    table.add_row(words, f"{count / documents['count']:.3g}", f"{low:.3g} to {high:.3g}", "above 0")
    console.print(table)
    if count:
        first = ", ".join(map(str, documents["purely_forget"][:12]))
        console.print(f"These documents: {first}{' …' if count > 12 else ''}")
    items = "tokens" if analysis["items"] == "real tokens" else "documents by their scores"
    console.print(Text(f"Selecting {items} is {analysis['verdict']['tokens']}"))
    console.print(Text(f"Selecting documents is {analysis['verdict']['documents']}"))
