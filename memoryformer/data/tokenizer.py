"""Text to token ids and back: bytes, a trained BPE, or any tokenizer.json.

Every tokenizer has one special token, the end-of-document token `eot_id`, which no text
can produce: text that spells `<eot>` or `<|endoftext|>` is encoded as ordinary text.
Each other token stands for a fixed byte string, so decoding is joining bytes, a stream
can be decoded token by token, and bits per byte needs no text.

Start at `load` and `Tokenizer`.
"""

import codecs
import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers

from memoryformer import errors
from memoryformer.data import vocabulary
from memoryformer.files import atomic, hub, paths

BPE_TRAINING_BYTES = 3_000_000  # of text that a vocabulary is trained on
_WORD = 1024
_MAX_BPE = 1 << 20  # room for as many is taken before training begins


class Tokenizer:
    """Byte-level or sentencepiece-style tokenizer over a `tokenizers.Tokenizer`.

    vocab_size: largest id + 1.  eot_id: the end-of-document token, named `end_token`.
    token_bytes: int32 [V], UTF-8 bytes that each token stands for; 0 for special tokens.
    prefix: what it puts before every text, b" " or b"".
    fingerprint: sha256 of the canonical tokenizer.json (and of an end token of its own).
    """

    def __init__(self, text: str, name: str, end_token: str = ""):
        self.name = name
        whole = _backend(text, name)
        vocab = whole.get_vocab(with_added_tokens=True)
        vocabulary.check_ids(vocab, name)  # first: `to_str` goes through all up to them
        self.spec = json.loads(whole.to_str())
        self.end_token = vocabulary.end_of_document(self.spec, vocab, end_token, name)
        self.eot_id = vocab[self.end_token]
        self.pieces = vocabulary.pieces(self.spec, vocab, self.end_token, name)
        self.vocab_size = len(self.pieces)
        self.token_bytes = np.array([len(p) for p in self.pieces], np.int32)
        self._backend = _backend(vocabulary.for_text(self.spec, self.end_token), name)
        spoken = b"".join(map(self.piece, self.encode("a")))
        self.prefix = b" " if spoken.startswith(b" ") else b""
        canonical = json.dumps(self.spec, sort_keys=True)
        if self.end_token != vocabulary.known_end(vocab):
            canonical += self.end_token
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never a special token that `text` spells."""
        with _refused(f"data.tokenizer={self.name!r}: cannot encode text"):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        with _refused(f"data.tokenizer={self.name!r}: cannot encode text"):
            encodings = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=False
            )
        return [encoding.ids for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int], start: bool = True) -> bytes:
        """The bytes of these tokens; nothing for special tokens and unused ids.

        Where a document begins, behind an end token and, with `start`, at the first id,
        the `prefix` that encoding has put there is left out.
        """
        if not self.prefix:
            return b"".join(map(self.piece, map(int, ids)))
        return b"".join(map(TextStream(self, start).bytes_of, map(int, ids)))

    def piece(self, token: int) -> bytes:
        """The bytes of one id; nothing for ids that only pad a model's vocabulary."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of `ids`; a cut-off character shows as U+FFFD. See `decode_bytes`."""
        return self.decode_bytes(ids, start).decode("utf-8", errors="replace")

    def stream(self, start: bool = False) -> "TextStream":
        """A decoder that takes one token at a time, of text that goes on (see `start`)."""
        return TextStream(self, start)

    def save(self, path: pathlib.Path) -> None:
        """Write tokenizer.json; killed halfway, the file before stays."""
        atomic.write_text(path, json.dumps(self.spec, ensure_ascii=False))


