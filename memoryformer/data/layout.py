"""Where the tokens of a stream stand in the rows: as they lie, or documents aligned.

    place 0 1 2 3 4 5 6 7 ..        align = 4, documents a (5 tokens) and b
    token a a a a a _ _ _ b ..      _ is padding

Place p of the rows holds stream token `index` if `real`. With align > 1 every document begins
at a multiple of it, which a memory carried over chunks needs (`memoryformer.model.recurrence`).
"""

import dataclasses

import numpy as np

from memoryformer.data import streams

SCAN = 1 << 24  # tokens looked at together


@dataclasses.dataclass(frozen=True)
class Layout:
    """Documents [N]: first token in the stream, length, and place of the first token."""

    starts: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    num_places: int

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (index into the stream, whether it is a token and not padding)."""
        document = np.searchsorted(self.places, places, side="right") - 1
        offset = places - self.places[document]
        length = self.lengths[document]
        index = self.starts[document] + np.minimum(offset, length - 1)
        return index, offset < length


def make(tokens: np.ndarray | streams.Stream, eot_id: int, align: int) -> Layout:
    """Lay out every token that has a next one; aligning reads the whole stream once."""
    num_targets = len(tokens) - 1
    starts = np.zeros(1, np.int64)
    if align > 1:
        ends = [
            first + np.flatnonzero(tokens[first : first + SCAN] == eot_id)
            for first in range(0, num_targets, SCAN)
        ]
        starts = np.unique(np.concatenate([starts, *ends]))
        starts = starts[starts < num_targets]
    lengths = np.diff(starts, append=num_targets)
    align = max(align, 1)
    padded = -(-lengths // align) * align
    places = np.cumsum(padded) - padded
    return Layout(starts, lengths, places, int(padded.sum()))
