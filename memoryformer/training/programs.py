"""The functions that a run compiles, once for all runs that share them. Start at `make`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.errors import ConfigError
from memoryformer.model import implementations
from memoryformer.training import experiment, optimizer, trainable
from memoryformer.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions of a run's updates; jit compiles each at its first call."""

    draw: Callable[..., step_lib.TrainState]  # seed -> the first state
    abstract: step_lib.TrainState
    train_step: jax.stages.Wrapped  # as `step.make_train_step`


class Cache:
    """The programs of the last run of a process, for the next one that shares them."""

    def __init__(self) -> None:
        self._key: Any = None
        self._programs: Programs | None = None

    def programs(
        self,
        run: experiment.Experiment,
        sharding: sharding_lib.Sharding,
        specs: Any,
        teacher: model_lib.ModelConfig | None = None,
    ) -> Programs:
        """Return the run's programs, made anew if those of the last run are others."""
        key = program(run), teacher
        if self._programs is None or key != self._key:
            self._key, self._programs = key, make(run, sharding, specs, teacher)
        return self._programs


def program(run: experiment.Experiment) -> Any:
    """Return what a run's compiled functions depend on: equal for runs that share them.

    Seed, peak learning rate and weight decay are left out: they are inputs. So is what of
    `train` changes nothing: it is the loop's. Where the teacher lies does not count, that
    there is one does.
    """
    recipe = dataclasses.replace(run.optimizer, learning_rate=0.0, weight_decay=0.0)
    loops: dict[str, Any] = {
        item.name: item.default
        for item in dataclasses.fields(run.train)
        if item.metadata["changes"] == "nothing"
    }
    loops["teacher"] = run.train.teacher and "some"
    return run.model, recipe, dataclasses.replace(run.train, seed=0, **loops), run.mesh


def make(
    run: experiment.Experiment,
    sharding: sharding_lib.Sharding,
    specs: Any = None,
    teacher: model_lib.ModelConfig | None = None,
) -> Programs:
    """Make the run's programs; raises `ConfigError` as `check_fit`.

    teacher: `teacher.config_of(run)`. `dryrun` compiles them from abstract arrays.
    """
    specs = check_fit(run, sharding) if specs is None else specs
    draw, abstract = init_state(run, sharding, specs)
    step = step_lib.make_train_step(run, sharding, specs, teacher)
    return Programs(draw, abstract, step)


def init_state(
    run: experiment.Experiment, sharding: sharding_lib.Sharding, specs: Any
) -> tuple[Callable[..., step_lib.TrainState], step_lib.TrainState]:
    """Return `draw(seed)`, which makes the first state, and that state's abstract form."""

    def draw(seed=run.train.seed):
        return step_lib.new_state(run, model_lib.init(run.model, seed))

    abstract = jax.eval_shape(draw)
    trained, trained_specs = (
        trainable.split(run, tree)[0] for tree in (abstract.params, specs)
    )
    opt_specs = optimizer.state_specs(abstract.opt_state, trained, trained_specs)
    whole: Any = P()  # stands, as the specs do, where the state has arrays
    everywhere = jax.tree.map(lambda _: whole, abstract.spikes)
    shardings = sharding.named(step_lib.TrainState(whole, specs, opt_specs, everywhere))
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
    trainable.groups(run)  # raises where nothing is left to train
    specs = model_lib.partition_specs(run.model, sharding)
    names = model_lib.param_specs(run.model)
    shapes = jax.eval_shape(lambda: model_lib.init(run.model))
    sizes = (run.train.batch_size, run.eval.batch_size)
    for batch_size in sizes:
        sharding_lib.validate(sharding, names, shapes, batch_size, run.model.num_heads)
    share = run.train.batch_size // sharding.row_parts
    if share % run.train.num_microbatches:
        raise ConfigError(
            f"train.num_microbatches={run.train.num_microbatches} does not divide the "
            f"{share} rows of a device (train.batch_size={run.train.batch_size})."
        )
    optimizer.schedule(run.optimizer, run.train.num_steps)  # raises where it cannot be
    return specs
