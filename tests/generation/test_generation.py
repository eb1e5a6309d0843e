"""Sampling: cache = full forward, rows alone = rows together, stop strings, files."""

import functools
import gzip
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from memoryformer import convert, errors, model
from memoryformer.data import tokenizer as tokenizer_lib
from memoryformer.generation import __main__ as command
from memoryformer.generation import choosing, sampler
from memoryformer.generation import prompts as prompts_lib
from memoryformer.generation import text as text_lib

PROMPTS = [[5, 1, 7], [2], [3, 4, 8, 1, 0]]


@functools.cache
def make(mixer="softmax", vocab_size=31):
    config = model.ModelConfig(
        vocab_size=vocab_size,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        seq_len=64,
        code_bits=4,
        mixer=mixer,
        mixer_std=0.5,
        ffn_std=0.5,
        head_std=1.0,
    )
    return config, model.init(config, 1)


@functools.cache
def small_generator():
    """One generator for several tests: compiling it is what takes their time."""
    return sampler.Generator(*make())


def test_greedy_equals_the_argmax_of_the_full_forward_pass():
    """24 tokens after prompts of 1, 3 and 5.

    Red when the cache is read one position late or positions do not go on.
    """
    config, params = make()
    generator = small_generator()
    sampling = sampler.SamplingConfig(max_tokens=24, temperature=0.0)
    forward = jax.jit(lambda tokens: model.forward(config, params, tokens))
    for prompt in PROMPTS:
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, : len(prompt)] = prompt
        for i in range(len(prompt), len(prompt) + 24):
            tokens[0, i] = np.asarray(forward(tokens))[0, i - 1].argmax()
        expected = tokens[0, len(prompt) : len(prompt) + 24].tolist()
        assert list(generator.stream(prompt, sampling)) == expected


@pytest.mark.parametrize(
    ("projection", "streams"),
    [
        ("memory", 2),
        ("dense", 1),
        pytest.param("memory", 1, marks=pytest.mark.slow),
        pytest.param("dense", 2, marks=pytest.mark.slow),
    ],
)
def test_a_model_in_bfloat16_decodes(projection, streams):
    """XLA CPU compiles some products of bfloat16 operands and cannot run them."""
    fields = {"lookup": "auto"} if projection == "memory" else {}
    config = toy.model_config(projection, dtype="bfloat16", **fields)
    generator = sampler.Generator(config, model.init(config, 0))
    sampling = sampler.SamplingConfig(max_tokens=4, temperature=0.0)
    prompts = [[1, 2, 3], [4, 5, 6]][:streams]
    tokens = np.array(list(generator.stream_batch(prompts, sampling))).T
    inputs = np.concatenate([np.array(prompts), tokens], axis=1)
    logits = toy.forward(config, generator.params, inputs)[:, 2:-1]
    chosen = np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    assert (logits.max(axis=-1) - chosen).max() < 0.05 * np.abs(logits).max()


def test_a_cache_is_written_in_place():
    """The compiled loop never copies or turns a whole cache, and hands it on without one.

    Mutation: keys kept as [B, M, H, E], which a product by head has to transpose.
    """
    generator = small_generator()
    state = generator._init_state(1, 600)  # 640 slots: no other array has this shape
    args = (jnp.zeros((1, 31)), jnp.zeros((1,), jnp.int32))
    keys = jax.random.split(jax.random.key(0), 1)
    knobs = (16, jnp.float32(0.8), jnp.float32(0.9))
    decode = generator._decode.lower(generator.params, state, *args, keys, *knobs)
    program = decode.compile().as_text()
    made = re.findall(r"%(\S+) = \w+\[([\d,]*)\]\S* (\w[\w-]*)\(", program)
    caches = [
        (name, operation)
        for name, shape, operation in made
        if math.prod(map(int, filter(None, shape.split(",")))) == 640 * 16
    ]
    passed_on = ("parameter", "get-tuple-element", "bitcast", "dynamic-update-slice")
    assert any(operation == "parameter" for _, operation in caches)
    for name, operation in caches:
        written = operation == "fusion" and "dynamic-update-slice" in name
        assert operation in passed_on or written, (name, operation)
    assert program.splitlines()[0].count("may-alias") >= len(jax.tree.leaves(state))


