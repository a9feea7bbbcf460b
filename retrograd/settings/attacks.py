"""Single attacks that train or change a model, as data. No heavy imports here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from retrograd.settings.train import LoraConfig, TrainConfig, at_least_1, check_training, finite

__all__ = ["Finetune", "Untrained"]

_SCHEDULES = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Finetune:
    """Train the model on some data, in one phase or two."""

    data: str = "forget"
    """Key of the data: of a lab forget, documents, half, other_half, mixed, retain, benign or prose; else of --data."""
    steps: int = 100
    """Optimizer steps."""
    epochs: int | None = None
    """Passes over the data, in place of steps."""
    examples: int | None = None
    """The first documents of the data only."""
    before: str | None = None
    """Key of data to train on before, with an optimizer and a schedule of its own."""
    before_steps: int = 200
    """Steps of that phase."""
    rank: int = 0
    """Of LoRA adapters, with alpha = rank; 0 trains the whole model."""
    modules: tuple[str, ...] = ()
    """Layers that get adapters; peft's choice when empty."""
    optimizer: Literal["sgd", "adamw", "muon"] = "adamw"
    """As --train.optimizer."""
    lr: float = 2e-5
    """Peak learning rate."""
    lr_schedule: _SCHEDULES = "constant"
    """How it moves."""
    warmup_ratio: float = 0.0
    """Share of the steps in which it rises."""
    warmup_steps: int | None = None
    """Or as a number of steps."""
    eps_root: float = 1e-8
    """As --train.eps_root; 1e-5 where scores have to predict retraining."""
    weight_decay: float = 0.01
    """As --train.weight_decay."""
    max_grad_norm: float | None = None
    """As --train.max_grad_norm."""
    batch_size: int = 16
    """Rows of a step."""
    micro_batch_size: int | None = None
    """Rows a forward pass takes at once."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of parameters and arithmetic."""
    seed: int = 0
    """Of the order of rows and the adapters."""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_ratio:
            raise ValueError(f"warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio}: give one of them")

    @property
    def probe(self) -> bool:
        return False

    @property
    def readable(self) -> str:
        """What tells it from its neighbours, for people."""
        size = f"lora{self.rank}" if self.rank else "full"
        before = f"{self.before}-then-" if self.before else ""
        length = f"{self.epochs}ep" if self.epochs else str(self.steps)
        dtype = "" if self.dtype == "float32" else f"-{self.dtype}"
        return f"{size}-{before}{self.data}-{self.lr:g}-{self.lr_schedule}-{length}{dtype}-s{self.seed}"

    def train(self) -> TrainConfig:
        """The recipe of a phase."""
        ratio = None if self.warmup_steps is not None else self.warmup_ratio
        return TrainConfig(
            optimizer=self.optimizer, lr=self.lr, lr_schedule=self.lr_schedule, warmup_ratio=ratio,
            warmup_steps=self.warmup_steps, eps_root=self.eps_root, weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm, batch_size=self.batch_size, micro_batch_size=self.micro_batch_size,
            seed=self.seed,
        )  # fmt: skip

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of its phases, in their order; the last is the attack itself."""
        return ("before", "attack") if self.before else ("attack",)

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(self.rank, float(self.rank or 16), self.modules)

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: With the setting, its value and what it has to be.
        """
        at_least_1({name: getattr(self, name) for name in ("steps", "epochs", "examples", "before_steps")})
        at_least_1({"warmup_steps": self.warmup_steps})
        finite({"lr": self.lr, "weight_decay": self.weight_decay})
        if self.warmup_steps is not None and self.epochs is None and self.warmup_steps >= self.steps:
            raise ValueError(f"{self.warmup_steps} warm-up steps leave none of {self.steps}; give fewer")
        check_training(self.train(), self.lora)


@dataclass(frozen=True)
class Untrained:
    """Change the weights or the prompt, without a training step, by rising strengths."""

    attack: str = ""
    """interpolate, ablate_delta, ablate_junk, quantise, prune, noise, few_shot or jailbreak."""
    strengths: tuple[float, ...] = ()
    """The attack's own when empty."""
    seed: int = 0
    """Of what is drawn."""

    @property
    def readable(self) -> str:
        return f"{self.attack}-s{self.seed}"

    @property
    def probe(self) -> bool:
        """Whether it takes the model before unlearning: that tells of the weights, not of an attacker."""
        return self.attack in ("interpolate", "ablate_delta")

    def check(self) -> None:
        """As `Finetune.check`; the attacks themselves refuse a strength that they do not have."""
        for strength in self.strengths:
            finite({f"strengths of {self.attack}": strength})
