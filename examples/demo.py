"""The demo: train a tiny model from scratch, score every training token for a question, see who taught it.

A GPT-NeoX of about a million parameters is trained on 300 short documents, half about bees and half about lighthouses.
The query is its loss on held-out sentences about lighthouses. Proponents should be lighthouse documents.

    python examples/demo.py            # about a minute or two on two cores
    python examples/demo.py --small    # the smallest size, for continuous integration
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

WORLD = Path(os.path.relpath(Path(__file__).parent / "world"))


def make_model(folder: Path, small: bool) -> None:
    """A tokenizer trained on the bundled text and a randomly initialised model, saved like any other."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for line in (WORLD / "train.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    width = 32 if small else 128
    config = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=width, num_hidden_layers=2 if small else 4,
        num_attention_heads=4, intermediate_size=4 * width, max_position_embeddings=128,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="the smallest size")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    from retrograd.cli import main as retrograd

    shutil.rmtree(arguments.folder, ignore_errors=True)
    make_model(arguments.folder / "model", arguments.small)
    run = arguments.folder / "run"
    command = [
        "magic", str(run), "--model", str(arguments.folder / "model"),
        "--data.dataset", str(WORLD / "train.jsonl"), "--query.dataset", str(WORLD / "query_lighthouses.jsonl"),
        "--attribute", "tokens", "--train.lr", "3e-3", "--train.lr_schedule", "cosine", "--train.warmup_ratio", "0.1",
        "--train.eps_root", "1e-6", "--train.batch_size", "32", "--train.epochs", "2" if arguments.small else "8",
    ]  # fmt: skip
    print(f"$ retrograd {' '.join(command)}\n", flush=True)
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary):
        code = retrograd(command)
    code = code or findings(run)
    print(f"\nThe run's own summary:\n\n{summary.getvalue()}")
    return code


def findings(run: Path) -> int:
    """Whether the proponents are what they should be; exit code 1 if not."""
    subjects = [json.loads(line)["subject"] for line in (WORLD / "train.jsonl").read_text().splitlines()]
    examples = json.loads((run / "all_scores.json").read_text())["examples"]
    ranked = sorted(examples, key=lambda example: example["score"])
    share = {n: sum(subjects[example["doc_id"]] == "lighthouses" for example in ranked[:n]) / n for n in (10, 50, 100)}
    mean = {
        subject: sum(e["score"] for e in examples if subjects[e["doc_id"]] == subject) / subjects.count(subject)
        for subject in ("lighthouses", "bees")
    }
    print("Found, for the query about lighthouses:")
    for count, part in share.items():
        print(f"  {part:4.0%} of the {count} strongest proponents are documents about lighthouses (half of all are)")
    for subject, score in mean.items():
        print(f"  mean score of a document about {subject}: {score:+.2e} nats per unit of weight")
    holds = share[50] >= 0.8 and mean["lighthouses"] < mean["bees"]
    print(
        "Training on lighthouses lowered the loss on lighthouses." if holds else "The proponents are NOT the subject."
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
