"""Checkpoints of the released code: its logits, exact round trips, refusals."""

import pathlib

import jax
import numpy as np
import pytest
import toy

from memoryformer import convert, errors, model
from memoryformer.convert import torch_file

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "released_model.npz"

# The keys and spelling of the released configs, with the golden model's sizes.
YML = """{
  # model settings
  "num-layers": 2,
  "hidden-size": 64,
  "num-attention-heads": 4,
  "seq-length": 24,
  "max-position-embeddings": 24,
  "pos-emb": "rotary",
  "rotary-pct": 0.25,
  "no-weight-tying": true,
  "gpt-j-residual": false,
  "norm": "rmsnorm",
  "attn_memory_config": {
    "fc_qkv": false, # a comment
    "remove_projection": true,
    "shared_projection": false,
    "del_dense": true,
    "ffn_num_table": 16,
    "code_length": 4,
  },
  "mlp_type": "MemoryBlock",
  "double_mlp_table": true,
  "mlp_expand_type": "extra_bit",
}
"""


def golden_pieces(dtype=np.float32):
    """The golden model under the released names: {layer number: {name: array}}."""
    data = np.load(GOLDEN)

    def get(name):
        return data[f"model.param.{name}"].astype(dtype)

    def rows(name):  # [K, C, F] -> [K C, F]
        tables = get(name)
        return tables.reshape(-1, tables.shape[-1])

    pieces = {0: {"word_embeddings.weight": get("embed")}}
    for i in range(2):
        block = f"blocks.{i}."
        piece = pieces[i + 2] = {
            "input_layernorm.scale": get(block + "norm1.scale"),
            "post_attention_layernorm.scale": get(block + "norm2.scale"),
            "attention.rotary_emb.inv_freq": np.ones(8, np.float32),
            "mlp.1.weight": get(block + "ffn_norm.weight"),
            "mlp.1.bias": get(block + "ffn_norm.bias"),
        }
        for ours, theirs in (
            ("q", "attention.query_proj"),
            ("k", "attention.key_proj"),
            ("v", "attention.value_proj"),
            ("ffn1", "mlp.0"),
            ("ffn2", "mlp.2"),
        ):
            piece[f"{theirs}.tables"] = rows(f"{block}{ours}.tables")
            piece[f"{theirs}.bias"] = get(f"{block}{ours}.bias")
    pieces[5] = {"norm.scale": get("final_norm.scale")}
    pieces[6] = {"final_linear.weight": get("head")}
    return pieces


def write_golden(directory, form, dtype=np.float32, save=torch_file.write):
    step = directory / "global_step7"
    (step / "configs").mkdir(parents=True)
    (step / "configs" / "tiny.yml").write_text(YML)
    (directory / "latest").write_text("global_step7")
    pieces = golden_pieces(dtype)
    module = None
    if form == "layers":
        for index, piece in pieces.items():
            save(step / f"layer_{index:02d}-model_00-model_states.pt", piece)
    else:
        module = {
            f"sequential.{i}.{name}": a for i, p in pieces.items() for name, a in p.items()
        }  # fmt: skip
    save(step / "mp_rank_00_model_states.pt", {"module": module, "iteration": 7})
    return step


@pytest.mark.parametrize("form", ["layers", "one_file"])
def test_golden_checkpoint_gives_the_released_logits(tmp_path, form):
    """Red when q, k, v are stacked in another order or tables are read as [C, K, F]."""
    write_golden(tmp_path, form)
    data = np.load(GOLDEN)
    config, params = convert.load_released(tmp_path)
    logits = toy.forward(config, params, data["model.tokens"][:, :-1])
    np.testing.assert_allclose(logits, data["model.logits"], atol=1e-5, rtol=0)
    assert config.score == "l1_softmax" and config.code_bits == 4
    np.testing.assert_array_equal(
        params["blocks"]["1"]["mixer"]["qkv"]["tables"][:, :, 1],
        data["model.param.blocks.1.k.tables"],
    )


