"""A recurrent attention network that looks at an image in a few glimpses.

    phi_t  = patches of 1, 2, .. times a width around l_t, averaged to the same size, rounded
    g_t    = relu(W3 relu(W1 phi_t) + W4 relu(W2 l_t))
    h_t+1  = round(clip(W6 relu(W5 g_t + U h_t)))          `state_bits` bits each
    l_t+1 ~ N(tanh(W8 relu(W7 h_t+1)), std), moved to the next corner of pixels
    class  = argmax W9 h_T

    loss   = -log p(class) + mean_t (b_t - R)^2 - weight sum_t log N(l_t+1) (R - b_t)

R is 1 for a right answer, b_t = w . h_t its baseline, and no gradient goes from locations and
baselines into h (REINFORCE, Mnih et al. 2014). Rounding passes the gradient on. All of h, l and
phi have few values, so that a step of the network is a row of a table (`table`). Start at
`episode`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer import config as config_lib
from memoryformer.config import field
from memoryformer.errors import ConfigError
from memoryformer.model import losses
from memoryformer.notation import AnyArray, Array, Float, Int, Params
from memoryformer.tasks import base
from memoryformer.tasks.memorised import digits


@dataclasses.dataclass(frozen=True)
class MemorisedConfig(base.TrainerConfig):
    """How the policy is trained."""

    policy_std: float = field(
        "numbers", 0.175, doc="Of locations in training; 0.175 is 0.7 pixels."
    )
    policy_weight: float = field("numbers", 0.01, doc="Of REINFORCE in the loss.")

    def __post_init__(self):
        super().__post_init__()
        if self.policy_std <= 0:
            raise ConfigError(f"task.policy_std={self.policy_std}: must be > 0.")
        config_lib.at_least(self, "task", 0, "policy_weight")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network's sizes."""

    state_size: int = field("numbers", 64, doc="Values of h.")
    state_bits: int = field("numbers", 1, doc="Bits of each of them.")
    patch_bits: int = field("numbers", 2, doc="Bits of a value of phi.")
    patch_size: int = field("numbers", 2, doc="Width of a patch; even.")
    num_scales: int = field("numbers", 2, doc="Patches of a glimpse.")
    scale_factor: int = field("numbers", 2, doc="How much wider each is than the last.")
    num_glimpses: int = field("numbers", 5, doc="T, glimpses of an image.")
    hidden: int = field("numbers", 256, doc="Width of g and of the layer behind it.")
    hidden_glimpse: int = field("numbers", 128, doc="Width of the layers below g.")

    def __post_init__(self):
        names = [f.name for f in dataclasses.fields(self)]
        config_lib.at_least(self, "model", 1, *names)
        if self.patch_size % 2:
            raise ConfigError(f"model.patch_size={self.patch_size}: must be even.")
        for name in ("state_bits", "patch_bits"):
            if getattr(self, name) > 8:
                raise ConfigError(f"model.{name}={getattr(self, name)}: must be <= 8.")
        widest = self.patch_size * self.scale_factor ** (self.num_scales - 1)
        if widest > 4 * digits.SIDE:
            raise ConfigError(
                f"model.num_scales={self.num_scales}: its widest patch has {widest} pixels, "
                f"more than {4 * digits.SIDE}; lower it, or model.scale_factor."
            )

    @property
    def patch_values(self) -> int:
        """P, values of phi."""
        return self.num_scales * self.patch_size**2

    @property
    def state_levels(self) -> int:
        """The highest level of a value of h."""
        return 2**self.state_bits - 1

    @property
    def patch_levels(self) -> int:
        """The highest level of a value of phi."""
        return 2**self.patch_bits - 1


class Episode(NamedTuple):
    """What the network sees and does: T glimpses at B images, T + 1 states and corners."""

    states: Float[Array, "T+1 B S"]  # h, in [0, 1]
    corners: Int[Array, "T+1 B 2"]  # where a glimpse is centred, 0 .. 8
    patches: Float[Array, "T B P"]  # phi, in [0, 1]
    logits: Float[Array, "T B 10"]
    baselines: Float[Array, "T B"]
    log_policy: Float[
        Array, "T B"
    ]  # of the location drawn at each step, but for a constant


def glimpse(
    config: NetworkConfig,
    pixels: Float[AnyArray, "B 8 8"],
    corners: Int[AnyArray, "B 2"],
) -> Float[Array, "B P"]:
    """Return phi: patches around a corner of pixels, those outside being 0."""
    patches = []
    for scale in range(config.num_scales):
        block = config.scale_factor**scale
        width = config.patch_size * block
        padded = jnp.pad(jnp.asarray(pixels), [(0, 0), (width, width), (width, width)])
        beside = width // 2 + jnp.arange(width)
        places = jnp.asarray(corners)[:, :, None] + beside[None, None]  # [B, 2, width]
        image = jnp.arange(len(padded))[:, None, None]
        patch = padded[image, places[:, 0, :, None], places[:, 1, None, :]]
        shape = (len(padded), config.patch_size, block, config.patch_size, block)
        patches.append(patch.reshape(shape).mean(axis=(2, 4)).reshape(len(padded), -1))
    phi = jnp.concatenate(patches, axis=-1)
    return jnp.round(phi * config.patch_levels) / config.patch_levels


def location(corners: Int[AnyArray, "*B 2"]) -> Float[Array, "*B 2"]:
    """Return l in [-1, 1] of a corner 0 .. 8."""
    return 2 * jnp.asarray(corners) / digits.SIDE - 1


