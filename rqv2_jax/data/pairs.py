"""Questions with their answers as queries, passages and labels, and their parts train, dev and test.

Two texts are equal where only case and white space differ, and the first is kept. A passage is its
title and its text. Equal passages become one with several queries, equal questions one query with
several positives.

Queries form a group if they have a positive passage in common, or positives with the same text under
other titles, or the same wording (only case, white space and punctuation differ). So do groups with a
query in common. A group is never split. A hash of the wordings orders the groups, so the order of rows
does not matter.

Shape suffixes: Q queries, N pairs of query and passage, G groups.
"""

import hashlib
import itertools
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rqv2_jax.data import files
from rqv2_jax.data.collection import Passage
from rqv2_jax.errors import InputError

SPLITS = ("train", "dev", "test")
_BETWEEN_WORDS = regex.compile(r"[\p{P}\p{Z}\p{C}]+")


class Merged:
    """Passages, or queries (without titles), each once; `what` names them in errors."""

    def __init__(self, what: str):
        self.what, self.items, self.renamed = what, list[Passage](), 0
        self._rows, self._given = dict[bytes, int](), dict[str, tuple[int, str]]()

    def add(self, place: str, title: str, text: str, key: str | None = None) -> int:
        """Returns the row of a text, a new one unless an equal text has one; `key` is its id.

        Without a key the id is a number behind the first letter of `what`. Raises `InputError` at an
        id that no run file could hold, or that another text has.
        """
        equal = _digest("\t".join(" ".join(each.split()).casefold() for each in (title, text)))
        row = self._rows.setdefault(equal, len(self.items))
        if key is not None:
            if not key:
                raise InputError(f"{place}: the {self.what} has no id; write one into every row")
            files.check_id(place, key)
            known, first = self._given.setdefault(key, (row, place))
            if known != row:
                raise InputError(
                    f"{place}: id {key!r} is that of another {self.what} at {first}; make ids unique"
                )
        if row == len(self.items):
            name = f"{self.what[0]}{row}" if key is None else key
            self.items.append(Passage(name, title, text))
        elif key is not None and key != self.items[row].id:
            self.renamed += 1
        return row


class Pairs(NamedTuple):
    """What the rows hold, each query, passage and pair once; `pairs` has (query row, passage row)."""

    queries: list[Passage]
    passages: list[Passage]
    pairs: list[tuple[int, int]]


class Parts(NamedTuple):
    """The part of each query [Q], as its number in SPLITS, and the queries of each group [G]."""

    split_Q: np.ndarray
    size_G: np.ndarray


def wording(text: str) -> str:
    """Returns a text in lower case, without punctuation and in one Unicode form (NFKC)."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _BETWEEN_WORDS.sub(" ", folded).strip() or folded


def divide(found: Pairs, shares: Sequence[float], seed: int) -> Parts:
    """Returns a part for every query: `shares` of the queries, about, to train, dev and test.

    Groups are taken in the order of their hash, first for test, then for dev, each if it does not make
    the part larger than its share; if none fits, the smallest. The rest is train. Raises `InputError`
    if there are too few groups.
    """
    worded_Q = [wording(query.text) for query in found.queries]
    group_Q = _groups(worded_Q, found)
    size_G = np.bincount(group_Q)
    if len(size_G) < len(SPLITS):
        raise InputError(
            f"questions with a passage: {len(group_Q):,}, groups of them without a common passage: "
            f"{len(size_G):,}; train, dev and test need one each; add rows"
        )
    free, sizes = _by_hash(worded_Q, group_Q, seed), size_G.tolist()
    split_G = np.zeros(len(size_G), int)
    for split in (2, 1):
        left, chosen = round(shares[split] * len(group_Q)), []
        for group in free:
            if sizes[group] <= left:
                chosen.append(group)
                left -= sizes[group]
        split_G[chosen or [min(free, key=sizes.__getitem__)]] = split
        free = [group for group in free if split_G[group] == 0]
        if not free:
            raise InputError(
                f"a part is empty if {SPLITS[split]} has its share; give it a smaller one"
            )
    return Parts(split_G[group_Q], size_G)


def _by_hash(worded_Q: list[str], group_Q: np.ndarray, seed: int) -> list[int]:
    """Returns the groups in the order of a hash of the seed and of the wordings in each."""
    lowest = dict[int, bytes]()
    for group, worded in zip(group_Q.tolist(), worded_Q, strict=True):
        digest = _digest(worded)
        lowest[group] = min(lowest.get(group, digest), digest)
    # Hashed again, as the lowest hash of a large group is lower than that of a small one.
    return sorted(lowest, key=lambda group: _digest(f"{seed}\t{lowest[group].hex()}"))


def _groups(worded_Q: list[str], found: Pairs) -> np.ndarray:
    """Returns the group of each query [Q]."""
    number = itertools.count()
    rows = dict[bytes, int]()

    def node(text: str) -> int:
        digest = _digest(text)
        if digest not in rows:
            rows[digest] = next(number)
        return rows[digest]

    query_Q = np.array([node(f"query\t{each}") for each in worded_Q], np.int64)
    positives = {passage for _, passage in found.pairs}
    passages = {row: node(f"passage\t{wording(found.passages[row].text)}") for row in positives}
    edges_Nx2 = np.array([(query_Q[q], passages[p]) for q, p in found.pairs]).reshape(-1, 2)
    ones_N = np.ones(len(edges_Nx2), bool)
    graph = coo_array((ones_N, tuple(edges_Nx2.T)), shape=(len(rows), len(rows)))
    component = connected_components(graph, directed=False)[1]
    # Every component has a query, but numbers of those that come first may be any.
    return np.unique(component[query_Q], return_inverse=True)[1]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
