"""The functions that a run compiles, once for all runs that share them. Start at `programs`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from memoryformer import config as config_lib
from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.errors import ConfigError
from memoryformer.evaluation import loss as loss_lib
from memoryformer.model import implementations
from memoryformer.notation import Array
from memoryformer.ops import collectives
from memoryformer.training import experiment, optimizer
from memoryformer.training import step as step_lib


class Programs(NamedTuple):
    """The functions of a run; jit compiles each at its first call."""

    draw: Callable[..., step_lib.TrainState]
    abstract: step_lib.TrainState
    train_step: Callable[..., tuple[step_lib.TrainState, dict[str, Array]]]
    eval_step: Callable[..., Array]


def program(run: experiment.Experiment) -> Any:
    """Return what a run's compiled functions depend on: equal for runs that share them.

    Seed, peak learning rate and weight decay are left out: they are inputs. So is what of
    `train` changes nothing: it is the loop's.
    """
    recipe = dataclasses.replace(run.optimizer, learning_rate=0.0, weight_decay=0.0)
    described = config_lib.described(experiment.TrainConfig)
    loops = {
        item.name: item.default
        for item in dataclasses.fields(run.train)
        if described[item.name][0] == "nothing"
    }
    return run.model, recipe, dataclasses.replace(run.train, seed=0, **loops), run.mesh


def programs(run, sharding, specs=None, cache=None) -> Programs:
    """Return the run's functions, from `cache` if it holds them; it keeps one set.

    `dryrun` compiles them from abstract arrays. Raises `ConfigError` as `check_fit`.
    """
    specs = check_fit(run, sharding) if specs is None else specs
    cache = {} if cache is None else cache
    key = program(run)
    if key not in cache:
        cache.clear()
        cache[key] = Programs(
            *init_state(run, sharding, specs),
            step_lib.make_train_step(run, sharding, specs),
            loss_lib.make_eval_step(run.model, sharding),
        )
    return cache[key]


def init_state(
    run: experiment.Experiment, sharding: sharding_lib.Sharding, specs: Any
) -> tuple[Callable[..., step_lib.TrainState], step_lib.TrainState]:
    """Return `draw(seed)`, which makes the first state, and that state's abstract form."""

    def draw(seed=run.train.seed):
        return step_lib.new_state(run, model_lib.init(run.model, seed))

    abstract = jax.eval_shape(draw)
    opt_specs = optimizer.state_specs(abstract.opt_state, abstract.params, specs)
    everywhere = jax.tree.map(lambda _: P(), abstract.spikes)
    shardings = sharding.named(step_lib.TrainState(P(), specs, opt_specs, everywhere))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
        is_leaf=lambda x: x is None,
    )
    return jax.jit(draw, out_shardings=shardings), abstract


def check_fit(run: experiment.Experiment, sharding: sharding_lib.Sharding) -> Any:
    """Return the specs of the parameters; raises `ConfigError` where run and devices do not fit."""
    implementations.check(run.model, sharding.platform)
    specs = model_lib.partition_specs(run.model, sharding)
    names = model_lib.param_specs(run.model)
    shapes = jax.eval_shape(lambda: model_lib.init(run.model))
    sizes = (run.train.batch_size, run.eval.batch_size)
    for batch_size in sizes:
        sharding_lib.validate(sharding, names, shapes, batch_size, run.model.num_heads)
    share = run.train.batch_size // sharding.axis_size(collectives.DATA_AXIS)
    if share % run.train.num_microbatches:
        raise ConfigError(
            f"train.num_microbatches={run.train.num_microbatches} does not divide the "
            f"{share} rows of a device (train.batch_size={run.train.batch_size})."
        )
    optimizer.schedule(run.optimizer, run.train.num_steps)  # raises where it cannot be
    return specs
