"""The arm that a rule makes, and its controls: what each is ordered by, and the files they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from retrograd.runs.run_folder import added_queries, holding, lay_out_whole, open_run
from retrograd.select.controls import RANDOM, drawn, groups, matched
from retrograd.select.files import original_gradient
from retrograd.select.rivals import Gradients, gradients, query_gradient
from retrograd.select.rules import Weighing, finish, key, rises, weigh
from retrograd.select.selection import read_selection
from retrograd.select.sources import DataSet, Scored, find_native, is_run, split_name
from retrograd.select.words import bm25, keyword_tokens, query_tokens, read_keywords
from retrograd.settings.run import MagicConfig, queries_of
from retrograd.settings.select import Control, SelectConfig

__all__ = ["Arm", "Arms", "default_controls"]


class Arm(NamedTuple):
    """Token weights, [n], and the documents that are kept, if whole documents are.

    control: None for the arm itself; seed: of a control with draws; last: whether it is its control's last draw.
    """

    control: Control | None
    seed: int | None
    weights: Tensor
    kept: list[int] | None
    last: bool = True

    @property
    def name(self) -> str:
        if self.control is None:
            return "the arm"
        return self.control if self.seed is None else f"{self.control}-{self.seed}"


def default_controls(config: SelectConfig, by_document: bool) -> tuple[Control, ...]:
    """The controls of a configuration; where none are named, those that need neither model nor text."""
    if config.controls is not None:
        return config.controls
    if config.rule == "all_tokens":
        return ()  # itself a control: any order of ones is the same
    positions: tuple[Control, ...] = () if by_document else ("random_position", "permuted_in_row")
    retain: tuple[Control, ...] = ("retain_only",) if config.against else ()
    return ("random_count", *positions, "sign_flipped", *retain, "uniform")


class Arms:
    """Everything that one call of `retrograd select` makes.

    Args:
        forget, retain: Both of tokens or both of documents.
    """

    def __init__(self, config: SelectConfig, data: DataSet, forget: Scored, retain: Scored | None) -> None:
        self.config, self.data, self.forget = config, data, forget.values
        self.retain = None if retain is None else retain.values
        self.weighing = Weighing(
            config.rule, config.use, config.alpha, config.soft, config.clip, config.q, config.k,
            read_selection(config.selection, data.places) if config.selection else None,
        )  # fmt: skip
        self.weights = weigh(self.weighing, data.places, self.forget, self.retain)
        self.by_document = config.rule == "documents" or not forget.per_token
        self.controls = default_controls(config, self.by_document)
        self.orders = {control: self._order(control) for control in self.controls}  # what cannot be is told now

    def arm(self) -> Arm:
        """What the rule makes of the scores."""
        return self._finished(None, None, self.weights)

    def each_control(self) -> Iterator[Arm]:
        """The controls, draw by draw."""
        for control in self.controls:
            order, rising = self.orders[control], rises(self.weighing)
            several = drawn(control, self.weights, order)
            draws = self.config.seeds if several else 1
            for draw in range(draws):
                seed = self.config.seed + draw
                weights = matched(control, self.weights, self.data.places, order=order, rising=rising, seed=seed)
                arm = self._finished(control, seed if several else None, weights)
                yield arm._replace(last=draw == draws - 1)

    def _finished(self, control: Control | None, seed: int | None, weights: Tensor) -> Arm:
        kept = None
        if self.config.rule == "documents":
            kept = self.data.places.present()[weights > 0].tolist()
        return Arm(control, seed, finish(self.config.use, weights, self.data.places), kept)

    def _order(self, control: Control) -> Tensor | None:
        """A score (negative = proponent) or a strength of each token or document; None for what has no order."""
        orders: dict[str, Callable[[], Tensor]] = {
            "sign_flipped": lambda: -key(self.weighing, self.data.places, self.forget, self.retain),
            "retain_only": self._retained,
            "gradient_norm": lambda: self._gradients.norm,
            "gradient_cosine": lambda: -self._gradients.cosine,
            "bm25": lambda: self._summed(self._bm25()),
            "keyword": lambda: self._summed(self._keyword()),
        }
        if control in RANDOM:
            groups(control, len(self.weights), self.data.places)
        return orders[control]() if control in orders else None

    def _summed(self, values: Tensor) -> Tensor:
        return self.data.places.per_document(values) if self.by_document else values

    def _retained(self) -> Tensor:
        if self.retain is None:
            raise ValueError("control retain_only orders by the scores of what is to stay; give them with --against")
        if self.config.rule == "documents":
            return key(self.weighing, self.data.places, self.retain, None)
        return self.retain

    @cached_property
    def _gradients(self) -> Gradients:
        """At the model that the first run of --scores trained, with the query of its scores.

        For the original layout, whose models are gone: at the model of --rows, with the gradient that was saved.
        """
        source, rows = self.config.scores[0], self.config.rows
        saved = split_name(source)[0]
        original = saved.is_dir() and not is_run(saved) and rows is not None and is_run(rows)
        if not original:
            self._refuse_file(source, "gradient_norm and gradient_cosine need a trained model")
        native = None if original else find_native(source)
        if native is not None and not isinstance(native.config, MagicConfig):
            raise ValueError(
                f"controls gradient_norm and gradient_cosine take gradients of the cross-entropy that a run trains by, "
                f"and {source} unlearns: put a run of `retrograd magic` first in --scores, or leave them out"
            )
        folder = native.folder if native else rows
        assert folder is not None, "of a run"
        lay_out_whole(folder, trust_code=self.config.trust_code)
        with holding(folder, shared=True):
            run = open_run(folder, trust_code=self.config.trust_code)
            if native:
                direction = query_gradient(folder, native.query, native.columns)[1]
            else:
                direction = original_gradient(saved, run.loaded.model.params)
            return gradients(run, self.data.places, direction, self.by_document)

    def _bm25(self) -> Tensor:
        source = self.config.scores[0]
        self._refuse_file(source, "bm25 needs the text of a query")
        native = find_native(source)
        known = {**queries_of(native.config), **added_queries(native.folder)}
        texts = query_tokens(native.query, known[native.query], self.data.tokenizer)
        asked = texts[native.columns] if len(texts) == native.of else texts  # a column for each, or one for all
        return bm25(self.data.places, asked, self.data.tokenizer)

    def _keyword(self) -> Tensor:
        if self.config.keywords is None:
            raise ValueError("control keyword needs --keywords, a text file with one keyword a line")
        words = read_keywords(self.config.keywords)
        return keyword_tokens(self.data.places, self.data.rows.input_ids, words, self.data.tokenizer)

    def _refuse_file(self, source: str, why: str) -> None:
        if not is_run(split_name(source)[0]):
            raise ValueError(f"control {why}, and {source} is a file; put a run first in --scores, or leave it out")
