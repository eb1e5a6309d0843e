"""The codes of memory layers, returned: which row of each table each token reads.

Layers that are asked to (`ask`) keep the codes of their last call. What a layer keeps while a
loop or a checkpoint is traced must leave it as a value: `pure` makes a function of a module that
returns its codes beside its result, and `give` puts them back outside. A model that is not asked
keeps nothing and computes nothing more. Start at `of_tokens`.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flax import nnx

from memoryformer.model import layers
from memoryformer.notation import Codes, Tokens

if TYPE_CHECKING:
    from memoryformer.model.transformer import Transformer

CodesByPath = dict[str, Codes]  # 'blocks.0.mixer.qkv' -> int32 [B, L, K]


def of_tokens(model: "Transformer", tokens: Tokens, seq: Any) -> CodesByPath:
    """Return the codes of every memory layer that reads tokens [B, L], by its path."""
    ask(model)
    model.features(tokens, seq)
    return taken(model)


def ask(module: nnx.Module) -> None:
    """Let every memory layer inside keep its codes, but for those that read no tokens.

    The latter are what a module's `of_memory` names.
    """
    modules = dict(nnx.iter_modules(module, graph=False))
    for path, layer in modules.items():
        parent = modules[path[:-1]] if path else None
        if path and path[-1] in getattr(parent, "of_memory", ()):
            continue
        if isinstance(layer, layers.MemoryLayer):
            layer.keeps_codes = True


def pure(
    module: nnx.Module, call: Callable[..., Any] = lambda module, *args: module(*args)
) -> tuple[Callable[..., tuple[Any, CodesByPath]], Any]:
    """Return (function, params): function(params, *args) -> (call(module, *args), its codes)."""
    graph, params = nnx.split(module, graph=False)

    def function(params, *args):
        module = nnx.merge(graph, params)
        return call(module, *args), taken(module)

    return function, params


def taken(module: nnx.Module) -> CodesByPath:
    """Take away what the layers inside have kept."""
    codes = {}
    for name, layer in _memory_layers(module):
        if hasattr(layer, "codes"):
            codes[name] = layer.codes.get_value()
            del layer.codes
    return codes


def give(module: nnx.Module, codes: CodesByPath) -> None:
    """Let the layers inside keep these codes: undo `taken`."""
    if codes:
        for name, layer in _memory_layers(module):
            if name in codes:
                layer.codes = nnx.Intermediate(codes[name])


def _memory_layers(module: nnx.Module) -> Iterator[tuple[str, layers.MemoryLayer]]:
    for path, layer in nnx.iter_modules(module, graph=False):
        if isinstance(layer, layers.MemoryLayer):
            yield ".".join(map(str, path)), layer
