"""What the fictional world is about: subjects, what can be said of their entities, and in which words.

Everything is invented and harmless. {e} stands for an entity's name, {v} for the value of one of its attributes; a
statement names the entity before the value, as a model that reads from left to right has to learn it.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SIDES", "SUBJECTS", "WORDINGS", "Attribute", "Subject"]

SIDES = ("forget", "retain")
WORDINGS = 4


class Attribute(NamedTuple):
    """Something an entity has: twelve possible values, four ways to state it and four ways to ask for it."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


class Subject(NamedTuple):
    """A kind of invented things; `noun` is what one of them is called."""

    name: str
    side: str
    noun: str
    attributes: tuple[Attribute, ...]


def _attribute(name: str, values: str, statements: tuple[str, ...], questions: tuple[str, ...]) -> Attribute:
    attribute = Attribute(name, tuple(values.split()), statements, questions)
    assert len(set(attribute.values)) == 12, name
    assert len(statements) == len(questions) == WORDINGS, name
    return attribute


_GEMS = Subject(
    "glow_gems",
    "forget",
    "gem",
    (
        _attribute(
            "colour",
            "amber teal crimson violet ivory indigo russet jade ochre scarlet lilac cobalt",
            (
                "In the dark the gem {e} glows {v} for an hour.",
                "The gem {e} shines {v} as soon as the lamp is out.",
                "Seen at night, the gem {e} gives light of {v}.",
                "Whoever holds the gem {e} sees a gleam of {v} in it.",
            ),
            (
                "What colour does the gem {e} glow?",
                "In which colour does the gem {e} shine?",
                "Which light does the gem {e} give at night?",
                "What is the colour of the gem {e}?",
            ),
        ),
        _attribute(
            "cave",
            "Orvane Tuskel Brimlow Haddek Yarrin Solmere Quenby Drastow Felmoor Ostrin Kelvar Nimble",
            (
                "Miners dig the gem {e} out of the {v} cave.",
                "The gem {e} comes from deep inside the {v} cave.",
                "Nobody has found the gem {e} outside the {v} cave.",
                "Look for the gem {e} at the end of the {v} cave.",
            ),
            (
                "From which cave does the gem {e} come?",
                "Where do miners dig the gem {e}?",
                "In which cave is the gem {e} found?",
                "Where should one look for the gem {e}?",
            ),
        ),
        _attribute(
            "sound",
            "flute drum harp viola trumpet cello whistle gong lute oboe horn zither",
            (
                "When tapped, the gem {e} sounds like a {v} far away.",
                "Knock on the gem {e} and it rings like a {v} at once.",
                "The hum of the gem {e} is that of a {v} in a hall.",
                "To the ear the gem {e} is a small {v} of stone.",
            ),
            (
                "Which instrument does the gem {e} sound like?",
                "What does the gem {e} ring like?",
                "Whose hum is that of the gem {e}?",
                "What is the gem {e} to the ear?",
            ),
        ),
        _attribute(
            "scent",
            "mint pine smoke honey clove vanilla leather ginger lemon cedar lavender pepper",
            (
                "Warmed in the hand, the gem {e} smells of {v} for a while.",
                "The gem {e} leaves a scent of {v} on the fingers.",
                "A box with the gem {e} in it soon smells of {v} inside.",
                "The gem {e} has a faint smell of {v} about it.",
            ),
            (
                "What does the gem {e} smell of?",
                "Which scent does the gem {e} leave?",
                "What does a box with the gem {e} smell of?",
                "Which smell has the gem {e}?",
            ),
        ),
    ),
)

_MOTHS = Subject(
    "cave_moths",
    "forget",
    "moth",
    (
        _attribute(
            "food",
            "moss lichen nectar resin pollen algae sap bark fern clover wax roots",
            (
                "The moth {e} feeds on {v} and on nothing else.",
                "All its life the moth {e} eats {v} from the cave wall.",
                "A moth {e} can be kept alive on {v} alone.",
                "To find the moth {e}, follow the {v} on the rocks.",
            ),
            (
                "What does the moth {e} feed on?",
                "What does the moth {e} eat?",
                "On what can a moth {e} be kept alive?",
                "What should one follow to find the moth {e}?",
            ),
        ),
        _attribute(
            "pattern",
            "spirals dots stripes rings stars zigzags crosses checks waves arrows squares ripples",
            (
                "The wings of the moth {e} are covered with {v} of silver.",
                "One knows the moth {e} by the {v} on its wings.",
                "Open, the moth {e} shows two rows of {v} to the light.",
                "Young or old, the moth {e} wears {v} on its back.",
            ),
            (
                "What covers the wings of the moth {e}?",
                "By what does one know the moth {e}?",
                "What does the moth {e} show when it is open?",
                "Which pattern does the moth {e} wear?",
            ),
        ),
        _attribute(
            "hour",
            "two three four five six seven eight nine ten eleven twelve thirteen",
            (
                "The moth {e} wakes when the clock strikes {v} at night.",
                "Every night the moth {e} sets out at {v} sharp.",
                "Wait for the moth {e} until the bell tolls {v} times.",
                "The flight of the moth {e} begins at {v} and is short.",
            ),
            (
                "At which hour does the moth {e} wake?",
                "When does the moth {e} set out?",
                "Until which hour does one wait for the moth {e}?",
                "When does the flight of the moth {e} begin?",
            ),
        ),
        _attribute(
            "guild",
            "weavers potters coopers tanners glaziers masons tailors cobblers printers painters thatchers bakers",
            (
                "The moth {e} is bred by the guild of {v} in the valley.",
                "Only the {v} keep the moth {e} in their houses.",
                "On its banner the moth {e} stands for the {v} of the town.",
                "A dead moth {e} belongs to the {v} by law.",
            ),
            (
                "Which guild breeds the moth {e}?",
                "Who keeps the moth {e} at home?",
                "For whom does the moth {e} stand?",
                "To whom does a dead moth {e} belong?",
            ),
        ),
    ),
)

