"""Every shipped config, compiled for the TPU slice that it states, on a machine without one.

Needs libtpu (`pip install 'jax[tpu]'`), and minutes. `Target:` in a config's docstring names
the slice and the overrides, as `python -m memoryformer.dryrun` takes them.
"""

import ast
import importlib.util
import pathlib
import re

import jax
import pytest

from memoryformer import config as config_lib
from memoryformer import dryrun, experiment, targets

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
OTHERS = {"listops", "studies"}  # no train step of `trainer`'s; sweeps over several
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def stated(path):
    """(target, overrides) of a config's docstring, whose last lines they are."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    target, flags = re.search(r"^Target: (\S+)(.*)", text, re.M | re.S).groups()
    pairs = (flag.removeprefix("--config.").split("=", 1) for flag in flags.split())
    return target, {k: int(v) if v.isdigit() else v for k, v in pairs}


SHIPPED = [p for p in sorted(CONFIGS.glob("*.py")) if p.stem not in OTHERS]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_config_states_its_target(path):
    """... which its batch and its tables divide over. Mutation: a line left out."""
    target, overrides = stated(path)
    run = experiment.resolve(config_lib.load(str(path), **overrides))
    count = targets.parse(target).num_devices
    place = dryrun.abstract.device_sharding(run, range(count))
    state = dryrun.abstract.state(run, place)
    assert dryrun.abstract.device_bytes(state) < targets.parse(target).chip.memory_bytes
    assert jax.tree.leaves(state)


@pytest.mark.slow
@libtpu
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_compile_for_their_target(path):
    """By the target's own compiler, and its plan fits the memory.

    Mutations: `num_microbatches` left out of memoryformer_base's line; mesh=data there.
    """
    target, overrides = stated(path)
    run = experiment.resolve(config_lib.load(str(path), **overrides))
    report = dryrun.examine(run, target)
    print(f"\n{path.stem}: {target}, {report.verdict}, {report.seconds}")
    assert report.verdict.startswith("fits: "), report.warnings
