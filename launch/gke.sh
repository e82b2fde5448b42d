#!/usr/bin/env bash
# shellcheck disable=SC2034 # variables are used by their name, to fill in the manifest
# TPU slices of a GKE cluster, as a JobSet that starts again after each preemption (the cluster
# needs the JobSet controller):
#   bash launch/gke.sh --name N --image IMAGE --topology v5e:16x16 [--num_slices 1] \
#     [--max_restarts 100] [--verb train|encode|benchmark|sample|evaluate] [--dry_run] \
#     -- --config configs/X.py --workdir gs://B/run [--config.key=value …]
# fills in launch/gke_jobset.yaml and applies it. The image comes from launch/Dockerfile. Logs, end:
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=N,batch.kubernetes.io/job-completion-index=0;
#   kubectl delete jobset N
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

usage="bash launch/gke.sh --name N --image IMAGE --topology v5e:16x16 [--num_slices 1]"
usage+=" [--verb train|…] [--dry_run] -- FLAGS OF launch/VERB.py"
name="" image="" topology="" num_slices=1 max_restarts=100
parse "$usage" "name image topology num_slices max_restarts" "" "$@"
for needed in name image topology; do
  [ -n "${!needed}" ] || fail "--$needed is missing: $usage"
done
need_run
need_program kubectl "see https://kubernetes.io/docs/tasks/tools"

chip="${topology%%:*}" grid="${topology#*:}"
[[ "$num_slices" =~ ^[1-9][0-9]*$ ]] || fail "--num_slices $num_slices is not a number of slices"
[[ "$grid" =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
  fail "--topology $topology is not a topology: write CHIP:GRID, such as v5e:16x16 or v5p:4x4x8"
chips=$((${grid//x/*}))
case "$chip" in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  *) fail "chip $chip is unknown: use v4, v5e, v5p or v6e" ;;
esac
chips_per_host=$((chips < 4 ? chips : 4))
[ $((chips % chips_per_host)) -eq 0 ] ||
  fail "--topology $topology has $chips chips, which hosts of $chips_per_host do not make up:" \
    "change it"
hosts=$((chips / chips_per_host))

# The other verbs find out by themselves.
if [ "$num_slices" -gt 1 ] && [[ "$verb" =~ ^(train|benchmark)$ ]]; then
  arguments+=("--config.mesh.num_slices=$num_slices")
fi
command="[bash, launch/local.sh, ${verb_flags[*]:+--verb, $verb, }--extra, tpu, --"
for argument in "${arguments[@]}"; do
  command+=", '${argument//\'/\'\'}'"
done
command+="]"

manifest="$(<launch/gke_jobset.yaml)"
for key in name image topology num_slices max_restarts accelerator hosts chips_per_host command; do
  text="${!key}"
  [ "$key" = topology ] && text="$grid"
  manifest="${manifest//"{{$key}}"/"$text"}"
done
if [ -n "$dry_run" ]; then
  run kubectl apply -f -
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
