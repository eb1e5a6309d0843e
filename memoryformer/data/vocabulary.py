"""What a tokenizer.json says of its tokens: which ends a document, which bytes each stands for.

`spec` is the parsed file, `vocab` its {token: id}, added tokens among them. Start at
`end_of_document`, `pieces` and `for_text`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from memoryformer import config as config_lib
from memoryformer import errors

EOT = "<eot>"
END_TOKENS = (EOT, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot|>")
MAX_ID = 1 << 24  # beyond any published vocabulary; a list of pieces must fit
_SPACE = "\u2581"  # how sentencepiece writes a space
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def end_of_document(
    spec: Mapping[str, Any], vocab: Mapping[str, int], wanted: str, name: str
) -> str:
    """The token that ends a document: `wanted`, or the first known name ('' wanted).

    Raises `ConfigError` for a wanted one that is no added token, `DataError` without any.
    """
    added = [token["content"] for token in spec.get("added_tokens") or []]
    if wanted:
        if wanted in added or (wanted in END_TOKENS and wanted in vocab):
            return wanted
        raise errors.ConfigError(
            f"data.end_token={wanted!r}: data.tokenizer={name!r} has no such added token"
            f"{config_lib.suggest(wanted, added)}."
        )
    if known_end(vocab):
        return known_end(vocab)
    hint = f" (it has {', '.join(added[:6])})" if added else ""
    raise errors.DataError(
        f"data.tokenizer={name!r}: has no end-of-document token (one of "
        f"{', '.join(END_TOKENS)}); name its own with --config.data.end_token=TOKEN{hint}."
    )


def check_ids(vocab: Mapping[str, int], name: str) -> None:
    """Raise `DataError` for ids that no table can hold."""
    largest = max(vocab.values(), default=0)
    if largest >= MAX_ID:
        raise errors.DataError(
            f"data.tokenizer={name!r}: has the id {largest}; ids must be below {MAX_ID}."
        )


def known_end(vocab: Mapping[str, int]) -> str:
    """The first of the usual names that `vocab` holds; '' for none."""
    return next((token for token in END_TOKENS if token in vocab), "")


def pieces(
    spec: Mapping[str, Any], vocab: Mapping[str, int], end_token: str, name: str
) -> list[bytes]:
    """The byte string of every id; b'' for special tokens and ids without a token.

    Raises `ConfigError` for a family whose tokens have no bytes of their own.
    """
    size = max(vocab.values()) + 1
    convert = _bytes_of_token(spec, name)
    special = {vocab[token] for token in special_tokens(spec, end_token)}
    added = {token["id"] for token in spec.get("added_tokens") or []}
    table = [b""] * size
    for token, index in vocab.items():
        if index in special:
            continue
        # Added tokens are matched in the raw text: their content is what they stand for.
        matched = index in added and not _stands_for_a_byte(spec, token)
        table[index] = _utf8(token) if matched else convert(token)
    return table


def special_tokens(spec: Mapping[str, Any], end_token: str) -> list[str]:
    """The tokens that stand for no text: the end of a document, and all marked special.

    Not `<0x0A>` and its like, which byte fallback makes of text however they are marked.
    """
    marked = [
        token["content"]
        for token in spec.get("added_tokens") or []
        if token["special"] and not _stands_for_a_byte(spec, token["content"])
    ]
    return marked if end_token in marked else [*marked, end_token]


def for_text(spec: Mapping[str, Any], end_token: str) -> str:
    """The tokenizer.json to encode text with: no text makes a special token.

    A Unigram model finds `</s>` in its vocabulary, and an added token that is not marked
    special is matched in the text. Here special tokens have names that no text spells.
    """
    hidden = {
        token: f"\ufdd0\ufdd1{number}\ufdd2\ufdd3"
        for number, token in enumerate(special_tokens(spec, end_token))
    }
    model = dict(spec["model"])
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {hidden.get(t, t): i for t, i in model["vocab"].items()}
    else:  # Unigram: [token, score] by id
        model["vocab"] = [[hidden.get(t, t), score] for t, score in model["vocab"]]
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if not _makes(m, hidden)]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    added = [
        token
        | {
            "content": hidden.get(token["content"], token["content"]),
            "special": token["special"] or _stands_for_a_byte(spec, token["content"]),
        }
        for token in spec.get("added_tokens") or []
    ]
    text = {**spec, "model": model, "added_tokens": added, "post_processor": None}
    return json.dumps(text, ensure_ascii=False)


def byte_chars() -> dict[int, str]:
    """The byte-level alphabet of GPT-2: each byte as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in chars)
    return chars | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _bytes_of_token(spec, name):
    """The function from a token of the model's own vocabulary to its bytes."""
    text = json.dumps([spec.get(key) for key in ("pre_tokenizer", "decoder")])
    whole = json.dumps([spec.get("normalizer"), text, spec["model"]["type"]])
    if "ByteLevel" in text:
        to_byte = {char: byte for byte, char in byte_chars().items()}

        def from_alphabet(token: str) -> bytes:
            if all(char in to_byte for char in token):
                return bytes(to_byte[char] for char in token)
            return _utf8(token)  # a name that no text makes, decoded as it stands

        return from_alphabet
    if "Metaspace" in text or "\\u2581" in whole or "ByteFallback" in text:

        def from_sentencepiece(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            return (
                bytes([int(byte[1], 16)]) if byte else _utf8(token.replace(_SPACE, " "))
            )

        return from_sentencepiece
    raise errors.ConfigError(
        f"data.tokenizer={name!r}: neither byte-level nor sentencepiece-style, so "
        "its tokens have no fixed bytes (and text no exact bits per byte)."
    )


def _stands_for_a_byte(spec, token: str) -> bool:
    fallback = bool(spec["model"].get("byte_fallback"))
    return fallback and _BYTE_TOKEN.fullmatch(token) is not None


def _makes(merge: str | list[str], tokens: Mapping[str, str]) -> bool:
    """Whether a merge, 'a b' or ['a', 'b'], takes or makes one of `tokens`."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in tokens or right in tokens or left + right in tokens


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="replace")
