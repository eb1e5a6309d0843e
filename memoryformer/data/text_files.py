"""Which files of a text corpus hold text, and what is said of the others.

Start at `list_texts`.
"""

import collections
from collections.abc import Callable, Iterable

from memoryformer import errors
from memoryformer.data import blocks, listing, local_files, names

MARKER = "<|endoftext|>"  # between the stories of many published text files


def list_texts(
    path: str,
    *,
    json_only: bool,
    text_field: str,
    field: str = "data.path",
    note: Callable[[str], None] = lambda text: None,
) -> listing.Files:
    """What `path` names; of several files, those that hold text.

    Raises `DataError` where none does.
    """
    files = listing.list_files(path, json_only=json_only, field=field, note=note)
    if len(files) < 2:
        return files

    def reason(file: blocks.File) -> str:
        found = local_files.without_text(file, text_field)
        # An empty shard is a broken download, which `read_documents` reports.
        return "" if json_only and found == "empty" else found

    reasons = {key: reason(file) for key, file in files}
    skipped = {key: reason for key, reason in reasons.items() if reason}
    if skipped:
        line = skipped_line(skipped)
        note(line)
        if len(skipped) == len(files):
            raise errors.DataError(
                f"{path}: holds no text: {line}; give other files or set "
                "data.source_options.text_field."
            )
    return [(key, file) for key, file in files if key not in skipped]


def marker_line(count: int) -> str:
    """What to do about a marker between documents that is read as text."""
    return (
        f"documents with {MARKER} as plain text: {count}; where it ends "
        f"documents, set data.source_options.separator='{MARKER}'"
    )


def check_separator(files: Iterable[blocks.File], separator: str, path: str) -> None:
    """Raise `ConfigError` if no file is plain text, which alone has a separator."""
    if separator and all(map(blocks.has_fields, files)):
        raise errors.ConfigError(
            f"data.source_options.separator={separator!r}: {names.shown(path)} holds "
            "JSON lines only, which have no separator; leave it out."
        )


def skipped_line(skipped: dict[str, str]) -> str:
    """'3 files skipped: 2 empty, 1 binary (logo.png, ..)', of reasons by key."""
    counts = collections.Counter(sorted(skipped.values(), reverse=True))
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return names.counted(list(skipped), f"file skipped: {reasons}")
