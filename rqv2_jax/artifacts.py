"""Named arrays on disk that know what they were made from, so that finished work is not done again."""

import os
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np

from rqv2_jax.errors import InputError


def cached(
    path: pathlib.Path, source: str, compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays in the .npz at `path` if made from `source`, else computed and written there.

    The file appears under its name only when complete, so an interrupted run computes it again.

    Raises:
      InputError: the file is there but cannot be read.
    """
    if path.is_file():
        try:
            with np.load(path) as f:
                if str(f["source"]) == source:
                    return {name: f[name] for name in f.files if name != "source"}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
            raise InputError(f"{path}: not readable ({e}); delete it to make it again") from e
    arrays = compute()
    write_arrays(path, {"source": np.array(source), **arrays})
    return arrays


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]):
    """Writes an .npz file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, path)


def write_text(path: pathlib.Path, text: str):
    """Writes a small file in one step: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
