"""Accelerators: what each can do, and how to compile for one on a machine without it.

    cpu  cpu:8          this machine's CPU, 8 virtual devices of it
    v5e:2x4  v6e:8x8    a TPU slice; needs `pip install 'jax[tpu]'`
    h200  h100:64         GPUs, eight to a host: h200, h100 (80 GB), a100 (80 GB),
                          rtx4090 (24 GB), rtx4060 (8 GB); needs `pip install 'jax[cuda12]'`

Start at `CHIPS`; to compile, at `parse`, then `Target.devices`.
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
MAX_DEVICES = 2**16


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA wants to know of an NVIDIA GPU that it cannot ask; sizes in bytes."""

    capability: float  # compute capability
    cores: int  # multiprocessors
    clock_ghz: float
    l2_bytes: int
    shared_per_block: int  # opted in
    shared_per_core: int
    threads_per_core: int = 2048
    float_units_per_core: int = 128  # of float32


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device: the vendor's figures, rates per second.

    Links: bytes out of one device, of one ring, both directions of it.
    """

    platform: str  # jax's name
    memory_bytes: int
    matrix_flops: float  # bf16 products added up in float32, without sparsity
    memory_bandwidth: float
    link_bandwidth: float  # to the devices of one domain
    network_bandwidth: float  # beyond it
    domain: int  # devices
    device_kinds: tuple[str, ...] = ()  # how jax's `device_kind` begins
    gpu: Gpu | None = None

    @property
    def capability(self) -> float | None:
        """Compute capability of an NVIDIA GPU."""
        return self.gpu.capability if self.gpu else None


MIB = 2**20
# A100: NVIDIA's datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4) and XLA's own description,
# xla/backends/gpu/target_config/specs/a100_sxm_80.txtpb. RTX: NVIDIA's Ada whitepaper, whose rate
# is 256 fused multiply-adds a clock and multiprocessor where float32 adds up bfloat16 products:
# 4090: 2 * 256 * 128 * 2.52e9 = 165e12; 4060: 2 * 256 * 24 * 2.46e9 = 30e12. Networks beyond a
# host are assumptions: 200 Gb/s for an A100, 10 Gb/s for an RTX.
_HOPPER = Gpu(9.0, 132, 1.98, 50 * MIB, 232448, 233472)
CHIPS = {
    "cpu": Chip("cpu", 0, 0.0, 0.0, 0.0, 0.0, 1),
    "v5e": Chip(
        "tpu", 16 * GIB, 197e12, 819e9, 100e9, 3.1e9, 256, ("TPU v5 lite", "TPU v5e")
    ),
    "v6e": Chip(
        "tpu", 32 * GIB, 918e12, 1638e9, 224e9, 12.5e9, 256, ("TPU v6 lite", "TPU v6e")
    ),
    "v5p": Chip("tpu", 95 * GIB, 459e12, 2765e9, 200e9, 6e9, 8960, ("TPU v5",)),
    "h200": Chip(
        "gpu", 143_771 * MIB, 989e12, 4.8e12, 450e9, 50e9, 8, ("NVIDIA H200",),
        dataclasses.replace(_HOPPER, l2_bytes=60 * MIB),
    ),
    "h100": Chip(  # SXM, 80 GB
        "gpu", 81_559 * MIB, 989e12, 3.35e12, 450e9, 50e9, 8, ("NVIDIA H100 80GB HBM3",),
        _HOPPER,
    ),
    "a100": Chip(  # SXM, 80 GB
        "gpu", 85_100_068_864, 312e12, 2.039e12, 300e9, 25e9, 8, ("NVIDIA A100",),
        Gpu(8.0, 108, 1.41, 40 * MIB, 166912, 167936, float_units_per_core=64),
    ),
    "rtx4090": Chip(  # 24 GB; PCIe and a slow network
        "gpu", 24_564 * MIB, 165e12, 1008e9, 32e9, 1.25e9, 8,
        ("NVIDIA GeForce RTX 4090",),
        Gpu(8.9, 128, 2.52, 72 * MIB, 101376, 102400, 1536),
    ),
    "rtx4060": Chip(  # 8 GB; half the lanes
        "gpu", 8_188 * MIB, 30e12, 272e9, 16e9, 1.25e9, 8, ("NVIDIA GeForce RTX 4060",),
        Gpu(8.9, 24, 2.46, 24 * MIB, 101376, 102400, 1536),
    ),
}  # fmt: skip


def gpu_description(name: str) -> str:
    """Describe the GPU `name` of `CHIPS` as XLA reads it: a GpuTargetConfigProto as text."""
    chip, gpu = CHIPS[name], CHIPS[name].gpu
    if gpu is None:
        raise ValueError(f"{name} is no GPU of CHIPS.")
    major, minor = divmod(round(10 * gpu.capability), 10)
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores} fpus_per_core: {gpu.float_units_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: {gpu.threads_per_core}
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_per_block}
  shared_memory_per_core: {gpu.shared_per_core} l2_cache_size: {gpu.l2_bytes}
  device_memory_size: {chip.memory_bytes}
  memory_bandwidth: {chip.memory_bandwidth:.0f}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kinds[0]}"
"""


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that jax calls `device_kind`, such as 'NVIDIA H100 80GB HBM3', or None."""
    matches = [
        (len(prefix), chip)
        for chip in CHIPS.values()
        for prefix in chip.device_kinds
        if device_kind.startswith(prefix)
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None


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
            platform="cuda",
            topology_name="",
            topology=shape,
            target_config=gpu_description(self.chip_name),
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
    count, domain = parsed.num_devices, parsed.chip.domain
    if not 0 < count <= MAX_DEVICES:
        raise ConfigError(
            f"--target={target!r}: {count} devices; must be from 1 to {MAX_DEVICES}."
        )
    if parsed.chip.platform == "gpu" and count > domain and count % domain:
        raise ConfigError(
            f"--target={target!r}: {count} devices; give up to {domain}, and whole hosts of "
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
