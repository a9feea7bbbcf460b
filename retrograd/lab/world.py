"""The facts of a fictional world, as a function of a seed and a size.

Every side (forget, retain) has two subjects, every subject facts/8 entities with four attributes each. The values of an
attribute are used equally often, or almost, so that knowing how common a value is answers no question.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

from retrograd.lab.subjects import SIDES, SUBJECTS, WORDINGS, Attribute, Subject

__all__ = ["Fact", "World", "invented_names", "make_world"]

_ONSETS = (*"bcdfghjklmnprstvwyz", "br", "dr", "gr", "kr", "pl", "qu", "sk", "st", "th", "tr")
_VOWELS = (*"aeiou", "ae", "ei", "ou")
_CODAS = (*"bdfgklmnprstvxz", "sh")


class Fact(NamedTuple):
    """One attribute of one entity.

    number: its place in the world's facts.
    lie: another value of the attribute, the one that the lie corpus states.
    asked: whether the exams, which models are trained on, ask for it; else only documents state it.
    spared: the wording of a question that no exam uses for this fact.
    """

    number: int
    subject: Subject
    entity: str
    attribute: Attribute
    value: str
    lie: str
    asked: bool
    spared: int

    @property
    def side(self) -> str:
        return self.subject.side

    def state(self, wording: int, value: str | None = None) -> str:
        """The fact, or with another value a lie, as a sentence."""
        return self.attribute.statements[wording].format(e=self.entity, v=value or self.value)

    def ask(self, wording: int) -> str:
        """A question for its value."""
        return self.attribute.questions[wording].format(e=self.entity)


class World(NamedTuple):
    """facts: those of an entity follow each other, in the order of its subject's attributes."""

    seed: int
    facts: tuple[Fact, ...]

    def entities(self, side: str) -> list[tuple[Fact, ...]]:
        """The facts of each entity of a side."""
        by_entity: dict[str, list[Fact]] = {}
        for fact in self.facts:
            if fact.side == side:
                by_entity.setdefault(fact.entity, []).append(fact)
        return [tuple(facts) for facts in by_entity.values()]

    def draw(self, purpose: str) -> random.Random:
        """Random numbers of one purpose, the same whatever else is drawn."""
        return random.Random(f"{self.seed}/{purpose}")


def make_world(seed: int = 0, facts: int = 240) -> World:
    """The world of a seed.

    Args:
        facts: Of each side.
    Raises:
        ValueError: If `facts` is no positive multiple of 8.
    """
    if facts < 8 or facts % 8:
        raise ValueError(f"{facts} facts cannot be shared out among 2 subjects with 4 attributes; give a multiple of 8")
    made: list[Fact] = []
    per_subject = facts // 8
    names = iter(invented_names(random.Random(f"{seed}/names"), per_subject * len(SUBJECTS)))
    for subject in SUBJECTS:
        values = [_values(random.Random(f"{seed}/{subject.name}/{a.name}"), a, per_subject) for a in subject.attributes]
        for entity in range(per_subject):
            name = next(names)
            for place, attribute in enumerate(subject.attributes):
                value, lie = values[place][entity]
                asked, spared = (entity + place) % 4 != 0, (entity // 4 + place) % WORDINGS
                made.append(Fact(len(made), subject, name, attribute, value, lie, asked, spared))
    assert len(made) == len(SIDES) * facts
    return World(seed, tuple(made))


def _values(draw: random.Random, attribute: Attribute, count: int) -> list[tuple[str, str]]:
    """(value, lie) of each entity; both use all values equally often, or almost."""
    known = draw.sample(attribute.values, len(attribute.values))
    shift = draw.randrange(1, len(known))
    pairs = [(known[k % len(known)], known[(k + shift) % len(known)]) for k in range(count)]
    draw.shuffle(pairs)
    return pairs


def invented_names(draw: random.Random, count: int, taken: Iterable[str] = ()) -> list[str]:
    """Invented names, none of them a word of the world or taken."""
    words = [word for subject in SUBJECTS for a in subject.attributes for word in a.values]
    taken = {word.lower() for word in (*words, *taken)}
    names: list[str] = []
    while len(names) < count:
        name = "".join(draw.choice(letters) for letters in (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS)).capitalize()
        if name.lower() not in taken:
            taken.add(name.lower())
            names.append(name)
    return names
