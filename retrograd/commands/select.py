"""`retrograd select`: from one or two score sets to token weights or documents, with matched controls."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from retrograd.core.optim import Params
from retrograd.data.documents import load_documents
from retrograd.durable import foreign
from retrograd.runs.files import file_digest, write_atomic
from retrograd.runs.lock import locked
from retrograd.runs.progress import counting
from retrograd.select import weights as files
from retrograd.select.analysis import analyse
from retrograd.select.arms import Arms
from retrograd.select.files import Stated, write_original
from retrograd.select.rivals import query_gradient
from retrograd.select.sources import DataSet, Scored, find_native, is_run, load_data, load_scores, split_name
from retrograd.select.summary import counted, show
from retrograd.settings.select import SelectConfig

__all__ = ["select"]


def select(config: SelectConfig, console: Console | None = None) -> dict[str, Any]:
    """Select, or report a selection that is done; returns what info.json says.

    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine.
    """
    console = console or Console()
    _check(config)
    settings = _settings(config)
    if _done(config.out, settings):
        return _told(config.out, console)
    data = load_data(config)
    forget = load_scores(config.scores, data, Stated(config.sign, config.alignment))
    retain = None
    if config.against:
        stated = Stated(config.against_sign, config.against_alignment, "against_")
        retain = load_scores(config.against, data, stated)
        forget, retain = _same_level(forget, retain)
    if config.rule == "selection" and not forget.per_token:
        raise ValueError("--rule selection keeps tokens, and --scores are of documents; give those of tokens")
    arms = Arms(config, data, forget, retain)
    if config.original and not forget.per_token:
        raise ValueError("--original writes scores of tokens, and --scores are of documents; leave it out")
    record = {
        "rule": config.rule, "use": config.use, "settings": settings, "scores": forget.records,
        "against": retain.records if retain else [], "normaliser": _normaliser(config, arms.by_document),
        "selected": [{"file": str(path), "sha256": file_digest(path)}
                     for path in (config.selection,) if path is not None],
    }  # fmt: skip
    if retain is not None:
        record["analysis"] = analyse(
            forget.values, retain.values, data.places, config.feasible, alpha=config.alpha, seed=config.seed
        )  # fmt: skip
    with locked(config.out):
        if _done(config.out, settings):  # by another process, while this one was reading
            return _told(config.out, console)
        _write(arms, forget, record)
    return show(files.info(config.out), config.out, console)


def _told(out: Path, console: Console) -> dict[str, Any]:
    console.print(f"{out} is done; this is what it holds. Delete the folder to select again.")
    return show(files.info(out), out, console)


_NOT_THE_SELECTION = ("out", "trust_code")


def _settings(config: SelectConfig) -> dict[str, Any]:
    """What makes a selection another one, as JSON has it."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_THE_SELECTION}
    return json.loads(json.dumps(values, default=str))


