"""Whatever a file of a model holds: it is read, or refused in one line."""

import base64
import contextlib
import functools
import json
import operator

import numpy as np
import pytest
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memoryformer import convert, errors, model
from memoryformer.convert import folders, released, safetensors_file, torch_file
from memoryformer.data import tokenizer as tokenizer_lib

FAST = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
DEEP = "[" * 100_000 + "]" * 100_000
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from(
        [0, -1, 2**31, 2**63, 10**30, 1e-300, 1e300, 10**400, "8", "gelu", "NaN"]
    ),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-1, 9), max_size=3),
    st.dictionaries(
        st.sampled_from(["type", "rope_type", "a"]), st.integers(), max_size=2
    ),
)


def refused(action, *args):
    """The error of ours that `action` ends in, one line; None where it works."""
    try:
        action(*args)
    except errors.MemoryFormerError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, str(error)
        assert error.exit_code in (2, 46), error
        return error
    return None


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    """A directory of a small GPT-NeoX model."""
    config = model.ModelConfig(
        vocab_size=31,
        embed_dim=8,
        num_layers=1,
        num_heads=2,
        seq_len=16,
        projection="dense",
        **toy.PYTHIA_BLOCK,
        rotary_fraction=0.5,
    )
    directory = tmp_path_factory.mktemp("neox") / "model"
    convert.save_gpt_neox(directory, config, model.init(config))
    return directory


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory of a small export with int8 tables and a tokenizer."""
    config = model.ModelConfig(
        vocab_size=257, embed_dim=8, num_layers=1, num_heads=2, seq_len=16, code_bits=4
    )
    directory = tmp_path_factory.mktemp("export") / "model"
    convert.save_export(
        directory,
        config,
        model.init(config),
        tables="int8",
        tokenizer=tokenizer_lib.byte_level(),
    )
    return directory


def changed(directory, changes, name="config.json"):
    """Write the fields of a JSON file with `changes`; DROP takes a field away."""
    path = directory / name
    whole = path.read_text()
    fields = json.loads(whole) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v != "DROP"}))
    return path, whole


NEOX_FIELDS = (
    "model_type vocab_size hidden_size num_hidden_layers num_attention_heads "
    "intermediate_size max_position_embeddings hidden_act layer_norm_eps rotary_pct "
    "rotary_emb_base use_parallel_residual tie_word_embeddings attention_bias "
    "rope_scaling rope_parameters partial_rotary_factor rope_theta quantization_config"
).split()


@settings(FAST, max_examples=60)
@given(st.dictionaries(st.sampled_from(NEOX_FIELDS), ODD | st.just("DROP"), max_size=2))
def test_any_config_of_gpt_neox(neox, changes):
    """Mutation: a field read by `fields.values[..]` instead of its type."""
    path, whole = changed(neox, changes)
    try:
        refused(convert.load_gpt_neox, neox)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "8"}, r"hidden_size='8': expected a whole number"),
        ({"hidden_size": True}, "hidden_size=True: expected a whole number"),
        ({"hidden_size": 8.0}, r"hidden_size=8\.0: expected a whole number"),
        ({"hidden_size": "DROP"}, "lacks hidden_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, but the weights"),
        ({"vocab_size": 10**9}, "vocab_size and hidden_size are"),
        ({"layer_norm_eps": -1.0}, r"layer_norm_eps=-1\.0: expected a number above 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps=10*.*expected a number above 0"),
        ({"rotary_emb_base": 10**309}, "rotary_emb_base=10*.*expected a number"),
        ({"hidden_act": ["gelu"]}, "hidden_act=.*expected a string"),
        ({"num_attention_heads": 3}, "multiple of num_attention_heads=3"),
        ({"rotary_pct": 2}, "rotary_pct=2.0: must be at most 1"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear': expected named values"),
        ({"attention_bias": "no"}, "attention_bias='no': expected true or false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    ],
)
def test_odd_values_are_named(neox, changes, message):
    """Mutation: `type(value) is not int` -> `not isinstance(value, int)`: True is 1."""
    path, whole = changed(neox, changes)
    try:
        assert refused(convert.load_gpt_neox, neox) is not None
        with pytest.raises(errors.MemoryFormerError, match=message):
            convert.load_gpt_neox(neox)
    finally:
        path.write_text(whole)


@settings(FAST, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(
            ["format", "version", "model", "tokenizer_sha256", "end_token"]
        ),
        ODD | st.just("DROP"),
        max_size=2,
    ),
    st.dictionaries(
        st.sampled_from(
            ["vocab_size", "num_layers", "embed_dim", "num_heads", "mixer"]
        ),
        ODD | st.just("DROP"),
        max_size=2,
    ),
)
def test_any_config_of_an_export(exported, outside, inside):
    """Mutation: `fields["model"]` for `fields.section("model")`."""
    fields = json.loads((exported / "config.json").read_text())
    given_model = {**fields["model"], **inside}
    kept = {k: v for k, v in given_model.items() if v != "DROP"}
    path, whole = changed(exported, {"model": kept} | outside)
    try:
        refused(convert.load_export, exported)
        refused(convert.export.own_tokenizer, exported, 257)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "text", [DEEP, "[]", "3", "null", "", "{", "\ufeff{}", b"\xff"]
)
@pytest.mark.parametrize("kind", ["neox", "exported"])
def test_what_is_no_config(request, kind, text):
    """Mutation: `except RecursionError` left out of `folders.parse_object`."""
    directory = request.getfixturevalue(kind)
    path = directory / "config.json"
    whole = path.read_bytes()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    load = {"neox": convert.load_gpt_neox, "exported": convert.load_export}[kind]
    try:
        assert refused(load, directory) is not None
    finally:
        path.write_bytes(whole)


def test_a_byte_order_mark_is_no_content(neox):
    """Mutation: encoding="utf-8" in `folders.read_object`."""
    path = neox / "config.json"
    whole = path.read_text()
    path.write_text("\ufeff" + whole)
    try:
        assert convert.load_gpt_neox(neox)[0].embed_dim == 8
    finally:
        path.write_text(whole)


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ENTRIES = st.one_of(
    ODD,
    st.builds(
        lambda changes: ENTRY | changes,
        st.dictionaries(st.sampled_from(sorted(ENTRY)), ODD, max_size=3),
    ),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I8", "BOOL", "F8_E4M3"]),
            "shape": st.lists(st.integers(0, 3), max_size=2),
            "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2),
        }
    ),
)


@settings(FAST, max_examples=150)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES, max_size=3)
    | ODD,
    st.integers(0, 12),
)
def test_any_safetensors_header(tmp_path_factory, header, size):
    """Mutation: `type(n) is int` left out of `_naturals`, or `span[1] > len(data)`."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(raw(json.dumps(header).encode(), b"\x01" * size))
    if refused(safetensors_file.read, path) is None:
        arrays, _ = safetensors_file.read(path)
        assert sum(array.nbytes for array in arrays.values()) == size


