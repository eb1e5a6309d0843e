"""The training loop: restarts bit for bit, numbers that are not finite, what it writes."""

import json
import os
import pathlib
import resource
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import data, evaluation, sharding
from memoryformer.cluster import processes, signals, watchdog
from memoryformer.data import tokenizer
from memoryformer.errors import ConfigError, NumericError, Preempted, StorageError
from memoryformer.evaluation import loss as loss_lib
from memoryformer.ops.lookup import native
from memoryformer.runs import checkpoint, directory, manifest, metrics, outcome
from memoryformer.runs import folder as folder_lib
from memoryformer.runs import steps as run_steps
from memoryformer.training import experiment, loop, programs
from memoryformer.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[2]
STEPS, KEYS = 20, {"train/loss", "train/grad_norm", "train/learning_rate"}
KEYS |= {"train/tokens", "train/tokens_per_second", "train/step_seconds"}
KEYS |= {"train/compile_seconds"}
VALIDATION = {"val/loss", "val/perplexity", "val/bits_per_byte", "val/tokens"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    toy.corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    """A run of 20 steps that nothing stopped."""
    return toy.trained(folder, "straight")


def whole_state(workdir, **fields):
    """Every leaf of the newest checkpoint, restored as the trainer does."""
    run = experiment.resolve(toy.run_config(workdir.parent, **fields))
    made = sharding.make("single")
    _, abstract = programs.init_state(run, made, programs.check_fit(run, made))
    facts = run_steps.facts(workdir)
    with checkpoint.Checkpointer(
        workdir,
        run.checkpoint,
        run_config=facts["config"],
        data_fingerprint=facts["data_fingerprint"],
    ) as checkpointer:
        return checkpointer.restore_latest(abstract)


def rows(workdir):
    return [metrics.comparable(row) for row in metrics.read(workdir)]


def assert_same_run(workdir, expected, **fields):
    """State, step and metrics, bit for bit."""
    step, state = whole_state(workdir, **fields)
    wanted_step, wanted = whole_state(expected, **fields)
    assert step == wanted_step == fields.get("train.num_steps", STEPS)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    assert rows(workdir) == rows(expected)


def test_what_a_run_writes(straight):
    """config.json with every field, and rows with the documented keys.

    Mutation: `train/tokens` left out of the row.
    """
    config = json.loads((straight / "config.json").read_text(encoding="utf-8"))
    assert experiment.resolve(config) == experiment.resolve(
        toy.run_config(straight.parent)
    )
    written = metrics.read(straight)
    train = [row for row in written if "train/loss" in row]
    validation = [row for row in written if "val/loss" in row]
    assert [row["step"] for row in train] == [5, 10, 15, 20]
    assert [row["step"] for row in validation] == [10, 20]
    assert all(row.keys() >= KEYS for row in train)
    assert all(row.keys() >= VALIDATION for row in validation)
    assert train[-1]["train/tokens"] == 20 * 8 * 16
    assert train[-1]["train/loss"] < train[0]["train/loss"] < 1.2 * np.log(toy.VOCAB)
    layers = ("mixer.qkv", "ffn.up", "ffn.down")
    figures = ("used_fraction", "entropy", "max_over_mean", "flip_rate")
    tables = {f"utilisation/blocks.0.{a}/{b}" for a in layers for b in figures}
    for row in validation:
        assert {key for key in row if key.startswith("utilisation")} == tables
        assert all(0 <= row[key] for key in tables)
    seconds = [row["train/wall_seconds"] for row in train]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]
    # A CPU has no peak to compare with; its memory is the process's.
    assert not any("train/mfu" in row for row in train)
    assert all(row["train/memory_bytes"] > 2**20 for row in train)
    names = sorted(p.name for p in (straight / run_steps.FOLDER).iterdir())
    assert names == ["15", "20", manifest.LEDGER]


