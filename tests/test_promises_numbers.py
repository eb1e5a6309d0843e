"""R7-R11, R13, R16: `promises_numbers` on runs in processes of their own, and their mutants."""

import mutants
import promises
import promises_numbers as part
import pytest


@pytest.mark.parametrize("promise", promises.cases(part))
def test_promise(world, promise):
    """Mutations: `promises_numbers.MUTANTS`, tried by `test_mutant_is_caught`."""
    part.CHECKS[promise](world)


@pytest.mark.slow
@pytest.mark.parametrize("promise, mutation", promises.mutants(part))
def test_mutant_is_caught(world, promise, mutation):
    """Mutation: the one named; an assertion of the promise must fail under it."""
    verdict = mutants.judge(world, part.CHECKS[promise], mutation, promise)
    assert verdict.outcome == "caught", verdict
