"""What every benchmark measures with: the clocks, and the quartiles of what they say."""

import pathlib
import statistics
import time
from collections.abc import Iterable

# The process's own time leaves out what others take of a shared core, waiting included.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def quartiles(values: Iterable[float]) -> list[float]:
    """Lower quartile, median, upper quartile of two values or more."""
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]


def processor() -> str:
    """Return what the machine calls its processor, and the widest vectors that it has."""
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(":") for line in lines)
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    flags = facts.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2") if name in flags), "no AVX2")
    family, model = facts.get("cpu family", "?"), facts.get("model", "?")
    name = facts.get("model name", "unknown")
    return f"{name}, family {family} model {model}, {vectors}"
