"""An objective is proved before it is used: against the module's own plain forward pass, one document at a time.

    ce_k = −log softmax(module(input_ids=document).logits[k−1])[document_k]

is the loss that every other way to call the model has to give. On a small uneven batch of random documents, `form_of`
finds the ways that do (head fused with its cross-entropy, rows joined, padded or alone, packed rows masked or taken
apart); what gives other losses is not used. Then no loss may move when a later token changes.

Once with the weights as they are, and once with matrices scaled by a power of two, which multiplies back to the same
bits, and what is all zero filled with random numbers: a soft cap, a mask or a bias does nothing to small values. The
head is scaled until its output, before any cap, reaches ±50. What rounding does to such losses is measured, with token
embeddings that are off by some last bits.

Documents have 12 tokens, and so many that they pass each window of the settings where a forward pass of that many costs
less than `_PASS` multiplications. So of a large model a proof takes forward passes of some 500 tokens in all, a
fraction of one training step. Longer rows than a window enter no other way than through the model's own masks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retrograd.core.optim import Params
from retrograd.data.rows import Rows, pad
from retrograd.lm.layout import Form, Layout, twice_differentiable
from retrograd.lm.model import CausalLM, evaluating, objective_of, trainable
from retrograd.lm.scaled import large_values, reading, whole_precision
from retrograd.lm.spans import inner, spans, text_config

__all__ = ["Point", "Proof", "Trial", "at_each_point", "differs", "form_of", "plain_logits", "prove"]

_TOKENS = 12
_PASS = {"cpu": 2e9, "cuda": 4e11}  # multiplications of a forward pass of one document, to pass a window with
_LONGEST = 1024
_SURE = 0.1  # of the largest loss: tolerances beyond it would prove nothing
_FORMS: WeakKeyDictionary[nn.Module, Form] = WeakKeyDictionary()  # proved ones


class Proof(NamedTuple):
    """lengths: tokens of the longest documents. logits: the largest before any cap. error, tolerance: in nats."""

    form: Form
    lengths: tuple[int, ...]
    logits: float
    error: float
    tolerance: float
    seconds: float


class Trial(NamedTuple):
    """Documents a, b, c, d of n, n − 3, n/2 and n/2 tokens, their own losses, and what rounding may do to those."""

    documents: list[Tensor]
    losses: list[Tensor]
    tolerance: float

    def rows(self) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
        """a, b and c as rows; where each document begins: (document, row, column)."""
        return _batch([[0], [1], [2]], self.documents), [(0, 0, 0), (1, 1, 0), (2, 2, 0)]

    def packed(self) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
        """c and d as one row, b as another."""
        second = len(self.documents[2])
        return _batch([[2, 3], [1]], self.documents), [(2, 0, 0), (3, 0, second), (1, 1, 0)]


def form_of(module: nn.Module) -> Form:
    """The ways to call a Hugging Face causal model that give its own losses; found once for each module.

    Experts of a mixture are set to be multiplied one by one.

    Raises:
        ValueError: If not even its rows one after the other do, a document alone cannot be read, or a token's loss
            depends on the tokens after it.
    """
    model = inner(module)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products take no float64, nor forward derivatives
    if module not in _FORMS:
        head = model.get_output_embeddings()
        whole = model.base_model is model
        form = Form(type(head) is nn.Linear and not whole, not whole, True, True)

        def narrow(point: Point, trials: Iterator[Trial]) -> None:
            nonlocal form
            for trial in trials:
                form = _narrowed(module, form, trial, point)

        at_each_point(module, narrow)
        _FORMS[module] = form
    return _FORMS[module]


def prove(lm: CausalLM, *, longest: int | None = None) -> Proof:
    """Hold the objective in use against the model's own losses once more.

    Args:
        longest: Tokens of a further trial, such as the run's longest row.
    Raises:
        ValueError: If they differ.
    """
    start, form = time.monotonic(), form_of(lm.module)
    errors: list[tuple[float, float]] = []
    lengths, sizes = set[int](), [0.0]

    def hold(point: Point, trials: Iterator[Trial]) -> None:
        sizes.append(point.logits)
        for trial in trials:
            lengths.add(len(trial.documents[0]))
            _check_causality(lm.module, trial, point)
            for what, batch in (("rows", trial.rows()), ("packed rows", trial.packed())):
                error = _error(Layout(lm.module, form), trial, *batch, lm.objective)
                if not error <= trial.tolerance:
                    raise differs(lm.module, what, error, trial, point)
                errors.append((error, trial.tolerance))

    at_each_point(lm.module, hold, longest)
    worst = max(errors, key=lambda pair: pair[0] / pair[1])
    return Proof(form, tuple(sorted(lengths)), max(sizes), *worst, time.monotonic() - start)


class Point(NamedTuple):
    """Where the weights stand. words: for messages. logits: the largest before any cap."""

    words: str
    logits: float


def at_each_point(
    module: nn.Module, visit: Callable[[Point, Iterator[Trial]], None], longest: int | None = None
) -> None:
    """Visit the weights as they are, then scaled; the trials are made where they are taken.

    Losses of a diverged model, which are not finite, are equal to nothing: it is visited scaled alone.
    """
    lengths = _lengths(module, longest)
    with evaluating(module), whole_precision(module), torch.no_grad():
        first = _documents(module, lengths[0], 0)[0]
        if torch.isfinite(_losses(module, first)).all():
            visit(Point("its weights as they are", plain_logits(module, first)[1]), _trials(module, lengths))
        with large_values(module, lambda: _judge(module, first)):
            size = plain_logits(module, first)[1]
            visit(Point(f"weights scaled to logits of ±{size:.3g}", size), _trials(module, lengths))


def _trials(module: nn.Module, lengths: list[int]) -> Iterator[Trial]:
    return (_trial(module, _documents(module, length, length)) for length in lengths)


def _trial(module: nn.Module, documents: list[Tensor]) -> Trial:
    losses = [_losses(module, document) for document in documents]
    name, again = type(inner(module)).__name__, _losses(module, documents[0])
    if not torch.equal(losses[0], again):
        moved = float((losses[0] - again).abs().max())
        raise ValueError(
            f"{name} gives other losses, by {moved:.2g} nats, when it reads the same {len(documents[0])} tokens again, "
            "with dropout off: it draws random numbers or keeps something of what it has read. Such a loss has no "
            "derivative; take another model."
        )
    noise = float((_noisy(module, documents[0]) - losses[0]).abs().max())
    size = max(1.0, *(float(own.abs().max()) for own in losses))
    if not 32 * noise <= _SURE * size:
        raise ValueError(
            f"the losses of {name}, up to {size:.3g} nats, are moved by {noise:.2g} nats when token embeddings change "
            f"in their last bits of {losses[0].dtype}: what the objective is cannot be told from rounding. Check the "
            "weights, or take --dtype float64."
        )
    return Trial(documents, losses, max(32 * noise, 64 * torch.finfo(losses[0].dtype).eps * size))


def _narrowed(module: nn.Module, form: Form, trial: Trial, point: Point) -> Form:
    """The form without what gives other losses here."""
    _check_causality(module, trial, point)
    inputs, places = trial.rows()

    def agrees(narrower: Form, inputs: Any = inputs, places: Any = places) -> bool:
        return _error(Layout(module, narrower), trial, inputs, places) <= trial.tolerance

    form = form._replace(fused=form.fused and agrees(Form(True, batches=False)))
    alone = Form(form.fused, batches=False)
    if not form.fused and not (error := _error(Layout(module, alone), trial, inputs, places)) <= trial.tolerance:
        raise differs(module, "rows one after the other", error, trial, point)
    form = form._replace(batches=form.batches and agrees(alone._replace(batches=True)))
    joined = form._replace(masks=False)
    joins = form.fused and form.joins and form.batches and agrees(joined) and agrees(joined, *trial.packed())
    form = form._replace(joins=joins)
    form = form._replace(masks=form.masks and form.batches and agrees(form._replace(masks=True), *trial.packed()))
    error = _error(Layout(module, form._replace(masks=False)), trial, *trial.packed())
    if not error <= trial.tolerance:
        raise differs(module, "packed documents taken apart", error, trial, point)
    return form


def _error(
    layout: Layout, trial: Trial, inputs: dict[str, Tensor], places: list[tuple[int, int, int]],
    objective: Callable[[Params, Any, Tensor], Tensor] | None = None,
) -> float:  # fmt: skip
    """The largest difference of a token's loss from the document's own, in nats; infinite for a call that fails."""
    objective = objective or objective_of(layout)
    device = trial.documents[0].device
    inputs = {name: x.to(device) for name, x in inputs.items() if name != "doc_ids"}
    dtype = trial.losses[0].dtype
    factors = inputs["target_mask"].to(dtype).requires_grad_()
    try:
        with torch.enable_grad():
            loss = objective(trainable(layout.module)[0], inputs, factors)
        (slopes,) = torch.autograd.grad(loss, factors)
    except torch.OutOfMemoryError:  # says nothing of the model, and another run would take another form
        raise
    except Exception:  # a model that cannot be called like this raises what it likes
        return math.inf
    whole = sum(float(trial.losses[document].sum()) for document, _, _ in places)
    errors = [abs(float(loss) - whole) / max(1, int(inputs["target_mask"].sum()))]
    for document, row, column in places:
        own = trial.losses[document]
        errors.append(float((slopes[row, column + 1 : column + 1 + len(own)] - own).abs().max()))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _check_causality(module: nn.Module, trial: Trial, point: Point) -> None:
    """Refuses a model in which a token's loss depends on a later token: the last one, and one in the middle."""
    for document, own in zip(trial.documents[:2], trial.losses[:2], strict=True):
        place = len(document) - 1 if own is trial.losses[0] else len(document) // 2
        changed = document.clone()
        changed[place] = trial.documents[2][-1] if changed[place] != trial.documents[2][-1] else trial.documents[2][0]
        moved = (_losses(module, changed) - own)[: place - 1].abs()
        if not bool((moved <= trial.tolerance).all()):
            token = int(moved.argmax()) + 1
            raise ValueError(
                f"{type(inner(module)).__name__} is not a causal language model: with another token {place} in a text "
                f"of {len(document)} random tokens, the loss of predicting token {token} moves by "
                f"{float(moved.max()):.2g} nats ({point.words}; rounding explains {trial.tolerance:.2g}). Take a model "
                "whose tokens look at those before them only; BERT and its kin need is_decoder=True in their settings."
            )


