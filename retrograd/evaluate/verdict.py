"""Is this model still a model? A verdict with the numbers that led to it, against a reference.

    destroyed   some answer or loss is not finite; or the letters do not depend on the questions: entropy below 0.3
                nats, one letter above 90 %, or one answer for 90 % of the questions in a fixed rhythm; or perplexity
                above twice the reference's; or less than a quarter is left of the reference's lead over chance
    damaged     significantly fewer right answers than the reference, or perplexity above 1.1 of it, or less than half
                of its probability on the letters
    healthy     compared with the reference, and none of these
    untouched   the same weights as the reference
    None        nothing that could be compared measures general ability, or a part of it is missing

General ability is every task whose role is not forget. Chance is the best constant letter, or 1/options by text. A
letter habit that the right answers have too, or the reference (but for the reference itself), is no evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from retrograd.evaluate.intervals import compare, wilson
from retrograd.evaluate.letter_habits import LetterHabits, letter_habits
from retrograd.query.choices import Scored
from retrograd.query.prepare import Answers, Texts
from retrograd.settings.tasks import Task

__all__ = ["VERDICTS", "Diagnosis", "Evaluated", "counted", "diagnose"]

VERDICTS = ("untouched", "healthy", "damaged", "destroyed")
_NONE = "no verdict"

ENTROPY = 0.3  # nats
ONE_LETTER = RHYTHM = 0.9
HABITUAL = 0.75  # right answers above this are themselves nearly one letter, or a rhythm
FEWEST = 20  # questions for a habit
TWICE, MORE = 2.0, 1.1  # perplexity over the reference's
LEFT = 0.25  # of the reference's lead over chance
SIGNIFICANT = 0.01  # shared among the tasks


def counted(verdicts: Iterable[str | None]) -> dict[str, int]:
    """How often each verdict was found, from the best to the worst, and last "no verdict".

    >>> counted(["damaged", None, "healthy", "damaged"])
    {'healthy': 1, 'damaged': 2, 'no verdict': 1}
    """
    names = [verdict or _NONE for verdict in verdicts]
    return {verdict: names.count(verdict) for verdict in (*VERDICTS, _NONE) if verdict in names}


class Evaluated(NamedTuple):
    """A model's results by task or group; None where missing. digest: of its parameters, None if they never loaded."""

    name: str
    digest: str | None
    results: Mapping[str, Any]


class Diagnosis(NamedTuple):
    """verdict: of VERDICTS, or None; reasons: for people; numbers: all that was looked at, by task."""

    verdict: str | None
    reasons: list[str]
    numbers: dict[str, Any]


class _Finding(NamedTuple):
    verdict: str
    reason: str


def diagnose(model: Evaluated, reference: Evaluated, tasks: dict[str, Task]) -> Diagnosis:
    """The verdict on a model.

    Args:
        tasks: What counts, by the names of the results: groups (any of their tasks) instead of their parts.
    """
    same = model.digest is not None and model.digest == reference.digest
    model, reference = (
        evaluated._replace(results={name: evaluated.results[name] for name in tasks})
        for evaluated in (model, reference)
    )
    findings = [*_failures(model), *_habits(model, None if same else reference)]
    numbers: dict[str, Any] = {"same_weights": same, "letters": _letters(model)}
    if same:
        verdict = findings[0].verdict if findings else "untouched"
        which = "it is the reference" if model.name == reference.name else "the same weights as the reference"
        return Diagnosis(verdict, [*(f.reason for f in findings), which], numbers)
    general = {name: task for name, task in tasks.items() if task.role != "forget" and task.ordinary}
    seen: set[str] = set()
    findings += list(_perplexities(model, reference, general, numbers, seen))
    findings += list(_abilities(model, reference, general, numbers, seen))
    missing = [name for name in general if model.results.get(name) is None or reference.results.get(name) is None]
    reasons = [finding.reason for finding in findings]
    for verdict in ("destroyed", "damaged"):
        if any(finding.verdict == verdict for finding in findings):
            return Diagnosis(verdict, reasons, numbers)
    if missing:
        return Diagnosis(None, [f"missing: {', '.join(missing)}"], numbers)
    if not seen:
        why = "nothing here measures general ability where the reference has some: add a retain task or a text"
        return Diagnosis(None, [why], numbers)
    return Diagnosis("healthy", [f"no loss found in {', '.join(sorted(seen))}"], numbers)


