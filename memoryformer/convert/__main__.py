"""Convert checkpoints.

python -m memoryformer.convert gpt_neox SOURCE DIR [--tables=T]    Pythia -> export
python -m memoryformer.convert released SOURCE DIR [--tables=T]    released code -> export
python -m memoryformer.convert export WORKDIR DIR [--to=FORMAT]    run -> export or FORMAT
python -m memoryformer.convert import DIR WORKDIR [--config=FILE]  export -> run
python -m memoryformer.convert memorise SOURCE WORKDIR [--parts=P] dense -> memory layers
python -m memoryformer.convert recency --workdir=RUN [--output=DIR]  heads -> recurrent ones

memorise takes a run, an export or a GPT-NeoX directory, and makes a run: --parts of qkv, output,
ffn; --layers=0,2-4; --bits=8 or qkv=4,ffn=8; --tokens to fit to. A conversion that was stopped
goes on.

SOURCE is a directory or hub:owner/name; T is float32, bfloat16 or int8; FORMAT is
safetensors (an export), gpt_neox or released. What ends a document is read from the files
of a gpt_neox SOURCE; --end_token=TOKEN says it where they do not.

`recency` measures how much of each head's attention lies on the last --window tokens of the
training text (docs/recurformer.md) and, with --output, writes a run whose heads of the highest ratio
(--share of all, or at least --threshold) are recurrent and need no cache.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from memoryformer import cli, errors
from memoryformer import config as config_lib
from memoryformer.files import paths, stores

# Which flags each command looks at.
_COMMANDS = {
    "gpt_neox": ("tables", "revision", "end_token"),
    "released": ("tables", "revision", "end_token", "released_config"),
    "export": ("step", "to", "tables"),
    "import": ("config",),
    "memorise": (
        *("config", "parts", "layers", "bits", "tokens", "mix", "thresholds", "score"),
        *("target", "solver", "eval_batches", "ridges", "revision"),
    ),
}
_FLAGS = tuple(dict.fromkeys(flag for used in _COMMANDS.values() for flag in used))
_OF_RECENCY = ("output", "window", "share", "threshold", "first_token", "batches")


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config_flag()
    flags.DEFINE_string("tables", "float32", "How tables are stored.")
    flags.DEFINE_integer("step", -1, "Which step; the newest if negative.")
    flags.DEFINE_string("to", "safetensors", "The format to export to.")
    flags.DEFINE_string("revision", "", "Of a hub repository.")
    flags.DEFINE_string(
        "end_token", "", "What ends a document; '': what SOURCE's files say."
    )
    cli.define_path_flag(
        "released_config", "The yml of a released checkpoint that carries none."
    )
    _define_memorise_flags()
    _define_recency_flags()


def _define_memorise_flags():
    flags.DEFINE_string("parts", "qkv,ffn", "memorise: of qkv, output and ffn.")
    flags.DEFINE_string("layers", "", "memorise: such as 0,2-4; '': all.")
    flags.DEFINE_string("bits", "8", "memorise: tau, or by part: qkv=4,ffn=8.")
    flags.DEFINE_integer("tokens", 98_304, "memorise: how many to fit to.", 1)
    flags.DEFINE_string(
        "mix",
        "none",
        "memorise: none, hadamard, orthogonal, grouped or auto, or by part; "
        "several as a sum of layers: ffn=none+hadamard.",
    )
    flags.DEFINE_bool("thresholds", True, "memorise: centre what is hashed.")
    flags.DEFINE_string("score", "l1", "memorise: model.score of the new layers.")
    flags.DEFINE_string(
        "target", "layer", "memorise: layer, or stream: make up for errors before."
    )
    flags.DEFINE_string("solver", "auto", "memorise: auto, exact or gradients.")
    flags.DEFINE_integer(
        "eval_batches", 8, "memorise: how many the loss is told on; 0: all.", 0
    )
    flags.DEFINE_string(
        "ridges",
        "0.1,0.01,0.001,0.0001",
        "memorise: to choose from, times the mean diagonal.",
    )


def _define_recency_flags():
    cli.define_path_flag(
        "workdir", "The run whose heads recency measures.", in_store=True
    )
    cli.define_path_flag(
        "output", "Where recency writes a run; none: it only measures."
    )
    flags.DEFINE_integer("window", 16, "w of recency, in tokens.", 1, 2**20)
    flags.DEFINE_float("share", 0.5, "Of all heads, to become recurrent.", 0, 1)
    flags.DEFINE_float("threshold", None, "Instead: the least ratio.", 0, 1)
    flags.DEFINE_bool("first_token", False, "The first token counts as near.")
    flags.DEFINE_integer(
        "batches", 8, "Batches of training text to measure, an epoch at most.", 1
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises `SystemExit` with its exit code."""
    cli.run_main(_run, define_flags, argv)


