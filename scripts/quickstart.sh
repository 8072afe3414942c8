#!/usr/bin/env bash
# The first thing to run: fetches a real model, fine-tunes it, measures it before and after, and
# writes a report. Started again, it goes on from where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment .venv requirements.txt

exec bash scripts/cpu.sh .venv/bin/python -m scripts.quickstart "$@"
