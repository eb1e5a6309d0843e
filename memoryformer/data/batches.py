"""Batches as a pure function of (token file, seed, step).

A window is `seq_len` consecutive inputs and the same shifted by one as targets:
window i = stream[i*L : i*L + L] -> stream[i*L + 1 : i*L + L + 1]. Documents are packed
as they lie, [eot, t1, .., tn] each: a segment begins AT an eot token and its positions
count from 0; a window that starts inside a document starts its first segment there, at
position 0. No target is masked: the target of tn is the next eot, predicted in its own
document, and the target of an eot is the t1 that follows it. Only padding (evaluation's
last windows, and what aligns documents) has segment id 0 and weight 0.

A batch is a dict of numpy arrays, all [B, L]: inputs, targets, positions, segment_ids
int32, weights float32. Bits per byte = nats / ln 2 / sum of token_bytes[targets].

There is no iterator and no state: step n of any run, process or host is the same batch.
Start at `Split`.
"""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Sequence

import numpy as np

from memoryformer import errors
from memoryformer.data import layout as layout_lib
from memoryformer.data import streams, token_files
from memoryformer.data.manifest import SplitFacts

Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
    """One memory-mapped token file.

    name: 'train' or 'validation'.  facts: its counts in the manifest.  align: documents
    begin at multiples of it in every row, behind padding; 0 and 1 leave them as they lie.
    pieces: where the stream is that of several files.  mixture: (weight, split) of those that
    training windows are drawn from, so many of each; empty: from the whole stream.
    """

    name: str
    path: pathlib.Path
    facts: SplitFacts
    dtype: str
    vocab_size: int
    eot_id: int
    align: int = 0
    pieces: tuple[streams.Piece, ...] = ()
    mixture: tuple[tuple[int, "Split"], ...] = ()

    @functools.cached_property
    def layout(self) -> layout_lib.Layout:
        """Where each token stands in the rows."""
        return layout_lib.make(self.tokens, self.eot_id, self.align)

    @functools.cached_property
    def tokens(self) -> np.ndarray | streams.Stream:
        """The whole stream, read-only, mapped from disk."""
        if self.pieces:
            return streams.Stream(self.pieces)
        return token_files.read(self.path, self.dtype)

    def batches(self, seq_len: int, batch_size: int, seed: int) -> "Batches":
        """Shuffled training batches without end; each epoch in another order.

        The up to seq_len tokens after the last whole window are left out. Raises
        `DataError` if there is no whole window.
        """
        return Batches(self, seq_len, batch_size, seed)

    def eval_batches(self, seq_len: int, batch_size: int) -> "EvalBatches":
        """Every token of the split once, in order; the end is padded."""
        return EvalBatches(self, seq_len, batch_size)


class Windows:
    """Random access to whole rows of a split: inputs, targets, real, int32 [3, L]."""

    def __init__(self, split: Split, seq_len: int):
        self._split = split
        self._seq_len = _row_length(split, seq_len)

    def __len__(self) -> int:
        return self._split.layout.num_places // self._seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(index) * self._seq_len
        return np.stack(_read(self._split, start + np.arange(self._seq_len)))

    def __repr__(self) -> str:
        # Grain prints sources in errors; an address would differ from run to run.
        sha256 = self._split.facts.sha256[:16]
        return f"Windows({self._split.name} {sha256}, seq_len={self._seq_len})"


class Batches:
    """`batch(step)` of a training split. Make it with `Split.batches`."""

    def __init__(self, split: Split, seq_len: int, batch_size: int, seed: int):
        import grain  # with jax: what only prepares data does without

        self.batch_size = _positive(batch_size, "batch_size")
        self.windows_per_epoch = 0
        self._split = split
        self._weights, self._members = [], []
        for weight, member in split.mixture or ((1, split),):
            windows = _windows(member, seq_len)
            self.windows_per_epoch += len(windows)
            self._weights.append(weight)
            # Shuffle before repeat: every epoch holds each window once, in a new order.
            source = grain.MapDataset.source(windows).seed(seed)
            self._members.append(source.shuffle().repeat(None))

    def batch(self, step: int, rows: Rows = slice(None)) -> Batch:
        """The rows `rows` (a host's share) of the global batch of this step."""
        if operator.index(step) < 0:
            raise IndexError(f"step {step}: the first is 0")
        first = int(step) * self.batch_size
        indices = first + np.arange(self.batch_size)[rows]
        drawn = [mixed(int(index), self._weights) for index in indices]
        windows = np.stack([self._members[member][number] for member, number in drawn])
        token_files.check_ids(
            windows, self._split.vocab_size, f"{self._split.path} at step {step}"
        )
        inputs, targets, real = np.moveaxis(windows, 1, 0)
        return _batch(inputs, targets, real, self._split.eot_id)