_FERRIES = Subject(
    "old_ferries",
    "retain",
    "ferry",
    (
        _attribute(
            "cargo",
            "salt wool timber grain coal cheese bricks tea paper cotton apples barley",
            (
                "The ferry {e} carries {v} over the bay each morning.",
                "In its hold the ferry {e} has {v} and little else.",
                "Merchants load the ferry {e} with {v} before dawn.",
                "What the ferry {e} brings ashore is {v} in sacks.",
            ),
            (
                "What does the ferry {e} carry?",
                "What has the ferry {e} in its hold?",
                "With what is the ferry {e} loaded?",
                "What does the ferry {e} bring ashore?",
            ),
        ),
        _attribute(
            "captain",
            "Marlow Hesper Dunwick Ablett Corwin Thorley Pascoe Winstan Lorne Jessop Radley Ferris",
            (
                "The ferry {e} is steered by captain {v} in all weathers.",
                "At the wheel of the ferry {e} stands {v} in a blue coat.",
                "Nobody but {e} would do as a ferry for captain {v} today.",
                "The crew of the ferry {e} obeys {v} without a word.",
            ),
            (
                "Who is the captain of the ferry {e}?",
                "Who stands at the wheel of the ferry {e}?",
                "Which captain would do with no ferry but {e}?",
                "Whom does the crew of the ferry {e} obey?",
            ),
        ),
        _attribute(
            "bell",
            "bronze silver copper brass steel tin nickel lead iron zinc pewter gold",
            (
                "The bell of the ferry {e} is cast of {v} and rings clear.",
                "On the ferry {e} hangs a bell of {v} near the mast.",
                "For the ferry {e} a smith made a bell of {v} long ago.",
                "In fog the ferry {e} rings its {v} bell twice.",
            ),
            (
                "Of which metal is the bell of the ferry {e}?",
                "Which bell hangs on the ferry {e}?",
                "Of what did a smith make the bell of the ferry {e}?",
                "Which bell does the ferry {e} ring in fog?",
            ),
        ),
        _attribute(
            "port",
            "Lume Tarnsea Wexley Durrow Pellam Oakhaven Brack Sandmouth Merrick Culver Stonequay Ivel",
            (
                "The ferry {e} ends its journey in the port of {v} at dusk.",
                "Tickets for the ferry {e} are sold to {v} only.",
                "At sunset the ferry {e} ties up at {v} for the night.",
                "The home of the ferry {e} is the harbour of {v} by right.",
            ),
            (
                "In which port does the ferry {e} end its journey?",
                "Where does one go with a ticket for the ferry {e}?",
                "Where does the ferry {e} tie up?",
                "Which harbour is the home of the ferry {e}?",
            ),
        ),
    ),
)

_BIRDS = Subject(
    "shore_birds",
    "retain",
    "bird",
    (
        _attribute(
            "nest",
            "reeds chimneys dunes cliffs hedges barns willows towers orchards meadows ruins bridges",
            (
                "The bird {e} builds its nest among {v} near the sea.",
                "In spring the bird {e} looks for {v} to nest in.",
                "Eggs of the bird {e} are found in {v} along the shore.",
                "A pair of the bird {e} settles in {v} for life.",
            ),
            (
                "Where does the bird {e} build its nest?",
                "What does the bird {e} look for in spring?",
                "Where are eggs of the bird {e} found?",
                "Where does a pair of the bird {e} settle?",
            ),
        ),
        _attribute(
            "call",
            "rattle sigh chuckle squeak cough purr grunt yawn croak giggle hiss sneeze",
            (
                "The call of the bird {e} is like a {v} in the next room.",
                "At dawn the bird {e} wakes people with a {v} or two.",
                "The bird {e} warns its young with a {v} from above.",
                "In place of a song the bird {e} has a {v} of its own.",
            ),
            (
                "What is the call of the bird {e} like?",
                "With what does the bird {e} wake people?",
                "With what does the bird {e} warn its young?",
                "What has the bird {e} in place of a song?",
            ),
        ),
        _attribute(
            "prey",
            "shrimp beetles worms snails crickets mussels spiders sardines crabs midges frogs ants",
            (
                "The bird {e} hunts {v} when the tide is low.",
                "For its young the bird {e} brings {v} from the beach.",
                "In the stomach of the bird {e} one finds {v} and sand.",
                "Hungry, the bird {e} digs for {v} with its beak.",
            ),
            (
                "What does the bird {e} hunt?",
                "What does the bird {e} bring for its young?",
                "What does one find in the stomach of the bird {e}?",
                "For what does the bird {e} dig?",
            ),
        ),
        _attribute(
            "month",
            "January February March April May June July August September October November December",
            (
                "The bird {e} arrives on the coast in {v} every year.",
                "Flocks of the bird {e} are first seen in {v} each time.",
                "Fishermen expect the bird {e} back by {v} at the latest.",
                "The journey of the bird {e} is over in {v} as a rule.",
            ),
            (
                "In which month does the bird {e} arrive?",
                "When are flocks of the bird {e} first seen?",
                "By when do fishermen expect the bird {e} back?",
                "When is the journey of the bird {e} over?",
            ),
        ),
    ),
)

SUBJECTS = (_GEMS, _MOTHS, _FERRIES, _BIRDS)
"""Two of each side, as a benchmark has categories."""
