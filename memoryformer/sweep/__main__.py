"""The command line of sweeps: see the package's docstring."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from memoryformer import cli

ROOT = "runs/sweeps"
# Which flags each command looks at, beside those of every one.
LOOKED_AT = {
    "list": (),
    "check": (),
    "print": ("index", "todo", "retry_failed"),
    "run": ("parallel", "retry_failed"),
    "submit": ("parallel", "retry_failed", "launcher", "launcher_options", "script"),
    "collect": ("baseline", "best_over"),
}


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    flags.DEFINE_list("sweep", [], "Sweeps of the config file, to be multiplied.")
    cli.define_path_flag("root", "Where sweeps live; runs/sweeps if not given.")
    flags.DEFINE_integer("index", -1, "print: this point alone.")
    flags.DEFINE_bool("todo", False, "print: leave out what is done or has failed.")
    flags.DEFINE_integer(
        "parallel",
        None,
        "run: processes at a time (1); submit: points at a time (all).",
        lower_bound=1,
    )
    flags.DEFINE_bool(
        "retry_failed", False, "run, submit, print --todo: points that failed, too."
    )
    flags.DEFINE_string("launcher", "local", "submit: local (this machine) or slurm.")
    flags.DEFINE_string("launcher_options", "", "submit: options for sbatch, quoted.")
    cli.define_path_flag("script", "submit: what sbatch is given, slurm_array.sh.")
    flags.DEFINE_string("baseline", "", "collect: variant to compare with.")
    flags.DEFINE_string(
        "best_over",
        "",
        "collect: field that each side has its own best of; '' = the learning rate.",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv):
    """Read the flags and run the command that `argv` names."""
    cli.check_arguments(argv[:1], config=flags.FLAGS.config)
    from memoryformer.sweep import commands
    from memoryformer.training import host_memory

    for name in sorted(set().union(*LOOKED_AT.values())):
        if name not in LOOKED_AT.get(argv[1] if len(argv) > 1 else "", (name,)):
            cli.refuse_flags([name], f"{argv[1]} does not look at it")
    host_memory.keep()
    config = flags.FLAGS["config"]
    names = [f.name for f in dataclasses.fields(commands.Options)]
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    options = commands.Options(**values)
    return commands.main(
        argv[1:],
        config_flags.get_config_filename(config),
        flags.FLAGS.sweep,
        flags.FLAGS.root or ROOT,
        dict(config_flags.get_override_values(config)),
        options,
    )


if __name__ == "__main__":
    main()
