"""Shared test set-up: shapes checked at run time, no network, quiet progress."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path += map(str, Path(__file__).parent.glob("*/"))  # tests of one room use worlds of another

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from jaxtyping import install_import_hook

install_import_hook("retrograd", "beartype.beartype")

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and two test runs would fight over the cores
