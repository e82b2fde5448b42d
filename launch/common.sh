# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# What the launchers share; sourced by them.

dry_run="" verb=train arguments=() verb_flags=()

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

# Prints the comment at the top of the script that runs: its --help.
show_help() {
  awk 'NR == 1 || /shellcheck/ { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$1"
}

# parse USAGE FLAGS SWITCHES ARGUMENT…: reads a launcher's arguments. A flag's value becomes the
# variable of its name, a switch makes
# its variable 1 (--dry_run is one of every launcher), and what follows -- becomes the array
# `arguments`, of the command launch/$verb.py.
parse() {
  local _usage="$1" _flags=" verb $2 " _switches=" dry_run $3 "
  shift 3
  while [ $# -gt 0 ]; do
    if [ "$1" = --help ] || [ "$1" = -h ]; then
      show_help "$0"
      exit
    elif [ "$1" = -- ]; then
      arguments=("${@:2}")
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

# Whether one of `arguments` is the flag $1, with its value behind = or in the next.
has() {
  local argument
  for argument in "${arguments[@]}"; do
    case "$argument" in
      "--$1" | "--$1="* | "-$1" | "-$1="*) return ;;
    esac
  done
  return 1
}

# Ends the launcher unless `arguments` have what the verb needs. The array `verb_flags` names the
# verb to another launcher.
need_run() {
  [ "$verb" = train ] || verb_flags=(--verb "$verb")
  case "$verb" in
    train)
      has config || fail "name the config after --: -- --config configs/X.py --workdir DIR"
      has workdir || fail "name the work directory after --: -- --config configs/X.py --workdir DIR"
      ;;
    benchmark) has config || fail "name the config after --: -- --config configs/X.py" ;;
    sample)
      has workdir || has weights ||
        fail "name a run or weights after --: -- --workdir DIR, or -- --weights FILE"
      ;;
    evaluate)
      has samples || has workdir || has weights ||
        fail "name what is measured after --: -- --samples FILE.npz, --workdir DIR or" \
          "--weights FILE"
      ;;
    encode)
      has source || fail "name the images after --: -- --source PATH --name NAME --vae DIR"
      ;;
    *) fail "--verb $verb is unknown: use train, encode, benchmark, sample or evaluate" ;;
  esac
}

# Ends the launcher if a program is not there (a dry run needs none).
need_program() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}
