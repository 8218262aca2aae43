"""What the doctor keeps of a stream that it reads once: hashes, a sample, and the sample's lengths.

Shape suffixes: N items of a stream, M ids looked up, D repeats.
"""

import dataclasses
import itertools
import random
from array import array
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.tokenise import Tokenizer
from rqv2_jax.data.tokens import Store

SAMPLED = 20_000
# A length in tokens that no input has, so that nothing is truncated.
UNLIMITED = 1 << 40
QUANTILES = (0, 0.5, 0.9, 0.99, 1)


class Lengths(NamedTuple):
    """Lengths in tokens of sampled inputs before truncation, special tokens included.

    `quantiles` are those of QUANTILES. `cut` is the share of inputs that are longer than `limit`,
    `lost` the share of all tokens beyond it. Titles have no limit of their own.
    """

    name: str
    mean: float
    quantiles: tuple[float, ...]
    limit: int | None
    cut: float
    lost: float


class Sample:
    """At most SAMPLED items of a stream, each as likely as any other (algorithm R, Vitter 1985)."""

    def __init__(self, seed: int):
        self.items, self.seen, self.random = [], 0, random.Random(seed)

    def add(self, item: Any) -> None:
        """Offers the sample an item."""
        self.seen += 1
        if len(self.items) < SAMPLED:
            self.items.append(item)
        elif (place := int(self.random.random() * self.seen)) < SAMPLED:
            self.items[place] = item


class Hashes:
    """Hashes of the ids and of the texts of a stream, in its order."""

    def __init__(self):
        self._ids, self._texts = array("q"), array("q")

    def add(self, key: str, *texts: str) -> None:
        """Keeps hashes of an id and of what belongs to it."""
        # Python's hash has 64 bits, and another key in every process.
        self._ids.append(hash(key))
        self._texts.append(hash(tuple(" ".join(text.split()).casefold() for text in texts)))

    def __len__(self):
        return len(self._ids)

    @property
    def ids_N(self) -> np.ndarray:
        """Returns the hashes of the ids."""
        return np.asarray(self._ids)

    @property
    def texts_N(self) -> np.ndarray:
        """Returns the hashes of the texts."""
        return np.asarray(self._texts)

    def rows(self, ids_M: np.ndarray) -> np.ndarray:
        """Returns the row of each id [M], -1 where there is none."""
        order = np.argsort(self.ids_N)
        place_M = np.searchsorted(self.ids_N, ids_M, sorter=order)
        row_M = np.append(order, -1)[place_M]
        return np.where(np.append(self.ids_N, 0)[row_M] == ids_M, row_M, -1)


@dataclasses.dataclass(frozen=True)
class Split:
    """The queries of a split's file, those of them that take part, and the positives, one in each row.

    `complete` says whether all were read without an error.
    """

    file: Hashes
    queries: Hashes
    complete: bool
    query_rows_N: np.ndarray
    passage_texts_N: np.ndarray

    def pairs_N(self) -> np.ndarray:
        """Returns a hash of each positive and its query together."""
        return pair(self.queries.texts_N[self.query_rows_N], self.passage_texts_N)


def pair(query_texts: np.ndarray, passage_texts: np.ndarray) -> np.ndarray:
    """Returns one hash for each two, which broadcast."""
    odd = np.uint64(0x9E3779B97F4A7C15)
    return query_texts.view(np.uint64) * odd + passage_texts.view(np.uint64)


def repeats(texts_N: np.ndarray) -> np.ndarray:
    """Returns rows whose text is an earlier row's too, and the last such row before each, [2, D]."""
    order = np.argsort(texts_N, kind="stable")
    same = texts_N[order[1:]] == texts_N[order[:-1]]
    rows_2xD = np.stack([order[1:][same], order[:-1][same]])
    return rows_2xD[:, np.argsort(rows_2xD[0])]


def ids_of(items: Iterable, rows: Iterable[int]) -> list[str]:
    """Returns the ids of some rows of a stream, as Python writes strings."""
    rows = list(rows)
    ids = {i: x.id for i, x in enumerate(itertools.islice(items, max(rows) + 1)) if i in rows}
    return [repr(ids[row]) for row in rows]


def measure(
    tokenizer: Tokenizer,
    inputs: Inputs,
    queries: list[str],
    passages: list[tuple[str, str]],
    seed: int,
) -> list[Lengths]:
    """Returns lengths of queries, titles, passages (title, text) and SAMPLED random pairs."""
    titles, texts = (tokenizer.texts(list(strings)) for strings in zip(*passages))
    store, asked = Store(titles, texts, [], {}, ""), tokenizer.texts(queries)
    queries_N, passages_N = np.arange(len(queries)), np.arange(len(passages))
    pair_queries_N = np.random.default_rng(seed).permutation(np.resize(queries_N, SAMPLED))
    pair_passages_N = np.resize(passages_N, SAMPLED)
    limits = ("query_length", "passage_length", "pair_length")
    unlimited = dataclasses.replace(inputs, **dict.fromkeys(limits, UNLIMITED))

    def row(name: str, lengths: Callable[[Inputs], np.ndarray]) -> Lengths:
        whole_N, kept_N = lengths(unlimited), lengths(inputs)
        return Lengths(
            name,
            float(whole_N.mean()),
            tuple(np.quantile(whole_N, QUANTILES, method="nearest").tolist()),
            getattr(inputs, f"{name}_length", None),
            float((whole_N > kept_N).mean()),
            float((whole_N - kept_N).sum() / max(whole_N.sum(), 1)),
        )

    title = row("title", lambda _: titles.lengths(passages_N))
    return [
        row("query", lambda inputs: inputs.query_lengths(asked, queries_N)),
        *([title] if inputs.titles else []),
        row("passage", lambda inputs: inputs.passage_lengths(store, passages_N)),
        row(
            "pair",
            lambda inputs: inputs.pair_lengths(store, asked, pair_queries_N, pair_passages_N),
        ),
    ]