@pytest.mark.parametrize(
    "mixer", ["softmax", pytest.param("cosformer", marks=pytest.mark.slow)]
)
def test_rows_together_are_rows_alone(mixer):
    """Row i of a batch with seed s is the prompt alone with seed s + i.

    Red when padding before a short prompt is seen, shifts its positions, or when rows share
    one key.
    """
    generator = (
        small_generator() if mixer == "softmax" else sampler.Generator(*make(mixer))
    )
    sampling = sampler.SamplingConfig(12, 1.0, 0.9, 5)
    together = list(generator.stream_batch(PROMPTS, sampling))
    for i, prompt in enumerate(PROMPTS):
        alone = sampler.SamplingConfig(12, 1.0, 0.9, 5 + i)
        assert [row[i] for row in together] == list(generator.stream(prompt, alone))
    first, second = zip(
        *generator.stream_batch([PROMPTS[0]] * 2, sampling), strict=True
    )
    assert first != second


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.95, 1.0])
def test_nucleus_is_that_of_a_full_sort(top_p):
    """Flat, peaked, tied and impossible logits: the tokens that come before the mass is held.

    Mutation: `bits >= middle` counts a token's own mass, and drops the last of the nucleus.
    """
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 3001)).astype(np.float32)
    logits *= np.array([[0.01], [1], [3], [20], [1], [0]], np.float32)
    logits[4] = np.round(logits[4])  # ties stay together
    logits[2, ::7] = -np.inf
    got = np.asarray(jax.jit(choosing.in_nucleus)(logits, top_p))
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(axis=-1, keepdims=True)
    for row, mass, inside in zip(logits, exact, got, strict=True):
        ordered = np.sort(row)[::-1]
        before = np.cumsum(np.sort(mass)[::-1]) - np.sort(mass)[::-1]
        # Sums in float32 may place the border between two tokens of nearly this mass.
        for share, least in ((top_p - 1e-5, True), (top_p + 1e-5, False)):
            want = row >= ordered[max((before < share).sum() - 1, 0)]
            assert not np.any(want & ~inside if least else inside & ~want)


