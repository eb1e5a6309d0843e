"""The promises R1-R16 of docs/reliability.md, each as a check on runs in child processes.

`CHECKS[name](world)` raises AssertionError where a promise is broken. `MUTANTS` pairs
promises with mistakes (`mutations.MUTATIONS`) that must break them: a test that cannot fail
proves nothing. `python -m tests.mutants` tries all of them and prints a table.
"""

import promises_numbers
import promises_processes
import promises_restart

_PARTS = (promises_restart, promises_numbers, promises_processes)
CHECKS = {name: check for part in _PARTS for name, check in part.CHECKS.items()}
SLOW = promises_processes.SLOW
MUTANTS = [
    (name, mutation)
    for part in _PARTS
    for name, mutations in part.MUTANTS.items()
    for mutation in mutations
]
