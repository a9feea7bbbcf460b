"""With the folder of accelerators deleted all works, slower, to the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

RUN = """
import importlib, pkgutil, sys, tempfile
from pathlib import Path
# an editable installation would find what is missing elsewhere
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch, retrograd, worlds
for found in pkgutil.walk_packages(retrograd.__path__, "retrograd."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from retrograd.core import tree
from retrograd.core.optim import AdamW
from retrograd.core.step import Recipe, initial_state
from retrograd.lm.engines import compiled_engine
from retrograd.runs.states.budget import Replay
from retrograd.runs.trajectory import Trajectory

for replay in (Replay("all"), Replay("binomial", slots=2, memory=2_000, disk=1 << 20)):
    training = worlds.training(Recipe(AdamW(0.02, eps_root=1e-6), 0.5))
    with tempfile.TemporaryDirectory() as folder:
        run = Trajectory(training, initial_state(training.recipe, worlds.params()), replay, Path(folder))
        scores = run.reverse(worlds.query(run.train().params)[1])
    print("scores", tree.digest(scores))
print("accel" if "retrograd.accel.pool" in sys.modules else "no accel")
try:
    compiled_engine(torch.nn.Linear(2, 2), (1, 1), [], 1)
except Exception as error:  # no language model
    print(error)
"""


def outcome(package: Path) -> list[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=env, cwd=package, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_without_its_folder_all_imports_and_scores_have_the_same_bits(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("accel", "__pycache__")
    shutil.copytree(TESTS.parent / "retrograd", tmp_path / "retrograd", ignore=left_out)
    *expected, there, _ = outcome(TESTS.parent)
    *found, missing, refusal = outcome(tmp_path)
    assert (there, missing) == ("accel", "no accel")
    assert found == expected
    assert len(found) == 2
    assert "--compile needs the compiled passes of retrograd.accel" in refusal
