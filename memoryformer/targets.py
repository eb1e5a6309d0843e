"""Accelerators to compile for on a machine that has none, and what each can do.

    cpu  cpu:8          this machine's CPU, 8 virtual devices of it
    v5e:2x4  v6e:8x8    a TPU slice; needs `pip install 'jax[tpu]'`
    h200  h200:64       GPUs, eight to a host; needs `pip install 'jax[cuda12]'`

Start at `parse`, then `Target.devices`.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence

import jax
from jax.experimental import topologies

from memoryformer import config as config_lib
from memoryformer.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one device, per second; what `predict` divides by.

    Every figure is the vendor's but for those of the H200's memory and matrix products,
    which are measured. Links: bytes out of one device, of one ring, both directions of it.
    """

    platform: str  # jax's name
    memory_bytes: int
    matrix_flops: float  # bf16 products
    memory_bandwidth: float
    link_bandwidth: float  # to the devices of one domain
    network_bandwidth: float  # beyond it
    domain: int  # devices
    # Seconds of forward and both gradients, per token, table and output value of a lookup:
    # estimates for 16384 tokens, K = 128, tau = 8, F = 1024 over their 2.147e9 sums.
    lookup_seconds: float


LOOKUP_SUMS = 16384 * 128 * 1024
CHIPS = {
    "cpu": Chip("cpu", 0, 0.0, 0.0, 0.0, 0.0, 1, 0.0),
    # v5e and v5p: v6e's lookup, slowed down as their matrix units are.
    "v5e": Chip("tpu", 16 * GIB, 197e12, 819e9, 100e9, 3.1e9, 256, 36e-3 / LOOKUP_SUMS),
    "v6e": Chip(
        "tpu", 32 * GIB, 918e12, 1638e9, 224e9, 12.5e9, 256, 7.7e-3 / LOOKUP_SUMS
    ),
    "v5p": Chip(
        "tpu", 95 * GIB, 459e12, 2765e9, 200e9, 6e9, 8960, 15.4e-3 / LOOKUP_SUMS
    ),
    "h200": Chip(
        "gpu", 150_754_820_096, 780e12, 4.3e12, 450e9, 50e9, 8, 4.5e-3 / LOOKUP_SUMS
    ),
}

# What XLA wants to know of a GPU that it cannot ask: NVIDIA's figures for the H200 SXM.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 62914560
  device_memory_size: 150754820096 memory_bandwidth: 4800000000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind."""

    name: str  # as it was written
    chip_name: str
    topology: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Its rates."""
        return CHIPS[self.chip_name]

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return math.prod(self.topology)

    def missing(self) -> str:
        """Say what to install so as to compile for this target; '' if nothing."""
        wanted = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_cuda12_plugin", "cuda12")}
        module, extra = wanted.get(self.chip.platform, ("", ""))
        if not module or importlib.util.find_spec(module):
            return ""
        if extra == "cuda12" and importlib.util.find_spec("jax_cuda13_plugin"):
            return ""
        return (
            f"{self.name}: its compiler is not installed; pip install "
            f"'jax[{extra}]=={jax.__version__}' into an environment of its own."
        )

    def devices(self) -> Sequence[jax.Device]:
        """Return the target's devices, real for cpu, else to compile for only.

        Raises `ConfigError` where the target's compiler is not there.
        """
        if self.chip.platform == "cpu":
            return cpu_devices(self.num_devices)
        if self.missing():
            raise ConfigError(self.missing())
        make = {"tpu": self._tpu, "gpu": self._gpu}[self.chip.platform]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a plugin that finds no device
            return _topology(make, self.name)

    def _tpu(self):
        # There is no TPU: libtpu need not ask the cloud's metadata server what machine
        # this is, nor keep other processes away.
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            os.environ.setdefault(name, "1")
        shape = "x".join(map(str, self.topology))
        # A host has 2 x 2 chips, unless the slice is a part of one.
        host = {"chips_per_host_bounds": (1, 1, 1)} if self.num_devices == 1 else {}
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{self.chip_name}:{shape}", **host
        )

    def _gpu(self):
        hosts, devices = divmod(self.num_devices, self.chip.domain)
        shape = f"1x{hosts}x{self.chip.domain}" if hosts else f"1x1x{devices}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=shape, target_config=_H200
        )


def parse(target: str) -> Target:
    """Read 'cpu', 'cpu:8', 'v5e:2x4', 'h200:64'; raises `ConfigError`."""
    chip, _, shape = target.partition(":")
    config_lib.choose(chip, CHIPS, "--target")
    if not re.fullmatch(r"(\d+(x\d+)*)?", shape) or (chip[0] == "v" and not shape):
        raise ConfigError(
            f"--target={target!r}: write a chip and its slice or number, such as "
            "v5e:2x4, v6e:8x8, h200:8 or cpu:8."
        )
    topology = tuple(int(n) for n in shape.split("x")) if shape else (1,)
    parsed = Target(target, chip, topology)
    gpus, domain = parsed.num_devices, parsed.chip.domain
    if not gpus or (chip == "h200" and gpus > domain and gpus % domain):
        raise ConfigError(
            f"--target={target!r}: {gpus} devices; give at least one, and whole hosts of "
            f"{domain} GPUs where more than one host is needed."
        )
    return parsed


def cpu_devices(count: int) -> Sequence[jax.Device]:
    """Return `count` devices of the CPU; raises `ConfigError` if too few were started."""
    flag = "xla_force_host_platform_device_count"
    if count > 1 and flag not in os.environ.get("XLA_FLAGS", ""):
        # Without effect where the backend runs already, with the number it was given.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(
            f"--target=cpu:{count}: this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--{flag}={count} before it starts."
        )
    return devices[:count]


def _topology(make: Callable, name: str) -> Sequence[jax.Device]:
    try:
        return make().devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--target={name!r}: no such slice, or its compiler does not start: {reason}"
        ) from error
