"""Apache Beam does the same parts, by its own reading and writing. Skipped where Beam is absent."""

import gzip
import lzma
import os
import pathlib
import shutil
import subprocess
import sys

import data_helpers
import pytest
import zstandard

from memoryformer import data, errors
from memoryformer.data import part_beam, preparation

TWO_PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
IN_MEMORY = ("--direct_running_mode=in_memory", "--direct_num_workers=1")


def config(tmp_path, cache, **options):
    return data.DataConfig(
        source="c4",
        path=str(tmp_path / "corpus"),
        tokenizer="bytes",
        source_options={"part_bytes": 3000, "validation_every": 5} | options,
        data_dir=str(tmp_path / cache),
    )


def corpus(folder):
    """Files of each compression; one in many parts; some texts in more than one file."""
    for n in range(3):
        data_helpers.jsonl_gz(folder / f"{n}.jsonl.gz", data_helpers.texts(100, seed=n))
    plain = gzip.decompress((folder / "1.jsonl.gz").read_bytes())
    (folder / "1[a]b.jsonl").write_bytes(plain)
    lines = plain.splitlines(keepends=True)
    packed = zstandard.compress(b"".join(lines[:30] + lines[60:]))
    (folder / "4.jsonl.zst").write_bytes(packed)
    (folder / "5.jsonl.xz").write_bytes(lzma.compress(b"".join(lines[30:60])))
    return folder


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def by_beam(*arguments, views=()):
    return lambda job: part_beam.run(job, "DirectRunner", arguments, views)


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam", reason="Apache Beam is not installed")


@pytest.fixture
def bucket(beam, tmp_path):
    """(a folder, what was done): a file system of Beam's that names its files bucket://."""
    from apache_beam.io import filesystem, localfilesystem

    root, done = tmp_path / "bucket", []

    class Bucket(localfilesystem.LocalFileSystem):
        """Like HDFS, it does not write over a file."""

        @classmethod
        def scheme(cls):
            return "bucket" if live else ""

        def join(self, base, *names):
            return "/".join([base, *names])

        def _at(self, path):
            assert path.startswith("bucket://")
            return str(root / path.removeprefix("bucket://"))

        def exists(self, path):
            return os.path.exists(self._at(path))

        def metadata(self, path):
            return filesystem.FileMetadata(path, os.path.getsize(self._at(path)), 0.0)

        def has_dirs(self):
            return False

        def _list(self, prefix):
            folder = prefix.rpartition("/")[0]
            return [
                self.metadata(f"{folder}/{n}") for n in os.listdir(self._at(folder))
            ]

        def open(self, path, mime_type="", compression_type="auto"):
            done.append(("open", path))
            return super().open(self._at(path), mime_type, compression_type)

        def create(self, path, mime_type="", compression_type="auto"):
            done.append(("create", path))
            return super().create(self._at(path), mime_type, compression_type)

        def rename(self, sources, targets):
            for source, target in zip(sources, targets, strict=True):
                done.append(("rename", target))
                if self.exists(target):
                    raise filesystem.BeamIOError("it is there", {target: ""})
                os.rename(self._at(source), self._at(target))

        def delete(self, paths):
            for path in paths:
                if not self.exists(path):
                    raise filesystem.BeamIOError("it is not there", {path: ""})
                os.unlink(self._at(path))

    live = True
    yield root, done
    live = False  # Beam knows all subclasses that there are


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", [False, True])
def test_the_files_are_the_same(beam, tmp_path, deduplicate):
    """In two processes of Beam's own. Red if a part knows who has made it, if units are not
    put in order, or if the last of equal texts stays.
    """
    corpus(tmp_path / "corpus")
    here, there = (config(tmp_path, c, deduplicate=deduplicate) for c in "ab")
    expected = data.prepare(here, show_progress=False)
    seen = []

    def spread(job):
        by_beam(*TWO_PROCESSES)(job)
        seen.append(job.missing())

    directory = preparation.prepare(there, spread=spread)
    assert seen == [[]]
    assert contents(directory) == contents(expected)


