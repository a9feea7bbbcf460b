"""EK-FAC influence scores of a run's documents by kronfluence, as a file that `retrograd validate --scores` reads.

    pip install kronfluence
    python examples/ekfac.py runs/x ekfac.npy
    retrograd validate runs/x --subsets 50 --fraction 0.05 --scores ekfac=ekfac.npy --higher_is proponent

The model is the run's own final one, the documents are its rows (a run without --data.chunk_length, where a row is a
document), the queries its own: texts, or questions of form cloze. Factors are fitted on the run's rows, of every linear
layer. A score is influence on −(query loss): high for a proponent.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from retrograd.core.step import Batch, coefficients
from retrograd.data.rows import Rows
from retrograd.runs.run_folder import Opened, open_run
from retrograd.trust.models import Models

__all__ = ["documents_of", "final_model", "parts_of", "query_loss"]


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
    from kronfluence.arguments import FactorArguments, ScoreArguments

    data, queries, task = documents_of(run), parts_of(run), _task()
    model = prepare_model(final_model(run), task)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("run", model, task, output_dir=folder, disable_model_save=True, cpu=True, log_level=40)
        analyzer.fit_all_factors("factors", data, batch, factor_args=FactorArguments(strategy="ekfac"))
        for number, parts in enumerate(queries):  # its gradient is the sum over its parts' rows
            analyzer.compute_pairwise_scores(
                f"query{number}", "factors", parts, data, 1, per_device_train_batch_size=batch,
                score_args=ScoreArguments(aggregate_query_gradients=True),
            )  # fmt: skip
            found.append(analyzer.load_pairwise_scores(f"query{number}")["all_modules"][0])  # [documents]
    return torch.stack(found, 1).float().numpy()


def final_model(run: Opened) -> nn.Module:
    """The Hugging Face module of a run with its final parameters."""
    module = run.loaded.model.module
    with torch.no_grad():
        held = dict(module.named_parameters())
        for name, leaf in Models(run).base.items():
            held[name].copy_(leaf)
    return module.eval()


def documents_of(run: Opened) -> list[dict[str, Tensor]]:
    """A row for each document, padded to the longest; labels −100 where nothing is predicted."""
    rows: Rows = run.loaded.rows
    if rows.packed or any(len(set(ids.tolist())) > 1 for ids in rows.doc_ids):
        raise SystemExit(
            f"{run.folder} packs documents into rows, and rows are scored here. Give a run without packing"
        )
    longest, found = rows.max_length, []
    for ids, mask in zip(rows.input_ids, rows.target_mask, strict=True):
        given, labels = torch.zeros(longest, dtype=torch.int64), torch.full((longest,), -100)
        given[: len(ids)] = torch.from_numpy(np.asarray(ids))
        targets = torch.from_numpy(np.asarray(mask))
        labels[: len(ids)] = torch.where(targets, given[: len(ids)], -100)
        found.append({"input_ids": given, "labels": labels})
    return found


def parts_of(run: Opened) -> list[list[dict[str, Tensor]]]:
    """For each query column, what the model reads for it: the run's own batches, each with its coefficients `c`."""
    found = []
    for column in run.loaded.queries.columns:
        parts = []
        for _, batch in column.parts:
            if "input_ids" not in batch.inputs or "last" in batch.inputs:
                raise SystemExit(f"query {column.name!r} asks neither texts nor options' texts (form text or cloze)")
            parts.append({**_tensors(batch), "c": coefficients(batch, torch.ones(int(batch.index.max()) + 1))})
        found.append(parts)
    module, params = run.loaded.model.module, run.loaded.model.params
    values = run.loaded.queries.values(params)  # at the weights that the module has
    with torch.no_grad():
        mine = torch.stack([torch.stack([query_loss(module, part) for part in parts]).sum() for parts in found])
    if not torch.allclose(mine, values.to(mine), rtol=1e-4, atol=1e-5):
        raise SystemExit(
            f"the queries here are {mine.tolist()} nats and the run's {values.tolist()}: take form text, or cloze with "
            "the loss four_way, not normalised"
        )
    return found


def query_loss(module: nn.Module, part: dict[str, Tensor]) -> Tensor:
    """Σ c·loss of a part of a query column by plain logits, in nats, []."""
    if "widths" not in part:
        losses = _token_losses(module(input_ids=part["input_ids"]).logits, part["input_ids"])
        return (losses * part["c"].reshape(len(losses), -1)[:, -losses.shape[1] :])[part["target_mask"][:, 1:]].sum()
    there = part["target_mask"].any(2)  # [B, O]
    mask = part["target_mask"][there]
    logits = module(input_ids=part["input_ids"][there]).logits
    answers = logits[mask.nonzero()[:, 0], part["columns"][there][mask]].log_softmax(1)
    each = answers.gather(1, part["targets"][there][mask][:, None]).squeeze(1)
    options = each.new_zeros(part["target_mask"].shape).masked_scatter(part["target_mask"], each).sum(2)
    options = options.masked_fill(~there, -torch.inf).log_softmax(1)
    return -(options.gather(1, part["gold"][:, None]).squeeze(1) * part["c"]).sum()


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L − 1], nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: x for name, x in batch.inputs.items() if isinstance(x, Tensor)}


def _task() -> Any:
    from kronfluence.task import Task

    class Ours(Task):  # the training loss, Σ over targets; the measurement, a part of a query's loss
        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            if sample:  # labels of the model's own, for the true Fisher
                with torch.no_grad():
                    drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1).flatten()
                labels = torch.where(labels >= 0, drawn, labels)
            return cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return query_loss(model, {name: x[0] for name, x in batch.items()})  # the loader puts an axis before it

    return Ours()


if __name__ == "__main__":
    main()
