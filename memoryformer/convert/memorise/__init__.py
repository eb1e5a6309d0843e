"""A trained dense model's layers as memory layers, in closed form.

Given codes and scores a memory layer is linear in its tables, so the best tables for inputs and
outputs of a trained layer are a least-squares problem:

    min over T, b   sum_n |y_n - b - sum_k s[n, k] T_k[h[n, k]]|^2 + ridge |T|^2

    fit            the best tables for codes, scores and outputs: start there
    observations   what it is told of each token
    normal         its exact solution, from K C x K C sums
    gradients      its solution by conjugate gradients, which never form them
    fronts         thresholds, and the mix before the hash
    activations    inputs and outputs of a model's parts, block by block
    batches        the text: to fit to, to choose by, to tell the loss on
    conversion     a whole model
    source         what is converted, and the run that comes out
"""

from memoryformer.convert.memorise.fit import Fit, fit_tables
from memoryformer.convert.memorise.observations import Observations

__all__ = ["Fit", "Observations", "fit_tables"]
