"""A mark for what can be compiled for one platform only: elsewhere lowering stops.

A program may be traced on one machine and compiled for another, so whether an implementation
can run is known when it is lowered, not before. Start at `platform`.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from memoryformer.notation import Array

NAMES = {"gpu": "cuda"}  # jax's name of a backend -> XLA's, where they differ

_mark = Primitive("only_on")


def platform(x: Array, name: str, what: str) -> Array:
    """Return integers x; lowering for another platform raises ValueError, naming `what`."""
    return _mark.bind(x, name=name, what=what)


def _lower(ctx, x, *, name, what):
    platforms = ctx.platforms or ctx.module_context.platforms
    wrong = set(platforms) - {name, NAMES.get(name)}
    if wrong:
        raise ValueError(
            f"{what} cannot run: the platform is {min(wrong)}, not {name}."
        )
    return [x]


def _run(x, *, name, what):
    return jax.jit(lambda x: _mark.bind(x, name=name, what=what))(x)


_mark.def_abstract_eval(lambda x, **_: x)
_mark.def_impl(_run)
batching.defvectorized(_mark)
mlir.register_lowering(_mark, _lower)
