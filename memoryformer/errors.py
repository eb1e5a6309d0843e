"""The errors a user can cause, each one line long and each with its exit code.

A launcher decides from the exit code whether to start the job again:

    0 done · 1 bug · 2 config or usage · 42 preempted, state saved (start again) ·
    43 hang (start again) · 44 numbers not finite · 45 storage · 46 data

Start at `run_main`.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging


class MemoryFormerError(Exception):
    """An error whose message is one clear line: field, value, reason, fix."""

    exit_code = 1


class ConfigError(MemoryFormerError, ValueError):
    """A wrong configuration or command line."""

    exit_code = 2


class Preempted(MemoryFormerError):
    """The run was asked to stop, and its state is saved."""

    exit_code = 42


class HangError(MemoryFormerError):
    """No step finished within its time limit."""

    exit_code = 43


class NumericError(MemoryFormerError, FloatingPointError):
    """A loss or gradient was not finite."""

    exit_code = 44


class StorageError(MemoryFormerError, OSError):
    """A checkpoint or another file could not be written or read."""

    exit_code = 45


class DataError(MemoryFormerError, ValueError):
    """Missing, empty or damaged data."""

    exit_code = 46


def define_debug_flag() -> None:
    """Define `--debug`, once however many modules ask for it."""
    if "debug" not in flags.FLAGS:
        flags.DEFINE_bool("debug", False, "Show the traceback of a user's error.")


def report(error: MemoryFormerError, *, debug: bool) -> int:
    """Print `error` as one line on standard error and return its exit code."""
    if debug:
        traceback.print_exception(error)
    message = " ".join(str(error).split("\n")) if not debug else str(error)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return error.exit_code


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Run `main(argv)` under absl: flags parsed, user errors as one line, exit code."""
    define_debug_flag()

    def guarded(argv: Sequence[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax writes pages of INFO
        try:
            return main(argv)
        except MemoryFormerError as error:
            return report(error, debug=flags.FLAGS.debug)
        except OSError as error:  # a full disk, a folder that may not be written, ...
            named = f"{error.filename}: " if error.filename else ""
            failure = StorageError(f"{named}{error.strerror or error}.")
            failure.__cause__ = error
            return report(failure, debug=flags.FLAGS.debug)

    app.run(guarded, flags_parser=_parse_flags)


def check_arguments(argv: Sequence[str], *, config: Any, required: bool = True) -> None:
    """Raise `ConfigError` for stray words and for a config file that is not there."""
    if len(argv) > 1:
        raise ConfigError(
            f"{argv[1]!r}: not a flag; write --config=FILE --config.SECTION.KEY=VALUE."
        )
    if config is None:
        if required:
            raise ConfigError("--config is missing: name one, such as configs/x.py.")
        return
    # ml_collections reports a file that it could not load when a field is first read.
    try:
        config.to_dict()
    except (AttributeError, OSError) as error:
        problem = error.__cause__ or error
        raise ConfigError(f"--config: {' '.join(str(problem).split())}") from error


def refuse_flags(names: Sequence[str], reason: str) -> None:
    """Raise `ConfigError` for the first of these flags that the command line sets."""
    for name in names:
        if flags.FLAGS[name].present:
            raise ConfigError(f"--{name}: {reason}.")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    from memoryformer import config as config_lib  # it imports this module

    # ml_collections looks for overrides in sys.argv.
    argv = sys.argv = config_lib.spread(argv)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # What ml_collections raises for an unknown or ill-typed override.
        if "--debug" in argv:
            raise
        # str() of a KeyError is the repr of its message.
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        message = " ".join(message.split())
        sys.exit(report(_override_error(argv) or ConfigError(message), debug=False))


def _override_error(argv: Sequence[str]) -> ConfigError | None:
    """Name the first `--config.KEY` that the config file does not have."""
    from memoryformer import config as config_lib  # it imports this module

    files = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    if not files:
        return None
    try:
        known = list(config_lib.flatten(config_lib.load(files[-1])))
    except MemoryFormerError as error:
        return error
    for argument in argv:
        key = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and key not in known:
            near = config_lib.suggest(key, known)
            return ConfigError(f"--config.{key}: the config has no such field{near}.")
    return None
