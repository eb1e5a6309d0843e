"""GPT-NeoX checkpoints: ours against transformers, and every refusal in one line."""

import json

import jax
import numpy as np
import pytest
import toy

from memoryformer import convert, errors, model
from memoryformer.convert import gpt_neox_tensors, torch_file, trees

BASE = dict(
    vocab_size=89,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=40,
)
# name -> (config fields, how it is saved)
CASES = {
    # Eleven layers: as text, "10" sorts before "2".
    "pythia": (dict(rotary_pct=0.25, num_hidden_layers=11), "safetensors"),
    "sequential": (dict(use_parallel_residual=False, rotary_pct=0.5), "bin"),
    "full_rotary_wide": (
        dict(rotary_pct=1.0, num_attention_heads=2, intermediate_size=128),
        "sharded",
    ),
    "tanh_tied_no_bias": (
        dict(
            hidden_act="gelu_new",
            tie_word_embeddings=True,
            attention_bias=False,
            layer_norm_eps=1e-3,
            rotary_emb_base=500,
        ),
        "safetensors",
    ),
}


def save_theirs(directory, case):
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    fields, form = CASES[case]
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(**(BASE | fields))
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():  # fresh biases and norms are 0 and 1: they would hide a swap
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if form == "bin":
        theirs.save_pretrained(directory)
        (directory / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), directory / "pytorch_model.bin")
    else:
        size = "60KB" if form == "sharded" else "5GB"
        theirs.save_pretrained(directory, max_shard_size=size)
        assert (directory / "model.safetensors.index.json").is_file() == (
            form == "sharded"
        )
    return torch, theirs


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_text_equal_transformers(tmp_path, case):
    """<= 1e-5 at odd, even and maximum lengths, argmax equal, greedy text equal.

    Red when q, k and v are read as [3, H, E], when a residual form, the rotary fraction
    or base, the epsilon or the gelu variant is ignored, or when a bias is dropped.
    """
    torch, theirs = save_theirs(tmp_path, case)
    config, params = convert.load_gpt_neox(tmp_path)
    rng = np.random.default_rng(0)
    for length in (1, 7, 40) if case == "pythia" else (7, 40):
        tokens = rng.integers(0, 89, (2, length))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        actual = np.asarray(model.forward(config, params, tokens.astype(np.int32)))
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
        np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))

    prompt = rng.integers(0, 89, (1, 5))
    text = theirs.generate(
        torch.from_numpy(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    step = jax.jit(lambda t: model.forward(config, params, t))
    ours = np.zeros((1, 25), np.int32)
    ours[:, :5] = prompt
    for i in range(5, text.shape[1]):
        ours[:, i] = np.asarray(step(ours))[:, i - 1].argmax(-1)
    np.testing.assert_array_equal(ours[:, : text.shape[1]], text.numpy())


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_write(tmp_path, case):
    """Write, load with transformers, same logits; read again, same bits.

    Red when `save_gpt_neox` forgets a field or transposes a kernel twice.
    """
    torch, theirs = save_theirs(tmp_path / "theirs", case)
    config, params = convert.load_gpt_neox(tmp_path / "theirs")
    convert.save_gpt_neox(tmp_path / "ours", config, params)
    again, loading = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokens = torch.arange(40)[None] % 89
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=0)
    assert_same(convert.load_gpt_neox(tmp_path / "ours"), (config, params))


def test_round_trip_without_torch_is_bit_exact(tmp_path):
    """Red when `_write_qkv` is not the inverse of `_read_qkv`."""
    config, params = ours()
    convert.save_gpt_neox(tmp_path, config, params)
    assert_same(convert.load_gpt_neox(tmp_path), (config, params))


def test_qkv_is_interleaved_per_head():
    """Row (h, j, e) of their weight is column (j, h e) of our kernel: by enumeration.

    Red when the two leading axes are swapped.
    """
    config, _ = ours()
    heads, width = config.num_heads, config.head_dim
    rows = np.arange(3 * heads * width)[:, None] * np.ones(5, int)
    kernel = gpt_neox_tensors._read_qkv(config, rows)
    for h in range(heads):
        for j in range(3):
            for e in range(width):
                row = (h * 3 + j) * width + e
                assert (kernel[:, j, h * width + e] == row).all()


def test_half_precision_bin_is_read_exactly(tmp_path):
    """A float16 .bin, written without torch, gives the float16 values in float32.

    Red when the reader takes HalfStorage for bfloat16.
    """
    config, params = ours()
    convert.save_gpt_neox(tmp_path, config, params)
    tensors = trees.write(gpt_neox_tensors.entries(config), params, config)
    half = {name: array.astype(np.float16) for name, array in tensors.items()}
    (tmp_path / "model.safetensors").unlink()
    torch_file.write(tmp_path / "pytorch_model.bin", half)
    _, read = convert.load_gpt_neox(tmp_path)
    expected = jax.tree.map(
        lambda a: np.asarray(a).astype(np.float16).astype(np.float32), params
    )
    jax.tree.map(np.testing.assert_array_equal, read, expected)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "relu", "hidden_act='relu'"),
        ("model_type", "llama", "model_type='llama'"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type='linear'"),
        ("intermediate_size", 100, "intermediate_size=100"),
        ("rotary_pct", 0.4, r"rotary_pct=0\.4"),
    ],
)
def test_unsupported_variants_are_refused_in_one_line(tmp_path, field, value, message):
    """Red when a field is ignored: the model would load and answer nonsense."""
    config, params = ours()
    convert.save_gpt_neox(tmp_path, config, params)
    fields = json.loads((tmp_path / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(errors.ConfigError, match=message) as caught:
        convert.load_gpt_neox(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_files_are_refused_in_one_line(tmp_path):
    """Red when a tensor may be missing, superfluous or of another shape."""
    with pytest.raises(errors.DataError, match=r"config\.json"):
        convert.load_gpt_neox(tmp_path)
    config, params = ours()
    convert.save_gpt_neox(tmp_path, config, params)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(errors.DataError, match="cut short"):
        convert.load_gpt_neox(tmp_path)
    weights.unlink()
    with pytest.raises(errors.DataError, match="holds neither"):
        convert.load_gpt_neox(tmp_path)
    tensors = trees.write(gpt_neox_tensors.entries(config), params, config)
    for change, message in (
        ({"gpt_neox.extra": np.zeros(2, np.float32)}, "no place in this model"),
        ({"embed_out.weight": np.zeros((3, 3), np.float32)}, "head.kernel"),
    ):
        torch_file.write(tmp_path / "pytorch_model.bin", tensors | change)
        with pytest.raises(errors.DataError, match=message):
            convert.load_gpt_neox(tmp_path)
    tensors.pop("embed_out.weight")
    torch_file.write(tmp_path / "pytorch_model.bin", tensors)
    with pytest.raises(errors.DataError, match=r"lacks the tensor 'embed_out\.w"):
        convert.load_gpt_neox(tmp_path)


def test_memory_model_is_refused(tmp_path):
    """Red when `their_config` forgets to look at the projection."""
    config = model.ModelConfig(vocab_size=8, embed_dim=16, num_layers=1, num_heads=2,
                               seq_len=8)  # fmt: skip
    with pytest.raises(errors.ConfigError, match=r"model\.projection='memory'"):
        convert.save_gpt_neox(tmp_path, config, {})


def ours():
    config = model.ModelConfig(
        vocab_size=31,
        embed_dim=24,
        num_layers=2,
        num_heads=3,
        seq_len=16,
        projection="dense",
        **toy.PYTHIA_BLOCK,
    )
    params = model.init(config)
    rng = np.random.default_rng(0)
    noise = lambda a: np.asarray(a) + rng.normal(size=a.shape).astype(np.float32)  # noqa: E731
    return config, jax.tree.map(noise, params)


def assert_same(actual, expected):
    assert actual[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, actual[1], expected[1])
