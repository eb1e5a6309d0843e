"""Any config and any file: an error of ours in one line, or it works; nothing between."""

import gzip
import json
import pathlib
import tempfile

import pytest
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memoryformer import config as config_lib
from memoryformer import data, sharding
from memoryformer.errors import MemoryFormerError
from memoryformer.training import experiment, programs

FLAT = config_lib.flatten(toy.run_config(pathlib.Path("nowhere")))
# What ml_collections' flags can hand over, and what a config file can hold.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([-(2**40), 2**31, 2**63]),
    st.floats(),
    st.sampled_from(
        ["", "auto", "xla", "data", "fsdp", "bpe:x", "tensor:model=0", "\0"]
    ),
    st.text(max_size=8),
    st.tuples(st.integers(0, 3)),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
FAST = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def check_one_line(error: MemoryFormerError) -> None:
    assert 0 < len(str(error)) and "\n" not in str(error), str(error)
    assert error.exit_code in (2, 45, 46)


@settings(FAST, max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(FLAT)), VALUES, min_size=1, max_size=3))
def test_any_config_is_refused_in_one_line_or_fits(changes):
    """Up to the shapes of the state; what is accepted can be drawn.

    Mutation: drop the checks of `ModelConfig`, or `_checked` from `config.build`.
    """
    config: dict = {}
    for name, value in (FLAT | changes).items():
        section, _, key = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[key] = value
    try:
        run = experiment.resolve(config)
        place = sharding.make(run.mesh)
        specs = programs.check_fit(run, place)
        with place.activate():
            programs.init_state(run, place, specs)
    except MemoryFormerError as error:
        check_one_line(error)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=40).map(str.encode),
        st.sampled_from([b"", b"{", b"[]", b'{"text": 3}', b'{"text": ""}', b"null"]),
        st.text(max_size=20).map(lambda t: json.dumps({"text": t}).encode()),
        st.just(b"x" * 300_000),
    ),
    max_size=8,
).map(b"\n".join)
FILES = st.dictionaries(
    st.sampled_from(["a.txt", "b.jsonl", "c.json.gz", "d.jsonl.gz", "e.bin"]),
    st.tuples(LINES, st.sampled_from(["plain", "gzip", "cut"])),
    min_size=1,
    max_size=3,
)


@settings(FAST, max_examples=60)
@given(FILES, st.sampled_from(["text", "c4"]))
def test_any_file_is_read_or_refused(files, source):
    """Refused in one line, and then no data set is left behind; or it can be read.

    Mutation: write the manifest before the tokens; or let UnicodeDecodeError, EOFError or
    JSONDecodeError out of `data.documents`.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "corpus").mkdir()
        for name, (content, form) in files.items():
            if form != "plain":
                content = gzip.compress(content)
            if form == "cut":
                content = content[: len(content) * 2 // 3]
            (folder / "corpus" / name).write_bytes(content)
        config = data.DataConfig(
            source=source,
            path=str(folder / "corpus"),
            data_dir=str(folder / "cache"),
            tokenizer="bytes",
            source_options={"validation_every": 2},
        )
        try:
            dataset = data.load_directory(
                data.prepare(config, show_progress=False), verify=True
            )
        except MemoryFormerError as error:
            check_one_line(error)
            assert not list((folder / "cache").rglob("manifest.json"))
        else:
            assert dataset.train.eval_batches(8, 2).batch(0)["inputs"].shape == (2, 8)


@pytest.mark.parametrize("value", ["1e3x", "--", "nan", "[1", "{}"])
def test_values_that_are_no_numbers(value):
    """Mutation: `_checked` takes strings for numbers."""
    config = toy.run_config(pathlib.Path("nowhere")).to_dict()
    config["train"]["num_steps"] = value
    with pytest.raises(MemoryFormerError, match=r"train\.num_steps"):
        experiment.resolve(config)
