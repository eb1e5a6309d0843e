"""What looping over layers with `lax.scan`, and keeping less for the gradient, cost and save.

    python -m benchmarks.depth [--layers=4,12]

Compiles the loss and its gradient for this machine's first device without running them, and
prints one row for each form: CPU seconds of tracing and of compiling, bytes of temporary
memory and floating-point operations of the compiled program.
"""

import time

from benchmarks import arguments

FLAGS = arguments.Parser(__doc__)
FLAGS.numbers("layers", (4, 12), high=1000)

if __name__ == "__main__":
    FLAGS.parse_args()  # what is wrong is said before jax is imported

import jax
import jax.numpy as jnp

from memoryformer import model
from memoryformer.model import losses
from memoryformer.ops import remat as remat_lib

B, L = 4, 256
FORMS = [*((remat, False) for remat in remat_lib.REMAT), ("none", True), ("full", True)]


def compiled(num_layers: int, remat: str, scan: bool) -> str:
    """One row of the table."""
    config = model.ModelConfig(
        vocab_size=512,
        embed_dim=256,
        num_layers=num_layers,
        num_heads=4,
        seq_len=L,
        lookup="xla",
        remat=remat,
        scan_layers=scan,
    )

    def loss(params, batch):
        return jnp.sum(losses.batch_nats(config, params, batch))

    params = jax.eval_shape(lambda: model.init(config))
    ints = jax.ShapeDtypeStruct((B, L), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), ints)
    batch["weights"] = jax.ShapeDtypeStruct((B, L), jnp.float32)
    times = [time.process_time()]
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, batch)
    times.append(time.process_time())
    program = lowered.compile()
    times.append(time.process_time())
    temporary = program.memory_analysis().temp_size_in_bytes / 2**20
    tracing, compiling = times[1] - times[0], times[2] - times[1]
    loop = "scan" if scan else "Python"
    return (
        f"| {num_layers} | {loop} | {remat} | {tracing:.1f} | {compiling:.1f} "
        f"| {temporary:.0f} | {program.cost_analysis().get('flops', 0) / 1e9:.1f} |"
    )


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    args = FLAGS.parse_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)
    print(
        "| layers | loop | remat | tracing, s | compiling, s | temporary, MiB | GFLOP |"
    )
    print("|---|---|---|---|---|---|---|")
    for num_layers in args.layers:
        for form in FORMS:
            print(compiled(num_layers, *form), flush=True)


if __name__ == "__main__":
    arguments.run(main)
