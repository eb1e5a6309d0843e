"""When does data determine a linear attention, or the tables of a memory layer?

Both are linear in features of their inputs, so least squares finds the best one, and the
second moment of the features says whether another one computes the same. Start at
`linear_attention.fit_heads` and `tables.certificate`; `python -m memoryformer.identifiability`
runs the studies and looks at a trained run.
"""

from memoryformer.identifiability.linear_attention import (
    certificate,
    fit_heads,
    predict,
)

__all__ = ["certificate", "fit_heads", "predict"]