def test_the_yml_may_lie_beside_the_steps(tmp_path):
    """And give the length as `seq-length` only.

    Red when just `global_stepN` is searched, or `max-position-embeddings` is demanded.
    """
    step = write_golden(tmp_path, "layers")
    (written,) = (step / "configs").glob("*.yml")
    text = written.read_text()
    assert "max-position-embeddings" in text or "max_position_embeddings" in text
    for name in ("max-position-embeddings", "max_position_embeddings"):
        text = text.replace(name, "seq_length")
    expected, _ = convert.load_released(tmp_path)
    written.unlink()
    (tmp_path / "run.yml").write_text(text)
    assert convert.load_released(tmp_path)[0] == expected


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layer_files", [True, False])
def test_round_trip_is_bit_exact(tmp_path, dtype, layer_files):
    """Theirs -> ours -> theirs: same files, same arrays; and ours -> theirs -> ours.

    Red when the writer rounds, drops a tensor or renumbers the layers.
    """
    form = "layers" if layer_files else "one_file"
    step = write_golden(tmp_path / "a", form, np.dtype(dtype))
    config, params = convert.load_released(tmp_path / "a")
    convert.save_released(
        tmp_path / "b", config, params, step=7, dtype=dtype, layer_files=layer_files
    )
    again = tmp_path / "b" / "global_step7"
    names = sorted(path.name for path in step.glob("*.pt"))
    assert names == sorted(path.name for path in again.glob("*.pt"))
    for name in names:
        first, second = torch_file.read(step / name), torch_file.read(again / name)
        first, second = first.get("module", first), second.get("module", second)
        if first is None:
            assert second is None
            continue
        first = {k: v for k, v in first.items() if "inv_freq" not in k}
        assert first.keys() == second.keys()
        for key, array in first.items():
            assert array.dtype == second[key].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(array, second[key])
    config2, params2 = convert.load_released(tmp_path / "b")
    assert config2 == config
    jax.tree.map(np.testing.assert_array_equal, params2, params)


def test_torch_and_ours_read_each_other(tmp_path):
    """Views into one storage, half precision, and names of unknown classes.

    Red when strides or offsets are ignored, or when `torch.load` refuses our pickle.
    """
    torch = pytest.importorskip("torch", reason="needs torch")

    def save(path, piece):
        tree = {}
        for name, value in piece.items():
            is_array = isinstance(value, np.ndarray)
            tree[name] = torch.from_numpy(value) if is_array else value
        torch.save(tree, path)

    step = write_golden(tmp_path, "layers", np.float16, save)
    _, params = convert.load_released(tmp_path)
    data = np.load(GOLDEN)["model.param.embed"].astype(np.float16)
    np.testing.assert_array_equal(params["embed"]["embedding"], data)

    flat = torch.arange(24.0)
    tree = {
        "view": flat[4:16].reshape(3, 4).T,
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.eye(2)),
        "list": [1, "a", torch.tensor(3)],
        "unknown": torch.optim.SGD([torch.nn.Parameter(flat)], lr=1.0),
        "random": (torch.get_rng_state(), np.random.get_state()),
    }
    torch.save(tree, step / "mixed.pt")
    read = torch_file.read(step / "mixed.pt")
    np.testing.assert_array_equal(read["view"], tree["view"].numpy())
    np.testing.assert_array_equal(read["bf16"].astype(np.float32), np.ones(3))
    np.testing.assert_array_equal(read["parameter"], np.eye(2))
    assert read["list"][:2] == [1, "a"] and read["list"][2] == 3

    torch_file.write(step / "ours.pt", {"a": data, "n": None, "b": [np.int64(3), data]})
    loaded = torch.load(step / "ours.pt", weights_only=False)
    np.testing.assert_array_equal(loaded["a"].numpy(), data)
    torch_file.write(step / "ours.pt", {"a": data, "b": {"c": data}})
    loaded = torch.load(step / "ours.pt", weights_only=True)
    np.testing.assert_array_equal(loaded["b"]["c"].numpy(), data)


