"""`retrograd metasmoothness`: three trainings at nearby data weights, one number, and what to change if it is low.

Of a finished run it also says what LDS to expect, by six retrainings without sets of documents: `trust.forecast`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from retrograd.core.optim import Params
from retrograd.core.sweep import Event
from retrograd.runs.files import write_json
from retrograd.runs.identity import fingerprint, identify
from retrograd.runs.kinds import assemble, check_settings
from retrograd.runs.lock import locked
from retrograd.runs.manifest import Manifest
from retrograd.runs.progress import counting
from retrograd.runs.run_folder import Opened
from retrograd.runs.session import train
from retrograd.runs.setup import Loaded
from retrograd.runs.states.budget import Replay
from retrograd.settings.commands import MetasmoothnessConfig
from retrograd.settings.run import TrainConfig
from retrograd.trust.forecast import Forecast, forecast
from retrograd.trust.smoothness import metasmoothness as smoothness
from retrograd.trust.smoothness import perturbed

__all__ = ["Smoothness", "metasmoothness"]

SMOOTH, FAIR = 0.98, 0.9
GOOD = 0.95  # expected LDS below which levers are told
RANKED = (0.75, 0.486, 0.907)  # how the number ranked LDS over the grid of bench/forecast.py: Spearman's, 95 % interval


class Smoothness(NamedTuple):
    """The number in [−1, 1], the verdict in words, and what would raise it.

    forecast: what LDS to expect; None where there are no scores yet.
    """

    value: float
    verdict: str
    levers: list[str]
    forecast: Forecast | None = None


def metasmoothness(config: MetasmoothnessConfig, console: Console | None = None) -> Smoothness:
    """Train at data weights 1, 1 + hv and 1 + 2hv; running again resumes, or answers from the file.

    For a finished run of these very settings also retrain without six sets, and forecast its LDS.

    Raises:
        ValueError: For anything the user can mend.
    """
    console = console or Console()
    check_settings(config)
    if not config.h > 0:
        raise ValueError(f"--h is {config.h}; it has to be above 0, such as 0.1")
    with locked(config.run):
        manifest, loaded = Manifest(config.run / "manifest.json"), assemble(config)
        measured = _smoothness(config, manifest, loaded)
        if manifest.done("scores") and manifest.values.get("identity") == loaded.identity:
            measured = measured._replace(forecast=forecast(Opened(config.run, config, manifest, loaded), console))
    console.print(f"Metasmoothness {measured.value:.3f}: {measured.verdict}")
    if measured.forecast is None:
        words = "no forecast without scores: attribute the run, and call this again. It retrains without six sets then."
    else:
        words = measured.forecast.told
    console.print(f"Forecast: {words}", highlight=False)
    likely = measured.forecast.expected if measured.forecast else None
    for lever in _levers(config.train) if measured.value < SMOOTH or (likely is not None and likely < GOOD) else ():
        console.print(f"  {lever}", highlight=False)
    return measured


def _smoothness(config: MetasmoothnessConfig, manifest: Manifest, loaded: Loaded) -> Smoothness:
    """From the file, or measured."""
    key = fingerprint(loaded.identity, config.h, config.noise_seed)[:8]
    folder = config.run / "metasmoothness"
    path = folder / f"{key}.json"
    if path.exists():
        value = json.loads(path.read_text(encoding="utf8"))["value"]
    else:
        finals = _finals(config, loaded, manifest, folder / key)
        value = smoothness(*(finals if loaded.after is None else map(loaded.after, finals)))
        judged = _judge(value, config.train)._asdict()
        del judged["forecast"]  # in a file of its own
        write_json(path, {**judged, "h": config.h, "seed": config.noise_seed})
        shutil.rmtree(folder / key, ignore_errors=True)
    return _judge(value, config.train)


def _finals(config: MetasmoothnessConfig, loaded: Loaded, manifest: Manifest, folder: Path) -> list[Params]:
    """Final parameters at the three data weights; those of a finished run are the first."""
    weights, finals = loaded.training.weights, []
    own = config.run / "checkpoints"
    same = manifest.values.get("identity") == loaded.identity
    if same and manifest.done("scores"):
        loaded.settle(own)
    reused = same and (own / "final.safetensors").exists()
    with counting("train", (2 if reused else 3) * len(loaded.stream), "steps") as tick:
        for k in range(3):
            shifted = perturbed(weights, k * config.h, config.noise_seed)
            identity = identify(loaded.identity, k * config.h, config.noise_seed)
            checkpoints = folder / str(k)
            if k == 0 and reused:
                checkpoints, identity = own, loaded.identity
            replay = Replay(plan="binomial", slots=1)
            finals.append(train(loaded, checkpoints, replay, _each(tick), weights=shifted, identity=identity).params)
    return finals


def _each(tick: Callable[[], None]) -> Callable[[Event], None]:
    return lambda event: tick()


def _judge(value: float, train: TrainConfig) -> Smoothness:
    words = "smooth" if value >= SMOOTH else "fairly smooth" if value >= FAIR else "rough"
    ranked, low, high = RANKED
    verdict = (
        f"{words} at nearby data weights. That is no forecast of leaving data out: over a grid of recipes the number "
        f"ranked LDS with {ranked:.2f} [{low:.2f}, {high:.2f}]."
    )
    return Smoothness(value, verdict, _levers(train) if value < SMOOTH else [])


def _levers(train: TrainConfig) -> list[str]:
    """What is known to make this recipe smoother, the strongest first."""
    adam = train.optimizer in ("adam", "adamw", "muon")
    possible = [
        (train.dropout, "Leave --train.dropout off."),
        (adam and train.eps_root < 1e-6, f"Raise --train.eps_root (now {train.eps_root:g}) to 1e-6."),
        (True, f"Lower --train.lr (now {train.lr:g}), or warm up (--train.warmup_ratio 0.1)."),
        (True, f"Raise --train.batch_size (now {train.batch_size})."),
        (True, f"Take fewer steps: fewer --train.epochs (now {train.epochs}), or attribute a late part of the run."),
        (train.optimizer != "muon", "Try --train.optimizer muon."),
    ]
    return [text for holds, text in possible if holds]
