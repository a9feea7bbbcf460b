"""How well do scores predict retraining? Builds a small world from a text file, runs `retrograd magic` and `validate`.

A tiny GPT-NeoX is trained from scratch on the first part of the text, then fine-tuned with attribution on passages of
the rest; queries are single passages held out. Each regime runs `magic`, `metasmoothness` and `validate`, whose commands
are printed; the table at the end is that of docs/validation.md.

    python bench/lds.py --text wikitext-2/valid.txt --out runs/lds                 # every regime of docs/validation.md
    python bench/lds.py --text … --out runs/lds --only sgd --subsets 10            # one, quickly
    python bench/lds.py --text … --out runs/lds --world                            # the model and the data only
    python bench/lds.py --text … --out runs/lds --world --fresh --documents 128    # fewer passages, an untrained model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from pathlib import Path

LENGTH, VOCABULARY, DOCUMENTS, QUERIES = 64, 2000, 512, 4

COMMON = ["--query.reduction", "none"]
REGIMES = {
    "sgd": "--train.optimizer sgd --train.lr 0.1 --train.batch_size 32 --train.epochs 3",
    "adamw": "--train.optimizer adamw --train.lr 3e-4 --train.eps_root 1e-6 --train.batch_size 32 --train.epochs 2",
    "adamw-eps_root-1e-10": "--train.optimizer adamw --train.lr 1e-3 --train.eps_root 1e-10 --train.batch_size 32 "
    "--train.epochs 2",
    "sgd-large-lr": "--train.optimizer sgd --train.lr 1 --train.batch_size 32 --train.epochs 2",
    "adamw-large-lr": "--train.optimizer adamw --train.lr 1e-2 --train.eps_root 1e-6 --train.batch_size 32 "
    "--train.epochs 2",
}


def claim_world(arguments: argparse.Namespace) -> None:
    """Build the world, or take the one that is there if it was asked for in the same way."""
    steps = 0 if arguments.fresh else 400
    asked = {
        "text": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
        "steps": steps,
        "documents": arguments.documents,
    }
    told = arguments.out / "world.json"
    if not (arguments.out / "model" / "tokenizer.json").exists():
        build_world(arguments.text, arguments.out, steps, arguments.documents)
        told.write_text(json.dumps(asked))
    made = json.loads(told.read_text()) if told.exists() else None
    if made != asked:
        known = f"made as {made}" if made else "that does not say how it was made"
        raise SystemExit(
            f"{arguments.out} has a world {known}, and {asked} is asked for: give another --out, or what it was made with"
        )


def build_world(text: Path, out: Path, steps: int = 400, documents: int = DOCUMENTS) -> None:
    """Tokenizer, pretrained model, train.jsonl and query.jsonl."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in text.read_text(encoding="utf8").splitlines() if len(line) > 80]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")
    ids = [token for line in lines for token in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]
    rows = [ids[k : k + LENGTH] for k in range(0, len(ids) - LENGTH, LENGTH)]
    need = documents + QUERIES
    if len(rows) < 2 * need:
        raise SystemExit(f"{text} has {len(rows)} passages of {LENGTH} tokens; this needs {2 * need}")
    fine, early = rows[-need:], rows[:-need]
    for name, part in (("train", fine[:documents]), ("query", fine[documents:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in part))
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=LENGTH, hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(1, steps))
    data, draw = torch.tensor(early), torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = data[torch.randint(len(data), (32,), generator=draw)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"from scratch, step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=tuple(REGIMES), default=tuple(REGIMES))
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--fraction", nargs="*", default=["0.01", "0.05", "0.1"])
    parser.add_argument("--world", action="store_true", help="build the model and the data, and stop")
    parser.add_argument("--fresh", action="store_true", help="a model that is not trained first")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="passages to attribute")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    arguments = parser.parse_args()
    if not arguments.table:
        claim_world(arguments)
    for name in () if arguments.world or arguments.table else arguments.only:
        regime(name, arguments)
    print(table(arguments.out))


def table(out: Path) -> str:
    """What is known of every regime, as Markdown: LDS by fraction (lowest and mean of the queries), slopes, warnings."""
    lines = [
        "| regime | left out | lowest LDS of a query | mean LDS [95 %] | slopes | metasmoothness | health |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in REGIMES:
        path = out / name / "validation.json"
        if not path.exists():
            continue
        smooth = [json.loads(p.read_text())["value"] for p in (out / name / "metasmoothness").glob("*.json")]
        found = json.loads((out / name / "health.json").read_text())["findings"]
        health = ", ".join(finding["kind"] for finding in found) or "nothing found"
        for part in json.loads(path.read_text())["fractions"]:
            each = part["queries"].values()
            low, high = part["interval"]
            slopes = [one["slope"] for one in each]
            lines.append(
                f"| {name} | {part['fraction']:.0%} | {min(one['lds'] for one in each):.3f} | {part['mean_lds']:.3f} "
                f"[{low:.3f}, {high:.3f}] | {min(slopes):.2f} to {max(slopes):.2f} | {smooth[0]:.3f} | {health} |"
            )
    return "\n".join(lines)


def regime(name: str, arguments: argparse.Namespace) -> None:
    from retrograd.cli import main as retrograd

    out, run = arguments.out, arguments.out / name
    recipe = [
        "--model", str(out / "model"), "--data.dataset", str(out / "train.jsonl"), "--query.dataset",
        str(out / "query.jsonl"), *COMMON, *shlex.split(REGIMES[name]),
    ]  # fmt: skip
    commands = [
        ["magic", str(run), *recipe, "--sharpness"],
        ["metasmoothness", str(run)],
        ["validate", str(run), "--subsets", str(arguments.subsets), "--fraction", *arguments.fraction],
    ]
    for command in commands:
        print(f"\n$ retrograd {shlex.join(command)}", flush=True)
        if retrograd(command):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
