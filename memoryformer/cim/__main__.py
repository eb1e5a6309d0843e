"""Compute in memory: energy of a config, or a trained run under noise.

python -m memoryformer.cim energy --config=FILE [--batch=1] [--technology=edram,isaac] [--json]
python -m memoryformer.cim constants
python -m memoryformer.cim --workdir=DIR [--beside=DENSE_RUN] [--technology=pcm] [--seconds=86400]

The last writes table.md, noise.png and results.json to DIR/cim, prints the table, and goes on where
it was stopped. `--technology=all` measures every kind of noise.
"""

import dataclasses
import json
from collections.abc import Sequence

from absl import flags

from memoryformer import cli, errors
from memoryformer import config as config_lib

# Which flags each way looks at.
LOOKED_AT = {
    "energy": ("config", "batch", "technology", "json"),
    "constants": ("json",),
    "": (
        "workdir",
        "beside",
        "technology",
        "seconds",
        "seeds",
        "num_batches",
        "batch",
        "roles",
        "table_scale",
        "output",
    ),
}


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    cli.define_path_flag("workdir", "The run to look at.", in_store=True)
    cli.define_path_flag(
        "beside", "A run on the same data beside it: its dense twin.", in_store=True
    )
    flags.DEFINE_list(
        "technology", [], "Kinds of noise, 'pcm' if not given; energy: of hardware."
    )
    flags.DEFINE_float("seconds", 86_400.0, "The longest time of what ages.", 0.0)
    flags.DEFINE_integer("seeds", 10, "Draws of the noise.", 1, 10_000)
    flags.DEFINE_integer(
        "num_batches", 8, "Batches of 2048 validation tokens; 0 is all.", 0
    )
    flags.DEFINE_integer("batch", 1, "Tokens computed together, for energy.", 1, 2**30)
    flags.DEFINE_list("roles", [], "Which weights are noisy: tables, dense, head.")
    flags.DEFINE_string(
        "table_scale", "table", "w_max of tables: of each 'table' or of each 'column'."
    )
    cli.define_path_flag("output", "Folder for the results; WORKDIR/cim if not given.")
    flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv: Sequence[str]) -> None:
    """Run the way that the first word names."""
    way = argv[1] if len(argv) > 1 else ""
    config_lib.choose(way, LOOKED_AT, "subcommand")
    every = set().union(*LOOKED_AT.values())
    what = f"{way} does not look at it" if way else "is of cim energy"
    cli.refuse_flags(sorted(every - set(LOOKED_AT[way])), what)
    cli.check_arguments([*argv[:1], *argv[2:]], config=None, required=False)
    {"energy": _energy, "constants": _constants, "": _noise}[way]()


def _energy() -> None:
    """Print the rows of every technology, tables in rows and in crossbars."""
    values = flags.FLAGS
    cli.check_arguments([], config=values.config)
    section = values.config.get("model")
    if section is None:
        raise errors.ConfigError("config.model: missing; the config has no model.")
    from memoryformer.cim import energy, tables, technologies
    from memoryformer.model import ModelConfig, parts

    model_config = ModelConfig.from_config(section)
    found = []
    for name in values.technology or technologies.TECHNOLOGIES:
        found.append(energy.per_token(model_config, name, values.batch))
        plain = isinstance(technologies.TECHNOLOGIES[name], technologies.Memory)
        if parts.has_tables(model_config) and not plain:
            found.append(energy.per_token(model_config, name, values.batch, "crossbar"))
    if values.json:
        rows = [dataclasses.asdict(row) for rows in found for row in rows]
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(tables.energy(rows) for rows in found))


def _constants() -> None:
    from memoryformer.cim import constants, tables

    if flags.FLAGS.json:
        values = {k: dataclasses.asdict(v) for k, v in constants.CONSTANTS.items()}
        print(json.dumps(values, indent=2))
    else:
        print(tables.constants())


def _noise() -> None:
    """Measure, and write the table and the picture."""
    values = flags.FLAGS
    if not values.workdir:
        raise errors.ConfigError(
            "--workdir=DIR is missing: a run to look at; or write: energy --config=FILE."
        )
    from memoryformer.cim import experiment, settings
    from memoryformer.runs import console, remote

    options = {"table_scale": values.table_scale}
    if values.roles:
        options["roles"] = tuple(values.roles)
    chosen = settings.settings(values.technology or ["pcm"], values.seconds, options)
    folder = remote.output(values.output, values.workdir, "cim")
    with console.unbroken():
        experiment.report(
            values.workdir,
            values.beside,
            chosen,
            values.seeds,
            values.num_batches,
            values.batch,
            folder,
        )


if __name__ == "__main__":
    main()
