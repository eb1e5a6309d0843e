"""Object stores for tests: fsspec's memory://, with what is put there written down."""

import pathlib

from memoryformer.files import lease, stores


def put(folder, url):
    """Put a local folder's files into a store, as a user's own tool would."""
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            stores.Store(url).write(name, path)


class Recorder:
    """Writes down what is put and removed: (name, content; None: removed), markers left out.

    From the first whose name begins with `gone` on every one fails: there is no network.
    """

    def __init__(self, monkeypatch, gone=None):
        self.done, self.gone, self.failing = [], gone, False
        write, remove = stores.Store.write, stores.Store.remove

        def recorded_write(store, name, content):
            data = content if isinstance(content, bytes) else content.read_bytes()
            self._note(name, data)
            write(store, name, content)

        def recorded_remove(store, name):
            self._note(name, None)
            remove(store, name)

        monkeypatch.setattr(stores.Store, "write", recorded_write)
        monkeypatch.setattr(stores.Store, "remove", recorded_remove)

    def _note(self, name, content):
        self.failing |= bool(self.gone) and name.startswith(self.gone)
        if self.failing:
            raise stores.StorageError(f"{name}: the network is gone")
        if not name.startswith(lease.FOLDER):
            self.done.append((name, content))
