"""Command lines: flags, exit codes, and user errors as one line.

A command is `define_flags` and `main`; `run_main` runs it. Start there. `script` is the
console script `memoryformer`, whose subcommands are the same commands.
"""

import contextlib
import dataclasses
import itertools
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

import memoryformer
from memoryformer import config as config_lib
from memoryformer import errors
from memoryformer.files import paths, stores
from memoryformer.runs import console, old_configs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

flags.disclaim_key_flags()  # --help lists them under the command that asks for them

# Subcommand of the console script -> (module below memoryformer, what it does)
COMMANDS = {
    "train": ("training", "train a model, or go on training it"),
    "eval": ("harness", "evaluate a checkpoint"),
    "accounting": ("accounting", "FLOPs, parameters and bytes of a config"),
    "dryrun": ("dryrun", "what a run would need on a target"),
    "data": ("data", "prepare and inspect data"),
    "convert": ("convert", "convert checkpoints"),
    "generation": ("generation", "continue text"),
    "sweep": ("sweep", "many runs from one config"),
    "report": ("report", "a page and pictures of runs"),
    "tasks": ("tasks", "train a model on a generated task"),
    "cim": ("cim", "compute-in-memory: energy, and a run under noise"),
    "memorised": ("tasks.memorised", "a trained network replaced by a table"),
    "identifiability": ("identifiability", "whether data determine a layer"),
}


def define_config_flag(*, required: bool = False) -> None:
    """Define `--config=FILE[:ARGUMENT]` and its overrides `--config.SECTION.KEY=VALUE`."""
    config_flags.DEFINE_config_file("config", None, "Experiment: FILE.py[:ARGUMENT].")
    flags.FLAGS["config"].parser = _ConfigParser()
    if required:
        flags.mark_flag_as_required("config")


class _ConfigParser(flags.ArgumentParser):
    """Loads the config as `load` does, with its errors."""

    def parse(self, argument: str) -> ml_collections.ConfigDict:
        config = config_lib.load(argument)
        config_lib.forget_options(config, _overrides(sys.argv))
        return config.lock()

    def flag_type(self) -> str:
        return "config file"


def _overrides(argv: Sequence[str]) -> dict[str, str]:
    """Return {'SECTION.KEY': VALUE} of `--config.SECTION.KEY=VALUE` on a command line."""
    values = {}
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name.startswith("config."):
            values[name.removeprefix("config.")] = value if equals else following
    return values


def define_debug_flag() -> None:
    """Define `--debug`, once however many modules ask for it."""
    if "debug" not in flags.FLAGS:
        flags.DEFINE_bool("debug", False, "Show the traceback of a user's error.")


def report(error: errors.MemoryFormerError, *, debug: bool) -> int:
    """Print `error` as one line on standard error and return its exit code."""
    with contextlib.suppress(OSError):  # nobody reads: the code says it all the same
        if debug:
            traceback.print_exception(error)
        message = str(error) if debug else " ".join(str(error).splitlines())
        print(f"error: {message}", file=sys.stderr, flush=True)
    return error.exit_code


