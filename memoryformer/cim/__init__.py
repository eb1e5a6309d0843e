"""Compute in memory: what a model costs on such hardware, and what it loses to its noise.

    python -m memoryformer.cim energy --config=FILE [--batch=1] [--json]
    python -m memoryformer.cim --workdir=DIR [--beside=DENSE_RUN] [--technology=pcm]

A dense layer is a crossbar product: weights are conductances, currents add up, a converter reads
the sum. A memory layer reads one row of each table from a plain memory, with no converter.

Modules: `constants` (published figures, each with its source), `technologies` and `energy`; `cells`,
`devices` and `noise` (what a device does to weights), `periphery` (what converters do to
activations); `settings` and `experiment` (both on a trained run), `tables` and `plots`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memoryformer.cim.cells import Device
    from memoryformer.model import ModelConfig
    from memoryformer.notation import Params


def perturb(
    model_config: "ModelConfig",
    params: "Params",
    device: "str | Device",
    seconds: float = 0.0,
    seed: int = 0,
) -> "Params":
    """Return the weights as `device` holds them after `seconds`; see `noise.perturb`."""
    from memoryformer.cim import noise  # with jax, which --help does without

    return noise.perturb(model_config, params, device, seconds, seed)