def asked_to_stop_at(count, monkeypatch):
    """A list that gets an entry for every step; a stop is asked for at one of them."""
    asked = []
    original = step_lib.make_train_step

    def counting(*arguments):
        step = original(*arguments)

        def wrapped(*inputs):
            asked.append(1)
            if len(asked) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*inputs)

        return wrapped

    monkeypatch.setattr(step_lib, "make_train_step", counting)
    return asked


def test_straight_equals_restarted(folder, straight, monkeypatch):
    """10 steps, a stop request, and the same call again: 20 straight, bit for bit.

    Mutations: batches drawn from step 0 after a restart; the optimizer's state not
    restored; rows of the first part written twice.
    """
    asked = asked_to_stop_at(10, monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as caught:
        toy.trained(folder, "restarted")
    assert caught.value.exit_code == 42
    assert "stopped after step 10 of 20, state saved" in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(asked) == 10
    toy.trained(folder, "restarted")
    assert len(asked) == 20
    assert_same_run(folder / "restarted", straight)
    toy.trained(folder, "restarted")  # done: nothing to do
    assert len(asked) == 20
    assert_same_run(folder / "restarted", straight)


@pytest.mark.skipif(not native.available(), reason="no C++ compiler")
def test_a_state_updated_in_place_is_saved_as_it_was(folder, monkeypatch):
    """Saves go on while the next steps overwrite the state, and a restart goes on from one.

    Mutation: `adamw.update` writes into the arrays that a save still reads.
    """
    fields = {
        "model.lookup": "auto",
        "checkpoint.every_steps": 1,
        "eval.every_steps": 0,
        "train.num_steps": 10,
    }
    in_place = toy.trained(folder, "in_place", **fields)
    asked = asked_to_stop_at(5, monkeypatch)
    with pytest.raises(Preempted):
        toy.trained(folder, "in_place_restarted", **fields)
    assert len(asked) == 5
    restarted = toy.trained(folder, "in_place_restarted", **fields)
    assert_same_run(restarted, in_place, **fields)


def test_what_a_run_asks_and_when(folder, monkeypatch, capfd):
    """Phases for the watchdog, what processes must agree in, space and failed saves.

    Then, from its checkpoint, that it goes on; of a goal behind it, a refusal.

    Mutations: any `watch.enter`, `agree`, `preflight` or `check` left out; a state saved
    twice, or not waited for; a note not printed.
    """
    seen = []

    def noted(owner, name, what):
        original = getattr(owner, name)

        def call(*arguments, **options):
            seen.append(what(*arguments, **options))
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    noted(watchdog.Watchdog, "enter", lambda self, phase, step=0: (phase, step))
    noted(processes, "check_joined", lambda mesh: ("joined", mesh))
    noted(processes, "agree", lambda what, value: ("agree", what))
    keeper = checkpoint.Checkpointer
    noted(keeper, "preflight", lambda self, state: "space")
    noted(keeper, "check", lambda self: "check")

    noted(
        keeper,
        "save",
        lambda self, step, state, *, wait=False, evaluated=True: ("save", step, wait),
    )
    fields = {
        "train.num_steps": 3,
        "train.log_every": 1,
        "optimizer.schedule_options.decay_steps": 9,
        "eval.every_steps": 2,
        "eval.num_batches": 2,
        "checkpoint.every_steps": 2,
    }
    toy.trained(folder, "asked", **fields)
    two_batches = [("evaluation", 2)] * 3  # as it begins, and before each
    assert seen == [
        ("joined", "single"),
        ("agree", "the config"),
        ("agree", "the data"),
        ("agree", "the teacher"),
        ("checkpoint", 0),
        "space",
        ("first_step", 0),
        ("first_step", 1),
        "check",
        ("step", 2),
        "check",
        *two_batches,
        ("checkpoint", 2),
        ("save", 2, False),
        ("step", 3),
        "check",
        *[("evaluation", 3)] * 3,
        ("checkpoint", 3),
        ("save", 3, False),
        ("checkpoint", 3),
        ("save", 3, True),
    ]
    told = capfd.readouterr()
    lines = (told.out + told.err).splitlines()
    losses = [line for line in lines if "validation loss" in line]
    assert [line.split(":")[0].strip() for line in losses] == ["step 2", "step 3"]
    row = metrics.read(folder / "asked")[-1]
    assert f"validation loss {row['val/loss']:.4f} nats per token" in losses[-1]
    assert f", {row['val/bits_per_byte']:.4f} bits per byte" in losses[-1]
    assert not any("going on" in line for line in lines)
    seen.clear()
    toy.trained(folder, "asked", **fields)  # done already
    told = capfd.readouterr()
    assert f"going on from step 3 in {folder / 'asked'}" in told.out + told.err
    assert ("first_step", 0) not in seen and ("save", 3, True) in seen
    with pytest.raises(ConfigError, match=r"num_steps=2: .* is at step 3; raise it"):
        toy.trained(folder, "asked", **fields | {"train.num_steps": 2})


def test_a_row_is_written_before_its_state(folder, monkeypatch):
    """So that no state is on disk whose step nobody has heard of. Mutation: no `drain`."""
    rows, save = {}, checkpoint.Checkpointer.save

    def read_and_save(self, step, *arguments, **options):
        rows[step] = [row["step"] for row in metrics.read(folder / "rows")]
        save(self, step, *arguments, **options)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", read_and_save)
    fields = {"train.num_steps": 3, "train.log_every": 1, "eval.num_batches": 2}
    fields |= {"eval.every_steps": 3, "checkpoint.every_steps": 2}
    toy.trained(folder, "rows", **fields)
    assert rows.keys() == {2, 3} and set(rows[2]) == {1, 2}


def test_another_config_is_refused(folder, straight):
    """What would change the result, by field; a free field is not refused.

    Mutation: `model.score` declared to change nothing.
    """
    before = rows(straight)
    for fields in ({"model.score": "l1"}, {"train.seed": 1}):
        with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
            toy.trained(folder, "straight", **fields)
        assert "\n" not in str(caught.value)
    assert rows(straight) == before
    toy.trained(folder, "straight", **{"train.log_every": 7, "checkpoint.keep": 1})


def test_one_run_in_a_directory(folder, straight):
    """The second is refused before it touches anything of the first.

    Mutations: no `runs.directory.only_one` in `train`; or inside `outcome.recorded`.
    """
    before = rows(straight)
    with directory.only_one(straight):
        with pytest.raises(StorageError, match=f"process {os.getpid()} on .* trains"):
            toy.trained(folder, "straight", **{"train.num_steps": 21})
    assert rows(straight) == before and outcome.read(straight) == {"state": "done"}


def test_no_space_for_the_config(folder):
    """A storage error, in the record of the run too.

    Mutation: `_write_config` lets the OSError through.
    """
    if not (folder / "corpus").exists():
        toy.corpus(folder / "corpus")
    data.prepare(experiment.resolve(toy.run_config(folder)).data)  # has its space
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(StorageError, match=r"config.json: cannot be written"):
            toy.trained(folder, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.read(folder / "full")["exit_code"] == StorageError.exit_code


@pytest.fixture
def poisoned(monkeypatch):
    """Make the gradients of some steps (counted from 1) not finite, by their weights."""

    def poison(*steps):
        original = sharding.Sharding.put_batch
        count = [0]

        def put_batch(self, batch):
            if batch["inputs"].shape == (8, 16):
                count[0] += 1
                if count[0] in steps:
                    batch = batch | {"weights": batch["weights"] * np.float32(np.inf)}
            return original(self, batch)

        monkeypatch.setattr(sharding.Sharding, "put_batch", put_batch)

    return poison


NO_EVALUATION = {"eval.every_steps": 0, "eval.batch_size": 16, "train.log_every": 1}


def test_nonfinite_numbers_halt_the_run(folder, poisoned):
    """The checkpoint before stays; nothing of the bad step or after it is saved.

    Mutations: no `_take` in `updates`; `drain` after the save.
    """
    poisoned(7)
    with pytest.raises(NumericError, match="step 7: loss") as caught:
        toy.trained(folder, "halted", **NO_EVALUATION)
    assert caught.value.exit_code == 44 and "\n" not in str(caught.value)
    step, state = whole_state(folder / "halted", **NO_EVALUATION)
    assert step == 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert [row["step"] for row in metrics.read(folder / "halted")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_what_an_update_is_dropped_for(tmp_path, monkeypatch):
    """A loss or a norm that is no number, either alone, and a spike; the count goes on.

    Mutations: `|` for either `&` of the step.
    """
    config = toy.run_config(tmp_path, **{"model.projection": "dense"})
    run, made = experiment.resolve(config), sharding.make("single")
    batch = toy.batch(run.model, batch_size=2, seq_len=4)
    nothing = batch | {"weights": np.zeros_like(batch["weights"])}  # a loss of 0 / 0

    def taken(norm, batch, seen=0):
        state = step_lib.new_state(run, toy.numpy_params(run.model))
        state = state._replace(spikes=state.spikes._replace(seen=jnp.int32(seen)))
        after, values = programs_of[norm](state, batch)
        assert int(after.step) == 1
        changed = jax.tree.map(lambda a, b: (a != b).any(), state.params, after.params)
        assert int(values["updates"]) == any(jax.tree.leaves(changed))
        return bool(values["updates"]), bool(values["finite"]), bool(values["spike"])

    is_spike = lambda state, loss, norm, sigmas: state.seen == 7  # noqa: E731
    monkeypatch.setattr(step_lib.spikes_lib, "is_spike", is_spike)
    programs_of = {}
    for norm in (1.0, np.inf):
        monkeypatch.setattr(
            step_lib.optimizer, "norm", lambda grads, n=norm: jnp.float32(n)
        )
        specs = programs.check_fit(run, made)
        step = step_lib.make_train_step(run, made, specs)
        state = step_lib.new_state(run, toy.numpy_params(run.model))
        programs_of[norm] = step.lower(state, batch).compile(toy.QUICK)
    assert taken(1.0, batch) == (True, True, False)
    assert taken(1.0, nothing) == (False, False, False)
    assert taken(np.inf, batch) == (False, False, False)
    assert taken(1.0, batch, seen=7) == (False, True, True)
    assert taken(np.inf, batch, seen=7) == (False, False, False)


def test_nonfinite_updates_can_be_skipped(folder, poisoned):
    """Each is dropped whole, and told; more than `max_skipped` in a row halt.

    Mutation: the count of skipped updates never set back.
    """
    fields = NO_EVALUATION | {"train.max_skipped": 2}
    poisoned(3, 4, 7, 8)
    toy.trained(folder, "skipped", **fields)
    step, state = whole_state(folder / "skipped", **fields)
    assert step == STEPS and int(state.opt_state.count) == STEPS - 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    train = [r for r in metrics.read(folder / "skipped") if "train/loss" in r]
    assert [r["step"] for r in train if r["train/loss"] == "nan"] == [3, 4, 7, 8]
    poisoned(3, 4, 5)
    with pytest.raises(NumericError, match="step 5"):
        toy.trained(folder, "skipped_too_often", **fields)


def test_stop_request():
    """The first signal asks, by name; handlers come back afterwards.

    Mutation: `__exit__` restores nothing.
    """
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup ignores it
    before = [signal.getsignal(s) for s in signals.SIGNALS]
    with signals.StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop and stop.name == "SIGINT"
    assert [signal.getsignal(s) for s in signals.SIGNALS] == before
    signal.signal(signal.SIGINT, ours)


def test_sigterm_from_outside(folder, straight, runner):
    """The command exits 42 with its state saved; the same command ends as if nothing was.

    Mutation: `Preempted` with exit code 0.
    """
    workdir = folder / "outside"
    command = [
        "train.py",
        f"--config={toy.config_file(folder)}",
        f"--workdir={workdir}",
    ]
    started = runner.launch(*command, "--config.train.log_every=1")
    runner.wait_for(started, "step ")
    runner.kill(started, signal.SIGTERM)
    stopped = runner.wait(started, timeout=120)
    assert stopped.code == 42, stopped
    lines = stopped.err.strip().splitlines()
    assert lines[-1].startswith("error: SIGTERM: stopped after step")
    assert 0 < run_steps.facts(workdir)["step"] < STEPS
    done = runner.command(*command, timeout=300)
    assert done.code == 0, done
    (step, state), (_, wanted) = whole_state(workdir), whole_state(straight)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, state, wanted)


def test_a_transfer_that_nobody_asked_for_is_refused(folder, monkeypatch):
    """A batch that is left on the host. A mesh's batch is placed, which is asked for.

    Mutation: no `transfer_guard` in the loop.
    """
    toy.trained(folder, "placed", **{"train.num_steps": 1, "mesh": "data"})
    monkeypatch.setattr(sharding.Sharding, "put_batch", lambda self, batch: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        toy.trained(folder, "implicit", **{"train.num_steps": 2})


def test_an_evaluation_stopped_in_is_made_up_for_once(folder, monkeypatch):
    """A stop in the last evaluation: the step is saved as one that was not evaluated; the next
    start evaluates, and the one after it has nothing to do, even if this one was killed
    between the row and the checkpoint's note of it.

    Mutations: `evaluated` always true; no `amend`; rows asked only where there is no note.
    """
    fields = {"train.num_steps": 2, "eval.every_steps": 0}
    calls = []

    def stopped(original):
        def evaluate(*args, **kwargs):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        return evaluate

    monkeypatch.setattr(loss_lib, "evaluate", stopped(loss_lib.evaluate))
    with pytest.raises(Preempted):
        toy.trained(folder, "missed", **fields)
    assert run_steps.facts(folder / "missed")["evaluated"] is False
    assert not any("val/loss" in row for row in metrics.read(folder / "missed"))
    config = toy.run_config(folder, **fields)
    assert loop.train(config, folder / "missed")["val/loss"] > 0
    assert run_steps.facts(folder / "missed")["evaluated"] is True
    assert loop.train(config, folder / "missed") == {} and len(calls) == 2
    manifest.amend(folder / "missed" / run_steps.FOLDER / "2", evaluated=False)
    assert loop.train(config, folder / "missed") == {} and len(calls) == 2
    assert sum("val/loss" in row for row in metrics.read(folder / "missed")) == 1


def test_a_new_figure_is_one_class_and_one_line(folder, monkeypatch):
    """Measured when it is due, by its own clock, and written; nothing else is told of it.

    Mutation: the loop asks the loss alone when to evaluate.
    """

    class Largest:
        name = "largest"
        every = 2

        def __init__(self, subject):
            self.seq_len = subject.model.seq_len

        @staticmethod
        def measures(model_config):
            return model_config.mixer == "softmax"

        def __call__(self, params):
            return {"largest": float(max(x.max() for x in jax.tree.leaves(params)))}

    monkeypatch.setattr(evaluation, "EVALUATORS", (*evaluation.EVALUATORS, Largest))
    fields = {"train.num_steps": 5, "eval.every_steps": 4}
    rows = metrics.read(toy.trained(folder, "figure", **fields))
    measured = {r["step"]: "val/loss" in r for r in rows if "largest" in r}
    assert measured == {2: False, 4: True, 5: True}


def test_one_process_writes_the_config(tmp_path, monkeypatch):
    """The others share its folder. Mutation: `return` taken out."""
    chief = types.SimpleNamespace(
        folder=folder_lib.Folder(tmp_path),
        checkpointer=types.SimpleNamespace(steps=lambda: []),
        dataset=types.SimpleNamespace(tokenizer=tokenizer.load("bytes")),
        run_config={"model": {}},
    )
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    loop._Loop._write_config(chief)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    loop._Loop._write_config(chief)
    assert json.loads((tmp_path / "config.json").read_text()) == chief.run_config
    assert (tmp_path / "tokenizer.json").exists()
