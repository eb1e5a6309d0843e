"""`transformers` on torch: GPT-NeoX with random weights, which our dense twin can take over.

`int8` is torch's dynamic quantisation, which rounds activations too.
"""

import copy
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode import ours, peers
from memoryformer import convert, model


def random_model(size: str):
    """A `GPTNeoXForCausalLM`."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    width, layers, heads, vocab_size = ours.twin_shape(size)
    config = transformers.GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    return transformers.GPTNeoXForCausalLM(config).eval()


def twin_of(theirs):
    """The same as our dense twin: (config, params)."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        config, params = convert.load_gpt_neox(folder)
        return config, jax.tree.map(np.array, params)  # copied out of the mapped file


def make(theirs, kind: str) -> peers.Peer:
    """Cached decoding without `generate`, whose own work would be added."""
    import torch
    import transformers

    num_weights = sum(p.numel() for p in theirs.parameters())
    weight_bytes = num_weights * {"float32": 4, "bfloat16": 2, "int8": 1}[kind]
    if kind == "int8":  # all but the embedding
        weight_bytes += 3 * theirs.get_input_embeddings().weight.numel()
        theirs = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(theirs), {torch.nn.Linear}, dtype=torch.qint8
        )
    elif kind != "float32":
        theirs = copy.deepcopy(theirs).to(getattr(torch, kind))
    prompt = peers.long_prompt(2048, theirs.config.vocab_size)
    prompt = torch.from_numpy(prompt).long()[None]

    @torch.inference_mode()
    def decode(streams, tokens):
        cache = transformers.DynamicCache()
        token = torch.tensor(peers.prompts(streams))
        chosen = []
        for _ in range(tokens + 1):
            output = theirs(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(dim=-1)
            chosen.append(token[:, 0].numpy())
        return np.array(chosen)

    @torch.inference_mode()
    def prefill(length):
        cache = transformers.DynamicCache()
        output = theirs(
            input_ids=prompt[:, :length],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits.argmax(dim=-1).numpy()

    return peers.Peer(decode, prefill, weight_bytes)


def check_logits(theirs, config: model.ModelConfig, params: dict) -> None:
    """Our dense twin computes what transformers computes."""
    import torch

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = model.forward(config, params, jnp.asarray(tokens, jnp.int32))
    ours.check_logits("transformers", expected, np.asarray(logits), 1e-4)
