"""The mathematics of training: the state, its gradients, and the step.

Start at `make_train_step`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.model import distillation, losses, mixers, native_parts
from memoryformer.notation import Array, Params
from memoryformer.ops import collectives
from memoryformer.training import (
    experiment,
    optimizer,
    table_storage,
    trainable,
    updates,
)
from memoryformer.training import spikes as spikes_lib
from memoryformer.training import teacher as teacher_lib


class TrainState(NamedTuple):
    """What a checkpoint holds."""

    step: Array  # int32, updates done
    params: Params
    opt_state: Any
    spikes: spikes_lib.SpikeState


def new_state(run: experiment.Experiment, params: Params) -> TrainState:
    """Return the state of step 0 with these parameters."""
    tx = transformation(run)
    params = table_storage.stored(
        run.optimizer, params, model_lib.param_groups(run.model)
    )
    trained, _ = trainable.split(run, params)
    history = spikes_lib.init(run.train.spikes_options.window)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(trained), history)


def transformation(run: experiment.Experiment) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run."""
    return optimizer.make(run.optimizer, run.train.num_steps, _trained_groups(run))


def _trained_groups(run):
    return trainable.split(run, trainable.groups(run))[0]


def make_train_step(
    run: experiment.Experiment,
    sharding: sharding_lib.Sharding,
    specs: Any,
    teacher: model_lib.ModelConfig | None = None,
) -> jax.stages.Wrapped:
    """Compile `(state, batch, hyper) -> (state, metrics)`; the state is donated
    (on a CPU where `updates` works in place).

    `hyper`, `hyperparams(run)`, is traced; left out, the run's numbers are compiled in. With a
    `teacher` the step takes its parameters, as `teacher.placed`, as a fourth argument.

    loss = sum of nats (with a teacher: of `distillation.objective`) / sum of weights over the
    whole batch, whatever its division into devices and microbatches. Gradients cross the
    devices once a step. A step whose loss or gradient is not finite, or a spike (`spikes`),
    leaves parameters and optimizer as they were.
    """
    groups = _trained_groups(run)
    gradient_sums = _make_gradient_sums(run, sharding, specs, teacher)
    update = updates.make(run, sharding, groups)

    def train_step(state, batch, hyper=None, *taught):
        seed = run.train.seed if hyper is None else hyper["seed"]
        before, fixed = trainable.split(run, state.params)
        fixed = mixers.redraw(run.model, fixed, seed, state.step)
        grads, sums = gradient_sums(before, fixed, batch, *taught)
        weight = sums["weight"]
        loss = sums["objective" if teacher else "nats"] / weight
        grad_norm = update.norm(grads, weight)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        spike = finite & spikes_lib.is_spike(
            state.spikes, loss, grad_norm, run.train.spikes_options.sigmas
        )
        trained, opt_state = update.apply(
            finite & ~spike,
            grad_norm,
            grads,
            weight,
            before,
            state.opt_state,
            seed,
            state.step,
            hyper,
        )
        params = model_lib.joined(trained, fixed)
        history = spikes_lib.record(state.spikes, loss, grad_norm)
        values = {
            **sums,
            "grad_norm": grad_norm,
            "finite": finite,
            "spike": spike,
            "updates": optimizer.count(opt_state),
        }
        return TrainState(state.step + 1, params, opt_state, history), values

    # On CPU a donated state makes XLA copy arrays before it updates them in place.
    donated = (0,) if sharding.platform != "cpu" or update.in_place else ()
    return jax.jit(train_step, donate_argnums=donated)


def _make_gradient_sums(run, sharding, specs, teacher):
    """`(trained, fixed, batch, [teacher's]) -> (gradients, {'nats', 'weight', ..})`, all sums."""
    trained_specs, fixed_specs = trainable.split(run, specs)
    taught_specs = [teacher_lib.specs(teacher, sharding)] if teacher else []
    native = native_parts.usable(run.model, sharding)

    def gradient_sums(trained, fixed, batch, *taught):  # on one device, of its rows
        params = model_lib.joined(trained, fixed)
        # Tables are read in the model's type, and so are their gradients: half the bytes.
        params = model_lib.with_tables_as_read(run.model, params)
        params = sharding_lib.gather_params(params, specs)
        trained, fixed = trainable.split(run, params)
        pairs = zip(taught, taught_specs, strict=True)
        teachers = [sharding_lib.gather_params(*pair) for pair in pairs]

        def objective(trained, batch, *lesson):
            params = model_lib.joined(trained, fixed)
            sums = _sums(run, params, batch, native, *lesson)
            total = sums["objective" if lesson else "nats"]
            sums["weight"] = jnp.sum(batch["weights"])
            # Each device along `model` computes the same sum: count it once.
            return total / collectives.axis_size(collectives.MODEL_AXIS), sums

        def microbatch(_, batch):
            lesson = [
                distillation.output(teacher, params, batch) for params in teachers
            ]
            (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(
                trained, batch, *lesson
            )
            if run.train.num_microbatches > 1:  # many terms: not in bfloat16
                grads = optax.tree.cast(grads, jnp.float32)
            return grads, sums

        grads, sums = _accumulate(microbatch, batch, run.train.num_microbatches)
        grads = sharding_lib.sum_gradients(grads, trained_specs)
        tokens = collectives.TOKEN_AXES
        return grads, jax.tree.map(lambda x: collectives.psum(x, tokens), sums)

    in_specs = (trained_specs, fixed_specs, sharding.specs.batch_bl, *taught_specs)
    return sharding.shard_map(gradient_sums, in_specs, (trained_specs, P()))


def _sums(run, params, batch, native, lesson=None):
    """The weighted terms of the loss, by name, summed over the tokens."""
    if lesson is None:
        nats = losses.sum_of_nats(run.model, params, batch, native=native)
        return {"nats": nats}
    student = distillation.output(run.model, params, batch)
    options = dataclasses.asdict(run.train.teacher_options)
    terms = distillation.objective(student, lesson, batch, **options)
    return {name: jnp.sum(term) for name, term in terms.items()}


def hyperparams(run: experiment.Experiment) -> dict[str, Array]:
    """Return the traced inputs of the train step: the optimizer's, and the seed."""
    return optimizer.hyperparams(run.optimizer) | {"seed": jnp.int32(run.train.seed)}


def _accumulate(function, batch, count):
    """Sum `function(None, microbatch)` over `count` parts of a batch's rows."""
    if count == 1:
        return function(None, batch)
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    first = function(None, jax.tree.map(lambda x: x[0], parts))
    others = jax.tree.map(lambda x: x[1:], parts)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(None, part)), None

    return jax.lax.scan(add, first, others)[0]