def _run(argv):
    """Dispatch to the subcommand."""
    if argv[1:] == ["recency"]:
        _recency()
        return
    cli.refuse_flags(
        ("workdir", *_OF_RECENCY), "only recency looks at it; leave it out"
    )
    from memoryformer.convert import export, folders, gpt_neox, released, transfer

    if len(argv) != 4:
        raise errors.ConfigError(
            "usage: python -m memoryformer.convert gpt_neox|released|export|import|memorise "
            "FROM TO, or recency --workdir=RUN; --help says more."
        )
    command, origin, target = argv[1], argv[2], str(paths.local(argv[3], "TO"))
    if command == "export" and stores.is_store(origin):
        origin = stores.checked(origin, "FROM")
    elif not origin.startswith("hub:"):
        origin = str(paths.local(origin, "FROM"))
    config_lib.choose(command, _COMMANDS, "subcommand")
    _refuse_unused_flags(command, origin)
    config_lib.choose(flags.FLAGS.tables, export.TABLE_TYPES, "--tables")
    config_lib.choose(flags.FLAGS.to, transfer.FORMATS, "--to")
    if command == "memorise":
        _memorise(origin, target)
    elif command == "export":
        step = None if flags.FLAGS.step < 0 else flags.FLAGS.step
        tables, form = flags.FLAGS.tables, flags.FLAGS.to
        transfer.export_run(origin, target, step=step, form=form, tables=tables)
    elif command == "import":
        transfer.import_run(origin, target, flags.FLAGS.config)
    else:
        directory = transfer.fetch(origin, flags.FLAGS.revision)
        folders.check_free(target)
        if command == "gpt_neox":
            config, params = gpt_neox.load_gpt_neox(directory)
        else:
            yml = flags.FLAGS.released_config or ""
            config, params = released.load_released(directory, yml)
        export.save_export(
            target,
            config,
            params,
            tokenizer=_tokenizer(command, directory),
            tables=flags.FLAGS.tables,
            source={
                "format": command,
                "from": origin,
                "revision": flags.FLAGS.revision,
            },
        )
    print(f"{origin} -> {target}")


def _memorise(origin, target):
    from memoryformer.convert import transfer
    from memoryformer.convert.memorise import conversion, options, report

    names = [field.name for field in dataclasses.fields(options.Options)]
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
    chosen = options.Options(**values)
    directory = transfer.fetch(origin, flags.FLAGS.revision)
    told = conversion.memorise(directory, target, chosen, flags.FLAGS.config)
    print(report.table(told))


def _recency():
    """Measure a run's heads, and convert it."""
    from memoryformer.convert import recency

    values = flags.FLAGS
    unused = [name for name in _FLAGS if name != "step"]
    cli.refuse_flags(unused, "recency does not look at it; leave it out")
    if values.workdir is None:
        raise errors.ConfigError("--workdir=RUN: missing; recency measures a run.")
    if values.threshold is not None:
        cli.refuse_flags(["share"], "--threshold chooses the heads; leave one out")
    options: dict[str, Any] = {
        name: values[name].value for name in _OF_RECENCY if name != "output"
    }
    step = None if values.step < 0 else values.step
    print(recency.convert_run(values.workdir, values.output, step=step, **options))
    if values.output is not None:
        print(f"{values.workdir} -> {values.output}")


def _refuse_unused_flags(command, origin):
    unused = [name for name in _FLAGS if name not in _COMMANDS[command]]
    cli.refuse_flags(unused, f"{command} does not look at it; leave it out")
    if flags.FLAGS.to != "safetensors":
        cli.refuse_flags(["tables"], "only --to=safetensors stores tables narrower")
    if not origin.startswith("hub:"):
        cli.refuse_flags(["revision"], "is of a hub repository: FROM=hub:owner/name")


def _tokenizer(command, directory):
    """The tokenizer beside the weights; --end_token wins over what its files say."""
    from memoryformer.convert import export, gpt_neox

    end_token = flags.FLAGS.end_token
    if command == "gpt_neox" and not end_token:
        end_token = gpt_neox.end_token(directory)
    try:
        tokenizer = export.load_tokenizer(directory, end_token)
    except errors.MemoryFormerError as error:  # there is no config here to name it in
        message = str(error).replace("--config.data.end_token", "--end_token")
        raise type(error)(message.replace("data.end_token", "--end_token")) from error
    if tokenizer is None:
        reason = f"{directory} holds no tokenizer.json"
        cli.refuse_flags(["end_token"], reason)
    return tokenizer


if __name__ == "__main__":
    main()