class EvalBatches:
    """A sequence of batches in stream order. Make it with `Split.eval_batches`."""

    def __init__(self, split: Split, seq_len: int, batch_size: int):
        self._split = split
        self.seq_len = _row_length(split, seq_len)
        self.batch_size = _positive(batch_size, "batch_size")
        self.num_targets = len(split.tokens) - 1

    def __len__(self) -> int:
        return -(-self._split.layout.num_places // (self.seq_len * self.batch_size))

    def __getitem__(self, index: int) -> Batch:
        return self.batch(index)

    def batch(self, index: int, rows: Rows = slice(None)) -> Batch:
        """The rows `rows` of batch `index`; every host sees the same number of batches."""
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        row = int(index) * self.batch_size + np.arange(self.batch_size)[rows]
        places = row[:, None] * self.seq_len + np.arange(self.seq_len)  # [B, L]
        inputs, targets, real = _read(self._split, places)
        where = f"{self._split.path} in batch {index}"
        token_files.check_ids(inputs, self._split.vocab_size, where)
        token_files.check_ids(targets, self._split.vocab_size, where)
        return _batch(inputs, targets, real, self._split.eot_id)


def mixed(index: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which member window `index` is of, and its number there.

    Of the first n windows, the first member has n - floor(n (S - w) / S), with w its weight
    and S the sum of all; the others share what is left in the same way. So each member has
    its share up to a few windows at any n, and its windows in order.
    """
    total = sum(weights)
    for member, weight in enumerate(weights[:-1]):
        others, others_then = (
            n * (total - weight) // total for n in (index, index + 1)
        )
        if others == others_then:
            return member, index - others
        index, total = others, total - weight
    return len(weights) - 1, index


def _windows(split: Split, seq_len: int) -> Windows:
    windows = Windows(split, seq_len)
    if not len(windows):
        raise errors.DataError(
            f"data: {split.name} has {len(split.tokens)} tokens, too few for one "
            f"window of seq_len + 1 = {seq_len + 1}; give more text or a smaller "
            "model.seq_len."
        )
    return windows


def _read(split: Split, places: np.ndarray) -> tuple[np.ndarray, ...]:
    """Inputs, targets and 1 for real, int32, at these places; padding is eot and 0."""
    at, real = split.layout.at(places)
    real &= places < split.layout.num_places
    inputs = np.where(real, split.tokens[at].astype(np.int32), split.eot_id)
    targets = np.where(real, split.tokens[at + 1].astype(np.int32), split.eot_id)
    return inputs, targets, real.astype(np.int32)


def _batch(
    inputs: np.ndarray, targets: np.ndarray, real: np.ndarray, eot_id: int
) -> Batch:
    real = real != 0
    starts = inputs == eot_id  # [B, L]
    segment_ids = np.cumsum(starts, axis=1) + ~starts[:, :1]
    column = np.arange(inputs.shape[1])
    last_start = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return {
        "inputs": np.ascontiguousarray(inputs),
        "targets": np.ascontiguousarray(targets),
        "positions": np.where(real, column - last_start, 0).astype(np.int32),
        "segment_ids": np.where(real, segment_ids, 0).astype(np.int32),
        "weights": real.astype(np.float32),
    }


def _row_length(split: Split, seq_len: int) -> int:
    if split.align > 1 and seq_len % split.align:
        raise errors.ConfigError(
            f"data.align_documents={split.align} does not divide model.seq_len={seq_len}: "
            "choose a divisor."
        )
    return _positive(seq_len, "seq_len")


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise errors.ConfigError(f"{name}={value}: must be at least 1.")
    return int(value)
