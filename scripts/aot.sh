#!/usr/bin/env bash
# Compiles the attention kernels and whole training steps for GPUs that are not here:
#   bash scripts/aot.sh                        H100 and A100, all checks
#   bash scripts/aot.sh --devices h100 --parts kernels
# The first time it makes .references/aot, where XLA's CUDA compiler and ptxas live (140 MB of wheels,
# about 700 MB on disk). Needs no GPU and no driver.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
mkdir -p .references
setup_environment .references/aot requirements-aot.txt
# On a machine without a GPU the CUDA plugin cannot start: everything is traced on the CPU.
JAX_PLATFORMS=cpu exec .references/aot/bin/python -m scripts.aot "$@"
