"""llama.cpp, through llama-cpp-python's bindings, on a GGUF file of our dense twin.

Logits of the unrounded file are held against the twin's first. llama.cpp's GELU is a table of
16-bit values of the form with tanh, so that the twin computes that form then, and the rest of the
difference is the table's. LLAMA_CPP_LIB_PATH names the folder of another build's libraries.
"""

import ctypes
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from benchmarks.decode import ours, peers

TOLERANCE = 5e-3  # of the largest logit; the table's entries are off by 1e-3


def make(twin: Callable[[], tuple], kind: str, folder: pathlib.Path) -> peers.Peer:
    """The twin's weights as `q8_0` or `q4_0`."""
    from benchmarks.decode import gguf_file

    path = folder / f"twin-{kind}.gguf"
    if not path.exists():
        checked = folder / "llama.cpp-checked"
        if not checked.exists():
            _check_unrounded(folder / "twin-f32.gguf", *twin())
            checked.touch()
        gguf_file.write(path, *twin(), kind)
    engine = Engine(path)
    return peers.Peer(engine.decode, engine.prefill, path.stat().st_size)


def _check_unrounded(path, config, params) -> None:
    """The logits of a float32 file of two blocks, which is then removed, are the twin's."""
    from benchmarks.decode import gguf_file

    config, params = ours.first_blocks(config, params)
    gguf_file.write(path, config, params, "f32")
    tokens = peers.long_prompt(24, config.vocab_size)
    logits = Engine(path).logits(tokens)
    path.unlink()
    expected = ours.twin_logits(config, params, tokens, "gelu_tanh")
    ours.check_logits("llama.cpp in float32", logits, expected, TOLERANCE)


class Engine:
    """One loaded file; a context of caches for each number of streams."""

    def __init__(self, path: pathlib.Path):
        import llama_cpp

        self._library = llama_cpp
        _start(llama_cpp)
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._contexts: dict = {}

    def decode(self, streams: int, tokens: int) -> np.ndarray:
        """Greedy tokens [tokens + 1, streams] after prompts of one."""
        context = self._context(streams, tokens + 1)
        token = np.array(peers.prompts(streams))[:, 0]
        chosen = []
        for position in range(tokens + 1):
            self._read(context, token, [position] * streams, range(streams))
            token = np.array([self._row(context, i).argmax() for i in range(streams)])
            chosen.append(token)
        return np.array(chosen)

    def prefill(self, length: int) -> int:
        """Read a prompt and choose the next token."""
        context = self._context(1, length)
        tokens = peers.long_prompt(length, self._vocab_size)
        self._read(context, tokens, range(length), [0] * length, last_only=True)
        return int(self._row(context, length - 1).argmax())

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [L, V] after each of these, nothing rounded on the way."""
        length = len(tokens)
        context = self._context(1, length, wide=True)
        self._read(context, tokens, range(length), [0] * length)
        return np.stack([self._row(context, i).copy() for i in range(length)])

    def _context(self, streams, length, wide=False):
        """An empty context for so many streams of so many tokens."""
        key = (streams, length, wide)
        if key not in self._contexts:
            options = self._library.llama_context_default_params()
            options.n_seq_max = streams
            options.n_ctx = streams * (-(-length // 256) * 256)
            options.n_batch = options.n_ubatch = max(512, streams)
            threads = len(os.sched_getaffinity(0))
            options.n_threads = options.n_threads_batch = threads
            if wide:  # a cache of float32, and no fused attention on 16-bit keys
                options.type_k = options.type_v = self._library.GGML_TYPE_F32
                options.flash_attn_type = self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED
                options.n_outputs_max_per_seq = length
            context = self._library.llama_init_from_model(self._model, options)
            if not context:
                raise RuntimeError("llama.cpp cannot make a context")
            self._contexts[key] = context
        context = self._contexts[key]
        memory = self._library.llama_get_memory(context)
        self._library.llama_memory_clear(memory, True)
        return context

    def _read(self, context, tokens, positions, streams, last_only=False):
        """One pass over tokens, each at its position of its stream."""
        batch = self._library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        rows = zip(tokens, positions, streams, strict=True)
        for i, (token, position, stream) in enumerate(rows):
            batch.token[i], batch.pos[i] = int(token), position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
            batch.logits[i] = not last_only or i == len(tokens) - 1
        status = self._library.llama_decode(context, batch)
        self._library.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama.cpp cannot decode: status {status}")

    def _row(self, context, i):
        row = self._library.llama_get_logits_ith(context, i)
        return np.ctypeslib.as_array(row, (self._vocab_size,))


@functools.cache
def _start(library):
    """Load what it computes with, and take its log away."""
    if folder := os.environ.get("LLAMA_CPP_LIB_PATH"):
        # A llama.cpp built elsewhere may have a file for each kind of processor.
        ggml = ctypes.CDLL(os.path.join(folder, "libggml.so"))
        ggml.ggml_backend_load_all_from_path(os.fsencode(folder))
    library.llama_backend_init()
    callback = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    return callback  # it must live as long as the library