class TextStream:
    """Decode token by token, holding back a character until all its bytes are there.

    The pieces of a sequence joined, `finish()` included, equal `decode` of the whole with
    the same `start`: whether the first token begins a document.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool):
        self._tokenizer = tokenizer
        self._start = start  # of a document: nothing of its text was seen
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps ''."""
        return self._decoder.decode(self.bytes_of(int(token)))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that this token adds, whole characters or not."""
        piece = self._tokenizer.piece(token)
        shown = piece.removeprefix(self._tokenizer.prefix) if self._start else piece
        ended = token == self._tokenizer.eot_id
        self._start = ended or (self._start and not piece)
        return shown

    def finish(self) -> str:
        """What was held back."""
        return self._decoder.decode(b"", final=True)


def byte_level() -> Tokenizer:
    """Ids 0..255 are the bytes, 256 is the end-of-document token."""
    to_char = vocabulary.byte_chars()
    model = tokenizers.models.BPE(
        vocab={to_char[byte]: byte for byte in range(256)}, merges=[]
    )
    backend = tokenizers.Tokenizer(model)
    # use_regex=False: without merges, splitting into words first changes nothing.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([vocabulary.EOT])
    return Tokenizer(backend.to_str(), "bytes")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` tokens, the end-of-document token among them.

    Words are learnt from in parts of `_WORD` bytes, for training takes the square of a
    word's length, and text without blanks is one word. Raises `DataError` if the texts
    are too few for that many merges.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(f".{{1,{_WORD}}}"), "isolated"
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, parts])
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[vocabulary.EOT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = words
    if backend.get_vocab_size() < vocab_size:
        raise errors.DataError(
            f"data.tokenizer='bpe:{vocab_size}': the training text yields only "
            f"{backend.get_vocab_size()} tokens; use a smaller vocabulary or 'bytes'."
        )
    return Tokenizer(backend.to_str(), f"bpe:{vocab_size}")


def bpe_size(spec: str) -> int:
    """V of 'bpe:V', 0 for any other tokenizer. Raises `ConfigError` for a bad V."""
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return 0
    number = int(size) if size.isdecimal() and len(size) < 10 else 0
    if not 257 <= number <= _MAX_BPE:
        raise errors.ConfigError(
            f"data.tokenizer={spec!r}: expected bpe:V with V >= 257 (256 bytes and the "
            f"end-of-document token) and at most {_MAX_BPE}."
        )
    return number


def load(spec: str, end_token: str = "") -> Tokenizer:
    """'bytes', a path of a tokenizer.json or of its folder, or 'hub:owner/name[@rev]'.

    end_token: the token that ends a document, '' for the first of the known names.
    """
    if spec == "bytes":
        return byte_level()
    if spec.startswith("hub:"):
        path = _from_hub(spec)
    else:
        path = paths.local(spec, "data.tokenizer")
        if path.is_dir():
            path = path / "tokenizer.json"
    if not path.is_file():
        raise errors.ConfigError(
            f"data.tokenizer={spec!r}: neither a file nor one of bytes, bpe:V, "
            "hub:owner/name."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataError(
            f"data.tokenizer={spec!r}: cannot be read ({error})."
        ) from error
    return Tokenizer(text, spec, end_token)


def load_recorded(
    path: pathlib.Path, sha256: str, end_token: str, whose: str
) -> Tokenizer:
    """The tokenizer.json at `path` if it is the one that was written down.

    Raises `DataError`, saying that it is not `whose`.
    """
    try:
        tokenizer = load(str(path), end_token)
    except errors.MemoryFormerError as error:
        raise errors.DataError(
            f"{path}: is not the tokenizer of {whose}: {error}"
        ) from error
    if tokenizer.fingerprint != sha256:
        raise errors.DataError(
            f"{path}: is not the tokenizer of {whose}: its sha256 is "
            f"{tokenizer.fingerprint[:12]}, not {sha256[:12]}; put that one back."
        )
    return tokenizer


def is_file(spec: str) -> bool:
    """Whether data.tokenizer names a tokenizer.json, here or on the hub."""
    return spec != "bytes" and not bpe_size(spec)


def _from_hub(spec: str) -> pathlib.Path:
    repo, _, revision = spec.removeprefix("hub:").partition("@")
    if repo.count("/") > 1 or not repo.strip("/"):
        raise errors.ConfigError(
            f"data.tokenizer={spec!r}: expected hub:owner/name[@revision]."
        )
    return hub.fetch(
        f"data.tokenizer={spec!r}",
        repo,
        "tokenizer.json",
        revision=revision,
        instead="download its tokenizer.json and give the path",
    )


def _backend(text: str, name: str) -> tokenizers.Tokenizer:
    with _refused(f"data.tokenizer={name!r}: not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_str(text)
    # A file may carry the settings of whoever saved it, and these would silently
    # cut documents, pad them, or turn their text into special tokens.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever the Rust side raises, a bare Exception or a panic, as one line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, errors.MemoryFormerError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise errors.DataError(f"{what} ({reason}).") from error
