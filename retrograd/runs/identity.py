"""What a computation is, as text: the same text for the same function in every process, and never an address.

A run's hash has to cover all that its result depends on: settings, tensors, and code. Code of one's own is told by what
Python compiled it to, with its defaults, the values it closes over and the globals it reads, so that a comment or
a name changes nothing; a library's by its qualified name and what it closes over, which is where a foreign optimizer
keeps its settings. Modules are told by their classes, settings, hooks, `config` and tensors.

What cannot be seen: the version of a library, and what code reads by other ways (a file, a registry, `getattr`).
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import enum
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrograd.core import tree
from retrograd.lm.model import trainable

__all__ = ["EDITION", "architecture", "canonical", "fingerprint", "held_tensors", "identify", "told_apart"]

EDITION = "3"
"""Of what an identity covers; an identity begins with it, so that runs of before are told from runs of another kind."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_TEXTS = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, range, slice, np.dtype)
_SITES = {"site-packages", "dist-packages"}
_SHORT = 64  # characters; longer texts are hashed where they are written
_INTERNAL = frozenset(vars(nn.Module()))
_NOT_THE_FUNCTION = {
    "name_or_path", "_name_or_path", "base_model_name_or_path", "transformers_version", "warnings_issued",
    "gradient_checkpointing", "architectures", "dtype", "torch_dtype", "_is_hf_initialized",
}  # fmt: skip
"""What a module or configuration is called and how it is stored; the tensors have a dtype of their own."""


def fingerprint(*parts: Any) -> str:
    """Hash of values, functions and modules by what they are, 16 hex digits.

    >>> fingerprint(1, lambda x: 2 * x) == fingerprint(1, lambda x: 2 * x) != fingerprint(1, lambda x: 3 * x)
    True
    """
    return hashlib.sha256("\n".join(map(canonical, parts)).encode()).hexdigest()[:16]


def identify(*parts: Any) -> str:
    """The identity of a run that is made of these parts: their fingerprint, after the edition of what it covers."""
    return f"{EDITION}-{fingerprint(*parts)}"


