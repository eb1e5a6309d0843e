"""How the code could be wrong: MUTATIONS, one plausible mistake each.

Each is a patch applied in a child process before the program starts; the check of its promise
(`promises.MUTANTS`) must then fail. Only functions are replaced, so that a call can be seen
(`patching`). `BROKEN` are patches that do not work, for the test of the harness itself.
"""

import contextlib
import math
import signal
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from patching import put, wrap

from memoryformer import cli, data, errors, model
from memoryformer.cluster import lifeline, processes, roll_call, signals, watchdog
from memoryformer.convert import export
from memoryformer.data import batches, progress, token_files
from memoryformer.evaluation import loss as loss_lib
from memoryformer.generation import sampler
from memoryformer.ops.lookup import xla as lookup_xla
from memoryformer.runs import checkpoint, compatibility, directory, metrics
from memoryformer.runs import manifest as manifest_lib
from memoryformer.training import log as training_log
from memoryformer.training import loop, spikes, updates
from memoryformer.training import step as step_lib


def _nothing(answer=None):
    """A function that does nothing, whatever it is given."""
    return lambda *unused_args, **unused_kwargs: answer


def _after_restore(change):
    """Apply `change` to the state that a restart restores."""

    def restore(original, self):
        state, step = original(self)
        return (change(state) if step else state), step

    return lambda: wrap(loop._Loop, "_restore", restore)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _replay_a_batch():
    replayed = []

    def restore(original, self):
        state, step = original(self)
        replayed.extend([step] if step else [])
        return state, step

    def batch(original, self, step, rows=slice(None)):
        return original(self, step - bool(replayed), rows)

    wrap(loop._Loop, "_restore", restore)
    wrap(batches.Batches, "batch", batch)


def _reshuffle():
    def restore(original, self):
        state, step = original(self)
        run = self.config
        if step:
            seed = run.train.seed + step
            self.batches = self.dataset.train.batches(
                run.model.seq_len, run.train.batch_size, seed
            )
        return state, step

    wrap(loop._Loop, "_restore", restore)


def _hear_once_more(self, number, frame):
    self.name = signal.Signals(number).name


def _preempted_exits_0():
    def report(original, error, *, debug):
        code = original(error, debug=debug)
        return 0 if isinstance(error, errors.Preempted) else code

    wrap(cli, "report", report)


def _stop_without_saving():
    def save(original, self, step, state, *, wait=False, **facts):
        return False if wait else original(self, step, state, **facts)

    wrap(checkpoint.Checkpointer, "save", save)


def _deaf_evaluation():
    def evaluate(original, *args, stop=None, **kwargs):
        return original(*args, **kwargs)

    wrap(loss_lib, "evaluate", evaluate)


def _swallow_save_errors():
    """Saves are waited for, and whether they failed is not asked."""

    def wait(original, self):
        with contextlib.suppress(errors.StorageError):
            original(self)

    def leave(original, self, kind, exception, trace):
        with contextlib.suppress(errors.StorageError):
            original(self, kind, exception, trace)

    wrap(checkpoint.Checkpointer, "wait", wait)
    wrap(checkpoint.Checkpointer, "__exit__", leave)


def _mean_of_means():
    def accumulate(original, function, batch, count):
        def normalised(carry, part):
            grads, sums = function(carry, part)
            scale = 1 / jnp.maximum(sums["weight"], 1)
            return jax.tree.map(lambda x: x * scale, (grads, sums))

        return original(normalised if count > 1 else function, batch, count)

    wrap(step_lib, "_accumulate", accumulate)


def _order_by_devices():
    def init(original, self, split, seq_len, batch_size, seed):
        original(self, split, seq_len, batch_size, seed + jax.device_count() - 1)

    wrap(batches.Batches, "__init__", init)


def _seed_from_the_clock():
    def init(original, config, seed=0):
        return original(config, time.time_ns() % 2**31)

    wrap(model, "init", init)


def _wrong_lookup():
    def lookup(original, *args, **kwargs):
        return original(*args, **kwargs) * 1.001

    wrap(lookup_xla, "scan_tables", lookup)


def _roll_call_is_skipped():
    put(roll_call._RollCall, "peers", _nothing({}))()
    put(roll_call, "_answer", _nothing({}))()


def _restore_narrow(state):
    """As if checkpoints were kept in bfloat16."""
    return jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim else x, state
    )


def _vocabulary_is_not_compared():
    def load_data(original, data_config, *unused_args, **unused_kwargs):
        return original(data_config)

    wrap(data, "load", load_data)


def _padding_counts():
    def batch(original, self, index, rows=slice(None)):
        result = original(self, index, rows)
        return result | {"weights": np.ones_like(result["weights"])}

    wrap(batches.EvalBatches, "batch", batch)