@pytest.mark.slow
def test_workers_use_no_folder_of_this_machine(bucket, tmp_path, capsys):
    """What this machine has of the corpus is noise of the same sizes.

    Red if a worker opens a path, does what is done, or counts other tokens.
    """
    root, done = bucket
    corpus(tmp_path / "corpus")
    expected = data.load(config(tmp_path, "a"))
    root.mkdir()
    shutil.copytree(tmp_path / "corpus", root / "corpus")
    for path in (tmp_path / "corpus").iterdir():
        path.write_bytes(b"x" * path.stat().st_size)
    mounts = f"{tmp_path}/corpus=bucket://corpus,{root}/cache=bucket://cache"

    def spread(job):
        by_beam(*IN_MEMORY, views=part_beam.views(mounts))(job)
        written = len(done)
        renamed = [name for what, name in done if what == "rename"]
        assert len(set(renamed)) == len(renamed) > 2 * len(job.parts)
        facts = sorted(job.work.glob("parts/*.json"))
        facts[1].unlink()
        by_beam(*IN_MEMORY, views=part_beam.views(mounts))(job)
        names = {name for what, name in done[written:] if what == "rename"}
        assert names and all("00001" in name.rpartition("/")[2] for name in names)

    directory = preparation.prepare(config(tmp_path, "bucket/cache"), spread=spread)
    assert contents(directory) == contents(expected.directory)
    read = {name for what, name in done if what == "open"}
    assert {f"bucket://corpus/{p.name}" for p in (root / "corpus").iterdir()} <= read
    tokens = sum(split.tokens - 1 for split in expected.manifest.splits.values())
    said = capsys.readouterr().err
    assert f" {len(list(directory.glob('parts/*')))} parts, {tokens:,} tokens" in said


@pytest.mark.slow
def test_two_attempts_leave_one_file(bucket):
    """Red if a rename onto a file is a failure, or a temporary file stays."""
    from memoryformer.data import beam_pipeline

    root, _ = bucket
    folder = beam_pipeline.Folder("bucket://cache")
    with folder.replacing("parts/1.json") as one:
        one.write(b"12")
        with folder.replacing("parts/1.json") as other:
            other.write(b"12")
    with pytest.raises(ZeroDivisionError), folder.replacing("2.bin") as stream:
        stream.write(b"34")
        raise ZeroDivisionError
    assert contents(root) == {"cache/parts/1.json": b"12"}
    assert folder.read("parts/1.json") == b"12"
    for _ in range(2):
        folder.remove("parts/1.json")
    assert contents(root) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{broken", r"9.jsonl:1: not a JSON line"),
        ("other", r"9.jsonl: is not the file that the parts were planned with"),
        ("gone", r"9.jsonl"),
        ("elsewhere", r"of \d+ parts are not in .*--workers_see"),
    ],
)
def test_a_fault_is_one_line(beam, tmp_path, change, message):
    """Red for each check that is left out."""
    folder = corpus(tmp_path / "corpus")
    line = '{"text": "a"}' if change == "elsewhere" else "{broken"
    (folder / "9.jsonl").write_text(f"{line}\n")

    def spread(job):
        views = ""
        if change == "other":
            (folder / "9.jsonl").write_text("{broken and long\n")
        if change == "gone":
            (folder / "9.jsonl").unlink()
        if change == "elsewhere":
            job.rules()
            shutil.copytree(job.work, tmp_path / "other" / job.work.name)
            views = f"{tmp_path}/b={tmp_path}/other,{folder}={folder}"
        by_beam(*IN_MEMORY, views=part_beam.views(views))(job)

    with pytest.raises(errors.DataError, match=message) as caught:
        preparation.prepare(config(tmp_path, "b"), spread=spread)
    assert "\n" not in str(caught.value)


def test_without_beam_the_line_says_so(tmp_path, monkeypatch):
    """Red if the import error is a traceback."""
    corpus(tmp_path / "corpus")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(errors.ConfigError, match="needs Apache Beam"):
        preparation.prepare(config(tmp_path, "a"), spread=by_beam())


def test_what_workers_call_a_file(tmp_path, monkeypatch):
    """The innermost folder decides, and a URL is its own name.

    Red if the first does, if a path that is in none passes, or a URL is taken for a path.
    """
    monkeypatch.chdir(tmp_path)
    views = part_beam.views("/mnt=s3://a/,/mnt/deep=gs://b,c=hdfs://h/c")
    name = part_beam.namer(views)
    assert name(pathlib.Path("/mnt/x/y.gz")) == "s3://a/x/y.gz"
    assert name(pathlib.Path("/mnt/deep/y")) == "gs://b/y"
    assert name(pathlib.Path("c/d")) == "hdfs://h/c/d"
    with pytest.raises(errors.ConfigError, match=r"--workers_see: .*/home/z; add its"):
        name(pathlib.Path("/home/z"))
    assert part_beam.namer([])(pathlib.Path("c/d")) == f"{tmp_path}/c/d"
    assert part_beam.namer([])("gs://b/x") == name("gs://b/x") == "gs://b/x"


@pytest.mark.parametrize("text", ["/mnt", "=gs://b", "/mnt="])
def test_a_view_that_is_none(text):
    with pytest.raises(errors.ConfigError, match="is not FOLDER=NAME"):
        part_beam.views(text)


def test_only_a_runner_has_workers():
    """Red if the flag is ignored."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "memoryformer.data",
            "prepare",
            "--workers_see=/a=gs://b",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == errors.ConfigError.exit_code
    assert "--workers_see: only a --runner has workers" in done.stderr
