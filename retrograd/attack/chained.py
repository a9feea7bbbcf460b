"""A run of `retrograd attack --attribute` as one of unlearning, whose queries are asked after the attack.

    φ'(θ_K) = φ(θ_{K+S}), and ∇φ' is φ's gradient pulled back through the attack's phases

So everything that takes a run with scores takes this one, `retrograd verify`, `validate` and `query` among them
(`runs/phases.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from retrograd.attack.chain_validation import begins
from retrograd.evaluate.folder import content
from retrograd.runs.phases import asked_after, trained
from retrograd.runs.setup import Loaded
from retrograd.settings.attack import PhaseConfig
from retrograd.settings.parse import build
from retrograd.settings.train import to_dict
from retrograd.settings.unlearn import ChainConfig, UnlearnConfig, parse_source
from retrograd.unlearn import setup as unlearning

__all__ = ["assemble", "chain_config", "contents"]


def chain_config(config: UnlearnConfig, phases: Sequence[PhaseConfig]) -> ChainConfig:
    """The settings of an unlearning with those of the attack that follows."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(UnlearnConfig)}
    chain = ({**to_dict(phase), "contents": contents(phase)} for phase in phases)
    return ChainConfig(**given, chain=tuple(chain))


def contents(phase: PhaseConfig) -> dict[str, str | None]:
    """Hashes of what a phase trains on, by data set."""
    names = [str(parse_source(text, UnlearnConfig()).dataset) for text in phase.sources]
    return {name: content(name) for name in names}


def assemble(config: ChainConfig) -> Loaded:
    """Load and check the unlearning and the attack.

    Raises:
        ValueError: For whatever cannot work; if the folder was left by a version that did not tell its attack, or what
            the attack trained on has changed.
    """
    if not config.chain:
        raise ValueError(f"{config.run} does not tell its attack: it is of an earlier version; attribute again, in "
                         "another folder")  # fmt: skip
    phases = [_phase(settings, config, number) for number, settings in enumerate(config.chain)]
    loaded = unlearning.assemble(config)
    after = begins(loaded, phases)
    asked = asked_after(loaded.asked, after, loaded.stream.weights)
    return dataclasses.replace(loaded, asked=asked, after=partial(trained, after))


def _phase(settings: dict[str, Any], config: ChainConfig, number: int) -> PhaseConfig:
    given = {name: value for name, value in settings.items() if name != "contents"}
    run = Path(config.run) / f"chained-{number}"  # nothing is written there
    phase: PhaseConfig = build(PhaseConfig, {**given, "run": run, "dtype": config.dtype}, f"{config.run}: chain")
    if changed := [name for name, old in settings["contents"].items() if contents(phase).get(name) != old]:
        raise ValueError(f"the attack trained on {changed[0]}, which is gone or has changed since; put it back")
    return phase
