"""Files and folders that get their name when they are complete and on the disk."""

import os
import pathlib


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
