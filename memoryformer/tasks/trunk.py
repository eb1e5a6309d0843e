"""Tasks on the trunk of a language model: one class a row, or one token a position.

    Classifier    the trunk (two-sided with `model.causal=False`) on tokens and learned
                  positions, the mean over a row's tokens, a linear head
    Tagger        a language model as it is; targets have weights, most of them 0

A task of either kind brings its options and its batches.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import traverse_util

from memoryformer import model as model_lib
from memoryformer.errors import ConfigError
from memoryformer.evaluation import slots
from memoryformer.model import losses, mixers
from memoryformer.notation import Activations, Array, Float, Params
from memoryformer.tasks import base

_HEAD = ("positions", "classes")  # what a classifier has beside its trunk


class TrunkTask(base.Task):
    """A task whose model is a `ModelConfig`; rows are inputs and segment_ids [B, L]."""

    def check(self) -> None:
        """Refuse a model with fewer tokens than the task has."""
        if self.model.vocab_size < self.vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size}: {type(self).__name__} has "
                f"{self.vocab_size} tokens; raise it."
            )

    @property
    def vocab_size(self) -> int:
        """Tokens that rows are made of."""
        raise NotImplementedError

    def init(self, seed: int) -> Params:
        """Draw a model's parameters."""
        return model_lib.init(self.model, seed)

    def groups(self, params: Params) -> Any:
        """Those of the model; what is beside it is decayed."""
        beside = {name: params[name] for name in _HEAD if name in params}
        return model_lib.param_groups(self.model) | super().groups(beside)

    def redraw(self, params: Params, seed: Array, step: Array) -> Params:
        """Draw random features anew where the mixer says so."""
        beside = {name: params[name] for name in _HEAD if name in params}
        trained, fixed = model_lib.split_trained(self.model, _trunk(params))
        fixed = mixers.redraw(self.model, fixed, seed, step)
        return model_lib.joined(trained, fixed) | beside

    def embedded(
        self, params: Params, batch: base.Batch
    ) -> tuple[Any, Activations, mixers.SeqInfo]:
        """Return the model, its input [B, L, D] and where the tokens stand."""
        model = model_lib.merge(self.model, _trunk(params))
        seq = mixers.SeqInfo.of_tokens(batch["inputs"])
        seq = seq._replace(
            segment_ids=jnp.asarray(batch["segment_ids"]), tokens=batch["inputs"]
        )
        return model, model.embedded(batch["inputs"], seq), seq

    def figures(self, params: Params) -> dict[str, float]:
        """Learned temperatures, and how alike the slots of each layer's memory are."""
        taus = {
            f"temperature/{'.'.join(path)}/{name.removeprefix('log_')}": math.exp(value)
            for (*path, name), value in traverse_util.flatten_dict(params).items()
            if name.startswith("log_tau")
        }
        if not slots.Slots.measures(self.model):
            return taus
        batch = self.batch(0, "validation")
        options = dataclasses.replace(
            self.options, seed=0
        )  # seeds share what is compiled
        sums = _slot_sums(dataclasses.replace(self, options=options), params, batch)
        rows = float(sums.pop("rows"))
        return taus | {
            f"degradation/{name}": float(x) / rows for name, x in sums.items()
        }


class Classifier(TrunkTask):
    """One label for each row: batches have inputs and segment_ids [B, L], labels [B].

    Positions are learned and added to the embedding whatever the mixer: two-sided Luna has
    none of its own and would read a bag of tokens.
    """

    num_classes: ClassVar[int]

    def init(self, seed: int) -> Params:
        """Draw a trunk's parameters, positions [L, D] and a head of zeros [D, classes]."""
        params = super().init(seed)
        shape = (self.model.seq_len, self.model.embed_dim)
        positions = jax.random.normal(
            jax.random.fold_in(jax.random.key(seed), 1), shape
        )
        params["positions"] = {"embedding": self.model.embed_std * positions}
        head = jnp.zeros((self.model.embed_dim, self.num_classes))
        return params | {"classes": {"kernel": head}}

    def embedded(
        self, params: Params, batch: base.Batch
    ) -> tuple[Any, Activations, mixers.SeqInfo]:
        """As that of every trunk, with positions."""
        model, x, seq = super().embedded(params, batch)
        positions: Any = params["positions"]["embedding"]
        return model, x + positions[None].astype(x.dtype), seq

    def logits(self, params: Params, batch: base.Batch) -> Float[Array, "B classes"]:
        """Class logits from the mean over a row's tokens."""
        model, x, seq = self.embedded(params, batch)
        x = _mixed(model, x, seq)
        real = (seq.segment_ids != 0)[..., None]
        mean = jnp.sum(jnp.where(real, x, 0), axis=1) / jnp.sum(real, axis=1)
        kernel: Any = params["classes"]["kernel"]
        return mean.astype(jnp.float32) @ kernel

    def sums(self, params: Params, batch: base.Batch) -> base.Sums:
        """Nats and right answers, over the rows."""
        logits, labels = self.logits(params, batch), batch["labels"]
        nats = losses.token_nats(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        count = jnp.float32(len(labels))
        return {"loss": (jnp.sum(nats), count), "accuracy": (jnp.sum(correct), count)}


class Tagger(TrunkTask):
    """A target for each position: batches have inputs, segment_ids, targets, weights [B, L]."""

    def logits(self, params: Params, batch: base.Batch) -> Float[Array, "B L V"]:
        """Logits of each position's target."""
        model, x, seq = self.embedded(params, batch)
        return model.logits(_mixed(model, x, seq))

    def sums(self, params: Params, batch: base.Batch) -> base.Sums:
        """Nats and right answers, by their weights, and rows that are right throughout."""
        logits = self.logits(params, batch)
        weights, targets = jnp.asarray(batch["weights"]), batch["targets"]
        nats = losses.token_nats(logits, targets)
        correct = jnp.argmax(logits, axis=-1) == targets
        total = jnp.sum(weights)
        rows = jnp.all(correct | (weights == 0), axis=1)
        return {
            "loss": (jnp.sum(jnp.where(weights > 0, nats * weights, 0)), total),
            "accuracy": (jnp.sum(correct * weights), total),
            "row_accuracy": (jnp.sum(rows), jnp.float32(len(rows))),
        }


def _mixed(model, x, seq):
    """[B, L, D] through all blocks and the final norm."""
    if model.recurrence is None:
        return model.run_blocks(x, seq)[0]
    return model.recurrence(model, x, seq)[0]


def _trunk(params):
    return {name: x for name, x in params.items() if name not in _HEAD}


@functools.partial(jax.jit, static_argnums=0)
def _slot_sums(task, params, batch):
    return slots.figures(*task.embedded(params, batch))
