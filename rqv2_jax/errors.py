"""The exception that users see as a single line, and the reading of files that may be damaged."""

import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """A file, config, checkpoint or argument from the user that cannot be used.

    The message is one line: the place (`path:line:` if there is one), the fault, and the mend.
    """


# Exceptions that readers raise on files that are empty, cut short or overwritten. NumPy reads a header
# as Python.
DAMAGE = (
    *(OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def readable(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    """Returns `read()`, or None if the file or folder that it reads is damaged.

    Damage is printed as one line, and the caller makes the file again.
    """
    try:
        return read()
    except DAMAGE as e:
        # tqdm reads its settings when it is imported, so not before `hosts.start`.
        import tqdm

        tqdm.tqdm.write(f"{path}: cannot be read ({one_line(e)}); it is made again")
        return None


def one_line(error: Exception) -> str:
    """Returns the message of an error as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
