"""The training loop's log: metrics read one step late, one row every `log_every` steps.

    train/mfu            training FLOPs, the teacher's too, over the devices' bf16 peak of `targets`
    train/memory_bytes   the most that this process's first device has used so far; on CPU,
                         the most that the process has had in memory
    train/divergence     from the teacher, where there is one (`model.distillation`)
    train/wall_seconds   since this start of the run, with all that is not a step

The first two where the device is known and says so: a CPU's peak is not.

Reading a metric waits for the device. What is pushed at step n is read at step n + 1, when
the next step is under way, so the device never waits for the host. Start at `TrainingLog`.
"""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator

import jax

from memoryformer.accounting import targets as targets_lib
from memoryformer.errors import NumericError
from memoryformer.notation import Array
from memoryformer.runs import console, metrics
from memoryformer.training import experiment, optimizer, teacher


class TrainingLog:
    """Read metrics one step late, add them up, and write a row every `log_every` steps."""

    def __init__(
        self,
        config: experiment.Experiment,
        writer: metrics.MetricsWriter,
        progress: console.ProgressPrinter,
        start: int,
        num_devices: int,
    ):
        self._train = config.train
        self._writer = writer
        self._progress = progress
        self._num_devices = num_devices
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._schedule = optimizer.schedule(config.optimizer, config.train.num_steps)
        self._tokens_per_step = config.train.batch_size * config.model.seq_len
        self._flops_per_token = teacher.training_flops_per_token(config)
        self._peak = _peak_flops() * num_devices  # 0: not known
        self._nonfinite = 0  # in a row
        self._compile_seconds: float | None = None  # of tracing and compiling the step
        self.saved: int | None = start or None
        self._started = time.perf_counter()
        self._reset(self._started)

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time inside as `data`, as a `step`, or, `evaluate` and `save`, as neither.

        The first step returns when it is compiled, not when it is done: its time is told.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            if name == "data":
                self._data_seconds += seconds
            elif name != "step":
                self._away += seconds
            elif self._compile_seconds is None:
                self._compile_seconds = seconds
                self._away += seconds
                self._progress.note(f"step ready in {seconds:.1f} s")

    def push(self, step: int, values: dict[str, Array]) -> None:
        """Take the metrics of `step` as they are dispatched, and read those before."""
        self.drain()
        self._pending = (step, values)

    def drain(self) -> None:
        """Read the metrics that are still pending, waiting for them."""
        if self._pending is None:
            return
        step, pending = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(pending).items()}
        self._check(step, values)
        if values["finite"]:
            self._nats += values["nats"]
            self._divergence += values.get("divergence", 0.0)
            self._weight += values["weight"]
        self._steps += 1
        if step % self._train.log_every == 0 or step == self._train.num_steps:
            self._write(step, values)

    def _check(self, step, values):
        """Report an update that the step did not take; raise if they are too many."""
        self._nonfinite = 0 if values["finite"] else self._nonfinite + 1
        message = (
            f"step {step}: loss {values['nats'] / max(values['weight'], 1):.4g}, gradient "
            f"norm {values['grad_norm']:.4g}"
        )
        if values["spike"]:
            self._progress.note(f"{message} leap out of the last ones; update skipped")
        if values["finite"]:
            return
        message += " are not finite; the update was dropped"
        if self._nonfinite > self._train.max_skipped:
            raise NumericError(
                f"{message} and nothing later is saved; lower optimizer.learning_rate, or "
                "set train.max_skipped=10 to go on past up to ten in a row."
            )
        self._progress.note(f"{message} ({self._nonfinite} in a row)")

    def _write(self, step, values):
        now = time.perf_counter()
        elapsed = max(now - self._since - self._away, 1e-9)
        seconds = elapsed / self._steps
        rate = self._tokens_per_step / seconds
        loss = self._nats / self._weight if self._weight else float("nan")
        updates = int(values["updates"])  # fewer than steps, if some were not taken
        with jax.transfer_guard("allow"):  # of one number of the host
            learning_rate = float(self._schedule(max(updates - 1, 0)))
        mfu = rate * self._flops_per_token / self._peak if self._peak else None
        memory = _memory()
        wall = now - self._started
        of_device = {} if mfu is None else {"train/mfu": mfu}
        if memory is not None:
            of_device["train/memory_bytes"] = memory[0]
        taught = {}
        if "divergence" in values:
            apart = self._divergence / self._weight if self._weight else float("nan")
            taught["train/divergence"] = apart
        self._writer.write(
            step,
            {
                "train/loss": loss,
                **taught,
                "train/grad_norm": values["grad_norm"],
                "train/learning_rate": learning_rate,
                "train/skipped": step - updates,
                "train/tokens": step * self._tokens_per_step,
                "train/tokens_per_second": rate,
                "train/step_seconds": seconds,
                "train/compile_seconds": self._compile_seconds or 0.0,
                "train/data_fraction": self._data_seconds / elapsed,
                "train/wall_seconds": wall,
                **of_device,
            },
        )
        num_steps = self._train.num_steps
        figures = [
            ("loss", f"{loss:.3f}"),
            ("gnorm", f"{values['grad_norm']:.2f}"),
            ("lr", console.short_power(learning_rate)),
            ("tok/s", self._tokens_per_second(rate)),
            ("step", f"{seconds:.3g}s"),
            ("data", f"{100 * self._data_seconds / elapsed:.1f}%"),
        ]
        if mfu is not None:
            figures.append(("mfu", f"{100 * mfu:.1f}%"))
        if memory is not None:
            used, total = (x / 2**30 for x in memory)
            figures.append(("mem", f"{used:.3g}/{total:.3g}GiB"))
        figures.append(("wall", console.short_time(wall)))
        figures.append(("eta", console.short_time((num_steps - step) * seconds)))
        if self.saved is not None:
            figures.append(("ckpt", str(self.saved)))
        self._progress.update(console.progress_line(step, num_steps, figures))
        self._reset(now)

    def _tokens_per_second(self, rate):
        if self._num_devices == 1:
            return console.short_number(rate)
        one = console.short_number(rate / self._num_devices)
        return f"{console.short_number(rate)} ({one}/dev)"

    def _reset(self, now):
        self._since = now
        self._steps = 0
        self._nats = self._divergence = self._weight = 0.0
        self._data_seconds = self._away = 0.0


def _peak_flops() -> float:
    """Return the bf16 operations of one device a second, by its vendor; 0 if not known."""
    chip = targets_lib.chip_of(jax.devices()[0].device_kind)
    return chip.matrix_flops if chip else 0.0


def _memory() -> tuple[int, int] | None:
    """Return (most bytes used so far, bytes there are): of a device, or of a CPU's process.

    None if neither is known.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["peak_bytes_in_use"], stats["bytes_limit"]
    if device.platform != "cpu":
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
