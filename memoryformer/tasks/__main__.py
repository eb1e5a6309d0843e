"""The command line of the generated tasks: train the classifier of a config.

python -m memoryformer.tasks --config=configs/listops.py:luna --workdir=runs/listops
"""

from collections.abc import Sequence

from absl import flags

from memoryformer import cli
from memoryformer.runs import console
from memoryformer.tasks import listops


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag(required=True)
    cli.define_path_flag("workdir", "Where metrics.jsonl goes.", required=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Train the classifier of --config."""
    cli.check_arguments(argv, config=flags.FLAGS.config)
    with console.unbroken():  # what is printed is in metrics.jsonl too
        listops.train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    main()
