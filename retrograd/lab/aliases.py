"""A second name for every entity, taught in few documents and in no exam: what is known of a thing, or of a name?

Four documents of an entity use its alias: each begins with both names and states two of the four facts under the alias,
in two of the four wordings. The questions are the taught ones with the alias in place of the name.
"""

from __future__ import annotations

from typing import Any

from retrograd.lab.corpora import Document
from retrograd.lab.exams import questions
from retrograd.lab.subjects import WORDINGS
from retrograd.lab.world import World, invented_names
from retrograd.query.aliases import renamed

__all__ = ["alias_documents", "alias_questions", "aliases_of"]

_OPENINGS = ("The {noun} {e} is also called {a}.", "Some call the {noun} {e} by the name {a}.")
_TAUGHT_IN = 2  # wordings


def aliases_of(world: World) -> dict[str, str]:
    """The alias of every entity, by its name; no alias is a name."""
    names = list(dict.fromkeys(fact.entity for fact in world.facts))
    return dict(zip(names, invented_names(world.draw("aliases"), len(names), taken=names)))


def alias_documents(world: World, side: str) -> list[Document]:
    """The texts that use aliases, in a seeded order."""
    draw, aliases, texts = world.draw(f"alias documents/{side}"), aliases_of(world), []
    for entity in world.entities(side):
        for wording in draw.sample(range(WORDINGS), _TAUGHT_IN):
            order = draw.sample(entity, len(entity))
            for pair in (order[:2], order[2:]):
                name, alias = pair[0].entity, aliases[pair[0].entity]
                opening = draw.choice(_OPENINGS).format(noun=pair[0].subject.noun, e=name, a=alias)
                sentences = [renamed(fact.state(wording), {name: alias}) for fact in pair]
                texts.append(Document(" ".join([opening, *sentences]), tuple(pair)))
    draw.shuffle(texts)
    return texts


def alias_questions(world: World, side: str) -> list[dict[str, Any]]:
    """The taught questions, in their order, asked under the alias."""
    aliases = aliases_of(world)
    return [{**row, "question": renamed(row["question"], aliases)} for row in questions(world, side, "taught")]
