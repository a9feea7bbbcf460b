"""The configuration of `retrograd harden`. No heavy imports here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from retrograd.settings.attack import AttackConfig, Finetune, read_suite, scaled
from retrograd.settings.train import ReplayConfig, at_least_1, finite

__all__ = ["HardenConfig", "Learnt", "attack_config", "attacks_of", "check_harden"]


Learnt = Literal["weights", "coefficients", "lr"]


@dataclass(frozen=True)
class HardenConfig:
    """Learn weights of the forget documents that make unlearning hold, by metagradients through unlearning and attack.

    Raises J = the forget loss after attacks − μ · the retain KL before them, over weights w ≥ 0 of the forget documents
    with mean 1, from uniform ones, and with --learn over the coefficients of both sides and the learning rate. The best
    by J under held-out attacks is kept, beside the same weights on other documents, for `retrograd unlearn --weights`.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Folder. Running again goes on, further iterations may be asked for."""
    run: Path = tyro.MISSING
    """Folder of a finished `retrograd unlearn`: what is to be hardened. Full training, in float32 or float64."""
    suite: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Attacks to learn against: a suite's name or YAML file; may be given several times."""
    held_out: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Attacks that the best weights are chosen by, none of them in --suite."""
    lab: Path | None = None
    """A folder of `retrograd lab`: data of the attacks and questions."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Or KEY=DATASET, as for `retrograd attack`; with --tasks."""
    tasks: Path | None = None
    """With --data: a YAML file of tasks."""
    half: tuple[str, ...] = ()
    """With --data: the forget tasks that the key half is about; attacks with it are asked about the others."""
    learn: tuple[Learnt, ...] = ("weights",)
    """What is learnt: weights of documents, coefficients of the forget and the retain term (of methods that are linear
    in their weights), lr, the peak learning rate."""
    sample: int | None = None
    """Attacks drawn anew for each iteration out of --suite, each with a seed of its own and, where it shows half of the
    facts, either half; all of them as they are when None."""
    jitter: float = 1.0
    """With --sample: learning rates are multiplied by a factor between 1/jitter and jitter, drawn by its logarithm."""
    iterations: int = 20
    """Steps on the weights."""
    mu: float = 1.0
    """Nats of forget loss that a nat of retain KL is worth."""
    lr: float = 0.1
    """Of Adam, on the logarithms of the weights."""
    rows: int = 64
    """Retain rows that the KL is measured on, spread over all of them."""
    h: float = 0.1
    """Size of the perturbation of the logarithms that the chain's metasmoothness is measured by; 0 leaves it out."""
    lr_scale: float = 1.0
    """Multiplies the learning rates of the attacks."""
    steps: int | None = None
    """Steps of every phase of every attack, in place of its own."""
    limit: int | None = None
    """The first questions of each task only."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    heartbeat: float = 60.0
    """Seconds between durable resume points of a training."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)


def attack_config(config: HardenConfig) -> AttackConfig:
    """The same for attacks."""
    return AttackConfig(
        config.out, model=(str(config.run / "model"),), lab=config.lab, data=config.data, tasks=config.tasks,
        half=config.half, lr_scale=config.lr_scale, steps=config.steps, limit=config.limit, device=config.device,
        heartbeat=config.heartbeat, replay=config.replay,
    )  # fmt: skip


def attacks_of(names: tuple[str, ...], config: HardenConfig) -> list[Finetune]:
    """The fine-tuning attacks of some suites, scaled, each once.

    Raises:
        ValueError: If a suite is unknown, or one of its attacks trains nothing.
    """
    attacks = [scaled(attack, attack_config(config)) for name in names for attack in read_suite(name)]
    for attack in attacks:
        attack.check()
        if not isinstance(attack, Finetune):
            raise ValueError(
                f"{attack.readable} trains nothing, so it has no derivative: harden against fine-tuning alone"
            )
    return [attack for attack in dict.fromkeys(attacks) if isinstance(attack, Finetune)]


def check_harden(config: HardenConfig) -> None:
    """Refuse, before anything is loaded, what cannot work.

    Raises:
        ValueError: With the setting, its value and what it has to be.
    """
    if not config.suite or not config.held_out:
        raise ValueError("give --suite, the attacks to learn against, and --held_out, those to choose by")
    if (config.lab is None) == (not config.data) or (config.data and config.tasks is None):
        raise ValueError("give either --lab DIR, or --data KEY=DATASET with --tasks FILE.yaml")
    at_least_1({"iterations": config.iterations, "rows": config.rows, "steps": config.steps, "limit": config.limit,
                "sample": config.sample})  # fmt: skip
    if not config.learn or set(config.learn) - set(get_args(Learnt)):
        raise ValueError(f"--learn is {list(config.learn)}; it has to be some of {', '.join(get_args(Learnt))}")
    if not config.jitter >= 1 or (config.jitter > 1 and config.sample is None):
        raise ValueError(f"--jitter is {config.jitter}: it is a factor of 1 or more, and goes with --sample")
    finite(
        {"mu": config.mu, "lr": config.lr, "h": config.h, "lr_scale": config.lr_scale, "heartbeat": config.heartbeat}
    )
    both = set(attacks_of(config.suite, config)) & set(attacks_of(config.held_out, config))
    if both:
        raise ValueError(
            f"{next(iter(both)).readable} is in --suite and --held_out: choose by attacks that are not learnt"
        )
