#!/usr/bin/env bash
# What a metagradient costs on one GPU, within 8 minutes: bench/gpu.py with the environment it wants. Nothing is installed;
# the interpreter is $PYTHON (python3), which needs torch, transformers, numpy and safetensors.
#
#   bench/gpu.sh [--output DIR] [--toy] [--write-docs] [--minutes 8] [SECTION ...]
#
# Figures go to DIR/gpu.json and DIR/gpu.md (DIR: --output, else $OUT, else runs/gpu).
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8} # as retrograd sets it: the same bits in replay
exec "${PYTHON:-python3}" "$here/bench/gpu.py" --output "${OUT:-$here/runs/gpu}" "$@"
