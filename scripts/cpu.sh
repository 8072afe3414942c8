#!/usr/bin/env bash
# Runs a command with the allocator that long work on a CPU wants (Linux with glibc):
#   bash scripts/cpu.sh .venv/bin/python -m experiments.sft_smollm2
# A step of XLA takes its memory in one block. By default the C library gives the block back to the
# kernel after every step, which clears all its pages again for the next one: a tenth of a training
# step and more. Kept, memory that was used once stays with the process. Nothing else changes.
set -euo pipefail
: "${1:?what is to run? bash scripts/cpu.sh COMMAND ...}"
kept=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:glibc.malloc.arena_max=1
export GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}$kept
exec "$@"
