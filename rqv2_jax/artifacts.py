"""Arrays and files on disk that record what they were made from, so finished work is not repeated.

On several hosts all processes call these functions; the first writes and the others wait for it.
Only `replace` and `replace_text` write in the process that calls them.
"""

import hashlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from rqv2_jax import hosts
from rqv2_jax.disk import replace_text, settle
from rqv2_jax.errors import readable


def cached(
    path: pathlib.Path, source: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns the arrays in the .npz at `path`, computed and written unless made from `source`.

    The file gets its name when it is complete, so one that is missing or damaged is computed again. All
    processes call `compute`, and all get the first one's arrays.
    """
    arrays: dict[str, np.ndarray] = {}

    def read() -> None:
        if not path.is_file():
            return
        with np.load(path) as f:
            if str(f["source"]) == source:
                arrays.update({name: f[name] for name in f.files if name != "source"})

    def is_made() -> bool:
        readable(path, read)
        return bool(arrays)

    if not hosts.from_first(is_made):
        computed = compute()
        write_arrays(path, {"source": np.array(source), **computed})
        if hosts.first():
            arrays = computed
    if not hosts.first():
        read()
    # The first process may soon make the file from another source.
    hosts.barrier()
    return arrays


def kept(folder: pathlib.Path, make: Callable[[], Any]) -> Any:
    """Returns `make()`, which fills a folder unless it is filled.

    File sizes are recorded beside the folder. If one has changed since, the folder is emptied first.
    """
    path = folder.with_name(f"{folder.name}.sizes.json")
    sizes: dict[str, int] = {}
    if hosts.first() and folder.is_dir() and path.is_file():
        sizes = readable(path, lambda: json.loads(path.read_text())) or {}

        def check() -> bool:
            for name, size in sizes.items():
                if (now := (folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {now} bytes in place of {size}")
            return True

        if not readable(folder, check):
            shutil.rmtree(folder)
    made = make()
    if hosts.first():
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        made_sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
        if made_sizes != sizes:
            replace_text(path, json.dumps(made_sizes, indent=1) + "\n")
    return made


def digest(source: str, *arrays: np.ndarray) -> str:
    """Returns a hash of a name and arrays, to name what is made from them."""
    hashed = hashlib.sha256(source.encode())
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def checksums(folder: pathlib.Path) -> dict[str, int]:
    """Returns the CRC-32 of every file in a folder, by its path there."""

    def checksum(path: pathlib.Path) -> int:
        value = 0
        with path.open("rb") as file:
            while part := file.read(2**24):
                value = zlib.crc32(part, value)
        return value

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): checksum(path) for path in files}


def replace(path: pathlib.Path, save: Callable[[pathlib.Path], None]) -> None:
    """Saves a file in the process that calls it; it gets its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    save(partial)
    settle(partial, path)


def write(path: pathlib.Path, save: Callable[[pathlib.Path], None]) -> None:
    """Saves a file as `replace` does, in the first process."""
    hosts.from_first(lambda: replace(path, save))


def write_arrays(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Writes an .npz file."""
    write(path, lambda partial: np.savez(partial, **arrays))


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file in the first process; readers see the old file or the new one, never a part."""
    hosts.from_first(lambda: replace_text(path, text))
