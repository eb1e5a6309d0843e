"""Every field of a config: its default, and both sides of each bound, in one table.

A recipe on file names only what it changes, so a default is part of what it says.
"""

import dataclasses

import pytest
import toy

from memoryformer import config as config_lib
from memoryformer import data
from memoryformer.data import corpora
from memoryformer.errors import ConfigError
from memoryformer.generation import sampler
from memoryformer.model import ModelConfig, mixers, recurrence
from memoryformer.runs.checkpoint import CheckpointConfig
from memoryformer.training import experiment
from memoryformer.training.optimizer import OptimizerConfig

MODEL = {
    "mixer": "softmax",
    "projection": "memory",
    "code_bits": 8,
    "score": "softmax",
    "lookup": "auto",
    "norm": "rmsnorm",
    "norm_eps": 1e-8,
    "residual": "sequential",
    "ffn_activation": "none",
    "output_projection": False,
    "rotary_fraction": 0.25,
    "rotary_base": 10_000.0,
    "tie_embeddings": False,
    "sequence_chunk": 0,
    "remat": "none",
    "scan_layers": False,
    "embed_std": 0.02,
    "head_std": 0.02,
    "mixer_std": 0.02,
    "ffn_std": 0.02,
    "causal": True,
    "dtype": "float32",
}
OPTIONS = {  # the field that chooses, what it chooses: options
    ("projection", "memory"): {
        "extra_bits": 2,
        "temperature": 1.0,
        "memory_bias": False,
        "bias_std": 0.0,
        "rows_read": 1,
        "ngram_rows": 0,
        "ngram_order": 3,
        "token_rows": False,
    },
    ("projection", "dense"): {
        "ffn_multiple": 4,
        "output_std": 0.02,
        "ngram_rows": 0,
        "ngram_order": 3,
        "token_rows": False,
    },
    ("mixer", "softmax"): {
        "attention": "xla",
        "logit_transform": "none",
        "dape_width": 32,
    },
    ("mixer", "linear"): {"prefix_chunk": 64, "feature_map": "elu"},
    ("mixer", "trained_kernel"): {"prefix_chunk": 64, "depth": 3},
    ("mixer", "performer"): {
        "prefix_chunk": 64,
        "num_features": 256,
        "redraw_every": 0,
    },
    ("mixer", "cosformer"): {"prefix_chunk": 64, "max_len": 0},
    ("mixer", "linformer"): {"prefix_chunk": 64, "num_slots": 64, "max_len": 0},
    ("mixer", "luna"): {
        "prefix_chunk": 64,
        "num_slots": 64,
        "temperature": "sqrt",
        "values": True,
        "stream": False,
    },
    ("mixer", "conv_luna"): {
        "prefix_chunk": 64,
        "num_slots": 64,
        "temperature": "learn",
        "values": True,
        "stream": False,
        "filter": "conv",
        "width": 4,
    },
    ("mixer", "mamba2"): {
        "prefix_chunk": 64,
        "state_size": 64,
        "expand": 2,
        "width": 4,
    },
    ("mixer", "recurformer"): {
        "prefix_chunk": 64,
        "recurrent_heads": (),
        "head_order": (),
        "width": 4,
        "attention": "xla",
    },
    ("recurrence", "none"): {},
    ("recurrence", "rmt"): {"chunk_size": 0, "num_slots": 16, "bptt_chunks": 0},
    ("recurrence", "memformer"): {
        "chunk_size": 0,
        "num_slots": 16,
        "bptt_chunks": 0,
        "temperature": 0.5,
    },
    ("recurrence", "pmi"): {
        "chunk_size": 0,
        "num_slots": 16,
        "bptt_chunks": 0,
        "num_fragments": 5,
        "top_k": 5,
        "working_share": 0.7,
    },
}
DEFAULTS = {
    OptimizerConfig: {
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "schedule": "cosine",
        "schedule_options": {"decay_steps": 0, "end_fraction": 0.1},
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "table_learning_rate_scale": 1.0,
        "decay_tables": True,
        "clip_norm": 1.0,
        "table_state": "full",
        "table_state_options": {},
    },
    CheckpointConfig: {
        "every_steps": 1000,
        "every_minutes": 0.0,
        "keep": 2,
        "keep_every": 0,
    },
    data.DataConfig: {
        "source": "stdlib",
        "source_options": {"validation_every": 20, "max_documents": 0},
        "path": "",
        "tokenizer": "bpe:4096",
        "end_token": "",
        "data_dir": "",
        "align_documents": 0,
    },
    sampler.SamplingConfig: {
        "max_tokens": 200,
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 0,
    },
    experiment.EvalConfig: {"every_steps": 0, "batch_size": 16, "num_batches": 0},
}


