"""What a finished run left on disk, checked against itself: hashes, score files, states, query gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.core.slots import digest_of
from retrograd.core.step import State
from retrograd.runs.errors import RunError
from retrograd.runs.files import file_digest, read_tensors
from retrograd.runs.manifest import Manifest
from retrograd.runs.resume import read_digests
from retrograd.runs.run_folder import Opened, recorded, refuse_other
from retrograd.runs.scores import read_scores
from retrograd.settings import run as configs
from retrograd.trust.certificate import Check, told

__all__ = ["digests", "input_check", "query_check", "score_checks", "state_checks", "stored_scores"]

QUERY_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5}


def score_checks(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """The bytes of the score files against the manifest's SHA-256."""
    wanted = {"": manifest.values["phases"]["scores"].get("sha256")}
    wanted |= {name: entry.get("sha256") for name, entry in recorded(folder, manifest).items()}
    together = {file_digest(path) for path in (folder / "queries").glob("together-*/scores.pt")}
    bad = []
    for name, sha256 in wanted.items():
        path = folder / "queries" / name / "scores.pt" if name else folder / "scores.pt"
        on_disk = {file_digest(path)} if path.exists() else set()
        if sha256 not in on_disk | (together if name else set()):
            bad.append(str(path.relative_to(folder)))
    if bad:
        yield Check("scores file", "failed", f"{', '.join(bad)}: not the bytes that the manifest has the SHA-256 of")
    else:
        yield Check("scores file", "passed", f"{len(wanted)} with the SHA-256 of the manifest")


def input_check(run: Opened) -> Check:
    """Data, model, recipe and queries against the manifest's hashes."""
    try:
        refuse_other(run.folder, run.manifest, run.loaded)
    except ValueError as error:
        changed = [line.strip() for line in str(error).splitlines()[1:-1]]
        return Check("inputs", "failed", f"changed since the run: {'; '.join(changed)}")
    known = recorded(run.folder, run.manifest)
    others = [
        f"query {query.name}: {known[query.name]['digest']} → {query.digest}"
        for query in run.loaded.asked
        if query.name in known and known[query.name]["digest"] != query.digest
    ]
    if others:
        return Check("inputs", "failed", f"changed since the run: {'; '.join(others)}")
    return Check("inputs", "passed", f"the hashes of {', '.join(run.loaded.hashes)} are the manifest's")


def digests(run: Opened) -> dict[int, str]:
    """The digest of every state of the original run, by step."""
    return read_digests(run.folder / "checkpoints")


def state_checks(run: Opened) -> Iterator[Check]:
    """Every state on disk against its own digest and the run's, every kept gradient against its own."""
    folder, known = run.folder / "checkpoints", digests(run)
    states = {path: int(path.stem.split("-")[1]) for path in sorted(folder.glob("state-*.safetensors"))}
    states[folder / "final.safetensors"] = len(run.loaded.stream)
    gradients = sorted(folder.glob("gradient-*.safetensors"))
    faults = {path.name: _fault(run, path, run.loaded.initial, known.get(step, "")) for path, step in states.items()}
    faults |= {path.name: _fault(run, path, State(0, run.loaded.initial.params, {})) for path in gradients}
    bad = [f"{name}: {why}" for name, why in faults.items() if why]
    kind = "states and gradients" if gradients else "states"
    if bad:
        yield Check("states", "failed", f"{len(bad)} of {len(faults)} {kind} on disk are broken. {'; '.join(bad)}")
    else:
        also = f"; {len(gradients)} gradients on disk, each with its own digest" if gradients else ""
        yield Check("states", "passed", f"{len(states)} on disk, each with its own digest and the run's{also}")


def stored_scores(run: Opened) -> Tensor:
    """Scores of all queries of a run, its own and those added, [K, *weights.shape] float64 on the CPU.

    Raises:
        ValueError: If a file has another shape, a number that is not finite, or differs from its copy.
    """
    per_token, shape = run.loaded.stream.per_token, run.loaded.training.weights.shape
    own = configs.queries_of(run.config)
    parts = [read_scores(run.folder / "scores.pt", per_token)]
    start = 0
    for query in run.loaded.asked:
        path = run.folder / "queries" / query.name / "scores.pt"
        if query.name not in own:
            parts.append(read_scores(path, per_token))
            continue
        columns = parts[0][start : (start := start + len(query.columns))]
        if path.exists() and not torch.equal(read_scores(path, per_token), columns):
            raise ValueError(f"{path} differs from the same columns of {run.folder / 'scores.pt'}")
    expected = sum(len(query.columns) for query in run.loaded.asked)
    if any(part.shape[1:] != shape for part in parts) or sum(map(len, parts)) != expected:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"score files have shapes {shapes}; {expected} query columns of {tuple(shape)} belong there")
    scores = torch.cat(parts).double()
    if not torch.isfinite(scores).all():
        raise ValueError(f"{tree.nonfinite(scores):.2%} of the scores are NaN or infinite")
    return scores


def query_check(run: Opened, values: Tensor, gradient: Params) -> Check:
    """Query values and gradients on disk against those at the replayed final state."""
    worst, start = 0.0, 0
    dtype = next(iter(gradient.values())).dtype
    for query in run.loaded.asked:
        columns = slice(start, start := start + len(query.columns))
        path = run.folder / "queries" / query.name / "gradient.safetensors"
        tensors, metadata = read_tensors(path)
        if metadata.get("identity") != f"{run.loaded.identity}/{query.digest}":
            return Check("query", "failed", f"{path} was written by another run or for another query")
        if tree.nonfinite(tensors):
            return Check("query", "failed", f"{path} has numbers that are NaN or infinite")
        wanted = {"values": values[columns], **{f"gradient.{name}": g[columns] for name, g in gradient.items()}}
        if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in wanted.items()}:
            return Check("query", "failed", f"{path} has other tensors than this query")
        for names in (["values"], [name for name in wanted if name != "values"]):
            apart = [tensors[name].cpu() - wanted[name].cpu() for name in names]
            size = tree.norm([wanted[name].cpu() for name in names]).clamp_min(1e-300)
            worst = max(worst, float(tree.norm(apart) / size))
    tolerance = QUERY_ERROR.get(dtype, 1e-2)
    count = len(run.loaded.asked)
    asked = "1 query" if count == 1 else f"{count} queries"
    what = f"values and gradients of {asked} at the replayed final state are those on disk"
    return Check("query", "passed" if worst <= tolerance else "failed", what, worst, tolerance)


def _fault(run: Opened, path: Path, like: State, expected: str | None = None) -> str | None:
    """What is wrong with a file of this form, which has to have a digest if one is given; None for nothing."""
    try:
        tensors, metadata = read_tensors(path)
        state = tree.unnamed(like, tensors)
    except (RunError, ValueError, KeyError) as error:
        return told(error)
    digest = tree.digest((state.params, state.moments))
    if metadata.get("identity") != run.manifest.values["identity"]:
        return "written by another run"
    if digest != metadata.get("digest"):
        return "not the bits that were written"
    known = (None, digest_of(state, run.loaded.training.recipe.pieces))
    return None if expected in known else "not the state that digests.txt has at this step"
