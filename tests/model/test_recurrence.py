"""A memory carried over chunks: what it computes, trains, decodes and refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle_recurrence
import pytest
import toy
from flax import nnx
from jax.sharding import PartitionSpec as P

from memoryformer import errors, model, sharding
from memoryformer.convert import gpt_neox, reference_reader, released
from memoryformer.evaluation import buckets
from memoryformer.generation import sampler
from memoryformer.model import mixers, recurrence, transformer

B, L, S = 4, 16, 4
SEGMENTS = np.array(
    [
        [1] * 6 + [0] * 2 + [2] * 8,
        [1] * 16,
        [0] * 5 + [1] * 11,
        [1] * 4 + [2] * 3 + [0] + [3] * 7 + [0],
    ],
    np.int32,
)
POSITIONS = toy.positions(SEGMENTS)
TOKENS = np.random.default_rng(0).integers(0, 13, (B, L), np.int32)
PAIRS = [(k, p) for k in recurrence.KINDS for p in ("memory", "dense")]
# Another mixer inside than softmax.
INSIDE = [
    ("rmt of luna", "memory"),
    ("memformer of linear", "dense"),
    ("pmi of cosformer", "dense"),
]
# Compiling takes the time here.
QUICK = [("rmt", "dense"), ("memformer", "memory"), ("pmi", "memory")]


def _marked(cases, quick):
    """All cases, those that are not `quick` left to the slow tests."""
    slow = [pytest.mark.slow]
    return [pytest.param(*case, marks=() if case in quick else slow) for case in cases]


SMALL = {"pmi": {"num_fragments": 2, "top_k": 2}}
every_kind = pytest.mark.parametrize(("kind", "projection"), _marked(PAIRS, QUICK))
every_mix = pytest.mark.parametrize(
    ("kind", "projection"), _marked(PAIRS + INSIDE, QUICK)
)


def _config(kind, projection, options=None, **fields):
    kind, _, mixer = kind.partition(" of ")
    sizes = {
        "mixer": mixer or "softmax",
        "vocab_size": 14,  # divides over two devices
        "num_layers": 1 if kind == "rmt" or (kind, projection) == QUICK[2] else 2,
        "seq_len": L,
        "recurrence_options": {"chunk_size": S, "num_slots": 3}
        | SMALL.get(kind, {})
        | (options or {}),
    }
    if projection == "memory":
        sizes["projection_options"] = {"memory_bias": False}
    return toy.model_config(projection, recurrence=kind, **(sizes | fields))


class Case:
    """A model with its parameters and compiled forms."""

    def __init__(self, kind, projection, bptt_chunks=0):
        self.config = _config(kind, projection, {"bptt_chunks": bptt_chunks})
        noise = np.random.default_rng(1)  # nothing starts at a constant
        self.params = jax.tree.map(
            lambda x: x + jnp.asarray(0.1 * noise.normal(size=x.shape), x.dtype),
            model.init(self.config),
        )
        self.forward = toy.quick_jit(self.features)
        self.step = toy.quick_jit(self._step)

    def features(self, params, tokens, positions=POSITIONS, segments=SEGMENTS):
        seq = mixers.SeqInfo(jnp.asarray(positions), jnp.asarray(segments))
        return model.merge(self.config, params).features(tokens, seq)[0]

    def _step(self, params, state, tokens, positions, segments):
        seq = mixers.SeqInfo(positions, segments)
        return model.merge(self.config, params).features(tokens, seq, state)

    def oracle(self, params, held=None):
        rest = (TOKENS, POSITIONS, SEGMENTS, held)
        return oracle_recurrence.features(self.config, _wide(params), *rest)


def _wide(tree):
    return jax.tree.map(functools.partial(np.asarray, dtype=np.float64), tree)


_case = functools.cache(Case)


@every_kind
def test_oracle(kind, projection):
    """Red if a chunk reads the memory after it, padding is written, or M_init is not b/|b|."""
    case, real = _case(kind, projection), SEGMENTS != 0
    got = np.asarray(case.forward(case.params, TOKENS))[real]
    want, memories = case.oracle(case.params)
    np.testing.assert_allclose(got, want[real], atol=1e-5 * np.abs(want).max())
    assert np.abs(memories[1] - memories[0]).max() > 0.1  # something is carried
    blank = [0 * memory for memory in memories]
    fresh = oracle_recurrence.features(
        dataclasses.replace(
            case.config,
            recurrence_options=dataclasses.replace(
                case.config.recurrence_options, bptt_chunks=1
            ),
        ),
        _wide(case.params),
        *(TOKENS, POSITIONS, SEGMENTS, blank),
    )[0]
    assert np.abs(fresh - want)[1, S:].max() > 1e-2  # and read


@every_mix
def test_no_future(kind, projection):
    """Exactly zero. Red if a chunk is handed the memory that it wrote itself."""
    case = _case(kind, projection)
    ones, row = np.ones_like(SEGMENTS), np.broadcast_to(np.arange(L), (B, L))
    rest = (row.astype(np.int32), ones)
    before = np.asarray(case.forward(case.params, TOKENS, *rest))
    for cut in (1, 4, 9):
        changed = TOKENS.copy()
        changed[:, cut:] = (changed[:, cut:] + 5) % 13
        after = np.asarray(case.forward(case.params, changed, *rest))
        np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
        assert np.abs(after[:, -1] - before[:, -1]).max() > 1e-3


SIZES = {"tokens": (1,) * L, "chunks": (4, 8, 4), "any": (6, 6, 4)}
QUICK_SIZES = [(*QUICK[0], "tokens"), (*QUICK[1], "any"), (*QUICK[2], "tokens")]
SPLITS = _marked(
    [(*pair, sizes) for pair in PAIRS + INSIDE for sizes in SIZES], QUICK_SIZES
)


@pytest.mark.parametrize(("kind", "projection", "sizes"), SPLITS)
def test_pieces_of_a_sequence_continue_each_other(kind, projection, sizes):
    """Red if a chunk is closed late, a memory is not reset, or positions count padding."""
    case = _case(kind, projection)
    whole = np.asarray(case.forward(case.params, TOKENS))
    state = model.merge(case.config, case.params).init_state(B, L)
    shapes, parts, start = jax.tree.map(jnp.shape, state), [], 0
    for size in SIZES[sizes]:
        part = np.s_[:, start : start + size]
        args = (TOKENS[part], POSITIONS[part], SEGMENTS[part])
        y, state = case.step(case.params, state, *args)
        assert jax.tree.map(jnp.shape, state) == shapes
        parts.append(y)
        start += size
    real = SEGMENTS != 0
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], whole[real], atol=1e-4)


def test_one_token_of_a_chunk_is_remembered():
    """Padding behind it, and the next chunk reads what was written. Mutation: `tokens > 1`."""
    case = _case(*QUICK[0])
    segments = np.ones((B, L), np.int32)
    segments[:, 1:S] = 0
    real = segments != 0
    positions = np.cumsum(segments, axis=1, dtype=np.int32) - 1  # one document
    whole = np.asarray(case.forward(case.params, TOKENS, positions, segments))
    state, parts = model.merge(case.config, case.params).init_state(B, L), []
    for i in range(L):
        part = np.s_[:, i : i + 1]
        args = (TOKENS[part], positions[part], segments[part])
        y, state = case.step(case.params, state, *args)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], whole[real], atol=1e-4)


@every_mix
def test_packed_documents_are_separate(kind, projection):
    """Red if a memory outlives its document."""
    case = _case(kind, projection)
    packed = np.asarray(case.forward(case.params, TOKENS))
    for row, document in ((0, 2), (3, 2), (3, 3)):
        places = np.flatnonzero(SEGMENTS[row] == document)
        alone, tokens = np.zeros_like(SEGMENTS), np.zeros_like(TOKENS)
        alone[0, : len(places)] = 1
        tokens[0, : len(places)] = TOKENS[row, places]
        y = case.forward(case.params, tokens, toy.positions(alone), alone)
        np.testing.assert_allclose(
            packed[row, places], y[0, : len(places)], atol=1e-5 * np.abs(packed).max()
        )


TRUNCATED = _marked(
    [(*pair, n) for pair in PAIRS for n in (0, 1, 2)], [(*QUICK[0], 0), (*QUICK[1], 2)]
)


@pytest.mark.parametrize(("kind", "projection", "bptt"), TRUNCATED)
def test_gradient(kind, projection, bptt):
    """Of every parameter against differences of the float64 oracle, in which the memories at
    the cuts stay what they are. Red if `bptt_chunks` cuts one chunk late, or not at all.
    """
    case = _case(kind, projection, bptt)
    weights = np.random.default_rng(2).normal(size=(B, L, case.config.embed_dim))
    weights = np.where((SEGMENTS != 0)[..., None], weights, 0)

    def loss(params):
        return jnp.sum(case.features(params, TOKENS) * weights.astype(np.float32))

    got = _wide(toy.quick_jit(jax.grad(loss))(case.params))
    got.pop("head")
    point = _wide(case.params)
    held = case.oracle(point)[1] if bptt else None
    leaves, treedef = jax.tree.flatten(point)
    rng, step = np.random.default_rng(3), 1e-6
    used = dict(jax.tree.leaves_with_path(got))
    for i, (path, leaf) in enumerate(jax.tree.leaves_with_path(point)):
        if path not in used:
            continue  # the head, which `features` stops before
        direction, ends = rng.normal(size=leaf.shape), []
        for side in (step, -step):
            moved = [*leaves[:i], leaf + side * direction, *leaves[i + 1 :]]
            y, _ = case.oracle(jax.tree.unflatten(treedef, moved), held)
            ends.append(np.sum(y * weights))
        want = (ends[0] - ends[1]) / (2 * step)
        scale = np.sqrt(np.sum(used[path] ** 2)) + 1e-2
        assert abs(np.sum(used[path] * direction) - want) / scale < 2e-3, path


@pytest.mark.parametrize(("kind", "projection"), _marked(PAIRS, QUICK[1:2]))
def test_eight_devices(kind, projection):
    """Outputs and gradients on a 4 x 2 mesh are those of one device.

    Red if slots are normalised over a device's part of D.
    """
    case = _case(kind, projection)
    shards = sharding.make("tensor:model=2")
    specs = shards.param_specs(model.param_specs(case.config), case.params)
    rows, act = P("data", None), P("data", None, "model")

    def grads_and_y(params, tokens, positions, segments, weights):
        def loss(params):
            y = case.features(params, tokens, positions, segments)
            return jnp.sum(y * weights), y

        return jax.grad(loss, has_aux=True)(params)

    def per_device(*args):
        grads, y = grads_and_y(*args)
        return sharding.sum_gradients(grads, specs), y

    weights = np.random.default_rng(2).normal(size=(B, L, 16)).astype(np.float32)
    args = (case.params, TOKENS, POSITIONS, SEGMENTS, weights)
    want = toy.quick_jit(grads_and_y)(*args)
    in_specs = (specs, rows, rows, rows, act)
    with shards.activate():
        function = toy.quick_jit(shards.shard_map(per_device, in_specs, (specs, act)))
        got = function(*shards.put(args, in_specs))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * (1 + np.abs(b).max()))


@every_kind
def test_codes_are_those_of_tokens(kind, projection):
    """Red if the codes of memory tokens are counted, or lost in the loop."""
    case = _case(kind, projection)
    batch = {"inputs": TOKENS, "positions": POSITIONS, "segment_ids": SEGMENTS}
    codes = buckets.codes(case.config, case.params, batch)
    assert bool(codes) == (projection == "memory")
    assert {c.shape[:2] for c in codes.values()} <= {(B, L)}
    assert ("blocks.0.mixer.qkv" in codes) == (projection == "memory")


@pytest.mark.parametrize(("kind", "projection"), _marked(PAIRS, QUICK[:1]))
def test_generation(kind, projection):
    """Prompts of unequal lengths, greedily: the argmax of the whole forward pass.

    Red if a padded prompt's chunks begin elsewhere than alone.
    """
    case = _case(kind, projection)
    generator = sampler.Generator(case.config, case.params)
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7]]
    sampling = sampler.SamplingConfig(max_tokens=9, temperature=0.0)
    streamed = list(generator.stream_batch(prompts, sampling))
    forward = toy.quick_jit(functools.partial(model.forward, case.config))
    for i, prompt in enumerate(prompts):
        tokens = prompt + [row[i] for row in streamed]
        padded = np.zeros((1, L), np.int32)
        padded[0, : len(tokens)] = tokens
        best = np.argmax(forward(case.params, padded)[0], axis=-1)
        np.testing.assert_array_equal(
            tokens[len(prompt) :], best[len(prompt) - 1 : len(tokens) - 1]
        )


REFUSED = {
    "no divisor": ({"options": {"chunk_size": 5}}, "does not divide model.seq_len"),
    "two-sided": ({"causal": False}, "model.causal=False"),
    "unknown": ({"recurrence": "rmtt"}, "did you mean 'rmt'"),
    "no slots": ({"options": {"num_slots": 0}}, "recurrence_options.num_slots=0"),
    "negative": ({"options": {"bptt_chunks": -1}}, "recurrence_options.bptt_chunks=-1"),
    "cold": (
        {"kind": "memformer", "options": {"temperature": 0.0}},
        "recurrence_options.temperature=0.0",
    ),
    "another's": ({"options": {"temperature": 1.0}}, "an option of memformer"),
    "no fragments": (
        {"kind": "pmi", "options": {"num_fragments": 0}},
        "recurrence_options.num_fragments=0",
    ),
    "share": (
        {"kind": "pmi", "options": {"working_share": 1.1}},
        r"recurrence_options.working_share=1.1: must be between 0 and 1",
    ),
    "positions": (
        {
            "mixer": "linformer",
            "options": {"num_slots": 8},
            "mixer_options": {"max_len": 16},
        },
        r"mixer_options.max_len=16.* 20 positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_combinations_are_refused(name):
    """Red if a check is left out."""
    fields, message = REFUSED[name]
    kind = fields.get("kind", "rmt")
    fields = {key: value for key, value in fields.items() if key != "kind"}
    with pytest.raises(errors.ConfigError, match=message) as error:
        _config(kind, "memory", **fields) if "recurrence" not in fields else (
            toy.model_config(recurrence=fields["recurrence"])
        )
    assert "\n" not in str(error.value)


def test_formats_without_a_memory_refuse_it():
    """Red if a checkpoint of another format is written without the memory."""
    with pytest.raises(errors.ConfigError, match=r"recurrence='rmt'"):
        gpt_neox.their_config(_config("rmt", "dense"), None)
    options = {"memory_bias": True, "extra_bits": 2}
    fields = {"score": "l1_softmax", "projection_options": options}
    with pytest.raises(errors.ConfigError, match=r"recurrence='memformer'"):
        released.their_config(_config("memformer", "memory", **fields))
    with pytest.raises(ValueError, match=r"recurrence='rmt'"):
        reference_reader.Model(dataclasses.asdict(_config("rmt", "memory")), {})


@pytest.mark.parametrize("mesh", ["sequence:sequence=2", "tensor:model=2,sequence=2"])
def test_a_sequence_axis_is_refused(mesh):
    """Red if every device runs a memory of its own over its part of the rows."""
    with pytest.raises(errors.ConfigError, match=r"cannot run over a 'sequence' axis"):
        model.partition_specs(_config("rmt", "memory"), sharding.make(mesh))


def test_only_a_memory_goes_from_past_to_future():
    """A model without one may look both ways. Mutation: no early return in `validate`."""
    both_ways = {"mixer": "luna", "causal": False}
    assert not toy.model_config("dense", **both_ways).causal
    with pytest.raises(errors.ConfigError, match=r"model\.causal=False"):
        toy.model_config("dense", **both_ways, recurrence="rmt")


def test_only_rmt_takes_places_of_the_trunk():
    """Its slots stand before and behind a chunk, those of the others beside the trunk.

    Mutation: a place more, or fewer, for either.
    """
    for name, more in (("rmt", 6), ("memformer", 0), ("pmi", 0)):
        options = {"chunk_size": 4, "num_slots": 3}
        config = toy.model_config("dense", recurrence=name, recurrence_options=options)
        assert recurrence.capacity(config) == 4 + more


def test_positions_of_a_chunk_count_its_real_tokens():
    """From 0, or on from the tokens before; padding takes no place. A rotary code would not
    notice a shift.

    Mutation tried: `count + 1` for `count - 1` in `sequence`.
    """
    kind = toy.model_config(
        "dense", recurrence="memformer", recurrence_options={"chunk_size": 4}
    )
    chunk = model.merge(kind, model.init(kind)).recurrence
    ones = jnp.ones((2, 4), bool)
    arange = np.broadcast_to(np.arange(4), (2, 4))
    np.testing.assert_array_equal(chunk.sequence(ones).positions, arange)
    np.testing.assert_array_equal(chunk.sequence(ones, 5).positions, 5 + arange)
    tokens = jnp.array([0, 5])
    later = np.array([[0], [5]]) + arange
    np.testing.assert_array_equal(chunk.sequence(ones, tokens).positions, later)
    padded = jnp.array([[True, False, True, False]])
    seq = chunk.sequence(padded, 1)
    assert seq.positions[0, ::2].tolist() == [1, 2]
    assert seq.segment_ids.tolist() == [[1, 0, 1, 0]]


def test_a_chunk_is_a_quarter_of_a_row_unless_said():
    """And takes that many positions of the trunk. Mutations: a product; a fifth."""
    for name in recurrence.KINDS:
        config = toy.model_config("dense", recurrence=name, seq_len=32)
        assert recurrence.chunk_size(config) == 8
        slots = 2 * config.recurrence_options.num_slots if name == "rmt" else 0
        assert recurrence.capacity(config) == 8 + slots
    with pytest.raises(errors.ConfigError, match=r"\.chunk_size=0 does not divide"):
        toy.model_config("dense", recurrence="rmt", seq_len=3)
    config = toy.model_config("dense", recurrence="none", seq_len=3)
    assert recurrence.make(config, None, None, rngs=None) is None


def test_a_mixer_with_just_enough_positions_is_taken():
    """Mutation: `<=` for `<`."""

    def make(max_len, num_slots):
        return toy.model_config(
            "dense",
            mixer="linformer",
            mixer_options={"max_len": max_len},
            recurrence="rmt",
            recurrence_options={"chunk_size": 8, "num_slots": num_slots},
            seq_len=16,
        )

    for limit in (16, 20):
        assert recurrence.capacity(make(limit, 4)) == 16
    with pytest.raises(errors.ConfigError, match="takes 18 positions; raise it to 18"):
        make(17, 5)


def test_how_memories_begin():
    """RMT's as embeddings, Memformer's slots of length 1, PMI's of 1 and, long-term, sqrt(D).

    Mutations: another standard deviation; the slots not normalised.
    """
    options = {"chunk_size": 4, "num_slots": 60}
    fields = {"recurrence_options": options, "embed_std": 0.3}
    for name, std in (("rmt", 0.3), ("memformer", 0.25), ("pmi", 0.25)):
        config = toy.model_config("dense", recurrence=name, num_layers=1, **fields)
        rngs = nnx.Rngs(0)
        project = functools.partial(transformer.make_projection, config, rngs=rngs)
        norm = functools.partial(transformer.make_norm, config)
        made = recurrence.make(config, project, norm, rngs=rngs)
        first = {"rmt": "memory", "memformer": "bias", "pmi": "working"}
        own = np.asarray(getattr(made, first[name])[...])
        assert own.shape == (60, 16)
        assert abs(np.std(own) / std - 1) < 0.1
        if name == "memformer":
            lengths = np.linalg.norm(made.initial(), axis=-1)
            np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        if name == "pmi":
            assert abs(np.std(made.long_term[...]) - 1) < 0.1
            np.testing.assert_array_equal(made.initial()[:60], own)
            np.testing.assert_array_equal(made.initial()[-60:], made.long_term[4])


def test_short_names_keep_their_sizes():
    """A sweep's point is named by them: another size is another name."""
    slots = {"rmt": 16, "memformer": 64, "pmi": 8}
    assert recurrence.settings() == {
        name: {"recurrence": name, "recurrence_options": {"num_slots": count}}
        for name, count in slots.items()
    }
