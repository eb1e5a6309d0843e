"""Which files a path names: links, patterns, odd names, and folders of our own."""

import glob
import os
import pathlib
import tempfile

import data_helpers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memoryformer import data, errors
from memoryformer.data import listing
from memoryformer.data import names as names_lib
from memoryformer.files import atomic
from memoryformer.runs import directory as directory_lib


def keys(path, **more):
    return [key for key, _ in listing.list_files(str(path), **more)]


def test_linked_folders_are_followed_once_each(tmp_path):
    """A folder, `**` and `**/*.txt` agree; loops end; what was done is told.

    Mutations: folders and links in one queue (the link to `real` would be read first);
    `_read` not asked (the loop never ends); links skipped, as `rglob` does.
    """
    disk = data_helpers.folder(tmp_path / "disk" / "part", data_helpers.texts(3))
    corpus = tmp_path / "corpus"
    data_helpers.folder(corpus / "real", data_helpers.texts(2))
    (corpus / "a_part").symlink_to(disk)
    (corpus / "a_again").symlink_to("real")
    (corpus / "real" / "loop").symlink_to("..")
    (corpus / "self").symlink_to("self")
    (corpus / "gone.txt").symlink_to("/nowhere/gone.txt")
    (corpus / "one.txt").symlink_to(disk / "0000.txt")
    want = [f"a_part/000{i}.txt" for i in range(3)]
    want += ["one.txt", "real/0000.txt", "real/0001.txt"]
    for pattern in ("", "**", "**/*.txt", "**/**/*"):
        notes = []
        assert keys(corpus / pattern, note=notes.append) == want
        assert notes[:2] == [
            "1 link to folders followed (a_part)",
            "2 links to folders that are read already (a_again, ..)",
        ]
        dangling = ["1 link to nothing (gone.txt)"]
        if pattern != "**/*.txt":
            dangling = ["2 links to nothing (gone.txt, ..)"]
        assert notes[2:] == dangling
    assert keys(corpus / "*.txt") == ["one.txt"]
    # Here nothing but the link leads to `real`.
    assert keys(corpus / "a_*" / "*1.txt") == ["a_again/0001.txt", "a_part/0001.txt"]


NAMES = st.lists(
    st.sampled_from(["a", "b", "ab.txt", "[a]", ".hid"]), min_size=1, max_size=3
)
PARTS = st.lists(
    st.sampled_from(["*", "**", "a", "?", "[ab]*", "*.txt"]), min_size=1, max_size=3
)


@settings(max_examples=80, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6), PARTS)
def test_patterns_mean_what_glob_says(paths, parts):
    """Without links. Red if `**` needs a folder, or a star crosses one."""
    with tempfile.TemporaryDirectory() as root:
        for names in paths:
            file = pathlib.Path(root, *names[:-1], names[-1] + ".f")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        pattern = os.path.join(root, *parts)
        if os.path.isdir(pattern):  # a folder and all below it
            want = glob.glob(os.path.join(pattern, "**", "*"), recursive=True)
        elif parts[-1] == "**":
            want = glob.glob(os.path.join(pattern, "*"), recursive=True)
        else:
            want = glob.glob(pattern, recursive=True)
        want = {path for path in want if os.path.isfile(path)}
        try:
            files = listing.list_files(pattern)
        except errors.DataError as error:
            assert "holds no files" in str(error) or "no such file" in str(error)
            files = []
        assert {str(path) for _, path in files} == want


def test_signs_in_names_that_exist_are_no_patterns(tmp_path):
    """Red if `[x]` in an existing path is taken for a class of characters."""
    folder = data_helpers.folder(tmp_path / "[x] *y", data_helpers.texts(2))
    assert keys(folder) == keys(folder / "*.txt") == ["0000.txt", "0001.txt"]
    assert keys(folder / "0001.txt") == ["0001.txt"]


def test_a_name_that_is_not_utf8_works(tmp_path):
    """As a zip from elsewhere leaves it: in the stream, with a key that is text.

    Mutation: the name itself as the key, which TFDS and the fingerprint cannot encode.
    """
    texts = data_helpers.texts(12)
    config = data_helpers.config(tmp_path, texts)
    odd = os.fsencode(tmp_path / "corpus") + b"/caf\xe9\n.txt"
    with open(odd, "wb") as file:
        file.write(b"a text in a file with a latin-1 name")
    assert keys(tmp_path / "corpus")[-1] == "caf//e9\n.txt"
    splits = data.load(config).manifest.splits.values()
    assert sum(split.documents for split in splits) == 13
    with open(odd, "wb") as file:
        file.write(b"caf\xe9")
    with pytest.raises(errors.DataError, match=r"caf\\udce9\\n.txt:1: not UTF-8") as e:
        data.prepare(config)
    assert "\n" not in str(e.value)


