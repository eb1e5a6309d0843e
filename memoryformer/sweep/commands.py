"""The words of the command line, each a function of a sweep. Start at `COMMANDS`."""

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from memoryformer import accounting
from memoryformer import config as config_lib
from memoryformer.dryrun import lowering
from memoryformer.errors import ConfigError
from memoryformer.model import implementations
from memoryformer.runs import console
from memoryformer.sweep import best, files, jobs, kinds, launchers, points, statistics
from memoryformer.sweep.launchers import base
from memoryformer.sweep.points import Point, Sweep
from memoryformer.training import programs


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of the command line say."""

    index: int = -1  # print: this point alone
    todo: bool = False  # print: neither done nor failed points
    parallel: int | None = None  # run: processes, 1; submit: array tasks at a time, all
    retry_failed: bool = False  # run, submit, print --todo: failed points too
    launcher: str = "local"  # submit
    launcher_options: str = ""  # submit: words for sbatch
    script: pathlib.Path | None = None  # submit: for sbatch; None: the launcher's own
    baseline: str = ""  # collect: a variant; '' = the first
    best_over: str = ""  # collect: a field; '' = the learning rate, where it varies


def show(sweep: Sweep, unused_options: Options) -> int:
    """List the points: index, overrides, directory."""
    lines = [(p.index, points.describe(p.overrides), p.workdir) for p in sweep.points]
    print(statistics.text_table(("index", "overrides", "directory"), lines))
    return 0


def check(sweep: Sweep, unused_options: Options) -> int:
    """Build every point's shapes and estimate its memory; nothing is run or read.

    Resolving has checked the configs. Memory is that of one device of this machine: what a
    checkpoint holds, its gradients, and an estimate of the activations. `dryrun` says more.
    """
    sizes: dict[Any, tuple[int, ...]] = {}
    lines = []
    for point in sweep.points:
        run = point.run
        if kinds.is_task(run):
            raise ConfigError(
                "sweep check: estimates the memory of language models; `list` resolves the "
                "points of a generated task."
            )
        key = programs.program(run)
        if key not in sizes:
            sizes[key] = _sizes(point)
        tokens = run.train.num_steps * run.train.batch_size * run.model.seq_len
        cost = accounting.count(run.model).training_flops_per_token * tokens
        parameters, *parts = sizes[key]
        figures = map(console.short_number, (parameters, tokens))
        gigabytes = [f"{part / 2**30:.3g}" for part in (*parts, sum(parts))]
        name = point.workdir.name[:-9]
        lines.append((point.index, name, *figures, f"{cost:.2e}", *gigabytes))
    columns = ("index", "point", "parameters", "tokens", "FLOPs")
    memory = ("GiB: state", "gradients", "activations", "all")
    print(statistics.text_table((*columns, *memory), lines))
    print(f"{len(lines)} points are sound, of {len(sizes)} compiled programs.")
    return 0


def _sizes(point: Point) -> tuple[int, ...]:
    """Parameters, and the bytes of a device: state, gradients, activations."""
    try:
        # This machine need not have what the points will be trained with.
        readable = implementations.readable(point.run.model)
        run = dataclasses.replace(point.run, model=readable)
        sharding = lowering.device_sharding(run, jax.devices())
        state = lowering.state(run, sharding)
        activations = lowering.activation_bytes(run, sharding)
    except ConfigError as error:
        name = f"point {point.index} ({point.workdir.name})"
        raise ConfigError(f"{name}: {error}") from error
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    device = map(lowering.device_bytes, (state, state.params))
    return parameters, *device, activations


def show_commands(sweep: Sweep, options: Options) -> int:
    """Print one shell command per point, or that of `index`; of those to do, if asked."""
    chosen = sweep.points
    if options.index >= 0:
        if options.index >= len(chosen):
            raise ConfigError(
                f"--index={options.index}: the sweep has {len(chosen)} points, from 0."
            )
        chosen = chosen[options.index : options.index + 1]
    files.write_manifest(sweep)
    for point in chosen:
        if not options.todo or _to_do(files.state(point).name, options):
            print(points.command(sweep, point))
    return 0


def _to_do(state: str, options: Options) -> bool:
    """Whether a point in this state, by its files, is to be trained."""
    return state not in ("done", *(() if options.retry_failed else ("failed",)))


def run(sweep: Sweep, options: Options) -> int:
    """Train the points here: `submit --launcher=local`."""
    return submit(sweep, dataclasses.replace(options, launcher="local"))


def submit(sweep: Sweep, options: Options) -> int:
    """Give a launcher the points that are neither done nor with a scheduler already."""
    launcher = launchers.choose(options.launcher)
    try:
        words = shlex.split(options.launcher_options)
    except ValueError as error:
        raise ConfigError(f"--launcher_options: {error}.") from error
    if not launcher.queues:
        request = _request(sweep, sweep.points, options, words)
        return launcher.submit(request).exit_code
    files.write_manifest(sweep)
    with jobs.alone(sweep):
        seen = jobs.look(sweep)
        chosen, left_out = [], []
        for point in sweep.points:
            by_files = files.state(point).name
            name = jobs.state(by_files, seen.get(point.index))
            queued = name in (base.QUEUED, base.RUNNING)
            if not queued and _to_do(by_files, options):
                chosen.append(point)
            else:
                left_out.append(name)
        others = _counted(left_out) if left_out else "no others"
        if not chosen:
            print(f"nothing to submit: {others}")
            return 0
        done = launcher.submit(_request(sweep, chosen, options, words))
        print(f"submitted as job {done.job}: {len(chosen)} points; {others}")
        jobs.remember(sweep, options.launcher, done.job, chosen)
    return done.exit_code


def _request(
    sweep: Sweep, chosen: Sequence[Point], options: Options, words: Sequence[str]
) -> base.Request:
    return base.Request(
        sweep,
        chosen,
        parallel=options.parallel or 0,
        retry_failed=options.retry_failed,
        options=words,
        script=options.script,
    )


def status(sweep: Sweep, unused_options: Options) -> int:
    """Say how far every point is, by its files and by the schedulers of its jobs."""
    try:
        seen = jobs.look(sweep)
    except ConfigError as error:
        print(f"what follows is by files alone: {error}", file=sys.stderr)
        seen = {}
    names, lines = [], []
    for point in sweep.points:
        state = files.state(point)
        facts = [f"{state.exit_code}: {state.error}"] if state.error else []
        if state.age is not None:
            facts.append(f"last row {console.short_time(state.age)} ago")
        job = seen.get(point.index)
        if job and state.name != "done":
            facts.append(job.text)
        names.append(jobs.state(state.name, job))
        steps = f"{state.step}/{point.run.train.num_steps}"
        loss = "" if state.loss is None else f"{state.loss:.3f}"
        line = (point.index, point.workdir.name, names[-1], steps, loss)
        lines.append((*line, "; ".join(facts)))
    print(statistics.text_table(("index", "point", "state", "step", "loss", ""), lines))
    print(_counted(names))
    return 0


def _counted(names: Sequence[str]) -> str:
    """'3 done, 1 failed, 0 partial, 0 new', and before them what a scheduler has."""
    scheduled = [name for name in (base.RUNNING, base.QUEUED) if name in names]
    every = (*scheduled, *files.STATES)
    return ", ".join(f"{names.count(name)} {name}" for name in every)


def collect(sweep: Sweep, options: Options) -> int:
    """Write points.csv and print the tables by variant, and by side at its best."""
    print(statistics.collect(sweep, options.baseline))
    if lines := best.table(sweep, options.best_over, options.baseline):
        print("", *lines, sep="\n")
    return 0


COMMANDS: dict[str, Callable[[Sweep, Options], int]] = {
    "list": show,
    "check": check,
    "print": show_commands,
    "run": run,
    "submit": submit,
    "status": status,
    "collect": collect,
}


def main(
    words: Collection[str],
    config: str,
    names: Collection[str],
    root: str,
    base: dict[str, Any],
    options: Options,
) -> int:
    """Run one command; without `names`, `list` says which sweeps there are."""
    words = list(words)
    if len(words) != 1:
        raise ConfigError(f"sweep: name one of {', '.join(COMMANDS)}.")
    chosen = COMMANDS[config_lib.choose(words[0], COMMANDS, "sweep command")]
    if not names:
        known = points.available(config)
        if words[0] == "list" and known:
            print(statistics.text_table(("sweep", ""), list(known.items())))
            return 0
        listed = ", ".join(known) or "none"
        raise ConfigError(f"--sweep is missing: {config} defines {listed}.")
    sweep = points.expand(config, tuple(names), root, base)
    return chosen(sweep, options)
