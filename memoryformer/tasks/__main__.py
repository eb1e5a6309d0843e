"""The command line of the generated tasks: train the model of a config.

python -m memoryformer.tasks TASK --config=FILE --workdir=DIR
python -m memoryformer.tasks listops --config=configs/listops.py:luna --workdir=runs/listops

TASK may be left out: the config names it. The same command goes on where a run was stopped.
"""

from collections.abc import Sequence

from absl import flags

from memoryformer import cli
from memoryformer.errors import ConfigError


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag(required=True)
    cli.define_path_flag("workdir", "Where the run lives.", required=True)
    flags.DEFINE_list("allow", [], "Fields that may differ from the checkpoint's.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Train the model of --config."""
    program, *words = argv
    cli.check_arguments([program, *words[1:]], config=flags.FLAGS.config)
    from memoryformer import config as config_lib
    from memoryformer.runs import console
    from memoryformer.tasks import experiment, registry, trainer

    config = flags.FLAGS.config
    run = experiment.resolve(config)
    if words and config_lib.choose(words[0], registry.TASKS, "task") != run.name:
        raise ConfigError(
            f"{words[0]!r}: --config is of the task {run.name!r}; name a config of that task."
        )
    with console.unbroken():  # what is printed is in metrics.jsonl too
        trainer.train(config, flags.FLAGS.workdir, allow=flags.FLAGS.allow)


if __name__ == "__main__":
    main()
