"""Tokens that Megatron-LM or GPT-NeoX has made, read where they lie: `data.source='megatron'`.

    data.path='PREFIX'                     PREFIX.bin and PREFIX.idx
    data.path='PREFIX1,PREFIX2'            one behind the other
    data.path='0.7:PREFIX1,0.3:PREFIX2'    so many of ten windows from each

An end-of-document token begins a segment, as in data of our own. A stream begins with one more
of them, which no file holds: then exported data read again is the very stream it was. Held
out are the last documents of each prefix, one in about `validation_every`, or all of
`validation_path`. Start at `load`.
"""

import dataclasses
import fractions
import hashlib
import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from memoryformer import errors
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import megatron_index, options, streams, token_files
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.data.batches import Split
from memoryformer.data.names import shown
from memoryformer.files import paths

SAMPLED = 1 << 22  # tokens of a split that are looked at; all of a smaller one
_BLOCK = 1 << 12  # of them in a row


@dataclasses.dataclass(frozen=True)
class MegatronFacts(manifest_lib.SplitFacts):
    """Facts of tokens that were not all read: `sampled_tokens` were.

    ends_of_document: counted there, in proportion.  bytes, token_bytes: 0, not known.
    weights: how often a window is drawn from each prefix; empty: all lie in one row.
    """

    sampled_tokens: int = 0
    weights: tuple[int, ...] = ()


