"""Token stores: every text tokenised once, in flat memory-mapped arrays with offsets.

Layout of a store folder:

    manifest.json                                  tokenizer and source hashes, counts, format, and
                                                   remarks: lines about what was left out, and how
                                                   splits were made
    passages/{titles,texts}.bin, .offsets.bin      token numbers end to end; where each text starts
                                                   and the last ends, int64
    passages/ids.json, .offsets.bin                the user's ids, one JSON string a line, by row
    passages/lines.npy                             [F, N + 1] where each passage's line begins in the F
                                                   files of the corpus; not there if they are gzipped
    <split>/{queries,ids}...                       the queries of a split
    <split>/qrels.npy                              [3, N] query row, passage row, relevance
    <split>/same_ids.npy                           [2, N] query row and passage row with one id

Where the re-ranker has another tokenizer, its tokens lie beside the others, in `titles.pairs.bin` etc.
Ids stay the user's strings in ids.json and are row numbers everywhere else. `tokenise` writes stores.

Shape suffixes: N pairs of a query and a passage, or passages; F files of a corpus.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rqv2_jax.errors import DAMAGE, InputError

SAMPLE = 2**16  # passages whose lengths are measured


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokenised texts: text i is `tokens[offsets[i] : offsets[i + 1]]`.

    `pairs` are the same texts by the re-ranker's tokenizer, where that is another.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    pairs: "Texts | None" = None

    def for_pairs(self) -> "Texts":
        """Returns the texts as the re-ranker reads them."""
        return self if self.pairs is None else self.pairs

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray:
        """Returns the tokens of one text."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Returns the number of tokens of each text in `rows` (any shape)."""
        return self.offsets[rows + 1] - self.offsets[rows]


class Ids(Sequence[str]):
    """The user's ids by row, which are read from their file when they are asked for.

    Strings of 21 million would take 1.3 GB of memory. Raises ValueError if the file is cut short.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.starts = read_offsets(path.with_suffix(""))
        self.lines = _flat(path, "uint8", int(self.starts[-1]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        return json.loads(self.lines[self.starts[row] : self.starts[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        with self.path.open() as file:
            yield from map(json.loads, file)


@dataclasses.dataclass(frozen=True)
class Queries:
    """The queries of one split with their labels: `qrels_3xN` = query row, passage row, relevance.

    `same_2xN` are the query rows and passage rows with one id, sorted; None where that is not known.
    `fingerprint` and `strings`, the texts themselves, are given for queries that are not from the
    store. `own_2xN` are pairs, sorted, of a query row and the row of the passage that is this query's
    own text: neither a negative nor a hit.
    """

    texts: Texts
    ids: list[str]
    qrels_3xN: np.ndarray
    fingerprint: str = ""
    own_2xN: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((2, 0), np.int64))
    strings: tuple[str, ...] = ()
    same_2xN: np.ndarray | None = None

    def positives(self) -> np.ndarray:
        """Returns the relevant pairs [2, N]: query row, passage row; sorted by query row."""
        pairs_2xN = self.qrels_3xN[:2, self.qrels_3xN[2] > 0]
        return pairs_2xN[:, np.argsort(pairs_2xN[0], kind="stable")]

    def never_negative(self) -> np.ndarray:
        """Returns the relevant pairs and those of `own_2xN` [2, N], sorted by query row."""
        pairs_2xN = np.concatenate([self.positives(), self.own_2xN], axis=1)
        return pairs_2xN[:, np.argsort(pairs_2xN[0], kind="stable")]

    def labels_of(self, rows_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the labels of some queries, in ascending order; their rows count through `rows_Q`."""
        query_N, passage_N, relevance_N = self.qrels_3xN
        chosen_N = np.isin(query_N, rows_Q)
        query_N = np.searchsorted(rows_Q, query_N[chosen_N])
        return query_N, passage_N[chosen_N], relevance_N[chosen_N]


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened token store; `splits` maps train, dev, test to their queries."""

    titles: Texts
    texts: Texts
    passage_ids: Sequence[str]
    splits: dict[str, Queries]
    fingerprint: str
    lines_FxN: np.ndarray | None = (
        None  # see `offsets.Recorded`, None if lines cannot be read alone
    )

    def for_pairs(self) -> "Store":
        """Returns the store with the passages as the re-ranker reads them."""
        titles, texts = self.titles.for_pairs(), self.texts.for_pairs()
        return dataclasses.replace(self, titles=titles, texts=texts)

    def empty(self, titles: bool) -> np.ndarray:
        """Returns row numbers of passages without tokens, counting the title if `titles`."""
        lengths_N = np.diff(self.texts.offsets)
        return np.flatnonzero(lengths_N + np.diff(self.titles.offsets) * titles == 0)

    def same_text(self, rows: np.ndarray, titles: bool) -> np.ndarray:
        """Returns numbers [N + 1] that are equal for passages of `rows` with the same tokens.

        Those of the title count if `titles`. Row -1, padding, has number -1, and so have all passages
        that are not among `rows`.
        """
        wanted_N = np.zeros(len(self.texts) + 1, bool)
        wanted_N[rows] = True
        wanted = np.flatnonzero(wanted_N[:-1])
        digests = np.empty(len(wanted), np.uint64)
        for i, row in enumerate(wanted.tolist()):
            tokens = self.titles.row(row).tobytes() * titles + self.texts.row(row).tobytes()
            digests[i] = int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")
        numbers_N = np.full(len(self.texts) + 1, -1)
        numbers_N[wanted] = np.unique(digests, return_inverse=True)[1]
        return numbers_N

    def sample(self) -> np.ndarray:
        """Returns row numbers of passages, evenly spread, whose lengths are measured."""
        count = len(self.texts)
        return np.arange(min(count, SAMPLE)) * count // min(count, SAMPLE)


def remarks(folder: pathlib.Path) -> list[str]:
    """Returns lines for people on a store's collection: what was left out, and how splits were made."""
    return _manifest(folder)["remarks"]


