#!/usr/bin/env bash
# Lint, format check and tests, in an environment that is made when there is none.
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/train -x      what pytest is given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment .venv requirements.txt

.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ ! -x .references/venv/bin/python ]; then
    say "Comparisons with live reference libraries are skipped: bash scripts/references.sh makes them run"
fi
if [ ! -x .references/chromium/browser ]; then
    say "The attention page is not tried in a browser: bash scripts/browser.sh fetches one"
fi
# What tests compiled is kept (tests/compiling.py), for a month.
compiled=$HOME/.cache/llm-research-jax/compiled-tests
[ ! -d "$compiled" ] || find "$compiled" -type f -mtime +30 -delete
# A file stays with one worker, which compiles its models and reads its vocabularies once.
exec .venv/bin/python -m pytest -n "${PYTEST_WORKERS:-2}" --dist loadfile "$@"