def test_samples_have_the_nucleus_distribution():
    """20,000 draws at temperature 0.5 and top_p 0.9 against softmax over the nucleus.

    Mutation: logits that are not divided by the temperature.
    """
    logits = np.array([2.0, -1.0, 1.0, 0.5, 1.5, -2.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(choosing.choose, (None, 0, None, None)))
    counts = np.bincount(
        np.asarray(draw(logits[None], keys, 0.5, 0.9))[:, 0], minlength=6
    )
    mass = np.exp(logits / 0.5) * [1, 0, 1, 0, 1, 0]  # 0.64, 0.24, 0.09: the first 0.9
    np.testing.assert_allclose(counts / 20_000, mass / mass.sum(), atol=0.015)


def test_impossible_prompts_are_refused():
    """Red when an id is clipped or an empty prompt starts from nothing."""
    generator = small_generator()
    sampling = sampler.SamplingConfig(max_tokens=2)
    generator._check([[0, 30], [7]])
    for prompts, message in (
        ([[1], []], "empty"),
        ([[1], [31]], r"in \[0, 31\), got 31\.\.31"),
        ([[5, -1]], r"got -1\.\.5"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            next(generator.stream_batch(prompts, sampling))


class Script:
    """A generator that says what it is told."""

    def __init__(self, *texts):
        self.rows = [list(text) for text in texts]

    def stream_batch(self, prompts, sampling):
        for tokens in list(zip(*self.rows, strict=True))[: sampling.max_tokens]:
            yield list(tokens)


@pytest.mark.parametrize(
    ("said", "stop", "text", "finish", "num_tokens"),
    [
        (b"abcdef", [], "abcd", "length", 4),
        (b"abcdef", ["c"], "ab", "stop", 3),
        (b"abcdef", ["bc", "abc"], "", "stop", 3),
        (b"abcdef", ["de"], "abcd", "length", 4),
        (b"ab\x00cd", ["zz"], "ab", "end", 2),
        ("aé→".encode(), ["→"], "aé\ufffd", "length", 4),
        ("aé".encode() + b"xx", ["x"], "aé", "stop", 4),
    ],
)
def test_stop_strings(said, stop, text, finish, num_tokens):
    """Cut before the first stop string, over token borders; nothing of it is ever shown.

    A zero byte stands for the end of a document here. Red when the string is looked for in
    the last token only, when its beginning is shown, or a character is cut in two.
    """
    tokenizer = tokenizer_lib.byte_level()
    tokens = [256 if byte == 0 else byte for byte in said]
    shown = []
    sampling = sampler.SamplingConfig(max_tokens=4)
    (reply,) = text_lib.complete(
        Script(tokens), tokenizer, ["x"], sampling, stop, shown.append
    )
    assert reply == text_lib.Completion(text, num_tokens, finish)
    so_far = ""
    for part in shown:
        so_far += part
        assert text.startswith(so_far)
    assert so_far == text


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": float("nan")},
        {"seed": 2**31},
        {"seed": -(2**31) - 1},
    ],
    ids=str,
)
def test_sampling_out_of_range(fields):
    """Red when not-a-number is taken for greedy, or a seed overflows while sampling."""
    ((name, value),) = fields.items()
    reason = "finite" if value == float("inf") else ""
    with pytest.raises(errors.ConfigError, match=f"^{name}=.*{reason}"):
        sampler.SamplingConfig(**fields)


def test_stop_strings_in_turn():
    """Where they overlap, as the lm-evaluation-harness cuts: one after the other.

    Red when `in_turn` is ignored, or cuts where no stop string is.
    """
    tokenizer = tokenizer_lib.byte_level()
    sampling = sampler.SamplingConfig(max_tokens=6)
    for stop, text in ((["bc", "abc"], "a"), (["abc", "bc"], ""), (["x"], "abcdef")):
        (reply,) = text_lib.complete_tokens(
            Script(b"abcdef"), tokenizer, [[1]], sampling, stop, in_turn=True
        )
        assert reply.text == text


def test_each_row_ends_by_itself():
    """Red when the first row's end ends the others."""
    tokenizer = tokenizer_lib.byte_level()
    sampling = sampler.SamplingConfig(max_tokens=6)
    script = Script(b"ab.abc", b"abcd.a")
    replies = text_lib.complete(script, tokenizer, ["", ""], sampling, ["."])
    assert [reply.text for reply in replies] == ["ab", "abcd"]


def test_prompt_files_and_the_command_line(tmp_path, runner):
    """JSONL in any batch size; the same through the command; a REPL that ends.

    Red when a prompt's seed depends on its batch, a flag is lost, or the time between
    tokens that come together counts as a rate.
    """
    config, params = make(vocab_size=257)
    tokenizer = tokenizer_lib.byte_level()
    generator = sampler.Generator(config, params)
    sampling = sampler.SamplingConfig(max_tokens=20, temperature=1.0, seed=3)
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\nlonger than that\nx\n")
    rows = list(
        text_lib.complete_all(
            generator, tokenizer, prompts_lib.read(str(lines)), sampling
        )
    )
    assert [row["seed"] for row in rows] == [3, 4, 5]
    json_lines = tmp_path / "prompts.jsonl"
    with json_lines.open("w") as file:
        file.writelines(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows)
    again = text_lib.complete_all(
        generator, tokenizer, prompts_lib.read(str(json_lines)), sampling, batch_size=2
    )
    assert list(again) == rows
    convert.save_export(tmp_path / "export", config, params, tokenizer=tokenizer)
    command = ["-m", "memoryformer.generation"]
    command += [f"--export={tmp_path / 'export'}", "--max_tokens=20", "--seed=3"]
    command += ["--temperature=1", "--top_p=0.95"]

    def run(*flags, typed=""):
        result = runner.command(*command, *flags, typed=typed)
        assert result.code == 0, result
        return result

    # A shell's backslash and n end a reply at a line end.
    longer = sampler.SamplingConfig(max_tokens=300, temperature=1.0, seed=3)
    stopped = text_lib.complete_all(
        generator, tokenizer, prompts_lib.read(str(lines)), longer, stop=["\n"]
    )
    stopped = list(stopped)
    assert "stop" in [row["finish"] for row in stopped]
    output = f"--output={tmp_path / 'out.jsonl'}"
    run(f"--prompts={lines}", output, r"--stop=\n", "--max_tokens=300")
    written = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in written if line] == stopped
    typed = run("--repl", typed="one\n\n")
    assert typed.out.startswith("one" + rows[0]["text"])
    assert "[20 tokens, " in typed.err and "tokens/s after the first 16" in typed.err
    few = run("--prompt=one", "--max_tokens=5")  # all at once: no rate to speak of
    assert "[5 tokens, ended by" in few.err


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        (
            "a.txt",
            "one\u2028still one\x85\n\n two \r\n",
            ["one\u2028still one\x85", "", " two "],
        ),
        ("a.txt", "\ufeffhello\n\n", ["hello", ""]),
        ("a.jsonl", '{"prompt": "a\u2028b"}\n\n{"prompt": ""}', ["a\u2028b", ""]),
        ("A.JSONL", '\ufeff{"prompt": "x"}\r\n', ["x"]),
        ("a.ndjson", '{"prompt": "x"}', ["x"]),
        ("a.jsonl.gz", '{"prompt": "x"}', ["x"]),
    ],
)
def test_prompts_of_a_file(tmp_path, name, content, prompts):
    """Mutations: `splitlines`; empty lines left out; `path.endswith(".jsonl")`."""
    path = tmp_path / name
    pack = gzip.compress if name.endswith("gz") else bytes
    path.write_bytes(pack(content.encode()))
    tokenizer = tokenizer_lib.byte_level()
    rows = text_lib.complete_all(
        Script(*[b"ok"] * len(prompts)),
        tokenizer,
        prompts_lib.read(str(path)),
        sampler.SamplingConfig(),
    )
    rows = list(rows)
    assert [row["prompt"] for row in rows] == prompts
    again = tmp_path / "again.jsonl"  # what generation wrote, it can read
    again.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert prompts_lib.read(str(again)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": 12}',
            "a.jsonl:2: .*it holds a number",
        ),
        ("a.jsonl", '{"prompt": null}', "a.jsonl:1: .*it holds null"),
        ("a.jsonl", '{"prompt": ["a"]}', "a.jsonl:1: .*it holds a list"),
        ("a.jsonl", '{"text": "a"}', "no text in field 'prompt' .found: text"),
        ("a.jsonl", '"just a string"', "a.jsonl:1: text, not an object"),
        ("a.json", '[{"prompt": "a"}]', "a.json:1: a list, not an object"),
        ("a.json", '{\n"prompt": "a"}', "a.json:1: not a JSON line"),
        ("a.jsonl", '{"prompt": "\\ud800"}', "a lone surrogate"),
        ("a.jsonl", "\n\n", "holds no prompts"),
        ("a.txt", "", "the file is empty"),
        ("a.jsonl.gz", '{"prompt": "x"}', "damaged or truncated"),
        ("folder", None, "cannot be read .Is a directory"),
        ("nowhere.txt", None, "cannot be read .No such file"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, content, message):
    """One line that names the file and the line, before anything is sampled."""
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(errors.ConfigError, match=message) as caught:
        prompts_lib.read(str(tmp_path / name))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_prompt_that_is_not_utf8_is_refused():
    """As a shell hands it over. Mutation: the tokenizer's own error."""
    sampling = sampler.SamplingConfig(max_tokens=2)
    with pytest.raises(errors.ConfigError, match=r"'caf\\udce9': is not UTF-8 text"):
        text_lib.complete(
            Script(b"ab"), tokenizer_lib.byte_level(), ["caf\udce9"], sampling
        )


