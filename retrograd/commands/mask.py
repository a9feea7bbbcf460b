"""`retrograd mask`: token weights by keywords or by states like theirs, without scores."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console

from retrograd.durable import foreign
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.runs.files import file_digest
from retrograd.runs.lock import locked
from retrograd.runs.setup import find_device
from retrograd.select import weights as files
from retrograd.select.masks import activation_tokens
from retrograd.select.places import places_of
from retrograd.select.rules import finish
from retrograd.select.words import keyword_tokens, read_keywords
from retrograd.settings.select import MaskConfig

__all__ = ["mask"]

_NOT_THE_MASK = ("out", "device")


def mask(config: MaskConfig, console: Console | None = None) -> dict[str, Any]:
    """Write the weights, or report those that are there; returns what info.json says.

    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        RunError: For a failure of the machine.
    """
    console = console or Console()
    if not config.data.dataset:
        raise ValueError("nothing to weigh: give --data.dataset, the data set to forget")
    given = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_THE_MASK}
    settings = json.loads(json.dumps({**given, "keywords_sha256": _digest(config)}, default=str))
    if not _done(config, settings):
        lm = load_causal_lm(config.model, dtype=config.dtype, device=find_device(config.device))
        tokenizer = load_tokenizer(config.tokenizer or config.model)
        rows = load_rows(config.data, tokenizer, lm, "data", min_chars=config.data.min_chars)[0]
        places = places_of(rows)
        hits = keyword_tokens(places, rows.input_ids, read_keywords(config.keywords), tokenizer)
        if config.depth is not None:
            hits = activation_tokens(lm, rows, places, hits, config.depth, config.threshold)
        rule = "keywords" if config.depth is None else "activation"
        record = {"rule": rule, "use": "removal", "settings": settings, "kept": int(hits.sum())}
        with locked(config.out):
            if not _done(config, settings):  # by another process, while this one was reading
                files.write(config.out, finish("removal", hits, places), None, places, record)
    said = files.info(config.out)
    kept, real = said["kept"], said["data"]["real_tokens"]
    line = f"{config.out}: {kept} of {real} real tokens ({kept / real:.1%}) by {said['rule']}"
    console.print(line, markup=False, soft_wrap=True)
    return said


def _digest(config: MaskConfig) -> str:
    read_keywords(config.keywords)  # refuses what cannot be read
    return file_digest(config.keywords)


def _done(config: MaskConfig, settings: dict[str, Any]) -> bool:
    """Whether the folder holds these very weights.

    Raises:
        ValueError: If it holds others, or something else.
    """
    if not config.out.exists():
        return False
    if not (config.out / "info.json").exists():
        if not config.out.is_dir() or set(foreign(config.out)) - {"weights.safetensors"}:
            raise ValueError(f"{config.out} exists and is no folder of weights; choose another folder")
        return False
    old = files.info(config.out)["settings"]
    changed = [f"{name}: {old.get(name)!r} → {new!r}" for name, new in settings.items() if old.get(name) != new]
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(f"{config.out} holds other weights:\n  {lines}\nUse another folder, or delete this one.")
    return True
