"""Local byte classification: which package of the standard library a few bytes are from.

Text that is on every machine, and no download. A row is a window of L bytes at a random place
of a random package; the last quarter of every file is held out. The answer lies in short
patterns, names and habits of a few bytes, so that a view over some tokens should pay.

    python -m memoryformer.tasks texts --config=configs/shared_memory.py:texts --workdir=runs/texts

Start at `batch`.
"""

import functools
import hashlib
import pathlib
import sysconfig

import numpy as np

from memoryformer.errors import DataError
from memoryformer.tasks import base, trunk

PACKAGES = (
    "asyncio",
    "email",
    "encodings",
    "http",
    "importlib",
    "multiprocessing",
    "unittest",
    "xml",
)
HELD_OUT = 4  # one of so many parts of a file, its last


@functools.cache
def text(package: str, split: str) -> np.ndarray:
    """Return the bytes of a package's files in order, those of a split: uint8 [n].

    Raises `DataError` where Python came without the package's sources.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"]) / package
    parts = []
    for file in sorted(folder.rglob("*.py")):
        whole = file.read_bytes()
        border = len(whole) - len(whole) // HELD_OUT
        parts.append(whole[:border] if split == "train" else whole[border:])
    if not parts:
        raise DataError(f"{folder}: no Python files; install Python with its sources.")
    return np.frombuffer(b"".join(parts), np.uint8)


def batch(
    seed: int, step: int, batch_size: int, seq_len: int, split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw (tokens [B, L], labels [B]): a byte b is the token b + 1, 0 is padding."""
    rng = base.rng(seed, step, split)
    labels = rng.integers(len(PACKAGES), size=batch_size, dtype=np.int32)
    tokens = np.zeros((batch_size, seq_len), np.int32)
    for row, label in enumerate(labels):
        source = text(PACKAGES[label], split)
        start = rng.integers(max(len(source) - seq_len, 0) + 1)
        window = source[start : start + seq_len]
        tokens[row, : len(window)] = window + np.int32(1)
    return tokens, labels


class Texts(trunk.Classifier):
    """One of eight packages."""

    num_classes = len(PACKAGES)

    @property
    def vocab_size(self) -> int:
        """Bytes and padding."""
        return 257

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all text: another Python has another."""
        digest = hashlib.sha256()
        for split in base.SPLITS:
            for package in PACKAGES:
                digest.update(text(package, split).tobytes())
        return digest.hexdigest()

    def batch(self, step: int, split: str) -> dict[str, np.ndarray]:
        """See `batch`."""
        options = self.options
        tokens, labels = batch(
            options.seed, step, options.batch_size, self.model.seq_len, split
        )
        segment_ids = (tokens != 0).astype(np.int32)
        return {"inputs": tokens, "segment_ids": segment_ids, "labels": labels}