def _done(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very selection.

    Raises:
        ValueError: If it holds another one, or something else.
    """
    if not out.exists():
        return False
    if not (out / "info.json").exists():
        if not out.is_dir() or set(foreign(out)) - _OURS:
            raise ValueError(f"{out} exists and is no selection; choose another folder")
        return False
    stored = files.info(out)
    old = stored["settings"]
    changed = [f"{name}: {old.get(name)!r} → {value!r}" for name, value in settings.items() if old.get(name) != value]
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(f"{out} holds another selection:\n  {lines}\nUse another folder, or delete this one.")
    sources = [*stored["scores"], *stored["against"], *stored.get("selected", ())]
    for source in (*sources, *(given["query_gradient"] for given in sources if "query_gradient" in given)):
        now = file_digest(Path(source["file"])) if Path(source["file"]).exists() else "missing"
        if now != source["sha256"]:
            raise ValueError(
                f"{out} was selected from {source['file']} with SHA-256 {source['sha256']}, and now it is {now}; use "
                "another folder, or delete this one"
            )
    return True


_OURS = {"controls", "original", "weights.safetensors", "documents.jsonl", "info.json"}


def _check(config: SelectConfig) -> None:
    if not config.scores:
        raise ValueError("--scores names nothing; give a run, RUN:query, or a file")
    for name, value in (("alpha", config.alpha), ("clip", config.clip), ("soft", config.soft)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"--{name} is {value}; it has to be a finite number")
    for name, value in (("clip", config.clip), ("soft", config.soft)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it has to be above 0")
    if not 0 < config.q <= 1:
        raise ValueError(f"--q is {config.q}; a share is above 0 and at most 1, such as 0.1")
    if config.seeds < 1 or config.seed < 0:
        raise ValueError(f"--seeds is {config.seeds} and --seed {config.seed}; they have to be at least 1, and 0")
    if config.k is not None and config.rule != "documents":
        raise ValueError(f"--k is for --rule documents, and the rule is {config.rule}; leave it out")
    if (config.selection is None) != (config.rule != "selection"):
        trouble = "needs --selection, a file" if config.selection is None else "takes none, and --selection gives one"
        raise ValueError(f"--rule {config.rule} {trouble}; the map of `retrograd report` saves such files")
    if not config.against and (config.against_sign or config.against_alignment):
        raise ValueError("--against_sign and --against_alignment speak of --against, which names nothing")


def _same_level(forget: Scored, retain: Scored) -> tuple[Scored, Scored]:
    if forget.per_token != retain.per_token:
        levels = ["tokens" if scored.per_token else "documents" for scored in (forget, retain)]
        raise ValueError(
            f"--scores are of {levels[0]} and --against of {levels[1]}; both have to be of the same: a run with "
            "--attribute tokens, or one without, for both"
        )
    return forget, retain


def _normaliser(config: SelectConfig, by_document: bool) -> str:
    over = "documents with a real token" if by_document else "real tokens"
    if config.use == "removal":
        return f"Σ w = number of real tokens; order and size by {over}"
    return {
        "value": f"mean |score| over {over}", "clipped": f"mean |score| over {over}",
        "top_q": f"mean |score| over {over}", "soft_sign": f"--soft, or mean |score| over {over}",
        "two_objective": f"mean |score − α·against| over {over}", "rank": f"number of {over}",
    }.get(config.rule, "none")  # fmt: skip


def _write(arms: Arms, forget: Scored, record: dict[str, Any]) -> None:
    """Controls first, the arm last: a folder whose info.json is there has everything."""
    config, data, out = arms.config, arms.data, arms.config.out
    for name in _OURS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    if config.original:
        write_original(out / "original", forget.values, config.original, data.places, _query_gradient(config))
    arm, known = arms.arm(), dict[str, dict[str, Any]]()
    about = {name: value for name, value in record.items() if name != "analysis"}
    with counting("controls", len(arms.controls), "controls") as tick:
        for control in arms.each_control():
            same = float((arm.weights == control.weights)[arm.weights != 0].double().mean())
            known[control.name] = {**counted(control.weights, control.kept), "same_as_arm": same}
            said = {**about, "control": control.control, "seed": control.seed, "counts": known[control.name]}
            files.write(out / "controls" / control.name, control.weights, control.kept, data.places, said)
            tick(int(control.last), note=control.name)
    if arm.kept is not None:
        _write_documents(out / "documents.jsonl", data, arm.kept)
    everything = {**record, "counts": counted(arm.weights, arm.kept), "controls": known, "signs": _signs(forget)}
    files.write(out, arm.weights, arm.kept, data.places, everything)


def _query_gradient(config: SelectConfig) -> tuple[float, Params] | None:
    """Value and gradient of the query of the scores, if they are one run's; several runs have no model in common."""
    if len(config.scores) > 1 or not is_run(split_name(config.scores[0])[0]):
        return None
    native = find_native(config.scores[0])
    return query_gradient(native.folder, native.query, native.columns)


def _signs(forget: Scored) -> dict[str, int]:
    values = forget.values
    return {
        "items": len(values), "proponents": int((values < 0).sum()), "detractors": int((values > 0).sum()),
        "zero": int((values == 0).sum()),
    }  # fmt: skip


def _write_documents(path: Path, data: DataSet, kept: list[int]) -> None:
    """The documents that are kept, every column, as a data set of its own."""
    of = data.config.data
    documents = load_documents(of.dataset, split=of.split, subset=of.subset, limit=of.limit).select(kept)

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf8") as file:
            file.writelines(json.dumps(document, ensure_ascii=False, default=str) + "\n" for document in documents)

    write_atomic(path, fill)
