"""What a run would need on a target: see `examine`.

python -m memoryformer.dryrun --config=configs/memoryformer_base.py --target=v6e:8x8
"""

import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from memoryformer import cli
from memoryformer.dryrun import examine as examine_lib
from memoryformer.dryrun import report as report_lib
from memoryformer.training import experiment


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    flags.DEFINE_string(
        "target",
        "cpu",
        "A chip and how many: cpu, h100, h200:8, a100:4, v5e:2x4, v6e:8x8.",
    )
    flags.DEFINE_string("compile", "auto", "auto, full, blocks or none.")
    flags.DEFINE_bool("json", False, "Print the whole report as one JSON object.")
    cli.define_path_flag("output", "Also write that object to this file.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Print what the run of `--config` needs on `--target`."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device here
    # What was compiled for a device that is not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    config = flags.FLAGS.config
    cli.check_arguments(argv, config=config)
    report = examine_lib.examine(
        experiment.resolve(config), flags.FLAGS.target, flags.FLAGS.compile
    )
    print(report.as_json() if flags.FLAGS.json else report_lib.describe(report))
    if flags.FLAGS.output:
        path = pathlib.Path(flags.FLAGS.output)
        path.write_text(report.as_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
