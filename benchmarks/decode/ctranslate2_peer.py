"""CTranslate2 on our dense twin: its own model specification, filled with the twin's weights.

Its loader of GPT-NeoX folders reads two names that transformers 5 has changed; the
specification is what that loader fills too. Logits of float32 weights are held against the twin's
first. `int8` rounds activations too.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from benchmarks.decode import ours, peers
from memoryformer import model


def make(twin: Callable[[], tuple], kind: str, folder: pathlib.Path) -> peers.Peer:
    """The twin's weights in a type of CTranslate2's, such as `int8`."""
    path = folder / f"ctranslate2-{kind}"
    if not (path / "model.bin").exists():
        _check_unrounded(folder / "ctranslate2-float32", *twin())
        _save(path, *twin(), kind)
    generator = _load(path, kind)
    vocab_size = len(json.loads((path / "vocabulary.json").read_text()))
    prompt = _named(peers.long_prompt(2048, vocab_size))

    def generate(starts, tokens):
        replies = generator.generate_batch(
            starts,
            max_length=tokens,
            min_length=tokens,  # no token ends it
            include_prompt_in_result=False,
        )
        return np.array([reply.sequences_ids[0] for reply in replies]).T

    def decode(streams, tokens):
        starts = [_named(start) for start in peers.prompts(streams)]
        return generate(starts, tokens + 1)

    def prefill(length):
        return generate([prompt[:length]], 1)

    return peers.Peer(decode, prefill, (path / "model.bin").stat().st_size)


def _check_unrounded(path, config, params) -> None:
    """The logits of float32 weights of two blocks, then removed, are the twin's."""
    config, params = ours.first_blocks(config, params)
    _save(path, config, params, "float32")
    tokens = peers.long_prompt(24, config.vocab_size)
    engine = _load(path, "float32")
    logits = engine.forward_batch([_named(tokens)], return_log_probs=False)
    shutil.rmtree(path)
    expected = ours.twin_logits(config, params, tokens, config.ffn_activation)
    logits = np.asarray(logits)[0]
    ours.check_logits("CTranslate2 in float32", logits, expected, 1e-4)


def _save(path, config, params, kind) -> None:
    path.mkdir()
    specification(config, params, kind).save(str(path))


def _load(path, kind):
    import ctranslate2

    return ctranslate2.Generator(
        str(path),
        device="cpu",
        compute_type=kind,
        inter_threads=1,
        intra_threads=len(os.sched_getaffinity(0)),
    )


def specification(config: model.ModelConfig, params: dict, kind: str):
    """The twin as CTranslate2 describes it, its weights rounded to `kind`.

    Of copies: rounding is done in place.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    parallel = config.residual == "parallel"
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.num_layers,
        config.num_heads,
        activation=common_spec.Activation.GELU,
        rotary_dim=int(config.head_dim * config.rotary_fraction),
        rotary_interleave=False,
        rotary_base=config.rotary_base,
        parallel_residual=parallel,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = np.array(params["embed"]["embedding"])
    _fill_norm(decoder.layer_norm, params["final_norm"])
    decoder.projection.weight = np.array(params["head"]["kernel"].T, order="C")
    for i, layer in enumerate(decoder.layer):
        block = params["blocks"][str(i)]
        norms = (
            (layer.input_layer_norm, layer.post_attention_layer_norm)
            if parallel
            else (layer.self_attention.layer_norm, layer.ffn.layer_norm)
        )
        for norm, name in zip(norms, ("norm1", "norm2"), strict=True):
            _fill_norm(norm, block[name])
        qkv, out = layer.self_attention.linear
        _fill(qkv, block["mixer"]["qkv"])
        _fill(out, block["mixer"]["out"])
        _fill(layer.ffn.linear_0, block["ffn"]["up"])
        _fill(layer.ffn.linear_1, block["ffn"]["down"])
    spec.config.layer_norm_epsilon = config.norm_eps
    names = _named(range(config.vocab_size))
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = names[0]
    spec.register_vocabulary(names)
    spec.validate()
    spec.optimize(quantization=kind)
    return spec


def _fill(spec, layer) -> None:
    spec.weight, spec.bias = ours.by_output(layer)


def _fill_norm(spec, norm) -> None:
    spec.gamma, spec.beta = np.array(norm["scale"]), np.array(norm["bias"])


def _named(tokens) -> list[str]:
    """Tokens as CTranslate2 takes them: by name."""
    return [str(int(token)) for token in tokens]
