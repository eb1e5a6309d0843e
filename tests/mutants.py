"""Try every mutation against its promise: python -m tests.mutants [PART_OF_A_NAME ...].

A mutant counts as caught only if it could be applied, if all that it replaces was called, and
if an assertion about the promise then failed. Where a patch does not work, is never called or
makes the program crash, nothing is known about the test: an error of the harness.
Prints the table, writes it to build/mutants.md and .json, and exits with

    0 all caught · 1 one was not caught · 99 the harness itself is wrong, or nothing has
    such a name
"""

import json
import pathlib
import sys
import tempfile
import traceback
from typing import NamedTuple

TESTS = pathlib.Path(__file__).parent
sys.path.insert(0, str(TESTS))

import mutations  # noqa: E402
import promises  # noqa: E402
from patching import UNBOUND  # noqa: E402
from runner import HarnessError  # noqa: E402
from world import Crash, World  # noqa: E402

OUTPUT = TESTS.parent / "build"
COLUMNS = ("promise", "mutation", "bound", "called", "outcome", "assertion")
CODES = {"caught": 0, "not caught": 1, "error": UNBOUND}


class Verdict(NamedTuple):
    """What became of a mutant: `outcome` is a key of CODES; lists name functions."""

    promise: str
    mutation: str
    bound: list[str]
    called: list[str]
    outcome: str
    where: str = ""  # file:line of the assertion that failed
    assertion: str = ""  # its source line
    message: str = ""


def judge(world, check, mutation: str, promise: str = "") -> Verdict:
    """Run `check(world)` under the mutation and say what came of it."""
    world.mutate(mutation)
    failure = None
    try:
        check(world)
    except (AssertionError, HarnessError) as error:
        failure = error
    finally:
        calls, timeouts = world.calls(), world.runner.timeouts
        world.mutate("")
    bound, called = (
        sorted({name for what, name in calls if what == kind})
        for kind in ("bound", "called")
    )
    uncalled = sorted(set(bound) - set(called))
    if isinstance(failure, HarnessError):
        outcome, message = "error", str(failure)
    elif not bound or uncalled:
        outcome, message = "error", f"never called: {', '.join(uncalled) or mutation}"
    elif timeouts and mutation not in mutations.ENDLESS:
        outcome, message = "error", "a run was killed because it took too long"
    elif isinstance(failure, Crash):
        outcome, message = "error", f"the program crashes: {_last_line(failure)}"
    else:
        outcome = "caught" if failure else "not caught"
        message = " ".join(str(failure or "").split())[:160]
    return Verdict(
        promise, mutation, bound, called, outcome, *_where(failure), message=message
    )


def _where(failure) -> tuple[str, str]:
    """(file:line, source) of the innermost line of a promise that `failure` crossed."""
    frames = traceback.extract_tb(failure.__traceback__) if failure else []
    lines = [f for f in frames if pathlib.Path(f.filename).parent == TESTS]
    lines = [f for f in lines if "promises" in f.filename] or lines
    if not lines:
        return "", ""
    last = lines[-1]
    source = (last.line or "?").splitlines()[0]
    return f"{pathlib.Path(last.filename).name}:{last.lineno}", source


def _last_line(failure) -> str:
    return str(failure).strip().splitlines()[-1]


def exit_code(verdicts) -> int:
    """The worst that a verdict says; of no verdict that the harness is wrong."""
    return max((CODES[v.outcome] for v in verdicts), default=UNBOUND)


def table(verdicts) -> str:
    """The verdicts as a table of Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for v in verdicts:
        told = f"`{v.where} {v.assertion}`: {v.message}" if v.where else v.message
        names = (", ".join(v.bound), "all" if v.called == v.bound else str(v.called))
        rows.append(
            (v.promise, v.mutation, *names, v.outcome, told.replace("|", "\\|"))
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def chosen(wanted) -> list[tuple[str, str]]:
    """(promise, mutation) of each whose names contain one of `wanted`; all for none."""
    return [
        (promise, mutation)
        for promise, mutation in promises.MUTANTS
        if any(part in f"{promise} {mutation}" for part in wanted or ("",))
    ]


def main(*wanted: str) -> int:
    """Run the `chosen` mutants."""
    if unknown := [part for part in wanted if not chosen([part])]:
        print(f"{unknown[0]!r}: no promise and no mutation has that in its name")
        return UNBOUND
    verdicts = []
    with (
        tempfile.TemporaryDirectory() as folder,
        World(pathlib.Path(folder)) as world,
    ):
        world.runner.patience = 240.0  # some mistakes are to wait for ever
        for promise, mutation in chosen(wanted):
            verdict = judge(world, promises.CHECKS[promise], mutation, promise)
            verdicts.append(verdict)
            print(table([verdict]).splitlines()[-1], flush=True)
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "mutants.md").write_text(table(verdicts), encoding="utf-8")
    rows = [v._asdict() for v in verdicts]
    (OUTPUT / "mutants.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    counts = {o: sum(v.outcome == o for v in verdicts) for o in CODES}
    print(f"{len(verdicts)} mutants:", *(f"{n} {o}" for o, n in counts.items()))
    return exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
