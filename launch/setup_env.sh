#!/usr/bin/env bash
# Makes the virtual environment .venv in the project's root, once, with the versions of
# constraints.txt:
#   bash launch/setup_env.sh [extra]      extra: test, tpu or cuda; none for running only
# PYTHON=python3.12 chooses an interpreter; otherwise the first of python3, python3.13, python3.12,
# python3.11 that is new enough.
# VENV and CONSTRAINTS choose another folder and other versions.
set -euo pipefail
case "${1:-}" in
  --help | -h)
    awk 'NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"
venv="${VENV:-.venv}"
constraints="${CONSTRAINTS:-constraints.txt}"

# Done before, with the same requirements? Then there is nothing to do.
stamp="$venv/.installed-${extra:-run}"
wanted="$(cat "$constraints" setup.py | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
if [ ! -x "$venv/bin/python" ] || ! new_enough "$venv/bin/python"; then
  python=""
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then
      python="$candidate"
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: no Python 3.11 or newer found: install one, or name it with" \
      "PYTHON=/path/to/python" >&2
    exit 1
  fi
  if ! "$python" -m venv --clear "$venv"; then
    echo "error: $python cannot make a virtual environment: install its venv module" \
      "(Debian: apt-get install python3-venv)" >&2
    exit 1
  fi
fi

echo "installing into $venv (about 1.3 GB, once)" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" \
  -e ".${extra:+[$extra]}"
echo "$wanted" >"$stamp"
