# shellcheck shell=bash
# What the launchers share; sourced by them.

dry_run=""

# Ends the launcher with one line.
fail() {
  echo "error: $*" >&2
  exit 1
}

# Runs a command, or prints it in a form that a shell can read back.
run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# take FLAG VALUE …: sets the variable named like the flag.
take() {
  if [ $# -lt 2 ] || [ -z "$2" ]; then
    fail "$1 needs a value"
  fi
  printf -v "${1#--}" '%s' "$2"
}

# Ends the launcher unless the arguments name what every training run needs.
need_run() {
  local arguments=" $* "
  [[ "$arguments" =~ [[:space:]]--config[[:space:]=] ]] || fail "name the config after --: -- --config configs/X.py --workdir DIR"
  [[ "$arguments" =~ [[:space:]]--workdir[[:space:]=] ]] || fail "name the work directory after --: -- --config configs/X.py --workdir DIR"
}

# Ends the launcher if a program is not there (a dry run needs none).
need_program() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}
