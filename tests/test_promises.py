"""Every promise on runs in processes of their own; and the mistakes that must break it."""

import mutations
import promises
import pytest
from world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("promises")) as made:
        yield made


def slowly(name):
    return pytest.param(name, marks=pytest.mark.slow if name in promises.SLOW else [])


@pytest.mark.parametrize("promise", [slowly(n) for n in promises.CHECKS])
def test_promise(world, promise):
    """Mutations: `promises.MUTANTS`, tried by `test_mutant_is_caught`."""
    world.mutation = ""
    promises.CHECKS[promise](world)


@pytest.mark.slow
@pytest.mark.parametrize("promise, mutation", promises.MUTANTS)
def test_mutant_is_caught(world, promise, mutation):
    """Mutation: the one named; the check of the promise must fail under it."""
    world.mutation = mutation
    with pytest.raises(AssertionError):
        promises.CHECKS[promise](world)


def test_every_promise_and_every_mutation_is_tried():
    """Mutation: add a check or a mutation and forget to pair it."""
    assert {promise for promise, _ in promises.MUTANTS} == promises.CHECKS.keys()
    assert {mutation for _, mutation in promises.MUTANTS} == mutations.MUTATIONS.keys()
