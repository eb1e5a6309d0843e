#!/bin/bash
# A run, or each point of a sweep, on GKE with xpk (https://github.com/AI-Hypercomputer/xpk):
#
#   CLUSTER=mine TYPE=v6e-16 IMAGE=gcr.io/me/memoryformer \
#     launch/gke_xpk.sh tiny --config=configs/memoryformer_tiny.py --workdir=/data/runs/tiny
#   CLUSTER=mine TYPE=v6e-1 IMAGE=... SWEEP="--config=configs/studies.py --sweep=table4,seed" \
#     launch/gke_xpk.sh table4
#
# The first word names the workload (for a sweep: NAME-INDEX). Workdirs must be on a volume that
# all pods mount. xpk starts a workload again after 42 and 143 (preempted), never after other
# codes: 43, a hang, is therefore passed on as 42. A pod that is taken away gets SIGTERM, which xpk
# sends to the subshell around the command, not to what runs in it: the trap passes it on, and
# `wait`, which a trapped signal ends, is called until the run has saved and is gone.
set -u
: "${CLUSTER:?name of the GKE cluster}" "${TYPE:?TPU type such as v6e-16}" "${IMAGE:?docker image}"
name=${1:?name of the workload}
shift

# On one line and without "$(" or "$$", which YAML and Kubernetes would read.
# shellcheck disable=SC2016 # for the pod's shell
WAIT='while kill -0 $run 2>/dev/null; do wait $run; done; wait $run; code=$?'
WAIT+='; [ $code = 43 ] && code=42'

submit() { # NAME COMMAND
  xpk workload create --cluster="$CLUSTER" --workload="$1" --tpu-type="$TYPE" \
    --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
    --max-restarts="${MAX_RESTARTS:-100}" \
    --termination-grace-period-seconds="${GRACE_SECONDS:-300}" \
    --command="trap 'kill -TERM \$run' TERM; $2 & run=\$!; $WAIT; exit \$code"
}

if [ -z "${SWEEP:-}" ]; then
  submit "$name" "python -m memoryformer.training$(printf ' %q' "$@")"
  exit
fi
# shellcheck disable=SC2086 # SWEEP is several words
points=$(JAX_PLATFORMS=cpu python -m memoryformer.sweep $SWEEP print) || exit $?
index=0
while read -r command; do
  submit "$name-$index" "$command" </dev/null || exit $?
  index=$((index + 1))
done <<<"$points"
