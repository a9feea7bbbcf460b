"""Settings from text: YAML files into dataclasses, sizes into bytes. No heavy imports here."""

from __future__ import annotations

import dataclasses
import re
import string
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

__all__ = ["build", "by_name", "dump_yaml", "fill", "load_yaml", "named", "parse_size", "read_named", "read_yaml"]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_WORD = re.compile(r"\$\{(\w+)\}")


# libyaml's, where PyYAML was built with it, which take a sixth of the time
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def load_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    >>> load_yaml("lr: 0.1")
    {'lr': 0.1}
    """
    return yaml.load(text, _Loader)


def dump_yaml(values: Any, **options: Any) -> str:
    """Plain values as YAML, in their own order.

    >>> dump_yaml({"lr": 0.1})
    'lr: 0.1\\n'
    """
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options)
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, by name.

    Raises:
        ValueError: If the file is missing, not YAML, or no mapping.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the configuration {path} is a {type(values).__name__}; it has to be settings by name")
    return values


def by_name(value: Any, where: str) -> dict[str, Any]:
    """An entry of a file that holds settings by name; nothing is none of them.

    Raises:
        ValueError: If it holds something else.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; it has to be settings by name, such as {{first: 1, second: 2}}")
    return dict(value or {})


def parse_size(text: str) -> int:
    """Bytes of a size such as "8GiB", "500MB" or "1024".

    >>> parse_size("1.5KiB")
    1536
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"size {text!r} is not understood; write a number with a unit, such as 8GiB, 500MB or 0")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def named(text: str) -> tuple[str, Any]:
    """Name and value of --names NAME=VALUE; what stands in braces is settings by name, as in the file.

    >>> named("attack={lab: runs/lab}")
    ('attack', {'lab': 'runs/lab'})
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--names {text}: write NAME=VALUE")
    if not value.startswith("{"):
        return name, value
    try:
        return name, load_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--names {text}: the settings in braces cannot be read as YAML: {error}") from error


def read_named(path: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """As `read_yaml`, with the words of its `names` put where ${word} stands, or others given as "word=value".

    Raises:
        ValueError: As `read_yaml`, and if a word is not known.
    """
    values = read_yaml(path)
    known = {**by_name(values.pop("names", None), f"{path}: names"), **dict(named(text) for text in names)}
    filled: dict[str, Any] = fill(values, known, str(path))
    return filled


def fill(value: Any, names: Mapping[str, Any], where: str) -> Any:
    """A value of a file with its ${words} replaced.

    Raises:
        ValueError: If it has a word that is no name.
    """
    if isinstance(value, dict):
        return {key: fill(inner, names, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, names, where) for inner in value]
    if not isinstance(value, str):
        return value
    word = _WORD.fullmatch(value)
    if word is not None and word[1] in names:  # the whole of it: a number stays one, and nothing is none
        return None if names[word[1]] == "" else names[word[1]]
    try:
        return string.Template(value).substitute(names)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {value!r} has a word that `names` does not have: {error}") from error


def build(kind: Any, values: dict[str, Any], where: str) -> Any:
    """A settings dataclass from the values of a YAML file.

    Raises:
        ValueError: If a name is no setting, or a value is not of its setting's type.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where} names settings that do not exist: {', '.join(unknown)}. Known: {', '.join(hints)}.")
    return kind(**{name: _convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, by_name(value, where), where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _convert(options[0], value, where)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{where} is {value!r}; it has to be one of {', '.join(map(str, options))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(options[0], value, where)
    if origin is tuple:
        return tuple(_convert(options[0], inner, where) for inner in _listed(value, where))
    if origin is dict:
        return {
            str(name): _convert(options[1], inner, f"{where}: {name}") for name, inner in by_name(value, where).items()
        }
    try:
        if (hint is bool) != isinstance(value, bool) or isinstance(value, (dict, list)):
            raise TypeError
        if hint is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return hint(value)  # YAML reads 1e-4 as a string
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is {value!r}; it has to be of type {hint.__name__}") from error


def _listed(value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        raise ValueError(f"{where} is {value!r}; it has to be a list")
    return tuple(value)
