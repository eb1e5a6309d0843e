"""The errors a user can cause, each one line long and each with its exit code.

A launcher decides from the exit code whether to start the job again:

    0 done · 1 bug · 2 config or usage · 42 preempted, state saved (start again) ·
    43 hang (start again) · 44 numbers not finite · 45 storage · 46 data

`cli.run_main` ends a command with them. Start at `MemoryFormerError`.
"""


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
