#!/bin/bash
# The points of a sweep, one array task each. `sweep submit` submits it:
#
#   sweep="--config=configs/studies.py --sweep=table4,seed"
#   python -m memoryformer.sweep $sweep --launcher=slurm --parallel=4 submit
#
# By hand, four at a time; points that are done, or have failed, end at once:
#
#   last=$(( $(python -m memoryformer.sweep $sweep print | wc -l) - 1 ))
#   sbatch --array=0-$last%4 launch/slurm_array.sh $sweep
#
# Exit codes are those of slurm.sh. For points that need several nodes add --nodes.
#SBATCH --job-name=memoryformer-sweep
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=1 --cpus-per-task=8 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=TERM@300
#SBATCH --output=%x-%A_%a.log

# Settings: set them in the environment of sbatch, or change them here, and in the other of
# slurm.sh and slurm_array.sh too: sbatch takes one file, so each has these lines.
PYTHON=${PYTHON:-python}                  # /path/to/.venv/bin/python
PREAMBLE=${PREAMBLE:-}                    # 'module load cuda; source .venv/bin/activate'
CONTAINER=${CONTAINER:-}                  # 'apptainer exec --nv image.sif': before PYTHON
SRUN_OPTIONS=${SRUN_OPTIONS:-}            # '--container-image=image.sqsh': of Pyxis
MAX_RESTARTS=${MAX_RESTARTS:-100}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${SCRATCH:-$HOME}/jax_cache}

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
eval "$PREAMBLE" || exit 2
# Since SLURM 22.05 the processes of srun have one core each, whatever the job has.
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# On the batch node's processor: this step needs no accelerator. Pyxis has its container in
# steps only.
alone=${SRUN_OPTIONS:+srun --nodes=1 --ntasks=1 $SRUN_OPTIONS}
# shellcheck disable=SC2086  # settings of several words
command=$(JAX_PLATFORMS=cpu $alone $CONTAINER "$PYTHON" -m memoryformer.sweep "$@" \
  --index="$SLURM_ARRAY_TASK_ID" --todo print) || exit $?
if [ -z "$command" ]; then
  echo "point $SLURM_ARRAY_TASK_ID is done, or has failed (see 'status')"
  exit 0
fi
command="$(printf %q "$PYTHON")${command#python}"
echo "$command"
# shellcheck disable=SC2086
srun --kill-on-bad-exit=0 --wait=300 $SRUN_OPTIONS $CONTAINER bash -c "$command"
code=$?

case $code in
  42 | 43 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
      echo "exit code $code: back into the queue"
      scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    else
      echo "exit code $code after $SLURM_RESTART_COUNT restarts: giving up" >&2
    fi
    ;;
esac
exit $code
