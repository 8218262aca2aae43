"""The one exception that reaches users as a single line, and how damaged files are met."""

import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Something the user handed in (file, config, checkpoint, argument) cannot be used.

    The message is one line: where (`path:line:` when there is one), what is wrong, and the mend.
    """


# What readers raise on files that are empty, cut short or overwritten.
DAMAGE = (OSError, EOFError, LookupError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)


def readable(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    """Returns what `read()` makes of a file or folder that can be made again; None if it is damaged.

    Then one line says so and names it; the caller makes it again.
    """
    try:
        return read()
    except DAMAGE as e:
        # Reads its settings when it is imported, which is after this module is.
        import tqdm

        reason = " ".join(str(e).split())[:200] or type(e).__name__
        tqdm.tqdm.write(f"{path}: cannot be read ({reason}); it is made again")
        return None