def differs(module: nn.Module, what: str, error: float, trial: Trial, point: Point) -> ValueError:
    """The error of a model whose losses here are not those of its own forward pass."""
    return ValueError(
        f"the losses of {type(inner(module)).__name__} cannot be attributed: its {what} give other losses than its own "
        f"forward pass does, document by document, by {error:.2g} nats for a token ({point.words}; rounding explains "
        f"{trial.tolerance:.2g}). Take another model, or the Trainer with a loss of your own."
    )


def plain_logits(module: nn.Module, document: Tensor) -> tuple[Tensor, float]:
    """The logits [n, V] of a document alone, and the largest number that the head gives before any cap.

    Raises:
        ValueError: If the model cannot be called so.
    """
    dtype = next(module.parameters()).dtype
    with reading(inner(module).get_output_embeddings()) as seen, twice_differentiable(dtype):
        try:
            logits = module(input_ids=document[None], use_cache=False).logits[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise ValueError(
                f"{type(inner(module)).__name__} cannot read a document of {len(document)} tokens by itself, so no "
                f"objective of it can be proved: {type(error).__name__}: {lines[0] if lines else 'no reason given'}"
            ) from error
    return logits, max(seen, default=float(logits.abs().max()))


def _losses(module: nn.Module, document: Tensor) -> Tensor:
    """The losses [n − 1] of a document's tokens by the module's own forward pass, in nats."""
    logits = plain_logits(module, document)[0]
    wide = logits[:-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, document[1:], reduction="none")


def _noisy(module: nn.Module, document: Tensor) -> Tensor:
    """The same with token embeddings that are off by a few of their last bits."""
    draw = torch.Generator().manual_seed(1)

    def off(_: Any, __: Any, x: Tensor) -> Tensor:
        return x * (1 + 4 * torch.finfo(x.dtype).eps * torch.randn(x.shape, generator=draw).to(x))

    handle = inner(module).get_input_embeddings().register_forward_hook(off)
    try:
        return _losses(module, document)
    finally:
        handle.remove()


def _judge(module: nn.Module, document: Tensor) -> tuple[float, float]:
    """The largest number before any cap, and what rounding does to losses of 1; infinite where they are not finite."""
    logits, size = plain_logits(module, document)
    losses = _losses(module, document)
    if not (torch.isfinite(logits).all() and torch.isfinite(losses).all()):
        return math.inf, math.inf
    noise = (_noisy(module, document) - losses).abs().max() / losses.abs().max().clamp(min=1)
    return size, float(noise.nan_to_num(math.inf))


def _documents(module: nn.Module, length: int, seed: int) -> list[Tensor]:
    """Random tokens, of which none stands for something else than text."""
    embedding = inner(module).get_input_embeddings().weight
    own, config = text_config(module), inner(module).config
    special = {
        value for settings in (vars(config), vars(own)) for name, value in settings.items()
        if name.endswith(("_token_id", "_token_index")) and type(value) is int
    }  # fmt: skip
    ends = [getattr(own, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    spoken = {token for end in ends for token in (end if isinstance(end, list) else [end])}
    vocabulary = min(len(embedding), getattr(own, "vocab_size", None) or len(embedding))
    known = np.array(sorted(set(range(min(vocabulary, 65536))) - (special - spoken)))
    draw = np.random.default_rng(seed)
    sizes = (length, max(2, length - 3), max(2, length // 2), max(2, length - length // 2))
    return [torch.from_numpy(draw.choice(known, size)).to(embedding.device) for size in sizes]


def _batch(rows: list[list[int]], documents: list[Tensor]) -> dict[str, Tensor]:
    """The documents as they come out of a data set, packed if a row has several."""
    parts = [[(document, documents[document].cpu().numpy()) for document in row] for row in rows]
    ids = [np.concatenate([tokens for _, tokens in row]) for row in parts]
    owners = [np.concatenate([np.full(len(tokens), document) for document, tokens in row]) for row in parts]
    masks = [np.concatenate([np.arange(len(tokens)) > 0 for _, tokens in row]) for row in parts]
    packed = any(len(row) > 1 for row in rows)
    return pad(Rows(ids, masks, owners, len(documents), {}, packed=packed), range(len(rows)))


def _lengths(module: nn.Module, longest: int | None) -> list[int]:
    """Tokens of the longest document of each trial: a few, each window, and a little more than each window."""
    context = getattr(text_config(module), "max_position_embeddings", None) or 0
    context = context if context > 0 else _LONGEST  # −1: as many as one likes
    size, device = sum(p.numel() for p in module.parameters()), next(module.parameters()).device.type
    most = min(context, _LONGEST, int(_PASS.get(device, _PASS["cpu"]) / size))
    base = min(_TOKENS, context)
    passing = {length for span in spans(module) for length in (span, span + 3, 3 * span + 2) if length <= most}
    further = {min(longest, context)} if longest is not None else set()
    return [base, *sorted((passing | further) - {base})]
