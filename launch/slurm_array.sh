#!/bin/bash
# The points of a sweep, one array task each, four at a time:
#
#   sweep="--config=configs/studies.py --sweep=table4,seed"
#   last=$(( $(python -m memoryformer.sweep $sweep print | wc -l) - 1 ))
#   sbatch --array=0-$last%4 launch/slurm_array.sh $sweep
#
# Submit it again after changing anything else: points that are done end at once. Exit codes
# are those of slurm.sh. For points that need several nodes add --nodes.
#SBATCH --job-name=memoryformer-sweep
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=1 --cpus-per-task=8 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=TERM@300
#SBATCH --output=%x-%A_%a.log

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${SCRATCH:-$HOME}/jax_cache}

# On the batch node's processor: this step needs no accelerator.
command=$(JAX_PLATFORMS=cpu python -m memoryformer.sweep "$@" \
  --index="$SLURM_ARRAY_TASK_ID" --todo print) || exit $?
if [ -z "$command" ]; then
  echo "point $SLURM_ARRAY_TASK_ID is done, or has failed (see 'status')"
  exit 0
fi
echo "$command"
srun --kill-on-bad-exit=1 bash -c "$command"
code=$?

case $code in
  42 | 43 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
      echo "exit code $code: back into the queue"
      scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else
      echo "exit code $code after $SLURM_RESTART_COUNT restarts: giving up" >&2
    fi
    ;;
esac
exit $code
