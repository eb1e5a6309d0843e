"""What a person wrote of runs: `about.txt` in the folder of a sweep, or of several.

    Bits per code against tables
                                                <- an empty line parts paragraphs
    Fewer bits are better here, which is not the paper's order. Most rows have been
    read seldom after so few tokens.

The first paragraph is the title of the section, or of the page; the others stand under it
as what the section shows. It is plain text. Start at `read`.
"""

import dataclasses
import pathlib

from memoryformer.errors import StorageError

FILE = "about.txt"
MAX_BYTES = 1 << 16  # more is no summary, and may be another file


@dataclasses.dataclass(frozen=True)
class About:
    """A title and the paragraphs under it; both empty where nobody wrote any."""

    title: str = ""
    paragraphs: tuple[str, ...] = ()


NOTHING = About()


def read(folder: pathlib.Path) -> About:
    """Read the text of a folder; raises `StorageError` for one that is no short text."""
    path = folder / FILE
    if not path.is_file():
        return NOTHING
    try:
        if path.stat().st_size > MAX_BYTES:
            raise StorageError(f"{path}: has over {MAX_BYTES} bytes; shorten it.")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read as UTF-8: {error}.") from error
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line.strip())
        elif paragraphs[-1]:
            paragraphs.append([])
    title, *others = (" ".join(words) for words in paragraphs)
    return About(title, tuple(text for text in others if text))
