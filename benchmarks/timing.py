"""What every benchmark measures with: the clocks, and the quartiles of what they say."""

import statistics
import time
from collections.abc import Iterable

# The process's own time leaves out what others take of a shared core, waiting included.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def quartiles(values: Iterable[float]) -> list[float]:
    """Lower quartile, median, upper quartile of two values or more."""
    return [round(q, 4) for q in statistics.quantiles(values, n=4)]
