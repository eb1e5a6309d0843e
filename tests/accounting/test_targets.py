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
from memoryformer.accounting import targets as targets_lib
from memoryformer.dryrun import examine as dryrun
from memoryformer.training import experiment

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TASKS = {  # no train step of `training.loop`'s
    path.stem
    for path in CONFIGS.glob("*.py")
    if "from memoryformer.tasks import" in path.read_text(encoding="utf-8")
}
OTHERS = {"studies"} | TASKS  # sweeps over several
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
    count = targets_lib.parse(target).num_devices
    place = dryrun.lowering.device_sharding(run, range(count))
    state = dryrun.lowering.state(run, place)
    assert (
        dryrun.lowering.device_bytes(state)
        < targets_lib.parse(target).chip.memory_bytes
    )
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
    assert str(report.verdict).startswith("fits: "), report.warnings


def test_chips_are_known_by_what_jax_calls_them():
    """One description for the dry run, the benchmarks and the log. Mutation: the shortest
    name that fits, so that a v5e counts as a v5p."""
    kinds = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA GeForce RTX 4060": "rtx4060",
        "TPU v5 lite": "v5e",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
    }
    for kind, name in kinds.items():
        assert targets_lib.chip_of(kind) is targets_lib.CHIPS[name], kind
    for kind in ("cpu", "NVIDIA H100 PCIe", "TPU v2"):  # others have other figures
        assert targets_lib.chip_of(kind) is None
    assert targets_lib.parse("h100:16").num_devices == 16


@pytest.mark.parametrize("name", [n for n, c in targets_lib.CHIPS.items() if c.gpu])
def test_a_gpu_as_xla_reads_it(name):
    """Every figure of the chip, under the name that XLA has for it."""
    chip, text = targets_lib.CHIPS[name], targets_lib.gpu_description(name)
    assert f"device_memory_size: {chip.memory_bytes}\n" in text
    assert f"l2_cache_size: {chip.gpu.l2_bytes}\n" in text
    assert f"fpus_per_core: {64 if name == 'a100' else 128}\n" in text
    major, minor = str(chip.capability).split(".")
    assert f"cuda_compute_capability {{ major: {major} minor: {minor} }}" in text
    assert f'device_description_str: "{chip.device_kinds[0]}"' in text
    assert text.count("{") == text.count("}")
