"""Named arrays on disk that know what they were made from, so that finished work is not done again.

On several hosts all call these functions; the first process writes, the others wait until it has.
"""

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np

from rqv2_jax import hosts
from rqv2_jax.errors import InputError


def cached(
    path: pathlib.Path, source: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays in the .npz at `path` if made from `source`, else computed and written there.

    The file appears under its name only when complete, so an interrupted run computes it again. All
    processes call `compute`; what the first one's returns is what all get.

    Raises:
      InputError: the file is there but cannot be read.
    """
    found: dict[str, np.ndarray] = {}

    def read():
        if not path.is_file():
            return
        try:
            with np.load(path) as f:
                if str(f["source"]) == source:
                    found.update({name: f[name] for name in f.files if name != "source"})
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
            raise InputError(f"{path}: not readable ({e}); delete it to make it again") from e

    def there():
        read()
        return bool(found)

    if not hosts.from_first(there):
        arrays = compute()
        write_arrays(path, {"source": np.array(source), **arrays})
        if hosts.first():
            found = arrays
    if not hosts.first():
        read()
    # The first process may soon make the file from another source.
    hosts.barrier()
    return found


def digest(source: str, *arrays: np.ndarray) -> str:
    """Names what was made from something that has a name and from arrays."""
    found = hashlib.sha256(source.encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def _write(path: pathlib.Path, partial: pathlib.Path, write: Callable[[], object]):
    def whole():
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
        os.replace(partial, path)

    hosts.from_first(whole)


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]):
    """Writes an .npz file in one step."""
    partial = path.with_name(f"{path.stem}.partial.npz")
    _write(path, partial, lambda: np.savez(partial, **arrays))


def write_text(path: pathlib.Path, text: str):
    """Writes a small file in one step: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    _write(path, partial, lambda: partial.write_text(text))