def run_main(
    main: Callable[[Sequence[str]], int | None],
    define_flags: Callable[[], None] = lambda: None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run `main(argv)` under absl: flags defined and parsed, user errors as one line.

    Raises `SystemExit` with the exit code. The flags go when it ends, so that a process
    may run several commands.
    """
    before = set(flags.FLAGS)
    define_debug_flag()
    saved_argv, sys.argv = sys.argv, list(sys.argv if argv is None else argv)
    defined: set[str] = set()
    try:
        try:
            define_flags()  # that of a config reads the command line
        except flags.Error as error:
            sys.exit(report(_usage_error(error, sys.argv), debug=False))
        finally:
            defined = set(flags.FLAGS) - before  # the others are absl's, defined once
            # Whatever file defines them, --help lists them.
            for name in defined | {"debug"}:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
        app.run(
            lambda words: _guarded(main, words), sys.argv, flags_parser=_parse_flags
        )
    finally:
        sys.argv = saved_argv
        for name in set(flags.FLAGS):
            if name in defined or name.startswith("config."):
                delattr(flags.FLAGS, name)


def script() -> None:
    """Run `memoryformer COMMAND ..`: the module of that command, started as by `python -m`."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command == "--version":
        print(f"memoryformer {memoryformer.__version__}")
    elif command in ("--help", "-h"):
        print("usage: memoryformer COMMAND [FLAGS], or memoryformer COMMAND --help\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:12s}{text}")
    elif command in COMMANDS:
        del sys.argv[1]
        module = f"memoryformer.{COMMANDS[command][0]}"
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        near = config_lib.suggest(command, COMMANDS)
        error = errors.ConfigError(f"{command!r}: no such command{near}.")
        sys.exit(report(error, debug=False))


def _guarded(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax writes pages of INFO
    for stream in (sys.stdout, sys.stderr):
        # A path need not have this terminal's letters.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(argv) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # while an error can still be told
        return code
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        ours = errors.as_ours(error)
        if ours is None:
            raise
        if isinstance(error, BrokenPipeError):
            console.silence(sys.stdout)
        return report(ours, debug=flags.FLAGS.debug)


def check_arguments(argv: Sequence[str], *, config: Any, required: bool = True) -> None:
    """Raise `ConfigError` for stray words and for a config that is asked for and missing."""
    if len(argv) > 1:
        raise errors.ConfigError(
            f"{argv[1]!r}: not a flag; write --config=FILE --config.SECTION.KEY=VALUE."
        )
    if config is None and required:
        raise errors.ConfigError("--config is missing: name one, such as configs/x.py.")


def refuse_flags(names: Sequence[str], reason: str) -> None:
    """Raise `ConfigError` for the first of these flags that the command line sets."""
    for name in names:
        if flags.FLAGS[name].present:
            raise errors.ConfigError(f"--{name}: {reason}.")


def chosen(cls: type[T]) -> T | None:
    """Return `cls` made of the flags that its fields are named as; None for its defaults."""
    names = (field.name for field in dataclasses.fields(cls))
    values = cls(**{name: flags.FLAGS[name].value for name in names})
    return None if values == cls() else values


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # --help, which absl ends with 1
        sys.exit(0)
    except Exception as error:  # of whatever kind ml_collections raises
        if "--debug" in argv:
            raise
        sys.exit(report(_usage_error(error, argv), debug=False))


def _usage_error(error: Exception, argv: Sequence[str]) -> errors.MemoryFormerError:
    """What is wrong with a command line, in a line."""
    if isinstance(error.__context__, errors.MemoryFormerError):
        return error.__context__  # a parser's of ours, which absl has wrapped
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    message = " ".join(message.split()) or type(error).__name__
    return _override_error(argv) or errors.ConfigError(message)


def _override_error(argv: Sequence[str]) -> errors.MemoryFormerError | None:
    """Name the first `--config.KEY` that the config file does not have."""
    words = [f"-{a}" if a.startswith("-config") else a for a in argv]
    files = [a.partition("=")[2] for a in words if a.startswith("--config=")]
    files += [b for a, b in itertools.pairwise(words) if a == "--config"]
    if not files:
        return None
    try:
        known = list(config_lib.flatten(config_lib.load(files[-1])))
    except errors.MemoryFormerError as error:
        return error
    for argument in argv:
        key = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and key not in known:
            reason = old_configs.why_unknown(key, known)
            return errors.ConfigError(f"--config.{key}: {reason}")
    return None


class _PathParser(flags.ArgumentParser):
    """Makes the value of a flag a path, `~` expanded; with `in_store` also the URL of a store."""

    syntactic_help = "a path"

    def __init__(self, name: str, in_store: bool):
        self._name, self._in_store = f"--{name}", in_store

    def parse(self, argument: str) -> str:
        if self._in_store and stores.is_store(argument):
            return stores.checked(argument, self._name)
        return str(paths.local(argument, self._name))

    def flag_type(self) -> str:
        return "path"


def define_path_flag(
    name: str, text: str, *, required: bool = False, in_store: bool = False
) -> flags.FlagHolder:
    """Define the flag --`name` that holds a path; None if it is not given.

    in_store: whether it may lie in an object store.
    """
    return flags.DEFINE(
        _PathParser(name, in_store),
        name,
        None,
        text,
        serializer=flags.ArgumentSerializer(),
        required=required,
    )
