"""Apache Beam does the same parts: DirectRunner, two processes. Skipped where Beam is absent."""

import sys
import types

import data_helpers
import pytest

from memoryformer import data, errors
from memoryformer.data import part_beam, part_runner, preparation


def config(tmp_path, cache):
    return data.DataConfig(
        source="c4",
        path=str(tmp_path / "corpus"),
        tokenizer="bytes",
        source_options={"part_bytes": 3000, "validation_every": 5},
        data_dir=str(tmp_path / cache),
    )


def corpus(tmp_path, broken=""):
    for n in range(4):
        path = tmp_path / "corpus" / f"{n}.jsonl.gz"
        data_helpers.jsonl_gz(path, data_helpers.texts(100, seed=n))
    if broken:
        (tmp_path / "corpus" / "9.jsonl").write_text(broken)


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def by_beam(*arguments):
    return lambda job: part_beam.run(job, "DirectRunner", arguments)


@pytest.mark.slow
def test_the_files_are_the_same(tmp_path):
    """In two processes of Beam's own. Red if a part knows who has made it."""
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed")
    corpus(tmp_path)
    expected = data.prepare(config(tmp_path, "a"), show_progress=False)
    spread = by_beam("--direct_running_mode=multi_processing", "--direct_num_workers=2")
    seen = []

    def watched(job):
        spread(job)
        seen.append(job.missing())

    directory = preparation.prepare(config(tmp_path, "b"), spread=watched)
    assert seen == [[]]
    assert contents(directory) == contents(expected)


@pytest.mark.slow
def test_a_part_that_fails_is_one_line(tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed")
    corpus(tmp_path, broken="{broken\n")
    with pytest.raises(errors.DataError, match=r"9.jsonl:1: not a JSON line") as caught:
        preparation.prepare(config(tmp_path, "b"), spread=by_beam())
    assert "\n" not in str(caught.value)


def test_without_beam_the_line_says_so(tmp_path, monkeypatch):
    """Red if the import error is a traceback."""
    corpus(tmp_path)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(errors.ConfigError, match="needs Apache Beam"):
        preparation.prepare(config(tmp_path, "a"), spread=by_beam())


def test_the_work_of_one_element(tmp_path):
    """One part, and no other. Red if `work` does all of them."""
    import pickle

    corpus(tmp_path)
    here = config(tmp_path, "a")
    (tmp_path / "a").mkdir()
    directory = data.resolve_dir(here)
    assert part_beam.work(pickle.dumps((str(directory), here)), 2) == 2
    quiet = types.SimpleNamespace(note=lambda text: None)
    job = part_runner.Job(directory, here, quiet)
    done = set(range(len(job.parts))) - set(job.missing())
    assert done == {2}
