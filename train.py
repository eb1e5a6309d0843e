"""Train a model, or go on training it: python train.py --config=FILE --workdir=DIR."""

from absl import flags
from ml_collections import config_flags

from memoryformer import cli
from memoryformer.files import paths
from memoryformer.runs import console

_WORKDIR = cli.define_path_flag("workdir", "Where the run lives.", required=True)
_ALLOW = flags.DEFINE_list("allow", [], "Fields that may differ from the checkpoint's.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0 where there are several; auto: as jax finds out (TPU VMs); not "
    "needed under SLURM's srun and on GKE's TPUs.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", 0, "How many processes there are.", lower_bound=0
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", -1, "Which of them this one is.", lower_bound=-1
)
_INIT_TIMEOUT = flags.DEFINE_float(
    "init_timeout", 600.0, "Seconds to wait for all processes."
)


def main(argv):
    """Check the command line, find the other processes and train."""
    cli.check_arguments(argv, config=flags.FLAGS.config)
    paths.workdir(_WORKDIR.value)
    from memoryformer.cluster import processes, roll_call
    from memoryformer.training import banner, loop

    others = roll_call.start(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        _INIT_TIMEOUT.value,
    )
    with console.unbroken(), others:
        preset = config_flags.get_config_filename(flags.FLAGS["config"])
        if processes.is_chief():
            text = banner.text(flags.FLAGS.config, preset, _WORKDIR.value)
            print(text, flush=True)
        loop.train(flags.FLAGS.config, _WORKDIR.value, allow=_ALLOW.value)


if __name__ == "__main__":
    cli.run_main(main, cli.define_config_flag)
