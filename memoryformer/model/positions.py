"""Several tokens read at once, with the bits of one after another, and the state set back.

    logits_j, state_j = what the model returns after the first j of L tokens, j = 1 .. L

Everything that treats positions apart is computed for all L together, so that weights are read
once: norms, and on CPU the native products and memory layers, which sum in one order however
many vectors they are given. Softmax attention reads its cache with the bits of single queries
(`attention.over_cache`); other mixers are called with one position after another. Products that
XLA computes would be summed in another order: `why_not` names the models that have some.
Start at `read`, then `keep`.
"""

import jax
import jax.numpy as jnp

from memoryformer.model import mixers, params, parts, transformer
from memoryformer.model.mixers import softmax
from memoryformer.notation import Array, Float, Params, Tokens
from memoryformer.ops import attention
from memoryformer.ops.lookup import native

MAX_POSITIONS = attention.FEW  # L


def why_not(config: transformer.ModelConfig) -> str:
    """Say why a model cannot be read so here; '' if it can."""
    if jax.default_backend() != "cpu" or not native.available():
        return "it needs a CPU and the native code"
    if not config.causal:
        return "model.causal=False: nothing is decoded"
    if config.recurrence != "none":
        return (
            f"model.recurrence={config.recurrence!r} moves its memory at a chunk's end"
        )
    if config.tie_embeddings:
        return "model.tie_embeddings=True: the head is a product of XLA's"
    blocks = (parts.of_layer(config, i) for i in range(config.num_layers))
    if any(part.mix == "orthogonal" for block in blocks for part in block):
        return "the mix 'orthogonal' of a memory layer is a product of XLA's"
    return ""


def read(
    config: transformer.ModelConfig,
    weights: Params,
    state: mixers.State,
    tokens: Tokens,
    seq: mixers.SeqInfo,
) -> tuple[Float[Array, "L V"], mixers.State]:
    """Read one row [1, L] of at most `MAX_POSITIONS` tokens: logits after each, and states.

    weights: as `narrow.prepare` stored them. The states are for `keep` only.
    """
    model = params.merge(config, weights)
    for block in model.blocks:
        if not _reads_few(block.mixer):  # flax's own setattr is for fields
            object.__setattr__(block, "mixer", _OneByOne(block.mixer))
    x, states = model.features(tokens, seq, state)
    return model.logits(x[0]), states


def keep(states: mixers.State, length: int, count: Array) -> mixers.State:
    """The state after the first `count` of the `length` tokens that `read` has read."""

    def kept(node):
        if not _is_cache(node):
            return node[count - 1]  # a state after each token
        filled = node.length - length + count
        index = jnp.arange(node.segment_ids.shape[1])[None]
        segment_ids = jnp.where(index < filled, node.segment_ids, 0)
        return node._replace(segment_ids=segment_ids, length=filled)

    return jax.tree.map(kept, states, is_leaf=_is_cache)


class _OneByOne:
    """A mixer called with one position after another: y of all, and `read`'s states."""

    def __init__(self, mixer: mixers.SequenceMixer):
        self._mixer = mixer

    def __call__(self, x, seq, state):
        """[B, L, D] -> [B, L, D]; of a cache the last state, of all else a state each."""

        def step(state, inputs):
            x, positions, segment_ids = (a[:, None] for a in inputs)
            seq = mixers.SeqInfo(positions, segment_ids)
            y, state = self._mixer(x, seq, state)
            nodes = jax.tree.leaves(state, is_leaf=_is_cache)
            return state, (y[:, 0], [n for n in nodes if not _is_cache(n)])

        inputs = [jnp.moveaxis(a, 1, 0) for a in (x, *seq)]
        last, (y, after_each) = jax.lax.scan(step, state, inputs)
        nodes, tree = jax.tree.flatten(last, is_leaf=_is_cache)
        rest = iter(after_each)
        nodes = [node if _is_cache(node) else next(rest) for node in nodes]
        return jnp.moveaxis(y, 0, 1), jax.tree.unflatten(tree, nodes)


def _is_cache(node) -> bool:
    return isinstance(node, softmax.KVCache)


def _reads_few(mixer) -> bool:
    """Whether the mixer itself gives a few queries the bits of each alone."""
    return type(mixer) is softmax.Softmax and mixer.transform is None
