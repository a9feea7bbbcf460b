"""The objective is the module's, row by row and packed, or refused in words: every causal architecture there is."""

from __future__ import annotations

import architectures
import pytest


@pytest.mark.parametrize("kind", architectures.DOZEN)
def test_a_dozen(kind: str) -> None:
    found = architectures.examine(kind)
    assert found.form is not None, found.reason
    assert found.error < 1e-3
    assert found.form.fused == (kind not in ("nanochat", "cohere"))
    assert found.form.masks == (kind not in ("lfm2", "mamba", "qwen3_next", "bart"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_architecture() -> None:
    """See docs/architectures.md, which the same examination writes."""
    found = [architectures.examine(kind) for kind in architectures.kinds()]
    taken = [one for one in found if one.form]
    assert len(taken) >= 120
    assert all(one.reason for one in found if one.form is None)
    untried = [one for one in found if one.reason.startswith("not tried")]
    assert len(untried) <= 25, [one.kind for one in untried]
    text = architectures.page(found)
    assert all(f"| {one.kind} |" in text for one in found)
