"""The command line: `retrograd magic RUN …`.

Nothing heavy is imported until a command runs, so that --help answers at once. Exit codes: 0 done, 2 the user can mend
it, 1 the machine failed and the same command resumes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import tyro

from retrograd.runs.config import MagicConfig, from_yaml

__all__ = ["main"]

_USAGE = """usage: retrograd COMMAND [OPTIONS]

Which training data made this model do that? Exact training-data attribution by metagradients (MAGIC).

commands:
  magic RUN    train, query, reverse: an exact score for every training example or token

retrograd COMMAND --help shows a command's options.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] != "magic":
        return _fail(ValueError(f"unknown command {arguments[0]!r}; the commands are: magic"), 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _warn
    try:
        config = _parse(arguments[1:])
        from retrograd.stages.magic import magic

        magic(config)
        return 0
    except ValueError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130
    except (OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)


def _parse(arguments: list[str]) -> MagicConfig:
    """Flags over the defaults of --config."""
    arguments = _spell_out_switches(arguments)
    file = _value_of("--config", arguments)
    default = from_yaml(Path(file)) if file else None
    options: dict[str, Any] = {} if default is None else {"default": default}
    flags = (tyro.conf.FlagConversionOff,)
    return tyro.cli(MagicConfig, prog="retrograd magic", args=arguments, config=flags, **options)


def _spell_out_switches(arguments: list[str]) -> list[str]:
    """--overwrite → --overwrite True, and true/false in any case after a switch."""
    switches, found = _switches(MagicConfig), []
    for place, argument in enumerate(arguments):
        previous = arguments[place - 1].replace("-", "_") if place else ""
        is_value = previous in switches and argument.lower() in ("true", "false")
        found.append(argument.capitalize() if is_value else argument)
        following = arguments[place + 1].lower() if place + 1 < len(arguments) else ""
        if argument.replace("-", "_") in switches and following not in ("true", "false"):
            found.append("True")
    return found


def _switches(kind: Any, prefix: str = "__") -> set[str]:
    """Names of the boolean settings, every dash an underscore."""
    hints = typing.get_type_hints(kind)
    found = {prefix + name for name, hint in hints.items() if hint is bool}
    nested = [(name, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    return found.union(*(_switches(hint, f"{prefix}{name}.") for name, hint in nested))


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else arguments[place + 1] if place + 1 < len(arguments) else None
    return None


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _fail(error: BaseException, code: int) -> int:
    if os.environ.get("RETROGRAD_TRACEBACK"):
        raise error
    print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
    return code
