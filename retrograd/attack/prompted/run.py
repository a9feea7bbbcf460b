"""A search for a prompt carried out: it is asked on its way as fine-tuning is, and goes on where a kill left it.

search.json           the attack, and for each evaluation the loss, tokens and FLOPs spent, and the prompt; step 0 has
                      where the search starts, though its questions are asked without a prompt
state.safetensors     a resume point, of each evaluation and heartbeat
answers/STEP/TASK.parquet
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrograd.attack.made_of import claim_answers
from retrograd.attack.prompted import latent, suffix
from retrograd.attack.prompted.contract import Given, Part, Search, State
from retrograd.attack.prompted.insert import inserted, some
from retrograd.core import tree
from retrograd.evaluate.answers import write_measured
from retrograd.evaluate.folder import content
from retrograd.evaluate.on_the_way import answers_path
from retrograd.lm.model import CausalLM, load_causal_lm, load_tokenizer
from retrograd.lm.virtual import embedding_rows, virtual_tokens
from retrograd.query.load import context_length
from retrograd.query.prepare import Prepared, prepare
from retrograd.query.questions import Questions
from retrograd.runs.files import read_tensors, write_json, write_tensors
from retrograd.runs.progress import counting
from retrograd.runs.setup import find_device
from retrograd.settings.attack import AttackConfig, attack_steps
from retrograd.settings.prompted import Prompted
from retrograd.settings.tasks import Task, tasks_from

__all__ = ["SEARCHES", "carry_out_prompted", "given_of"]

SEARCHES: dict[str, Search] = {module.SEARCH.name: module.SEARCH for module in (suffix, latent)}

_STATE = "state.safetensors"


def carry_out_prompted(
    attack: Prompted, model: str, folder: Path, tasks: Path, half: Sequence[str], config: AttackConfig
) -> None:
    """Search from where it was left, and ask at every evaluation that is missing.

    Args:
        model: What is attacked.
        folder: Of this configuration against this model.
        half: The forget tasks or subjects that the search may see.
    """
    search, steps = SEARCHES[attack.prompt], attack_steps(attack.steps)
    asked = {name: task.limited(config.limit) for name, task in tasks_from(tasks).items() if task.ordinary}
    header = {"attack": search.name, "formula": search.formula, "steps": steps}
    record = claim_answers(folder / "search.json", header, {
        "limit": config.limit, "tokenizer": config.tokenizer, "half": list(half), "tasks": content(str(tasks)),
    })  # fmt: skip
    by_step: dict[str, Any] = record.setdefault("found", {})
    missing = [step for step in steps if str(step) not in by_step
               or not all(answers_path(folder, step, name).exists() for name in asked)]  # fmt: skip
    if not missing:
        return
    lm, tokenizer = load_causal_lm(model, device=find_device(config.device)), load_tokenizer(config.tokenizer or model)
    ready = {name: prepare(task, lm, tokenizer, config.batch_size) for name, task in asked.items()}
    given = given_of(attack, lm, tokenizer, ready, half, config.batch_size)
    about = {"model": model, "dtype": "float32", "digest": tree.digest(dict(sorted(lm.params.items())))}
    state, beat = _resumed(folder / _STATE, search, given, missing[0]), time.monotonic()
    with counting("search", attack.steps - state.step, "steps") as tick:
        for step in range(state.step, attack.steps + 1):
            if step in missing:
                _keep(folder / _STATE, state)
                ask(folder, given, search, state, ready, about)
                by_step[str(step)] = _told(given, search, state, tokenizer)
                write_json(folder / "search.json", record)
            elif time.monotonic() - beat > config.heartbeat:
                _keep(folder / _STATE, state)
                beat = time.monotonic()
            if step < attack.steps:
                state = search.advance(given, state)
                tick()


def given_of(
    attack: Prompted, lm: CausalLM, tokenizer: Any, ready: Mapping[str, Prepared], half: Sequence[str], batch_size: int
) -> Given:
    """What the search sees: the forget questions of one half."""
    parts, others = [], 0
    for name, prepared in ready.items():
        task, questions = prepared.question, prepared.content
        if not isinstance(task, Task) or not isinstance(questions, Questions) or task.role != "forget":
            continue
        mine = [k for k, subject in enumerate(questions.subjects) if name in half or subject in half]
        others += len(questions) - len(mine)
        if mine:
            longest = context_length(lm, task.max_length, "max_length")[1]
            parts.append(Part(some(questions, mine), task.normalise, longest))
    assert parts, "check_attack and check_half were here"
    assert others, "check_half was here"
    return Given(attack, lm, parts, tokenizer.bos_token_id, _allowed(lm, tokenizer), batch_size)


def _allowed(lm: CausalLM, tokenizer: Any) -> torch.Tensor:
    """Tokens that a suffix may have: those of the tokenizer with a text of their own, [V] bool."""
    size = embedding_rows(lm)
    special = set(tokenizer.all_special_ids)
    texts = tokenizer.batch_decode([[token] for token in range(min(size, len(tokenizer)))])
    kept = [token not in special and bool(text.strip()) for token, text in enumerate(texts)]
    return torch.tensor([*kept, *[False] * (size - len(kept))])


def ask(
    folder: Path, given: Given, search: Search, state: State, ready: Mapping[str, Prepared], about: dict[str, Any]
) -> None:
    """Every question with the prompt of a state in it; at step 0 as it is. Texts stay as they are."""
    for name, prepared in ready.items():
        put, vectors = prepared, None
        if state.step and isinstance(prepared.content, Questions):
            longest = context_length(given.lm, prepared.question.max_length, "max_length")[1]
            ids, vectors = search.ids(given, state), search.vectors(state)
            put = dataclasses.replace(prepared, content=inserted(
                prepared.content, ids, given.one.place, first=given.first, longest=longest))  # fmt: skip
        with nullcontext() if vectors is None else virtual_tokens(given.lm, vectors):
            measured = put.measure(given.lm.params)
        write_measured(answers_path(folder, state.step, name), measured, {**about, "task": name, "step": state.step})


def _told(given: Given, search: Search, state: State, tokenizer: Any) -> dict[str, Any]:
    """What of a state is for people and programs. FLOPs: 2 a parameter forward, 2 back through it, a token."""
    every = sum(parameter.numel() for parameter in given.lm.module.parameters())
    text = tokenizer.decode(search.ids(given, state)) if search.vectors(state) is None else None
    loss = state.loss if np.isfinite(state.loss) else None
    return {"loss": loss, "tokens": state.read, "flops": 2 * every * (state.read + state.back), "prompt": text}


def _keep(path: Path, state: State) -> None:
    about = {"step": str(state.step), "loss": repr(state.loss), "read": str(state.read), "back": str(state.back)}
    write_tensors(path, state.tensors, about)


def _resumed(path: Path, search: Search, given: Given, first: int) -> State:
    """The resume point; the start, where there is none or it lies behind an evaluation that is missing."""
    if path.exists():
        tensors, about = read_tensors(path)
        if int(about["step"]) <= first:
            device = next(iter(given.lm.params.values())).device
            tensors = {name: leaf.to(device) if leaf.is_floating_point() else leaf for name, leaf in tensors.items()}
            return State(int(about["step"]), float(about["loss"]), int(about["read"]), int(about["back"]), tensors)
    return search.start(given)
