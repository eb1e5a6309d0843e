"""What annotations promise: they are there, and in these tests they are checked."""

import importlib
import inspect
import pathlib

import jax.numpy as jnp
import jaxtyping
import pytest

import memoryformer
from memoryformer.ops import collectives, hashing, lookup, rotary

ROOT = pathlib.Path(memoryformer.__file__).parent
MODULES = [
    path.relative_to(ROOT.parent)
    .with_suffix("")
    .as_posix()
    .removesuffix("/__init__")
    .replace("/", ".")
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__main__.py"
]

NEEDED = {
    "memoryformer.harness.adapter": "lm_eval",
    "memoryformer.data.beam_pipeline": "apache_beam",
}


def public_functions(module):
    """(name, function) of every public function and method that the module defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isclass(value):
            for attribute, method in vars(value).items():
                function = inspect.unwrap(getattr(method, "__func__", method))
                public = not attribute.startswith("_")
                # A field's default may be a lambda.
                if (
                    inspect.isfunction(function)
                    and public
                    and function.__name__ != "<lambda>"
                ):
                    yield f"{name}.{attribute}", function
        elif callable(value):
            yield name, inspect.unwrap(value)


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_annotated(name):
    """Every argument and the result. Mutation: take one annotation away."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    for function_name, function in public_functions(importlib.import_module(name)):
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())
        if "." in function_name:
            parameters = parameters[1:]  # self
        bare = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
        if signature.return_annotation is inspect.Signature.empty:
            bare.append("the result")
        assert not bare, f"{function_name}: no annotation of {', '.join(bare)}"


def test_a_wrong_shape_is_refused():
    """Of an argument alone, of two that do not fit, of a type; and of a result.

    Mutation: no import hook in `conftest`, or the package imported before it.
    """
    x, positions = jnp.zeros((2, 3, 1, 8)), jnp.zeros((2, 3), jnp.int32)
    rotary.rotate(x, positions)
    tables, scores = jnp.zeros((3, 4, 5)), jnp.zeros((7, 3))
    for call in (
        lambda: rotary.rotate(x[0], positions),
        lambda: rotary.rotate(x, positions[:1]),
        lambda: rotary.rotate(x, positions.astype(jnp.float32)),
        lambda: lookup.lookup(tables, jnp.zeros((7, 3)), scores),
        lambda: hashing.scores(jnp.zeros((2, 3), jnp.int32)),
        lambda: collectives.axis_size(1),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            call()
