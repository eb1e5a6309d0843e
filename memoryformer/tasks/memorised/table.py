"""The steps of a network as rows of a table, and two ways to find the row to follow.

    row = (h_t, l_t, phi_t) -> (h_t+1, l_t+1, class)

A key is written in bits, every value of n levels as n - 1 of them (2 of 3: 110), so that the
L1 distance of two values is the number of bits in which they differ.

    Nearest    the row under a |dphi|_1 + b |dh|_1 + c |dl|_1, as published
    Hashed     ours: a memory layer. Each of K tables looks at tau bits of the key, drawn once and
               more often the more they weigh; the code of their signs names a bucket, which holds
               the mean of the rows that fell in it, and what is read is the mean over the tables
               whose bucket is not empty. (Bit sampling, the hash of that distance: Indyk and
               Motwani 1998.)

Start at `steps` for the rows and at `follow` for inference.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from memoryformer.notation import Float, Int, Params
from memoryformer.ops import hashing, lookup
from memoryformer.tasks.memorised import digits, network

Weights = tuple[float, float, float]  # a of phi, b of h, c of l
EQUAL: Weights = (1.0, 1.0, 1.0)
Pixels = Float[np.ndarray, "B 8 8"]
Corners = Int[np.ndarray, "B 2"]


class Values(NamedTuple):
    """What a step leads to, N of them: levels of h, a corner, a class."""

    states: Int[np.ndarray, "N S"]
    corners: Int[np.ndarray, "N 2"]
    classes: Int[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Table:
    """R rows: keys in bits, values, and the image that each is of."""

    config: network.NetworkConfig
    keys: Float[np.ndarray, "R W"]
    values: Values
    images: Int[np.ndarray, " R"]

    def of_images(self, number: int) -> "Table":
        """Return the rows of the first images."""
        kept = self.images < number
        values = Values(*(array[kept] for array in self.values))
        return Table(self.config, self.keys[kept], values, self.images[kept])


class Reader(Protocol):
    """A way to find rows: keys [B, W] -> what to do next, and how often the key was known."""

    def __call__(self, keys: Float[np.ndarray, "B W"]) -> tuple[Values, float]:
        """Return the next step of each key, and the share of hits."""
        ...


def first_corners(number: int, seed: int) -> Corners:
    """Draw where the first glimpse at each image is."""
    rng = np.random.default_rng([seed, 6])
    return rng.integers(digits.SIDE + 1, size=(number, 2), dtype=np.int32)


def steps(
    config: network.NetworkConfig, params: Params, pixels: Pixels, first: Corners
) -> tuple[Table, Int[np.ndarray, " B"]]:
    """Return the table of the network's steps at images, and the classes it answers."""
    seen = jax.device_get(_episode(config)(params, pixels, first))
    states = np.rint(seen.states * config.state_levels).astype(np.int32)
    patches = np.rint(seen.patches * config.patch_levels).astype(np.int32)
    classes = np.argmax(seen.logits, axis=-1)
    keys = key_bits(config, states[:-1], seen.corners[:-1], patches)
    values = Values(states[1:], seen.corners[1:], classes)
    images = np.broadcast_to(np.arange(len(pixels)), classes.shape)
    flat = Values(*(array.reshape(-1, *array.shape[2:]) for array in values))
    width = keys.shape[-1]
    table = Table(config, keys.reshape(-1, width), flat, images.reshape(-1))
    return table, classes[-1]


@functools.lru_cache(maxsize=4)
def _episode(config):
    return jax.jit(functools.partial(network.episode, config))


@functools.lru_cache(maxsize=4)
def _glimpse(config):
    return jax.jit(functools.partial(network.glimpse, config))


def key_bits(
    config: network.NetworkConfig,
    states: Int[np.ndarray, "*B S"],
    corners: Int[np.ndarray, "*B 2"],
    patches: Int[np.ndarray, "*B P"],
) -> Float[np.ndarray, "*B W"]:
    """Return phi, h and l in bits; see `widths`."""
    levels = (config.patch_levels, config.state_levels, digits.SIDE)
    parts = [
        np.asarray(values)[..., None] > np.arange(highest)
        for values, highest in zip((patches, states, corners), levels, strict=True)
    ]
    flat = [part.reshape(*part.shape[:-2], -1) for part in parts]
    return np.concatenate(flat, axis=-1).astype(np.float32)