@pytest.mark.parametrize(
    ("content", "seed", "message"),
    [
        (b"\xff\n", 0, r"p.txt:1: not UTF-8"),
        (b"a\nb\n", 2**31 - 1, f"--seed=.* 2 has seed . i, .* at most {2**31 - 2}"),
    ],
    ids=["bytes", "seeds"],
)
def test_prompts_are_read_before_anything(tmp_path, capsys, content, seed, message):
    """Before the model, and before an output is touched. Mutation: read by `_run_file`."""
    path, output = tmp_path / "p.txt", tmp_path / "out.jsonl"
    output.write_text("kept")
    path.write_bytes(content)
    words = [f"--export={tmp_path}", f"--prompts={path}", f"--output={output}"]
    with pytest.raises(SystemExit) as ended:
        command.main(["generation", *words, f"--seed={seed}"])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert output.read_text() == "kept"


@pytest.mark.parametrize(
    "length, chunk, pieces",
    [
        (0, 0, []),
        (1, 0, [1]),
        (300, 0, [256, 32, 8, 4]),
        (600, 0, [512, 64, 16, 8]),
        (1100, 0, [512, 512, 64, 8, 4]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (3, 4, [2, 1]),
    ],
)
def test_pieces_of_a_prompt(length, chunk, pieces):
    """Powers of two, largest first, behind whole chunks. Mutations: 513; any sign."""
    assert sampler._pieces(length, chunk) == pieces


def test_how_long_a_cache_is():
    """In steps of 128 tokens, but for a row no longer than those of training.

    Mutations: 129 for 128; `<` for `<=`; `max` and `min` exchanged.
    """
    generator = small_generator()  # rows of 64
    for length, places in ((1, 64), (64, 64), (65, 128), (128, 128), (129, 256)):
        state = generator._init_state(2, length)
        assert state[0].keys.shape[2] == places, length


def test_the_nucleus_ends_where_its_mass_is_reached():
    """Mutations: `<=` for `<`; the likeliest token left out."""
    certain = jnp.log(jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    for top_p in (0.1, 1.0):
        inside = choosing.in_nucleus(certain, top_p).tolist()
        assert inside == [[True, False, False], [False, False, True]]
    even = jnp.zeros((1, 4))
    assert choosing.in_nucleus(even, 0.1).all()  # of equals, all or none


def test_weights_are_laid_out_for_reading(monkeypatch):
    """On a CPU always, elsewhere where a kind is named.

    Mutations: `and` for `or`, either way.
    """
    config, params = make()

    def tables(kinds=None):
        generator = sampler.Generator(config, params, kinds)
        return generator.params["blocks"]["0"]["mixer"]["qkv"]["tables"]

    half = sampler.narrow.WeightKinds(tables="bfloat16")
    assert tables().values.dtype == jnp.float32
    assert tables(half).values.dtype == jnp.bfloat16
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert tables().dtype == jnp.float32  # as they were
    assert tables(half).values.dtype == jnp.bfloat16


def test_rows_of_one_length_go_together(monkeypatch):
    """Others take turns where a memory counts places. Mutation: `>=` for `>`."""
    config = toy.model_config("dense", recurrence="rmt", num_layers=1)
    generator = sampler.Generator(config, toy.numpy_params(config))
    sampling = sampler.SamplingConfig(max_tokens=2)
    monkeypatch.setattr(generator, "_one_by_one", lambda prompts, how: iter([["turn"]]))

    def together(rows, length):
        raise StopAsyncIteration(rows, length)

    monkeypatch.setattr(generator, "_init_state", together)
    assert list(generator.stream_batch([[1], [2, 3]], sampling)) == [["turn"]]
    with pytest.raises(StopAsyncIteration) as begun:
        next(generator.stream_batch([[1, 2], [3, 4]], sampling))
    assert begun.value.args == (2, 4)
