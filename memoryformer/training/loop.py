"""Training: the step, and the loop around it.

The batch of step n is a pure function of (data, seed, n), so that a run is resumed from its
step alone. Start at `train`; the step's mathematics is `make_train_step`.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

import jax

from memoryformer import data
from memoryformer import sharding as sharding_lib
from memoryformer.cluster import processes, signals, watchdog
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, NumericError, Preempted
from memoryformer.evaluation import loss as loss_lib
from memoryformer.files import paths
from memoryformer.model import mixers
from memoryformer.runs import checkpoint as checkpoint_lib
from memoryformer.runs import compatibility, console, directory, metrics, outcome
from memoryformer.training import compilation_cache, experiment
from memoryformer.training import log as training_log
from memoryformer.training import programs as programs_lib
from memoryformer.training import spikes as spikes_lib
from memoryformer.training import step as step_lib


def train(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    allow: Collection[str] = (),
    compiled: dict[Any, programs_lib.Programs] | None = None,
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
    longer than `train.timeouts` ends the process with exit code 43 (`watchdog`).
    """
    run = experiment.resolve(config)
    workdir = paths.workdir(workdir)
    directory.refuse_foreign(workdir)
    with (
        directory.only_one(workdir, patience),
        outcome.recorded(workdir),
        signals.StopRequest() as stop,
        watchdog.Watchdog(run.train.timeouts) as watch,
    ):
        processes.check_joined(run.mesh)
        striped = mixers.takes_any_order(run.model)
        sharding = sharding_lib.make(run.mesh, striped=striped)
        specs = programs_lib.check_fit(run, sharding)
        corpus = run_tokenizer.located(run.data, workdir)
        dataset = data.open(corpus, run.model.vocab_size, stop=lambda: bool(stop))
        common = compatibility.shared(experiment.as_dict(run), experiment.may_differ())
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
            made = programs_lib.programs(run, sharding, specs, compiled)
            parts = (sharding, made, dataset, checkpointer, stop, watch)
            return _Loop(run, workdir, *parts).run()


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
        self.progress = console.ProgressPrinter()
        self.progress.note(compilation_cache.use_cache(run.train.compilation_cache))
        self.draw, self.abstract, self.train_step, self.eval_step = programs
        self.hyper = step_lib.hyperparams(run)
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
        if not spikes_lib.are_finite(state.params):  # which its loss need not tell
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
        directory.write_json(self.workdir / "config.json", config, indent=2)
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
        values = loss_lib.evaluate(
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
        values |= loss_lib.memories(run.model, params, batches, self.sharding, features)
        writer.write(step, values)
        self.progress.note(
            f"step {step}: validation loss {values['val/loss']:.4f} nats per token, "
            f"{values['val/bits_per_byte']:.4f} bits per byte"
        )
        return values
