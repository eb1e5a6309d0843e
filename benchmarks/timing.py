"""What every benchmark measures with: clocks, quartiles, and the processor's name."""

import os
import pathlib
import platform
import statistics
import time
from collections.abc import Iterable

# The process's own time leaves out what others take of a shared core, waiting included.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def use_cores(count: int) -> int:
    """Keep to `count` cores (0: all), before any thread pool starts; return how many."""
    cores = sorted(os.sched_getaffinity(0))[: count or None]
    os.sched_setaffinity(0, cores)
    return len(cores)


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