def test_reading_runs_no_code_of_the_file(tmp_path):
    """A pickle that asks for os.system gets a placeholder.

    Red when `find_class` falls back to the default.
    """
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            import os

            return os.system, (f"touch {marker}",)

    torch_file.write(tmp_path / "x.pt", {"a": np.ones(2, np.float32), "b": Attack()})
    read = torch_file.read(tmp_path / "x.pt")
    np.testing.assert_array_equal(read["a"], np.ones(2))
    assert not marker.exists()


def test_tensor_past_the_end_of_its_storage_is_refused():
    """Red when the bounds are not checked: the tensor would show foreign memory."""
    storage = np.arange(12, dtype=np.float32)
    view = torch_file._rebuild_tensor(storage, 2, (3, 2), (4, 1))
    np.testing.assert_array_equal(view, [[2, 3], [6, 7], [10, 11]])
    for offset, shape, strides in (
        (0, (9, 4), (4, 1)),
        (3, (3, 2), (4, 1)),
        (-1, (2,), (1,)),
        (2, (3, 2), (4, -3)),
    ):
        with pytest.raises(errors.DataError, match="past the end"):
            torch_file._rebuild_tensor(storage, offset, shape, strides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"gpt-j-residual": false', '"gpt-j-residual": true'), "gpt_j_residual=True"),
        (('"norm": "rmsnorm"', '"norm": "layernorm"'), "norm='layernorm'"),
        (('"fc_qkv": false', '"fc_qkv": true'), "fc_qkv=True"),
        (('"extra_bit"', '"extra_table"'), "mlp_expand_type='extra_table'"),
        (('"num-attention-heads": 4,', ""), "lacks num_attention_heads"),
        (('"code_length": 4', '"code_length": 8'), "wrong shape|is \\("),
    ],
)
def test_unsupported_variants_are_refused_in_one_line(tmp_path, change, message):
    """Red when a field is ignored: the model would load and answer nonsense."""
    step = write_golden(tmp_path, "layers")
    assert change[0] in YML
    (step / "configs" / "tiny.yml").write_text(YML.replace(*change))
    with pytest.raises(errors.MemoryFormerError, match=message) as caught:
        convert.load_released(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    """Red when a missing layer, yml or rank goes unnoticed."""
    step = write_golden(tmp_path, "layers")
    (step / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(errors.DataError, match="2 model-parallel ranks"):
        convert.load_released(tmp_path)
    (step / "mp_rank_01_model_states.pt").unlink()
    path = step / "layer_03-model_00-model_states.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2000])
    with pytest.raises(errors.DataError, match=r"layer_03.*damaged"):
        convert.load_released(tmp_path)
    path.unlink()
    with pytest.raises(errors.DataError, match=r"lacks the tensor|no place"):
        convert.load_released(tmp_path)
    path.write_bytes(whole)
    (step / "configs" / "tiny.yml").unlink()
    with pytest.raises(errors.ConfigError, match=r"carries no configs/\*\.yml"):
        convert.load_released(tmp_path)
    (tmp_path / "mine.yml").write_text(YML)
    convert.load_released(tmp_path, tmp_path / "mine.yml")
    with pytest.raises(errors.DataError, match="no such directory"):
        convert.load_released(tmp_path / "absent")


def test_values_beyond_float16_and_other_models_are_refused(tmp_path):
    """Red when the writer lets infinities through or ignores the score."""
    write_golden(tmp_path, "layers")
    config, params = convert.load_released(tmp_path)
    params["embed"]["embedding"] = params["embed"]["embedding"] * np.float32(1e6)
    with pytest.raises(errors.DataError, match=r"word_embeddings\.weight of layer 0"):
        convert.save_released(tmp_path / "b", config, params)
    other = model.ModelConfig(
        vocab_size=8, embed_dim=16, num_layers=1, num_heads=2, seq_len=8
    )
    with pytest.raises(errors.ConfigError, match=r"model\.score='softmax'"):
        convert.save_released(tmp_path / "b", other, model.init(other))
