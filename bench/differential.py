"""Random runs against an independent one: scores by retrograd and by one unrolled autograd graph, in float64.

The other side has its own loop, batches, schedules, clipping and optimizers, and takes each document by itself through
the module's plain forward pass: no padding, packing, joined rows, fused head, micro-batches, plan or pullback. It shares
torch, transformers, and what makes them float64 and twice differentiable (`twice_differentiable`). Every tenth
configuration is also retrained by that loop at moved data weights: central differences see what two graphs share.

Some draws train roughly (a high rate with momentum): rounding grows from step to step, and no two loops agree to 1e-6.
Where scores differ by more, the independent loop runs again from parameters moved by one rounding, and its own change
tells how far two right answers lie apart; scores have to be within ten times that.

A configuration is a function of its seed: family, tied or padded embeddings, frozen leaves, LoRA, packing, weights by
document or token, batches, micro-batches, clipping, optimizer, schedule, engine, plan, where states are, interruption
on the way there and back, and the number of queries.

    python bench/differential.py                     # 500 configurations
    python bench/differential.py --seed 17           # one of them again
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from retrograd import DataStream, Trainer
from retrograd.core.optim import SGD, Adam, AdamW, Muon, Schedule
from retrograd.data.rows import Rows
from retrograd.data.stream import token_rows
from retrograd.lm.layout import twice_differentiable
from retrograd.lm.model import norms_and_biases
from retrograd.query.columns import Queries, query_columns
from retrograd.runs.states.budget import Replay
from retrograd.trainer import Evaluation

WORDS, PAD, EVERY, TOLERANCE, DIFFERENCE = 20, 5, 10, 1e-6, 1e-4
FAMILIES = ("llama", "llama-tied", "llama-padded", "gpt2", "gpt-neox", "qwen2-padded", "gemma-padded", "olmo2", "phi")
Params = dict[str, Tensor]


@dataclass(frozen=True)
class Configuration:
    """One random run. documents: tokens of each; rows: documents of each row, more than one where packed."""

    seed: int
    family: str
    lora: bool
    frozen: float
    documents: list[list[int]]
    rows: list[list[int]]
    queries: list[list[int]]
    per_token: bool
    batch_size: int
    epochs: int
    shuffle: bool
    micro_batch_size: int | None
    max_grad_norm: float | None
    optimizer: dict[str, Any]
    schedule: str
    lr: float
    warmup: int
    ends: tuple[float | None, float | None]
    engine: str
    plan: dict[str, Any]
    durable: bool
    interrupted: tuple[int, int] | None

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(len(self.rows) / self.batch_size)


def configuration(seed: int) -> Configuration:
    draw, more = random.Random(f"differential {seed}"), random.Random(f"ends {seed}")
    documents = [
        [draw.choice((PAD, draw.randrange(WORDS))) if draw.random() < 0.3 else draw.randrange(WORDS) for _ in range(n)]
        for n in (draw.randint(2, 8) for _ in range(draw.randint(3, 7)))
    ]
    packed = draw.random() < 0.3
    numbers = list(range(len(documents)))
    rows = [numbers[i : i + 2] for i in range(0, len(numbers), 2)] if packed else [[n] for n in numbers]
    name = draw.choice(("sgd", "momentum", "nesterov", "adamw", "adamw", "adam", "muon"))
    lr = {"adam": 5e-3, "adamw": 5e-3, "muon": 2e-2}.get(name, 0.1) * draw.uniform(0.5, 2)
    optimizer = {
        "name": name, "weight_decay": draw.choice((0.0, 0.1)), "momentum": draw.choice((0.5, 0.9)),
        "spare": more.random() < 0.5, "eps_root": draw.choice((1e-6, 1e-4)), "beta1": draw.choice((0.8, 0.9)), "beta2": draw.choice((0.95, 0.999)),
    }  # fmt: skip
    batch_size, epochs = draw.randint(1, 4), draw.randint(1, 3)
    steps = epochs * math.ceil(len(rows) / batch_size)
    kinds = ["all", "sqrt", "binomial", "interval", "auto"] + ([] if name == "muon" else ["gradients"])
    plan: dict[str, Any] = {"plan": draw.choice(kinds)}
    plan |= {"binomial": {"slots": draw.randint(1, 4)}, "interval": {"interval": draw.randint(1, 4)}}.get(
        plan["plan"], {}
    )
    durable = draw.random() < 0.4
    interrupted = (draw.randint(1, steps), draw.randint(1, steps)) if durable and draw.random() < 0.7 else None
    queries = [[draw.randrange(WORDS) for _ in range(draw.randint(2, 7))] for _ in range(draw.randint(1, 3))]
    return Configuration(
        seed, draw.choice(FAMILIES), draw.random() < 0.15, draw.choice((0.0, 0.0, 0.3)), documents, rows, queries,
        draw.random() < 0.4, batch_size, epochs, draw.random() < 0.7, draw.choice((None, None, 1, 2)),
        draw.choice((None, None, 0.5, 2.0)), optimizer,
        draw.choice(("constant", "linear", "cosine", "polynomial", "one-cycle", "one-cycle-linear")), lr,
        draw.randint(0, min(2, steps - 1)), (more.choice((None, 0.1)), more.choice((None, 0.3))),
        draw.choice(("double", "blocks")), plan, durable, interrupted,
    )  # fmt: skip


def model(given: Configuration) -> nn.Module:
    """The tiny model of a configuration, with every parameter away from zero and one."""
    import transformers as T

    common = {
        "vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    grouped = {**common, "num_key_value_heads": 1, "pad_token_id": None}
    config = {
        "llama": lambda: T.LlamaConfig(**grouped),
        "llama-tied": lambda: T.LlamaConfig(**grouped, tie_word_embeddings=True),
        "llama-padded": lambda: T.LlamaConfig(**{**grouped, "pad_token_id": PAD}, tie_word_embeddings=True),
        "qwen2-padded": lambda: T.Qwen2Config(**{**grouped, "pad_token_id": PAD}, tie_word_embeddings=True),
        "gemma-padded": lambda: T.GemmaConfig(**{**grouped, "pad_token_id": PAD}, head_dim=4),
        "olmo2": lambda: T.Olmo2Config(**{**grouped, "pad_token_id": PAD}),
        "phi": lambda: T.PhiConfig(**common, pad_token_id=None),
        "gpt2": lambda: T.GPT2Config(
            vocab_size=WORDS, n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        ),
        "gpt-neox": lambda: T.GPTNeoXConfig(**common),
    }[given.family]()
    torch.manual_seed(given.seed)
    module: Any = T.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if given.lora:
        from peft import LoraConfig, get_peft_model

        module = get_peft_model(module, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).double()
        module.eval()
    adapted = [p for p in module.parameters() if p.requires_grad]
    draw = random.Random(given.seed)
    for number, parameter in enumerate(adapted):
        if given.lora:
            nn.init.normal_(parameter, std=0.3)
        if number and draw.random() < given.frozen:
            parameter.requires_grad_(False)
    return module


def data_weights(given: Configuration) -> Tensor:
    """[documents], or [rows, longest row] by token."""
    longest = max(sum(len(given.documents[d]) for d in row) for row in given.rows)
    shape = (len(given.rows), longest) if given.per_token else (len(given.documents),)
    draw = torch.Generator().manual_seed(given.seed)
    return 0.5 + torch.rand(shape, generator=draw, dtype=torch.float64)


# By retrograd.


class Interrupted(Exception):
    """What a kill does, as seen from inside."""


def ours(given: Configuration, weights: Tensor) -> tuple[Tensor, Tensor]:
    """φ [K] and scores [K, *weights.shape] by Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run" if given.durable else None
        replay = (
            Replay(**given.plan, memory=0, disk=1 << 40, keep=True, heartbeat=0.0) if place else Replay(**given.plan)
        )
        there, back = given.interrupted or (None, None)
        for stops in [(there, None), (None, back), (None, None)]:
            trainer, start, stream, queries = _trainer(given, weights)  # as another process would
            try:
                final = trainer.train(start, stream, place, replay=replay, observe=_stopping(stops[0]))
                asked = Evaluation(*queries(final.params))
                result = trainer.backward(place, stream, asked, replay=replay, observe=_stopping(stops[1]))
            except Interrupted:
                continue
            return result.value, result.weight_grads
    raise AssertionError("the last one is not interrupted")


