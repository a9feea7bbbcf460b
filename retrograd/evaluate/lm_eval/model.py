"""lm-evaluation-harness on our models: its tasks, prompts, few-shot examples and metrics, our loader and arithmetic.

The model is the one of `load_causal_lm`, with the attention that everything here uses. Random numbers begin, for each
task, as they do on lm_eval's command line, so a task gives the same whatever was asked before it. Nothing is cached.
"""

from __future__ import annotations

import difflib
import logging
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import nn

from retrograd.lm.layout import twice_differentiable
from retrograd.lm.model import CausalLM

__all__ = ["HarnessTasks", "ask_harness", "find_harness", "harness_version", "refuse_task_code"]


_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class HarnessTasks:
    """lm-eval's task manager, and its name or file for each task, tag or group that was asked for.

    specs: By a name that can name a file.
    """

    manager: Any
    specs: dict[str, str]

    def local_file(self, name: str) -> Path | None:
        """The YAML file of a task that does not come with lm-eval."""
        import lm_eval

        spec = self.specs[name]
        entry = self.manager.task_index.get(spec)
        path = Path(spec) if entry is None else entry.yaml_path
        return None if path is None or Path(lm_eval.__file__).parent in Path(path).parents else Path(path)


def harness_version() -> str:
    """Version of the lm-eval that is installed.

    Raises:
        ValueError: If none is.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(
            f"--backend lm-eval needs lm-evaluation-harness, which cannot be imported ({error}): "
            'pip install "retrograd[eval]"'
        ) from error
    return str(lm_eval.__version__)


def find_harness(asked: Sequence[str], include_path: Path | None = None) -> HarnessTasks:
    """Look tasks up; nothing is downloaded yet.

    Args:
        asked: lm-eval's names of tasks, tags and groups, and YAML files of tasks.
        include_path: Folder of further YAML files; its names go before lm-eval's own.
    Raises:
        ValueError: If lm-eval is not installed, or a task is not found or has no name of its own.
    """
    harness_version()
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include_path {include_path} is no folder; give one with YAML files of tasks")
    if not asked:
        raise ValueError("--tasks names no task; give lm-eval's names, as a,b,c, or YAML files")
    manager = _manager(asked, include_path)
    specs: dict[str, str] = {}
    for spec in dict.fromkeys(asked):
        name = re.sub(r"[^\w.-]", "-", _name(manager, spec)).lstrip(".-")
        if not name or name in specs:
            raise ValueError(f"--tasks: {spec!r} and {specs.get(name)!r} would have the same file {name!r}; drop one")
        specs[name] = spec
    return HarnessTasks(manager, specs)


def refuse_task_code(
    asked: Sequence[Path], folder: Path | None, trusted: bool, own: tuple[str, str] | None = None
) -> None:
    """Refuse Python functions that YAML files of tasks name, unless they are trusted; lm-eval's own files are.

    Args:
        asked: What may be such files.
        folder: With further ones, and what they include.
        own: A function of ours as such files name it, and the text of its module, which may run where it is unchanged.
    Raises:
        ValueError: With the first function and its file.
    """
    waiting = [path for path in asked if path.is_file()]
    waiting += sorted(path for path in folder.rglob("*") if path.is_file()) if folder is not None else []
    seen: set[Path] = set()
    while waiting and not trusted:
        path = waiting.pop(0).resolve()
        if path in seen or path.suffix not in _YAML:
            continue
        seen.add(path)
        text = path.read_text(encoding="utf8", errors="replace") if path.is_file() else ""
        for name in re.findall(r"!function\s*(\S*)", text):
            module = path.parent / f"{name.partition('.')[0]}.py"
            if own is None or name != own[0] or module.read_text(encoding="utf8") != own[1]:
                raise ValueError(
                    f"{path} names Python code: lm-eval would run {name} of {module}, with your rights. Read it; then "
                    "give --trust_code to run it"
                )
        waiting += [path.parent / included for included in re.findall(r"include['\"]?\s*:\s*['\"]?([^\s'\",}]+)", text)]


def ask_harness(
    harness: HarnessTasks,
    name: str,
    lm: CausalLM,
    tokenizer: Any,
    *,
    shots: int | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """What lm_eval.evaluator.evaluate returns for one name, a record of every question included.

    With it goes `not_finite`, the number of forward passes whose last logits were not: nothing else shows it in texts
    that were generated.

    Args:
        shots: Examples before each question, where the task does not fix their number at 0; None for the task's own.
        limit: The first questions of each task only.
        batch_size: Rows read at once.
    Raises:
        ValueError: If lm-eval fails, whatever the reason: the data, the network, a package the task needs.
    """
    from lm_eval.evaluator import evaluate

    dtype = next(iter(lm.params.values())).dtype
    try:
        with _as_begun(), redirect_stdout(sys.stderr), torch.no_grad(), twice_differentiable(dtype):
            loaded = harness.manager.load([harness.specs[name]])
            for task in loaded["tasks"].values():
                _set_shots(task, shots)
            with _watched(lm.module) as bad:
                results = evaluate(_model(lm, tokenizer, batch_size), loaded, limit=limit, log_samples=True)
            return {**results, "not_finite": int(sum(bad))}
    except (RuntimeError, MemoryError):
        raise  # the machine's
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"lm-eval cannot do {harness.specs[name]}: {reason}") from error


class _Entry(NamedTuple):
    """A task, tag or group; members: names of what a tag or group holds."""

    name: str
    members: list[str]


def _manager(asked: Sequence[str], include_path: Path | None) -> Any:
    """Reading lm-eval's own 15,000 files takes seconds; it is left out where all that is asked for is the user's."""
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    return manager if all(_complete(manager, spec) for spec in asked) else TaskManager(include_path=folder)


def _complete(manager: Any, spec: str) -> bool:
    entry = _find(manager, spec)
    return entry is not None and all(_complete(manager, member) for member in entry.members)


def _find(manager: Any, spec: str) -> _Entry | None:
    """None if lm-eval knows no such name, and it is no file."""
    entry = manager.task_index.get(spec)
    if entry is not None:
        return _Entry(str(entry.name), sorted(entry.tags) if entry.kind.name == "TAG" else _members(entry.cfg or {}))
    if not spec.endswith((".yaml", ".yml")):
        return None
    try:
        settings = yaml.load(Path(spec).read_text(encoding="utf8"), _Untagged)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--tasks: cannot read {spec}: {error}") from error
    names = [settings.get(key) for key in ("group", "task")] if isinstance(settings, dict) else []
    name = next((name for name in names if isinstance(name, str)), None)
    if name is None:
        raise ValueError(f"--tasks: {spec} is no task of lm-eval; it has to say `task: NAME` or `group: NAME`")
    return _Entry(name, _members(settings))


def _members(settings: dict[str, Any]) -> list[str]:
    listed = settings.get("task")
    items = listed if isinstance(listed, list) else []
    return [str(item.get("task", item.get("group")) if isinstance(item, dict) else item) for item in items]


class _Untagged(yaml.SafeLoader):
    """Takes what lm-eval's files have beyond YAML, such as !function, for nothing."""


_Untagged.add_constructor(None, lambda loader, node: None)


def _name(manager: Any, spec: str) -> str:
    entry = _find(manager, spec)
    if entry is not None:
        return entry.name
    near = difflib.get_close_matches(spec, manager.all_tasks, 4, 0.5)
    hint = f" Near it: {', '.join(near)}." if near else ""
    raise ValueError(f"--tasks: lm-eval has no task, tag or group {spec!r}.{hint} Tasks of yours: --include_path DIR")


def _model(lm: CausalLM, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that the model was loaded by somebody else: by us
    try:
        return HFLM(pretrained=lm.module, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        log.setLevel(level)


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Gives, for every forward pass inside, whether a last logit is not finite."""
    bad: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _, __, out: bad.append(~torch.isfinite(out.logits[:, -1]).all()))
    try:
        yield bad
    finally:
        hook.remove()


def _set_shots(task: Any, shots: int | None) -> None:
    """As simple_evaluate does: a task that says 0 stays at 0."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def _as_begun() -> Iterator[None]:
    """Random numbers as lm_eval's command line begins with them; afterwards they are what they were."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
