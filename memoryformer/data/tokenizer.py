"""Text to token ids and back: bytes, a trained BPE, or any tokenizer.json.

Every tokenizer has one special token, the end-of-document token `eot_id`, which no text
can produce: text that spells `<eot>` or `<|endoftext|>` is encoded as ordinary text.
Each other token stands for a fixed byte string, so decoding is joining bytes, a stream
can be decoded token by token, and bits per byte needs no text.

Start at `load` and `Tokenizer`.
"""

import codecs
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from memoryformer import errors, paths

EOT = "<eot>"
_WORD = 1024
_MAX_BPE = 1 << 20  # room for as many is taken before training begins
_EOT_NAMES = (EOT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot|>")


class Tokenizer:
    """Byte-level or sentencepiece-style tokenizer over a `tokenizers.Tokenizer`.

    vocab_size: largest id + 1.  eot_id: the end-of-document token.
    token_bytes: int32 [V], UTF-8 bytes that each token stands for; 0 for special tokens.
    fingerprint: sha256 of the canonical tokenizer.json.
    """

    def __init__(self, text: str, name: str):
        try:
            self._backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise errors.DataError(
                f"data.tokenizer={name!r}: not a tokenizer.json ({error})."
            ) from error
        # A file may carry the settings of whoever saved it, and these would silently
        # cut documents, pad them, or turn their text into special tokens.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.name = name
        self.spec = json.loads(self._backend.to_str())
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.eot_id = next((vocab[e] for e in _EOT_NAMES if e in vocab), -1)
        if self.eot_id < 0:
            raise errors.DataError(
                f"data.tokenizer={name!r}: has no end-of-document token "
                f"(one of {', '.join(_EOT_NAMES)})."
            )
        self.pieces = _pieces(self.spec, vocab, self.vocab_size, self.eot_id, name)
        self.token_bytes = np.array([len(p) for p in self.pieces], np.int32)
        canonical = json.dumps(self.spec, sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never the end-of-document token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        encodings = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of these tokens; nothing for special tokens and unused ids."""
        return b"".join(map(self.piece, map(int, ids)))

    def piece(self, token: int) -> bytes:
        """The bytes of one id; nothing for ids that only pad a model's vocabulary."""
        return self.pieces[token] if token < len(self.pieces) else b""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; a cut-off character shows as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def save(self, path: pathlib.Path) -> None:
        """Write tokenizer.json."""
        path.write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")


class TextStream:
    """Decode token by token, holding back a character until all its bytes are there.

    The pieces of a sequence joined, `finish()` included, equal `decode` of the whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._piece = tokenizer.piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps ''."""
        return self._decoder.decode(self._piece(int(token)))

    def finish(self) -> str:
        """What was held back."""
        return self._decoder.decode(b"", final=True)


def byte_level() -> Tokenizer:
    """Ids 0..255 are the bytes, 256 is the end-of-document token."""
    to_char = _byte_chars()
    model = tokenizers.models.BPE(
        vocab={to_char[byte]: byte for byte in range(256)}, merges=[]
    )
    backend = tokenizers.Tokenizer(model)
    # use_regex=False: without merges, splitting into words first changes nothing.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([EOT])
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
        special_tokens=[EOT],
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


def load(spec: str) -> Tokenizer:
    """'bytes', a path of a tokenizer.json or of its folder, or 'hub:owner/name[@rev]'."""
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataError(
            f"data.tokenizer={spec!r}: cannot be read ({error})."
        ) from error
    return Tokenizer(text, spec)


def _from_hub(spec: str) -> pathlib.Path:
    repo, _, revision = spec.removeprefix("hub:").partition("@")
    if repo.count("/") > 1 or not repo.strip("/"):
        raise errors.ConfigError(
            f"data.tokenizer={spec!r}: expected hub:owner/name[@revision]."
        )
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise errors.ConfigError(
            f"data.tokenizer={spec!r}: needs the package huggingface_hub; "
            "`pip install huggingface_hub`, or download its tokenizer.json and give "
            "the path."
        ) from None
    try:
        path = huggingface_hub.hf_hub_download(
            repo, "tokenizer.json", revision=revision or None
        )
    except Exception as error:  # network, authorisation, no such repository or file
        reason = " ".join(str(error).split())[:200]
        raise errors.DataError(
            f"data.tokenizer={spec!r}: could not be fetched "
            f"({type(error).__name__}: {reason}); download its tokenizer.json and give "
            "the path."
        ) from error
    return pathlib.Path(path)


def _byte_chars() -> dict[int, str]:
    """The byte-level alphabet of GPT-2: each byte as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in chars)
    return chars | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _pieces(
    spec: dict, vocab: dict[str, int], vocab_size: int, eot_id: int, name: str
) -> list[bytes]:
    """The byte string of every id; b'' for special tokens and ids without a token."""
    text = json.dumps([spec.get(key) for key in ("pre_tokenizer", "decoder")])
    whole = json.dumps([spec.get("normalizer"), text, spec["model"]["type"]])
    if "ByteLevel" in text:
        to_byte = {char: byte for byte, char in _byte_chars().items()}

        def convert(token: str) -> bytes:
            return bytes(to_byte[char] for char in token)

    elif "Metaspace" in text or "\\u2581" in whole or "ByteFallback" in text:

        def convert(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token[-1] == ">":
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode("utf-8")

    else:
        raise errors.ConfigError(
            f"data.tokenizer={name!r}: neither byte-level nor sentencepiece-style, so "
            "its tokens have no fixed bytes (and text no exact bits per byte)."
        )
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    pieces = [b""] * vocab_size
    for token, index in vocab.items():
        if index == eot_id or (index in added and added[index]["special"]):
            continue
        # Added tokens are matched in the raw text: their content is what they stand for.
        pieces[index] = token.encode("utf-8") if index in added else convert(token)
    return pieces