def _trainer(given: Configuration, weights: Tensor) -> tuple[Trainer, Any, DataStream, Queries]:
    from retrograd.lm.model import causal_objective

    module = model(given)
    options = {"max_grad_norm": given.max_grad_norm, "micro_batch_size": given.micro_batch_size, "engine": given.engine}
    trainer, start = Trainer.initialize(module, _our_optimizer(given, module), **options)  # type: ignore[arg-type]
    stream = DataStream(
        _our_rows(given), given.batch_size, epochs=given.epochs, shuffle=given.shuffle, seed=given.seed,
        weight_shape=tuple(weights.shape), weights=weights, dtype=torch.float64,
    )  # fmt: skip
    columns = query_columns(causal_objective(module)[0], token_rows(given.queries), "none", dtype=torch.float64)
    return trainer, start, stream, Queries(columns)


def _stopping(after: int | None) -> Callable[[Any], None]:
    seen = 0

    def observe(event: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == after:
            raise Interrupted

    return observe


def _our_rows(given: Configuration) -> Rows:
    ids, masks, owners = [], [], []
    for row in given.rows:
        ids.append(np.concatenate([np.array(given.documents[d]) for d in row]))
        masks.append(np.concatenate([np.arange(len(given.documents[d])) > 0 for d in row]))
        owners.append(np.concatenate([np.full(len(given.documents[d]), d) for d in row]))
    return Rows(ids, masks, owners, len(given.documents), {}, packed=any(len(row) > 1 for row in given.rows))


def _our_optimizer(given: Configuration, module: nn.Module) -> Any:
    start, end = (share and share * given.lr for share in given.ends)
    start, end = start if given.warmup else None, end if given.schedule != "constant" else None
    o, lr = given.optimizer, Schedule(given.schedule, given.lr, given.steps, given.warmup, 2.0, start, end)
    adam = (o["beta1"], o["beta2"], 1e-8, o["eps_root"])
    spared = norms_and_biases(module) if o["spare"] else ()
    match o["name"]:
        case "sgd":
            return SGD(lr, 0.0, False, o["weight_decay"], spared)
        case "adam":
            return Adam(lr, *adam, o["weight_decay"], spared)
        case "adamw":
            return AdamW(lr, *adam, o["weight_decay"], spared)
        case "muon":
            return Muon(lr, o["momentum"], True, o["weight_decay"], 5, *adam, tuple(_ends(module)), spared)
    return SGD(lr, o["momentum"], o["name"] == "nesterov", o["weight_decay"], spared)


def _without_decay(module: Any) -> set[str]:
    """Names of what transformers' Trainer gives no decay; a tied parameter has its first name."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, module))  # type: ignore[arg-type]
    return {name for name, _ in module.named_parameters() if name not in decayed}


def _ends(module: Any) -> list[str]:
    """Names of the embeddings, which Muon leaves to AdamW."""
    ends = {id(part.weight) for part in (module.get_input_embeddings(), module.get_output_embeddings())}
    return [name for name, p in module.named_parameters() if id(p) in ends]


# By an independent loop.


class Twin:
    """The run as one function of its data weights, by plain autograd."""

    def __init__(self, given: Configuration) -> None:
        self.given, self.module = given, model(given)
        self.start = {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}
        self.ends = _ends(self.module)
        self.spared = _without_decay(self.module) if given.optimizer["spare"] else set()

    def unrolled(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        weights = weights.clone().requires_grad_()
        phi = self.run(weights, graph=True)
        each = [torch.autograd.grad(one, weights, retain_graph=True)[0] for one in phi]
        return phi.detach(), torch.stack(each)

    def moved(self) -> Twin:
        """The same run from parameters moved by one rounding each, up or down."""
        twin, draw = Twin(self.given), torch.Generator().manual_seed(self.given.seed)
        for x in twin.start.values():
            up = torch.randint(0, 2, x.shape, generator=draw).double() * 2 - 1
            x.mul_(1 + up * torch.finfo(torch.float64).eps)
        return twin

    def run(self, weights: Tensor, graph: bool = False) -> Tensor:
        """φ [K] after training."""
        theta, memory = {n: x.clone() for n, x in self.start.items()}, dict[str, Tensor]()
        for step in range(self.given.steps):
            point = {n: x.clone().requires_grad_() if not x.requires_grad else x.clone() for n, x in theta.items()}
            kept = {n: x.clone() for n, x in theta.items()}
            loss = self.loss(point, kept, self.batch(step), weights)
            found = torch.autograd.grad(loss, list(point.values()), create_graph=graph, allow_unused=True)
            g = {n: torch.zeros_like(x) if one is None else one for (n, x), one in zip(point.items(), found)}
            theta = self.update(theta, memory, self.clipped(g), step)
            if not graph:
                theta, memory = ({n: x.detach() for n, x in some.items()} for some in (theta, memory))
        losses = [self.document(theta, theta, row) for row in self.given.queries]
        return torch.stack([ce.mean() for ce in losses])

    def batch(self, step: int) -> list[int]:
        given = self.given
        size, per_epoch = given.batch_size, math.ceil(len(given.rows) / given.batch_size)
        epoch, place = divmod(step, per_epoch)
        order = np.arange(len(given.rows))
        if given.shuffle:
            order = np.random.default_rng(given.seed + epoch).permutation(len(order))
        return order[place * size : (place + 1) * size].tolist()

    def loss(self, point: Params, kept: Params, rows: list[int], weights: Tensor) -> Tensor:
        """Each document by itself; the row's token weights shift by what stands before it."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            before = 0
            for number in self.given.rows[row]:
                tokens = self.given.documents[number]
                ce, end = self.document(point, kept, tokens), before + len(tokens)
                own = weights[row, before + 1 : end] if self.given.per_token else weights[number]
                total, count, before = total + torch.sum(own * ce), count + len(tokens) - 1, end
        return total / count

    def document(self, point: Params, kept: Params, tokens: list[int]) -> Tensor:
        """Cross-entropy of all tokens but the first, [n − 1] nats."""
        ids = torch.tensor([tokens])
        with twice_differentiable(torch.float64), self._looked_up(point, kept):
            logits = functional_call(self.module, point, (ids,), {"use_cache": False}).logits
        return -torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]

    @contextmanager
    def _looked_up(self, point: Params, kept: Params) -> Iterator[None]:
        """The padding token's row is read from a copy that the gradient does not see, and the derivative does."""
        table: Any = self.module.get_input_embeddings()  # type: ignore[operator]
        name = next((n for n, p in self.module.named_parameters() if p is table.weight), "")
        padding, plain = table.padding_idx, type(table).forward

        def forward(ids: Tensor) -> Tensor:
            rows = torch.where((ids == padding)[..., None], kept[name][ids], point[name][ids])
            return rows * getattr(table, "embed_scale", 1.0)

        if name in point and padding is not None:
            table.forward = forward
        try:
            yield
        finally:
            vars(table).pop("forward", None)
            assert type(table).forward is plain

    def clipped(self, g: Params) -> Params:
        limit = self.given.max_grad_norm
        if limit is None:
            return g
        norm = torch.cat([x.flatten() for x in g.values()]).norm()
        return {n: x * (limit / (norm + 1e-6)) for n, x in g.items()} if norm + 1e-6 > limit else g

    def rate(self, step: int) -> float:
        given, steps = self.given, self.given.steps
        start, end = (None if share is None else share * given.lr for share in given.ends)
        if given.schedule.startswith("one-cycle"):
            low, top = given.lr / 25 if start is None or not given.warmup else start, given.warmup - 1
            end = low / 10000 if end is None else end
            if step <= top:
                share, a, b = (step / top if top else 1.0), low, given.lr
            else:
                share, a, b = (step - top) / (steps - 1 - top), given.lr, end
            return a + (b - a) * (share if "linear" in given.schedule else (1 - math.cos(math.pi * share)) / 2)
        start, end = start or 0.0, end or 0.0
        if step < given.warmup:
            share = step / given.warmup
            return start * (1 - share) + given.lr * share
        left = 1 - (step - given.warmup) / (steps - given.warmup)
        shapes = {"linear": left, "cosine": math.sin(math.pi * left / 2) ** 2, "polynomial": left**2}
        share = shapes.get(given.schedule, 1.0)
        return given.lr * share + end * (1 - share)

    def update(self, theta: Params, memory: Params, g: Params, step: int) -> Params:
        o, lr, after = self.given.optimizer, self.rate(step), {}
        decay = {n: 0.0 if n in self.spared else o["weight_decay"] for n in theta}
        for n, x in theta.items():
            if o["name"] == "adam":
                after[n] = self._adam(n, x, memory, g[n] + decay[n] * x, step, 0.0)
            elif o["name"] == "adamw" or (o["name"] == "muon" and (x.ndim != 2 or n in self.ends)):
                after[n] = self._adam(n, x, memory, g[n], step, decay[n])
            elif o["name"] == "muon":
                b = memory[n] = o["momentum"] * memory.get(n, torch.zeros_like(x)) + (1 - o["momentum"]) * g[n]
                u = orthogonalised(o["momentum"] * b + (1 - o["momentum"]) * g[n])
                after[n] = x - lr * (decay[n] * x + 0.2 * math.sqrt(max(x.shape)) * u)
            else:
                d = g[n] + decay[n] * x
                if o["name"] != "sgd":
                    b = memory[n] = o["momentum"] * memory.get(n, torch.zeros_like(x)) + d
                    d = d + o["momentum"] * b if o["name"] == "nesterov" else b
                after[n] = x - lr * d
        return after

    def _adam(self, n: str, x: Tensor, memory: Params, g: Tensor, step: int, decay: float) -> Tensor:
        o, zero = self.given.optimizer, torch.zeros_like(x)
        m = memory[f"m {n}"] = o["beta1"] * memory.get(f"m {n}", zero) + (1 - o["beta1"]) * g
        v = memory[f"v {n}"] = o["beta2"] * memory.get(f"v {n}", zero) + (1 - o["beta2"]) * g**2
        m, v = m / (1 - o["beta1"] ** (step + 1)), v / (1 - o["beta2"] ** (step + 1))
        return x - self.rate(step) * (m / (torch.sqrt(v + o["eps_root"]) + 1e-8) + decay * x)


