"""Importing the package changes nothing for whoever else lives in the process."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
CHILD = """
import contextlib, importlib, json, logging, os, pkgutil, signal, sys, threading, warnings
# What these do at import is theirs.
import absl.logging, flax, jax, matplotlib, orbax.checkpoint, tensorflow_datasets
import scipy.optimize, scipy.sparse
import jax.experimental.pallas.mosaic_gpu, jax.experimental.pallas.ops.tpu
import numpy as np
with contextlib.suppress(ImportError):  # an extra
    import lm_eval.api.model, lm_eval.utils
from flax import config as flax_config, nnx

def state():
    root = logging.getLogger()
    loggers = {
        name: (logger.level, logger.propagate, len(logger.filters), len(logger.handlers))
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and not name.startswith("memoryformer")
    }
    return {
        "jax": {k: repr(v) for k, v in sorted(jax.config.values.items())},
        "flax": {k: repr(getattr(flax_config, k)) for k in sorted(flax_config._values)},
        "nnx": [
            nnx.set_graph_mode.current_value(), nnx.set_graph_updates.current_value()
        ],
        "root": [root.level, len(root.handlers), len(root.filters), logging.raiseExceptions],
        "absl": [absl.logging.get_verbosity()],
        "loggers": loggers,
        "warnings": len(warnings.filters),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook)],
        "signals": {int(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "numpy": repr(np.geterr()),
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "backends": jax._src.xla_bridge.backends_are_initialized(),
    }

before = state()
import memoryformer
names = [
    module.name
    for module in pkgutil.walk_packages(memoryformer.__path__, "memoryformer.")
    if not module.name.endswith("__main__")
]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] in ("lm_eval", "apache_beam"), name
after = state()
new = set(after["loggers"]) - set(before["loggers"])  # of libraries imported only now
for name in new:
    del after["loggers"][name]
changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
print(json.dumps({"modules": len(names), "changed": changed}))
"""


def test_nothing_global_is_changed():
    """Flags of jax, flax and numpy, loggers, warnings, hooks, signals, the environment; nor is
    a device taken. A notebook with another flax model goes on as before.

    Mutations tried: `nnx.set_graph_mode(False)` in the package (which it had);
    `jax.config.update("jax_enable_x64", True)` at the top of a module.
    """
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["modules"] > 90
    assert found["changed"] == {}


def test_a_command_line_is_read_before_jax_is():
    """What is wrong with it, and --help, are told at once.

    Mutations tried: `import jax` in runs/console.py; `load` imported at the top of runs.
    """
    code = (
        "import sys\n"
        "import memoryformer.training.__main__, memoryformer.harness.__main__\n"
        "print({'jax', 'flax', 'orbax'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "set()\n"), run.stderr[-2000:]
