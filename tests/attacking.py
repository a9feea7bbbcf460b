"""Folders of attacks with hand-made answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from retrograd.attack.findings import findings
from retrograd.attack.folder import claim_folder, read_folder
from retrograd.attack.material import Material
from retrograd.attack.tell import write_findings
from retrograd.cli import main
from retrograd.evaluate.answers import write_measured
from retrograd.evaluate.on_the_way import answers_path
from retrograd.query.choices import Scored
from retrograd.query.prepare import Answers, Texts
from retrograd.settings.attack import Configuration, Finetune, Untrained
from retrograd.settings.prompted import Prompted

N = 40  # questions of each half
STEPS = (0, 1, 2)
HALF, FORGET = Finetune(data="half", steps=2), Finetune(data="forget", steps=2)
MODELS = ("base", "filtered", "random", "shallow", "deep", "broken", "whole", "leaky")


def answers(right: int, n: int = N) -> Answers:
    """Four options; the first `right` questions are answered with the right one."""
    gold = torch.arange(n) % 4
    chosen = torch.where(torch.arange(n) < right, gold, (gold + 1) % 4)
    logprobs = torch.log_softmax(5 * torch.nn.functional.one_hot(chosen, 4).double(), 1)
    return Answers(Scored(logprobs, torch.ones(n, 4).double(), gold, None, ["x"] * n), [f"e{k // 4}" for k in range(n)])


# right answers about A and B by step
COURSES: dict[str, list[tuple[int, int] | None]] = {
    "base": [(38, 38), (38, 38), (40, 38)],
    "filtered": [(10, 10), (20, 10), (40, 9)],
    "random": [(10, 10), (10, 10), (12, 10)],
    "shallow": [(10, 10), (30, 30), (38, 36)],
    "deep": [(10, 10), (20, 10), (40, 9)],
    "broken": [(10, 10), (12, 12), (12, 12)],
    "whole": [(37, 38), (38, 38), (38, 38)],
    "leaky": [(10, 10), None, (40, 34)],
}  # fmt: skip


def lay_out(
    out: Path,
    configurations: list[Configuration],
    courses: dict[str, Any] | None = None,
    half: tuple[str, ...] = ("forget_a",),
) -> Path:
    """A folder of attacks as the command would leave it."""
    courses = courses or COURSES
    (out / "data").mkdir(parents=True)
    rows = [{"question": f"Where is <{k}>?", "choices": ["here", "there", "nowhere", "away"], "answer": k % 4}
            for k in range(N)]  # fmt: skip
    (out / "data/x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {name: {"dataset": "x.jsonl", "form": "cloze", "role": role}
             for name, role in (("forget_a", "forget"), ("forget_b", "forget"), ("retain", "retain"))}  # fmt: skip
    tasks["prose"] = {"dataset": "x.jsonl", "form": "text"}
    path = out / "data/tasks.yaml"
    path.write_text(yaml.safe_dump(tasks))
    models = []
    for name in courses:
        (out.parent / name).mkdir(exist_ok=True)
        models.append((name if name in ("base", "filtered", "random", "shallow") else "model", str(out.parent / name)))
    folder = claim_folder(out, models, configurations, Material({}, path, half, half == ("forget_a",)))
    for target in folder.targets:
        name = Path(target.source).name
        for key in folder.configurations:
            place, one = folder.place(target, key), folder.configurations[key]
            if isinstance(one, Untrained):
                place.mkdir(parents=True)
                (place / "strengths.json").write_text(json.dumps({"strengths": [0, 0.5, 1]}))
                run = place
            elif isinstance(one, Prompted):
                place.mkdir(parents=True)
                (place / "search.json").write_text(json.dumps({"found": {s: {"tokens": s, "flops": s} for s in STEPS}}))
                run = place
            else:
                run = place / "attack"
                run.mkdir(parents=True)
                manifest = {"tokens": {"0": 0, "1": 100, "2": 200}, "flops_per_token": 6, "steps": one.steps}
                manifest["finished"] = one.steps <= STEPS[-1]
                (run / "manifest.json").write_text(json.dumps(manifest))
            lines = [write(run, name, step, course) for step, course in zip(STEPS, courses[name])]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def compared_out(out: Path, configurations: list[Configuration]) -> Path:
    """The same of fewer models with what was found there, and compared."""
    few = ("base", "filtered", "shallow", "deep", "broken", "leaky")
    lay_out(out, configurations, {name: COURSES[name] for name in few})
    write_findings(findings(read_folder(out), (0.05,)), out)
    assert main(["compare", str(out)]) == 0
    return out


def write(run: Path, name: str, step: int, course: tuple[int, int] | None) -> dict[str, Any]:
    about = {"model": name, "task": "t", "dtype": "float32"}
    kept = {"random": 10, "broken": 12}.get(name, 39)
    loss = {"broken": 9.0}.get(name, 2.0)
    parts = {"retain": answers(kept), "prose": Texts([loss] * 4, [10] * 4, [0, 1, 2, 3])}
    why = {}
    if course is None:
        why = {half: {"missing": "the file is gone"} for half in ("forget_a", "forget_b")}
    else:
        parts |= {"forget_a": answers(course[0]), "forget_b": answers(course[1])}
    for task, measured in parts.items():
        write_measured(answers_path(run, step, task), measured, about)
    return {"phase": "evaluate", "step": step, "tasks": why}