def widths(config: network.NetworkConfig) -> tuple[int, int, int]:
    """Return how many bits phi, h and l have in a key."""
    patches = config.patch_values * config.patch_levels
    return patches, config.state_size * config.state_levels, 2 * digits.SIDE


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The nearest row, the first of those; a hit is a row at distance 0.

    images: [B], whose rows are passed over, an image for each key; to tune weights with.
    """

    table: Table
    weights: Weights = EQUAL
    images: Int[np.ndarray, " B"] | None = None

    @functools.cached_property
    def _own_rows(self):
        """(key, row) of every row of the image that the key is of."""
        return np.nonzero(np.asarray(self.images)[:, None] == self.table.images)

    def __call__(self, keys: Float[np.ndarray, "B W"]) -> tuple[Values, float]:
        """Return the values of the nearest rows."""
        # |x - y| = x + y - 2 x y for bits: the part that differs between rows.
        weights = np.repeat(self.weights, widths(self.table.config)).astype(np.float32)
        rows = self.table.keys
        distance = (-2 * keys * weights) @ rows.T
        distance += rows @ weights
        if self.images is not None:
            distance[self._own_rows] = np.inf
        nearest = np.argmin(distance, axis=1)
        values = Values(*(array[nearest] for array in self.table.values))
        return values, float(np.mean(np.all(rows[nearest] == keys, axis=1)))


class Hashed:
    """The mean of what K tables hold at the codes of a key; a hit is a bucket with a row."""

    def __init__(
        self,
        table: Table,
        code_bits: int,
        num_tables: int,
        weights: Weights = EQUAL,
        seed: int = 0,
    ):
        self.config, self.code_bits = table.config, code_bits
        rng = np.random.default_rng([seed, 7])
        parts = widths(table.config)
        chances = np.repeat(weights, parts) / np.dot(weights, parts)
        draws = [
            rng.choice(len(chances), code_bits, replace=False, p=chances)
            for _ in range(num_tables)
        ]
        self.order = np.concatenate(draws)  # [K tau]
        codes = self.codes(table.keys)  # [R, K]
        classes = np.eye(digits.NUM_CLASSES)[table.values.classes]
        columns = [table.values.states, table.values.corners, classes]
        values = np.concatenate([*columns, np.ones((len(codes), 1))], axis=1)
        shape = (num_tables, 1 << code_bits, values.shape[1])
        sums = np.zeros(shape, np.float32)  # [K, C, F], the last column counts rows
        for k in range(num_tables):
            np.add.at(sums[k], codes[:, k], values)
        self.tables = sums / np.maximum(sums[..., -1:], 1)
        self.mean = values.mean(axis=0)

    def codes(self, keys: Float[np.ndarray, "B W"]) -> Int[np.ndarray, "B K"]:
        """Return the codes of keys; the signs of a bit are those of 1/2 and -1/2."""
        chunks = hashing.split_chunks(
            jnp.asarray(keys[:, self.order]) - 0.5, self.code_bits
        )
        return np.asarray(hashing.hash_codes(chunks))

    def __call__(self, keys: Float[np.ndarray, "B W"]) -> tuple[Values, float]:
        """Return means, rounded to what a step can be; the mean of all rows without a hit."""
        codes = self.codes(keys)
        ones = jnp.ones(codes.shape, jnp.float32)
        read = np.asarray(lookup.lookup(self.tables, jnp.asarray(codes), ones))
        hits = read[:, -1:]  # the last column of a bucket is 1, or 0 where it is empty
        means = np.where(hits > 0, read / np.maximum(hits, 1), self.mean)
        size = self.config.state_size
        # Ties go up: 1/2 is a set bit, as 0 is for `hash_codes`.
        whole = np.floor(means[:, : size + 2] + 0.5).astype(np.int32)
        classes = np.argmax(means[:, size + 2 : -1], axis=1)
        values = Values(whole[:, :size], whole[:, size:], classes)
        return values, float(np.mean(hits) / codes.shape[1])


def follow(
    config: network.NetworkConfig, reader: Reader, pixels: Pixels, first: Corners
) -> tuple[Int[np.ndarray, " B"], float]:
    """Return the classes that a table answers for images, and the share of hits.

    h = 0 and l = first; then T times: glimpse at l, find a row, go where it leads.
    """
    states = np.zeros((len(pixels), config.state_size), np.int32)
    values, hits = Values(states, np.asarray(first), states[:, 0]), []
    for _ in range(config.num_glimpses):
        phi = np.asarray(_glimpse(config)(pixels, values.corners))
        patches = np.rint(phi * config.patch_levels).astype(np.int32)
        values, share = reader(key_bits(config, values.states, values.corners, patches))
        hits.append(share)
    return values.classes, float(np.mean(hits))


def tune(
    table: Table,
    pixels: Pixels,
    labels: Int[np.ndarray, " B"],
    first: Corners,
    draws: int,
    seed: int = 0,
) -> Weights:
    """Return the best of some weights of the nearest row, on the table's own images.

    Equal ones are tried, and `draws` between 1 and 100, evenly in their logarithm. Rows of the
    image that is looked at are passed over. The published search is Bayesian, in these bounds.
    """
    rng = np.random.default_rng([seed, 8])
    tried = [
        EQUAL,
        *(tuple((10 ** rng.uniform(0, 2, 3)).tolist()) for _ in range(draws)),
    ]
    images = np.arange(len(pixels))

    def accuracy(weights):
        reader = Nearest(table, weights, images)
        classes, _ = follow(table.config, reader, pixels, first)
        return np.mean(classes == labels)

    return max(tried, key=accuracy)
