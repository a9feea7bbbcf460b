"""EK-FAC influence scores of a run's documents by kronfluence, as a file that `retrograd validate --scores` reads.

    pip install kronfluence
    python examples/ekfac.py runs/x ekfac.npy
    retrograd validate runs/x --subsets 50 --fraction 0.05 --scores ekfac=ekfac.npy --higher_is proponent

The model is the run's own final one, the documents are its rows (a run without --data.chunk_length, where a row is a
document), the queries its own text queries. Factors are fitted on the run's rows, of every linear layer. A score is
influence on −(query loss): high for a proponent.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from retrograd.data.rows import Rows
from retrograd.query.load import load_rows
from retrograd.runs.run_folder import Opened, open_run, with_queries
from retrograd.settings.run import queries_of
from retrograd.trust.models import Models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=8, help="rows at once")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".npy":
        parser.error(f"{arguments.out} has to end in .npy")
    scores = ekfac(open_run(arguments.run), arguments.batch)
    np.save(arguments.out, scores)
    print(f"{arguments.out}: scores of {scores.shape[0]} documents for {scores.shape[1]} query columns")


def ekfac(run: Opened, batch: int) -> np.ndarray:
    """Influence of each document that has a row on each query column, [documents, K], high for proponents."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments

    rows = run.loaded.rows
    if rows.packed or any(len(set(ids.tolist())) > 1 for ids in rows.doc_ids):
        raise SystemExit(f"{run.folder} packs documents into rows; kronfluence scores rows. Give a run without packing")
    module = run.loaded.model.module
    with torch.no_grad():
        held = dict(module.named_parameters())
        for name, leaf in Models(run).base.items():
            held[name].copy_(leaf)
    task = _task()
    model = prepare_model(module, task)
    data, queries = _items(rows), _query_items(run)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("run", model, task, output_dir=folder, disable_model_save=True, cpu=True, log_level=40)
        analyzer.fit_all_factors("factors", data, batch, factor_args=FactorArguments(strategy="ekfac"))
        analyzer.compute_pairwise_scores("pairs", "factors", queries, data, batch, per_device_train_batch_size=batch)
        found = analyzer.load_pairwise_scores("pairs")["all_modules"]  # [queries, documents]
    return found.T.float().numpy()


def _task() -> Any:
    from kronfluence.task import Task

    class NextToken(Task):  # the training loss, Σ over targets; the measurement, the mean loss of a query
        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            if sample:  # labels of the model's own, for the true Fisher
                with torch.no_grad():
                    drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1).flatten()
                labels = torch.where(labels >= 0, drawn, labels)
            return cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model) / (batch["labels"][:, 1:] >= 0).sum()

    return NextToken()


def _items(rows: Rows) -> list[dict[str, Tensor]]:
    """A row each, padded to the longest; labels −100 where nothing is predicted."""
    longest, found = rows.max_length, []
    for ids, mask in zip(rows.input_ids, rows.target_mask, strict=True):
        given, labels = torch.zeros(longest, dtype=torch.int64), torch.full((longest,), -100)
        given[: len(ids)] = torch.from_numpy(np.asarray(ids))
        targets = torch.from_numpy(np.asarray(mask))
        labels[: len(ids)] = torch.where(targets, given[: len(ids)], -100)
        found.append({"input_ids": given, "labels": labels})
    return found


def _query_items(run: Opened) -> Sequence[dict[str, Tensor]]:
    """A row for each query column."""
    found: list[dict[str, Tensor]] = []
    for name, config in queries_of(with_queries(run.config)).items():
        if config.form != "text" or not config.dataset or config.reduction != "none":
            raise SystemExit(
                f"query {name!r} has no row for each of its columns; ask texts with --query.reduction none"
            )
        rows, _ = load_rows(config, run.loaded.tokenizer, run.loaded.model, "query")
        found += _items(rows)
    return found


if __name__ == "__main__":
    main()
