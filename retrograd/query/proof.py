"""Letters, answers by text and continuations as they are asked for, against a model's own logits of each text alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from retrograd.lm.generate import continuations
from retrograd.lm.model import CausalLM, trainable
from retrograd.lm.proof import Point, Trial, at_each_point, differs, plain_logits
from retrograd.query.choices import score_questions
from retrograd.query.prompts import find_template
from retrograd.query.questions import Questions

__all__ = ["prove_answers"]

_PROVED: WeakSet[nn.Module] = WeakSet()


def prove_answers(lm: CausalLM, *, again: bool = False) -> None:
    """Hold letters, answers by text and continuations against the model's own logits, one text at a time.

    Args:
        again: Also for a model that was proved before.
    Raises:
        ValueError: If they differ.
    """
    if lm.module in _PROVED and not again:
        return

    def hold(point: Point, trials: Iterator[Trial]) -> None:
        trial = next(trials)
        for what, error in _errors(lm, trial.documents, lambda text: plain_logits(lm.module, text)[0]):
            if not error <= trial.tolerance:
                raise differs(lm.module, what, error, trial, point)

    at_each_point(lm.module, hold)
    _PROVED.add(lm.module)


def _errors(lm: CausalLM, documents: Sequence[Tensor], own: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, float]]:
    """What is asked for, and its largest difference in nats.

    Args:
        documents: At least two texts of different lengths, [n_i].
        own: The logits [n, V] of a text [n] alone.
    """
    params = trainable(lm.module)[0]
    prompts = [document[: max(1, len(document) // 2)] for document in documents]
    letters = torch.stack([documents[0][-1], documents[1][0]])
    asked = _asked("letter", [[prompt] for prompt in prompts], [[letters]] * len(prompts), letters=2)
    scored = score_questions(lm, params, asked, len(prompts), failures="mark").logprobs
    expected = torch.stack([_logprobs(own(prompt))[-1, letters] for prompt in prompts])
    yield "letters", _difference(scored, expected)

    # of each text two options, its next token and all the rest of it
    options = [[document[len(p) : len(p) + 1], document[len(p) :]] for p, document in zip(prompts, documents)]
    rows = [[torch.cat([p, answer[:-1]]) for answer in both] for p, both in zip(prompts, options)]
    asked = _asked("cloze", rows, options)
    scored = score_questions(lm, params, asked, len(prompts), failures="mark").logprobs
    each = [
        [_logprobs(own(row))[-len(answer) :].gather(1, answer[:, None]).sum() for row, answer in zip(*pair)]
        for pair in zip(rows, options)
    ]
    tokens = max(len(answer) for both in options for answer in both)
    yield "answers by text", _difference(scored, torch.tensor(each)) / tokens

    texts = [prompt.cpu().numpy() for prompt in prompts]
    said = continuations(lm, params, texts, 2, end=None, longest=None)
    yield (
        "continuations",
        max(
            torch.inf if new is None else _regret(own, prompt, torch.from_numpy(new).to(prompt))
            for prompt, new in zip(prompts, said)
        ),
    )


def _asked(form: str, rows: list[list[Tensor]], targets: list[list[Tensor]], letters: int | None = None) -> Questions:
    def arrays(parts: list[list[Tensor]]) -> list[list[np.ndarray]]:
        return [[part.cpu().numpy() for part in some] for some in parts]

    widths = [np.ones(letters or len(some), dtype=np.int64) for some in targets]
    gold = np.zeros(len(rows), dtype=np.int64)
    return Questions(form, arrays(rows), arrays(targets), gold, widths, [""] * len(rows), find_template(None, form))


def _logprobs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _difference(measured: Tensor, expected: Tensor) -> float:
    return float((measured - expected.to(measured)).abs().nan_to_num(torch.inf).max())


def _regret(own: Callable[[Tensor], Tensor], prompt: Tensor, new: Tensor) -> float:
    """By how much less likely a token is than the likeliest one, at most."""
    logprobs = _logprobs(own(torch.cat([prompt, new])))[len(prompt) - 1 : -1]
    return float((logprobs.max(1).values - logprobs.gather(1, new[:, None])[:, 0]).max())