def open_store(folder: pathlib.Path) -> Store:
    """Opens a store, arrays memory-mapped; raises InputError if it is not there or damaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder}: holds no token store; run rqv2_jax.main on this workdir first")
    try:
        return read_store(folder)
    except DAMAGE as e:
        raise InputError(
            f"{folder}: the token store is damaged ({e}); run rqv2_jax.main on this workdir again"
        ) from e


def read_store(folder: pathlib.Path) -> Store:
    """Does what `open_store` does; raises one of `errors.DAMAGE` if a file is missing or cut short."""
    manifest = _manifest(folder)

    def check(name: str, actual: int, expected: int) -> None:
        if actual != expected:
            raise ValueError(f"{name} holds {actual} in place of {expected}")

    def texts(name: str, count: int, dtype: str = manifest["dtype"]) -> Texts:
        pairs = None
        if "pairs_dtype" in manifest and not name.endswith(".pairs"):
            pairs = texts(f"{name}.pairs", count, manifest["pairs_dtype"])
        offsets = read_offsets(folder / name)
        check(f"{name}.offsets.bin", len(offsets) - 1, count)
        return Texts(_flat(folder / f"{name}.bin", dtype, int(offsets[-1])), offsets, pairs)

    def ids(name: str, count: int) -> Ids:
        keys = Ids(folder / name / "ids.json")
        check(f"{name}/ids.json", len(keys), count)
        return keys

    def queries(split: str) -> Queries:
        count, qrels_3xN = manifest[f"{split}_queries"], np.load(folder / split / "qrels.npy")
        same_2xN = np.load(folder / split / "same_ids.npy")
        asked = texts(f"{split}/queries", count), list(ids(split, count)), qrels_3xN
        return Queries(*asked, same_2xN=same_2xN)

    passages, corpus_files, lines_FxN = manifest["passages"], manifest["corpus_files"], None
    if corpus_files:
        lines_FxN = np.load(folder / "passages" / "lines.npy", mmap_mode="r")
        check("passages/lines.npy", lines_FxN.size, corpus_files * (passages + 1))
    return Store(
        titles=texts("passages/titles", passages),
        texts=texts("passages/texts", passages),
        passage_ids=ids("passages", passages),
        splits={split: queries(split) for split in manifest["splits"]},
        fingerprint=read_fingerprint(folder),
        lines_FxN=lines_FxN,
    )


def read_offsets(path: pathlib.Path) -> np.ndarray:
    """Returns where each of some items begins in a file, and the end, from `<path>.offsets.bin`."""
    return np.memmap(f"{path}.offsets.bin", np.int64, "r")


def _flat(path: pathlib.Path, dtype: str, count: int) -> np.ndarray:
    """Maps a file of `count` numbers; raises ValueError if it holds more or fewer."""
    actual, expected = path.stat().st_size, np.dtype(dtype).itemsize * count
    if actual != expected:
        raise ValueError(f"{path.name} holds {actual} in place of {expected}")
    # An empty file cannot be mapped: a corpus may well have no titles at all.
    return np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)


def read_fingerprint(folder: pathlib.Path) -> str:
    """Returns the fingerprint of a store, for which its manifest has to be readable."""
    manifest = _manifest(folder)
    return f"{manifest['source']}-{manifest['tokenizer']}"


def _manifest(folder: pathlib.Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())
