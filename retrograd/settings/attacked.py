"""The attacks of an experiment: its entry `attack` as settings of `retrograd attack`. No heavy imports here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrograd.settings.attack import AttackConfig, check_attack
from retrograd.settings.commands import CompareConfig, LabConfig
from retrograd.settings.parse import build, by_name, dump_yaml

__all__ = ["LAB", "attack_settings", "lab_settings"]

LAB = "lab"  # the word that stands for the lab's folder, and the entry with its settings

_OWN = ("out", "model", "base", "filtered", "device", "tokenizer", "heartbeat", "export", "attribute", "subsets",
        "fraction", "replay", "parallel", "replicas", "shards", "patience")  # fmt: skip


def attack_settings(
    given: Mapping[str, Any], base: str, never: str | None, common: Mapping[str, Any], out: Path, where: str
) -> AttackConfig:
    """The settings of the attacks on an experiment's models.

    Args:
        given: The entry `attack`; its `suite` may hold configurations beside names and files, its `utility` is one
            number.
        common: Settings of all methods.
        out: Folder of the attacks.
    Raises:
        ValueError: If a setting does not exist, is the experiment's own or cannot work.
    """
    given = by_name(given, where)
    if taken := [name for name in given if name in _OWN]:
        raise ValueError(f"{where}: {taken[0]} is set by the experiment itself; leave it out")
    suite = given.get("suite") or ()
    suite = (suite,) if isinstance(suite, (str, dict)) else suite
    values = {**given, "suite": [entry if isinstance(entry, str) else dump_yaml([entry], default_flow_style=True)
                                 for entry in suite],
              "utility": [given.get("utility", CompareConfig.utility)]}  # fmt: skip
    values |= {"out": out, "model": [base], "base": base, "filtered": never}
    values |= {name: common[name] for name in ("device", "tokenizer") if name in common}
    config: AttackConfig = build(AttackConfig, values, where)
    try:
        check_attack(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return config


def lab_settings(given: Mapping[str, Any], folder: Path, where: str) -> LabConfig:
    """The settings of the lab that an experiment builds first.

    Raises:
        ValueError: If a setting does not exist, or is the folder.
    """
    given = by_name(given, where)
    if "dir" in given:
        raise ValueError(f"{where}: an experiment builds its lab in OUT/{LAB}; leave dir out, or give a finished lab "
                         f"by --names {LAB}=DIR")  # fmt: skip
    config: LabConfig = build(LabConfig, {**given, "dir": folder}, where)
    return config
