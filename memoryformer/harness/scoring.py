"""Log-likelihoods of many token sequences: few compiled shapes, no wasted head.

A window is a sequence of which the last tokens are predicted from those before. Windows are
padded to one of at most six lengths, and go through the model in groups of a fixed number of
tokens, one group after another inside one program; the head reads only the positions that
are asked for, in pieces of a fixed size. So what a window gives depends on nothing but the
window: not on the batch size, nor on its neighbours. Rows are split over local devices.

Start at `Scorer.score`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from memoryformer import model as model_lib
from memoryformer import sharding as sharding_lib
from memoryformer.errors import ConfigError, DataError
from memoryformer.model import implementations, losses, mixers
from memoryformer.notation import Params
from memoryformer.ops import collectives

SHORT_LENGTHS = (32, 64, 128, 256, 512)  # and the model's longest: six shapes at most
# Tokens of one group. Large enough to keep a device busy, small enough for activations.
GROUP_TOKENS = {"cpu": 512, "gpu": 16_384, "tpu": 16_384}
GROUPS_PER_HEAD_PIECE = 8


class Window(NamedTuple):
    """Predict the last `num_scored` of `tokens` from those before them."""

    tokens: Sequence[int]
    num_scored: int


class Score(NamedTuple):
    """Per scored token: its log-probability, and whether no token is likelier."""

    logprobs: np.ndarray  # float32 [num_scored]
    greedy: np.ndarray  # bool [num_scored]


class _Plan(NamedTuple):
    """Sizes of the program for one length L."""

    length: int  # L
    rows: int  # R, of one device and call
    group: int  # m rows go through the model at once
    piece: int  # S positions go through the head at once

    @property
    def positions(self) -> int:
        """Most positions of a group, a multiple of the piece."""
        return -(-self.group * self.length // self.piece) * self.piece


class Scorer:
    """Scores windows with one model on this process's devices.

    `batch_size` is the least number of rows that are sent to the devices at once; it has no
    effect on what comes out.
    """

    def __init__(
        self,
        model_config: model_lib.ModelConfig,
        params: Params,
        *,
        batch_size: int = 64,
        devices: Sequence[jax.Device] | None = None,
    ):
        if not model_config.causal:
            raise ConfigError("model.causal=False: an encoder predicts no next token.")
        devices = list(devices or jax.local_devices())
        self.model_config = implementations.readable(model_config)
        self.batch_size = batch_size
        self.sharding = sharding_lib.make("data", devices)
        self.lengths = lengths(model_config.seq_len)
        self.shapes: set[int] = set()  # lengths that have been compiled
        self._group_tokens = GROUP_TOKENS.get(devices[0].platform, 16_384)
        specs = jax.tree.map(lambda _: P(), params)
        self._params = self.sharding.put(params, specs)
        self._call = self._compile(specs)

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Score every window; raises `DataError` for one that is too long."""
        scores: dict[int, Score] = {}
        by_length: dict[int, list[int]] = {}
        for index, window in enumerate(windows):
            by_length.setdefault(self._length_of(window), []).append(index)
        pending: list[tuple] = []  # one batch is computed while the next is prepared
        for length in sorted(by_length):
            plan = self._plan(length)
            indices = by_length[length]
            step = plan.rows * self.sharding.num_devices
            for start in range(0, len(indices), step):
                batch = indices[start : start + step]
                arrays, places = self._pack(plan, [windows[i] for i in batch])
                self.shapes.add(length)
                result = self._run(plan, arrays)
                _collect(scores, pending)
                pending = [(batch, places, result)]
        _collect(scores, pending)
        return [scores[index] for index in range(len(windows))]

    def _length_of(self, window: Window) -> int:
        size = len(window.tokens) - 1
        if not 0 <= window.num_scored <= size or size > self.lengths[-1]:
            raise DataError(
                f"a window of {len(window.tokens)} tokens, {window.num_scored} of them "
                f"scored: needs at least one before those, and {self.lengths[-1]} at most."
            )
        return next(length for length in self.lengths if size <= length)

    def _plan(self, length: int) -> _Plan:
        group = max(1, self._group_tokens // length)
        per_device = -(-self.batch_size // self.sharding.num_devices)
        rows = -(-per_device // group) * group
        piece = max(1, self._group_tokens // GROUPS_PER_HEAD_PIECE)
        return _Plan(length, rows, group, min(piece, group * length))

    def _pack(self, plan: _Plan, windows: Sequence[Window]):
        """Lay windows out: the program's arrays, and each window's (group, slice).

        Windows fill group after group, device after device.
        """
        num_groups = plan.rows // plan.group * self.sharding.num_devices
        tokens = np.zeros((num_groups, plan.group, plan.length), np.int32)
        sizes = np.zeros((num_groups, plan.group), np.int32)
        index = np.zeros((num_groups, plan.positions), np.int32)
        targets = np.zeros((num_groups, plan.positions), np.int32)
        counts = np.zeros(num_groups, np.int32)
        places = []
        for number, (sequence, num_scored) in enumerate(windows):
            g, row = divmod(number, plan.group)
            size = len(sequence) - 1
            tokens[g, row, :size] = sequence[:-1]
            sizes[g, row] = size
            place = slice(counts[g], counts[g] + num_scored)
            first = row * plan.length + size - num_scored
            index[g, place] = np.arange(first, first + num_scored)
            targets[g, place] = sequence[size + 1 - num_scored :]
            counts[g] += num_scored
            places.append((g, place))
        vocab_size = self.model_config.vocab_size
        if tokens.max() >= vocab_size or targets.max() >= vocab_size:
            raise DataError(
                f"a token id is not below the model's vocabulary of {vocab_size}: is this "
                "the model's tokenizer?"
            )
        return (tokens, sizes, index, targets, counts), places

    def _run(self, plan: _Plan, arrays):
        with self.sharding.activate():
            if self.sharding.mesh is not None:
                where = jax.NamedSharding(self.sharding.mesh, P(collectives.DATA_AXIS))
                arrays = jax.device_put(arrays, where)
            return self._call(self._params, *arrays, plan.piece)

    def _compile(self, specs):
        def call(params, *arrays_and_piece):
            *arrays, piece = arrays_and_piece
            rows = P(collectives.DATA_AXIS) if self.sharding.mesh is not None else P()
            function = self.sharding.shard_map(
                functools.partial(_score, self.model_config, piece),
                (specs, *[rows] * len(arrays)),
                (rows, rows),
            )
            return function(params, *arrays)

        return jax.jit(call, static_argnums=6)


def lengths(seq_len: int) -> tuple[int, ...]:
    """Return the padded lengths of a model, ascending, the last being `seq_len`."""
    return (*(n for n in SHORT_LENGTHS if n < seq_len), seq_len)


def _score(model_config, piece, params, tokens, sizes, index, targets, counts):
    """Score one device's groups: [G, m, L], [G, m], [G, P], [G, P], [G] -> two [G, P]."""
    model = model_lib.merge(model_config, params)
    length = tokens.shape[-1]
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape[1:])

    def at(array, g):
        return jax.lax.dynamic_index_in_dim(array, g, keepdims=False)

    def group(g, out):
        segment_ids = (positions < at(sizes, g)[:, None]).astype(jnp.int32)
        seq = mixers.SeqInfo(positions, segment_ids)
        x, _ = model.features(at(tokens, g), seq)
        x = x.reshape(-1, x.shape[-1])  # [m L, D]

        def head_piece(i, out):
            where = (g, i * piece)
            rows = jax.lax.dynamic_slice(index, where, (1, piece))  # [1, S]
            wanted = jax.lax.dynamic_slice(targets, where, (1, piece))
            logits = model.logits(x[rows])  # [1, S, V]
            results = (
                -losses.token_nats(logits, wanted),
                jnp.argmax(logits, axis=-1) == wanted,
            )
            return tuple(
                jax.lax.dynamic_update_slice(array, result, where)
                for array, result in zip(out, results, strict=True)
            )

        num_pieces = (at(counts, g) + piece - 1) // piece
        return jax.lax.fori_loop(0, num_pieces, head_piece, out)

    out = (jnp.zeros(index.shape, jnp.float32), jnp.zeros(index.shape, bool))
    # Groups fill up in order: behind the last one with something to score is padding.
    num_groups = jnp.max(jnp.where(counts > 0, jnp.arange(len(counts)) + 1, 0))
    return jax.lax.fori_loop(0, num_groups, group, out)


def _collect(scores: dict[int, Score], pending: Iterable[tuple]) -> None:
    for batch, places, result in pending:
        logprobs, greedy = (np.asarray(array) for array in result)
        for index, (g, place) in zip(batch, places, strict=True):
            scores[index] = Score(logprobs[g, place], greedy[g, place])
