"""What can happen to a run: FAULTS, each a patch applied in a child process.

'name:argument' passes an integer. Nothing here depends on the speed of the machine: where a
fault needs a save to have finished, or to have failed, it waits for that.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
import types

import jax
import numpy as np
from patching import settle, wrap

from memoryformer import errors
from memoryformer.cluster import watchdog
from memoryformer.data import batches, progress
from memoryformer.model import losses
from memoryformer.runs import checkpoint, manifest, orbax_files, state_spec
from memoryformer.training import loop


def _kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def _at_batch(action):
    """A fault: `action(batch)` on the batch of step `at` (0: the first)."""

    def fault(at):
        def batch(original, self, step, rows=slice(None)):
            result = original(self, step, rows)
            return (action(result) or result) if step == at else result

        wrap(batches.Batches, "batch", batch)

    return fault


def _nan(batch):
    return batch | {"weights": batch["weights"] * np.float32("nan")}


def _outlier(batch):
    # A target that no text has: loss and gradient leap.
    return batch | {"targets": np.full_like(batch["targets"], 255)}


def _raise(batch):
    raise ValueError("a bug")


def _bad_data(batch):
    raise errors.DataError("bad data")


def _kill_saved(batch):
    settle()
    _kill()


def _small_files(batch):
    settle()  # what was saved before stays
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


def _settled_after(at):
    """Every save asked for after batch `at` has ended before the next batch."""

    def batch(original, self, step, *args, **kwargs):
        if step > at:
            settle()
        return original(self, step, *args, **kwargs)

    wrap(batches.Batches, "batch", batch)


def _full_disk(at):
    _at_batch(_small_files)(at)
    _settled_after(at)


def _fill_disk(batch):
    """Fill the file system of the workdir to the last byte."""
    settle()
    [workdir] = (a.partition("=")[2] for a in sys.argv if a.startswith("--workdir="))
    with open(os.path.join(workdir, os.pardir, "ballast"), "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass


def _fill_disk_at(at):
    _at_batch(_fill_disk)(at)
    _settled_after(at)


def _slow_batches(milliseconds):
    def batch(original, *args, **kwargs):
        time.sleep(milliseconds / 1000)
        return original(*args, **kwargs)

    wrap(batches.Batches, "batch", batch)


def _nan_always():
    wrap(batches.Batches, "batch", lambda f, *a, **k: _nan(f(*a, **k)))


def _ragged():
    """Weights that differ much between the rows of a batch."""

    def batch(original, self, step, rows=slice(None)):
        result = original(self, step, rows)
        length = result["weights"].shape[1]
        counts = 1 + (np.arange(self.batch_size)[rows] * 7 + step) % length
        keep = np.arange(length) < counts[:, None]
        return result | {"weights": keep.astype(np.float32)}

    wrap(batches.Batches, "batch", batch)


def _kill_before_manifest(at):
    def write(original, directory, facts):
        if facts["step"] == at:
            _kill()
        original(directory, facts)

    wrap(manifest, "write", write)


def _kill_before_ledger(at):
    def write_ledger(original, parent, steps):
        if at in steps:
            _kill()
        original(parent, steps)

    wrap(manifest, "write_ledger", write_ledger)


def _kill_in_async_save(at):
    def save(original, self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        if step == at:
            _kill()

    wrap(orbax_files.ocp.CheckpointManager, "save", save)


def _kill_in_deletion():
    def remove(original, directory):
        if not manifest.exists(directory):  # what an earlier kill has left
            return original(directory)
        (directory / manifest.MANIFEST).unlink()
        return _kill()

    wrap(manifest, "remove", remove)


def _signal_in_trace(number=signal.SIGTERM):
    def batch_nats(original, *args, **kwargs):
        losses.batch_nats = original
        _kill(number)
        return original(*args, **kwargs)

    wrap(losses, "batch_nats", batch_nats)


def _term_in_preparation(at):
    """At question number `at` of a preparation (0: the first)."""
    asked = []

    def check(original, self):
        asked.append(1)
        if len(asked) == at + 1:
            _kill(signal.SIGTERM)
        original(self)

    wrap(progress.Progress, "check", check)


def _term_in_evaluation(at):
    """During the evaluation number `at` (0: the first)."""
    seen = []

    def batch(original, self, index, *args, **kwargs):
        seen.append(index)
        if seen.count(0) == at + 1 and index == 0 and seen[-1] == 0:
            _kill(signal.SIGTERM)
        return original(self, index, *args, **kwargs)

    wrap(batches.EvalBatches, "batch", batch)


def _hang(*unused_args, **unused_kwargs):
    """Hang, and let the watchdog's clock leap: its limits may be as long as they like."""
    settle()
    _leap()
    time.sleep(1000)


def _leap():
    later = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1e5)
    watchdog.time = later


def _hang_in(owner, name):
    return lambda: wrap(owner, name, _hang)


def _hang_in_checkpoint():
    """A save that never ends; the loop finds out when it wants to save again."""

    def wait(original, self):
        if self._finaliser is not None:
            _leap()
        original(self)

    wrap(manifest, "write", lambda *_, **__: time.sleep(1000))
    wrap(checkpoint.Checkpointer, "wait", wait)


def _tell_restored():
    """Write what a restart restores, as the devices hold it, beside the checkpoints."""

    def restore(original, self):
        state, step = original(self)
        paths = ["".join(f"[{k!r}]" for k in p) for p, *_ in state_spec.describe(state)]
        arrays = dict(zip(paths, map(np.asarray, jax.tree.leaves(state)), strict=True))
        np.savez(self.folder.path / f"restored{step}.npz", **arrays)
        return state, step

    wrap(loop._Loop, "_restore", restore)


def _no_space():
    usage = shutil.disk_usage("/")._replace(free=10_000)
    shutil.disk_usage = lambda _: usage


FAULTS = {
    "kill": _at_batch(lambda _: _kill()),
    "term": _at_batch(lambda _: _kill(signal.SIGTERM)),
    "int": _at_batch(lambda _: _kill(signal.SIGINT)),
    "term_twice": _at_batch(lambda _: [_kill(signal.SIGTERM) for _ in range(2)] and {}),
    "term_in_compile": _signal_in_trace,
    "term_in_preparation": _term_in_preparation,
    "term_in_evaluation": _term_in_evaluation,
    "kill_before_manifest": _kill_before_manifest,
    "kill_before_ledger": _kill_before_ledger,
    "kill_in_async_save": _kill_in_async_save,
    "kill_in_deletion": _kill_in_deletion,
    "nan": _at_batch(_nan),
    "nan_always": _nan_always,
    "outlier": _at_batch(_outlier),
    "ragged": _ragged,
    "bug": _at_batch(_raise),
    "bad_data": _at_batch(_bad_data),
    "kill_saved": _at_batch(_kill_saved),
    "hang": _at_batch(_hang),
    "hang_in_evaluation": _hang_in(batches.EvalBatches, "batch"),
    "hang_in_checkpoint": _hang_in_checkpoint,
    "hang_in_first_step": _hang_in(losses, "batch_nats"),
    "full_disk": _full_disk,
    "fill_disk": _fill_disk_at,
    "no_space": _no_space,
    "tell_restored": _tell_restored,
    "slow": _slow_batches,
}
