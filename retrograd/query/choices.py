"""Multiple choice: one scorer that is both the metric and the differentiable query.

Log-probabilities of a question's options, in nats, from logits at the answers' positions only:

    letter   s_o = log softmax_V(z)[letter o]               z at the prompt's last token
    cloze    s_o = Σ_k log p(t_k | prompt, t_<k)            over the tokens t of option o's text

and s_o / (characters of option o) where normalised, as lm-eval's acc_norm. The metric is whether argmax_o s_o is the
right option g; the losses, averaged over questions, are

    full        −s_g                        falls also when all letters become more likely
    four_way    −log softmax_o(s)[g]        over the question's own options, however many: what accuracy measures

For letters four_way is −log softmax(z[A, B, …])[g]: the rest of the vocabulary cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from retrograd.core.optim import Params
from retrograd.core.step import Batch, Objective
from retrograd.lm.model import CausalLM, causal_logits
from retrograd.query.questions import Questions, build_questions
from retrograd.settings.question import ChoiceLoss

__all__ = [
    "LOSSES",
    "Questions",
    "Scored",
    "build_questions",
    "choice_columns",
    "choice_objective",
    "score_questions",
]

LOSSES: tuple[ChoiceLoss, ...] = get_args(ChoiceLoss)


@dataclass(frozen=True, eq=False)
class Scored:
    """What a model answers; on the CPU, float64. A question with a non-finite option is failed: missing, never wrong.

    Args:
        logprobs: s of each option in nats, [n, most options]; −inf where a question has no such option.
        widths: Characters of each option, [n, most options]; letter: ones.
        gold: The right option, [n] int64.
        mass: Probability of all of the question's letters together, [n]; None for cloze.
        hashes: Of the prompts.
        tokens: Tokens of each option's text, [n, most options]; None by letter, or where they were not kept.
    """

    logprobs: Tensor
    widths: Tensor
    gold: Tensor
    mass: Tensor | None
    hashes: list[str]
    tokens: Tensor | None = None

    @property
    def failed(self) -> Tensor:
        """Questions without an answer, [n] bool."""
        return ~torch.isfinite(self.logprobs.where(self.widths > 0, 0.0)).all(1)

    @property
    def chosen(self) -> Tensor:
        """The likeliest option, the first of equals, [n] int64; −1 where failed."""
        return self.logprobs.argmax(1).where(~self.failed, -1)

    @property
    def chosen_norm(self) -> Tensor:
        """The likeliest option per character, [n] int64; −1 where failed."""
        return (self.logprobs / self.widths.clamp(min=1)).argmax(1).where(~self.failed, -1)

    @property
    def correct(self) -> Tensor:
        """1, 0, or NaN where failed, [n]."""
        return self._right(self.chosen)

    @property
    def correct_norm(self) -> Tensor:
        """The same per character, [n]."""
        return self._right(self.chosen_norm)

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN if any question failed."""
        return float(self.correct.mean())

    @property
    def accuracy_norm(self) -> float:
        """Share right by log-probability per character; NaN if any question failed."""
        return float(self.correct_norm.mean())

    def _right(self, chosen: Tensor) -> Tensor:
        return (chosen == self.gold).double().where(~self.failed, torch.nan)


