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

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${SCRATCH:-$HOME}/jax_cache}

# No "B:" in --signal and no trap here: the signal goes to the processes that srun started.
srun --kill-on-bad-exit=1 python -m memoryformer.training "$@"
code=$?

case $code in
  42 | 43 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
      echo "exit code $code: back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "exit code $code after $SLURM_RESTART_COUNT restarts: giving up" >&2
    fi
    ;;
esac
exit $code
