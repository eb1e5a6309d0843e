"""What every benchmark measures with: clocks, rounds, quartiles, and the processor's name."""

import itertools
import os
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)

# The process's own time leaves out what others take of a shared core, waiting included.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def use_cores(count: int) -> int:
    """Keep to `count` cores (0: all), before any thread pool starts; return how many."""
    cores = sorted(os.sched_getaffinity(0))[: count or None]
    os.sched_setaffinity(0, cores)
    return len(cores)


def turns(
    works: Mapping[Name, Callable[[Any], Any]],
    clock: Callable[[], float],
    draw: Callable[[int], Any] = lambda index: index,
    warm_up: int = 1,
) -> Iterator[dict[Name, list[float]]]:
    """Do every work once a round, in another order each; yield the seconds after every round.

    Round i gives each work the same `draw(i)`, made before the clock starts. The first
    `warm_up` rounds, which compile, are not counted. A work must wait for its result.
    """
    shuffled = random.Random(0)
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    for index in itertools.count():
        inputs = draw(index)
        for name in shuffled.sample(list(works), len(works)):
            start = clock()
            works[name](inputs)
            taken = clock() - start
            if index >= warm_up:
                seconds[name].append(taken)
        yield seconds


def in_turns(
    works: Mapping[Name, Callable[[Any], Any]],
    rounds: int,
    clock: Callable[[], float],
    draw: Callable[[int], Any] = lambda index: index,
    warm_up: int = 1,
) -> dict[Name, list[float]]:
    """Seconds of every work in each of `rounds` rounds of `turns`."""
    measured = turns(works, clock, draw, warm_up)
    return next(itertools.islice(measured, rounds + warm_up - 1, None))


def ratio(above: Iterable[float], below: Iterable[float]) -> list[float]:
    """Quartiles of one series over another, round by round."""
    return quartiles(a / b for a, b in zip(above, below, strict=True))


def quartiles(values: Iterable[float]) -> list[float]:
    """Lower quartile, median, upper quartile of two values or more."""
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


def processor() -> str:
    """Name this processor: its model, its family, and what makes narrow products fast."""
    wide = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    info = pathlib.Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    facts = {name.strip(): value.strip() for name, _, value in lines}
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    flags = facts.get("flags", "").split()
    return ", ".join([name, *(flag for flag in wide if flag in flags)])
