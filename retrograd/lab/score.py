"""How well a lab's models answer its questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrograd.data.documents import load_documents
from retrograd.evaluate.intervals import wilson
from retrograd.lab.exams import SPLITS
from retrograd.lab.subjects import SIDES
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.query.choices import build_questions, score_questions
from retrograd.query.prompts import FORMS

__all__ = ["score_model"]

_BATCH = 64


def score_model(folder: Path, name: str) -> list[dict[str, Any]]:
    """Accuracy of models/NAME on every side, split and form, with its 95 % interval.

    Letter questions also tell the mean probability of the four letters together.
    """
    source = str(folder / "models" / name)
    lm, tokenizer = load_causal_lm(source), load_tokenizer(source)
    found = []
    for side in SIDES:
        for split in SPLITS:
            rows = load_documents(str(folder / "questions" / f"{side}_{split}.jsonl"))
            for form in FORMS:
                scored = score_questions(lm, lm.params, build_questions(rows, tokenizer, form=form), _BATCH)
                entry = {"model": name, "side": side, "split": split, "form": form, "questions": len(rows)}
                entry |= {"accuracy": scored.accuracy, "interval": wilson(int(scored.correct.sum()), len(rows))}
                if scored.mass is not None:
                    entry["letter_mass"] = float(scored.mass.mean())
                found.append(entry)
    return found
