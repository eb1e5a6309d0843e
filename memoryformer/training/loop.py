"""Training: the step, and the loop around it.

The batch of step n is a pure function of (data, seed, n), so that a run is resumed from its
step alone. Start at `train`; the step's mathematics is `make_train_step`.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from memoryformer import checkpoint as checkpoint_lib
from memoryformer import (
    compilation,
    data,
    drift,
    evaluation,
    experiment,
    fields,
    implementations,
    metrics,
    mixers,
    optimizer,
    outcome,
    paths,
    preemption,
    processes,
    run_tokenizer,
    rundir,
    spikes,
    training_log,
    watchdog,
)
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.errors import ConfigError, NumericError, Preempted
from memoryformer.notation import Array, Params
from memoryformer.ops import collectives


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Array  # int32, updates done
    params: Params
    opt_state: Any
    spikes: spikes.SpikeState


def new_state(run: experiment.Experiment, params: Params) -> TrainState:
    """Return the state of step 0 with these parameters."""
    tx = _transformation(run)
    params = optimizer.stored(run.optimizer, params, model_lib.param_groups(run.model))
    history = spikes.init(run.train.spike_window)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), history)


def _transformation(run):
    groups = model_lib.param_groups(run.model)
    return optimizer.make(run.optimizer, run.train.num_steps, groups)


def train(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    allow: Collection[str] = (),
    compiled: dict[Any, "_Compiled"] | None = None,
    patience: float = 0.0,
) -> dict[str, float]:
    """Train a model, or go on training it; return its last validation metrics.

    Args:
      config: a whole config, see `experiment`.
      workdir: gets config.json, tokenizer.json, metrics.jsonl and checkpoints/. If it holds a
        checkpoint, the run goes on from there, and its config must be the same but for what
        `experiment.may_change`.
      allow: further fields that may differ.
      compiled: what an earlier run of this process left in the same dict, if this one
        differs from it in traced inputs only (seed, learning rate, weight decay).
      patience: seconds to wait for another process that still trains in `workdir`.

    Raises `Preempted` after SIGTERM or SIGINT, with the state saved; `NumericError`,
    `StorageError`, `DataError` and `ConfigError` as their names say. A phase that takes
    longer than `train.*_timeout` ends the process with exit code 43 (`watchdog`).
    """
    run = experiment.resolve(config)
    workdir = paths.workdir(workdir)
    rundir.refuse_foreign(workdir)
    with (
        rundir.only_one(workdir, patience),
        outcome.recorded(workdir),
        preemption.StopRequest() as stop,
        watchdog.Watchdog(run.train.timeouts) as watch,
    ):
        processes.check_joined(run.mesh)
        striped = mixers.takes_any_order(run.model)
        sharding = sharding_lib.make(run.mesh, striped=striped)
        specs = _check_fit(run, sharding)
        corpus = run_tokenizer.located(run.data, workdir)
        dataset = data.open(corpus, run.model.vocab_size, stop=lambda: bool(stop))
        common = drift.shared(experiment.as_dict(run), experiment.may_differ())
        processes.agree("the config", common)
        processes.agree("the data", dataset.fingerprint)
        with (
            sharding.activate(),
            checkpoint_lib.Checkpointer(
                workdir,
                run.checkpoint,
                run_config=experiment.as_dict(run),
                data_fingerprint=dataset.fingerprint,
                tokenizer=run_tokenizer.identity(dataset.tokenizer),
                allow={*allow, *experiment.may_change()},
                complete=experiment.complete,
            ) as checkpointer,
        ):
            made = programs(run, sharding, specs, compiled)
            parts = (sharding, made, dataset, checkpointer, stop, watch)
            return _Loop(run, workdir, *parts).run()


class _Compiled(NamedTuple):
    """The functions of a run; jit compiles each at its first call."""

    draw: Callable[..., TrainState]
    abstract: TrainState
    train_step: Callable[..., tuple[TrainState, dict[str, Array]]]
    eval_step: Callable[..., Array]


def program(run: experiment.Experiment) -> Any:
    """Return what a run's compiled functions depend on: equal for runs that share them.

    Seed, peak learning rate and weight decay are left out: they are inputs. So is what of
    `train` changes nothing: it is the loop's.
    """
    recipe = dataclasses.replace(run.optimizer, learning_rate=0.0, weight_decay=0.0)
    described = fields.described(experiment.TrainConfig)
    loops = {
        item.name: item.default
        for item in dataclasses.fields(run.train)
        if described[item.name][0] == "nothing"
    }
    return run.model, recipe, dataclasses.replace(run.train, seed=0, **loops), run.mesh


def programs(run, sharding, specs=None, cache=None) -> _Compiled:
    """Return the run's functions, from `cache` if it holds them; it keeps one set.

    `dryrun` compiles them from abstract arrays. Raises `ConfigError` as `_check_fit`.
    """
    specs = _check_fit(run, sharding) if specs is None else specs
    cache = {} if cache is None else cache
    key = program(run)
    if key not in cache:
        cache.clear()
        cache[key] = _Compiled(
            *init_state(run, sharding, specs),
            make_train_step(run, sharding, specs),
            evaluation.make_eval_step(run.model, sharding),
        )
    return cache[key]


def make_train_step(
    run: experiment.Experiment, sharding: sharding_lib.Sharding, specs: Any
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compile `(state, batch, hyper) -> (state, metrics)`; the state is donated (not on CPU).

    `hyper`, `hyperparams(run)`, is traced; left out, the run's numbers are compiled in.

    loss = sum of nats / sum of weights over the whole batch, whatever its division into
    devices and microbatches. Gradients cross the devices once a step. A step whose loss or
    gradient is not finite, or a spike (`spikes`), leaves parameters and optimizer as they were.
    """
    tx = _transformation(run)

    groups = model_lib.param_groups(run.model)
    gradient_sums = _make_gradient_sums(run, sharding, specs)

    def train_step(state, batch, hyper=None):
        features = _features(run, hyper, state.step)
        grads, (nats, weight) = gradient_sums(state.params, batch, features)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss, grad_norm = nats / weight, optimizer.norm(grads)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, hyperparams=hyper
        )
        seed = run.train.seed if hyper is None else hyper["seed"]
        params = optimizer.apply(
            run.optimizer, state.params, updates, groups, seed, state.step
        )
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike = finite & spikes.is_spike(
            state.spikes, loss, grad_norm, run.train.spike_sigmas
        )
        params, opt_state = _take(
            finite & ~spike, (params, opt_state), (state.params, state.opt_state)
        )
        history = spikes.record(state.spikes, loss, grad_norm)
        values = {
            "nats": nats,
            "weight": weight,
            "grad_norm": grad_norm,
            "finite": finite,
            "spike": spike,
            "updates": optimizer.count(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state, history), values

    # On CPU a donated state makes XLA copy arrays before it updates them in place.
    donated = () if sharding.platform == "cpu" else (0,)
    return jax.jit(train_step, donate_argnums=donated)


def _make_gradient_sums(run, sharding, specs):
    """`(params, batch, features) -> (gradients of the nats, (nats, weight))`, all of them sums."""

    def gradient_sums(params, batch, features):  # on one device, of its rows
        # Tables are read in the model's type, and so are their gradients: half the bytes.
        params = model_lib.with_tables_as_read(run.model, params)
        params = sharding_lib.gather_params(params, specs)

        def objective(params, batch):
            nats = evaluation.batch_nats(run.model, params, batch, features)
            nats, weight = jnp.sum(nats), jnp.sum(batch["weights"])
            # Each device along `model` computes the same sum: count it once.
            return nats / collectives.axis_size("model"), (nats, weight)

        def microbatch(_, batch):
            (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(
                params, batch
            )
            if run.train.num_microbatches > 1:  # many terms: not in bfloat16
                grads = optax.tree.cast(grads, jnp.float32)
            return grads, sums

        grads, sums = _accumulate(microbatch, batch, run.train.num_microbatches)
        grads = sharding_lib.sum_gradients(grads, specs)
        tokens = sharding_lib.TOKEN_AXES
        return grads, jax.tree.map(lambda x: collectives.psum(x, tokens), sums)

    return sharding.shard_map(
        gradient_sums, (specs, sharding.specs.batch_bl, P()), (specs, P())
    )


def hyperparams(run: experiment.Experiment) -> dict[str, Array]:
    """Return the traced inputs of the train step: the optimizer's, and the seed."""
    return optimizer.hyperparams(run.optimizer) | {"seed": jnp.int32(run.train.seed)}


def _features(run, hyper, step):
    """Draw the random features that batch `step` trains with."""
    seed = run.train.seed if hyper is None else hyper["seed"]
    return mixers.draw(run.model, seed, step + 1)


def _take(good, new, old):
    """Return `new` where `good`, a scalar, holds, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def _accumulate(function, batch, count):
    """Sum `function(None, microbatch)` over `count` parts of a batch's rows."""
    if count == 1:
        return function(None, batch)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    first = function(None, jax.tree.map(lambda x: x[0], parts))
    rest = jax.tree.map(lambda x: x[1:], parts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(None, part)), None

    return jax.lax.scan(add, first, rest)[0]


def init_state(
    run: experiment.Experiment, sharding: sharding_lib.Sharding, specs: Any
) -> tuple[Callable[..., TrainState], TrainState]:
    """Return `draw(seed)`, which makes the first state, and that state's abstract form."""

    def draw(seed=run.train.seed):
        return new_state(run, model_lib.init(run.model, seed))

    abstract = jax.eval_shape(draw)
    opt_specs = optimizer.state_specs(abstract.opt_state, abstract.params, specs)
    everywhere = jax.tree.map(lambda _: P(), abstract.spikes)
    shardings = sharding.named(TrainState(P(), specs, opt_specs, everywhere))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
        is_leaf=lambda x: x is None,
    )
    return jax.jit(draw, out_shardings=shardings), abstract


def _check_fit(run: experiment.Experiment, sharding: sharding_lib.Sharding) -> Any:
    implementations.check(run.model, sharding.platform)
    specs = model_lib.partition_specs(run.model, sharding)
    shapes = jax.eval_shape(lambda: model_lib.init(run.model))
    sizes = (run.train.batch_size, run.eval.batch_size)
    for batch_size in sizes:
        sharding_lib.validate(sharding, specs, shapes, batch_size, run.model.num_heads)
    share = run.train.batch_size // sharding.axis_size("data")
    if share % run.train.num_microbatches:
        raise ConfigError(
            f"train.num_microbatches={run.train.num_microbatches} does not divide the "
            f"{share} rows of a device (train.batch_size={run.train.batch_size})."
        )
    optimizer.schedule(run.optimizer, run.train.num_steps)  # raises where it cannot be
    return specs


class _Loop:
    """The training loop's parts; `run` is the loop."""

    def __init__(
        self, run, workdir, sharding, programs, dataset, checkpointer, stop, watch
    ):
        self.config = run
        self.workdir = workdir
        self.sharding = sharding
        self.dataset = dataset
        self.checkpointer = checkpointer
        self.signal = stop
        self.stop = processes.SharedFlag(stop)
        self.watch = watch
        self.progress = metrics.ProgressPrinter()
        self.progress.note(compilation.use_cache(run.train.compilation_cache))
        self.draw, self.abstract, self.train_step, self.eval_step = programs
        self.hyper = hyperparams(run)
        self.batches = dataset.train.batches(
            run.model.seq_len, run.train.batch_size, run.train.seed
        )
        self.rows = sharding.local_rows(run.train.batch_size)

    def run(self) -> dict[str, float]:
        """Restore, step, evaluate and save until `train.num_steps`."""
        run, checkpointer, watch = self.config, self.checkpointer, self.watch
        state, start = self._restore()
        self._write_config()
        validation: dict[str, float] = {}
        with metrics.MetricsWriter(
            self.workdir, run.metrics, start, run_config=experiment.as_dict(run)
        ) as writer:
            log = training_log.TrainingLog(
                run, writer, self.progress, start, self.sharding.num_devices
            )
            if self._evaluation_missed(start):
                validation = self._evaluate(state.params, writer, start)
            # The order is the contract: state n is logged, evaluated and saved, in this
            # order, before batch n is consumed. Metrics are read one step late, so that
            # the host never waits for a step that it has just dispatched.
            for step in range(start, run.train.num_steps):
                if self.stop():
                    break
                watch.enter("first_step" if step == start else "step", step + 1)
                batch = log.timed(lambda: self.batches.batch(step, self.rows))  # noqa: B023
                batch = self.sharding.put_batch(batch)
                state, values = log.called(self.train_step, state, batch, self.hyper)
                log.push(step + 1, values)
                checkpointer.check()
                if self._evaluation_due(step + 1):
                    log.drain()
                    with log.away():
                        validation = self._evaluate(state.params, writer, step + 1)
                if step + 1 == run.train.num_steps or checkpointer.should_save(
                    step + 1
                ):
                    log.drain()
                    watch.enter("checkpoint", step + 1)
                    with log.away():
                        self._save(step + 1, state)
                    log.saved = step + 1
            log.drain()
            done = int(state.step)
            watch.enter("checkpoint", done)
            self._save(done, state, wait=True)
            self.progress.close()
        if done < run.train.num_steps or self._evaluation_missed(done):
            raise Preempted(
                f"{self.signal.name or 'asked to stop by another process'}: stopped after "
                f"step {done} of {run.train.num_steps}, state saved; run the same command "
                "to go on."
            )
        return validation

    def _restore(self):
        """Return (state, step): the newest whole checkpoint, or a fresh state at 0."""
        self.watch.enter("checkpoint")
        self.checkpointer.preflight(self.abstract)
        restored = self.checkpointer.restore_latest(self.abstract)
        if restored is None:
            self.watch.enter("first_step")
            return self.draw(self.config.train.seed), 0
        step, state = restored
        if step > (goal := self.config.train.num_steps):
            raise ConfigError(
                f"train.num_steps={goal}: {self.workdir} is at step {step}; raise it."
            )
        self.progress.note(f"going on from step {step} in {self.workdir}")
        return state, step

    def _save(self, step, state, wait=False):
        if not spikes.are_finite(state.params):  # which its loss need not tell
            raise NumericError(
                f"step {step}: a parameter is not finite; lower optimizer.learning_rate."
            )
        self.checkpointer.save(step, state, wait=wait)

    def _write_config(self):
        if jax.process_index():
            return
        begun = bool(self.checkpointer.steps())
        run_tokenizer.check(self.workdir, self.dataset.tokenizer, begun=begun)
        config = experiment.as_dict(self.config)
        rundir.write_json(self.workdir / "config.json", config, indent=2)
        run_tokenizer.keep(self.workdir, self.dataset.tokenizer, begun=begun)

    def _evaluation_due(self, step):
        every = self.config.eval.every_steps
        return step == self.config.train.num_steps or bool(every and step % every == 0)

    def _evaluation_missed(self, step):
        """Whether the run was asked to stop in the evaluation of `step`."""
        if not step or not self._evaluation_due(step):
            return False
        missed = False
        if processes.is_chief():
            rows = metrics.read(self.workdir)
            missed = not any(r["step"] == step and "val/loss" in r for r in rows)
        return processes.from_chief(missed)

    def _evaluate(self, params, writer, step):
        run = self.config

        def stop():  # asked before every batch
            self.watch.enter("evaluation", step)
            return self.stop()

        batches = self.dataset.validation.eval_batches(
            run.model.seq_len, run.eval.batch_size
        )
        features = mixers.draw(run.model, run.train.seed, step)
        values = evaluation.evaluate(
            self.eval_step,
            params,
            batches,
            self.dataset.token_bytes,
            self.sharding,
            features=features,
            num_batches=run.eval.num_batches,
            stop=stop,
        )
        if values is None:  # asked to stop: the next run makes up for it
            return {}
        values |= evaluation.memories(
            run.model, params, batches, self.sharding, features
        )
        writer.write(step, values)
        self.progress.note(
            f"step {step}: validation loss {values['val/loss']:.4f} nats per token, "
            f"{values['val/bits_per_byte']:.4f} bits per byte"
        )
        return values
