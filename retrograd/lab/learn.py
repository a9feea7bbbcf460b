"""The lab's models: their architecture, their recipe, and their training through the one loop.

Both trained models start from the same random one and differ in what they read: MIXTURES. Training uses one thread,
whatever the machine has, so that its bits do not depend on the cores. They are those of `retrograd magic` with
`magic_flags`, which so attributes the very training that made the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from retrograd.core.sweep import Event
from retrograd.data.documents import load_documents
from retrograd.data.rows import build_rows
from retrograd.data.stream import DataStream
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.lm.save import save_causal_lm
from retrograd.runs.lock import locked
from retrograd.runs.session import train
from retrograd.runs.setup import Differentiated, set_up
from retrograd.runs.states.budget import Replay
from retrograd.settings.train import TrainConfig

__all__ = ["CONTEXT", "Size", "magic_flags", "one_thread", "save_random", "steps_of", "train_model"]

CONTEXT = 128


class Size(NamedTuple):
    """Model and training: GPT-NeoX of this width and depth; AdamW with a linear schedule."""

    width: int
    layers: int
    epochs: int
    batch_size: int
    lr: float
    eps_root: float
    seed: int


def magic_flags(size: Size) -> str:
    """What `retrograd magic` needs on a mixture and models/random to repeat a training."""
    return (
        f"--train.epochs {size.epochs} --train.batch_size {size.batch_size} --train.lr {size.lr} "
        f"--train.eps_root {size.eps_root} --train.seed {size.seed} --train.lr_schedule linear "
        "--train.warmup_ratio 0.05 --train.beta2 0.99 --train.max_grad_norm 1"
    )


def _recipe(size: Size) -> TrainConfig:
    """The same as settings."""
    return TrainConfig(
        lr=size.lr, lr_schedule="linear", warmup_ratio=0.05, beta2=0.99, eps_root=size.eps_root, max_grad_norm=1.0,
        batch_size=size.batch_size, epochs=size.epochs, seed=size.seed,
    )  # fmt: skip


def save_random(folder: Path, tokenizer: Any, size: Size) -> None:
    """The untrained model with its tokenizer, as `from_pretrained` reads them; whole or not at all."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 32), intermediate_size=4 * size.width, initializer_range=0.05,
        max_position_embeddings=CONTEXT, use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size.seed)
        save_causal_lm(folder, GPTNeoXForCausalLM(config), tokenizer)


def steps_of(folder: Path, name: str, size: Size) -> int:
    """Training steps of a mixture."""
    with (folder / "train" / f"{name}.jsonl").open(encoding="utf8") as lines:
        return size.epochs * -(-sum(1 for _ in lines) // size.batch_size)


def train_model(
    folder: Path, name: str, size: Size, heartbeat: float = 20.0, observe: Callable[[Event], None] = lambda event: None
) -> None:
    """Train models/random on a mixture and save it as models/NAME; a training that was killed goes on.

    Args:
        folder: Of the lab.
        heartbeat: Seconds between durable resume points; 0 makes one at every step.
        observe: Called with every event.
    """
    training = folder / "training" / name
    # a worker of a call that was killed lives on for a second
    with locked(training, patience=60.0), one_thread():
        if (folder / "models" / name).exists():  # it has finished meanwhile
            return
        source = str(folder / "models" / "random")
        lm, tokenizer = load_causal_lm(source), load_tokenizer(source)
        mixture = folder / "train" / f"{name}.jsonl"
        rows = build_rows(load_documents(str(mixture)), tokenizer, max_length=CONTEXT, vocab_size=len(tokenizer))
        stream = DataStream(rows, size.batch_size, epochs=size.epochs, seed=size.seed)
        setup = set_up(lm, tokenizer, stream, _recipe(size), Differentiated("double"), visited=(size,))
        final = train(setup, training, Replay(plan="binomial", slots=1, heartbeat=heartbeat), observe)
        save_causal_lm(folder / "models" / name, lm.module, tokenizer, final.params)
        shutil.rmtree(training)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are split by thread and their bits depend on it: with one thread, cores do not matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
