"""Annotated shapes and types are checked at every call of a function of `ops`."""

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def checked_shapes():
    """Switch on what the hook of the conftest above has put around the functions."""
    jaxtyping.config.update("jaxtyping_disable", False)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)
