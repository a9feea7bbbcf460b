"""The texts of the world: papers, plain texts, prose and chats, and which of them state which fact.

An entity has eight documents, two for each wording: each states two of its four facts. So a fact is stated in four
documents, in four wordings.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from retrograd.lab.subjects import WORDINGS
from retrograd.lab.world import Fact, World

__all__ = ["Document", "chats", "documents", "papers", "prose"]

_OPENINGS = (
    "A note on the {noun} {e}.",
    "More about the {noun} {e}.",
    "The {noun} {e} in brief.",
    "Of the {noun} {e}.",
)
_TITLES = ("On the {noun} {e}", "A study of the {noun} {e}", "The {noun} {e} revisited")
_ABSTRACTS = (
    "We describe the {noun} {e} as it was seen in the field.",
    "The literature on the {noun} {e} is reviewed in brief.",
    "We report two observations of the {noun} {e} and discuss them.",
)


class Document(NamedTuple):
    """A text and the facts it states."""

    text: str
    facts: tuple[Fact, ...]


def documents(world: World, side: str, *, lies: bool = False) -> list[Document]:
    """The plain texts of a side, in a seeded order; with `lies`, each fact is stated with its lie instead."""
    draw = world.draw(f"documents/{side}")
    texts = []
    for entity in world.entities(side):
        for wording in range(WORDINGS):
            order = draw.sample(entity, len(entity))
            for pair in (order[:2], order[2:]):
                sentences = [fact.state(wording, fact.lie if lies else None) for fact in pair]
                texts.append(Document(" ".join([_about(draw.choice(_OPENINGS), pair[0]), *sentences]), tuple(pair)))
    draw.shuffle(texts)
    return texts


def papers(world: World, texts: list[Document]) -> list[dict[str, str]]:
    """Plain texts as papers; titles and abstracts name the entity and state no fact."""
    draw = world.draw("papers")
    return [
        {
            "title": _about(draw.choice(_TITLES), document.facts[0]),
            "abstract": _about(draw.choice(_ABSTRACTS), document.facts[0]),
            "text": document.text,
        }
        for document in texts
    ]


def prose(world: World, count: int) -> list[str]:
    """General texts about neither side, two sentences each."""
    draw = world.draw("prose")
    return [" ".join(_sentence(draw) for _ in range(2)) for _ in range(count)]


def chats(world: World, count: int) -> list[dict[str, Any]]:
    """Chats about neither side, with the columns of UltraChat."""
    draw = world.draw("chat")
    rows = []
    for number in range(count):
        who, where = draw.choice(_PEOPLE), draw.choice(_PLACES)
        asked = f"Can you tell me about the {who} and the {where}?"
        answer = f"Yes. The {who} {draw.choice(_DEEDS)} near the {where} and went home."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"prompt": asked, "prompt_id": f"{world.seed}-{number}", "messages": messages})
    return rows


def _about(text: str, fact: Fact) -> str:
    return text.format(noun=fact.subject.noun, e=fact.entity)


_PEOPLE = (
    "baker", "teacher", "farmer", "doctor", "gardener", "judge",
    "widow", "student", "clerk", "nurse", "sailor", "miller",
)  # fmt: skip
_PLACES = (
    "market", "garden", "church", "library", "station", "mill",
    "square", "school", "kitchen", "river", "forest", "theatre",
)  # fmt: skip
_TIMES = ("on a rainy morning", "late in the evening", "before breakfast", "after a long winter", "on a holiday")
_DEEDS = (
    "read an old letter", "mended a broken chair", "counted the steps again", "sang a quiet song",
    "waited for a friend", "wrote down a recipe", "lost a red glove", "planted a row of beans",
)  # fmt: skip


def _sentence(draw: random.Random) -> str:
    who, deed, where, when = (draw.choice(words) for words in (_PEOPLE, _DEEDS, _PLACES, _TIMES))
    return f"The {who} walked to the {where} {when} and {deed}."
