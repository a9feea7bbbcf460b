"""Which cheap measure tells recipes whose scores predict retraining from those whose do not? A grid of small recipes.

Each recipe trains a tiny model on templated sentences (16 rows a step unless it says otherwise), is attributed, and is
validated: LDS over random sets of a tenth of the documents, with its interval. Then a few more retrainings, the half and
whole removal of other sets, give each candidate measure:

    p_s = −τ·v_s      h_s = φ(w − v_s/2) − φ(w)      m_s = φ(w − v_s) − φ(w)          sets s, nats

v_s are the data weights of a set that is left out. If φ were linear, p = 2h = m. What all sets share moves no rank, so
spreads are taken over the sets, of each query: c(x) = x − mean_s x. What is printed: the rank correlation of each
candidate with LDS over the grid, with a bootstrap interval over recipes, and over recipes that were held out.

    python bench/forecast.py --out runs/forecast                 # the grid and the held-out recipes; resumes
    python bench/forecast.py --out runs/forecast --only sgd-0.1  # one recipe
    python bench/forecast.py --out runs/forecast --table         # what is there, and the constants of trust/forecast.py
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROWS, QUERIES, LENGTH, FRACTION = 128, 4, 24, 0.1
ADAMW = "--train.optimizer adamw --train.lr 1e-3 --train.eps_root 1e-6"
SGD = "--train.optimizer sgd --train.lr 0.3"


class Recipe(NamedTuple):
    """Flags over the defaults (batch 16, one epoch), and the model they start from."""

    flags: str
    model: str = "fresh"


GRID = {
    "adamw": Recipe(ADAMW),
    "adamw-lr-1e-4": Recipe(f"{ADAMW} --train.lr 1e-4"),
    "adamw-lr-3e-3": Recipe(f"{ADAMW} --train.lr 3e-3"),
    "adamw-lr-1e-2": Recipe(f"{ADAMW} --train.lr 1e-2"),
    "adamw-lr-3e-2": Recipe(f"{ADAMW} --train.lr 3e-2"),
    "adamw-eps_root-1e-10": Recipe(f"{ADAMW} --train.eps_root 1e-10"),
    "adamw-eps_root-1e-8": Recipe(f"{ADAMW} --train.eps_root 1e-8"),
    "adamw-eps_root-1e-4": Recipe(f"{ADAMW} --train.eps_root 1e-4 --train.lr 3e-3"),
    "adamw-warmup": Recipe(f"{ADAMW} --train.lr 3e-3 --train.warmup_ratio 0.5"),
    "adamw-batch-64": Recipe(f"{ADAMW} --train.lr 3e-3 --train.batch_size 64 --train.epochs 4"),
    "adamw-batch-4": Recipe(f"{ADAMW} --train.batch_size 4"),
    "adamw-32-steps": Recipe(f"{ADAMW} --train.epochs 4"),
    "adamw-64-steps-lr-3e-3": Recipe(f"{ADAMW} --train.lr 3e-3 --train.epochs 8"),
    "adamw-clip": Recipe(f"{ADAMW} --train.lr 3e-3 --train.max_grad_norm 0.3"),
    "adamw-decay": Recipe(f"{ADAMW} --train.weight_decay 1.0"),
    "adamw-pretrained": Recipe(ADAMW, "pretrained"),
    "adamw-pretrained-lr-1e-2": Recipe(f"{ADAMW} --train.lr 1e-2", "pretrained"),
    "adamw-loud": Recipe(ADAMW, "loud"),
    "adamw-qk-norm": Recipe(ADAMW, "qk-norm"),
    "sgd-0.01": Recipe(f"{SGD} --train.lr 0.01"),
    "sgd-0.03": Recipe(f"{SGD} --train.lr 0.03"),
    "sgd-0.1": Recipe(f"{SGD} --train.lr 0.1"),
    "sgd-1": Recipe(f"{SGD} --train.lr 1"),
    "sgd-3": Recipe(f"{SGD} --train.lr 3"),
    "sgd-momentum": Recipe(f"{SGD} --train.lr 0.1 --train.momentum 0.9 --train.epochs 2"),
    "sgd-momentum-0.01": Recipe(f"{SGD} --train.lr 0.01 --train.momentum 0.9"),
    "sgd-momentum-1": Recipe(f"{SGD} --train.lr 1 --train.momentum 0.9"),
    "sgd-pretrained": Recipe(SGD, "pretrained"),
    "sgd-loud-3": Recipe(f"{SGD} --train.lr 3", "loud"),
    "muon-1e-3": Recipe("--train.optimizer muon --train.lr 1e-3 --train.eps_root 1e-6"),
    "muon-1e-2": Recipe("--train.optimizer muon --train.lr 1e-2 --train.eps_root 1e-6"),
}
HELD_OUT = {
    "held-adamw-lr-5e-3-clip": Recipe(f"{ADAMW} --train.lr 5e-3 --train.max_grad_norm 1"),
    "held-adamw-eps-1e-7-batch-32": Recipe(f"{ADAMW} --train.eps_root 1e-7 --train.batch_size 32 --train.epochs 3"),
    "held-adamw-pretrained-batch-8": Recipe(f"{ADAMW} --train.lr 3e-3 --train.batch_size 8", "pretrained"),
    "held-adam-decay": Recipe(f"{ADAMW} --train.optimizer adam --train.lr 2e-3 --train.weight_decay 0.01"),
    "held-sgd-2-warmup": Recipe(f"{SGD} --train.lr 2 --train.warmup_ratio 0.3 --train.epochs 2"),
    "held-muon-qk-norm": Recipe("--train.optimizer muon --train.lr 3e-3 --train.eps_root 1e-6", "qk-norm"),
}
EVERY = {**GRID, **HELD_OUT}

NAMES = ["ada", "bor", "cil", "dun", "eve", "fox", "gil", "hob", "ira", "jon", "kip", "lou", "mab", "ned", "oda", "pim"]
PLACES = ["hill", "lake", "wood", "town", "cave", "barn", "mill", "port"]
FOODS = ["corn", "plum", "fish", "nuts", "bread", "cress", "pears", "leeks"]
COLOURS = ["red", "blue", "green", "white", "black", "grey"]
SHAPES = [
    "{a} lives in the {p} and eats {f} every day", "in the {p} we saw {a} who likes {f} and wears {c}",
    "the {c} coat of {a} is kept in the {p}", "{a} and {b} met at the {p} to share {f}",
    "every day {b} brings {f} to {a} in the {c} {p}",
]  # fmt: skip


def sentences(count: int, seed: int) -> list[str]:
    """Each name has its own place, food and colour, told in four of five sentences."""
    draw = random.Random(seed)

    def pick(options: Sequence[str], owner: int) -> str:
        return options[owner * 5 % len(options)] if draw.random() < 0.8 else draw.choice(options)

    found = []
    for _ in range(count):
        who, other = draw.sample(range(len(NAMES)), 2)
        given = {"a": NAMES[who], "b": NAMES[other], "p": pick(PLACES, who), "f": pick(FOODS, who + 1)}
        found.append(draw.choice(SHAPES).format(**given, c=pick(COLOURS, who)))
    return found


def build(out: Path) -> None:
    """Rows, queries, a tokenizer, and the models that recipes start from."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", ROWS, 0), ("query", QUERIES, 1), ("early", 1024, 2)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in sentences(count, seed))
        (out / f"{name}.jsonl").write_text(lines)
    words = sorted({word for text in sentences(2000, 3) for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    common = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    fresh = GPTNeoXForCausalLM(GPTNeoXConfig(**common, **still))
    loud = GPTNeoXForCausalLM(GPTNeoXConfig(**common, **still, initializer_range=0.1))
    normed = Qwen3ForCausalLM(Qwen3Config(**common, num_key_value_heads=2, head_dim=16))
    for name, model in (("fresh", fresh), ("loud", loud), ("qk-norm", normed)):
        model.save_pretrained(out / "models" / name)
        fast.save_pretrained(out / "models" / name)
    retrograd(
        ["train", str(out / "early"), "--model", str(out / "models/fresh"), "--data.dataset", str(out / "early.jsonl"),
         "--train.lr", "3e-3", "--train.batch_size", "32", "--train.epochs", "4"]
    )  # fmt: skip


Candidate = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def few_sets(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Pearson's correlation of p with m over six sets, mean over the queries: what `retrograd metasmoothness` takes."""
    from retrograd.trust.forecast import correlation

    return correlation(predicted, whole)


def few_halves(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Pearson's correlation of p with h over six sets, mean over the queries."""
    return few_sets(predicted, half, half)


def residual(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """1 − ‖c(m − p)‖/‖c(m)‖ over six sets."""
    return 1 - _share(whole - predicted, whole, _spread)


def curvature(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """1 − ‖m − 2h‖/‖m‖ over three sets: needs no scores."""
    return 1 - _share(whole[:3] - 2 * half[:3], whole[:3], lambda x: x)


def curvature_spread(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """1 − ‖c(m − 2h)‖/‖c(m)‖ over three sets: needs no scores."""
    return 1 - _share(whole[:3] - 2 * half[:3], whole[:3], _spread)


def extrapolated(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Correlation of c(4h − m), which is p if φ is quadratic along v, with c(m), over three sets: needs no scores."""
    return _pooled(4 * half[:3] - whole[:3], whole[:3])


def half_and_whole(predicted: np.ndarray, half: np.ndarray, whole: np.ndarray) -> float:
    """Correlation of c(p) with c(m) and c(2h) at once, over three sets."""
    both = np.concatenate([_spread(whole[:3]), _spread(2 * half[:3])])
    return _pooled(np.concatenate([_spread(predicted[:3])] * 2), both)


CANDIDATES: dict[str, Candidate] = {
    "few_sets": few_sets, "few_halves": few_halves, "residual": residual, "curvature": curvature,
    "curvature_spread": curvature_spread, "extrapolated": extrapolated, "half_and_whole": half_and_whole,
}  # fmt: skip
"""Each takes p, h and m, [6, K], and needs at most six retrainings of them."""


def growth(run: Path) -> float:
    """−log10 of how far the cotangent grows on its way back: free, from the run's own journal."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    back = {line["step"]: max(line["cotangent_norm"]) for line in lines if line["phase"] == "reverse"}
    return -float(np.log10(max(back.values()) / back[max(back)]))


def _spread(x: np.ndarray) -> np.ndarray:
    return x - x.mean(0)


def _share(part: np.ndarray, whole: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> float:
    """‖of(part)‖/‖of(whole)‖, mean over the queries."""
    return float(np.mean(np.linalg.norm(of(part), axis=0) / np.linalg.norm(of(whole), axis=0)))


def _pooled(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of c(a) with c(b) over sets and queries, each query scaled to its own spread of b."""
    scale = _spread(b).std(0)
    return float(np.corrcoef((_spread(a) / scale).ravel(), (_spread(b) / scale).ravel())[0, 1])


def retrograd(arguments: list[str]) -> None:
    """A command of the package, in this process."""
    from retrograd.cli import main

    code = main(arguments)
    if code:
        raise SystemExit(f"retrograd {' '.join(arguments)} ended with {code}")


def measure(name: str, out: Path, subsets: int) -> dict[str, Any]:
    """Train, attribute, validate, and take what every candidate needs; from the file if it is there."""
    from rich.console import Console

    from retrograd.settings.commands import MetasmoothnessConfig, ValidateConfig
    from retrograd.settings.run import settings_from
    from retrograd.trust.metasmoothness import metasmoothness
    from retrograd.trust.validate import validate

    run, recipe = out / name, EVERY[name]
    path = run / "forecast.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf8"))
    model = out / "early" / "model" if recipe.model == "pretrained" else out / "models" / recipe.model
    retrograd([
        "magic", str(run), "--model", str(model), "--data.dataset", str(out / "train.jsonl"),
        "--query.dataset", str(out / "query.jsonl"), "--query.reduction", "none", "--sharpness",
        "--train.batch_size", "16", *recipe.flags.split(),
    ])  # fmt: skip
    quiet = Console(quiet=True)
    found = validate(ValidateConfig(run, subsets=subsets, fraction=(FRACTION,)), quiet)
    assert found is not None
    part = found.fractions[0]
    near = validate(ValidateConfig(run, subsets=6, fraction=(FRACTION,), seed=1, weight=(0.0, 0.5)), quiet)
    assert near is not None
    smooth = metasmoothness(replace(settings_from(MetasmoothnessConfig, run / "run_config.yaml"), run=run), quiet)
    by_weight = {weight: [one for one in near.compared if one.left_out.weight == weight] for weight in (0.0, 0.5)}
    values = {
        "lds": part.mean, "interval": [part.low, part.high], "failed": part.failed,
        "slope": float(np.mean([one.slope for one in part.queries])), "metasmoothness": smooth.value,
        "health": [one["kind"] for one in json.loads((run / "health.json").read_text())["findings"]],
        "predicted": [one.predicted.tolist() for one in by_weight[0.0]],
        "whole": [one.measured.tolist() for one in by_weight[0.0]],
        "half": [one.measured.tolist() for one in by_weight[0.5]],
    }  # fmt: skip
    path.write_text(json.dumps(values, indent=1), encoding="utf8")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=tuple(EVERY), default=tuple(EVERY))
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        if not (arguments.out / "early" / "model").exists():
            build(arguments.out)
        for name in arguments.only:
            measure(name, arguments.out, arguments.subsets)
    found = {
        name: json.loads((arguments.out / name / "forecast.json").read_text(encoding="utf8"))
        for name in EVERY
        if (arguments.out / name / "forecast.json").exists()
    }
    print(table(found, arguments.out))


def table(found: dict[str, dict[str, Any]], out: Path) -> str:
    """Every recipe with LDS and every candidate; how each candidate ranked them; and the constants of the package."""
    names = ["metasmoothness", "growth", *CANDIDATES]
    lines = [f"| recipe | LDS [95 %] | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    values: dict[str, dict[str, float]] = {}
    for recipe, one in found.items():
        arrays = [np.array(one[key]) for key in ("predicted", "half", "whole")]
        values[recipe] = {"metasmoothness": one["metasmoothness"], "growth": growth(out / recipe)}
        values[recipe] |= {name: candidate(*arrays) for name, candidate in CANDIDATES.items()}
        low, high = one["interval"]
        cells = " | ".join(f"{values[recipe][name]:.3f}" for name in names)
        lines.append(f"| {recipe} | {one['lds']:.3f} [{low:.3f}, {high:.3f}] | {cells} |")
    lines += ["", "| candidate | rank correlation, grid [95 %] | held out [95 %] |", "|---|---|---|"]
    lds = {name: one["lds"] for name, one in found.items()}
    for name in names:
        cells = " | ".join(told(ranked(name, values, lds, group)) for group in (GRID, HELD_OUT))
        lines.append(f"| {name} | {cells} |")
    pairs = [(round(values[r]["few_sets"], 3), round(lds[r], 3)) for r in GRID if r in found]
    lines += ["", f"GRID = {tuple(pairs)}", f"RANKED = {ranked('few_sets', values, lds, GRID)[:3]}"]
    lines += [f"HELD_OUT = {ranked('few_sets', values, lds, HELD_OUT)[:3]}"]
    lines += [f"metasmoothness: RANKED = {ranked('metasmoothness', values, lds, GRID)[:3]}"]
    return "\n".join(
        [*lines, "", *expectations(pairs, [(values[r]["few_sets"], lds[r]) for r in HELD_OUT if r in found])]
    )


def expectations(grid: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[str]:
    """How far expected LDS is off: of the grid's recipes, each left out in turn, and of others."""
    from retrograd.trust.forecast import expectation

    without = [(*expectation(r, grid[:k] + grid[k + 1 :]), lds) for k, (r, lds) in enumerate(grid)]
    lines = []
    for name, told in (("grid", without), ("held out", [(*expectation(r, grid), lds) for r, lds in others])):
        off = [abs(middle - lds) for middle, _, _, lds in told]
        inside = sum(low <= lds <= high for _, low, high, lds in told)
        lines += [
            f"{name}: off by {np.median(off):.3f} in the median, {np.mean(off):.3f} on average; {inside} of {len(told)} in range"
        ]
    return lines


def ranked(
    name: str, values: dict[str, dict[str, float]], lds: dict[str, float], group: Iterable[str], draws: int = 2000
) -> tuple[float, float, float, int]:
    """Spearman's correlation of a candidate with LDS over recipes, its bootstrap interval, and how many there are."""
    from scipy import stats

    recipes = [recipe for recipe in group if recipe in values]
    a, b = np.array([values[r][name] for r in recipes]), np.array([lds[r] for r in recipes])
    if len(a) < 4:
        return float("nan"), float("nan"), float("nan"), len(a)
    draw = np.random.default_rng(0)
    found = [stats.spearmanr(a[c], b[c]).statistic for c in draw.integers(0, len(a), (draws, len(a)))]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return *(round(float(x), 3) for x in (stats.spearmanr(a, b).statistic, low, high)), len(a)


def told(found: tuple[float, float, float, int]) -> str:
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}] of {found[3]}"


if __name__ == "__main__":
    main()
