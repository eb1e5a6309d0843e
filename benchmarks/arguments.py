"""Command lines of benchmarks: bounded numbers and lists; one line where something is wrong.

A benchmark makes its `Parser` before it imports jax, and as a command parses before that too:
`--help` waits for nothing, and what is wrong is said before anything is measured. Names that
only its cases know are looked up by `Parser.chosen`. `run` ends a command.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from benchmarks import timing
from memoryformer import cli, errors

LARGEST = 2**31 - 1  # no size or count is larger
USAGE = errors.ConfigError.exit_code


class Parser(argparse.ArgumentParser):
    """The flags of one benchmark.

    doc: its docstring, which says in the first line what it is, and then how it is started.
    """

    def __init__(self, doc: str):
        command = re.search(r"python -m [\w.]+", doc)
        assert command, "a benchmark's docstring says how it is started"
        super().__init__(prog=command.group(), description=doc.splitlines()[0])

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong, and end with the exit code of a usage error."""
        self.exit(USAGE, f"error: {message.removeprefix('argument ')}\n")

    def number(
        self, name: str, default: int, low: int = 1, high: int = LARGEST, help: str = ""
    ) -> None:
        """Define --name, a whole number in [low, high]."""
        self._define(name, default, lambda text: _whole(text, low, high), help)

    def numbers(
        self, name: str, default: Collection[int], high: int = LARGEST, help: str = ""
    ) -> None:
        """Define --name, a comma-separated list of whole numbers in [1, high], none twice."""
        listed = ",".join(map(str, default))

        def parse(text: str) -> list[int]:
            return _once([_whole(word, 1, high) for word in text.split(",")])

        self._define(name, listed, parse, f"{help or 'numbers'}, comma-separated")

    def real(self, name: str, default: float, help: str = "") -> None:
        """Define --name, a finite number of at least 0."""

        def parse(text: str) -> float:
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not 0 <= value < float("inf"):
                raise argparse.ArgumentTypeError(f"{text!r} is no number of 0 or more")
            return value

        self._define(name, default, parse, help)

    def names(
        self,
        name: str,
        known: Collection[str] = (),
        default: str | None = None,
        help: str = "",
    ) -> None:
        """Define --name, a comma-separated list that `chosen` looks up; known: for --help."""
        there = f" of {', '.join(known)}" if known else ""
        help = f"{help or 'some'}, comma-separated{there} (default: {default or 'all'})"
        self.add_argument(f"--{name}", metavar="NAMES", default=default, help=help)

    def chosen(self, name: str, value: str | None, known: Collection[str]) -> list[str]:
        """Return the names in the list `value`, all that are known for None; or end."""
        if value is None:
            return list(known)
        words = value.split(",")
        for word in words:
            if word not in known:
                there = ", ".join(known)
                self.error(f"--{name}: {word!r} is none of {there}")
        try:
            return _once(words)
        except argparse.ArgumentTypeError as error:
            self.error(f"--{name}: {error}")

    def cores(self) -> None:
        """Define --cores, for `timing.use_cores`."""
        self.number("cores", 0, low=0, help="to keep to; 0: all")

    def clock(self) -> None:
        """Define --clock, a key of `timing.CLOCKS`."""
        text = "cpu: of this process, for a machine that others use"
        self.add_argument(
            "--clock", choices=list(timing.CLOCKS), default="wall", help=text
        )

    def output(self, name: str, default: str | None = None, help: str = "") -> None:
        """Define --name, a file to write, whose folder is there; None and '': no file."""

        def parse(text: str) -> pathlib.Path | None:
            return _writable(text) if text or name == "output" else None

        self._define(name, default, parse, help)

    def _define(self, name: str, default: Any, parse: Callable, help: str) -> None:
        text = f"{help} (default: {default})".strip() if default is not None else help
        metavar = name.upper()
        self.add_argument(
            f"--{name}", type=parse, default=default, help=text, metavar=metavar
        )


def _whole(text: str, low: int, high: int) -> int:
    digits = text.removeprefix("-")
    # int() reads "1_0", " 1" and other scripts' digits too, and refuses 5,000 of them.
    if digits.isascii() and digits.isdigit() and len(digits) < 20:
        if low <= int(text) <= high:
            return int(text)
    limit = f"from {low} to {high}" if high < LARGEST else f"of {low} or more"
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number {limit}")


def _once(values: list) -> list:
    for value in values:
        if values.count(value) > 1:
            raise argparse.ArgumentTypeError(f"{value!r} is named twice")
    return values


def _writable(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if not text or path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: no file can be written there")
    return path


def read_json(path: pathlib.Path) -> Any:
    """Read a file of results. Raises `StorageError`, or `DataError` for another's file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.StorageError(f"{path}: cannot be read: {error}.") from error
    except ValueError as error:
        raise errors.DataError(f"{path}: holds no JSON: {error}.") from error


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a benchmark as a command: what a user caused is one line, with its exit code."""
    try:
        main()
    except Exception as error:
        ours = errors.as_ours(error)
        if ours is None:
            raise
        sys.exit(cli.report(ours, debug=False))
    sys.exit(0)
