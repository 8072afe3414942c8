#!/usr/bin/env bash
# Makes .references/venv, where torch, transformers and peft live: the tests marked `reference`
# and the side-by-side benchmark use it. Nothing else needs it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
mkdir -p .references
setup_environment .references/venv requirements-reference.txt
say "Ready: .references/venv"
