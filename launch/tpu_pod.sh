#!/usr/bin/env bash
# A TPU pod from its request to its end, with gcloud. Actions, in the order in which they are used:
#   create --name N --zone Z --type v5litepod-256 [--spot]   requests it, waits until it is there
#   copy   --name N --zone Z       copies the committed code, installs it on all hosts
#   run    --name N --zone Z [--verb train|encode|benchmark|sample|evaluate] -- FLAGS OF THE VERB
#   logs   --name N --zone Z       follows the log of the first host; Ctrl-C leaves the run alone
#   stop   --name N --zone Z       lets the run save a checkpoint and end, and waits for it
#   delete --name N --zone Z
# as in  bash launch/tpu_pod.sh stop --name N --zone Z. Also: --project P, --runtime VERSION
# (default: that of the type), --dry_run (prints the commands and runs none).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

usage="bash launch/tpu_pod.sh create|copy|run|logs|stop|delete --name N --zone Z"
usage+=" (see the top of the script)"
[ $# -gt 0 ] || fail "no action: $usage"
action="$1"
case "$action" in --help | -h) ;; *) shift ;; esac
name="" zone="" project="" type="" runtime="" spot=""
parse "$usage" "name zone project type runtime" "spot" "$@"
for needed in name zone; do
  [ -n "${!needed}" ] || fail "--$needed is missing: $usage"
done
need_program gcloud "see https://cloud.google.com/sdk/docs/install"
place=(--zone="$zone" ${project:+--project="$project"})

on_hosts() { # on_hosts WORKER COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

default_runtime() {
  case "$type" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "no runtime is known for --type $type: name one with --runtime" ;;
  esac
}

case "$action" in
  create)
    [ -n "$type" ] || fail "create needs --type, such as v5litepod-256 or v5p-128"
    runtime="${runtime:-$(default_runtime)}"
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
      --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot}
    describe=(gcloud compute tpus queued-resources describe "$name" "${place[@]}"
      "--format=value(state.state)")
    if [ -n "$dry_run" ]; then
      run "${describe[@]}"
      echo "# … every 30 s, until it says ACTIVE"
      exit 0
    fi
    while true; do
      state="$("${describe[@]}")"
      echo "$(date +%H:%M:%S) $name: $state" >&2
      case "$state" in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDING | SUSPENDED)
          look="gcloud compute tpus queued-resources describe $name"
          fail "the request for $name ended as $state: look at '$look', then delete it"
          ;;
      esac
      sleep 30
    done
    ;;
  copy)
    archive="${TMPDIR:-/tmp}/diffit_jax-$name.tar.gz"
    [ -z "$(git status --porcelain 2>/dev/null)" ] ||
      echo "warning: only committed code is copied" >&2
    run git archive --format=tar.gz --output="$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:diffit_jax.tar.gz" "${place[@]}" \
      --worker=all
    # The runtime images have Python 3.10.
    on_hosts all "command -v python3.11 || \
(sudo apt-get update -q && sudo apt-get install -q -y python3.11 python3.11-venv); \
mkdir -p diffit_jax && tar -xzf diffit_jax.tar.gz -C diffit_jax && \
PYTHON=python3.11 bash diffit_jax/launch/setup_env.sh tpu"
    ;;
  run)
    need_run
    # In braces: the shell that ssh started must not wait.
    on_hosts all "cd diffit_jax || exit 1; \
if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then \
echo 'error: a run is under way: stop it first' >&2; exit 1; fi; \
{ nohup bash launch/local.sh ${verb_flags[*]:+${verb_flags[*]} }--extra tpu -- \
${arguments[*]@Q} >>train.log 2>&1 </dev/null & echo \$! >run.pid; }"
    ;;
  logs) on_hosts 0 "tail -n 100 -F diffit_jax/train.log" ;;
  stop)
    on_hosts all "pid=\"\$(cat diffit_jax/run.pid)\" && kill -TERM \"\$pid\"; \
while kill -0 \"\$pid\" 2>/dev/null; do sleep 1; done"
    ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet ;;
  *) fail "action $action is unknown: $usage" ;;
esac