TEXT_OPTIONS = {
    "validation_every": 20,
    "max_documents": 0,
    "text_field": "text",
    "validation_path": "",
    "separator": "",
}
PART_OPTIONS = {"part_bytes": 32 << 20, "deduplicate": False}
WSD_OPTIONS = {"decay_steps": 0, "end_fraction": 0.1, "cooldown_fraction": 0.2}
LEAN_OPTIONS = {
    "second_moment": "row",
    "moment_dtype": "bfloat16",
    "dtype": "float32",
    "rounding": "nearest",
}


@pytest.mark.parametrize("cls", DEFAULTS, ids=lambda cls: cls.__name__)
def test_defaults(cls):
    """Mutation: any default of a section."""
    assert dataclasses.asdict(cls()) == DEFAULTS[cls]


def test_defaults_of_a_model():
    """Mutations: any default of a model, or of an option of a mixer."""
    config = ModelConfig(8, 16, 1, 2, 8)
    values = dataclasses.asdict(config)
    assert {name: values[name] for name in MODEL} == MODEL
    assert (config.vocab_size, config.embed_dim, config.num_layers) == (8, 16, 1)
    assert (config.num_heads, config.seq_len) == (2, 8)
    assert (config.head_dim, config.num_tables) == (8, 2)
    for (chooser, choice), defaults in OPTIONS.items():
        chosen = ModelConfig(8, 16, 1, 2, 8, **{chooser: choice})
        options = getattr(chosen, f"{chooser}_options")
        assert dataclasses.asdict(options) == defaults, choice
    known = {"mixer": {*mixers.MIXERS}, "recurrence": {"none", *recurrence.KINDS}}
    known["projection"] = {"memory", "dense"}
    for chooser, choices in known.items():
        assert {choice for field, choice in OPTIONS if field == chooser} == choices


def test_defaults_of_a_corpus():
    """As those of a text source. Mutation: any default of TextConfig."""
    fields = {f.name: f.default for f in dataclasses.fields(corpora.TextConfig)}
    defaults = TEXT_OPTIONS | {"path": "", "json_only": False}
    assert {name: fields[name] for name in defaults} == defaults
    assert dataclasses.asdict(text_of().source_options) == TEXT_OPTIONS | PART_OPTIONS
    wsd = OptimizerConfig(schedule="wsd").schedule_options
    assert dataclasses.asdict(wsd) == WSD_OPTIONS
    lean = OptimizerConfig(table_state="lean").table_state_options
    assert dataclasses.asdict(lean) == LEAN_OPTIONS
    skip = train_of(spikes="skip").spikes_options
    assert dataclasses.asdict(skip) == {"sigmas": 6.0, "window": 128}


def model_of(**fields):
    return toy.model_config(**fields)


def train_of(**fields):
    return experiment.TrainConfig(num_steps=1, batch_size=1, **fields)


def text_of(**fields):
    return data.DataConfig(**{"source": "text", "path": "x"} | fields)


