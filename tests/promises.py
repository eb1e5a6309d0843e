"""The promises R1-R16 of docs/reliability.md, each as a check on runs in child processes.

`CHECKS[name](world)` raises AssertionError where a promise is broken. `MUTANTS` pairs
promises with mistakes (`mutations.MUTATIONS`) that must break them: a test that cannot fail
proves nothing. `python -m tests.mutants` tries all of them and prints a table.
"""

import promises_numbers
import promises_processes
import promises_restart
import pytest

PARTS = (promises_restart, promises_numbers, promises_processes)
CHECKS = {name: check for part in PARTS for name, check in part.CHECKS.items()}


def cases(part):
    """The promises of a part as parameters of a test; some are left to the slow tests."""
    slow = {name: pytest.mark.slow for name in part.SLOW}
    return [pytest.param(name, marks=slow.get(name, [])) for name in part.CHECKS]


def mutants(part):
    """(promise, mutation) for every mistake that must break one of a part's promises."""
    return [
        (name, mutation) for name, those in part.MUTANTS.items() for mutation in those
    ]


MUTANTS = [pair for part in PARTS for pair in mutants(part)]
