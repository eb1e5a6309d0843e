"""Names for messages and keys, and texts as a command line spells them."""

import fnmatch
import os
import re
from collections.abc import Sequence


def shown(name: str | os.PathLike) -> str:
    """A name for a message: on one line, and printable whatever bytes it holds."""
    return "".join(
        char if char.isprintable() else ascii(char)[1:-1] for char in os.fspath(name)
    )


def counted(names: Sequence[str], what: str) -> str:
    """'1 link to folders (a)', '3 links to folders (a, ..)'."""
    noun, blank, detail = what.partition(" ")
    plural, more = ("s", ", ..") if len(names) > 1 else ("", "")
    return f"{len(names)} {noun}{plural}{blank}{detail} ({shown(min(names))}{more})"


def unescaped(text: str) -> str:
    """`text` with \\n, \\r, \\t and \\\\ read as in a string of Python."""
    signs = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: signs[match[1]], text)


def key(parts: Sequence[str]) -> str:
    """Parts of a path joined, as UTF-8: another byte becomes //hex, which no path holds."""
    return "".join(
        f"//{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char
        for char in "/".join(parts)
    )


def fits(
    names: tuple[str, ...], pattern: tuple[str, ...], begins: bool = False
) -> bool:
    """Whether the path `names` fits; with `begins`, whether a path below it could."""
    if not names:
        return begins or not pattern
    if not pattern:
        return False
    if pattern[0] == "**":
        return fits(names, pattern[1:], begins) or fits(names[1:], pattern, begins)
    same = names[0] == pattern[0] or fnmatch.fnmatchcase(names[0], pattern[0])
    return same and fits(names[1:], pattern[1:], begins)


def are_ours(names: set[str]) -> bool:
    """Whether a folder that holds these was made by this package: no text of a corpus."""
    prepared = {"manifest.json", "tokenizer.json"} <= names
    exported = {"model.safetensors", "reader.py"} <= names
    return exported or (prepared and bool(names & {"train.bin", "parts"}))
