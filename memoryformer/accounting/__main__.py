"""What the model of a config costs.

python -m memoryformer.accounting --config=configs/memoryformer_base.py [--json]
"""

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from memoryformer import accounting, cli, errors
from memoryformer.model import ModelConfig
from memoryformer.runs import remote, steps


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_integer("value_bytes", 2, "Bytes of a stored value.", lower_bound=1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Print what the model of `--config` costs, and its teacher."""
    cli.check_arguments(argv, config=flags.FLAGS.config)
    section = flags.FLAGS.config.get("model")
    if section is None:
        raise errors.ConfigError("config.model: missing; the config has no model.")
    model = ModelConfig.from_config(section)
    costs = accounting.count(model, value_bytes=flags.FLAGS.value_bytes)
    fields, text = dataclasses.asdict(costs), accounting.table(costs)
    if folder := dict(flags.FLAGS.config.get("train", {})).get("teacher"):
        run = remote.copied(folder, name="train.teacher", params=False)
        stored = steps.facts(run)["config"]
        teacher = ModelConfig.from_config(stored["model"])
        costs = accounting.count(teacher, value_bytes=flags.FLAGS.value_bytes)
        fields["teacher"] = dataclasses.asdict(costs)
        text += f"\n\nthe teacher, of which training runs the forward pass: {folder}\n"
        text += accounting.table(costs)
    print(json.dumps(fields, indent=2) if flags.FLAGS.json else text)


if __name__ == "__main__":
    main()
