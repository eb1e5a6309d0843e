"""What reliability costs per step: the training loop beside a bare one, in turns.

    python -m benchmarks.reliability_cost [--rounds=150] [--steps=5]

The bare loop draws batches, steps and reads the loss one step late; its step keeps every
update. The real one is `training.loop.train`'s: the guard against numbers that are not finite, the
spike history, token-id checks, signals, the watchdog, the log and the look at the save in
progress. A checkpoint is timed apart, blocking and in the background, and spread over the
config's `checkpoint.every_steps`. Prints JSON: medians of the rounds, and of real / bare - 1
within a round, with the interval that holds the latter's median 95 times in 100 (order
statistics): rounds differ by more than what is measured, so that it takes many short ones.
"""

import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from benchmarks import arguments, timing

FLAGS = arguments.Parser(__doc__)
FLAGS.number("rounds", 150)
FLAGS.number("steps", 5)
FLAGS.clock()
FLAGS.add_argument("--config", default="configs/quickstart.py")

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from memoryformer import config as config_lib
from memoryformer import data, sharding
from memoryformer.cluster import processes, watchdog
from memoryformer.cluster import signals as signals_lib
from memoryformer.data import token_files
from memoryformer.runs import checkpoint, console, metrics
from memoryformer.training import experiment, programs, updates
from memoryformer.training import log as training_log
from memoryformer.training import step as step_lib


def main(argv: list[str] | None = None) -> None:
    """Time both loops in turns, and a checkpoint."""
    options = FLAGS.parse_args(argv)
    Bench.clock = timing.CLOCKS[options.clock]
    overrides = {"mesh": "single", "metrics.trackers": ""}
    run = experiment.resolve(config_lib.load(options.config, **overrides))
    place = sharding.make("single")
    specs = programs.check_fit(run, place)
    dataset = data.load(run.data, expected_vocab_size=run.model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(run, place, specs, dataset, pathlib.Path(folder))
        loops = {"bare": bench.bare, "real": bench.real}
        for loop in loops.values():
            loop(3)  # compiles
        seconds = {name: [] for name in loops}
        for round_ in range(options.rounds):
            order = list(loops) if round_ % 2 else list(loops)[::-1]
            for name in order:
                seconds[name].append(loops[name](options.steps))
        saving = bench.saving()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = zip(seconds["real"], seconds["bare"], strict=True)
    overhead = sorted(100 * (real / bare - 1) for real, bare in pairs)
    middle, reach = len(overhead) / 2, 0.98 * len(overhead) ** 0.5
    interval = [overhead[round(max(middle - reach, 0))]]
    interval.append(overhead[round(min(middle + reach, len(overhead) - 1))])
    every = run.checkpoint.every_steps
    report = {
        "seconds_per_step": medians,
        "overhead_percent": statistics.median(overhead),
        "overhead_percent_95": interval,
        "checkpoint_blocking_seconds": saving[0],
        "checkpoint_background_seconds": saving[1],
        "checkpoint_overhead_percent": 100 * saving[0] / every / medians["bare"],
        "clock": options.clock,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
    }
    print(json.dumps(report, indent=1))


class Bench:
    """Both loops, each with its own state."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, run, place, specs, dataset, folder):
        self.run, self.place, self.folder = run, place, folder
        self.batches = dataset.train.batches(
            run.model.seq_len, run.train.batch_size, run.train.seed
        )
        draw, _ = programs.init_state(run, place, specs)
        self.states = {"bare": draw(), "real": draw()}
        self.real_step = step_lib.make_train_step(run, place, specs)
        take, updates._take = updates._take, lambda wanted, new, old: new
        record, step_lib.spikes_lib.record = step_lib.spikes_lib.record, lambda s, *_: s
        self.bare_step = step_lib.make_train_step(run, place, specs)
        self.hyper = step_lib.hyperparams(run)
        self.bare(1)  # traces while the guards are off
        updates._take, step_lib.spikes_lib.record = take, record
        self.fingerprint = dataset.fingerprint

    def bare(self, steps: int) -> float:
        """Seconds per step of the loop without anything."""
        check, token_files.check_ids = token_files.check_ids, lambda *_: None
        state, pending = self.states["bare"], None
        began = self.clock()
        for step in range(steps):
            batch = self.place.put_batch(self.batches.batch(step))
            state, values = self.bare_step(state, batch)
            if pending is not None:
                float(pending)
            pending = values["nats"]
        float(pending)
        seconds = (self.clock() - began) / steps
        token_files.check_ids = check
        self.states["bare"] = state
        return seconds

    def open(self):
        """The checkpointer of the real loop."""
        return checkpoint.Checkpointer(
            self.folder,
            self.run.checkpoint,
            run_config=experiment.as_dict(self.run),
            data_fingerprint=self.fingerprint,
        )

    def real(self, steps: int) -> float:
        """Seconds per step of what `training.loop._Loop.run` does at a step without a save."""
        run, state = self.run, self.states["real"]
        with (
            signals_lib.StopRequest() as signals,
            watchdog.Watchdog(run.train.timeouts) as watch,
            self.open() as checkpointer,
            metrics.MetricsWriter(self.folder, run.metrics) as writer,
        ):
            stop = processes.SharedFlag(signals)
            progress = console.ProgressPrinter(sys.stderr)
            log = training_log.TrainingLog(run, writer, progress, 0, 1)
            began = self.clock()
            for step in range(steps):
                if stop():
                    break
                watch.enter("step", step + 1)
                with jax.transfer_guard("disallow"):
                    with log.section("data"):
                        batch = self.batches.batch(step)
                    batch = self.place.put_batch(batch)
                    with log.section("step"):
                        state, values = self.real_step(state, batch, self.hyper)
                    log.push(step + 1, values)
                checkpointer.check()
                checkpointer.should_save(step + 1)
            log.drain()
            seconds = (self.clock() - began) / steps
        self.states["real"] = state
        return seconds

    def saving(self) -> tuple[float, float]:
        """Seconds that a save blocks for, and that it then takes in the background."""
        blocking, background = [], []
        with self.open() as checkpointer:
            for step in range(1, 5):
                began = self.clock()
                checkpointer.save(step, self.states["real"])
                blocking.append(self.clock() - began)
                checkpointer.wait()
                background.append(self.clock() - began)
        return statistics.median(blocking), statistics.median(background)


if __name__ == "__main__":
    arguments.run(main)