def _mean_of_batches():
    """The evaluation's loss as the mean of its batches' losses."""

    def evaluate(original, step, params, batches, *args, **kwargs):
        kwargs.pop("num_batches", None)
        parts = [
            original(step, params, [batches[i]], *args, **kwargs)
            for i in range(len(batches))
        ]
        return parts[0] | {
            name: math.fsum(part[name] for part in parts) / len(parts)
            for name in parts[0]
        }

    wrap(loss_lib, "evaluate", evaluate)


def _cut_prompts():
    """The cache never sees the last token of a prompt."""

    def pieces(original, length, chunk=0):
        return original(length - 1, chunk)

    wrap(sampler, "_pieces", pieces)


def _narrow_export():
    def narrow(original, path, table, kind):
        return {path: table.astype(ml_dtypes.bfloat16)}

    wrap(export, "_stored", narrow)


def _same_rows_everywhere():
    """Every process draws the first rows of the batch."""

    def batch(original, self, step, rows=slice(None)):
        count = len(np.arange(self.batch_size)[rows])
        return original(self, step, slice(0, count))

    wrap(batches.Batches, "batch", batch)


MUTATIONS = {
    "replay_a_batch": _replay_a_batch,
    "reshuffle_on_restart": _reshuffle,
    "drop_optimizer_state": _after_restore(
        lambda s: s._replace(opt_state=_zeros(s.opt_state))
    ),
    "keep_rows_of_the_lost_future": put(metrics, "_drop_after", _nothing()),
    "start_from_scratch": put(checkpoint.Checkpointer, "restore_latest", _nothing()),
    "ignore_signals": put(signals.StopRequest, "_on_signal", _nothing()),
    "no_handler": put(signals.StopRequest, "__enter__", lambda self: self),
    "ignore_the_second_signal": put(signals.StopRequest, "_on_signal", _hear_once_more),
    "stop_without_saving": _stop_without_saving,
    "evaluation_ignores_signals": _deaf_evaluation,
    "preparation_ignores_signals": put(progress.Progress, "check", _nothing()),
    "two_runs_in_a_directory": put(
        directory, "only_one", _nothing(contextlib.nullcontext())
    ),
    "preempted_exits_0": _preempted_exits_0,
    "errors_exit_0": put(cli, "report", _nothing(0)),
    "swallow_save_errors": _swallow_save_errors,
    "look_at_saves_late": put(checkpoint.Checkpointer, "check", _nothing()),
    "no_preflight": put(checkpoint.Checkpointer, "preflight", _nothing()),
    "hashes_are_not_compared": put(
        manifest_lib, "_sha256", lambda path, flush=False: "0" * 64
    ),
    "verify_the_manifest_only": put(
        manifest_lib, "verify", lambda d: manifest_lib.facts(d)
    ),
    "no_ledger": put(manifest_lib, "read_ledger", _nothing(set())),
    "config_is_not_compared": put(compatibility, "check", _nothing([])),
    "everything_is_free": put(compatibility, "_matches", _nothing(True)),
    "order_depends_on_devices": _order_by_devices,
    "seed_from_the_clock": _seed_from_the_clock,
    "lookup_off_by_a_thousandth": _wrong_lookup,
    "mean_of_means": _mean_of_means,
    "take_every_update": put(updates, "_take", lambda wanted, new, old: new),
    "never_halt": put(training_log.TrainingLog, "_check", _nothing()),
    "ignore_spikes": put(spikes, "is_spike", _nothing(False)),
    "forget_the_spike_history": _after_restore(
        lambda s: s._replace(spikes=_zeros(s.spikes))
    ),
    "ids_are_not_checked": put(token_files, "check_ids", _nothing()),
    "vocabulary_is_not_compared": _vocabulary_is_not_compared,
    "restore_in_half_precision": _after_restore(_restore_narrow),
    "padding_counts": _padding_counts,
    "mean_of_batches": _mean_of_batches,
    "prompts_are_cut_short": _cut_prompts,
    "export_narrows_tables": _narrow_export,
    "watchdog_sleeps": put(watchdog.Watchdog, "enter", _nothing()),
    "no_roll_call": _roll_call_is_skipped,
    "no_lifeline": put(lifeline.Lifeline, "__enter__", lambda self: self),
    "stop_is_not_agreed": put(
        processes.SharedFlag, "__call__", lambda self: bool(self._flag)
    ),
    "data_are_not_compared": put(processes, "agree", _nothing()),
    "same_rows_everywhere": _same_rows_everywhere,
}
ENDLESS = (
    "watchdog_sleeps",
    "stop_is_not_agreed",
)  # runs that wait until they are killed
BROKEN = {
    "no such name": put(directory, "only_two", _nothing()),
    "other parameters": put(cli, "report", lambda error: 0),
    "never called": put(spikes, "is_spike", _nothing(False)),
    "crashes the program": put(loop.experiment, "resolve", _nothing()),
    "crashes by itself": put(cli, "report", lambda error, *, debug: 1 / 0),
}