def canonical(value: Any) -> str:
    """A text that is equal for values that compute the same, as far as that can be told; see the module."""
    return _Writer().write(value)


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a module computes with besides its trainable parameters: frozen ones and buffers, by name.

    Buffers that a library makes of its configuration and does not save are left out: the configuration is told.
    """
    readers = trainable(module)[1]
    held = {name: x for name, x in module.named_parameters(remove_duplicate=False) if name not in readers}
    for place, part in module.named_modules():
        made = part._non_persistent_buffers_set if _is_library(type(part)) else set()
        own = part.named_buffers(prefix=place, recurse=False, remove_duplicate=False)
        held |= {name: x for name, x in own if name.rpartition(".")[2] not in made}
    return {name: x.detach() for name, x in held.items()}


def architecture(module: nn.Module) -> str:
    """Hash of a module as a function of its tensors: classes, settings, hooks and `config`."""
    return fingerprint(_Writer().parts(module))


def told_apart(writer: str | None, expected: str) -> str:
    """Why a file of identity `writer` is no file of the run `expected`, in words, with what to do."""
    if writer and not writer.startswith(f"{EDITION}-"):
        return (
            f"was written by an earlier version of retrograd (run {writer}), whose hash of a run covered less "
            "than now (its arithmetic; before that also frozen weights, buffers and code), so that it cannot be told "
            f"whether it belongs to this run, {expected}. Go on with the version it was begun with, or start afresh in "
            "another folder"
        )
    return (
        f"was written by another run ({writer}; this run is {expected}): model, frozen weights, data, recipe or loss "
        "differ. Put back what has changed, or use another folder"
    )


class _Writer:
    """One text; objects that contain themselves are told by how far up they are."""

    def __init__(self) -> None:
        self._above: list[int] = []
        self._known: dict[int, str] = {}
        self._alive: list[Any] = []  # or an address could come back as another object's

    def write(self, value: Any) -> str:
        if isinstance(value, enum.Enum):
            return f"{_name(type(value))}.{value.name}"
        if type(value) in _PLAIN or isinstance(value, _TEXTS):
            return repr(value)
        if id(value) in self._above:
            return f"<{len(self._above) - self._above.index(id(value))} up>"
        if id(value) not in self._known:
            self._above.append(id(value))
            text = self._described(value)
            self._above.pop()
            self._alive.append(value)
            self._known[id(value)] = text if len(text) <= _SHORT else hashlib.sha256(text.encode()).hexdigest()
        return self._known[id(value)]

    def parts(self, module: nn.Module) -> list[Any]:
        """A module's submodules by name, each with what it is besides its tensors and parts."""
        return [(name, self.write(type(part)), self._settings(part)) for name, part in module.named_modules()]

    def _described(self, value: Any) -> str:
        for kinds, describe in _KINDS:
            if isinstance(value, kinds):
                return describe(self, value)
        if _is_library(type(value)) and callable(getattr(value, "to_dict", None)):
            return self._config(value)
        if dataclasses.is_dataclass(value):
            return self._named(
                type(value), {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if _told(f, value)}
            )
        if callable(value) and not hasattr(value, "__dict__"):
            return f"{_name(type(value))} {_name(value)}"
        if _is_library(type(value)):
            return self._named(type(value), {k: v for k, v in _fields(value).items() if _is_plain(v)})
        return self._named(type(value), _fields(value))

    def _named(self, kind: type, fields: Mapping[str, Any]) -> str:
        kept = {name: value for name, value in fields.items() if name not in _NOT_THE_FUNCTION}
        return f"{self.write(kind)}{self._mapping(kept)}"

    def _mapping(self, value: Mapping[Any, Any]) -> str:
        return "{" + ", ".join(sorted(f"{self.write(k)}: {self.write(v)}" for k, v in value.items())) + "}"

    def _sequence(self, value: Any) -> str:
        kind = "" if type(value) in (tuple, list) else _name(type(value))
        return f"{kind}[{', '.join(self.write(x) for x in value)}]"

    def _set(self, value: Set[Any]) -> str:
        return "{" + ", ".join(sorted(self.write(x) for x in value)) + "}"

    def _tensor(self, value: Tensor) -> str:
        bits = "" if value.is_meta else tree.digest(value.detach().to_dense() if value.is_sparse else value.detach())
        return f"tensor {value.dtype} {tuple(value.shape)} {bits}"

    def _array(self, value: np.ndarray) -> str:
        bits = self._sequence(value.tolist()) if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()
        return f"array {value.dtype} {value.shape} {bits}"

    def _module(self, value: nn.Module) -> str:
        tensors = dict(value.named_parameters(remove_duplicate=False)) | dict(value.named_buffers())
        return self._sequence([self.parts(value), {name: x.detach() for name, x in tensors.items()}])

    def _settings(self, part: nn.Module) -> dict[str, Any]:
        own = {name: x for name, x in vars(part).items() if name not in _INTERNAL and name not in _NOT_THE_FUNCTION}
        if _is_library(type(part)):
            own = {
                name: x for name, x in own.items()
                if name[0] != "_" and (_is_plain(x) or name == "config" or isinstance(x, (Tensor, types.FunctionType)))
            }  # fmt: skip
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        return {**own, "settings": part.extra_repr() if _is_library(type(part)) else "", "hooks": hooks}

    def _config(self, value: Any) -> str:
        kinds = {name: getattr(value, name, None) for name in ("_attn_implementation", "_experts_implementation")}
        return self._named(type(value), {**_scrubbed(value.to_dict()), **kinds})

    def _partial(self, value: functools.partial[Any]) -> str:
        return self._sequence(["partial", value.func, value.args, value.keywords])

    def _method(self, value: types.MethodType) -> str:
        return self._sequence(["method", value.__func__, value.__self__])

    def _builtin(self, value: types.BuiltinFunctionType) -> str:
        owner = getattr(value, "__self__", None)
        return self._sequence([_name(value), None if isinstance(owner, types.ModuleType) else owner])

    def _function(self, value: types.FunctionType) -> str:
        closed = dict(zip(value.__code__.co_freevars, map(_content, value.__closure__ or ())))
        if _is_library(value):
            return self._sequence([_name(value), closed])
        read = dict(_read(value.__code__, value.__globals__, closed))
        code = self._code(value.__code__, value.__doc__)
        return self._sequence([code, value.__defaults__, value.__kwdefaults__, closed, read])

    def _code(self, code: types.CodeType, documentation: str | None = None) -> str:
        constants = [
            self._code(x) if isinstance(x, types.CodeType) else self.write(x)
            for x in code.co_consts
            if not (isinstance(x, str) and x == documentation)
        ]
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return self._sequence([code.co_code, code.co_names, code.co_freevars, shape, constants])

    def _class(self, value: type) -> str:
        if _is_library(value):
            return _name(value)
        members = {
            name: getattr(x, "__func__", x) if not isinstance(x, property) else [x.fget, x.fset]
            for name, x in vars(value).items()
            if isinstance(x, (types.FunctionType, staticmethod, classmethod, property))
            or (not name.startswith("__") and _is_plain(x))
        }
        return self._sequence([value.__name__, value.__bases__, members])


