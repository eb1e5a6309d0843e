"""How a fault or a mutation gets into a process: attributes replaced, nothing hooked."""

import threading


def wrap(owner, name, around):
    """Replace `owner.name` by `around(original, *arguments)`."""
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        return around(original, *args, **kwargs)

    setattr(owner, name, replaced)


def put(owner, name, value):
    """A patch that replaces `owner.name` by `value`."""
    return lambda: setattr(owner, name, value)


def settle():
    """Wait for the saves under way, so that nothing depends on how long they take."""
    for thread in threading.enumerate():
        if thread.name.startswith("checkpoint-"):
            thread.join()