TWO = {"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 8]}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"0" * 20, "not a JSON object, but list"),
        (b"[" * 100_000, b"", "nested too deep"),
        (b'{"a": {"shape": [1]}}', b"", "entry of 'a' is damaged"),
        (b'{"a": 3}', b"", "entry of 'a' is damaged"),
        (b"\xff\xfe", b"", "not JSON"),
        ({"a": ENTRY | {"dtype": ["F32"]}}, b"0000", "entry of 'a' is damaged"),
        ({"a": ENTRY | {"dtype": "F8_E4M3"}}, b"0000", "unknown type F8_E4M3"),
        ({"a": ENTRY | {"shape": [True]}}, b"0000", "entry of 'a' is damaged"),
        ({"a": ENTRY | {"shape": [-1]}}, b"0000", "entry of 'a' is damaged"),
        ({"a": ENTRY | {"shape": [2**62, 4]}}, b"0000", "entry of 'a' is damaged"),
        ({"a": ENTRY | {"data_offsets": [0, 4, 8]}}, b"0000", "is damaged"),
        ({"a": ENTRY | {"data_offsets": [4, 0]}}, b"0000", "is damaged"),
        (
            {"a": {**ENTRY, "shape": [0, 2**62, 4], "data_offsets": [0, 0]}},
            b"",
            "shape",
        ),
        ({"a": ENTRY | {"shape": [1] * 99}}, b"0000", "a has a shape of none"),
        (TWO, b"0000", "cut short"),
        (TWO | {"b": ENTRY}, b"0" * 4, "overlap or leave holes at byte 0"),
        (TWO | {"b": ENTRY | {"data_offsets": [8, 12]}}, b"0" * 12, "holes at byte 8"),
        (TWO, b"0" * 9, "holds 1 bytes that belong to no array"),
    ],
)
def test_damaged_safetensors_headers(tmp_path, header, data, message):
    """Each was a traceback, or was read as something.

    Mutation: `_check_tiling` never called; `_layout` without its checks.
    """
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header, data))
    with pytest.raises(errors.DataError, match=message) as caught:
        safetensors_file.read(path)
    assert "\n" not in str(caught.value)
    for junk in (
        b"",
        b"1234567",
        (1 << 62).to_bytes(8, "little") + b"{}",
        b"<html>" * 9,
    ):
        path.write_bytes(junk)
        with pytest.raises(errors.DataError, match="not a safetensors file"):
            safetensors_file.read(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "weight_map: names no file"),
        (
            {"weight_map": {"x": "../other/model.safetensors"}},
            "no file of its own folder",
        ),
        ({"weight_map": {"x": "/etc/hostname"}}, "no file of its own folder"),
        ({"weight_map": {"x": "a\\b"}}, "no file of its own folder"),
        ({"weight_map": {"x": ".."}}, "no file of its own folder"),
        ({"weight_map": {"x": ["part"]}}, "no file of its own folder"),
        ({"weight_map": ["part"]}, "expected named values"),
        (
            {"weight_map": {"x": "absent.safetensors"}},
            "absent.safetensors: cannot be read",
        ),
        ([], "not a JSON object"),
    ],
)
def test_an_index_names_files_of_its_folder(neox, tmp_path, index, message):
    """Also the pointer of a released checkpoint.

    Mutation: `directory / part` without `folders.plain_name`.
    """
    (tmp_path / "config.json").write_bytes((neox / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(errors.DataError, match=message) as caught:
        convert.load_gpt_neox(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "", "a/b"])
def test_the_newest_step_is_a_folder_of_its_own(tmp_path, name):
    """Mutation: `directory / latest.read_text().strip()`."""
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "latest").write_text(name)
    with pytest.raises(errors.DataError, match="no file of its own folder"):
        convert.load_released(tmp_path / "run")


