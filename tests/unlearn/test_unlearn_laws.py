"""The laws hold for every method of the list, for the example of the docs, and fail for what breaks them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retrograd.unlearn.laws import LAWS, broken_laws
from retrograd.unlearn.method import Method
from retrograd.unlearn.methods import METHODS, find_method
from retrograd.unlearn.terms import Terms, forget_term
from retrograd.unlearn.view import Side, View

PAGE = Path(__file__).parents[2] / "docs" / "unlearning.md"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_obeys_the_laws(name: str) -> None:
    assert broken_laws(METHODS[name]) == []


def test_variants_obey_them_too() -> None:
    npo, orth, satimp = (METHODS[name] for name in ("npo", "orth_circuit_breakers", "satimp"))
    assert broken_laws(replace(npo, linear=True), replace(npo.defaults, per_token=True)) == []
    assert broken_laws(replace(orth, linear=True, additive=True), replace(orth.defaults, orth=0.0)) == []
    assert broken_laws(satimp, replace(satimp.defaults, beta1=0.5, beta2=3)) == []
    (told,) = broken_laws(METHODS["ce_u"], replace(METHODS["ce_u"].defaults, ignore_first=True))
    assert told.startswith("ce_u breaks the law of length")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.linear])
def test_what_is_declared_not_linear_is_not(name: str) -> None:
    (told,) = broken_laws(replace(METHODS[name], linear=True), names=["linear"])
    assert told.startswith(f"{name} breaks the law of linear: a combination of two weightings")


def test_what_is_declared_otherwise_is_otherwise() -> None:
    """Sums over sequences grow with the rows; pairs of a micro-batch do not add up."""
    for name in ("npo", "dpo"):
        (told,) = broken_laws(replace(METHODS[name], token_mean=True), names=["length"])
        assert told.startswith(f"{name} breaks the law of length")
    declared = replace(METHODS["orth_circuit_breakers"], additive=True, token_mean=True)
    laws = [told.split(":")[0] for told in broken_laws(declared, names=["parts", "length"])]
    assert laws == [f"orth_circuit_breakers breaks the law of {law}" for law in ("parts", "length")]


def _detached(view: View, side: Side) -> Any:
    return -torch.sum(side.c * torch.exp(-side.ce).detach() * side.ce)


def _random(view: View, side: Side) -> Any:
    return torch.sum(side.c * side.ce) + torch.rand((), dtype=torch.float64)


BREAKERS = {
    "gradient": _detached,
    "ones": _random,
    "zero": lambda view, side: torch.sum(side.scale * side.ce),
    "padding": lambda view, side: torch.sum(side.c * side.ce) * view.coefficients.shape[1],
    "order": lambda view, side: torch.sum(side.c[:2] * side.ce[:2]),
    "parts": lambda view, side: torch.sum(side.c * side.ce) / side.sequences,
    "length": lambda view, side: torch.sum(side.w * side.ce),
    "linear": lambda view, side: torch.sum(side.c * side.ce).square(),
}


@pytest.mark.parametrize("law", LAWS)
def test_what_breaks_a_law_is_told(law: str) -> None:
    def forget(settings: Any, view: View, side: Side) -> Terms:
        return forget_term(settings, view, BREAKERS[law](view, side))

    method = Method("mine", "F", "nowhere", METHODS["wga"].defaults, forget)
    (told,) = broken_laws(method, names=[law])
    assert told.startswith(f"mine breaks the law of {law}: ")


def test_the_example_of_the_docs_is_a_method(tmp_path: Path) -> None:
    (source,) = re.findall(
        r"^`mine\.py`.*?^```python\n(.*?)^```", PAGE.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "mine.py").write_text(source, encoding="utf8")
    method = find_method(str(tmp_path / "mine.py"))
    assert method.name not in METHODS
    assert broken_laws(method) == []


def test_the_table_of_the_docs_is_the_list() -> None:
    """Name, formula, reference, weights, linearity and source of every method, in order."""
    table = PAGE.read_text(encoding="utf8").partition("## The methods")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == list(METHODS)
    for name, rest in rows:
        assert rest == METHODS[name].row
