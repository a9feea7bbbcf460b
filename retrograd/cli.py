"""The command line: `retrograd COMMAND RUN …`.

Nothing heavy is imported until a command runs, so that --help answers at once. Exit codes: 0 done, 2 the user can mend
it, 1 the machine failed and the same command resumes, 143 it was asked to end and the same command goes on; of
`verify`, 1 says that a check failed, and with --strict 3 that the run is certified only partly.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import importlib
import io
import os
import sys
import threading
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from retrograd.runs.errors import StoppedError, stoppable
from retrograd.settings.attack import AttackConfig
from retrograd.settings.commands import (
    BankConfig,
    CompareConfig,
    EvaluateConfig,
    LabConfig,
    MetasmoothnessConfig,
    QueryRunConfig,
    ValidateConfig,
    VerifyConfig,
    perturbed,
)
from retrograd.settings.experiment import ExperimentConfig
from retrograd.settings.harden import HardenConfig
from retrograd.settings.plan import PLANNED, PlanConfig, PlanOf
from retrograd.settings.report import ReportConfig
from retrograd.settings.run import AttributedConfig, MagicConfig, queries_of, query_file, refuse_code, settings_from
from retrograd.settings.select import MaskConfig, SelectConfig
from retrograd.settings.submit import SUBMITTED, SubmitConfig, SubmitOf
from retrograd.settings.train import RunConfig, TrainRunConfig
from retrograd.settings.unlearn import ChainConfig, UnlearnConfig, refuse_method, with_objective

__all__ = ["main", "run"]


class _Command(NamedTuple):
    config: Any
    does: str
    module: str  # under retrograd; the function has the command's name
    place: str = "RUN"


_COMMANDS = {
    "train": _Command(TrainRunConfig, "a recipe without attribution; leaves a Hugging Face folder", "commands.train"),
    "magic": _Command(
        MagicConfig, "train, query, reverse: an exact score for every training example or token", "commands.magic"
    ),
    "query": _Command(QueryRunConfig, "ask a trained run further questions, without training again", "commands.query"),
    "plan": _Command(
        PlanConfig,
        "a command's arguments: steps, states, replays, memory, disk and time beforehand",
        "commands.plan",
        "COMMAND",
    ),
    "validate": _Command(
        ValidateConfig, "retrain without random subsets: do the scores predict what happens?", "trust.validate"
    ),
    "bank": _Command(BankConfig, "what a bank of retrainings holds, and what is missing from it", "trust.holdings"),
    "verify": _Command(VerifyConfig, "an independent certificate that a run's scores are exact", "trust.verify"),
    "metasmoothness": _Command(
        MetasmoothnessConfig,
        "how smooth training is, and of a run what LDS to expect, from six removals",
        "trust.metasmoothness",
    ),
    "lab": _Command(
        LabConfig, "build a fictional world where everything is known, with models to unlearn", "lab.build", "DIR"
    ),
    "evaluate": _Command(
        EvaluateConfig, "accuracy, perplexity and a verdict: which models are broken?", "evaluate.evaluate", "MODEL…"
    ),
    "select": _Command(
        SelectConfig, "from scores to weights or documents, with matched controls", "commands.select", "OUT"
    ),
    "mask": _Command(
        MaskConfig, "token weights by keywords, or by hidden states like theirs, without scores", "commands.mask", "OUT"
    ),
    "unlearn": _Command(
        UnlearnConfig, "RUN: forget some documents, keep others; with a verdict or scores", "commands.unlearn", "METHOD"
    ),
    "experiment": _Command(
        ExperimentConfig, "OUT: methods × weightings × seeds at one utility, by workers", "commands.experiment", "FILE"
    ),
    "attack": _Command(
        AttackConfig, "does what was unlearned come back, and was it there all the time?", "commands.attack", "OUT"
    ),
    "submit": _Command(
        SubmitConfig, "hand a command to SLURM: put back into the queue until it is done", "commands.submit", "COMMAND"
    ),
    "report": _Command(
        ReportConfig, "one offline page about runs, evaluations, experiments and attacks", "commands.report", "PATH…"
    ),
    "harden": _Command(
        HardenConfig, "weights of forget documents, learnt through unlearning and attack", "commands.harden", "OUT"
    ),
    "compare": _Command(
        CompareConfig, "models under attack side by side: table, pairs, fronts, ranks", "commands.compare", "PATH…"
    ),
}

_LISTED = "\n".join(f"  {name:<14} {command.place:<6}  {command.does}" for name, command in _COMMANDS.items())
_USAGE = f"""usage: retrograd COMMAND [OPTIONS]

