"""Memory of a step on a CPU, kept by the process from one step to the next.

XLA asks malloc for a step's temporaries, some 100 MB for the quickstart, and frees them after it.
glibc gives large blocks back to the kernel at once, which clears them again, page by page, in the
next step: an eighth of the step's time (docs/performance.md). Start at `keep`.
"""

import ctypes
import importlib.util
import os

# Larger blocks, and more than this at the end of the heap, are given back.
KEPT_BYTES = 1 << 30
# Of glibc's malloc.h. Threads share one arena: those of their own hold no block above 64 MB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SETTINGS = {
    _M_ARENA_MAX: 1,
    _M_MMAP_THRESHOLD: KEPT_BYTES,
    _M_TRIM_THRESHOLD: KEPT_BYTES,
}
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")
_CHOSEN_BY_USER = ("arena_", "mmap_", "trim_")


def keep() -> bool:
    """Have malloc keep blocks of up to `KEPT_BYTES` that are freed; return whether it does.

    Call it before jax starts its threads. It does nothing where jax has a plugin for another
    device, where another libc allocates, or where the environment says how (MALLOC_ARENA_MAX,
    MALLOC_TRIM_THRESHOLD_, .., GLIBC_TUNABLES).
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(
        map(importlib.util.find_spec, _PLUGINS)
    ):
        return False
    chosen = [os.environ.get("GLIBC_TUNABLES", "")]
    chosen += [name for name in os.environ if name.startswith("MALLOC_")]
    if any(word in text.lower() for word in _CHOSEN_BY_USER for text in chosen):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(name, value) for name, value in _SETTINGS.items()])