def parse_path(path: str, field: str = "data.path") -> list[tuple[int, pathlib.Path]]:
    """[(weight, prefix)] with whole weights, all 0 where none are written.

    Raises `ConfigError` for a weight that is no positive number, or some without.
    """
    found: list[tuple[fractions.Fraction | None, pathlib.Path]] = []
    for item in path.split(","):
        weight, colon, prefix = item.strip().partition(":")
        if not colon or "/" in weight:  # a path may hold a colon too
            weight, prefix = "", item.strip()
        found.append((_weight(weight, path, field), paths.local(prefix, field)))
    weights = [weight for weight, _ in found if weight is not None]
    if not weights:
        return [(0, prefix) for _, prefix in found]
    if len(weights) < len(found):
        raise errors.ConfigError(
            f"{field}={path!r}: give every prefix a weight, or none."
        )
    unit = 1
    for known in weights:
        unit = math.lcm(unit, known.denominator)
    whole = [int(known * unit) for known in weights]
    divisor = math.gcd(*whole)
    prefixes = [prefix for _, prefix in found]
    return [(w // divisor, p) for w, p in zip(whole, prefixes, strict=True)]


def _weight(text: str, path: str, field: str) -> fractions.Fraction | None:
    if not text:
        return None
    try:
        # A number of that many digits would make periods that no counter holds.
        weight = fractions.Fraction(text).limit_denominator(10**6)
    except (ValueError, ZeroDivisionError):
        weight = fractions.Fraction(0)
    if not 0 < weight <= 10**6:
        raise errors.ConfigError(
            f"{field}={path!r}: the weight {text!r} is no number from 0.000001 to 1000000; "
            "write 0.7:PREFIX1,0.3:PREFIX2."
        )
    return weight


def load(
    data_config: options.DataConfig, verify: bool = False
) -> tuple[manifest_lib.Manifest, tokenizer_lib.Tokenizer, dict[str, Split]]:
    """What these files hold, the tokenizer, and {'train', 'validation'}.

    With `verify` every token is looked at, which reads the files. Raises `DataError` or `ConfigError` for files that cannot be read, do not fit one
    another, or hold ids that the tokenizer does not have.
    """
    if tokenizer_lib.bpe_size(data_config.tokenizer):
        raise errors.ConfigError(
            f"data.tokenizer={data_config.tokenizer!r}: is trained on text, and "
            "data.source='megatron' has tokens; name the tokenizer.json that made them."
        )
    tokenizer = tokenizer_lib.load(data_config.tokenizer, data_config.end_token)
    train, validation = _members(data_config)
    splits = {
        "validation": _joined("validation", validation, tokenizer, data_config),
        "train": _joined("train", train, tokenizer, data_config),
    }
    for split in splits.values() if verify else ():
        for start in range(0, len(split.tokens), SAMPLED):
            block = np.asarray(split.tokens[start : start + SAMPLED])
            token_files.check_ids(block, tokenizer.vocab_size, f"{split.path}.bin")
    if not splits["train"].facts.ends_of_document:
        print(
            f"note: no {tokenizer.end_token} among the tokens that were looked at: every "
            "row is one segment; data.end_token names another.",
            file=sys.stderr,
            flush=True,
        )
    manifest = manifest_lib.Manifest(
        manifest_lib.describe(data_config),
        manifest_lib.facts_of(tokenizer),
        token_files.dtype_for(tokenizer.vocab_size),
        {name: split.facts for name, split in splits.items()},
    )
    return manifest, tokenizer, splits


@dataclasses.dataclass(frozen=True)
class _Documents:
    """Documents `first..stop` of a pair, and how often windows are drawn from them."""

    weight: int
    pair: megatron_index.Pair
    first: int
    stop: int

    def pieces(self) -> list[streams.Piece]:
        pair = self.pair
        return pair.pieces(pair.start_of(self.first), pair.start_of(self.stop))


def _members(
    data_config: options.DataConfig,
) -> tuple[list[_Documents], list[_Documents]]:
    """What to train on and what is held out."""
    train, validation = [], []
    settings = data_config.source_options
    for weight, prefix in parse_path(data_config.path):
        pair = megatron_index.open_pair(prefix)
        count = pair.num_documents
        cut = count
        if not settings.validation_path:
            cut -= max(1, count // settings.validation_every)
            if cut < 1:
                raise errors.DataError(
                    f"{shown(prefix)}.idx: {count} documents cannot be split into train "
                    "and validation; set data.source_options.validation_path."
                )
            validation.append(_Documents(0, pair, cut, count))
        train.append(_Documents(weight, pair, 0, cut))
    if settings.validation_path:
        field = "data.source_options.validation_path"
        for weight, prefix in parse_path(settings.validation_path, field):
            if weight:
                raise errors.ConfigError(
                    f"{field}={settings.validation_path!r}: every held-out token counts "
                    "once; leave the weights out."
                )
            pair = megatron_index.open_pair(prefix)
            validation.append(_Documents(0, pair, 0, pair.num_documents))
    return train, validation


def _joined(
    name: str,
    members: Sequence[_Documents],
    tokenizer: tokenizer_lib.Tokenizer,
    data_config: options.DataConfig,
) -> Split:
    """One stream of these documents; with weights, rows are drawn from each by its own."""

    def split(some: Sequence[_Documents], mixture: tuple = ()) -> Split:
        pieces = _between_ends(some, tokenizer.eot_id)
        facts = _facts(name, some, pieces, tokenizer)
        if mixture:
            weights = tuple(weight for weight, _ in mixture)
            facts = dataclasses.replace(
                facts, weights=weights, sha256=_sha256(f"{facts.sha256} {weights}")
            )
        return Split(
            name=name,
            path=some[0].pair.prefix,
            facts=facts,
            dtype=some[0].pair.dtype,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            align=data_config.align_documents,
            pieces=tuple(pieces),
            mixture=mixture,
        )

    if len(members) == 1 or not members[0].weight:
        return split(members)
    mixture = tuple((member.weight, split([member])) for member in members)
    return split(members, mixture)


def _between_ends(members: Sequence[_Documents], eot_id: int) -> list[streams.Piece]:
    """The pieces of all members, with an end before, between and behind them."""
    pieces = [streams.end(eot_id)]
    for member in members:
        own = member.pieces()
        pieces += own
        if own and int(own[-1].tokens()[-1]) != eot_id:
            pieces.append(streams.end(eot_id))
    return pieces


def _facts(
    name: str,
    members: Sequence[_Documents],
    pieces: Sequence[streams.Piece],
    tokenizer: tokenizer_lib.Tokenizer,
) -> MegatronFacts:
    """Counts of the index, and what a sample says of the tokens.

    The sha256 covers the whole index and the sample, whatever integers hold them.
    """
    digest, sampled, ends = hashlib.sha256(), 0, 0
    for member in members:
        for part in member.pair.bounds(member.first, member.stop):
            digest.update(part.tobytes())
        own = member.pieces()
        tokens = streams.Stream(own) if own else np.zeros(0, np.int32)
        where = shown(f"{member.pair.prefix}.bin")
        for start in sample_starts(len(tokens)):
            block = np.asarray(tokens[start : start + _BLOCK], "<i8")
            token_files.check_ids(block, tokenizer.vocab_size, where)
            digest.update(block.tobytes())
            sampled += len(block)
            ends += int((block == tokenizer.eot_id).sum())
    total = sum(piece.count for piece in pieces)
    if not sampled:
        raise errors.DataError(f"{shown(members[0].pair.prefix)}.bin: holds no tokens.")
    stored = sum(piece.count for piece in pieces if piece.path)
    return MegatronFacts(
        file="",
        documents=sum(member.stop - member.first for member in members),
        tokens=total,
        ends_of_document=round(ends * (stored / sampled)),
        bytes=0,
        token_bytes=0,
        empty_dropped=0,
        duplicates_of_validation_dropped=0,
        sha256=digest.hexdigest(),
        sampled_tokens=sampled,
    )


def sample_starts(num_tokens: int) -> Sequence[int]:
    """Where the blocks begin that are looked at, spread evenly; all of a small file."""
    blocks, most = -(-num_tokens // _BLOCK), SAMPLED // _BLOCK
    if blocks <= most:
        return range(0, num_tokens, _BLOCK)
    return [i * (blocks - 1) // (most - 1) * _BLOCK for i in range(most)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
