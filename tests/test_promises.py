"""Every promise is tried, by mistakes too; and the harness tells what proves nothing."""

import mutants
import mutations
import promises
import pytest


def test_every_promise_and_every_mutation_is_tried():
    """Mutation: add a check or a mutation and forget to pair it."""
    assert {promise for promise, _ in promises.MUTANTS} == promises.CHECKS.keys()
    assert {mutation for _, mutation in promises.MUTANTS} == mutations.MUTATIONS.keys()


@pytest.mark.parametrize("promise", promises.cases())
def test_promise(world, promise):
    """The check asserts. Mutations: `promises.MUTANTS`, tried by `test_mutant_is_caught`."""
    promises.CHECKS[promise](world)


@pytest.mark.slow
@pytest.mark.parametrize("promise, mutation", promises.MUTANTS)
def test_mutant_is_caught(world, promise, mutation):
    """Mutation: the one named; an assertion of the promise must fail under it."""
    verdict = mutants.judge(world, promises.CHECKS[promise], mutation, promise)
    assert verdict.outcome == "caught", verdict


def no_steps(world):
    """A promise that costs little: a run of no steps is refused in one line."""
    result = world.run(world.workdir(), 2, **{"train.num_steps": 0})
    assert "train.num_steps" in result.err


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        ("no such name", "memoryformer.runs.directory.only_two is nowhere"),
        ("other parameters", "cannot stand for report(error"),
        ("never called", "never called: memoryformer.training.spikes.is_spike"),
        ("crashes by itself", "patch of memoryformer.cli.report: ZeroDivisionError"),
        ("crashes the program", "the program crashes: TypeError"),
    ],
)
def test_a_mutant_that_proves_nothing_is_an_error(world, mutation, message):
    """The check fails under most of these, and yet nothing is caught.

    Mutations: `patching._check_binds` does nothing; `UNBOUND` not looked at by `Runner.wait`;
    `uncalled` left out of `judge`; `_is_of_the_patch` returns False; `Crash` not told apart.
    """
    verdict = mutants.judge(world, no_steps, mutation)
    assert verdict.outcome == "error" and message in verdict.message, verdict
    assert mutants.exit_code([verdict]) == 99


def test_a_run_that_takes_too_long_is_no_catch(world, monkeypatch):
    """A slow machine kills runs; only what is to wait for ever may be caught so.

    Mutations: `timeouts` not looked at in `judge`, or not counted by `wait`.
    """

    def impatient(world):
        killed = world.runner.wait(world.start(world.workdir()), timeout=0.01)
        assert killed.code == -9
        no_steps(world)

    verdict = mutants.judge(world, impatient, "errors_exit_0")
    assert verdict.outcome == "error" and "took too long" in verdict.message
    monkeypatch.setattr(mutations, "ENDLESS", ("errors_exit_0",))
    assert mutants.judge(world, impatient, "errors_exit_0").outcome == "caught"


def test_a_catch_names_its_assertion(world):
    """Where, which and why; and a mutant that nobody notices is no catch.

    Mutation: the outermost frame for the innermost in `mutants._where`.
    """
    caught = mutants.judge(world, no_steps, "errors_exit_0")
    assert caught.outcome == "caught" and "exit 0, not 2" in caught.message
    assert caught.called == caught.bound == ["memoryformer.cli.report"]
    assert caught.where.startswith("test_promises.py:")
    assert caught.assertion.startswith("result = world.run(")
    unseen = mutants.judge(world, no_steps, "everything_is_free")
    assert unseen.outcome == "error"  # a run that stops before compares no configs
    deaf = mutants.judge(
        world, lambda world: world.run(world.workdir()), "ignore_spikes"
    )
    assert deaf.outcome == "not caught"
    assert [mutants.exit_code([v]) for v in (caught, unseen, deaf)] == [0, 99, 1]
    for verdict in (caught, unseen, deaf):
        assert verdict.outcome in mutants.table([verdict])


def test_no_mutant_is_no_success(capsys):
    """Mutation: 0 for no verdict; a misspelt name then says that all were caught."""
    assert mutants.main("errors_exit_0", "no such mutation") == mutants.UNBOUND
    assert "'no such mutation'" in capsys.readouterr().out
    assert mutants.exit_code([]) == mutants.UNBOUND
