"""Linear attention learned from examples by Adam, beside the exact fit of `identifiability`.

    y = sum_h V_h Z Z^T Q_h z_n          Z [d, n], z_n its last column

`task.kind` says where examples come from, after Yau et al. 2024 (arXiv 2410.10101):

    teachers      Z of normal entries, y by a layer of `teacher_heads` heads drawn with the seed
    associative   d / 2 keys and values and a query beside a value that means nothing,
                  Z = [k_1 .. k_m, k_i; v_1 .. v_m, v], y = sum_j <k_i, k_j> [0; v_j]; a share
                  `normal` of them has normal keys and values, the others have orthogonal ones

A fixed set of `num_examples` is trained on, held-out examples are fresh. Entries of `teachers`
have variance n^(-1/3), so that a feature G_jk z_l has variance 1, and targets have mean square 1
on average: the loss, |y - f(Z)|^2, is relative.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.notation import Float, Params
from memoryformer.tasks import base

KINDS = ("teachers", "associative")
Examples = tuple[Float[np.ndarray, "N d n"], Float[np.ndarray, "N d"]]


@dataclasses.dataclass(frozen=True)
class LinearMapsConfig(base.TrainerConfig):
    """Where examples come from, and the training."""

    kind: str = field("numbers", "teachers", doc="teachers | associative.")
    width: int = field("numbers", 4, doc="d, rows of Z.")
    length: int = field("numbers", 16, doc="n, columns of Z of teachers.")
    teacher_heads: int = field("numbers", 3, doc="Heads of the teacher.")
    num_examples: int = field("numbers", 2048, doc="N, examples that are trained on.")
    normal: float = field(
        "numbers", 1.0, doc="Share of associative examples that are normal."
    )

    def __post_init__(self):
        super().__post_init__()
        config_lib.choose(self.kind, KINDS, "task.kind")
        sizes = ("width", "length", "teacher_heads", "num_examples")
        config_lib.at_least(self, "task", 1, *sizes)
        if self.kind == "associative" and self.width % 2:
            raise ConfigError(
                f"task.width={self.width}: must be even, half keys and half values."
            )
        if not 0 <= self.normal <= 1:
            raise ConfigError(f"task.normal={self.normal}: must be in [0, 1].")


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """The layer that is trained."""

    num_heads: int = field("numbers", 4, doc="H.")

    def __post_init__(self):
        config_lib.at_least(self, "model", 1, "num_heads")


class LinearMaps(base.Task):
    """A layer of `num_heads` heads on examples of such a layer."""

    Options = LinearMapsConfig
    Model = HeadsConfig

    def init(self, seed: int) -> Params:
        """Draw V and Q [H, d, d] of variance 1 / d."""
        width = self.options.width
        shape = (2, self.model.num_heads, width, width)
        V, Q = jax.random.normal(jax.random.key(seed), shape) * width**-0.5
        return {"V": V, "Q": Q}

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """Z [B, d, n], Y [B, d]: drawn from the set, or fresh to hold out."""
        options = self.options
        rng = base.rng(options.seed, step, split)
        if split == "train":
            Z, Y = dataset(options)
            rows = rng.integers(len(Z), size=options.batch_size)
            Z, Y = Z[rows], Y[rows]
        else:
            Z, Y = draw(options, rng, options.batch_size)
        return {"Z": Z.astype(np.float32), "Y": Y.astype(np.float32)}

    def sums(self, params: Params, batch: base.Batch) -> base.Sums:
        """|y - f(Z)|^2, over the examples."""
        V, Q, Z = params["V"], params["Q"], jnp.asarray(batch["Z"])
        query = jnp.einsum("hkl,bl->bhk", Q, Z[..., -1])
        attended = jnp.einsum("bkn,bhk->bhn", Z, query)
        read = jnp.einsum("bjn,bhn->bhj", Z, attended)
        y = jnp.einsum("haj,bhj->ba", V, read)
        squares = jnp.sum((y - batch["Y"]) ** 2)
        return {"loss": (squares, jnp.float32(len(y)))}


def teacher(options: LinearMapsConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return (V, Q) [H, d, d] that targets are made by."""
    return _teacher(_data_options(options))


@functools.lru_cache(maxsize=4)
def _teacher(options):
    width = options.width
    if options.kind == "associative":
        is_key = np.arange(width) < width // 2
        V, Q = np.diag(~is_key)[None].astype(float), np.diag(is_key)[None].astype(float)
    else:
        rng = np.random.default_rng([options.seed, 2])
        V, Q = rng.normal(size=(2, options.teacher_heads, width, width))
    Z = inputs(options, np.random.default_rng([options.seed, 4]), 4096)
    return V / np.sqrt(np.mean(np.sum(_outputs((V, Q), Z) ** 2, axis=-1))), Q


def draw(options: LinearMapsConfig, rng: np.random.Generator, number: int) -> Examples:
    """Draw examples (Z, Y)."""
    Z = inputs(options, rng, number)
    return Z, _outputs(teacher(options), Z)


def dataset(options: LinearMapsConfig) -> Examples:
    """Return the set that is trained on."""
    return _dataset(_data_options(options))


def _data_options(options):
    """The same for all runs on the same data."""
    return dataclasses.replace(
        options,
        num_steps=1,
        batch_size=1,
        learning_rate=0,
        warmup_steps=0,
        weight_decay=0,
        eval_every=1,
        eval_batches=1,
    )


@functools.lru_cache(maxsize=4)
def _dataset(options):
    rng = np.random.default_rng([options.seed, 3])
    return draw(options, rng, options.num_examples)


def inputs(
    options: LinearMapsConfig, rng: np.random.Generator, number: int
) -> Float[np.ndarray, "N d n"]:
    """Draw the inputs of examples."""
    if options.kind == "teachers":
        shape = (number, options.width, options.length)
        return rng.normal(size=shape) * options.length ** (-1 / 6)
    half = options.width // 2
    pairs = rng.normal(size=(number, 2, half, half))  # keys and values, a column each
    orthogonal = rng.random(number) >= options.normal
    pairs[orthogonal] = np.linalg.qr(pairs[orthogonal])[0]
    asked = pairs[np.arange(number), 0, :, rng.integers(half, size=number)]
    last = np.stack([asked, rng.normal(size=(number, half))], axis=1)
    Z = np.concatenate([pairs, last[..., None]], axis=-1)
    return Z.reshape(number, options.width, half + 1)


def _outputs(heads, Z):
    V, Q = heads
    attended = np.einsum("Njn,Nkn,hkl,Nl->Nhj", Z, Z, Q, Z[..., -1], optimize=True)
    return np.einsum("haj,Nhj->Na", V, attended)
