#!/bin/bash
# A run on a (spot) TPU VM or pod slice, made, watched, and made again when it is taken away:
#
#   NAME=mf ZONE=us-east5-b TYPE=v6e-16 VERSION=v2-alpha-tpuv6e \
#     launch/tpu_vm.sh --config=configs/memoryformer_small.py --workdir=/mnt/disks/runs/small
#
# The workdir must outlive the VM: a mounted bucket or disk (SETUP is a command run once on each
# worker of a new VM, for that). Data too. The same command goes on where the run was.
set -u
: "${NAME:?a name for the TPU VM}" "${ZONE:?its zone}" "${TYPE:?such as v6e-8}"
VERSION=${VERSION:-tpu-ubuntu2204-base}
SPOT=${SPOT---spot}
SETUP=${SETUP:-true}
MAX_RETRIES=${MAX_RETRIES:-100}
BACKOFF_SECONDS=${BACKOFF_SECONDS:-60}

tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }
on_all() { tpu ssh "$NAME" --worker=all --command="$1"; }

make_vm() {
  tpu delete "$NAME" --quiet
  # shellcheck disable=SC2086 # SPOT may be empty
  tpu create "$NAME" --accelerator-type="$TYPE" --version="$VERSION" $SPOT || return 1
  git archive --output=/tmp/memoryformer-$$.tar HEAD || exit 2
  tpu scp "/tmp/memoryformer-$$.tar" "$NAME:code.tar" --worker=all || return 1
  rm -f "/tmp/memoryformer-$$.tar"
  on_all "mkdir -p code && tar -x -f code.tar -C code && cd code && python3 -m venv .venv &&
    .venv/bin/pip install --quiet -e '.[tpu]' && $SETUP"
}

arguments=$(printf ' %q' "$@")
for ((try = 0; try <= MAX_RETRIES; try++)); do
  [ "$try" -gt 0 ] && sleep "$BACKOFF_SECONDS"
  state=$(tpu describe "$NAME" --format='value(state)' 2>/dev/null)
  if [ "$state" != READY ] && ! make_vm; then
    echo "try $try: no TPU VM (state '${state:-none}')" >&2
    continue
  fi
  # gcloud does not pass exit codes of several workers on: each prints its own.
  output=$(on_all "cd code && .venv/bin/python -m memoryformer.training --coordinator=auto$arguments
    echo worker exit code \$?" 2>&1 | tee /dev/stderr)
  codes=$(grep -o 'worker exit code [0-9]*' <<<"$output" | grep -o '[0-9]*$' | sort -un)
  if [ "$codes" = 0 ]; then
    exit 0
  fi
  for code in $codes; do
    case $code in
      1 | 2 | 44 | 45 | 46) exit "$code" ;; # would only come again
    esac
  done
  echo "try $try: stopped with '${codes:-no answer}', going on" >&2
done
exit 43
