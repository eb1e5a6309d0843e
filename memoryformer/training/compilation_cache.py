"""The cache of compiled programs: a run that starts again does not compile again.

Start at `use_cache`.
"""

import hashlib
import os
import pathlib
import platform
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from memoryformer.errors import ConfigError
from memoryformer.files import paths

DEFAULT = "~/.cache/memoryformer/compiled"
OFF = "off"

_chosen: str | None = None  # by `use_cache`, so that a later run can choose otherwise


def use_cache(directory: str, *, required: bool = True) -> str:
    """Keep compiled programs below `directory`, or nowhere ('off'); say what was done.

    What the environment says (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE)
    comes first. Programs for CPUs are kept apart by kind of CPU: a home directory may be
    shared by several. Raises `ConfigError` for a directory that cannot be made, if it is
    `required` and was chosen: a home that cannot be written is no reason to stop.
    """
    global _chosen
    flags: Any = jax.config  # its type names none of them
    present = flags.jax_compilation_cache_dir
    if not flags.jax_enable_compilation_cache:
        return "compiled programs are not kept: JAX_ENABLE_COMPILATION_CACHE is off"
    if present and present != _chosen:
        return f"compiled programs are kept in {present}, as JAX is configured"
    try:
        wanted = None if directory == OFF else _folder(directory)
    except ConfigError as error:
        if required and directory != DEFAULT:
            raise
        return f"compiled programs are not kept: {error}"
    if wanted != present:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", wanted)
        _chosen = wanted
    if wanted is None:
        return "compiled programs are not kept"
    return f"compiled programs are kept in {wanted} (train.compilation_cache)"


def _folder(directory):
    folder = paths.local(directory, "train.compilation_cache")
    if jax.default_backend() == "cpu":
        folder /= f"cpu-{cpu_kind()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"train.compilation_cache={directory!r}: {error.strerror}; name a directory "
            f"that can be written, or {OFF!r}."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f"train.compilation_cache={directory!r}: cannot be written; name another "
            f"directory, or {OFF!r}."
        )
    return str(folder)


def cpu_kind() -> str:
    """Return a short name of the instructions that this machine's CPU knows."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    flags = [
        line for line in lines if line.startswith(("flags", "Features", "model name"))
    ]
    text = "\n".join([platform.machine(), platform.processor(), *sorted(set(flags))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
