"""PyTorch's `.pt` / `.bin` files: read and write them without PyTorch.

Such a file is a zip archive: `*/data.pkl`, a pickle in which each tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage, and `*/data/KEY`, the bytes of a storage.

Reading runs no code from the file: of the names that a pickle can ask for, the few that
make tensors and dictionaries are known here, and everything else (optimizer objects,
random number states, ..) becomes an inert placeholder. It is our own because `torch` is no
dependency of this package, and no other library reads these files without it. Start at `read`
and `write`.
"""

import collections
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from memoryformer.errors import DataError
from memoryformer.files import atomic

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}


def read(path: str | os.PathLike) -> Any:
    """Return what `torch.save` wrote, with numpy arrays for tensors.

    Raises `DataError` for a damaged file and for the format before PyTorch 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            with archive.open(name) as file:
                return _Unpickler(file, archive, name.removesuffix("data.pkl")).load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{path}: damaged, or written by PyTorch < 1.6 ({error}); load it with "
            "PyTorch and save it again."
        ) from error


def write(path: str | os.PathLike, tree: Any) -> None:
    """Write nested dicts, lists, numbers, strings and arrays as `torch.save` would.

    `torch.load` reads the file with `weights_only=True`.
    """
    root = pathlib.Path(path).stem
    with (
        atomic.replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        arrays: list[np.ndarray] = []
        with archive.open(f"{root}/data.pkl", "w", force_zip64=True) as file:
            _Pickler(file, arrays).dump(tree)
        archive.writestr(f"{root}/byteorder", "little")
        for key, array in enumerate(arrays):
            with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(array).tobytes())
        archive.writestr(f"{root}/version", "3\n")


class _Placeholder:
    """Stands for any object that is not data: takes everything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def __call__(self, *args, **kwargs):
        return _Placeholder()

    def __hash__(self):
        return id(self)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file, encoding="utf-8")
        self._archive = archive
        self._root = root
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])
        return _Placeholder

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, _, _ = pid
        if not isinstance(dtype, np.dtype):
            raise DataError("holds a storage of an unknown type.")
        if key not in self._storages:
            data = self._archive.read(f"{self._root}data/{key}")
            self._storages[key] = np.frombuffer(data, dtype)
        return self._storages[key]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> np.ndarray:
    # Many tensors can be views into one storage (DeepSpeed flattens a model so).
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    inside = 0 <= offset <= last < len(storage) and min(strides, default=0) >= 0
    if math.prod(shape) and not inside:
        raise DataError("a tensor reaches past the end of its storage.")
    itemsize = storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * itemsize for s in strides], writeable=False
    )


class _Global:
    """A name to be written as is: nothing of PyTorch is imported."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self):  # pickle wants a callable to reduce with
        raise TypeError(self.name)


class _Storage:
    def __init__(self, array: np.ndarray, key: int):
        self.array, self.key = array, key


class _Pickler(pickle._Pickler):  # the C pickler cannot write a bare name
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    write: Callable[[bytes], Any]  # the base's, as `memoize`: its stub has neither
    memoize: Callable[[Any], None]

    def __init__(self, file, arrays: list[np.ndarray]):
        super().__init__(file, protocol=2)
        self._arrays = arrays

    def save_name(self, obj: _Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    dispatch[_Global] = save_name

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, _Storage):
            return None
        kind = _Global("torch", _NAMES[obj.array.dtype])
        return ("storage", kind, str(obj.key), "cpu", obj.array.size)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        storage = _Storage(obj, len(self._arrays))
        self._arrays.append(obj)
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(obj.ndim))
        hooks: dict = collections.OrderedDict()
        args = (storage, 0, tuple(map(int, obj.shape)), strides, False, hooks)
        return _Global("torch._utils", "_rebuild_tensor_v2"), args
