"""Files and folders that get their name when they are complete and on the disk."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from rqv2_jax.errors import InputError


def _sync(path: pathlib.Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def settle(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a complete file or folder its name; after a power failure either is there, whole."""
    for each in (*(partial.rglob("*") if partial.is_dir() else ()), partial):
        _sync(each)
    os.replace(partial, path)
    _sync(path.parent)


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file; readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    settle(partial, path)


def check_new(path: pathlib.Path) -> None:
    """Raises `InputError` if `path` is a file, or a folder that is not empty."""
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path}: is a folder that is not empty; name a new one or empty it")
    if os.path.lexists(path) and not path.is_dir():
        raise InputError(f"{path}: is there and is no folder; name a new one")


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder to fill, which becomes `path` at the end, or is removed if an exception is raised.

    Raises `InputError` if `path` is there and not empty, or the system does not let it be written.
    """
    check_new(path)
    # Of a link, the folder that it names is replaced.
    place = path.resolve()
    partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        settle(partial, place)
    except OSError as e:
        # A full disk has a line of its own.
        if e.errno == errno.ENOSPC:
            raise
        raise InputError(f"{path}: cannot be written ({e}); name another folder") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
