#!/usr/bin/env bash
# Trains on this machine until the run is done: sets up what its accelerator needs, and goes on after each preemption.
#   bash launch/local.sh [--dry_run] [--extra tpu|cuda] -- --config configs/X.py --workdir DIR [--config.key=value …]
# Everything after -- goes to launch/train.py. Also what the launchers for pods run on each host.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

extra=""
if compgen -G "/dev/accel*" >/dev/null || compgen -G "/dev/vfio/[0-9]*" >/dev/null; then
  extra=tpu
elif command -v nvidia-smi >/dev/null; then
  extra=cuda
fi
parse "launch/local.sh [--dry_run] [--extra tpu|cuda] -- FLAGS OF launch/train.py" "extra" "" "$@"
need_run

run bash launch/setup_env.sh ${extra:+"$extra"}
if [ -n "$dry_run" ]; then
  run .venv/bin/python launch/train.py "${train[@]}"
  echo "# … again as long as it ends with status 75 (preempted, everything saved)"
  exit 0
fi
# A signal to this script is for the run, which saves and ends with 75; then nothing may start again.
stopping="" child=""
trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
while true; do
  .venv/bin/python launch/train.py "${train[@]}" &
  child=$!
  status=0
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # the wait was cut short by the signal
    status=0
    wait "$child" || status=$?
  done
  if [ "$status" -ne 75 ] || [ -n "$stopping" ]; then
    exit "$status"
  fi
  echo "preempted, and this machine is still here: going on" >&2
done