HUGE = 2**31
BOUNDS = [  # what makes the section, name in messages, field, values taken, values refused
    *(
        (model_of, "model", name, [], [0, -1])
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "seq_len")
    ),
    (model_of, "model", "vocab_size", [1], []),
    (model_of, "model", "num_layers", [1], []),
    (model_of, "model", "num_heads", [1, 2, 16], [3, 32]),
    (model_of, "model", "seq_len", [1], []),
    (model_of, "model", "sequence_chunk", [0, 1], [-1]),
    (model_of, "model", "code_bits", [1, 2, 8], [0, 17, 5]),
    (OptimizerConfig, "optimizer", "learning_rate", [0.0], [-1e-6]),
    (OptimizerConfig, "optimizer", "warmup_steps", [0, 1], [-1]),
    (OptimizerConfig, "optimizer", "schedule", ["constant", "wsd"], ["linear"]),
    (OptimizerConfig, "optimizer", "b1", [0.0, 0.99], [-0.1, 1.0]),
    (OptimizerConfig, "optimizer", "b2", [0.0, 0.99], [-0.1, 1.0]),
    (OptimizerConfig, "optimizer", "eps", [1e-12], [0.0]),
    (OptimizerConfig, "optimizer", "weight_decay", [0.0], [-0.1]),
    (OptimizerConfig, "optimizer", "table_learning_rate_scale", [0.0], [-0.1]),
    (OptimizerConfig, "optimizer", "clip_norm", [0.0], [-0.1]),
    (OptimizerConfig, "optimizer", "table_state", ["lean"], ["leaner"]),
    (CheckpointConfig, "checkpoint", "every_steps", [0], [-1]),
    (CheckpointConfig, "checkpoint", "every_minutes", [0.0], [-0.5]),
    (CheckpointConfig, "checkpoint", "keep", [1], [0]),
    (CheckpointConfig, "checkpoint", "keep_every", [0], [-1]),
    (train_of, "train", "max_skipped", [0, 1], [-1]),
    (train_of, "train", "timeout_scale", [0.0, 0.1], [-0.1]),
    (train_of, "train", "spikes", ["skip"], ["drop"]),
    (experiment.EvalConfig, "eval", "batch_size", [1], [0]),
    (experiment.EvalConfig, "eval", "every_steps", [0], [-1]),
    (experiment.EvalConfig, "eval", "num_batches", [0], [-1]),
    (text_of, "data", "align_documents", [0, 1], [-1]),
    (text_of, "data", "path", ["y"], ["", "gs://bucket/x"]),
    (text_of, "data", "data_dir", ["y"], ["gs://bucket/x"]),
    (text_of, "data", "end_token", [""], ["<x>"]),
    (sampler.SamplingConfig, "", "max_tokens", [1], [0, -1]),
    (sampler.SamplingConfig, "", "temperature", [0.0, 5.0], [-0.1, float("inf")]),
    (sampler.SamplingConfig, "", "top_p", [0.01, 1.0], [0.0, 1.01, float("nan")]),
    (sampler.SamplingConfig, "", "seed", [-HUGE, HUGE - 1], [-HUGE - 1, HUGE]),
]


def _test_id(value):
    return value if isinstance(value, str) else None


@pytest.mark.parametrize("make, section, field, good, bad", BOUNDS, ids=_test_id)
def test_bounds(make, section, field, good, bad):
    """The last value that is taken, and the first that is refused, with its name and value.

    Mutations: any check of a section left out, or its bound moved by one.
    """
    for value in good:
        assert getattr(make(**{field: value}), field) == value
    name = f"{section}.{field}" if section else field
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            make(**{field: value})
        message = str(caught.value)
        assert f"{name}={value!r}" in message or f"{name}: " in message
        assert "\n" not in message


def test_bits_share_sixteen():
    """Codes of the second feed-forward layer too. Mutations: 17 or 15 for 16."""
    assert model_of(code_bits=16, projection_options={"extra_bits": 0}).num_tables == 1
    for code_bits, extra_bits in ((16, 1), (8, 9)):
        options = {"extra_bits": extra_bits}
        with pytest.raises(ConfigError, match=r"code_bits \+ extra_bits <= 16"):
            model_of(code_bits=code_bits, projection_options=options)
    dense = model_of(projection="dense", code_bits=99)
    assert dense.code_bits == 99  # not looked at


@pytest.mark.parametrize(
    "code_bits, embed_dim, advice",
    [(4, 30, "28 or 32"), (8, 6, "8 or 8"), (3, 16, "15 or 18")],
)
def test_a_width_that_codes_cannot_cover(code_bits, embed_dim, advice):
    """The nearest that they can. Mutations: any sign of the advice turned round."""
    with pytest.raises(ConfigError, match=f"try embed_dim={advice}"):
        model_of(code_bits=code_bits, embed_dim=embed_dim)


