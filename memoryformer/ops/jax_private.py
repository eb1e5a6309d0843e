"""What jax has under a public name in some of the versions that we run with only.

Tried with jax 0.10.2 (private), 0.11.2 and 0.12.0.1 (public). No other module names `jax._src`.
"""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_interpreter() -> Any:
    """Parameters that let Mosaic GPU interpret a kernel on this machine's CPU."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret import params

    return params.InterpretGPUParams()
