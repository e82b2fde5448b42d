# shellcheck shell=bash
# What the launchers share; sourced by them.

dry_run="" train=()

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

# parse USAGE FLAGS SWITCHES ARGUMENT…: reads a launcher's arguments. A flag's value becomes the variable of its name, a switch makes
# its variable 1 (--dry_run is one of every launcher), and what follows -- becomes the array `train`.
parse() {
  local _usage="$1" _flags=" $2 " _switches=" dry_run $3 "
  shift 3
  while [ $# -gt 0 ]; do
    if [ "$1" = -- ]; then
      train=("${@:2}")
      return
    elif [[ "$1" == --* && "$_flags" == *" ${1#--} "* ]]; then
      [ -n "${2:-}" ] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
    elif [[ "$1" == --* && "$_switches" == *" ${1#--} "* ]]; then
      printf -v "${1#--}" 1
    else
      fail "argument $1 is unknown: $_usage"
    fi
    shift
  done
}

# Ends the launcher unless `train` names what every training run needs.
need_run() {
  local arguments=" ${train[*]} "
  [[ "$arguments" =~ [[:space:]]--config[[:space:]=] ]] || fail "name the config after --: -- --config configs/X.py --workdir DIR"
  [[ "$arguments" =~ [[:space:]]--workdir[[:space:]=] ]] || fail "name the work directory after --: -- --config configs/X.py --workdir DIR"
}

# Ends the launcher if a program is not there (a dry run needs none).
need_program() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}
