"""Layers whose weights are only read: the equations of `layers`, on what `narrow` has stored.

On one device and without gradients. `params.merge` puts them in the place of the layers
whose weights are stored so. Start at `swap_in`.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx

from memoryformer.model import layers
from memoryformer.notation import Activations, Array
from memoryformer.ops.lookup import integer, screened
from memoryformer.ops.lookup import narrow as narrow_rows

_PRODUCTS: dict[type, Callable[..., Array]] = {
    narrow_rows.PackedMatrix: narrow_rows.product,
    integer.IntegerMatrix: integer.product,
    screened.ScreenedMatrix: screened.product,
}


def _product(x, matrix):
    """[.., D] -> float32 [.., V], as the matrix is stored."""
    return _PRODUCTS[type(matrix)](x, matrix)


class NarrowMemoryLayer(layers.MemoryLayer):
    """A `MemoryLayer` with `PackedTables`."""

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> [.., *features], in the layer's dtype."""
        tables: Any = self.tables.get_value()  # `PackedTables`, see `swap_in`
        bias = None if self.bias is None else self.bias[...]
        y = narrow_rows.memory_layer(
            self.hashed(x),
            tables,
            bias,
            self.score,
            self.temperature,
            self.learned(),
            self.rows_read,
        )
        return y.reshape(*x.shape[:-1], *tables.values.shape[2:]).astype(self.dtype)


class NarrowDense(layers.Dense):
    """A `Dense` with a packed matrix."""

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> [.., *features], in the layer's dtype."""
        kernel: Any = self.kernel.get_value()  # packed, see `swap_in`
        y = _product(x, kernel).astype(self.dtype)
        y = y.reshape(*x.shape[:-1], *self.features)
        bias = None if self.bias is None else self.bias[...]
        return y if bias is None else y + layers.align(bias, y.ndim)


class NarrowHead(layers.Head):
    """A `Head` with a packed matrix."""

    def __call__(self, x: Activations) -> Array:
        """[.., D] -> float32 [.., V]."""
        kernel: Any = self.kernel.get_value()  # packed, see `swap_in`
        return _product(x, kernel)

    def most_likely(self, x: Activations) -> Array:
        """The argmax of the logits, [.., D] -> int32 [..], where they are screened."""
        kernel: Any = self.kernel.get_value()  # a `ScreenedMatrix`
        return screened.top(x, kernel)[1][..., 0]


_NARROW = {
    layers.MemoryLayer: ("tables", NarrowMemoryLayer),
    layers.Dense: ("kernel", NarrowDense),
    layers.Head: ("kernel", NarrowHead),
}
_PACKED = (narrow_rows.PackedTables, *_PRODUCTS)


def swap_in(model: nnx.Module) -> None:
    """Make narrow layers of those in `model` whose weights are packed."""
    for _, module in nnx.iter_modules(model, graph=False):
        name, narrow = _NARROW.get(type(module), ("", None))
        if narrow and isinstance(getattr(module, name).get_value(), _PACKED):
            layers.become(module, narrow)
