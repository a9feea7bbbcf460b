"""One task asked of one model, whatever its form; some forms compare with another model, loaded when first needed."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from retrograd.evaluate.answers import Kept
from retrograd.evaluate.depth import patched
from retrograd.evaluate.divergence import divergence
from retrograd.evaluate.memory import by_heart
from retrograd.lm.model import CausalLM, load_causal_lm
from retrograd.query.load import load_choices, load_rows
from retrograd.query.prepare import prepare
from retrograd.query.proof import prove_answers
from retrograd.runs.setup import find_device
from retrograd.settings.tasks import Task

__all__ = ["BESIDE", "Others", "ask"]

BESIDE = {"kl": "reference", "depth": "knows"}  # forms that compare with another model, and which it is


@dataclasses.dataclass
class Others:
    """The models that some tasks compare with: names or folders, loaded once."""

    reference: str | None
    knows: str | None
    dtype: str
    device: str

    def of(self, task: Task) -> dict[str, str | None]:
        """Which of them a task looks at."""
        word = BESIDE.get(task.form)
        return {word: getattr(self, word)} if word else {}

    def reference_model(self) -> CausalLM:
        """The model that divergences are measured from."""
        return self._reference

    def knowing(self) -> CausalLM:
        """The model that knows.

        Raises:
            ValueError: If none was named.
        """
        if self.knows is None:
            raise ValueError("a task of form depth needs a model that knows: give --knows and --never")
        return self._reference if self.knows == self.reference else self._knows

    @cached_property
    def _reference(self) -> CausalLM:
        assert self.reference is not None, "there is always one"
        return self._loaded(self.reference)

    @cached_property
    def _knows(self) -> CausalLM:
        assert self.knows is not None, "`knowing` was here"
        return self._loaded(self.knows)

    def _loaded(self, source: str) -> CausalLM:
        return load_causal_lm(source, dtype=self.dtype, device=find_device(self.device))


def ask(task: Task, lm: CausalLM, tokenizer: Any, batch_size: int, others: Others) -> tuple[Kept, dict[str, Any]]:
    """What a model gives for a task, and how it was asked.

    Raises:
        ValueError: If it cannot be asked.
    """
    if task.form in ("memory", "kl"):
        rows = load_rows(task, tokenizer, lm, None)[0]
        asked = {"rows": rows.digest(), "truncated": rows.truncated, "skipped": len(rows.skipped)}
        if task.form == "memory":
            return by_heart(lm, lm.params, rows, tokenizer), asked
        return divergence(lm, others.reference_model(), rows, batch_size), {**asked, **others.of(task)}
    if task.form == "depth":
        prove_answers(lm)
        questions = load_choices(dataclasses.replace(task, form="cloze"), tokenizer, lm, None)
        asked = {"questions": questions.digest(), "template": questions.template.name, "cut": questions.cut}
        return patched(lm, others.knowing(), questions), {**asked, **others.of(task)}
    ready = prepare(task, lm, tokenizer, batch_size)
    return ready.measure(lm.params), ready.asked