@pytest.mark.parametrize(
    "source, field",
    [
        ("stdlib", "text_field"),
        ("stdlib", "name"),
        ("c4", "separator"),
        ("tfds", "separator"),
        ("tfds", "validation_path"),
        ("text", "name"),
        ("prepared", "max_documents"),
        ("prepared", "validation_every"),
        ("prepared", "text_field"),
    ],
)
def test_an_option_that_a_source_does_not_use_is_refused(source, field):
    """Mutation: an option of its base class more."""
    message = rf"^data\.source_options\.{field}: source='{source}' has no such option"
    with pytest.raises(ConfigError, match=message):
        data.DataConfig(source=source, source_options={field: "x"}, path="x")


def test_the_standard_library_has_no_path():
    """Mutation: the check left out."""
    with pytest.raises(
        ConfigError, match=r"^data\.path='x': data\.source='stdlib' does"
    ):
        data.DataConfig(path="x")


@pytest.mark.parametrize("source", ["text", "c4", "prepared"])
def test_sources_that_need_a_path(source):
    with pytest.raises(ConfigError, match=rf"data\.path='': data\.source='{source}'"):
        data.DataConfig(source=source)


def test_a_tfds_source_needs_a_name():
    """Mutation: the check left out."""
    with pytest.raises(
        ConfigError, match=r"options\.name='': data\.source='tfds' needs"
    ):
        data.DataConfig(source="tfds")
    options = {"name": "lm1b", "text_field": "body"}
    named = data.DataConfig(source="tfds", source_options=options, path="y")
    assert (named.path, named.name) == ("y", "lm1b")
    assert (named.source_options.text_field, data.DataConfig().name) == ("body", "")


def test_where_data_lies_may_differ():
    """Between the processes of a run. Mutation: `local=False` of either."""
    described = config_lib.described(experiment.Experiment)
    local = {name for name, (_, here) in described.items() if here}
    assert {n for n in local if n.startswith("data.")} == {"data.path", "data.data_dir"}


OPTION_BOUNDS = [  # what is chosen, option, values taken, values refused
    ({"mixer": "softmax"}, "dape_width", [1], [0]),
    *(
        ({"mixer": name}, "prefix_chunk", [1], [0])
        for name in mixers.MIXERS
        if name != "softmax"
    ),
    ({"mixer": "trained_kernel"}, "depth", [1], [0]),
    ({"mixer": "performer"}, "num_features", [1], [0]),
    ({"mixer": "performer"}, "redraw_every", [0, HUGE - 1], [-1, HUGE]),
    ({"mixer": "cosformer"}, "max_len", [0, 12, 13], [-1, 11]),
    ({"mixer": "linformer"}, "num_slots", [1], [0]),
    ({"mixer": "linformer"}, "max_len", [0, 12, 13], [-1, 11]),
    ({"mixer": "luna"}, "num_slots", [1], [0]),
    ({"mixer": "luna"}, "temperature", ["unit", "learn"], ["cold"]),
    ({"mixer": "conv_luna"}, "num_slots", [1], [0]),
    ({"mixer": "conv_luna"}, "width", [1], [0]),
    ({"mixer": "mamba2"}, "state_size", [1], [0]),
    ({"mixer": "mamba2"}, "expand", [1], [0]),
    ({"mixer": "mamba2"}, "width", [1], [0]),
    (
        {"mixer": "recurformer"},
        "recurrent_heads",
        [(2,), (0, 2)],
        [(3,), (0, -1), (1, 1, 1)],
    ),
    ({"mixer": "recurformer"}, "head_order", [(1, 0, 0, 1)], [(0, 1), (1, 1, 0, 0)]),
    ({"mixer": "recurformer"}, "width", [1], [0]),
    ({"mixer": "recurformer"}, "attention", ["auto"], ["flash"]),
    ({"mixer": "conv_luna"}, "filter", ["pool"], ["mean"]),
    ({"recurrence": "rmt"}, "chunk_size", [1, 3, 12], [-1, 5, 13]),
    ({"recurrence": "rmt"}, "num_slots", [1], [0]),
    ({"recurrence": "rmt"}, "bptt_chunks", [0, 1], [-1]),
    ({"recurrence": "memformer"}, "temperature", [0.1], [0.0]),
    ({"projection": "memory"}, "extra_bits", [0, 12], [-1, 13]),
    ({"projection": "memory"}, "temperature", [0.1], [0.0, -0.5]),
    ({"source": "text"}, "validation_every", [2], [1]),
    ({"source": "text"}, "max_documents", [0, 1], [-1]),
    ({"source": "text"}, "text_field", ["body"], [""]),
    ({"source": "text"}, "validation_path", ["y"], ["gs://bucket/x"]),
    ({"schedule": "cosine"}, "decay_steps", [0, 1], [-1]),
    ({"schedule": "wsd"}, "end_fraction", [0.0, 1.0], [-0.1, 1.1]),
    ({"schedule": "wsd"}, "cooldown_fraction", [0.1, 1.0], [0.0, 1.1]),
    ({"table_state": "lean"}, "second_moment", ["full"], ["rows"]),
    ({"table_state": "lean"}, "moment_dtype", ["float32", "none"], ["x"]),
    ({"table_state": "lean"}, "dtype", ["bfloat16"], ["int8"]),
    ({"table_state": "lean"}, "rounding", [], ["up", "stochastic"]),
    ({"spikes": "skip"}, "sigmas", [0.0, 0.1], [-0.1]),
    ({"spikes": "skip"}, "window", [2], [1]),
    ({"recurrence": "pmi"}, "num_fragments", [1], [0]),
    ({"recurrence": "pmi"}, "top_k", [0], [-1]),
    ({"recurrence": "pmi"}, "working_share", [0.0, 1.0], [-0.1, 1.1]),
]