@pytest.mark.parametrize(
    "tree", [[], 3, {"a": 3}, {3: np.zeros(2)}, {"module": [1]}, {"module": {"x": 1}}]
)
def test_a_pickle_of_something_else(neox, tmp_path, tree):
    """Mutation: `trees.named_arrays` left out."""
    (tmp_path / "config.json").write_bytes((neox / "config.json").read_bytes())
    torch_file.write(tmp_path / "pytorch_model.bin", tree)
    assert refused(convert.load_gpt_neox, tmp_path).exit_code == 46
    torch_file.write(tmp_path / "mp_rank_00_model_states.pt", tree)
    assert refused(convert.load_released, tmp_path).exit_code == 46


@settings(FAST, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(
            "norm pos_emb num_attention_heads seq_length max_position_embeddings "
            "rms_norm_epsilon rotary_pct rotary_emb_base attn_memory_config".split()
        ),
        ODD,
        max_size=2,
    )
)
def test_any_yml_of_a_released_checkpoint(changes):
    """Mutation: `fields.get("attn_memory_config")` used as it is."""
    config = model.ModelConfig(
        vocab_size=8, embed_dim=8, num_layers=1, num_heads=2, seq_len=8, code_bits=4,
        score="l1_softmax", projection_options={"memory_bias": True},
    )  # fmt: skip
    fields = released.their_config(config) | changes
    piece = {"attention.query_proj.tables": np.zeros((2, 2), np.float32)}
    embedding = {"word_embeddings.weight": np.zeros((8, 8), np.float32)}
    pieces = {0: embedding, 2: piece}
    refused(lambda: released.model_config(folders.Fields(fields, "yml"), pieces, "yml"))


SPEC = tokenizer_lib.byte_level().spec
PLACES = [
    (*outer, key)
    for outer, part in (((), SPEC), (("model",), SPEC["model"]))
    for key in part
] + [("added_tokens", 0, key) for key in SPEC["added_tokens"][0]]


@settings(FAST, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(PLACES), ODD), min_size=1, max_size=2))
def test_any_tokenizer_file(changes):
    """Mutation: `_refused` without its `except`."""
    spec = json.loads(json.dumps(SPEC))
    for (*outer, key), value in changes:
        with contextlib.suppress(LookupError, TypeError):  # changed away before
            functools.reduce(operator.getitem, outer, spec)[key] = value
    text = json.dumps(spec)
    refused(lambda: tokenizer_lib.Tokenizer(text, "any").encode("a </s> b"))


@pytest.mark.parametrize(
    ("junk", "message"),
    [(b"abc", "not a tokenizer.json"), (b"\4\0\0\0abcd", "cannot encode")],
)
def test_a_panic_of_the_tokenizers_is_one_line(junk, message):
    """Of a file with a damaged table, when it is read or when it is used.

    Mutation: `except Exception` in `_refused`: a panic is none.
    """
    table = base64.b64encode(junk).decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    text = json.dumps(SPEC | {"normalizer": normalizer})
    with pytest.raises(errors.DataError, match=message) as caught:
        tokenizer_lib.Tokenizer(text, "any")
    assert "\n" not in str(caught.value)
