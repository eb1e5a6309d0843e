"""Corpora in an object store: the same keys, texts and fingerprints as on this machine."""

import gzip
import json

import numpy as np
import pytest
import stores_helpers

from memoryformer import data
from memoryformer.data import blocks, identity, listing, local_files, stored_files
from memoryformer.errors import ConfigError, DataError, StorageError
from memoryformer.files import stores


def corpus(folder):
    """Every kind of file that is read, and what is left out."""
    rows = [json.dumps({"text": f"row {i} ü\n" * 9}) for i in range(40)]
    lines = ("\n".join(rows) + "\n").encode()
    for name, content in {
        "a.txt": b"text of a\n" * 300,
        "deep/er/b.jsonl": lines,
        "deep/c.jsonl.gz": gzip.compress(lines, mtime=0),
        "deep/.hidden/d.txt": b"no",
        ".e.txt": b"no",
        "model/model.safetensors": b"no",
        "model/reader.py": b"no",
        "run/config.json": b"{}",
        "run/checkpoints/LEDGER": b"no",
        "run/lock": b"1 on x\n",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for suffix, package in (("zst", "zstandard"), ("parquet", "pyarrow")):
        module = pytest.importorskip(package)
        if suffix == "zst":
            (folder / "deep" / "f.jsonl.zst").write_bytes(module.compress(lines))
        else:
            from pyarrow import parquet

            table = module.table({"text": [json.loads(row)["text"] for row in rows]})
            parquet.write_table(table, folder / "g.parquet")
    return folder


@pytest.fixture
def both(tmp_path, store_url):
    """(a folder here, the same in a store)."""
    folder = corpus(tmp_path / "corpus")
    stores_helpers.put(folder, store_url)
    return str(folder), store_url


@pytest.mark.parametrize(
    "below", ["", "/", "/a.txt", "/deep/*", "/**/*.jsonl*", "/d*/**"]
)
def test_the_same_files_as_here(both, below):
    """Keys, texts and fingerprint. Mutations: a hidden file; `store.list` of a pattern's parent.

    Also a run's folder that is read, and a name that begins as another.
    """
    stores.Store("memory://bucket/run2").write("x.txt", b"beside it")
    here, there = (listing.list_files(place + below) for place in both)
    assert [key for key, _ in here] == [key for key, _ in there]
    how = local_files.Reading()
    texts, same = (list(local_files.read_documents(f, how)) for f in (here, there))
    assert texts == same and texts
    assert local_files.fingerprint(here) == local_files.fingerprint(there)


def test_prepared_from_a_store(both, tmp_path):
    """One directory and one set of tokens, whole or in parts, and as prepared data in a store.

    Mutations: the URL in the request; no copy; a copy without its files.
    """
    settings = {
        "source": "text",
        "tokenizer": "bytes",
        "data_dir": str(tmp_path / "cache"),
        "source_options": {"validation_every": 5, "part_bytes": 4000},
    }
    here, there = (data.DataConfig(path=place, **settings) for place in both)
    assert identity.located(here) == identity.located(there)
    made = data.load(there)
    assert identity.located(there)[1]
    stores_helpers.put(made.directory, "memory://bucket/made")
    copied = data.load(
        data.DataConfig(
            source="prepared",
            path="memory://bucket/made",
            tokenizer="bytes",
            data_dir=str(tmp_path / "other"),
        )
    )
    assert copied.fingerprint == made.fingerprint
    assert copied.directory.is_relative_to(tmp_path / "other")
    np.testing.assert_array_equal(*(s.train.tokens[:] for s in (made, copied)))


def test_what_cannot_be(both):
    """One line each. Mutations: a memory-mapped source; an error of the store's package let through."""
    for fields, reason in (
        ({"source": "megatron"}, "mount the store"),
        ({"source": "text", "data_dir": both[1]}, "data.data_dir=.*mount the store"),
        ({"source": "text", "path": "memory://"}, "names no bucket"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            data.DataConfig(**{"path": both[1], "tokenizer": "bytes"} | fields)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no pattern"):
        listing.list_files("memory://b*/x")
    for url in (f"{both[1]}/none", "memory://bucket/none/*.txt"):
        with pytest.raises(DataError, match=r"data\.path=.*holds no files"):
            listing.list_files(url)
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        stored_files.prepared(both[1], None)
    ((_, file),) = listing.list_files(f"{both[1]}/a.txt")
    stores.Store(both[1]).remove("a.txt")
    with pytest.raises((DataError, StorageError), match=r"a\.txt.*cannot be read"):
        list(blocks.read(file))
