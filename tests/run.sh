#!/usr/bin/env bash
# Sets itself up and runs the linter and the tests, on two cores; arguments go to pytest:  bash
# tests/run.sh [-k name]
# With --colab: in an environment of Colab's versions (constraints-colab.txt, Python 3.13), the core
# tests and the paths of its users.
set -euo pipefail
case "${1:-}" in
  --help | -h)
    awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --colab ]; then
  shift
  python="${PYTHON:-python3.13 $(echo "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3.13)}"
  VENV=.venv-colab CONSTRAINTS=constraints-colab.txt PYTHON="$python" bash launch/setup_env.sh test
  core=(models diffusion interop sampling data experiment run test_{before,limits,configs}.py
    ingest/test_{images,image_files,prepare,own_data}.py
    evaluation/test_{evaluation,feature_distances,in_training,metrics,sweep}.py
    launch/test_{colab,notebooks}.py runtime/test_{backend,checkpoint,contents,rows}.py
    training/test_{training,train_autoencoder,watch,loggers,matrix,check}.py)
  JAX_PLATFORMS=cpu exec .venv-colab/bin/python -m pytest -n 3 --dist loadfile \
    "${core[@]/#/tests/}" "$@"
fi
bash launch/setup_env.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/codespell diffit_jax configs launch notebooks tests ./*.md ./*.py
.venv/bin/shellcheck -x launch/*.sh tests/run.sh .ci/run
.venv/bin/basedpyright --pythonpath .venv/bin/python
# By name, not by the number of tests: files with few and long ones would come last, one core idle
# beside them. Three on two cores: in one of them a test mostly waits for another process (908 s
# instead of 1084 s).
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