def corner(locations: Float[Array, "*B 2"]) -> Int[Array, "*B 2"]:
    """Return the corner next to a location; those outside are moved to the edge."""
    inside = jnp.clip(locations, -1, 1)
    return jnp.round((inside + 1) / 2 * digits.SIDE).astype(jnp.int32)


def episode(
    config: NetworkConfig,
    params: Params,
    pixels: Float[AnyArray, "B 8 8"],
    first: Int[AnyArray, "B 2"],
    noise: Float[AnyArray, "T B 2"] | None = None,
    std: float = 1.0,
) -> Episode:
    """Look at images, from a first corner; without noise the policy takes its mean."""
    h = jnp.zeros((len(pixels), config.state_size))
    states, corners, steps = [h], [jnp.asarray(first)], []
    for t in range(config.num_glimpses):
        phi = glimpse(config, pixels, corners[-1])
        h = _next_state(config, params, h, location(corners[-1]), phi)
        fixed = jax.lax.stop_gradient(h)
        mean = jnp.tanh(_layer(params, "W8", _layer(params, "W7", fixed, jax.nn.relu)))
        drawn = mean if noise is None else mean + std * noise[t]
        drawn = jax.lax.stop_gradient(drawn)
        log_policy = -jnp.sum((drawn - mean) ** 2, axis=-1) / (2 * std**2)
        baseline = _layer(params, "baseline", fixed)[:, 0]
        steps.append((phi, _layer(params, "W9", h), baseline, log_policy))
        states.append(h)
        corners.append(corner(drawn))
    stacked = (jnp.stack(arrays) for arrays in zip(*steps, strict=True))
    return Episode(jnp.stack(states), jnp.stack(corners), *stacked)


def _next_state(config, params, h, l, phi):  # noqa: E741, the letter of the equation
    below = _layer(params, "W3", _layer(params, "W1", phi, jax.nn.relu))
    below = below + _layer(params, "W4", _layer(params, "W2", l, jax.nn.relu))
    inner = _layer(params, "W5", jax.nn.relu(below)) + _layer(params, "U", h)
    wide = jnp.clip(_layer(params, "W6", jax.nn.relu(inner)), 0, 1)
    rounded = jnp.round(wide * config.state_levels) / config.state_levels
    return wide + jax.lax.stop_gradient(rounded - wide)


def _layer(params, name, x, activation=lambda x: x):
    return activation(x @ params[name]["kernel"] + params[name]["bias"][None])


@functools.partial(jax.jit, static_argnums=0)
def draw(c: NetworkConfig, seed: int) -> Params:
    """Draw the parameters of a network."""
    shapes = {
        "W1": (c.patch_values, c.hidden_glimpse),
        "W2": (2, c.hidden_glimpse),
        "W3": (c.hidden_glimpse, c.hidden),
        "W4": (c.hidden_glimpse, c.hidden),
        "W5": (c.hidden, c.hidden),
        "U": (c.state_size, c.hidden),
        "W6": (c.hidden, c.state_size),
        "W7": (c.state_size, c.hidden_glimpse),
        "W8": (c.hidden_glimpse, 2),
        "W9": (c.state_size, digits.NUM_CLASSES),
        "baseline": (c.state_size, 1),
    }
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    glorot = jax.nn.initializers.glorot_uniform()
    params: dict[str, Any] = {
        name: {"kernel": glorot(key, shape), "bias": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    half: Any = params["W6"]
    return params | {"W6": half | {"bias": half["bias"] + 0.5}}


class Memorised(base.Task):
    """The network on the digits; held-out images are seen with the mean policy."""

    Options = MemorisedConfig
    Model = NetworkConfig

    def check(self) -> None:
        """Refuse to begin without the images."""
        digits.check()

    def init(self, seed: int) -> Params:
        """Draw Glorot's uniform weights; biases are 0, but 1/2 for h, the middle of its range."""
        return draw(self.model, seed)

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """Images, labels, first corners, and the noise of the policy."""
        size, glimpses = self.options.batch_size, self.model.num_glimpses
        rng = base.rng(self.options.seed, step, split)
        images = digits.load(split)
        rows = rng.integers(len(images.labels), size=size)
        noise = rng.normal(size=(glimpses, size, 2)).astype(np.float32)
        return {
            "pixels": images.pixels[rows],
            "labels": images.labels[rows],
            "first": rng.integers(digits.SIDE + 1, size=(size, 2), dtype=np.int32),
            "noise": noise if split == "train" else np.zeros_like(noise),
        }

    def sums(self, params: Params, batch: base.Batch) -> base.Sums:
        """The loss above, and right answers."""
        seen = episode(
            self.model,
            params,
            batch["pixels"],
            batch["first"],
            batch["noise"],
            self.options.policy_std,
        )
        logits, labels = seen.logits[-1], jnp.asarray(batch["labels"])
        correct = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
        ahead = correct[None] - seen.baselines
        # The last location is looked at by nobody.
        advantage = jax.lax.stop_gradient(ahead[:-1])
        policy = jnp.sum(seen.log_policy[:-1] * advantage, axis=0)
        loss = losses.token_nats(logits, labels) + jnp.mean(ahead**2, axis=0)
        loss = loss - self.options.policy_weight * policy
        count = jnp.float32(len(labels))
        return {"loss": (jnp.sum(loss), count), "accuracy": (jnp.sum(correct), count)}
