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


# (promise, mutation) for every mistake that must break one of the promises.
MUTANTS = [
    (name, mutation)
    for part in PARTS
    for name, those in part.MUTANTS.items()
    for mutation in those
]


def cases():
    """The promises as parameters of a test; some are left to the slow tests."""
    slow = {name for part in PARTS for name in part.SLOW}
    marks = {name: pytest.mark.slow for name in slow}
    return [pytest.param(name, marks=marks.get(name, [])) for name in CHECKS]
