"""The paper's six tasks: their rows from files, without the harness."""

import gzip
import hashlib
import json
import lzma

import pytest

from memoryformer import errors
from memoryformer.harness import task_files

ROW = {"goal": "one\u2028two\x0b\x85\x0c\rthree", "sol1": "é", "sol2": "😀", "label": 0}


@pytest.mark.parametrize(
    "name", ["piqa.jsonl", "piqa.JSONL", "piqa.ndjson", "PIQA.json"]
)
def test_rows_of_a_folder(tmp_path, name):
    """A line ends at a line feed only; a byte order mark and empty lines are no content.

    Red when U+2028 or its like cuts a row in two, or an ending in upper case is passed over.
    """
    text = json.dumps(ROW, ensure_ascii=False)
    data = b"\xef\xbb\xbf" + f"{text}\r\n\n{text}".encode()
    (tmp_path / name).write_bytes(data)
    assert task_files.local_rows("piqa", str(tmp_path)) == {"test": [ROW, ROW]}
    assert task_files.local_rows("wsc", str(tmp_path)) == {}
    (tmp_path / "piqa.train.jsonl").write_text(text)
    assert task_files.local_rows("piqa", str(tmp_path))["train"] == [ROW]
    assert task_files.local_rows("piqa", "") == {}


@pytest.mark.parametrize("name", ["piqa.jsonl.gz", "piqa.json.XZ"])
def test_rows_of_a_compressed_file(tmp_path, name):
    """Red when it is passed over, and the published rows are downloaded instead."""
    pack = gzip.compress if name.endswith("gz") else lzma.compress
    (tmp_path / name).write_bytes(pack(json.dumps(ROW).encode()))
    assert task_files.local_rows("piqa", str(tmp_path)) == {"test": [ROW]}


def test_examples_alone_are_no_task(tmp_path):
    """Red when they are left out without a word."""
    (tmp_path / "piqa.train.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(errors.DataError, match=r"piqa.train.jsonl without piqa.jsonl"):
        task_files.local_rows("piqa", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "no rows"),
        (b"{}\n{", "line 2|:2"),
        (b"{}\n[1]", "line 2|:2"),
        (b"{}\n\n7", "line 3|:3"),
        (b"\xff{}", "piqa.jsonl"),
        (b"[" * 100_000, "line 1|:1"),
    ],
    ids=["empty", "blank", "cut", "list", "number", "latin", "deep"],
)
def test_rows_that_cannot_be_read(tmp_path, content, message):
    """Red when one ends in a traceback, or is left out."""
    (tmp_path / "piqa.jsonl").write_bytes(content)
    with pytest.raises(errors.DataError, match=message) as caught:
        task_files.local_rows("piqa", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_two_files_of_one_task(tmp_path):
    """Red when one of them is taken without a word."""
    for name in ("piqa.jsonl", "piqa.ndjson"):
        (tmp_path / name).write_text(json.dumps(ROW))
    with pytest.raises(errors.DataError, match=r"piqa\.jsonl, piqa\.ndjson"):
        task_files.local_rows("piqa", str(tmp_path))


def test_rows_of_two_kinds(tmp_path):
    """A column of numbers and texts: one line. Red when pyarrow's exception comes through."""
    pytest.importorskip("datasets", reason="needs lm-eval's datasets")
    rows = {"test": [ROW, ROW | {"label": ["x"]}]}
    with pytest.raises(errors.DataError, match="piqa: its rows differ in kind"):
        task_files.with_rows({"task": "piqa"}, rows)


def test_logiqa_from_its_text_files(tmp_path, monkeypatch):
    """Blocks of seven lines, spaces after full stops, checksums; fetched once.

    Red when the label or an option's letter stays in the text, or a damaged file is used.
    """
    text = (
        "\nb\nOne.Two.\nWhich?\nA.First.\nB.Second\nC Third\nD.Fourth\n\n"
        "d\nThree\nWho?\nA.1\nB.2\nC.3\nD.4\n"
    )
    rows = task_files.parse_logiqa(text)
    assert rows[0] == {
        "label": "b",
        "context": "One. Two.",
        "question": "Which?",
        "options": ["First.", "Second", "Third", "Fourth"],
    }
    assert [row["label"] for row in rows] == ["b", "d"]
    with pytest.raises(errors.DataError, match="block 0"):
        task_files.parse_logiqa("b\nx\ny\nA.1\nB.2\nC.3")

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "Test.txt").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    url = (tmp_path / "source").as_uri() + "/"
    monkeypatch.setitem(task_files.LOGIQA_FILES, "test", ("Test.txt", digest))
    cache = tmp_path / "cache"
    assert task_files.logiqa_rows(cache, url=url)["test"] == rows
    (tmp_path / "source" / "Test.txt").unlink()
    assert task_files.logiqa_rows(cache, url=url)["test"] == rows
    (cache / "Test.txt").write_text("other")
    with pytest.raises(errors.DataError, match="SHA-256"):
        task_files.logiqa_rows(cache, url=url)
    with pytest.raises(errors.DataError, match="could not be fetched"):
        task_files.logiqa_rows(tmp_path / "empty", url=url)
