"""Hugging Face causal language models as chains of their decoder layers, for the `blocks` engine.

The chain is found by structure and proved by trial, not looked up by model name. A candidate is a `ModuleList` of
layers of one type. With the layers' own work left out (each hands on what it gets), the base model's forward still
embeds the tokens and makes masks, positions and rotary embeddings, which are recorded layer by layer; with the last
layer handing on a given x instead, the same forward is what follows the layers. So packed rows, sliding windows and
position schemes are the model's own code. Then gradient and pullback on a small batch must be the model's own
(`chain_proof.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from retrograd.core import tree
from retrograd.core.engine.blocks import Chain
from retrograd.core.engine.heads import Found, PlainHead
from retrograd.core.engine.passes import Link, vjp
from retrograd.core.optim import Params
from retrograd.core.step import Batch
from retrograd.lm.chain_proof import prove_chain
from retrograd.lm.head import head_first, head_second
from retrograd.lm.layout import Layout
from retrograd.lm.model import causal_objective, trainable
from retrograd.lm.proof import form_of
from retrograd.lm.spans import inner

__all__ = ["VocabularyHead", "decoder_chain"]

_Index = tuple[Any, Tensor]


def decoder_chain(module: nn.Module, alike: bool = False) -> Chain:
    """The chain embed → decoder layers → final norm → vocabulary head of a Hugging Face causal model.

    Parameters go by the names of `trainable(module)`. The trial costs some 100 forward passes of 10 tokens and, for its
    duration, the memory of an eighth of the parameters twice, or of a few of the largest leaf.

    Args:
        alike: Layers of one structure share one function, the first one's, which the others' parameters and buffers
            are put into: one compilation then serves them all.
    Raises:
        ValueError: If no chain of layers in the model has the model's gradient and pullback.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2))
    >>> [sorted(link.names)[0] for link in decoder_chain(model).links]
    ['attn.c_attn.bias', 'attn.c_attn.bias', 'attn.c_attn.bias', 'ln_f.bias']
    """
    was_training = module.training
    module.eval()
    reasons = []
    try:
        for name, layers in _candidates(inner(module).base_model):
            try:
                chain = _Parts(module, layers).chain(alike)
                objective, batch = causal_objective(module)[0], _trial_batch(module)
                weights = torch.linspace(0.5, 1.5, batch.index.numel()).to(batch.scale)
                prove_chain(chain, objective, trainable(module)[0], batch, weights)
            except (ValueError, RuntimeError) as error:
                reasons.append(f"{name}: {str(error).strip().splitlines()[0]}")
            else:
                return chain
    finally:
        module.train(was_training)
    raise ValueError(
        f"{type(inner(module)).__name__} cannot be cut into a chain of its layers: "
        f"{'; '.join(reasons) or 'it has no ModuleList of layers of one type'}. Use the engine 'double' for this model."
    )


@dataclass(frozen=True, eq=False)
class VocabularyHead:
    """A bare linear layer and the weighted cross-entropy, in chunks of tokens: logits [B, T, V] never exist."""

    names: Mapping[str, str]
    linear: nn.Linear
    layout: Layout

    def first(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> Found:
        operands, place, _ = self._operands(params, x, inputs, factors)
        ce, pw, (dh, dw, db) = head_first(operands, self._wanted())
        assert dh is not None
        loss = torch.dot(ce, operands[4].to(ce)).to(factors.dtype)
        return Found(x, loss, _spread(dh, x, place), self._grads(params, dw, db), pw)

    def second(
        self, params: Params, x: Tensor, inputs: Any, factors: Tensor, kept: Any, bars: Params, dots: Tensor
    ) -> tuple[Tensor, Tensor, Params, Tensor]:
        operands, place, after = self._operands(params, x, inputs, factors)
        local = {name: bars[leaf] for name, leaf in self.names.items()}
        tangents = [
            (dot[place], *(local[name][k] if name in local else None for name in ("weight", "bias")), None)
            for k, dot in enumerate(dots)
        ]
        dh, along = head_second(operands, tangents, self._wanted(), kept)
        assert dh is not None
        each = [self._grads(params, dw, db) for _, dw, db, _ in along]
        slopes = factors.new_zeros((len(dots), *factors.shape))
        for k, (*_, slope) in enumerate(along):
            slopes[k][after] = slope.to(slopes)
        back = torch.stack([_spread(moved, x, place) for moved, *_ in along if moved is not None])
        return _spread(dh, x, place), back, {name: tree.stacked([g[name] for g in each]) for name in each[0]}, slopes

    def _wanted(self) -> tuple[bool, bool, bool]:
        return True, "weight" in self.names, "bias" in self.names

    def _operands(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> tuple[Any, _Index, _Index]:
        """What the head's loss is a function of; where its states are in x, and its coefficients in `factors`."""
        weight, bias = (
            params[self.names[name]] if name in self.names else getattr(self.linear, name)
            for name in ("weight", "bias")
        )
        place, after, targets = self.layout.predicting(inputs)
        return (x[place], weight, bias, targets, factors[after]), place, after

    def _grads(self, params: Params, dw: Tensor | None, db: Tensor | None) -> Params:
        grads = {"weight": dw, "bias": db}
        return {leaf: g.to(params[leaf]) for name, leaf in self.names.items() if (g := grads[name]) is not None}


