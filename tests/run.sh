#!/usr/bin/env bash
# Sets itself up and runs the linter and the tests, on two cores; arguments go to pytest:  bash tests/run.sh [-k name]
# With --colab: in an environment of Colab's versions (constraints-colab.txt, Python 3.13), the core tests and the paths of its users.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --colab ]; then
  shift
  python="${PYTHON:-python3.13 $(echo "$HOME"/.pyenv/versions/3.13*/bin/python3.13)}"
  VENV=.venv-colab CONSTRAINTS=constraints-colab.txt PYTHON="$python" bash launch/setup_env.sh test
  core=(colab models attention edm ddpm samplers guidance latent official weight_files limits training sampling generate
    sample_files checkpoint convert optimizer data evaluation configs backend contents watch rows notebook)
  files=("${core[@]/#/tests/test_}")
  files=("${files[@]/%/.py}")
  JAX_PLATFORMS=cpu exec .venv-colab/bin/python -m pytest -n 2 --dist loadfile "${files[@]}" "$@"
fi
bash launch/setup_env.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# By name, not by the number of tests: files with few and long ones would come last, one core idle beside them.
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
