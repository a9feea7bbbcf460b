"""Suites of attacks by name: each a list of configurations as a YAML file would have them. No imports here.

Several values of a setting stand for a configuration each. Learning rates and steps are those of the original
experiments on models of 7B parameters; --lr_scale and --steps fit them to others.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SUITES"]

_STRONG: dict[str, Any] = {"lr": [5e-6, 1e-5, 2e-5, 5e-5, 1e-4], "rank": [0, 16, 64], "steps": 1000}

SUITES: dict[str, list[dict[str, Any]]] = {
    "short": [{"examples": 512, "lr": 2e-5, "steps": 100}],
    # replication only: many passes over few documents, in bf16
    "legacy": [{"examples": 512, "lr": 2e-5, "epochs": 30, "dtype": "bfloat16"}],
    "six": [
        {"lr": [2e-5, 2e-4, 1e-3], "lr_schedule": "cosine", "warmup_ratio": 0.1, "steps": 3000},
        {"lr": 2e-4, "lr_schedule": "cosine", "warmup_steps": [30, 100], "steps": 3000},
        {"lr": 2e-4, "warmup_ratio": 0.1, "steps": 3000},
    ],
    "five": [
        {"lr": [1e-5, 2e-5, 8e-5], "lr_schedule": "linear", "steps": 10000},
        {"lr": 2e-5, "lr_schedule": "cosine", "steps": 10000},
        {"lr": 2e-5, "lr_schedule": "linear", "steps": 10000, "dtype": "bfloat16"},
    ],
    "paper": [{"lr": 2e-5, "lr_schedule": "cosine", "warmup_ratio": 0.01, "epochs": 2, "seed": [42, 43]}],
    "few-step": [{"lr": [2e-5, 2e-4, 5e-4, 1e-3], "steps": 20}, {"lr": 1e-3, "rank": [8, 16], "steps": 20}],
    "strong": [
        {**_STRONG, "lr_schedule": ["linear", "cosine"], "data": ["forget", "benign"]},
        {**_STRONG, "lr_schedule": ["linear", "cosine"], "before": "benign"},
        # what broke TAR
        {**_STRONG, "lr_schedule": "cosine", "warmup_steps": 100},
    ],
    "indirect": [
        {"data": ["benign", "retain"], "lr": 2e-5, "steps": 500},
        {"before": "benign", "lr": 2e-5, "steps": 500},
        {"before": "prose", "before_steps": 200, "lr": 2e-5, "steps": 500},
    ],
    "latent": [{"data": "half", "rank": [0, 16], "lr": 2e-5, "lr_schedule": "linear", "steps": 500}],
    "untrained": [
        {
            "attack": [
                "interpolate",
                "ablate_delta",
                "ablate_junk",
                "quantise",
                "prune",
                "noise",
                "few_shot",
                "jailbreak",
            ]
        }
    ],
    # the model stays as it is: what is put into every question is searched on half of them
    "prompts": [{"prompt": "suffix", "steps": 100}, {"prompt": "latent", "steps": 100}],
}
