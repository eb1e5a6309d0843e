"""Convert checkpoints.

python -m memoryformer.convert gpt_neox SOURCE DIR [--tables=T]    Pythia -> export
python -m memoryformer.convert released SOURCE DIR [--tables=T]    released code -> export
python -m memoryformer.convert export WORKDIR DIR [--to=FORMAT]    run -> export or FORMAT
python -m memoryformer.convert import DIR WORKDIR [--config=FILE]  export -> run

SOURCE is a directory or hub:owner/name; T is float32, bfloat16 or int8; FORMAT is
safetensors (an export), gpt_neox or released.
"""

from absl import flags
from ml_collections import config_flags

from memoryformer import config as config_lib
from memoryformer import errors

_TABLES = flags.DEFINE_string("tables", "float32", "How tables are stored.")
_STEP = flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
_TO = flags.DEFINE_string("to", "safetensors", "The format to export to.")
_REVISION = flags.DEFINE_string("revision", "", "Of a hub repository.")
_RELEASED_CONFIG = flags.DEFINE_string(
    "released_config", "", "The yml of a released checkpoint that carries none."
)
_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


def main(argv):
    """Dispatch to the subcommand."""
    from memoryformer.convert import export, folders, gpt_neox, released, runs

    if len(argv) != 4:
        raise errors.ConfigError(
            "usage: python -m memoryformer.convert gpt_neox|released|export|import "
            "FROM TO; --help says more."
        )
    _, command, origin, target = argv
    known = ("gpt_neox", "released", "export", "import")
    config_lib.choose(command, known, "subcommand")
    config_lib.choose(_TABLES.value, export.TABLE_TYPES, "--tables")
    config_lib.choose(_TO.value, runs.FORMATS, "--to")
    if command == "export":
        step = None if _STEP.value < 0 else _STEP.value
        tables, form = _TABLES.value, _TO.value
        runs.export_run(origin, target, step=step, form=form, tables=tables)
    elif command == "import":
        runs.import_run(origin, target, _CONFIG.value)
    else:
        directory = runs.fetch(origin, _REVISION.value)
        folders.check_free(target)
        if command == "gpt_neox":
            config, params = gpt_neox.load_gpt_neox(directory)
        else:
            yml = _RELEASED_CONFIG.value
            config, params = released.load_released(directory, yml)
        export.save_export(
            target,
            config,
            params,
            tokenizer=export.load_tokenizer(directory),
            tables=_TABLES.value,
            source={"format": command, "from": origin, "revision": _REVISION.value},
        )
    print(f"{origin} -> {target}")


if __name__ == "__main__":
    errors.run_main(main)
