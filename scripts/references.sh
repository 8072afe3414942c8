#!/usr/bin/env bash
# Makes .references/venv, where torch, transformers and peft live: the tests marked `reference`
# and the side-by-side benchmark use it. Nothing else needs it. With `trl` it makes .references/trl, which
# the generator of preference losses' fixtures runs in.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
mkdir -p .references
if [ "${1:-}" = trl ]; then
    setup_environment .references/trl requirements-trl.txt
    say "Ready: .references/trl"
else
    setup_environment .references/venv requirements-reference.txt
    say "Ready: .references/venv"
fi
