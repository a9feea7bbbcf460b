"""Shared test set-up: no network, one thread, and, where asked for, annotations checked at run time."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path += map(str, Path(__file__).parent.glob("*/"))  # tests of one room use worlds of another

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if os.environ.get("RETROGRAD_CHECK_TYPES") == "1":  # `make test-all`: every call of these rooms against its annotations
    from beartype import BeartypeConf
    from beartype.claw import beartype_packages

    beartype_packages(
        ("retrograd.core", "retrograd.query", "retrograd.settings"), conf=BeartypeConf(claw_is_pep526=False)
    )

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and two test runs would fight over the cores
