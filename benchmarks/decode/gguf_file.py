"""Our dense twin as a GGUF file, which llama.cpp reads. Start at `write`."""

import os

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from benchmarks.decode import ours
from memoryformer import model

KINDS = {"f32": Kind.F32, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}
FILE_TYPES = {"f32": 0, "q8_0": 7, "q4_0": 2}  # llama.cpp's own numbers


def write(
    path: str | os.PathLike, config: model.ModelConfig, params: dict, kind: str
) -> None:
    """Write the twin; matrices, embedding and head included, as `kind`, the rest in float32.

    Without a vocabulary: it is given tokens and asked for logits only.
    """
    writer = gguf.GGUFWriter(path, "gptneox")
    _add_fields(writer, config, kind)

    def add(name, values):
        matrix = values.ndim == 2
        stored = KINDS[kind] if matrix else Kind.F32
        values = np.ascontiguousarray(values, np.float32)
        writer.add_tensor(name, quants.quantize(values, stored), raw_dtype=stored)

    def add_norm(name, norm):
        add(f"{name}.weight", np.asarray(norm["scale"]))
        add(f"{name}.bias", np.asarray(norm["bias"]))

    add("token_embd.weight", np.asarray(params["embed"]["embedding"]))
    add("output.weight", np.asarray(params["head"]["kernel"]).T)
    add_norm("output_norm", params["final_norm"])
    for i in range(config.num_layers):
        block = params["blocks"][str(i)]
        add_norm(f"blk.{i}.attn_norm", block["norm1"])
        add_norm(f"blk.{i}.ffn_norm", block["norm2"])
        for name, layer in {
            "attn_qkv": block["mixer"]["qkv"],
            "attn_output": block["mixer"]["out"],
            "ffn_up": block["ffn"]["up"],
            "ffn_down": block["ffn"]["down"],
        }.items():
            weight, bias = ours.by_output(layer)
            add(f"blk.{i}.{name}.weight", weight)
            add(f"blk.{i}.{name}.bias", bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_fields(writer, config: model.ModelConfig, kind: str) -> None:
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(
        config.embed_dim * config.projection_options.ffn_multiple
    )
    writer.add_head_count(config.num_heads)
    writer.add_rope_dimension_count(int(config.head_dim * config.rotary_fraction))
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_parallel_residual(config.residual == "parallel")
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
