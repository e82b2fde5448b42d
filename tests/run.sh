#!/usr/bin/env bash
# Sets itself up and runs the linter and the tests, on two cores; arguments go to pytest:  bash tests/run.sh [-k name]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
