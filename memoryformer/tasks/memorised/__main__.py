"""A trained network of the task `memorised`, replaced by a table of its own steps.

python -m memoryformer.tasks.memorised --workdir=runs/mbi [--percents=15,50,100] [--output=FILE]

Prints the accuracy on held-out digits of the network, and of tables of the steps it takes at a
share of the training images: by the nearest row, plain and with tuned weights, and by hash codes.
"""

import dataclasses
from collections.abc import Sequence

from absl import flags

from memoryformer import cli, errors


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_path_flag("workdir", "The run of the network.", required=True)
    flags.DEFINE_integer("step", -1, "Its checkpoint; the newest if negative.")
    flags.DEFINE_list("percents", "15,50,100", "Training images with rows, in percent.")
    flags.DEFINE_integer(
        "draws", 20, "Weights that are tried.", lower_bound=0, upper_bound=10_000
    )
    flags.DEFINE_integer(
        "code_bits", 14, "Bits of a hash code.", lower_bound=1, upper_bound=16
    )
    flags.DEFINE_integer(
        "num_tables", 32, "Tables of the hash codes.", lower_bound=1, upper_bound=256
    )
    cli.define_path_flag("output", "File for the rows, as JSON.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Measure the run and print the table."""
    cli.check_arguments(argv, config=None, required=False)
    values = flags.FLAGS
    percents = [_percent(word) for word in values.percents]
    from memoryformer.files import atomic
    from memoryformer.tasks.memorised import study

    step = None if values.step < 0 else values.step
    options = study.Options(percents, values.draws, values.code_bits, values.num_tables)
    rows = study.measure(values.workdir, step, options)
    if values.output is not None:
        atomic.write_json(
            values.output, [dataclasses.asdict(row) for row in rows], indent=1
        )
    print(study.markdown(rows))


def _percent(word: str) -> float:
    """Read one of --percents; raises `ConfigError`."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value <= 100:
        raise errors.ConfigError(f"--percents={word!r}: expected numbers in (0, 100].")
    return value


if __name__ == "__main__":
    main()