def _spread(chosen: Tensor, like: Tensor, place: _Index) -> Tensor:
    """Zeros like x but for the rows that predict a target."""
    whole = torch.zeros_like(like)
    whole[place] = chosen.to(like)
    return whole


def _candidates(base: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Lists of layers of one type, the largest first."""
    lists = [
        (name, list(child))
        for name, child in base.named_modules()
        if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1
    ]
    return sorted(lists, key=lambda pair: -sum(p.numel() for layer in pair[1] for p in layer.parameters()))


class _Parts:
    """The parts of a model around a list of its layers, each a function of its own parameters."""

    def __init__(self, module: nn.Module, layers: list[nn.Module]) -> None:
        self.module, self.model, self.layers = module, inner(module), layers
        self.base, self.layout = self.model.base_model, Layout(module, form_of(module))
        self.fused = self.layout.form.fused
        self.leaves, readers = trainable(module)
        self.leaf_of = {id(p): readers[n] for n, p in module.named_parameters(remove_duplicate=False) if n in readers}

    def chain(self, alike: bool) -> Chain:
        """The chain, with each parameter where it is used.

        Raises:
            ValueError: If the model does not run its layers as a chain.
        """
        batch = _trial_batch(self.module)
        links = self._shared_links() if alike else [Link(self._names(x), _layer_call(x)) for x in self.layers]
        with self.layout.scope(batch.scale.dtype):
            x = self._enter(batch.inputs)
            embed = Link(self._used(self.base, lambda p: self.embed(p, batch.inputs)[0]), self.embed)
            if self.fused:
                links.append(Link(self._used(self.base, lambda p: self.tail(p, x, batch.inputs)), self.tail))
                linear = self.model.get_output_embeddings()
                head: Any = VocabularyHead(self._names(linear), linear, self.layout)
            else:
                head = PlainHead(self._used(self.model, lambda p: self.logits(p, x, batch.inputs)), self.loss)
            lookup = _is_lookup(embed, self.leaves, batch.inputs)
        self.leaves = {}  # the chain lives as long as the run, and what it is called with need not
        return Chain(embed, links, head, self.layout.scope, lookup)

    def _shared_links(self) -> list[Link]:
        """Links of layers of one structure with one function."""
        calls: dict[Any, Callable[[Params, Tensor, Any], Tensor]] = {}
        links = []
        for layer in self.layers:
            names = self._names(layer)
            held = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            constants = {name: x.detach() for name, x in held if name not in names}
            call = calls.setdefault(_structure(layer, names), _layer_call(layer))
            links.append(Link(names, call, constants))
        return links

    def embed(self, params: Params, inputs: Any, _: Any = None) -> tuple[Tensor, list[Any]]:
        """What enters the first layer, and for each link what else it is called with."""
        seen: list[tuple[int, Tensor, Any]] = []
        with _replaced(self.layers, [_recording(seen, place) for place in range(len(self.layers))]):
            functional_call(self.base, params, (), self.layout.arguments(inputs), tie_weights=False)
        contexts = [context for _, _, context in seen]
        return seen[0][1], [*contexts, inputs] if self.fused else contexts

    def tail(self, params: Params, x: Tensor, inputs: Any) -> Tensor:
        """What follows the last layer in the base model: the final norm."""
        with _replaced(self.layers, _handing_on(x, len(self.layers))):
            arguments = self.layout.arguments(inputs)
            return functional_call(self.base, params, (), arguments, tie_weights=False).last_hidden_state

    def logits(self, params: Params, x: Tensor, inputs: Any) -> Tensor:
        """What follows the last layer in the whole model."""
        with _replaced(self.layers, _handing_on(x, len(self.layers))):
            arguments = self.layout.arguments(inputs)
            return functional_call(self.model, params, (), arguments, tie_weights=False).logits

    def loss(self, params: Params, x: Tensor, inputs: Any, factors: Tensor) -> Tensor:
        return self.layout.loss(self.logits(params, x, inputs), inputs, factors)

    def _names(self, part: nn.Module) -> dict[str, str]:
        """The leaf behind each of a part's parameters that has one."""
        named = part.named_parameters(remove_duplicate=False)
        return {name: self.leaf_of[id(p)] for name, p in named if id(p) in self.leaf_of}

    def _around(self, part: nn.Module) -> tuple[dict[str, str], Params]:
        """The parameters of a part that are not its layers', and live copies of them."""
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        named = part.named_parameters(remove_duplicate=False)
        names = {n: self.leaf_of[id(p)] for n, p in named if id(p) in self.leaf_of and id(p) not in inside}
        return names, {name: self.leaves[leaf].detach().requires_grad_() for name, leaf in names.items()}

    def _used(self, part: nn.Module, function: Callable[[Params], Tensor]) -> dict[str, str]:
        """The names of the parameters that reach the function's value."""
        names, live = self._around(part)
        with torch.enable_grad():
            y = function(live)
        if not (live and y.requires_grad):
            return {}
        grads = torch.autograd.grad(y.sum(), list(live.values()), allow_unused=True)
        return {name: names[name] for name, g in zip(live, grads) if g is not None}

    def _enter(self, inputs: Any) -> Tensor:
        """What enters the first layer, once it is clear that the layers are called as a chain."""
        seen: list[tuple[int, Tensor, Any]] = []
        recorders = [_recording(seen, place) for place in range(len(self.layers))]
        with _replaced(self.layers, recorders), torch.enable_grad():
            live, arguments = self._around(self.base)[1], self.layout.arguments(inputs)
            functional_call(self.base, live, (), arguments, tie_weights=False)
        order = [place for place, _, _ in seen]
        if order != list(range(len(self.layers))):
            raise ValueError(f"its {len(self.layers)} layers are called in the order {order}")
        if any(x is not seen[0][1] for _, x, _ in seen):
            raise ValueError("something is computed between its layers")
        if any(x.requires_grad for x in tree.leaves([context for _, _, context in seen])):
            raise ValueError("what its layers get besides the hidden state depends on the parameters")
        return seen[0][1].detach()


def _recording(seen: list[tuple[int, Tensor, Any]], place: int) -> Callable[..., Tensor]:
    def forward(x: Tensor, *others: Any, **options: Any) -> Tensor:
        seen.append((place, x, (others, options)))
        return x

    return forward


def _handing_on(last: Tensor, count: int) -> list[Callable[..., Tensor]]:
    """Layers that do nothing; the last one gives `last`."""
    return [lambda x, *others, **options: x] * (count - 1) + [lambda x, *others, **options: last]


@contextmanager
def _replaced(layers: Sequence[nn.Module], forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    """The layers with other forward functions."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            vars(layer)["forward"] = forward
        yield
    finally:
        for layer, previous in zip(layers, before):
            if previous is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = previous


def _layer_call(layer: nn.Module) -> Callable[[Params, Tensor, Any], Tensor]:
    def call(params: Params, x: Tensor, context: Any) -> Tensor:
        others, options = context
        y = functional_call(layer, params, (x, *others), options, tie_weights=False)
        if not isinstance(y, Tensor):
            raise ValueError(f"a layer, {type(layer).__name__}, returns a {type(y).__name__}, not a hidden state")
        return y

    return call


def _structure(layer: nn.Module, names: Mapping[str, str]) -> tuple[Any, ...]:
    """What two layers must have in common to be one function; that it was enough is for the trial to tell."""
    traits: list[Any] = [tuple(names)]
    for name, part in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, (bool, int, float, str, type(None))) and key != "layer_idx"
        }
        hooked = id(part) if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) else None
        traits.append((name, type(part), repr(sorted(plain.items(), key=lambda item: item[0])), hooked))
    for name, x in (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)):
        traits.append((name, x.shape, x.dtype))
    return tuple(traits)


def _is_lookup(embed: Link, leaves: Params, inputs: Any) -> bool:
    """Whether what enters the layers is linear in the parameters, and its vjp the transpose of that map: by trial."""
    point = {local: leaves[leaf] for local, leaf in embed.names.items()}
    if not point:
        return False
    draw = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=draw).to(x)

    def start(params: Params) -> Tensor:
        return embed.call(params, inputs, None)[0]

    along = {name: like(x) for name, x in point.items()}
    with torch.no_grad():
        x, dot, both = start(point), start(along), start({name: x + along[name] for name, x in point.items()})
    square, same = tree.dot(dot, dot), tree.dot(vjp(start, point, dot), along)  # no term of which is negative
    near = 4 * torch.finfo(x.dtype).eps
    return bool((both - x - dot).norm() <= near * both.norm() and abs(square - same) <= near * square)


def _trial_batch(module: nn.Module) -> Batch:
    """Two rows of six tokens, the second one padded by one; the embedding's padding token stands among them."""
    leaf = next(iter(trainable(module)[0].values()))
    embedding = inner(module).get_input_embeddings()
    ids = torch.arange(1, 13, device=leaf.device).view(2, 6) % len(embedding.weight)
    ids[0, 2] = getattr(embedding, "padding_idx", None) or 0
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = mask[1, -1] = False
    scale = mask.to(torch.promote_types(leaf.dtype, torch.float32)) / mask.sum()
    return Batch({"input_ids": ids, "target_mask": mask}, torch.arange(12, device=leaf.device).view(2, 6), scale)
