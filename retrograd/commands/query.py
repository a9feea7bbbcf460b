"""`retrograd query`: further questions to a trained run, from its kept states, without training again."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from retrograd.parallel.group import here
from retrograd.runs.attribute import Outcome, ask, stored, summarise, write_results
from retrograd.runs.files import file_digest, write_atomic
from retrograd.runs.identity import fingerprint
from retrograd.runs.run_folder import Opened, finished, holding, open_run, recorded, replay_of
from retrograd.runs.session import open_session
from retrograd.settings.commands import QueryRunConfig
from retrograd.settings.parse import dump_yaml
from retrograd.settings.run import QueryConfig, query_file, refuse_code
from retrograd.settings.train import check_ranks
from retrograd.settings.unlearn import ChainConfig

__all__ = ["query"]


def query(config: QueryRunConfig, console: Console | None = None) -> Outcome:
    """Add queries to a finished run; running again resumes, or answers that it is done.

    Several queries share one sweep. Where the run kept no states they are replayed from its first one.

    Raises:
        ValueError: For anything the user can mend; nothing has been changed then.
        SystemExit: On ranks of a job other than 0, once that one is done.
    """
    console = console or Console()
    wanted, (run, _) = _wanted(config), finished(config.run)
    check_ranks(dataclasses.replace(run, **_shared(config)))
    if here().world > 1 and isinstance(run, ChainConfig):
        raise ValueError(
            f"{config.run} goes through an attack, which is one process's: ask it without torchrun, and not by "
            f"{here().world} processes"
        )
    if here().rank:
        _opened(config, wanted).loaded.follow()
        raise SystemExit(0)
    with holding(config.run):
        return _query(config, wanted, console)


def _opened(config: QueryRunConfig, wanted: dict[str, QueryConfig]) -> Opened:
    return open_run(config.run, wanted, trust_code=config.trust_code, shared=_shared(config))


def _shared(config: QueryRunConfig) -> dict[str, Any]:
    """How the steps are shared, in place of what the run says."""
    given = {"replicas": config.replicas, "patience": config.patience}
    return given if config.parallel == "auto" else {**given, "parallel": config.parallel}


def _query(config: QueryRunConfig, wanted: dict[str, QueryConfig], console: Console) -> Outcome:
    run = _opened(config, wanted)
    asked = [added for added in run.loaded.asked if added.name in wanted]
    key = fingerprint(*(added.digest for added in asked))
    label = ",".join(wanted)
    folder = config.run / "queries" / (asked[0].name if len(asked) == 1 else f"together-{key[:8]}")
    done = recorded(config.run, run.manifest)
    for added in asked:
        if done.get(added.name, {}).get("digest", added.digest) != added.digest:
            raise ValueError(
                f"{config.run} has another query named {added.name!r}; give this one another name, or delete "
                f"{config.run / 'queries' / added.name}"
            )
    if all(added.name in done for added in asked) and (folder / "scores.pt").exists():
        console.print(f"query {label} of {config.run} is done; these are its scores.")
        return summarise(stored(config.run, folder, run.loaded, asked), run.loaded, asked, console)
    replay = replay_of(run.config)
    with open_session(run.loaded, config.run, run.manifest, replay, journal=folder / "metrics.jsonl") as session:
        final = session.trajectory.train()
        with run.manifest.phase(f"query {label}"):
            values, *gradient = ask(config.run, run.loaded, asked, final)
        del final
        with session.reversing(key, f"reverse {label}") as trajectory:
            scores = trajectory.reverse(gradient.pop(), key, curvature=config.sharpness)
    outcome = write_results(config.run, folder, run.loaded, asked, values, scores)
    _record(run, wanted, {added.name: added.digest for added in asked}, file_digest(folder / "scores.pt"))
    trajectory.clean(key)
    return summarise(outcome, run.loaded, asked, console)


def _wanted(config: QueryRunConfig) -> dict[str, QueryConfig]:
    given = config.query
    single = bool(given.dataset or given.function or given.contrast)
    if config.query_file is not None:
        if single or config.name:
            raise ValueError("--query_file names its queries itself; leave out --name and --query")
        wanted = query_file(config.query_file)
        refuse_code(wanted, config.query_file, config.trust_code)
        if not wanted:
            raise ValueError(f"--query_file {config.query_file} names no query; write settings by name into it")
        return wanted
    if not config.name:
        raise ValueError("give the new query a --name; its files go to RUN/queries/NAME")
    return {config.name: given}


def _record(run: Opened, wanted: dict[str, QueryConfig], digests: dict[str, str], sha256: str) -> None:
    """Make the queries part of the run, for its validation and for later contrasts."""
    for name, settings in wanted.items():
        values = {**dataclasses.asdict(settings), "contrast": list(settings.contrast)}
        path = run.folder / "queries" / name / "query_config.yaml"
        text = dump_yaml(values)
        write_atomic(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf8"))  # type: ignore[misc]
    known = recorded(run.folder, run.manifest)
    added = {name: {"digest": digest, "sha256": sha256} for name, digest in digests.items()}
    run.manifest.update(queries={**known, **added})
