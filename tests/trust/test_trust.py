"""Code that a folder or a file names runs only for those who say that they trust it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml

from retrograd.cli import main
from retrograd.evaluate.lm_eval.model import refuse_task_code
from retrograd.runs.run_folder import open_run

CODE = """
from pathlib import Path
Path({mark!r}).touch()

def mine(model, tokenizer):
    return model(**tokenizer("the cat sat", return_tensors="pt")).logits.square().mean()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "model")
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(6))
    (folder / "mine.py").write_text(CODE.format(mark=str(folder / "ran")))
    common = ("--model", str(folder / "model"), "--data.dataset", str(folder / "train.jsonl"))
    typed = ("--query.function", f"{folder / 'mine.py'}:mine")
    for _ in range(2):  # whoever types it is not asked, nor when the same command is given again
        assert main(["magic", str(folder / "typed"), *common, *typed]) == 0
    assert main(["magic", str(folder / "plain"), *common, "--query.dataset", str(folder / "train.jsonl")]) == 0
    for _ in range(2):
        assert main(["query", str(folder / "plain"), "--name", "own", *typed]) == 0
    function = yaml.safe_dump({"other": {"function": typed[1]}})
    (folder / "queries.yaml").write_text(function)
    (folder / "ran").unlink()
    return folder


# what is given to the command after the word of trust, and the file that names the code
CALLS: dict[str, tuple[Callable[[Path, Path], list[str]], str]] = {
    "verify": (lambda w, to: ["verify", str(w / "typed"), "--steps", "0", "--directions", "0"], "typed/run_config.yaml"),
    "verify an added query": (
        lambda w, to: ["verify", str(w / "plain"), "--steps", "0", "--directions", "0"],
        "plain/queries/own/query_config.yaml",
    ),
    "validate": (lambda w, to: ["validate", str(w / "typed"), "--subsets", "1"], "typed/run_config.yaml"),
    "query": (
        lambda w, to: ["query", str(w / "typed"), "--name", "again", "--query.dataset", str(w / "train.jsonl")],
        "typed/run_config.yaml",
    ),
    "query_file": (lambda w, to: ["query", str(w / "plain"), "--query_file", str(w / "queries.yaml")], "queries.yaml"),
    "metasmoothness": (lambda w, to: ["metasmoothness", str(w / "typed")], "typed/run_config.yaml"),
    "config": (lambda w, to: ["magic", str(to), "--config", str(w / "typed/run_config.yaml")], "typed/run_config.yaml"),
    "config=": (lambda w, to: ["magic", str(to), f"--config={w / 'typed/run_config.yaml'}"], "typed/run_config.yaml"),
    "magic's query_file": (
        lambda w, to: [
            "magic", str(to), "--model", str(w / "model"), "--data.dataset", str(w / "train.jsonl"),
            "--query_file", str(w / "queries.yaml"),
        ],
        "queries.yaml",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_stored_code_runs_for_those_who_trust_it_only(
    world: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call, file = CALLS[case]
    arguments = call(world, tmp_path / "run")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{world / file} names Python code: query " in error
    assert f"runs {world / 'mine.py'}:mine, with your rights" in error
    assert "--trust_code" in error
    assert not (world / "ran").exists()
    assert main([*arguments, "--trust_code"]) == 0
    (world / "ran").unlink()


def test_a_file_cannot_trust_itself_and_typing_it_is_enough(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((world / "typed/run_config.yaml").read_text())
    assert "trust_code" not in settings
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "trust_code": True}))
    assert main(["magic", str(tmp_path / "run"), "--config", str(file)]) == 2
    assert f"{file} names Python code" in capsys.readouterr().err
    typed = ("--query.function", f"{world / 'mine.py'}:mine")
    assert main(["magic", str(tmp_path / "run"), "--config", str(file), *typed]) == 0


def test_a_folder_opened_from_python_is_no_more_trusted(world: Path) -> None:
    with pytest.raises(ValueError, match=r"run_config.yaml names Python code: query 'query' runs .*mine.py:mine"):
        open_run(world / "typed")
    assert open_run(world / "typed", trust_code=True).loaded.asked[0].record["kind"] == "function"


@pytest.mark.parametrize("place", ["asked", "folder", "included"])
def test_code_that_lm_evals_files_name(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    named = tmp_path / "hidden.yaml" if place == "included" else folder / "task.yaml"
    named.write_text("task: x\ncustom_dataset: !function questions.load\n")
    (folder / "other.yaml").write_text("task: y\ninclude: ../hidden.yaml\n" if place == "included" else "task: y\n")
    code = named.parent / "questions.py"
    code.write_text("def load(): ...\n")
    given = ([named], None) if place == "asked" else ([Path("mmlu")], folder)
    with pytest.raises(ValueError, match=rf"{named.name} names Python code: lm-eval would run questions.load of "):
        refuse_task_code(*given, False)
    refuse_task_code(*given, True)
    refuse_task_code(*given, False, ("questions.load", code.read_text()))
    with pytest.raises(ValueError, match="--trust_code"):
        refuse_task_code(*given, False, ("questions.load", "def load(): another\n"))
    shutil.rmtree(folder)
    refuse_task_code([], None, False)
