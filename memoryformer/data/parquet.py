"""The texts of a parquet file, some rows at a time. `pyarrow` reads it, where it is installed.

Start at `texts`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from memoryformer import errors
from memoryformer.data import blocks, jsonlines, long_texts
from memoryformer.data.names import shown

_ROWS = 256  # read together


def texts(
    path: blocks.File, field: str, share: jsonlines.Share
) -> Iterator[tuple[int, long_texts.Text]]:
    """Yield (number of the row from 1, its text) of the rows in `share`.

    Raises `DataError` naming file and row.
    """
    name = shown(path)
    with _open(path) as file:
        known = file.schema_arrow.names
        column = field if field in known else field.split(".")[0]
        if column not in known:
            found = ", ".join(shown(n) for n in known) or "none"
            raise errors.DataError(
                f"{name}: no text in field {field!r} (found: {found}); set data.source_options.text_field."
            )
        number = 0
        for batch in _batches(file, column, name):
            for value in batch:
                number += 1
                if share.holds(number):
                    where = f"{name}: row {number}"
                    row = {column: _decoded(value, where)}
                    fix = "set data.source_options.text_field"
                    yield number, jsonlines.text(row, field, where, fix)
    if not number:
        raise errors.DataError(f"{name}: holds no rows.")


def _batches(file: Any, column: str, name: str) -> Iterator[list]:
    import pyarrow

    batches = file.iter_batches(batch_size=_ROWS, columns=[column])
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (OSError, pyarrow.ArrowException) as error:
            reason = errors.first_line(error)
            raise errors.DataError(
                f"{name}: damaged or truncated ({reason})."
            ) from error
        yield batch.column(0).to_pylist()


def _decoded(value: Any, where: str) -> Any:
    """Text that was stored as bytes, as older writers do."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise errors.DataError(f"{where}: not UTF-8; convert the file.") from error


@contextlib.contextmanager
def _open(path: blocks.File) -> Iterator[Any]:
    name = shown(path)
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise errors.DataError(
            f"{name}: reading .parquet needs the package pyarrow; `pip install pyarrow`, "
            "or convert the file to JSON lines."
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
            # `buffer_size`, or pyarrow reads whole row groups ahead.
            file = parquet.ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
        except (OSError, pyarrow.ArrowException) as error:
            reason = errors.first_line(error)
            raise errors.DataError(
                f"{name}: damaged or truncated ({reason})."
            ) from error
        yield stack.enter_context(file)