def orthogonalised(x: Tensor) -> Tensor:
    """Five quintic Newton–Schulz steps, on the wide side."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x * torch.rsqrt((x**2).sum() + 1e-14)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ (a @ x))
    return x.T if tall else x


# Both.


def compare(seed: int, retrain: bool) -> dict[str, float]:
    """Relative errors of φ, of the scores against the unrolled graph, and along a direction against retraining."""
    given = configuration(seed)
    weights = data_weights(given)
    values, scores = ours(given, weights)
    twin = Twin(given)
    phi, expected = twin.unrolled(weights)
    found = {"value": relative(values.reshape(-1), phi), "scores": max(map(relative, scores, expected))}
    if found["scores"] > TOLERANCE:
        found["rounding"] = max(map(relative, twin.moved().unrolled(weights)[1], expected))
    elif retrain:  # where rounding has grown so, differences tell nothing
        draw = torch.Generator().manual_seed(seed + 1)
        along = torch.randn(weights.shape, generator=draw, dtype=torch.float64).abs() * expected.sum(0).sign()
        best = math.inf
        for h in (1e-3, 1e-4, 1e-5):
            slope = (twin.run(weights + h * along) - twin.run(weights - h * along)) / (2 * h)
            size = (scores * along).flatten(1).norm(dim=1)
            best = min(best, float(((scores * along).flatten(1).sum(1) - slope).abs().div(size).max()))
        found["retraining"] = best
    return found


def relative(one: Tensor, other: Tensor) -> float:
    size = float(other.norm())
    return float((one - other).norm()) / size if size else float(one.norm())


def wrong(found: dict[str, float]) -> list[str]:
    limits = {"retraining": DIFFERENCE, "scores": max(TOLERANCE, 10 * found.get("rounding", 0.0)), "rounding": math.inf}
    return [name for name, error in found.items() if not error <= limits.get(name, TOLERANCE)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one alone, with its configuration")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [asked.seed] if asked.seed is not None else range(asked.first, asked.first + asked.count)
    errors: dict[int, dict[str, float]] = {}
    failed, start = [], time.monotonic()
    for seed in seeds:
        if asked.seed is not None:
            print(json.dumps(asdict(configuration(seed))))
        errors[seed] = compare(seed, asked.seed is not None or seed % EVERY == 0)
        if wrong(errors[seed]):
            failed.append(seed)
        if wrong(errors[seed]) or "rounding" in errors[seed]:
            print(f"seed {seed}: {errors[seed]}", flush=True)
        if len(errors) % 25 == 0:
            print(f"{len(errors)} done, {len(failed)} failed, {time.monotonic() - start:.0f} s", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps({"errors": errors, "failed": failed}))
    print("| against | configurations | beyond the tolerance | worst | its seed |\n|---|---|---|---|---|")
    for name in ("value", "scores", "retraining"):
        of = {seed: found[name] for seed, found in errors.items() if name in found}
        if of:
            worst = max(of, key=of.__getitem__)
            beyond = sum(name in wrong(errors[seed]) for seed in of)
            print(f"| {name} | {len(of)} | {beyond} | {of[worst]:.1e} | {worst} |")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
