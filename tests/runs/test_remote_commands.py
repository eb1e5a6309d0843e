"""Commands on runs in a store: every reader reads, and what cannot be is refused in a line."""

import importlib
import json
import re

import pytest
import stores_helpers
import toy

from memoryformer.files import stores


@pytest.fixture
def stored(store_url, toy_run):
    """A run that somebody has put into a store."""
    stores_helpers.put(toy_run, store_url)
    return store_url


def command(capsys, name, *words):
    """(exit code, standard output, standard error) of a command, in this process."""
    module = importlib.import_module(f"memoryformer.{name}.__main__")
    with pytest.raises(SystemExit) as ended:
        module.main([name, *words])
    return (ended.value.code or 0, *capsys.readouterr())


@pytest.mark.slow
def test_every_reader(stored, toy_run, tmp_path, capsys):
    """The same answers as for the run on this machine.

    Mutation: `remote.copied` left out of any of them.
    """
    for name, *words in (
        ("harness", "--workdir=RUN"),
        ("generation", "--workdir=RUN", "--prompt=def", "--max_tokens=8"),
        ("convert", "export", "RUN", "OUT/export"),
        ("convert", "recency", "--workdir=RUN", "--window=4"),
        ("report", "curves", "RUN", "--output=OUT/plots"),
        ("report", "utilisation", "--workdir=RUN", "--output=OUT/plots"),
        ("report", "RUN", "--output=OUT/page.html"),
        ("identifiability", "--workdir=RUN", "--max_tokens=300", "--max_unknowns=30"),
        ("cim", "--workdir=RUN", "--beside=RUN", "--seeds=1", "--num_batches=1", "--output=OUT/cim"),
    ):  # fmt: skip
        said = []
        for place, folder in ((toy_run, tmp_path / "a"), (stored, tmp_path / "b")):
            folder.mkdir(exist_ok=True)
            filled = [
                word.replace("RUN", str(place)).replace("OUT", str(folder))
                for word in words
            ]
            code, out, err = command(capsys, name, *filled)
            assert code == 0, (name, words, err)
            out = out.replace(str(place), "RUN").replace(str(folder), "OUT")
            out = re.sub(r" eta \w+", "", out)
            if name == "harness":
                out = {k: v for k, v in json.loads(out).items() if k != "val/seconds"}
            said.append(out)
        assert said[0] == said[1], (name, words)
    a, b = (
        {p.relative_to(tmp_path / x) for p in (tmp_path / x).rglob("*")} for x in "ab"
    )
    assert a == b


def test_refused(stored, tmp_path, capsys):
    """One line and exit code 2, before anything is written; 45 where nothing is to be read.

    Mutations: `in_store` for a flag of a folder that is written; an output beside the run.
    """
    before = stores.Store(stored).list()
    config = f"--config={toy.config_file(tmp_path)}"
    for code, reason, name, *words in (
        (2, "mount the store", "sweep", config, f"--root={stored}", "list"),
        (2, "mount the store", "convert", "export", stored, "memory://bucket/out"),
        (2, "mount the store", "convert", "import", stored, str(tmp_path / "out")),
        (2, "mount the store", "tasks", "mqar", config, f"--workdir={stored}"),
        (2, "mount the store", "report", "quickstart", f"--workdir={stored}"),
        (2, "mount the store", "report", "slots", stored),
        (2, "mount the store", "harness", f"--workdir={stored}", f"--output={stored}"),
        (2, "--output: missing", "report", stored),
        (2, "--output: missing", "report", "curves", stored),
        (2, "--output: missing", "cim", f"--workdir={stored}"),
        (2, "names no bucket", "training", config, "--workdir=memory://"),
        (2, "mount the store", "training", config, f"--workdir={stored}",
         f"--config.data.data_dir={stored}"),
        (45, "holds no run", "harness", "--workdir=memory://bucket/none"),
        (45, "holds no run", "report", "memory://bucket/none", "--output=x"),
    ):  # fmt: skip
        got, _, err = command(capsys, name, *words)
        assert got == code and reason in err, (name, words, got, err)
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert stores.Store(stored).list() == before
    assert not (tmp_path / "cache").exists()
