"""The training loop: the order in which a run steps, logs, evaluates and saves.

The batch of step n is a pure function of (data, seed, n), so that a run is resumed from its
step alone. Start at `train`; the mathematics is in `training.step`.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from memoryformer import data, evaluation
from memoryformer import sharding as sharding_lib
from memoryformer.cluster import processes, signals, watchdog
from memoryformer.data import run_tokenizer
from memoryformer.errors import ConfigError, NumericError, Preempted
from memoryformer.files import atomic
from memoryformer.notation import Params
from memoryformer.runs import checkpoint as checkpoint_lib
from memoryformer.runs import (
    compatibility,
    console,
    directory,
    metrics,
    outcome,
    remote,
)
from memoryformer.runs import folder as folder_lib
from memoryformer.training import compilation_cache, experiment
from memoryformer.training import log as training_log
from memoryformer.training import programs as programs_lib
from memoryformer.training import spikes as spikes_lib
from memoryformer.training import step as step_lib
from memoryformer.training import teacher as teacher_lib


def train(
    config: Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    allow: Collection[str] = (),
    programs: programs_lib.Cache | None = None,
    patience: float = 0.0,
) -> dict[str, float]:
    """Train a model, or go on training it; return its last validation metrics.

    Args:
      config: a whole config, see `experiment`.
      workdir: gets config.json, tokenizer.json, metrics.jsonl and checkpoints/, on this machine
        or in an object store (`runs.remote`). If it holds a checkpoint, the run goes on from
        there, and its config must be the same but for what `experiment.may_change`.
      allow: further fields that may differ.
      programs: what an earlier run of this process has compiled, used if this one differs
        from it in traced inputs only (seed, learning rate, weight decay).
      patience: seconds to wait for another process that still trains in `workdir`.

    Raises `Preempted` after SIGTERM or SIGINT, with the state saved; `NumericError`,
    `StorageError`, `DataError` and `ConfigError` as their names say. A phase that takes
    longer than `train.timeouts` ends the process with exit code 43 (`watchdog`).
    """
    run = experiment.resolve(config)
    with remote.opened(workdir, patience) as folder:
        directory.refuse_foreign(folder.path)
        with (
            directory.only_one(folder.path, patience),
            outcome.recorded(folder.path),
            signals.StopRequest() as signal,
            watchdog.Watchdog(run.train.timeouts) as watch,
        ):
            return _train(run, folder, allow, programs, signal, watch)


def _train(
    run: experiment.Experiment,
    folder: folder_lib.Folder,
    allow: Collection[str],
    programs: programs_lib.Cache | None,
    signal: signals.StopRequest,
    watch: watchdog.Watchdog,
) -> dict[str, float]:
    """See `train`; nobody else trains in `folder`."""
    run_config = experiment.as_dict(run)
    processes.check_joined(run.mesh)
    sharding = sharding_lib.make(run.mesh, striped=teacher_lib.striped(run))
    specs = programs_lib.check_fit(run, sharding)
    corpus = run_tokenizer.located(run.data, folder.path)
    dataset = data.load(corpus, run.model.vocab_size, stop=lambda: bool(signal))
    teacher = teacher_lib.load(run, dataset.tokenizer)
    common = compatibility.shared(run_config, experiment.may_differ())
    processes.agree("the config", common)
    processes.agree("the data", dataset.fingerprint)
    processes.agree("the teacher", teacher.fingerprint if teacher else "")
    with (
        sharding.activate(),
        checkpoint_lib.Checkpointer(
            folder.path,
            run.checkpoint,
            run_config=run_config,
            data_fingerprint=dataset.fingerprint,
            teacher_fingerprint=teacher.fingerprint if teacher else "",
            tokenizer=run_tokenizer.identity(dataset.tokenizer),
            allow={*allow, *experiment.may_change()},
            complete=experiment.complete,
            absent_params=experiment.params_to_go_on_with,
            folder=folder,
        ) as checkpointer,
    ):
        loop = _Loop(
            config=run,
            run_config=run_config,
            folder=folder,
            sharding=sharding,
            programs=(programs or programs_lib.Cache()).programs(
                run, sharding, specs, teacher and teacher.model
            ),
            taught=teacher_lib.placed(teacher, sharding),
            dataset=dataset,
            checkpointer=checkpointer,
            signal=signal,
            watch=watch,
        )
        return loop.run()


@dataclasses.dataclass(kw_only=True)
class _Loop:
    """What the training loop works with; `run` is the loop."""

    config: experiment.Experiment
    run_config: dict[str, Any]  # the same as plain values
    folder: folder_lib.Folder
    sharding: sharding_lib.Sharding
    programs: programs_lib.Programs
    taught: list[Params]  # the teacher's, if there is one
    dataset: data.Dataset
    checkpointer: checkpoint_lib.Checkpointer
    signal: signals.StopRequest
    watch: watchdog.Watchdog

    def __post_init__(self):
        self.stop = processes.SharedFlag(self.signal)
        self.progress = console.ProgressPrinter(silent=not processes.is_chief())
        self.evaluators = self._evaluators()
        seq_len, train = self.config.model.seq_len, self.config.train
        self.batches = self.dataset.train.batches(seq_len, train.batch_size, train.seed)

    def run(self) -> dict[str, float]:
        """Restore, step, log, evaluate and save, in this order, until `train.num_steps`.

        The order is the contract: state n is logged, evaluated and saved before batch n is
        consumed. Metrics are read one step late, so that the host never waits for a step
        that it has just dispatched; what it sends to the devices in a step it sends
        explicitly.
        """
        run, checkpointer, watch = self.config, self.checkpointer, self.watch
        num_steps, num_devices = run.train.num_steps, self.sharding.num_devices
        self.progress.note(compilation_cache.use_cache(run.train.compilation_cache))
        state, start = self._restore()
        self._write_config()
        hyper = step_lib.hyperparams(run)
        hyper = self.sharding.put(hyper, jax.tree.map(lambda _: P(), hyper))
        rows = self.sharding.local_rows(run.train.batch_size)
        values: dict[str, float] | None = {}  # evaluated last; None: stopped in it
        with metrics.MetricsWriter(
            self.folder.path, run.metrics, start, run_config=self.run_config
        ) as writer:
            log = training_log.TrainingLog(
                run, writer, self.progress, start, num_devices
            )
            if not self._was_evaluated(start):
                values = self._evaluate(state.params, writer, start)
                if values is not None:
                    checkpointer.amend(start, evaluated=True)
            for step in range(start, num_steps):
                if self.stop():
                    break
                watch.enter("first_step" if step == start else "step", step + 1)
                with jax.transfer_guard("disallow"):
                    with log.section("data"):
                        read = self.batches.batch(step, rows)
                    batch = self.sharding.put_batch(read)
                    with log.section("step"):
                        state, sums = self.programs.train_step(
                            state, batch, hyper, *self.taught
                        )
                    log.push(step + 1, sums)
                checkpointer.check()
                if self._due(step + 1):
                    log.drain()
                    with log.section("evaluate"):
                        values = self._evaluate(state.params, writer, step + 1)
                if step + 1 == num_steps or checkpointer.should_save(step + 1):
                    log.drain()
                    with log.section("save"):
                        self._save(step + 1, state, evaluated=values is not None)
                    log.saved = step + 1
            log.drain()
            done = int(state.step)
            self._save(done, state, evaluated=values is not None, wait=True)
            self.progress.close()
        if done < num_steps or values is None:
            raise Preempted(
                f"{self.signal.name or 'asked to stop by another process'}: stopped after "
                f"step {done} of {num_steps}, state saved; run the same command to go on."
            )
        return values

    def _restore(self) -> tuple[step_lib.TrainState, int]:
        """Return (state, step): the newest whole checkpoint, or a fresh state at 0."""
        self.watch.enter("checkpoint")
        self.checkpointer.preflight(self.programs.abstract)
        restored = self.checkpointer.restore_latest(self.programs.abstract)
        if restored is None:
            self.watch.enter("first_step")
            return self.programs.draw(self.config.train.seed), 0
        step, state = restored
        if step > (goal := self.config.train.num_steps):
            raise ConfigError(
                f"train.num_steps={goal}: {self.folder.name} is at step {step}; raise it."
            )
        self.progress.note(f"going on from step {step} in {self.folder.name}")
        return state, step

    def _save(self, step, state, *, evaluated, wait=False):
        self.watch.enter("checkpoint", step)
        if not spikes_lib.are_finite(state.params):  # which its loss need not tell
            raise NumericError(
                f"step {step}: a parameter is not finite; lower optimizer.learning_rate."
            )
        self.checkpointer.save(step, state, wait=wait, evaluated=evaluated)

    def _write_config(self):
        if jax.process_index():
            return
        begun, workdir = bool(self.checkpointer.steps()), self.folder.path
        run_tokenizer.check(workdir, self.dataset.tokenizer, begun=begun)
        atomic.write_json(workdir / "config.json", self.run_config, indent=2)
        run_tokenizer.keep(workdir, self.dataset.tokenizer, begun=begun)
        self.folder.publish()

    def _evaluators(self):
        run = self.config

        def stop():  # asked before every batch, each of which may take its time
            self.watch.again()
            return self.stop()

        batches = self.dataset.validation.eval_batches(
            run.model.seq_len, run.eval.batch_size
        )
        return evaluation.make(
            evaluation.Subject(
                model=run.model,
                sharding=self.sharding,
                batches=batches,
                token_bytes=self.dataset.token_bytes,
                every=run.eval.every_steps,
                num_batches=run.eval.num_batches,
                stop=stop,
            )
        )

    def _due(self, step):
        """The evaluators whose turn it is after `step`."""
        num_steps = self.config.train.num_steps
        return [e for e in self.evaluators if evaluation.is_due(e, step, num_steps)]

    def _was_evaluated(self, step):
        """Whether the evaluation due at the restored step was done, and not stopped in."""
        if not step or not self._due(step):
            return True
        evaluated = True
        if processes.is_chief():
            stored = self.checkpointer.facts(step).get("evaluated")
            if not stored:  # an older version's, or killed before `amend`
                logged = metrics.read(self.folder.path)
                stored = any(r["step"] == step and "val/loss" in r for r in logged)
            evaluated = stored
        return processes.from_chief(evaluated)

    def _evaluate(self, params, writer, step):
        """Measure and write what is due; None if asked to stop: the next start makes up for it."""
        self.watch.enter("evaluation", step)
        values: dict[str, float] = {}
        try:
            for evaluator in self._due(step):
                values |= evaluator(params)
        except evaluation.Stopped:
            return None
        writer.write(step, values)
        if "val/loss" in values:
            self.progress.note(
                f"step {step}: validation loss {values['val/loss']:.4f} nats per token, "
                f"{values['val/bits_per_byte']:.4f} bits per byte"
            )
        return values