def choice_columns(
    questions: Questions,
    reduction: str = "mean",
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> list[list[Batch]]:
    """For each query column, the batches whose choice objective sums to its loss; `index` is the question's number.

    Args:
        reduction: "mean": one column, the mean over questions; "none": one column for each question.
        batch_size: Questions that the model reads at once; cloze: with all their options.
    Raises:
        ValueError: If the reduction is unknown, batch_size below 1, or there is no question.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"unknown query reduction {reduction!r}; it is mean (one score) or none (one per question)")
    n = len(questions)
    if not n:
        raise ValueError("0 questions have no mean loss; give at least one")
    groups = [[q] for q in range(n)] if reduction == "none" else _groups(questions, batch_size)
    share = 1.0 if reduction == "none" else 1 / n
    batches = []
    for group in groups:
        index = torch.tensor(group, dtype=torch.int64, device=device)
        scale = torch.full((len(group),), share, dtype=dtype, device=device)
        batches.append(Batch(_collate(questions, group, dtype, device), index, scale))
    assert sum(len(batch.index) for batch in batches) == n, "every question is asked once"
    return [[batch] for batch in batches] if reduction == "none" else [batches]


def choice_objective(lm: CausalLM, loss: str = "four_way", *, normalise: bool = False) -> Objective:
    """(params, inputs, coefficients [B]) → Σ_q c_q · loss_q in nats, [], for batches of `choice_columns`.

    Dropout is off even where the model was loaded with it.

    Args:
        loss: "four_way" or "full".
        normalise: Divide each option's log-probability by its characters (letters: by 1).
    Raises:
        ValueError: If the loss is unknown.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown choice loss {loss!r}; it is four_way (among the options) or full (the right one's)")
    options = _option_logprobs(lm)

    def objective(params: Params, inputs: Any, coefficients: Tensor) -> Tensor:
        scores, _ = options(params, inputs)
        there = inputs["widths"] > 0
        if normalise:
            scores = scores / inputs["widths"].clamp(min=1).to(scores)
        if loss == "four_way":
            scores = scores.masked_fill(~there, -torch.inf).log_softmax(1)
        losses = -scores.gather(1, inputs["gold"][:, None]).squeeze(1)
        return torch.sum(losses * coefficients)

    return objective


@torch.no_grad()
def score_questions(
    lm: CausalLM, params: Params, questions: Questions, batch_size: int = 8, *, failures: str = "raise"
) -> Scored:
    """The model's answer to every question, in their order.

    Args:
        batch_size: Questions read at once.
        failures: "raise" if an option's log-probability is not finite, or "mark": such a question is missing.
    Raises:
        ValueError: If a question failed and failures are not to be marked.
    """
    if failures not in ("raise", "mark"):
        raise ValueError(f"failures is {failures!r}; it is raise, or mark (failed questions are missing)")
    options = _option_logprobs(lm)
    first = next(iter(params.values()))
    dtype = torch.promote_types(first.dtype, torch.float32)  # bfloat16 has no 257 characters
    logprobs = torch.full((len(questions), int(questions.options.max(initial=1))), -torch.inf, dtype=torch.float64)
    widths, mass = torch.zeros_like(logprobs), torch.zeros(len(questions), dtype=torch.float64)
    for group in _groups(questions, batch_size):
        inputs = _collate(questions, group, dtype, first.device)
        scores, there = (tensor.cpu() for tensor in options(params, inputs))
        at = torch.tensor(group)
        logprobs[at, : scores.shape[1]] = scores.double().masked_fill(~there, -torch.inf)
        widths[at, : scores.shape[1]] = inputs["widths"].double().cpu()
        mass[at] = logprobs[at].exp().sum(1)
    letter = questions.form == "letter"
    tokens = None if letter else torch.from_numpy(_padded([np.array([*map(len, t)]) for t in questions.targets]))
    gold = torch.from_numpy(questions.gold)
    scored = Scored(logprobs, widths, gold, mass if letter else None, questions.hashes, tokens)
    if failures == "raise" and scored.failed.any():
        q = int(scored.failed.nonzero()[0])
        raise ValueError(
            f"{int(scored.failed.sum())} of {len(questions)} questions have no finite log-probability, question {q} "
            f"first: {logprobs[q].tolist()}. The parameters have overflowed: check them, or give failures='mark'"
        )
    return scored


def _groups(questions: Questions, batch_size: int) -> list[list[int]]:
    """Questions of similar length together, the longest first: what does not fit into memory fails at once."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it has to be at least 1")
    order = np.argsort(-questions.lengths, kind="stable").tolist() if len(questions) else []
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _collate(
    questions: Questions, group: Sequence[int], dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """Inputs of a batch of B questions with up to O options, right-padded.

    Both: gold [B]; widths [B, O], 0 where there is no such option.
    Letter: input_ids [B, L]; last [B], the prompt's last position; letters [B, O].
    Cloze: input_ids [B, O, L]; columns, targets [B, O, T]: what predicts the answer's token k, and that token;
    target_mask [B, O, T].
    """
    rows = [questions.rows[q] for q in group]
    targets = [questions.targets[q] for q in group]
    batch: dict[str, Any] = {"gold": questions.gold[list(group)]}
    widths = _padded([questions.widths[q] for q in group])
    if questions.form == "letter":
        batch |= {"input_ids": _padded([row[0] for row in rows]), "letters": _padded([t[0] for t in targets])}
        batch["last"] = np.array([len(row[0]) - 1 for row in rows])
    else:
        options = widths.shape[1]
        empty = [np.zeros(0, dtype=np.int64)]
        every = [row for of_question in rows for row in of_question + empty * (options - len(of_question))]
        answers = [answer for of_question in targets for answer in of_question + empty * (options - len(of_question))]
        columns = [np.arange(len(row) - len(answer), len(row)) for row, answer in zip(every, answers)]
        shape = (len(group), options, -1)
        batch |= {"input_ids": _padded(every).reshape(shape), "targets": _padded(answers).reshape(shape)}
        batch["columns"] = _padded(columns).reshape(shape)
        batch["target_mask"] = _padded([np.ones(len(answer), dtype=bool) for answer in answers]).reshape(shape)
    inputs = {name: torch.from_numpy(values).to(device) for name, values in batch.items()}
    return inputs | {"widths": torch.from_numpy(widths).to(device, dtype)}


def _padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((len(parts), max(map(len, parts))), dtype=parts[0].dtype)
    for place, part in enumerate(parts):
        out[place, : len(part)] = part
    return out


def _option_logprobs(lm: CausalLM) -> Callable[[Params, dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """(params, inputs) → s [B, O], of any finite value where there is no such option, and where there is one."""
    logits = causal_logits(lm)

    def letters(params: Params, inputs: dict[str, Tensor]) -> Tensor:
        rows = torch.arange(len(inputs["last"]), device=inputs["last"].device)
        return logits(params, inputs["input_ids"], rows, inputs["last"]).log_softmax(1).gather(1, inputs["letters"])

    def texts(params: Params, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["target_mask"]
        there = mask.any(2)  # the model does not read rows of padding
        rows = mask[there].nonzero()[:, 0]
        z = logits(params, inputs["input_ids"][there], rows, inputs["columns"][mask])
        each = z.log_softmax(1).gather(1, inputs["targets"][mask][:, None]).squeeze(1)
        return each.new_zeros(mask.shape).masked_scatter(mask, each).sum(2)

    def options(params: Params, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return (letters if "letters" in inputs else texts)(params, inputs), inputs["widths"] > 0

    return options
