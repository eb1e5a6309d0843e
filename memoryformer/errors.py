"""The errors a user can cause, each one line long and each with its exit code.

A launcher decides from the exit code whether to start the job again:

    0 done · 1 bug · 2 config or usage · 42 preempted, state saved (start again) ·
    43 hang (start again) · 44 numbers not finite · 45 storage · 46 data

Start at `run_main`.
"""

import contextlib
import itertools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from memoryformer import console


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
    with contextlib.suppress(OSError):  # nobody reads: the code says it all the same
        if debug:
            traceback.print_exception(error)
        message = str(error) if debug else " ".join(str(error).splitlines())
        print(f"error: {message}", file=sys.stderr, flush=True)
    return error.exit_code


def first_line(error: BaseException) -> str:
    """Return the first line of a foreign error, shortened in the middle."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    # The operating system's reason comes last, behind several long paths.
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-170:]}"


def as_ours(error: BaseException) -> MemoryFormerError | None:
    """Return `error` as the one that a user is told of; None for a bug, told in full.

    The one place that says which exit code a foreign error has: that of files (a full
    disk, a folder that may not be written, a reader that is gone) and of memory.
    """
    if isinstance(error, MemoryFormerError):
        return error
    if isinstance(error, OSError):
        named = f"{error.filename}: " if error.filename else ""
        return _caused(StorageError(f"{named}{error.strerror or error}."), error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:80]:
        message = f"not enough memory: {first_line(error)}; lower the sizes asked for."
        return _caused(ConfigError(message), error)
    return None


def _caused(ours: MemoryFormerError, error: BaseException) -> MemoryFormerError:
    ours.__cause__ = error
    return ours


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
    written, sys.argv = sys.argv, list(sys.argv if argv is None else argv)
    own: set[str] = set()
    try:
        try:
            define_flags()  # that of a config reads the command line
        except flags.Error as error:
            sys.exit(report(_usage_error(error, sys.argv), debug=False))
        finally:
            own = set(flags.FLAGS) - before  # the others are absl's, defined once
        app.run(lambda words: _guarded(main, words), sys.argv, _parse_flags)
    finally:
        sys.argv = written
        for name in set(flags.FLAGS):
            if name in own or name.startswith("config."):
                delattr(flags.FLAGS, name)


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
        ours = as_ours(error)
        if ours is None:
            raise
        if isinstance(error, BrokenPipeError):
            console.silence(sys.stdout)
        return report(ours, debug=flags.FLAGS.debug)


def check_arguments(argv: Sequence[str], *, config: Any, required: bool = True) -> None:
    """Raise `ConfigError` for stray words and for a config that is asked for and missing."""
    if len(argv) > 1:
        raise ConfigError(
            f"{argv[1]!r}: not a flag; write --config=FILE --config.SECTION.KEY=VALUE."
        )
    if config is None and required:
        raise ConfigError("--config is missing: name one, such as configs/x.py.")


def refuse_flags(names: Sequence[str], reason: str) -> None:
    """Raise `ConfigError` for the first of these flags that the command line sets."""
    for name in names:
        if flags.FLAGS[name].present:
            raise ConfigError(f"--{name}: {reason}.")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # --help, which absl ends with 1
        sys.exit(0)
    except Exception as error:  # of whatever kind ml_collections raises
        if "--debug" in argv:
            raise
        sys.exit(report(_usage_error(error, argv), debug=False))


def _usage_error(error: Exception, argv: Sequence[str]) -> MemoryFormerError:
    """What is wrong with a command line, in a line."""
    if isinstance(error.__context__, MemoryFormerError):
        return error.__context__  # a parser's of ours, which absl has wrapped
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    message = " ".join(message.split()) or type(error).__name__
    return _override_error(argv) or ConfigError(message)


def _override_error(argv: Sequence[str]) -> ConfigError | None:
    """Name the first `--config.KEY` that the config file does not have."""
    from memoryformer import config as config_lib  # it imports this module

    words = [f"-{a}" if a.startswith("-config") else a for a in argv]
    files = [a.partition("=")[2] for a in words if a.startswith("--config=")]
    files += [b for a, b in itertools.pairwise(words) if a == "--config"]
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
