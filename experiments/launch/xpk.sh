#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through XPK (pip install xpk), which makes a JobSet of the command.
#
#   CLUSTER=my-cluster PROJECT=my-project ZONE=us-east5-a TPU_TYPE=v5p-128 IMAGE=us-docker.pkg.dev/me/qwen-jax \
#     experiments/launch/xpk.sh my-run /mnt/runs/my_run.py [--set a.b=c ...]
#
# IMAGE has this repository installed with its extra `tpu`. STORAGE names a file system of `xpk storage`, which all pods
# mount; configuration, data and output are paths in it. SLICES (1) is the number of slices.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
workload=$1
shift
# Kubernetes sends SIGTERM before it takes a pod away; the run saves in that time, and the JobSet starts all pods anew.
exec xpk workload create \
  --cluster="${CLUSTER:?}" --project="${PROJECT:?}" --zone="${ZONE:?}" \
  --workload="$workload" --tpu-type="${TPU_TYPE:?}" --num-slices="${SLICES:-1}" \
  --docker-image="${IMAGE:?}" ${STORAGE:+--storage="$STORAGE"} \
  --max-restarts="${MAX_RESTARTS:-20}" --termination-grace-period-seconds=300 \
  --command="qwen-jax train pretrain --distributed --config $(printf '%q ' "$@")"
