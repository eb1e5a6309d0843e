"""What a student is told beside the text: a teacher's distribution, and its features.

    p = softmax(logits / T)                                     over V, of student and teacher
    divergence = T^2 sum_v p_teacher[v] (log p_teacher[v] - log p_student[v])
    distance   = |x_student - x_teacher|^2 / |x_teacher|^2      x [D]: what the head reads
    objective  = (1 - weight) nats + weight divergence + hidden distance

T^2 keeps the size of the gradient, which falls as 1 / T^2: for large T it tends to that of half
the squared distance of the centred logits, over V. Hinton et al. (arXiv:1503.02531). On a `model`
axis each device holds its part of V and of D, and the sums cross that axis. Start at `objective`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memoryformer import model as model_lib
from memoryformer.model import losses, mixers
from memoryformer.notation import Activations, Array, Float, Params
from memoryformer.ops import collectives


class Output(NamedTuple):
    """What a model says of a batch."""

    features: Activations  # [B, L, D], what the head reads
    logits: Float[Array, "B L V"]


def output(
    model_config: model_lib.ModelConfig, params: Params, batch: losses.Batch
) -> Output:
    """Run a model on a batch, without padding or weights."""
    model = model_lib.merge(model_config, params)
    seq = mixers.SeqInfo(batch["positions"], batch["segment_ids"])
    features, _ = model.features(batch["inputs"], seq)
    return Output(features, model.logits(features))


def divergence(
    logits: Float[Array, "B L V"], teacher: Float[Array, "B L V"], temperature: float
) -> Float[Array, "B L"]:
    """T^2 KL(teacher || student) at temperature T, in nats: float32 [B, L, V] twice -> [B, L]."""
    ours, theirs = (
        z - losses.log_total(z)[..., None]
        for z in (logits / temperature, teacher / temperature)
    )
    terms = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return temperature**2 * collectives.psum(terms, collectives.MODEL_AXIS)


def distance(x: Activations, teacher: Activations) -> Float[Array, "B L"]:
    """|x - teacher|^2 / |teacher|^2 of [B, L, D] -> [B, L]; 0 / 0 of padding is 0."""
    x, teacher = x.astype(jnp.float32), teacher.astype(jnp.float32)
    squares = jnp.stack([jnp.square(x - teacher), jnp.square(teacher)])
    apart, size = collectives.psum(jnp.sum(squares, axis=-1), collectives.MODEL_AXIS)
    return apart / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


def objective(
    student: Output,
    teacher: Output,
    batch: losses.Batch,
    *,
    temperature: float,
    weight: float,
    hidden: float,
) -> dict[str, Float[Array, "B L"]]:
    """Return the weighted terms of every token: {'nats', 'divergence', 'objective'}.

    The teacher's gradient is stopped.
    """
    teacher = jax.lax.stop_gradient(teacher)
    nats = losses.token_nats(student.logits, batch["targets"])
    apart = divergence(student.logits, teacher.logits, temperature)
    total = (1 - weight) * nats + weight * apart
    if hidden:
        total += hidden * distance(student.features, teacher.features)
    terms = {"nats": nats, "divergence": apart, "objective": total}
    return {name: losses.weighted(term, batch) for name, term in terms.items()}
