"""What can be known before the first meeting: each model can be read, and each configuration has its data.

A meeting may take hours, and those of the controls come first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from retrograd.attack.material import LAB_KEYS
from retrograd.attack.untrained.attacks import find_untraining
from retrograd.lm.checkpoint import read_config
from retrograd.lm.model import load_tokenizer
from retrograd.settings.attack import AttackConfig, Finetune, Untrained, configurations

__all__ = ["check_data", "check_key", "check_models"]


def check_models(sources: Iterable[str], tokenizer: str | None) -> None:
    """Read the configuration and the tokenizer of every model.

    Args:
        tokenizer: Of all models, if not their own.
    Raises:
        ValueError: If there is none.
    """
    for source in sources:
        read_config(source)
        load_tokenizer(tokenizer or source)


def check_data(config: AttackConfig) -> None:
    """Refuse an attack of an unknown name, one whose data are not there, and one that needs a model not given.

    Raises:
        ValueError: With its name, and what there is.
    """
    keys = LAB_KEYS if config.lab is not None else tuple(text.split("=", 1)[0] for text in config.data)
    for configuration in configurations(config):
        wanted: Iterable[str] = ()
        if isinstance(configuration, Finetune):
            wanted = (configuration.before, configuration.data) if configuration.before else (configuration.data,)
        elif isinstance(configuration, Untrained):
            kind = find_untraining(configuration)
            wanted = kind.reads
            if kind.needs_base and config.lab is None and config.base is None:
                raise ValueError(f"{kind.name} needs the model before unlearning: give --base")
        for key in wanted:
            check_key(configuration.readable, key, keys)


def check_key(attack: str, key: str, keys: Collection[str]) -> None:
    """Refuse an attack whose data are not there.

    Raises:
        ValueError: With the keys of the data there are.
    """
    if key not in keys:
        raise ValueError(f"attack {attack} reads data of the key {key!r}; there are {', '.join(keys)}")
