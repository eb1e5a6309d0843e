"""How a fault or a mutation gets into a process: functions replaced, nothing hooked.

A replacement that cannot work proves nothing about the tests. A missing name and parameters
that do not bind raise here, where the patch is applied; an exception of a mutation's own
ends the process with `UNBOUND`. What is replaced, and what of it is called, is written into
the file `calls`, line by line, because the process may be killed at any moment.
"""

import functools
import inspect
import os
import pathlib
import sys
import threading
import traceback

TESTS = pathlib.Path(__file__).parent
OURS = (TESTS, TESTS.parent / "memoryformer")
UNBOUND = 99  # exit code of a process whose patch does not work
calls: pathlib.Path | None = None  # where patches are entered, None for nowhere


def wrap(owner, name, around):
    """Replace the function `owner.name` by `around(original, *arguments)`."""
    original = _function(owner, name)
    _check_binds(original, around, given=(original,))

    def replacement(*args, **kwargs):
        return around(original, *args, **kwargs)

    _replace(owner, name, original, replacement)


def put(owner, name, replacement):
    """A patch that replaces the function `owner.name` by `replacement`."""

    def apply():
        original = _function(owner, name)
        _check_binds(original, replacement)
        _replace(owner, name, original, replacement)

    return apply


def settle():
    """Wait for the saves under way, so that nothing depends on how long they take."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint-"):
            thread.join()


def _function(owner, name):
    found = inspect.getattr_static(owner, name, None)
    if found is None:
        raise AttributeError(f"{_full_name(owner, name)} is nowhere")
    if isinstance(found, (staticmethod, classmethod, property)) or not callable(found):
        raise TypeError(f"{_full_name(owner, name)} is no plain function: {found!r}")
    return found


def _check_binds(original, replacement, given=()):
    """Refuse a replacement that some call of `original` would not bind to."""
    signature = inspect.signature(replacement)
    for args, kwargs in _possible_calls(original):
        try:
            signature.bind(*given, *args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"a replacement with parameters {signature} cannot stand for "
                f"{original.__qualname__}{inspect.signature(original)}: {error}"
            ) from error


def _possible_calls(function):
    """(args, kwargs): with the least, with all by place, and with options by name."""
    by_place, options, by_name = [], [], {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        ):
            optional = parameter.default is not parameter.empty
            (options if optional else by_place).append(parameter.name)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            by_name[parameter.name] = parameter.default is not parameter.empty
    required = {name: name for name, optional in by_name.items() if not optional}
    yield by_place, required
    yield by_place + options, dict.fromkeys(by_name)
    yield by_place, required | dict.fromkeys([*options, *by_name])


def _replace(owner, name, original, replacement):
    full_name, entered, seen = _full_name(owner, name), calls, set()
    _enter(entered, "bound", full_name)

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        if not seen:
            seen.add(full_name)
            _enter(entered, "called", full_name)
        try:
            return replacement(*args, **kwargs)
        except Exception as error:
            if _is_of_the_patch(error):
                traceback.print_exc()
                print(f"patch of {full_name}: {error!r}", file=sys.stderr, flush=True)
                os._exit(UNBOUND)
            raise

    setattr(owner, name, replaced)


def _enter(file, what, full_name):
    if file:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{what} {full_name}\n")


def _is_of_the_patch(error):
    """Whether the innermost of our files that `error` went through holds mutations."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [pathlib.Path(frame.filename) for frame in frames]
    ours = [f for f in files if any(f.is_relative_to(folder) for folder in OURS)]
    return ours[-1].name in ("patching.py", "mutations.py")


def _full_name(owner, name):
    return f"{getattr(owner, '__qualname__', owner.__name__)}.{name}"
