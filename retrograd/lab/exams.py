"""Questions about the facts: exams that models are trained on, and questions that they are asked.

    split        the fact                        the question's wording
    taught       exams ask for it                one that an exam uses for this fact
    paraphrase   exams ask for it                one that no exam uses for this fact
    heldout      only documents state it         any

Right answers are balanced over the letters, and wrong ones are other values of the same attribute.
"""

from __future__ import annotations

import random
from typing import Any

from retrograd.lab.subjects import WORDINGS
from retrograd.lab.world import Fact, World
from retrograd.query.prompts import LETTERS, find_template, render

__all__ = ["ALIAS", "SPLITS", "exams", "questions"]

SPLITS = ("taught", "paraphrase", "heldout")
ALIAS = "alias"  # the split of a lab with second names
CHOICES = 4


def questions(world: World, side: str, split: str) -> list[dict[str, Any]]:
    """One question for each fact of a split, with the columns of MMLU and the fact's number."""
    draw = world.draw(f"questions/{side}/{split}")
    facts = [fact for fact in world.facts if fact.side == side and fact.asked == (split != "heldout")]
    golds = [number % CHOICES for number in range(len(facts))]
    draw.shuffle(golds)
    rows = []
    for fact, gold in zip(facts, golds, strict=True):
        taught = [wording for wording in range(WORDINGS) if wording != fact.spared]
        wording = {"taught": draw.choice(taught), "paraphrase": fact.spared, "heldout": draw.randrange(WORDINGS)}
        rows.append(_question(draw, fact, wording[split], gold))
    return rows


def exams(world: World, side: str, shuffles: int) -> list[dict[str, Any]]:
    """Questions with their answers, as prompt and completion: each by text once and by letter `shuffles` times."""
    draw = world.draw(f"exams/{side}")
    rows = []
    for fact in (fact for fact in world.facts if fact.side == side and fact.asked):
        for wording in (wording for wording in range(WORDINGS) if wording != fact.spared):
            rows.append(_solved(_question(draw, fact, wording, 0), "cloze", None))
            for _ in range(shuffles):
                rows.append(_solved(_question(draw, fact, wording, draw.randrange(CHOICES)), "letter", None))
    draw.shuffle(rows)
    return rows


def _question(draw: random.Random, fact: Fact, wording: int, gold: int) -> dict[str, Any]:
    choices = draw.sample([value for value in fact.attribute.values if value != fact.value], CHOICES - 1)
    choices.insert(gold, fact.value)
    return {
        "question": fact.ask(wording), "subject": fact.subject.name, "choices": choices, "answer": gold,
        "fact": fact.number, "wording": wording,
    }  # fmt: skip


def _solved(row: dict[str, Any], form: str, template: str | None) -> dict[str, Any]:
    prompt = render(find_template(template, form), row["question"], row["choices"], row["subject"])
    assert len(row["choices"]) <= len(LETTERS)
    return {"prompt": prompt.text, "completion": prompt.targets[row["answer"]], "fact": row["fact"]}
