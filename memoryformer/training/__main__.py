"""Train a model, or go on training it.

python train.py --config=FILE --workdir=DIR
python -m memoryformer.training --config=FILE --workdir=DIR
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from memoryformer import cli
from memoryformer.files import paths, stores
from memoryformer.runs import console


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    cli.define_path_flag(
        "workdir", "Where the run lives.", required=True, in_store=True
    )
    flags.DEFINE_list("allow", [], "Fields that may differ from the checkpoint's.")
    flags.DEFINE_string(
        "coordinator",
        "",
        "HOST:PORT of process 0 where there are several; auto: as jax finds out (TPU VMs); "
        "not needed under SLURM's srun and on GKE's TPUs.",
    )
    flags.DEFINE_integer("num_processes", 0, "How many processes there are.", 0)
    flags.DEFINE_integer("process_id", -1, "Which of them this one is.", -1)
    flags.DEFINE_float("init_timeout", 600.0, "Seconds to wait for all processes.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Check the command line, find the other processes and train."""
    values = flags.FLAGS
    cli.check_arguments(argv, config=values.config)
    if not stores.is_store(values.workdir):
        paths.workdir(values.workdir)
    from memoryformer.cluster import processes, roll_call
    from memoryformer.training import banner, host_memory, loop

    host_memory.keep()
    others = roll_call.start(
        values.coordinator,
        values.num_processes,
        values.process_id,
        values.init_timeout,
    )
    with console.unbroken(), others:
        preset = config_flags.get_config_filename(values["config"])
        if processes.is_chief():
            text = banner.text(values.config, preset, values.workdir)
            print(text, flush=True)
        loop.train(values.config, values.workdir, allow=values.allow)


if __name__ == "__main__":
    main()
