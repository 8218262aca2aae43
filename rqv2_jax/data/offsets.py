"""Where each passage's line begins in a corpus's files, so that some passages are read alone.

Shape suffixes: F files of a corpus, N passages.
"""

import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rqv2_jax.data import files
from rqv2_jax.data.collection import Corpus, Passage
from rqv2_jax.errors import InputError


class Recorded:
    """A corpus that is read once, in order; notes meanwhile where lines begin."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self._starts = {file: array.array("q") for file in corpus.files}

    def passages(self) -> Iterator[Passage]:
        """Yields all passages."""
        return self.corpus.read(self._lines)

    def _lines(self, file: Path) -> Iterator[tuple[int, str]]:
        for number, start, line in files.placed_lines(file):
            self._starts[file].append(start)
            yield number, line

    def table(self, count: int) -> np.ndarray:
        """Returns the byte of each file at which each passage's line begins, and the end [F, N + 1].

        All `count` passages have to have been read before. Of a head line the table says nothing.
        """
        rows = []
        for file, starts in self._starts.items():
            if len(starts) - count not in (0, 1):
                raise ValueError(f"{file} has {len(starts)} lines for {count} passages")
            starts_N = np.frombuffer(starts, np.int64)[len(starts) - count :]
            rows.append(np.append(starts_N, file.stat().st_size))
        return np.stack(rows)


def read(corpus: Corpus, offsets_FxN: np.ndarray, rows: Sequence[int]) -> list[Passage]:
    """Returns the passages of some rows, in this order; reads no byte of the others' lines.

    `offsets_FxN` is a table of `Recorded`. Raises InputError where a file has changed since and has no
    passage in such a place; where it has another one, that is returned.
    """

    def lines(file: Path) -> Iterator[tuple[int, str]]:
        starts_N = offsets_FxN[corpus.files.index(file)]
        size = file.stat().st_size
        with file.open("rb", buffering=0) as stream:
            for row in rows:
                start, end = starts_N[row : row + 2].tolist()
                if not 0 <= start < end <= size:
                    raise InputError(f"{file}: has no line in the place of passage {row}")
                stream.seek(start)
                # Blank lines may follow.
                line = stream.read(end - start).partition(b"\n")[0]
                yield row + 1, line.decode("utf-8-sig", "replace").rstrip("\r")

    return list(corpus.read(lines))