def _failures(model: Evaluated) -> Iterator[_Finding]:
    for name, measured in model.results.items():
        if isinstance(measured, Answers) and measured.scored.failed.any():
            bad, n = int(measured.scored.failed.sum()), len(measured.scored.gold)
            yield _Finding("destroyed", f"{name}: {bad} of {n} questions have no finite log-probability")
        if isinstance(measured, Texts) and not math.isfinite(measured.perplexity):
            yield _Finding("destroyed", f"{name}: the perplexity is not finite")


def _letters(model: Evaluated) -> dict[str, Any]:
    by_letter = {name: _by_letter(measured) for name, measured in model.results.items()}
    return {name: habits._asdict() for name, habits in by_letter.items() if habits}


def _by_letter(measured: Any) -> LetterHabits | None:
    if not isinstance(measured, Answers) or measured.scored.mass is None:
        return None
    return letter_habits(measured.scored)


def _habits(model: Evaluated, reference: Evaluated | None) -> Iterator[_Finding]:
    for name, measured in model.results.items():
        habits = _by_letter(measured)
        usual = _by_letter(reference.results.get(name)) if reference else None
        if habits and not (usual and _habit(usual)) and (words := _habit(habits)):
            yield _Finding("destroyed", f"{name}: {words}")


def _habit(habits: LetterHabits) -> str | None:
    """How the letters show that the questions do not matter; None if they do not."""
    if habits.questions < FEWEST:
        return None
    share = max(habits.shares)
    letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[habits.shares.index(share)]
    if max(habits.constant) < HABITUAL:
        if share > ONE_LETTER:
            return f"{letter} is the answer to {share:.0%} of {habits.questions} questions"
        if habits.entropy < ENTROPY:
            return f"the letters' entropy is {habits.entropy:.2f} nats"
    if habits.period > 1 and habits.rhythm > RHYTHM and habits.gold_rhythm < HABITUAL:
        return f"{habits.rhythm:.0%} of the answers repeat the one {habits.period} questions before"
    return None


def _perplexities(
    model: Evaluated, reference: Evaluated, general: dict[str, Task], numbers: dict[str, Any], seen: set[str]
) -> Iterator[_Finding]:
    for name in general:
        here, there = model.results.get(name), reference.results.get(name)
        if not isinstance(here, Texts) or not isinstance(there, Texts):
            continue
        if not (math.isfinite(here.perplexity) and math.isfinite(there.perplexity)):
            continue
        seen.add(name)
        ratio = here.perplexity / there.perplexity
        numbers.setdefault("perplexity_ratio", {})[name] = ratio
        if ratio > MORE:
            words = f"{name}: perplexity {here.perplexity:.4g}, {ratio:.3g} times the reference's"
            yield _Finding("destroyed" if ratio > TWICE else "damaged", words)


def _abilities(
    model: Evaluated, reference: Evaluated, general: dict[str, Task], numbers: dict[str, Any], seen: set[str]
) -> Iterator[_Finding]:
    asked = [name for name, task in general.items() if task.choices]
    for name in asked:
        here, there = model.results.get(name), reference.results.get(name)
        if not isinstance(here, Answers) or not isinstance(there, Answers):
            continue
        a, b = there.rights(general[name]), here.rights(general[name])
        if a.isnan().any() or b.isnan().any():
            continue
        floor, had, has = _chance(there.scored), float(a.mean()), float(b.mean())
        led = wilson(int(a.sum()), len(a)).low > floor
        paired = compare(a, b, resamples=1)
        left = (has - floor) / (had - floor) if led else None
        numbers.setdefault("ability", {})[name] = {"chance": floor, "lead_left": left, "p": paired.p}
        if led:
            seen.add(name)
        if has < had and paired.p < SIGNIFICANT / len(asked):
            gone = left is not None and left < LEFT
            kept = "" if left is None else f"; {max(left, 0):.0%} of its lead over chance is left"
            words = f"{name}: {has:.1%} right, the reference {had:.1%} (p = {paired.p:.1g}){kept}"
            yield _Finding("destroyed" if gone else "damaged", words)
        mass, usual = here.scored.mass, there.scored.mass
        if mass is not None and usual is not None and 0.1 < float(usual.mean()) > 2 * float(mass.mean()):
            words = f"{float(mass.mean()):.1%} of the probability on letters, the reference {float(usual.mean()):.1%}"
            yield _Finding("damaged", f"{name}: {words}")


def _chance(scored: Scored) -> float:
    """Accuracy of the best constant letter; by text, of a guess."""
    options = (scored.widths > 0).sum(1).double()
    if scored.mass is None:
        return float((1 / options).mean())
    return float(torch.bincount(scored.gold).double().max() / len(scored.gold))
