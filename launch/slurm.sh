#!/bin/bash
# One run on one or several nodes, a process on each:
#
#   sbatch launch/slurm.sh --config=configs/memoryformer_tiny.py --workdir=$SCRATCH/tiny
#   sbatch --nodes=4 launch/slurm.sh ...            # joined by SLURM's own variables
#
# SIGTERM, five minutes before the time is up or when the job is preempted, makes the run save
# and exit with 42. The job is then put back into the queue and goes on from there; so it is
# after a hang (43). Numbers that are not finite (44), a full disk (45) and other mistakes
# would only come again: they end the job.
#SBATCH --job-name=memoryformer
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=8 --cpus-per-task=32 --time=24:00:00
#SBATCH --requeue --open-mode=append --signal=TERM@300
#SBATCH --output=%x-%j.log

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

# No "B:" in --signal and no trap here: the signal goes to the processes that srun started.
# They end each other, with one exit code. Were srun to do it, at the first that ends, its
# code would be 143 for those that it ended; it does where one hangs.
# shellcheck disable=SC2086  # settings of several words
srun --kill-on-bad-exit=0 --wait=300 $SRUN_OPTIONS $CONTAINER "$PYTHON" -m memoryformer.training "$@"
code=$?

case $code in
  42 | 43 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
      echo "exit code $code: back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "exit code $code after $SLURM_RESTART_COUNT restarts: giving up" >&2
    fi
    ;;
esac
exit $code
