"""Where points are trained: a file for each launcher, and a line of LAUNCHERS.

Start at `base.Launcher`, which says what one has to do.
"""

from memoryformer import config as config_lib
from memoryformer.sweep.launchers import local, slurm
from memoryformer.sweep.launchers.base import Launcher

LAUNCHERS: dict[str, Launcher] = {"local": local.Local(), "slurm": slurm.Slurm()}


def choose(name: str) -> Launcher:
    """Return the launcher of that name; raises `ConfigError`."""
    return LAUNCHERS[config_lib.choose(name, LAUNCHERS, "--launcher")]