Which training data made this model do that? Exact training-data attribution by metagradients (MAGIC).

commands:
{_LISTED}

retrograd COMMAND --help shows a command's options.
"""


def run() -> None:
    """The command as a process of its own, which does not look for garbage among a million objects of its libraries.

    That takes 1 s of loading them and 1 s of leaving.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    sys.exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    name = arguments[0]
    if name not in _COMMANDS:
        return _fail(ValueError(f"unknown command {name!r}; the commands are: {', '.join(_COMMANDS)}"), 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # or torch warns of every second that one process waits for another
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large tensors in huge pages; read when it is loaded
    warnings.showwarning = _warn
    try:
        config = _parse(name, arguments[1:])
        command = getattr(importlib.import_module(f"retrograd.{_COMMANDS[name].module}"), name)
        main_thread = threading.current_thread() is threading.main_thread()  # the only one that gets signals
        stopping = stoppable() if name in _STOPPABLE and main_thread else contextlib.nullcontext()
        with _ranks(name, config), stopping:
            code = command(config)
        _report(name, config)
        return code if isinstance(code, int) else 0
    except ValueError as error:
        return _fail(error, 2)
    except StoppedError:
        print("stopped at a durable point; the same command goes on", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes", file=sys.stderr)
        return 130
    except (OSError, ArithmeticError, RuntimeError, MemoryError) as error:
        return _fail(error, 1)


_STOPPABLE = ("train", "magic", "unlearn", "validate")  # an experiment's workers see to it themselves

_SHARED = ("train", "magic", "unlearn", "query")  # commands whose steps the processes of a job share
_DEALT = ("validate", "evaluate", "attack")  # commands of which each process takes a part of its own
_EITHER = ("attack",)  # those of them that may share steps instead


@contextlib.contextmanager
def _ranks(name: str, config: Any) -> Iterator[None]:
    """The processes of a torchrun job, together for one command. The first alone says what there is to say."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    shares = name in _SHARED or (name in _EITHER and config.parallel != "auto")
    if world == 1 or (name in _DEALT and not shares):
        yield
        return
    if not shares:
        raise ValueError(
            f"retrograd {name} is one process, and this is one of {world}: start it without torchrun. Several share "
            f"{', '.join((*_SHARED, *_DEALT[:-1]))} and {_DEALT[-1]}."
        )
    from retrograd.parallel.group import joined

    with joined(config.patience) as group:
        if group.rank == 0:
            yield
            return
        warnings.showwarning = lambda *_, **__: None
        with contextlib.redirect_stdout(io.StringIO()):
            yield


# the setting that names the folder; whether the command writes the page, or only one that is there anew
_REPORTED = {
    "train": ("run", True), "magic": ("run", True), "unlearn": ("run", True), "validate": ("run", True),
    "evaluate": ("output", True), "experiment": ("out", True), "attack": ("out", True), "harden": ("out", True),
    "query": ("run", False), "verify": ("run", False), "metasmoothness": ("run", False),
}  # fmt: skip


def _report(name: str, config: Any) -> None:
    """The page about what a command has left, as its last line; a page that cannot be made is no failed command."""
    if name not in _REPORTED or int(os.environ.get("RANK", 0)):
        return
    setting, always = _REPORTED[name]
    folder = Path(getattr(config, setting))
    if not always and not (folder / "report.html").exists():
        return
    from retrograd.report.report import report

    try:
        report(ReportConfig((folder,)))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"warning: no report was written: {error}", file=sys.stderr)


def _parse(name: str, arguments: list[str]) -> Any:
    """Flags over the defaults of --config."""
    kind = _COMMANDS[name].config
    if name == "unlearn":
        return _parse_unlearn(arguments)
    if name == "plan":
        return _parse_plan(arguments)
    if name == "submit":
        return _parse_submit(arguments)
    options: dict[str, Any] = {}
    file: str | None = None
    if issubclass(kind, RunConfig):
        file = _value_of("--config", arguments)
        if name == "metasmoothness" and not file and arguments and (Path(arguments[0]) / "run_config.yaml").exists():
            file = str(Path(arguments[0]) / "run_config.yaml")
            kind = _perturbed(Path(arguments[0]), arguments)
        if file:
            options["default"] = settings_from(kind, Path(file))
    arguments = _spell_out_switches(arguments, kind)
    flags = (tyro.conf.FlagConversionOff,)
    config = tyro.cli(kind, prog=f"retrograd {name}", args=arguments, config=flags, **options)
    return _with_queries(config, arguments, file, options) if isinstance(config, AttributedConfig) else config


def _perturbed(run: Path, arguments: list[str]) -> Any:
    """The configuration of `metasmoothness` for a run: that of an unlearning has its method's settings."""
    from retrograd.runs.kinds import read_settings

    config = read_settings(run)
    if not isinstance(config, UnlearnConfig):
        return MetasmoothnessConfig
    from retrograd.unlearn.methods import find_method

    refuse_method(config.method, run / "run_config.yaml", "__trust_code" in map(_plain_name, arguments))
    if isinstance(config, ChainConfig):
        return perturbed(ChainConfig)
    return perturbed(with_objective(find_method(config.method).defaults))


def _with_queries(config: Any, arguments: list[str], file: str | None, options: dict[str, Any]) -> Any:
    """The configuration with the queries of its --query_file; code that this or --config names has to be trusted."""
    trusted = config.trust_code and "__trust_code" in map(_plain_name, arguments)  # no file can say so of itself
    if config.query_file is not None:
        more = query_file(config.query_file)
        refuse_code(more, config.query_file, trusted)
        config = dataclasses.replace(config, queries={**config.queries, **more})
    if file:
        named = queries_of(options["default"])
        if "__query.function" in map(_plain_name, arguments):
            named.pop("query", None)
        refuse_code(named, Path(file), trusted)
    return config


def _parse_plan(arguments: list[str]) -> PlanOf:
    """The command's own arguments, with those of the plan anywhere among them."""
    known = next((word for word in arguments if word in PLANNED), None)
    if known is not None and {"-h", "--help"} & set(arguments):
        return PlanOf(PlanConfig(), known, _parse(known, ["--help"]))
    given = _spell_out_switches(arguments, PlanConfig)
    flags = (tyro.conf.FlagConversionOff,)
    plan, rest = tyro.cli(PlanConfig, prog="retrograd plan", args=given, config=flags, return_unknown_args=True)
    if not rest or rest[0] not in PLANNED:
        got = f"and this one is {rest[0]!r}" if rest else "and there is none"
        raise ValueError(f"retrograd plan takes a command, one of {', '.join(PLANNED)}, {got}")
    return PlanOf(plan, rest[0], _parse(rest[0], rest[1:]))


def _parse_submit(arguments: list[str]) -> SubmitOf:
    """The job's options, then a command as it would be typed, which is parsed here so that a job never fails of it."""
    place = _command_place(arguments)
    if place == len(arguments) and not {"-h", "--help"} & set(arguments):
        got = f"and none is in {' '.join(arguments)!r}" if arguments else "and there is none"
        raise ValueError(
            f"retrograd submit takes a command after its own options, one of {', '.join(SUBMITTED)}, {got}"
        )
    given = _spell_out_switches(arguments[:place], SubmitConfig)
    job = tyro.cli(SubmitConfig, prog="retrograd submit", args=given, config=(tyro.conf.FlagConversionOff,))
    try:
        config = _parse(arguments[place], arguments[place + 1 :])
    except SystemExit as error:
        raise ValueError("the command after the job's options cannot be parsed, see above") from error
    return SubmitOf(job, arguments[place], tuple(arguments[place + 1 :]), config)


def _command_place(arguments: list[str]) -> int:
    """Where the command stands after a job's options, whose values may be spelled like one; the end if nowhere."""
    hints = typing.get_type_hints(SubmitConfig)
    valued = {f"__{name}" for name, hint in hints.items() if hint is not bool and typing.get_origin(hint) is not tuple}
    place = 0
    while place < len(arguments) and arguments[place] not in SUBMITTED:
        place += 2 if _plain_name(arguments[place]) in valued and "=" not in arguments[place] else 1
    return min(place, len(arguments))


def _parse_unlearn(arguments: list[str]) -> UnlearnConfig:
    """METHOD comes first: its settings are flags of their own."""
    flags: Any = {"config": (tyro.conf.FlagConversionOff,)}
    options: dict[str, Any] = {}
    if not arguments or arguments[0].startswith("-"):
        if not {"-h", "--help"} & set(arguments):
            raise ValueError("retrograd unlearn begins with a METHOD, then the folder of the run; --help lists them")
        return tyro.cli(UnlearnConfig, prog="retrograd unlearn METHOD", args=["--help"], **flags)
    from retrograd.unlearn.methods import find_method

    method, *arguments = arguments
    chosen = find_method(method)
    kind = with_objective(chosen.defaults, adapters=chosen.adapters)
    arguments = _spell_out_switches(arguments, kind)
    if file := _value_of("--config", arguments):
        options["default"] = settings_from(kind, Path(file))
    config = tyro.cli(kind, prog=f"retrograd unlearn {method}", args=arguments, **flags, **options)
    asked: UnlearnConfig = _with_queries(config, arguments, file, options)
    return dataclasses.replace(asked, method=method)


def _spell_out_switches(arguments: list[str], kind: Any) -> list[str]:
    """--overwrite → --overwrite True, and true/false in any case after a switch."""
    switches, spelled = _switches(kind), []
    for place, argument in enumerate(arguments):
        previous = arguments[place - 1].replace("-", "_") if place else ""
        is_value = previous in switches and argument.lower() in ("true", "false")
        spelled.append(argument.capitalize() if is_value else argument)
        following = arguments[place + 1].lower() if place + 1 < len(arguments) else ""
        if argument.replace("-", "_") in switches and following not in ("true", "false"):
            spelled.append("True")
    return spelled


def _switches(kind: Any, prefix: str = "__") -> set[str]:
    """Names of the boolean settings, every dash an underscore."""
    hints = typing.get_type_hints(kind)
    switches = {prefix + name for name, hint in hints.items() if hint is bool}
    nested = [(name, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)]
    return switches.union(*(_switches(hint, f"{prefix}{name}.") for name, hint in nested))


def _plain_name(argument: str) -> str:
    """The name of a setting, every dash an underscore."""
    return argument.partition("=")[0].replace("-", "_")


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            return value if equals else arguments[place + 1] if place + 1 < len(arguments) else None
    return None


def _warn(message: Warning | str, category: type[Warning] = UserWarning, *_: Any, **__: Any) -> None:
    if not issubclass(category, (FutureWarning, DeprecationWarning)):  # libraries to their programmers
        print(f"warning: {message}", file=sys.stderr)


def _fail(error: BaseException, code: int) -> int:
    if os.environ.get("RETROGRAD_TRACEBACK"):
        raise error
    print(f"error: {str(error) or type(error).__name__}", file=sys.stderr)
    return code
