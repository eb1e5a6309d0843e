"""What the model of a config costs.

python -m memoryformer.accounting --config=configs/memoryformer_base.py [--json]
"""

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from memoryformer import accounting, cli, errors
from memoryformer.model import ModelConfig


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    flags.DEFINE_bool("json", False, "Print JSON.")
    flags.DEFINE_integer("value_bytes", 2, "Bytes of a stored value.", lower_bound=1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Print what the model of `--config` costs."""
    cli.check_arguments(argv, config=flags.FLAGS.config)
    section = flags.FLAGS.config.get("model")
    if section is None:
        raise errors.ConfigError("config.model: missing; the config has no model.")
    model = ModelConfig.from_config(section)
    costs = accounting.count(model, value_bytes=flags.FLAGS.value_bytes)
    if flags.FLAGS.json:
        print(json.dumps(dataclasses.asdict(costs), indent=2))
    else:
        print(accounting.table(costs))


if __name__ == "__main__":
    main()
