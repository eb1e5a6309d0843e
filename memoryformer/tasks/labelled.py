"""Tasks on the encoder of `pmi`: one label a row, read at a CLS token.

    x = [cls; inputs(batch)];   y = Encoder(x);   logits = W y_cls + b

Start at `Labelled`; relations.py, stories.py and triangles.py bring the rows.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from memoryformer.model import layers, losses
from memoryformer.notation import Activations, Array, Bool, Float, Int, Params
from memoryformer.tasks import base, pmi


class Labelled(base.Task):
    """Batches have inputs, real [B, T], labels [B] and kinds [B], which accuracy is told by.

    kinds: the names of what `kinds` numbers, such as types of question.
    """

    Model = pmi.PMIConfig
    num_classes: ClassVar[int]
    kinds: ClassVar[tuple[str, ...]] = ()

    def inputs(self, rngs: nnx.Rngs) -> nnx.Module:
        """Make what turns a batch's inputs into [B, T, D]."""
        raise NotImplementedError

    def classifier(self, rngs: nnx.Rngs) -> "Classifier":
        """Make the whole model."""
        return Classifier(self.model, self.inputs(rngs), self.num_classes, rngs=rngs)

    def init(self, seed: int) -> Params:
        """Draw the parameters."""
        return _init(self, seed)

    def logits(self, params: Params, batch: base.Batch) -> Float[Array, "B classes"]:
        """Class logits of each row."""
        graph, _ = nnx.split(self._abstract(), graph=False)
        return nnx.merge(graph, params)(batch["inputs"], batch["real"])

    def sums(self, params: Params, batch: base.Batch) -> base.Sums:
        """Nats and right answers over the rows, and right answers of each kind."""
        logits, labels = self.logits(params, batch), batch["labels"]
        nats = losses.token_nats(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        rows = jnp.float32(len(labels))
        sums = {"loss": (jnp.sum(nats), rows), "accuracy": (jnp.sum(correct), rows)}
        for i, kind in enumerate(self.kinds):
            there = batch["kinds"] == i
            sums[f"accuracy/{kind}"] = jnp.sum(correct & there), jnp.sum(there)
        return sums

    def groups(self, params: Params) -> Any:
        """Weights are decayed; biases, scales and scalars are not."""
        state = nnx.state(self._abstract(), nnx.Param, graph=False)
        described = jax.tree.map(
            lambda x: "decayed" if x.get_metadata()["decay"] else "undecayed",
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return nnx.to_pure_dict(described)

    def _abstract(self):
        """The model without its numbers."""
        make = functools.partial(nnx.eval_shape, graph=False, graph_updates=False)
        return make(lambda: self.classifier(nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _init(task, seed):
    model = task.classifier(nnx.Rngs(jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param, graph=False))


class Classifier(nnx.Module):
    """Inputs, a CLS token before them, the encoder, a linear head."""

    def __init__(
        self,
        config: pmi.PMIConfig,
        inputs: nnx.Module,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.inputs = inputs
        cls = jax.random.normal(rngs.params(), (config.embed_dim,))
        self.cls = nnx.Param(cls, spec="whole", decay=True)
        self.encoder = pmi.Encoder(config, rngs=rngs)
        self.head = pmi.dense(config, config.embed_dim, num_classes, rngs=rngs)

    def __call__(self, inputs: Array, real: Bool[Array, "B T"]) -> Array:
        """[B, T, ..] -> [B, classes]."""
        x = self.inputs(inputs)
        cls = jnp.broadcast_to(
            self.cls[...].astype(x.dtype)[None, None], (len(x), 1, x.shape[2])
        )
        real = jnp.concatenate([jnp.ones((len(x), 1), bool), real], axis=1)
        y = self.encoder(jnp.concatenate([cls, x], axis=1), real)
        return self.head(y[:, 0])


class BagOfWords(nnx.Module):
    """One token a sentence: x_t = sum_i p_i E[word_i], word 0 nothing; p starts at 1 / words."""

    def __init__(
        self, config: pmi.PMIConfig, words: int, longest: int, *, rngs: nnx.Rngs
    ):
        self.embed = layers.Embed(
            words, config.embed_dim, std=1.0, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        weights = jnp.full((longest,), 1 / longest)
        self.place = nnx.Param(weights, spec="whole", decay=False)

    def __call__(self, words: Int[Array, "B T W"]) -> Activations:
        """[B, T, W] -> [B, T, D]."""
        rows = jnp.where((words != 0)[..., None], self.embed(words), 0)
        return jnp.einsum("w,btwd->btd", self.place[...].astype(rows.dtype), rows)