_KINDS: list[tuple[Any, Callable[[_Writer, Any], str]]] = [
    (Tensor, _Writer._tensor),
    (np.ndarray, _Writer._array),
    (np.generic, lambda writer, value: repr(value)),
    (Path, lambda writer, value: str(value)),
    (type, _Writer._class),
    (types.ModuleType, lambda writer, value: f"module {value.__name__}"),
    (nn.Module, _Writer._module),
    (functools.partial, _Writer._partial),
    (types.MethodType, _Writer._method),
    (types.FunctionType, _Writer._function),
    ((types.BuiltinFunctionType, types.MethodWrapperType), _Writer._builtin),
    ((tuple, list, collections.deque), _Writer._sequence),
    (Mapping, _Writer._mapping),
    (Set, _Writer._set),
    (torch.Generator, lambda writer, value: f"generator {value.initial_seed()}"),
]


def _told(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field says something: one that came `later` does not at its default, for earlier runs had none."""
    return not field.metadata.get("later") or getattr(value, field.name) != field.default


def _is_plain(value: Any) -> bool:
    """Whether it is numbers and texts through and through."""
    if isinstance(value, Mapping):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (tuple, list, Set)):
        return all(_is_plain(x) for x in value)
    return isinstance(value, (*_PLAIN, *_TEXTS, enum.Enum))


def _fields(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _scrubbed(values: Any) -> Any:
    """A configuration without what it is called, wherever in it."""
    if isinstance(values, Mapping):
        return {name: _scrubbed(value) for name, value in values.items() if name not in _NOT_THE_FUNCTION}
    return [_scrubbed(value) for value in values] if isinstance(values, (list, tuple)) else values


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: a function that names itself while it is made
        return None


def _read(code: types.CodeType, outer: Mapping[str, Any], closed: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What code reads of globals and closures, also through modules: `helpers.loss` is that function."""
    path, value = "", None
    for instruction in dis.get_instructions(code):
        names = {"LOAD_GLOBAL": outer, "LOAD_NAME": outer, "LOAD_DEREF": closed}.get(instruction.opname, {})
        if instruction.argval in names:
            path, value = instruction.argval, names[instruction.argval]
            yield path, value
        elif path and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            path, value = f"{path}.{instruction.argval}", getattr(value, instruction.argval, None)
            yield path, value
        else:
            path = ""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _read(constant, outer, closed)


def _name(value: Any) -> str:
    """A qualified name; an address in it would be another one tomorrow."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__)
    return re.sub(r" at 0x[0-9a-f]+", "", f"{getattr(value, '__module__', None) or 'builtins'}.{name}")


def _is_library(value: Any) -> bool:
    return _installed((getattr(value, "__module__", None) or "builtins").partition(".")[0])


@functools.cache
def _installed(root: str) -> bool:
    """Whether a package is Python's, retrograd's or installed, and so told by its name."""
    if root == "__main__":
        return False
    if root in sys.stdlib_module_names or root in ("retrograd", "builtins"):
        return True
    module = sys.modules.get(root)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if file is None:
        return False
    place = Path(file).resolve()
    homes = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    # also another environment's, which this one takes its packages from
    return bool(_SITES & set(place.parts)) or any(place.is_relative_to(home) for home in homes)
