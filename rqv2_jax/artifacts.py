"""Named arrays on disk that know what they were made from, so that finished work is not done again.

On several hosts all call these functions; the first process writes, the others wait until it has.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from rqv2_jax import hosts
from rqv2_jax.errors import readable


def cached(
    path: pathlib.Path, source: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays in the .npz at `path` if made from `source`, else computed and written there.

    The file appears under its name only when complete, so an interrupted run computes it again, and so
    does one that finds it damaged. All processes call `compute`; what the first one's returns is what
    all get.
    """
    found: dict[str, np.ndarray] = {}

    def read():
        if not path.is_file():
            return
        with np.load(path) as f:
            if str(f["source"]) == source:
                found.update({name: f[name] for name in f.files if name != "source"})

    def there():
        readable(path, read)
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


def kept(folder: pathlib.Path, make: Callable[[], Any]) -> Any:
    """Returns `make()`, which fills a folder unless it is filled.

    The sizes of the files are kept beside the folder, which is emptied first if one differs by then.
    """
    path, sizes = folder.with_name(f"{folder.name}.sizes.json"), {}
    if hosts.first() and folder.is_dir() and path.is_file():
        sizes = readable(path, lambda: json.loads(path.read_text())) or {}

        def check():
            for name, size in sizes.items():
                if (found := (folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes in place of {size}")
            return True

        if not readable(folder, check):
            shutil.rmtree(folder)
    made = make()
    if hosts.first():
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        found = {str(file.relative_to(folder)): file.stat().st_size for file in files}
        if found != sizes:
            replace_text(path, json.dumps(found, indent=1) + "\n")
    return made


def digest(source: str, *arrays: np.ndarray) -> str:
    """Names what was made from something that has a name and from arrays."""
    found = hashlib.sha256(source.encode())
    for array in arrays:
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]):
    """Writes an .npz file in one step."""

    def write():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial.npz")
        np.savez(partial, **arrays)
        os.replace(partial, path)

    hosts.from_first(write)


def write_text(path: pathlib.Path, text: str):
    """Writes a small file in one step: a reader sees the old one or the new one."""
    hosts.from_first(lambda: replace_text(path, text))


def replace_text(path: pathlib.Path, text: str):
    """Does what `write_text` does, in this process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        # A machine that loses its power soon after would else keep an empty file under the name.
        os.fsync(file.fileno())
    os.replace(partial, path)
