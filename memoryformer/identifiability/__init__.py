"""When does data determine a linear attention, or the tables of a memory layer?

Both are linear in features of their inputs, so least squares finds the best one, and the
second moment of the features says whether another one computes the same. Start at
`linear_attention.fit_heads` and `tables.certificate`; `python -m memoryformer.identifiability`
runs the studies and looks at a trained run.

The command reads its flags before it needs jax, so that what others call (`fit_heads`,
`certificate`, `predict`, all of `linear_attention`) is imported when it is asked for.
"""

from typing import Any

_OTHERS_CALL = ("certificate", "fit_heads", "predict")


def __getattr__(name: str) -> Any:
    if name not in _OTHERS_CALL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from memoryformer.identifiability import linear_attention

    return getattr(linear_attention, name)