def test_folders_of_our_own_are_no_corpus(tmp_path):
    """`data.path=.` with `runs/` and a cache inside: the second start finds the first's.

    Mutation: `_is_ours` says no; the lock of the run would be a document, and then its
    config, metrics and outcome.
    """
    config = data_helpers.config(tmp_path, data_helpers.texts(20))
    corpus = tmp_path / "corpus"
    own = {"data_dir": str(corpus / "cache")}
    config = data.DataConfig(**config.__dict__ | own)
    with directory_lib.only_one(corpus / "runs" / "a"):
        directory = data.prepare(config)
        atomic.write_json(corpus / "runs" / "a" / "config.json", {"data": {}})
        (corpus / "runs" / "a" / "metrics.jsonl").write_text('{"step": 1}\n')
        exported = corpus / "exported"
        exported.mkdir()
        for name in ("model.safetensors", "reader.py", "config.json"):
            (exported / name).write_text("{}")
        assert data.resolve_dir(config) == directory
    assert data.prepare(config) == directory
    notes = []
    assert len(keys(corpus, note=notes.append)) == 20
    [note] = notes
    assert note.startswith(
        "3 folders of a run, a model or prepared data left out (cache/"
    )
    (corpus / "lock").write_text("not a process")  # somebody's own file of this name
    (corpus / "deep").mkdir()
    (corpus / "deep" / "lock").write_text("a poem about locks")
    assert {"lock", "deep/lock"} <= set(keys(corpus))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~nobody_has_this_name/x", "has no such home folder"),
        ("x" * 300, "cannot be read .File name too long"),
        ("nowhere/*.txt", "holds no files"),
        ("nowhere", "there is no such file or folder"),
        ("/dev/null", "it is neither file nor folder"),
    ],
)
def test_paths_that_name_nothing(path, message):
    with pytest.raises(errors.MemoryFormerError, match=message) as caught:
        listing.list_files(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_read_is_no_secret(tmp_path, monkeypatch):
    """Mutation: go on without it, as `rglob` does."""
    data_helpers.folder(tmp_path / "in" / "locked", data_helpers.texts(2))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(errors.DataError, match=r"locked: cannot be read .Permission"):
        listing.list_files(str(tmp_path / "in"))


@pytest.mark.parametrize(
    "files, ours",
    [
        ({"manifest.json": "", "tokenizer.json": "", "train.bin": ""}, True),
        ({"manifest.json": "", "tokenizer.json": ""}, False),
        ({"model.safetensors": "", "reader.py": ""}, True),
        ({"model.safetensors": ""}, False),
        ({"lock": "123 on host\n"}, True),
        ({"lock": "123 on host"}, False),
        ({"lock": "x 123 on host\n"}, False),
        ({"a.txt": ""}, False),
        ({"lock": "1 on " + "h" * 394 + "\n"}, True),
        ({"lock": "1 on " + "h" * 395 + "\n"}, False),
    ],
)
def test_what_this_package_has_made(tmp_path, files, ours):
    """Mutations: any sign of it left out; `return True` for a lock that is not read."""
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_text(content)
    (tmp_path / "b.txt").write_text("b")
    found = {f"in/{name}" for name in files}
    assert set(keys(tmp_path)) == {"b.txt"} | (set() if ours else found)
    if ours:  # named itself, it is read
        assert set(keys(tmp_path / "in")) == set(files)


def test_a_lock_that_cannot_be_read(tmp_path):
    """Mutation: `return True`."""
    (tmp_path / "in" / "lock").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    assert keys(tmp_path) == ["in/a.txt"]


def test_whether_a_path_fits():
    """Mutations: `or` for `and`; `begins` not handed on; a part too few."""
    fits = names_lib.fits
    for names, pattern, whole, begins in (
        ((), (), True, True),
        ((), ("a",), False, True),
        (("a",), (), False, False),
        (("a",), ("a",), True, True),
        (("a",), ("a", "b"), False, True),
        (("b",), ("a", "b"), False, False),
        (("a", "b"), ("**",), False, True),
        (("a", "b"), ("**", "*"), True, True),
        (("a", "b"), ("**", "b"), True, True),
        (("a", "b"), ("**", "c"), False, True),
        (("a", "b"), ("*", "?"), True, True),
        (("[a]",), ("[a]",), True, True),
    ):
        assert fits(names, pattern) is whole, (names, pattern)
        assert fits(names, pattern, begins=True) is begins, (names, pattern)


def test_a_standard_library_without_sources(tmp_path, monkeypatch):
    """Zipped, or stripped. Mutations: the check left out; tests taken in."""
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr(listing.sysconfig, "get_paths", lambda: paths)
    with pytest.raises(errors.DataError, match="no sources under"):
        listing.stdlib_files()
    for name in ("b.py", "a.py", "test/c.py", "x/site-packages/d.py", "x/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [key for key, _ in listing.stdlib_files()] == ["a.py", "b.py", "x/e.py"]


def test_json_lines_only(tmp_path):
    """Mutations: `json_only=True` unless asked otherwise; the filter left out."""
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("x")
    assert keys(tmp_path) == ["a.txt", "b.jsonl"]
    assert keys(tmp_path, json_only=True) == ["b.jsonl"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(errors.DataError, match=r"^data\.x=.*holds no JSON-lines files"):
        keys(tmp_path, json_only=True, field="data.x")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / ".a.txt").write_text("x")
    with pytest.raises(errors.DataError, match=r"^data\.path=.*: holds no files\.$"):
        keys(hidden)