@pytest.mark.parametrize("fields, option, good, bad", OPTION_BOUNDS, ids=_test_id)
def test_bounds_of_options(fields, option, good, bad):
    """As above, of mixers, sources, schedules and the like.

    Mutations: a check of a choice left out, or its bound moved by one.
    """
    [chooser] = fields
    section = f"{chooser}_options"
    make, name = {
        "source": (text_of, "data"),
        "schedule": (OptimizerConfig, "optimizer"),
        "table_state": (OptimizerConfig, "optimizer"),
        "spikes": (train_of, "train"),
    }.get(chooser, (model_of, "model"))
    for value in good:
        config = make(**fields, **{section: {option: value}})
        assert getattr(getattr(config, section), option) == value
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            make(**fields, **{section: {option: value}})
        assert f"{name}.{section}.{option}={value!r}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_options_of_softmax_alone():
    """Taken by softmax, refused elsewhere, and not both at once.

    Mutations: `and` for `or` in its checks; a check left out.
    """
    both = {"attention": "cudnn", "logit_transform": "dape_v2"}
    with pytest.raises(ConfigError, match=r"cudnn.*never forms the logits"):
        model_of(mixer_options=both)
    for name, value in both.items():
        options = {name: value}
        model_of(mixer_options=options)
        with pytest.raises(ConfigError, match=r"model\.causal=False"):
            model_of(causal=False, mixer_options=options)
        with pytest.raises(ConfigError, match=rf"\.{name}: mixer='linear' has no such"):
            model_of(mixer="linear", mixer_options=options)
        with pytest.raises(ConfigError, match="cannot run over a 'sequence' axis"):
            mixers.check_sequence(model_of(mixer_options=options), 2)
    assert not model_of(causal=False).causal
    with pytest.raises(ConfigError, match="has only a causal form"):
        model_of(mixer="linear", causal=False)


def test_options_of_a_stack():
    """A recurrence has its own loop.

    Mutations: `and` for `or`; either check left out.
    """
    for fields in ({"remat": "full"}, {"scan_layers": True}):
        model_of(**fields)
        with pytest.raises(ConfigError, match="runs blocks in its own loop"):
            model_of(recurrence="rmt", **fields)
    assert model_of(mixer="performer", scan_layers=True).scan_layers
    with pytest.raises(ConfigError, match=r"model\.remat='al'"):
        model_of(remat="al")
