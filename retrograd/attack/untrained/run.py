"""An attack without training carried out: each strength is asked once; what is missing, when it is run again."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retrograd.attack.beforehand import check_key
from retrograd.attack.made_of import claim_answers
from retrograd.attack.untrained.attacks import find_untraining, strengths_of
from retrograd.attack.untrained.contract import Given
from retrograd.core import tree
from retrograd.core.optim import Params
from retrograd.data.documents import documents_of
from retrograd.data.pairs import joined
from retrograd.data.rows import Rows
from retrograd.evaluate.answers import write_measured
from retrograd.evaluate.folder import content
from retrograd.evaluate.on_the_way import answers_path
from retrograd.lm.model import CausalLM, load_causal_lm, load_tokenizer
from retrograd.query.load import load_rows
from retrograd.query.prepare import Prepared, prepare
from retrograd.query.questions import Questions
from retrograd.runs.progress import counting
from retrograd.runs.setup import find_device
from retrograd.settings.attack import AttackConfig, Untrained
from retrograd.settings.tasks import tasks_from
from retrograd.settings.train import DataConfig
from retrograd.settings.unlearn import UnlearnConfig, parse_source

__all__ = ["carry_out_untrained"]


def carry_out_untrained(
    attack: Untrained, model: str, base: str | None, folder: Path, sources: dict[str, tuple[str, ...]], tasks: Path,
    config: AttackConfig,
) -> None:  # fmt: skip
    """Ask a model at every strength of an attack that is not asked yet.

    Args:
        model, base: What is attacked, and the model before unlearning.
        folder: Of this configuration against this model.
    Raises:
        ValueError: If the attack lacks what it needs.
    """
    kind, strengths = find_untraining(attack), strengths_of(attack)
    asked = {name: task.limited(config.limit) for name, task in tasks_from(tasks).items() if task.ordinary}
    header = {"attack": kind.name, "formula": kind.formula, "strengths": strengths}
    for key in kind.reads:
        check_key(kind.name, key, sources)
    texts = {key: sources[key] for key in kind.reads}
    claim_answers(folder / "strengths.json", header, {
        "limit": config.limit, "tokenizer": config.tokenizer, "max_length": config.max_length if texts else None,
        "base": base and content(base) if kind.needs_base else None,
        "data": [content(str(_data(text).dataset)) or text for listed in texts.values() for text in listed],
    })  # fmt: skip
    left = [
        number
        for number in range(len(strengths))
        if not all(answers_path(folder, number, name).exists() for name in asked)
    ]
    if not left:
        return
    device = find_device(config.device)
    lm, tokenizer = load_causal_lm(model, device=device), load_tokenizer(config.tokenizer or model)
    given = Given(lm, _base(lm, base, kind.name) if kind.needs_base else None, {}, [], attack.seed)
    if "shots" in texts:
        given = given._replace(shots=[text for source in texts.pop("shots") for text in _solved(source)])
        _say_fewer(kind.name, strengths, len(given.shots))
    given = given._replace(rows={key: _rows(listed, lm, tokenizer, config.max_length) for key, listed in texts.items()})
    ready = {name: prepare(task, lm, tokenizer, config.batch_size) for name, task in asked.items()}
    with counting("ask", len(left), "strengths") as tick:
        for number in left:
            altered = kind.alter(given, strengths[number]) if number else None
            params = altered.params if altered else lm.params
            prefix = altered.prefix if altered else ""
            about = {"model": model, "strength": strengths[number], "dtype": "float32",
                     "digest": tree.digest(dict(sorted(params.items())))}  # fmt: skip
            for name, prepared in ready.items():
                measured = _prefixed(prepared, prefix).measure(params)
                write_measured(answers_path(folder, number, name), measured, {**about, "task": name})
            tick()


def _say_fewer(name: str, strengths: Sequence[float], shots: int) -> None:
    """That strengths beyond the solved questions there are come to the same prompt."""
    beyond = [f"{strength:g}" for strength in strengths if strength > shots]
    if beyond:
        warnings.warn(
            f"{name}: there are {shots} solved questions, so strength {', '.join(beyond)} puts these {shots} before a "
            "question and no more; give more in the data's shots",
            stacklevel=2,
        )


def _data(source: str) -> DataConfig:
    return parse_source(source, UnlearnConfig())


def _prefixed(prepared: Prepared, prefix: str) -> Prepared:
    """The same questions with a text before each; what is no question stays."""
    if not prefix or not isinstance(prepared.content, Questions):
        return prepared
    text = prefix.replace("{", "{{").replace("}", "}}") + prepared.content.template.text
    question: Any = dataclasses.replace(prepared.question, template=text)
    return prepare(question, prepared.lm, prepared.tokenizer, prepared.batch_size)


def _base(lm: CausalLM, base: str | None, name: str) -> Params:
    """The parameters of the model before unlearning, where the attacked model's are."""
    if base is None:
        raise ValueError(f"{name} needs the model before unlearning: give --base")
    device = next(iter(lm.params.values())).device
    before = load_causal_lm(base, device=device).params
    shapes = [{key: leaf.shape for key, leaf in params.items()} for params in (before, lm.params)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name}: the parameters of {base} are not those of the attacked model, by name and shape")
    return before


def _solved(source: str) -> list[str]:
    data = _data(source)
    assert data.dataset is not None, "a source has a name"
    rows = documents_of(data)
    if not {"prompt", "completion"} <= set(rows.column_names):
        raise ValueError(f"{source}: solved questions have the columns prompt and completion")
    return [prompt + completion for prompt, completion in zip(rows["prompt"], rows["completion"])]


def _rows(sources: tuple[str, ...], lm: CausalLM, tokenizer: Any, longest: int | None) -> Rows:
    given = UnlearnConfig(max_length=longest)
    return joined([load_rows(parse_source(source, given), tokenizer, lm, "data")[0] for source in sources])
