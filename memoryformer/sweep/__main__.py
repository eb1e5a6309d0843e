"""The command line of sweeps: see the package's docstring."""

import dataclasses

from absl import flags
from ml_collections import config_flags

from memoryformer import errors


def main(argv):
    """Read the flags and run the command that `argv` names."""
    errors.check_arguments(argv[:1], config=flags.FLAGS.config)
    from memoryformer.sweep import commands

    config = flags.FLAGS["config"]
    names = [f.name for f in dataclasses.fields(commands.Options)]
    options = commands.Options(**{name: flags.FLAGS[name].value for name in names})
    return commands.main(
        argv[1:],
        config_flags.get_config_filename(config),
        flags.FLAGS.sweep,
        flags.FLAGS.root,
        dict(config_flags.get_override_values(config)),
        options,
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment: FILE.py[:ARGUMENT].")
    flags.DEFINE_list("sweep", [], "Sweeps of the config file, to be multiplied.")
    flags.DEFINE_string("root", "runs/sweeps", "Where sweeps live.")
    flags.DEFINE_integer("index", -1, "print: this point alone.")
    flags.DEFINE_bool("todo", False, "print: leave out what is done or has failed.")
    flags.DEFINE_integer("parallel", 1, "run: processes at a time.", lower_bound=1)
    flags.DEFINE_bool("retry_failed", False, "run: points that failed, too.")
    flags.DEFINE_string("baseline", "", "collect: variant to compare with.")
    flags.DEFINE_string(
        "best_over",
        "",
        "collect: field that each side has its own best of; '' = the learning rate.",
    )
    errors.run_main(main)
