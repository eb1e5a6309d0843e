"""How a step's update is computed: by XLA anywhere, or in C++ on one CPU.

    way      where                                                  bytes a parameter
    XLA      any devices, every state of tables                     60 and more on a CPU
    native   a CPU that reads tables natively (`model.lookup`),     32, in place
             one device, all of the state in float32

Both compute the equations of `optimizer`. Start at `make`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memoryformer import sharding as sharding_lib
from memoryformer.model import native_parts
from memoryformer.notation import Array, Params
from memoryformer.ops import adamw
from memoryformer.training import experiment, optimizer, rates, table_storage


class Updates(NamedTuple):
    """An update in two parts, since whether it is wanted depends on the norm.

    norm: (gradients of the nats' sum, weight) -> the norm of those of the mean.
    apply: (wanted, norm, gradients, weight, trained, opt_state, seed, step, hyper) -> (trained,
    opt_state), those it was given where it is not wanted.
    """

    norm: Callable[[Params, Array], Array]
    apply: Callable[..., tuple[Params, Any]]
    in_place: bool  # where the state is donated


def make(
    run: experiment.Experiment, sharding: sharding_lib.Sharding, groups: Any
) -> Updates:
    """Choose how the parameters of `groups` (names of `optimizer.GROUPS`) are updated."""
    full = run.optimizer.table_state == "full"
    native = full and native_parts.usable(run.model, sharding)
    ways = {True: native_updates, False: xla_updates}
    return ways[native](run.optimizer, run.train.num_steps, groups)


def xla_updates(
    config: optimizer.OptimizerConfig, num_steps: int, groups: Any
) -> Updates:
    """Leave it to XLA."""
    tx = optimizer.make(config, num_steps, groups)

    def norm(sums, weight):
        return optimizer.norm(_mean(sums, weight))

    def apply(wanted, norm, sums, weight, before, opt_state, seed, step, hyper):
        del norm  # computed once: XLA finds the one above
        updates, after = tx.update(
            _mean(sums, weight), opt_state, before, hyperparams=hyper
        )
        trained = table_storage.apply(config, before, updates, groups, seed, step)
        return _take(wanted, (trained, after), (before, opt_state))

    return Updates(norm, apply, in_place=False)


def native_updates(
    config: optimizer.OptimizerConfig, num_steps: int, groups: Any
) -> Updates:
    """Call C++, in place; raises RuntimeError without a compiler."""
    names = jax.tree.leaves(groups)
    relative_rate = rates.relative(config, num_steps)

    def norm(sums, weight):
        return adamw.norm(jax.tree.leaves(sums)) / weight

    def apply(wanted, norm, sums, weight, before, opt_state, seed, step, hyper):
        del seed, step  # nothing is rounded by chance
        now = rates.scalars(config, relative_rate, optimizer.count(opt_state), hyper)
        of_each = [rates.rate_and_decay(config, name, now) for name in names]
        steps, decays = (
            jnp.stack(
                [jnp.asarray(0.0 if x is None else x, jnp.float32) for x in column]
            )
            for column in zip(*of_each, strict=True)
        )
        knobs = adamw.Knobs(
            weight,
            rates.clip_factor(config, norm),
            *now.unbias,
            config.b1,
            1 - config.b1,
            config.b2,
            1 - config.b2,
            config.eps,
        )
        leaves = jax.tree.leaves
        stored = leaves(before), leaves(opt_state.mu), leaves(opt_state.nu)
        updated = adamw.update(wanted, knobs, steps, decays, leaves(sums), stored)
        structure = jax.tree.structure(before)
        trained, first, second = (jax.tree.unflatten(structure, x) for x in updated)
        number = jnp.where(wanted, now.number, opt_state.count)
        return trained, optax.ScaleByAdamState(number, first, second)

    return Updates(norm, apply, in_place=True)


def _mean(sums, weight):
    return jax.tree.map(lambda g: g / weight, sums)


def _take(wanted, new, old):
    """Return `new` where `wanted`, a scalar, holds, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(wanted, n, o), new, old)
