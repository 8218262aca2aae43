"""Questions of a terminal or of standard input, answered one after the other."""

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

from rqv2_jax.errors import InputError


def questions() -> Iterator[str]:
    """Returns the questions that are typed or piped in, as they come; empty lines are left out.

    Raises InputError, before anything is loaded for them, if a pipe or file holds none.
    """
    if sys.stdin.isatty():
        return _with_text(_typed())
    # Waits for the first only.
    piped = _with_text(sys.stdin.buffer)
    first = next(piped, None)
    if first is None:
        raise InputError(
            "there is no question on standard input; give one, --topics FILE, or --serve; --help shows "
            "an example"
        )
    return itertools.chain([first], piped)


def _with_text(lines: Iterable[str | bytes]) -> Iterator[str]:
    texts = (x.decode(errors="replace") if isinstance(x, bytes) else x for x in lines)
    return (text.strip() for text in texts if text.strip())


def _typed() -> Iterator[str]:
    """Yields lines that are typed, until the end of the file (Ctrl-D)."""
    # Lets lines be edited, and earlier ones be had again.
    importlib.import_module("readline")
    while True:
        try:
            yield input("question> ")
        except EOFError:
            print()
            return


def answer(asked: Iterable[str], respond: Callable[[str], str], out: TextIO) -> None:
    """Prints the response to each question at once; ends early if nobody reads on."""
    try:
        for question in asked:
            print(respond(question), file=out, flush=True)
    except BrokenPipeError:
        # As after `| head`. Python would complain of the same when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
