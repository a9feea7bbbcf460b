"""TRAK scores of a run's documents by the authors' own `traker`, as a file that `retrograd validate --scores` reads.

    pip install --no-deps traker
    python examples/trak_scores.py runs/x trak.npy
    retrograd validate runs/x --subsets 50 --fraction 0.05 --scores trak=trak.npy --higher_is proponent

One model, the run's own final one; documents and queries as in ekfac.py beside this file. TRAK's output of a
document is Σ log(p/(1 − p)) over its targets, with 1 − p, their mean, as the slope of the loss; of a query it is
−(its loss). Gradients are projected to `--dimensions` random ones, by default a quarter of the documents, for TRAK
inverts their second moment over the documents. A score is high for a proponent. Park et al., arXiv:2303.14186.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ekfac import documents_of, final_model, parts_of, query_loss
from torch import Tensor, nn

from retrograd.runs.run_folder import Opened, open_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=32, help="rows at once")
    parser.add_argument("--dimensions", type=int, help="of the projected gradients")
    arguments = parser.parse_args()
    if arguments.out.suffix != ".npy":
        parser.error(f"{arguments.out} has to end in .npy")
    scores, dimensions = trak(open_run(arguments.run), arguments.batch, arguments.dimensions)
    np.save(arguments.out, scores)
    print(f"{arguments.out}: scores of {scores.shape[0]} documents for {scores.shape[1]} query columns, "
          f"{dimensions} dimensions")  # fmt: skip


def trak(run: Opened, batch: int, dimensions: int | None) -> tuple[np.ndarray, int]:
    """TRAK scores of each document that has a row for each query column, [documents, K], and the dimensions."""
    from trak import TRAKer
    from trak.gradient_computers import IterativeGradientComputer

    data, queries = documents_of(run), parts_of(run)
    module = final_model(run)
    dimensions = dimensions or max(1, len(data) // 4)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            module, _output(queries), len(data), folder, device="cpu", proj_dim=dimensions, use_half_precision=False,
            gradient_computer=IterativeGradientComputer, logging_level=logging.ERROR,
        )  # fmt: skip
        traker.load_checkpoint(module.state_dict(), model_id=0)
        for start in range(0, len(data), batch):
            part = data[start : start + batch]
            rows = [torch.stack([row[name] for row in part]) for name in ("input_ids", "labels")]
            traker.featurize(rows, num_samples=len(part))
        traker.finalize_features()
        # which frees the projection, and traker 0.3.2 does not draw one of up to 100 dimensions again
        traker.projector.generate_sketch_matrix(traker.projector.generator_states[0])
        traker.start_scoring_checkpoint("queries", module.state_dict(), 0, len(queries))
        traker.score([torch.arange(len(queries))], num_samples=len(queries))
        return np.array(traker.finalize_scores("queries")), dimensions


def _output(queries: list[list[dict[str, Tensor]]]) -> Any:
    from trak.modelout_functions import AbstractModelOutput

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        def get_output(self, model: nn.Module, weights: Any, buffers: Any, *batch: Tensor) -> Tensor:
            """Of documents (ids, labels), or of the query columns of these numbers, [B]."""
            if len(batch) == 1:
                return torch.stack(
                    [-torch.stack([query_loss(model, part) for part in queries[k]]).sum() for k in batch[0]]
                )
            log_p, there = _log_p(model, *batch)
            return ((log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))) * there).sum(1)

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: list[Tensor]) -> Tensor:
            with torch.no_grad():
                log_p, there = _log_p(model, *batch)
            return (((1 - log_p.exp()) * there).sum(1) / there.sum(1))[:, None]

    return Output()


def _log_p(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the next tokens, and which of them are targets, [B, L − 1] each."""
    labels = labels[:, 1:]
    found = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
    return found, labels >= 0


if __name__ == "__main__":
    main()
