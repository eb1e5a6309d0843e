"""An S3 store that listens on a port, of the package moto: real processes, really killed.

`pip install 'moto[server]' s3fs`, or this is skipped.
"""

import os
import pathlib
import subprocess
import sys
import time

import pytest
import runner
import stores_helpers
import toy
import toy_checkpoints

from memoryformer import data, runs
from memoryformer.files import lease, stores
from memoryformer.runs import metrics, outcome, remote

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
URL = "s3://bucket/deep/run"
# At the first sight of such a name in the store the run is killed.
MOMENTS = (
    "config.json",
    "checkpoints/5/state/",
    "checkpoints/10/state/",
    "checkpoints/10/MANIFEST",
    "checkpoints/20/",
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A folder with a corpus, that is in s3://bucket/corpus too, and a server of S3's requests."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    folder = tmp_path_factory.mktemp("s3")
    toy.corpus(folder / "corpus")
    toy.config_file(folder)
    listening = server.ThreadedMotoServer(port=0)
    listening.start()
    host, port = listening.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MEMORYFORMER_CACHE": str(folder / "copies"),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "XLA_FLAGS": runner.XLA_FLAGS,
        }.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("bucket")
        stores_helpers.put(folder / "corpus", "s3://bucket/corpus")
        yield folder
    listening.stop()


def start(folder, workdir, *words, program="train.py"):
    config = [f"--config={folder / 'toy_config.py'}"] if program == "train.py" else []
    return subprocess.Popen(
        [sys.executable, ROOT / program, *config, f"--workdir={workdir}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def test_killed_again_and_again(s3):
    """A run on a corpus in the store ends equal to one on this machine, bit for bit.

    Mutations: the manifest before the files; metrics.jsonl not sent; no lease that ends with
    a process of this machine (then each start waits a minute).
    """
    straight = start(s3, s3 / "run")
    assert straight.wait() == 0, straight.stdout.read()
    words = ("--config.data.path=s3://bucket/corpus",)
    store, killed = stores.Store(URL), 0
    for moment in MOMENTS:
        process = start(s3, URL, *words)
        while process.poll() is None:
            if any(name.startswith(moment) for name in store.list()):
                process.kill()
                break
            time.sleep(0.01)
        killed += process.wait() == -9
    last = start(s3, URL, *words)
    assert last.wait() == 0, last.stdout.read()
    assert killed >= 3
    copy = remote.copied(URL)
    rows = [
        [metrics.comparable(r) for r in metrics.read(f)] for f in (s3 / "run", copy)
    ]
    assert rows[0] == rows[1] and rows[0][-1]["step"] == 20
    toy_checkpoints.assert_equal(runs.load(s3 / "run")[1], runs.load(URL)[1])
    assert outcome.read(copy) == {"state": "done"} and store.list(lease.FOLDER) == {}
    here, there = (
        data.load(data.DataConfig(source="text", path=path, tokenizer="bytes",
                                  data_dir=str(s3 / "cache"))).fingerprint
        for path in (str(s3 / "corpus"), "s3://bucket/corpus")
    )  # fmt: skip
    assert here == there
    evaluated = start(s3, URL, program="eval.py")
    assert evaluated.wait() == 0 and '"val/loss"' in evaluated.stdout.read()


def test_another_writer_is_refused(s3):
    """While this process writes there. Mutation: `opened` without the lease."""
    place = "s3://bucket/held"
    with lease.hold(stores.Store(place)):
        second = start(s3, place)
        said = second.communicate()[0]
    assert second.returncode == 45
    assert f"process {os.getpid()} on " in said and "trains there" in said
    assert stores.Store(place).list() == {}


def test_a_large_object_and_a_bucket_that_is_not_there(s3, tmp_path):
    """In parts, whole or not at all; one line. Mutation: an exception of botocore let through."""
    content = os.urandom(1 << 20) * 70  # more than one part
    (tmp_path / "large").write_bytes(content)
    store = stores.Store("s3://bucket/large")
    store.write("object", tmp_path / "large")
    assert store.list()["object"].size == len(content)
    store.fetch("object", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content
    process = start(s3, "s3://no-such-bucket/run")
    said = process.communicate()[0].strip().splitlines()[-1]
    assert process.returncode == 45 and said.startswith("error: s3://no-such-bucket"), (
        said
    )
