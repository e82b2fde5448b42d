#!/usr/bin/env bash
# GPU nodes under Slurm, one process for each GPU:
#   bash launch/slurm.sh --nodes 4 [--gpus 8] [--cpus 8] [--time 24:00:00] [--partition P] \
#     [--verb train|encode|benchmark|sample|evaluate] [--dry_run] \
#     -- --config configs/X.py --workdir /shared/run
# submits itself; --cpus are those of each process. Two minutes before its time ends, and when it is
# preempted, the run saves a checkpoint and the job queues up again.
# The project and the work directory must lie on a disk that all nodes see; `bash
# launch/setup_env.sh cuda` first, once.
set -euo pipefail
# Slurm runs a copy of this script.
source "${DIFFIT_JAX_ROOT:="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"}/launch/common.sh"
cd "$DIFFIT_JAX_ROOT"

nodes=1 gpus=8 cpus=8 time=24:00:00 partition=""
usage="bash launch/slurm.sh [--nodes 1] [--gpus 8] [--cpus 8] [--time 24:00:00] [--partition P]"
usage+=" [--verb train|…] [--dry_run] -- FLAGS OF launch/VERB.py"
parse "$usage" "nodes gpus cpus time partition" "" "$@"
need_run

if [ -z "${SLURM_JOB_ID:-}" ] || [ -n "$dry_run" ]; then
  need_program sbatch "run this on the cluster's login node"
  [ -n "$dry_run" ] || [ -x .venv/bin/python ] ||
    fail "there is no .venv: run 'bash launch/setup_env.sh cuda' first"
  # --signal reaches all processes of the job's step.
  run sbatch --job-name=diffit_jax --nodes="$nodes" --ntasks-per-node="$gpus" \
    --gpus-per-node="$gpus" --cpus-per-task="$cpus" --time="$time" \
    ${partition:+--partition="$partition"} --signal=TERM@120 --requeue --open-mode=append \
    --output=diffit_jax-%j.log --export="ALL,DIFFIT_JAX_ROOT=$DIFFIT_JAX_ROOT" \
    launch/slurm.sh "${verb_flags[@]}" -- "${arguments[@]}"
  [ -n "$dry_run" ] || exit 0
fi

status=0
run srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-$cpus}" --kill-on-bad-exit=0 \
  .venv/bin/python "launch/$verb.py" "${arguments[@]}" || status=$?
if [ -n "$dry_run" ]; then
  echo "# … and where it ends with status 75 (preempted, everything saved):"
  run scontrol requeue "${SLURM_JOB_ID:-JOB}"
elif [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
else
  exit "$status"
fi
