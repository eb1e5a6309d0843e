"""What is freed stays with the process, unless somebody said otherwise."""

import pathlib
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, threading
from memoryformer.training import host_memory
kept = host_memory.keep()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
size = 80 << 20
counts = []
thread = threading.Thread(target=lambda: counts.extend(faults() for _ in range(2)))
thread.start()
thread.join()
print(kept, counts[1] < 100)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.parametrize(
    "environment, kept",
    [
        ({"JAX_PLATFORMS": "cpu"}, True),
        (
            {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=9"},
            False,
        ),
        ({"JAX_PLATFORMS": "cpu", "MALLOC_ARENA_MAX": "2"}, False),
    ],
)
def test_a_block_is_cleared_once(environment, kept):
    """80 MB, twice, in a thread: the second time no page is new.

    Mutations: no `_M_ARENA_MAX`; the environment not looked at.
    """
    command = [sys.executable, "-c", CODE]
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(kept), str(kept)]
