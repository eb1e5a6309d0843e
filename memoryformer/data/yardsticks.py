"""What compressors and n-gram models make of the same validation bytes, in bits per byte.

    zlib_6, bz2_9, xz_6   see the validation text only
    xz_6_after_train      xz(train + validation) - xz(train), 64 MB dictionary: it has
                          seen what a model has seen, verbatim repeats included
    ngram_1 .. ngram_7    byte n-grams with interpolated Witten-Bell backoff, counted on
                          train:  P_n(c|h) = (count(hc) + T(h) P_{n-1}(c|h'))
                                             / (count(h) + T(h)),
                          T(h) distinct successors of h, h' = h without its oldest byte,
                          P_0 = 1/256; an unseen h leaves P_{n-1}.  Witten & Bell 1991.

Documents are joined without separators. Start at `measure`.
"""

import bz2
import concurrent.futures
import contextlib
import json
import lzma
import pathlib
import zlib

import numpy as np

from memoryformer import data, errors
from memoryformer.files import atomic

VERSION = 1
MAX_ORDER = 7  # seven bytes fit one uint64 with a byte to spare
TRAIN_LIMIT = 32 << 20  # bytes of train and of validation that are looked at
VALIDATION_LIMIT = 16 << 20
CHUNK_TOKENS = 1 << 20  # decoded at a time


def measure(dataset: data.Dataset, cache: bool = True) -> dict[str, float]:
    """Bits per byte of every yardstick on `dataset.validation`, and the bytes used.

    The result is kept beside the manifest in yardsticks.json (`cache`), for it never
    changes, unless nothing can be written there. About 20 s for 12 MB of text on two cores.
    """
    path = dataset.directory / "yardsticks.json"
    key = {"version": VERSION, "fingerprint": dataset.fingerprint}
    if cache and (stored := _stored(path, key)):
        return stored
    result = compute(
        _split_bytes(dataset.train, dataset.tokenizer, TRAIN_LIMIT),
        _split_bytes(dataset.validation, dataset.tokenizer, VALIDATION_LIMIT),
    )
    if cache:
        _write(path, {"key": key, "bits_per_byte": result})
    return result


def compute(train: bytes, validation: bytes) -> dict[str, float]:
    """The yardsticks of one pair of texts; raises `DataError` if there is nothing to measure."""
    if not validation:
        raise errors.DataError(
            "validation: holds no bytes of text; nothing to measure."
        )
    scale = 8 / len(validation)
    # Compressors release the interpreter's lock, so they run beside the n-grams.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sizes = {
            "zlib_6": pool.submit(_size, zlib.compress, validation, 6),
            "bz2_9": pool.submit(_size, bz2.compress, validation, 9),
            "xz_6": pool.submit(_size, lzma.compress, validation, preset=6),
        }
        both = pool.submit(_long_xz, train + validation)
        alone = pool.submit(_long_xz, train)
        grams = ngram_bits(train, validation)
        result = {name: size.result() * scale for name, size in sizes.items()}
        result["xz_6_after_train"] = (both.result() - alone.result()) * scale
    result |= {f"ngram_{n}": bits for n, bits in enumerate(grams, start=1)}
    result["train_bytes"], result["validation_bytes"] = len(train), len(validation)
    return result


def ngram_bits(
    train: bytes, validation: bytes, max_order: int = MAX_ORDER
) -> list[float]:
    """Bits per byte of byte n-gram models of orders 1..max_order.

    Counts are of the windows of `max_order` bytes that fit in train and of their
    prefixes: the sorted windows of the longest order are sorted for every shorter one.
    """
    windows = _packed(np.frombuffer(train, np.uint8), max_order)
    if not len(windows):  # nothing was counted: every P_n is P_0
        return [8.0] * max_order
    windows.sort()
    text = np.frombuffer(validation, np.uint8)
    probability = np.full(len(text), 1 / 256)
    bits = []
    for order in range(1, max_order + 1):
        grams, counts = _runs(windows >> np.uint64(8 * (max_order - order)))
        contexts, kinds, first = _runs(grams >> np.uint64(8), return_first=True)
        totals = np.add.reduceat(counts, first)
        query = _packed(text, order)  # the n-grams that end at order-1, order, ..
        at, known = _find(contexts, query >> np.uint64(8))
        gram_at, gram_known = _find(grams, query)
        count = np.where(gram_known, counts[gram_at], 0)
        shorter = probability[order - 1 :]
        mixed = (count + kinds[at] * shorter) / (totals[at] + kinds[at])
        probability[order - 1 :] = np.where(known, mixed, shorter)
        bits.append(float(-np.log2(probability).mean()))
    return bits


def table(result: dict[str, float]) -> str:
    """The result as lines of text."""
    sizes = {k: v for k, v in result.items() if k.endswith("_bytes")}
    rows = [f"  {k:18s} {v:6.3f}" for k, v in result.items() if k not in sizes]
    title = (
        f"bits per byte of {sizes['validation_bytes']:,} validation bytes "
        f"({sizes['train_bytes']:,} train bytes seen)"
    )
    return "\n".join([title, *rows])


def _packed(text: np.ndarray, order: int) -> np.ndarray:
    """Windows of `order` bytes as uint64, the oldest byte the most significant."""
    count = max(len(text) - order + 1, 0)
    packed = np.zeros(count, np.uint64)
    for offset in range(order):
        packed <<= np.uint64(8)
        packed |= text[offset : offset + count]
    return packed


def _runs(ordered: np.ndarray, return_first: bool = False) -> tuple[np.ndarray, ...]:
    """Distinct values of a sorted array, how often each occurs (and where it begins)."""
    change = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    first = np.concatenate([[0], change])
    lengths = np.diff(np.append(first, len(ordered)))
    values = ordered[first]
    return (values, lengths, first) if return_first else (values, lengths)


def _find(ordered: np.ndarray, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(ordered, query), len(ordered) - 1)
    return at, ordered[at] == query


def _size(compress, *args, **kwargs) -> int:
    return len(compress(*args, **kwargs))


def _long_xz(text: bytes) -> int:
    wide = {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 << 20}
    return len(lzma.compress(text, filters=[wide]))


def _split_bytes(split: data.Split, tokenizer: data.Tokenizer, limit: int) -> bytes:
    """The first `limit` bytes of a split's documents, joined."""
    parts, size = [], 0
    begins = True  # whether the chunk begins a document
    for start in range(0, len(split.tokens), CHUNK_TOKENS):
        chunk = split.tokens[start : start + CHUNK_TOKENS].tolist()
        parts.append(tokenizer.decode_bytes(chunk, begins))
        begins = chunk[-1] == tokenizer.eot_id
        size += len(parts[-1])
        if size >= limit:
            break
    return b"".join(parts)[:limit]


def _stored(path: pathlib.Path, key: dict) -> dict[str, float]:
    """The result that was kept for this key; empty for none, or a damaged file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return dict(stored["bits_per_byte"]) if stored["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write(path: pathlib.Path, content: dict) -> None:
    # A read-only copy of prepared data is worth measuring too.
    with contextlib.suppress(errors.StorageError):
        atomic.write_json(path, content, indent=2)
