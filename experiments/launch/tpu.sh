#!/usr/bin/env bash
# Trains on Cloud TPU VMs: the same command on every worker of a slice, or of several slices of a queued resource.
#
#   tpu.sh setup                              copies this repository to all workers and installs it there
#   tpu.sh train FILE.py [--set a.b=c ...]    trains, and goes on after failures
#   tpu.sh stop                               saves and ends: a SIGTERM to one worker is enough
#
# TPU=my-slice ZONE=us-east5-a              a slice, made by
#     gcloud compute tpus tpu-vm create my-slice --zone=us-east5-a --accelerator-type=v5p-64 --version=v2-alpha-tpuv5
# QUEUED_RESOURCE=my-slices ZONE=...        several slices, made by
#     gcloud compute tpus queued-resources create my-slices --node-prefix=my-slices --node-count=2 --zone=us-east5-a \
#       --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e
set -uo pipefail

: "${ZONE:?set ZONE to the zone of the TPU}"
folder=${FOLDER:-qwen-jax}
if [ -n "${QUEUED_RESOURCE:-}" ]; then
  on=(gcloud compute tpus queued-resources)
  name=$QUEUED_RESOURCE
  all=(--node=all --worker=all)
  one=(--node=0 --worker=0)
elif [ -n "${TPU:-}" ]; then
  on=(gcloud compute tpus tpu-vm)
  name=$TPU
  all=(--worker=all)
  one=(--worker=0)
else
  echo "Set TPU to the name of a slice, or QUEUED_RESOURCE to that of a queued resource." >&2
  exit 2
fi

everywhere() {
  "${on[@]}" ssh "$name" --zone="$ZONE" "${all[@]}" --command="$1"
}

case ${1:-} in
  setup)
    root=$(cd "$(dirname "$0")/../.." && pwd)
    archive=$(mktemp -d)/qwen-jax.tar.gz
    git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    "${on[@]}" scp "$archive" "$name:qwen-jax.tar.gz" --zone="$ZONE" "${all[@]}" &&
      everywhere "mkdir -p $folder && tar -xzf qwen-jax.tar.gz -C $folder && cd $folder && python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"
    ;;
  train)
    shift
    [ $# -ge 1 ] || { echo "usage: tpu.sh train FILE.py[:FUNCTION] [--set PATH=VALUE ...]" >&2; exit 2; }
    command="cd $folder && .venv/bin/qwen-jax train pretrain --distributed --config $(printf '%q ' "$@")"
    # Stopped by SIGTERM is no failure.
    command+="|| { status=\$?; [ \$status -eq 143 ] || exit \$status; }"
    for ((try = 0; ; try++)); do
      begin=$SECONDS
      everywhere "$command"
      status=$?
      if [ "$status" -eq 0 ] || [ "$try" -ge "${MAX_RESTARTS:-20}" ]; then exit "$status"; fi
      # What fails at once would fail again.
      if [ $((SECONDS - begin)) -lt "${MIN_SECONDS:-600}" ]; then exit "$status"; fi
      echo "status $status after $((SECONDS - begin)) s: restart $((try + 1))" >&2
      sleep 30 # Until the workers that were left have noticed.
    done
    ;;
  stop)
    "${on[@]}" ssh "$name" --zone="$ZONE" "${one[@]}" --command="pkill -TERM -f 'qwen-jax train pretrain'"
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
