"""Any bytes in any file that is read here: an error of ours in one line, or it works."""

import copy
import gzip
import json
import pathlib
import shutil
import tempfile

import data_helpers
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memoryformer import data
from memoryformer.data import jsonlines, local_files
from memoryformer.data import manifest as manifest_lib
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.errors import ConfigError, MemoryFormerError
from memoryformer.generation import prompts as prompts_lib

FAST = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text", "prompt", "a", "a.b"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
LINES = st.lists(
    st.binary(max_size=20)
    | JSON.map(lambda value: json.dumps(value, ensure_ascii=False)).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
    | st.text(max_size=20).map(
        lambda text: json.dumps({"text": text, "prompt": text}).encode()
    ),
    max_size=5,
)
CONTENT = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe"]),
    LINES,
    st.sampled_from([b"\n", b"\r\n", b"\n\n", "\u2028".encode()]),
).map(lambda parts: parts[0] + parts[2].join(parts[1]))
NAMES = st.sampled_from(
    "a.txt a a.JSONL a.ndjson a.jl a.json a.jsonl.gz a.txt.xz a.jsonl.bz2 a.zst".split()
)
PACKED = st.sampled_from([bytes, gzip.compress, lambda b: gzip.compress(b)[:-5]])


def check_one_line(error):
    assert str(error) and "\n" not in str(error) and error.exit_code in (2, 46)


@FAST
@given(NAMES, CONTENT, PACKED, st.sampled_from(["", "#", "\n"]))
def test_any_file_of_a_corpus(name, content, pack, separator):
    """Mutations: RecursionError, UnicodeDecodeError or EOFError let through."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        path.write_bytes(pack(content))
        try:
            local_files.without_text(path, "text")
            for _, text, _ in local_files.read_documents(
                [("k", path)], local_files.Reading("text", separator, 5)
            ):
                text.encode("utf-8")
        except MemoryFormerError as error:
            check_one_line(error)


@FAST
@given(NAMES, CONTENT, PACKED)
def test_any_file_of_prompts(name, content, pack):
    """One prompt for each line, empty ones too; or the line that is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        path.write_bytes(pack(content))
        try:
            prompts = prompts_lib.read(str(path))
        except MemoryFormerError as error:
            check_one_line(error)
            assert isinstance(error, ConfigError)
            return
        assert prompts and all(isinstance(prompt, str) for prompt in prompts)
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        if name in ("a.txt", "a") and pack is bytes:
            lines = text.split("\n")
            lines = lines if lines[-1] else lines[:-1]
            assert prompts == [line.removesuffix("\r") for line in lines]


@FAST
@given(JSON, st.text(max_size=6))
def test_any_field_of_any_value(value, field):
    try:
        assert isinstance(jsonlines.text(value, field, "f:1", "fix"), str)
    except MemoryFormerError as error:
        check_one_line(error)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    config = data_helpers.config(
        tmp_path_factory.mktemp("fuzz"), data_helpers.texts(20)
    )
    return data.prepare(config)


def change(value, path, new):
    """Put `new` somewhere into a nested value; `path` chooses where."""
    value = copy.deepcopy(value)
    at = value
    for step in path[:-1]:
        inner = sorted(at)[step % len(at)]
        if not isinstance(at[inner], dict):
            break
        at = at[inner]
    at[sorted(at)[path[-1] % len(at)]] = new
    return value


@FAST
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
    JSON | st.sampled_from([">u2", "uint8", "../x", "train.bin", 2**70, -1, 10**400]),
    st.booleans(),
)
def test_any_manifest(prepared, path, new, signed):
    """A changed field, its fingerprint right or not: refused in one line, or all is there.

    Mutations: `_parsed` refuses nothing; a dtype is read as little-endian whatever it
    says.
    """
    manifest = json.loads((prepared / "manifest.json").read_text())
    changed = change(manifest, path, new)
    if signed:
        try:
            changed["fingerprint"] = manifest_lib.fingerprint(changed)
        except (KeyError, TypeError):
            return
    with tempfile.TemporaryDirectory() as folder:
        copied = pathlib.Path(folder, "data")
        shutil.copytree(prepared, copied)
        (copied / "manifest.json").write_text(json.dumps(changed))
        try:
            dataset = data.load_directory(copied)
            dataset.validation.eval_batches(8, 2).batch(0)
            assert np.isfinite(dataset.token_bytes).all()
            assert "\n" not in manifest_lib.byte_note(dataset.manifest)
        except MemoryFormerError as error:
            check_one_line(error)


@FAST
@given(st.binary(max_size=60), st.integers(0, 200))
def test_any_bytes_in_a_token_file(prepared, content, at):
    """Mutation: ids go to the model as they are."""
    with tempfile.TemporaryDirectory() as folder:
        copied = pathlib.Path(folder, "data")
        shutil.copytree(prepared, copied)
        tokens = bytearray((copied / "validation.bin").read_bytes())
        tokens[at : at + len(content)] = content
        (copied / "validation.bin").write_bytes(tokens)
        try:
            dataset = data.load_directory(copied)
            batches = dataset.validation.eval_batches(8, 2)
            top = max(int(batches[i]["inputs"].max()) for i in range(len(batches)))
            assert top < tokenizer_lib.byte_level().vocab_size
        except MemoryFormerError as error:
            check_one_line(error)
