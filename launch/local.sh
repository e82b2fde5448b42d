#!/usr/bin/env bash
# Runs a verb on this machine until it is done: sets up what its accelerator needs, and goes on
# after each preemption.
#   bash launch/local.sh [--dry_run] [--verb train|encode|benchmark|sample|evaluate] \
#     [--extra tpu|cuda] -- --config configs/X.py --workdir DIR …
# Everything after -- goes to launch/train.py, or that of the verb. Also what the launchers for pods
# run on each host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

extra=""
if compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
  extra=tpu
elif command -v nvidia-smi >/dev/null; then
  extra=cuda
fi
usage="launch/local.sh [--dry_run] [--verb train|encode|benchmark|sample|evaluate]"
usage+=" [--extra tpu|cuda] -- FLAGS OF launch/VERB.py"
parse "$usage" "extra" "" "$@"
need_run
command=(.venv/bin/python "launch/$verb.py" "${arguments[@]}")

if [ -n "$dry_run" ]; then
  run bash launch/setup_env.sh ${extra:+"$extra"}
  run "${command[@]}"
  echo "# … again as long as it ends with status 75 (preempted, everything saved)"
  exit 0
fi

# A signal to this script is for the run, which saves and ends with 75; then nothing may start
# again. One that comes again does not wait.
stopping="" child=""
# shellcheck disable=SC2329 # the traps call it
hand_on() {
  local signal="$1"
  [ -z "$stopping" ] || [ "$1" != INT ] || signal=KILL
  # The run was started in the background, where shells have Ctrl-C ignored: it gets TERM.
  [ "$signal" != INT ] || signal=TERM
  stopping=1
  [ -z "$child" ] || kill "-$signal" "$child" 2>/dev/null || true
}
for signal in TERM INT HUP USR1; do
  # shellcheck disable=SC2064 # the signal of this turn
  trap "hand_on $signal" "$signal"
done

# Starts a command and waits for its end, however many signals come meanwhile; its status is in
# `status`.
attend() {
  status=0
  "$@" &
  child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # the wait was cut short by a signal
    status=0
    wait "$child" || status=$?
  done
  child=""
  # Ended by a signal of ours before it could listen: nothing is lost, and it may be run again.
  if [ -n "$stopping" ] && [[ "$status" =~ ^(129|138|143)$ ]]; then
    status=75
  fi
}

attend bash launch/setup_env.sh ${extra:+"$extra"}
[ "$status" -eq 0 ] || exit "$status"
while [ -z "$stopping" ]; do
  attend "${command[@]}"
  if [ "$status" -ne 75 ] || [ -n "$stopping" ]; then
    exit "$status"
  fi
  echo "preempted, and this machine is still here: going on" >&2
done
exit 75
