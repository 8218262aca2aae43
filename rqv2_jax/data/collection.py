"""Collections: passages, queries and relevance labels, streamed from the files of a reader.

Ids are the user's strings here; `check_qrels` turns them into row numbers. A file that cannot be
read as it is raises `InputError`, one line with the file, the line number and the mend. What real
data contain and training cannot use is left out and counted, by one rule for all formats:

    a passage without text               kept, empty, for labels and results may name it
    a query without text                 left out, with its labels
    a query without a positive           left out
    a label for a missing passage        left out if it is not positive, else an error
    a label for a missing query          the same
    a negative relevance                 not relevant, as 0
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from rqv2_jax.errors import InputError

T = TypeVar("T")
# Where the files have no dev split, about a hundred of the training queries are dev, but at most
# one in ten and at least one in a hundred.
HELD_OUT = 100
FEWEST_HELD_OUT = 10


class Passage(NamedTuple):
    """One retrievable text; `title` is empty where the source has none."""

    id: str
    title: str
    text: str

    def shown(self) -> str:
        """Returns the passage as text for people, the title first."""
        return f"{self.title}: {self.text}" if self.title else self.text


class Query(NamedTuple):
    """One question; `answers` are the strings an answer may contain, empty where unknown."""

    id: str
    text: str
    answers: tuple[str, ...]


class Qrel(NamedTuple):
    """One relevance label, above 0 for a positive; `source` is the `path:line` it was read from."""

    query_id: str
    passage_id: str
    relevance: int
    source: str


# Yields (line number, text) of lines of a file.
Lines = Callable[[Path], Iterator[tuple[int, str]]]


@dataclass(frozen=True)
class Corpus:
    """Files of passages, one on each line; in several files, parts of it on lines with one number.

    Line means one that is not blank; a file may begin with a head line, which is no passage.
    `read(lines)` yields the passages on the lines that `lines(file)` yields for each of the files: all
    of them, or only some.
    """

    files: tuple[Path, ...]
    read: Callable[[Lines], Iterator[Passage]]

    def by_offset(self) -> bool:
        """Says whether a line can be read without those before it: no file is gzipped."""
        return all(file.suffix != ".gz" for file in self.files)


@dataclass(frozen=True)
class Collection:
    """Passages, queries and qrels as streams that can be opened again and again.

    `queries(split)` yields the queries with text and at least one positive (relevance > 0) in that
    split; in one of `answer_splits`, which have no qrels, those with an answer. `query_file(split)`
    yields every query of the file they are selected from, whatever its text and labels; nothing
    where all are taken. `fingerprint` changes whenever the content may have changed. `splits` is the
    part of train, dev, test that exists; asking for another raises `InputError`. `remarks` are lines
    for people: how the splits were made, and what was left out before. `corpus` has the files of
    `passages`, None where passages are no lines of files.
    """

    name: str
    fingerprint: str
    splits: tuple[str, ...]
    passages: Callable[[], Iterator[Passage]]
    queries: Callable[[str], Iterator[Query]]
    qrels: Callable[[str], Iterator[Qrel]]
    answer_splits: tuple[str, ...] = ()
    query_file: Callable[[str], Iterator[Query]] = lambda _split: iter(())
    remarks: tuple[str, ...] = ()
    corpus: Corpus | None = None

    def shown(self, rows: Set[int]) -> dict[int, str]:
        """Returns the passages with these row numbers as text for people, the title first.

        Reads no further than the last of them.
        """
        first = itertools.islice(self.passages(), max(rows, default=-1) + 1)
        return {row: p.shown() for row, p in enumerate(first) if row in rows}


class Left:
    """Counts of what is left out or kept as it is, by kind, with the first of each."""

    def __init__(self):
        self._counts: dict[str, tuple[int, str]] = {}

    def add(self, what: str, first: str) -> None:
        """Counts one more; `what` has a verb for several, `first` names it."""
        count, known = self._counts.get(what, (0, first))
        self._counts[what] = count + 1, known

    def lines(self) -> list[str]:
        """Returns a line for each kind: how many, what, and the first."""
        return [f"{n:,} {what} (first: {first})" for what, (n, first) in self._counts.items()]


def left_out(texts: Collection, left: Left) -> set[str]:
    """Counts the queries of the files that are in no split; returns the ids of those without text."""
    asked = {query.id for split in texts.splits for query in texts.queries(split)}
    mute, unjudged = dict[str, None](), dict[str, None]()
    for query in (query for split in texts.splits for query in texts.query_file(split)):
        if not query.text.strip():
            mute[query.id] = None
        elif query.id not in asked:
            unjudged[query.id] = None
    for key in mute:
        left.add("queries have no text; left out", key)
    for key in unjudged:
        left.add("queries have no positive or answer in any split; left out", key)
    return set(mute)


def check_qrels(
    qrels: Iterable[Qrel],
    query_rows: Mapping[str, int],
    passage_rows: Mapping[str, int],
    left: Left,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns labels as (query row int64 [N], passage row int64 [N], relevance int32 [N]), in order.

    Labels of queries whose row is negative are left out, and so are those that are not positive and
    name a query or passage without a row; `left` counts the latter passages. A positive that names one
    raises `InputError`, which tells how many do.
    """
    rows, wrong = [], dict[str, list[tuple[str, str]]]()
    for query_id, passage_id, relevance, source in qrels:
        row, passage = query_rows.get(query_id), passage_rows.get(passage_id)
        if passage is None and relevance > 0:
            wrong.setdefault("passage", []).append((source, passage_id))
        elif row is None and relevance > 0:
            wrong.setdefault("query", []).append((source, query_id))
        elif passage is None:
            what = "labels that are not positive name a passage that is not there; left out"
            left.add(what, f"{source}, {passage_id!r}")
        elif row is not None and row >= 0:
            rows.append((row, passage, relevance))
    holders = {"passage": "the corpus does", "query": "the queries do"}
    for what, labels in wrong.items():
        source, key = labels[0]
        raise InputError(
            f"{source}: qrels name {what} {key!r}, which {holders[what]} not contain; "
            f"remove the row or add the {what} (such labels: {len(labels):,})"
        )
    table_Nx3 = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return table_Nx3[:, 0].copy(), table_Nx3[:, 1].copy(), table_Nx3[:, 2].astype(np.int32)


def of_split(folder: Path, splits: Mapping[str, T], split: str) -> T:
    """Returns the entry of a split; raises `InputError` if the folder has no such split."""
    if split not in splits:
        raise InputError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def with_dev(texts: Collection) -> Collection:
    """Returns a collection without dev with some of its training queries held out as dev.

    Counted are the queries that `texts.queries` yields, so that all have text and a positive. Every
    10th is dev of fewer than 1,000, every 100th of 10,000 or more, and about a hundred in between.
    """
    try:
        count = sum(1 for _ in texts.queries("train"))
    except InputError:
        # Comes again where the queries are read.
        count = 0
    every = min(max(count // HELD_OUT, FEWEST_HELD_OUT), HELD_OUT, max(count, 1))
    part_of = {"train": "train", "dev": "train"} | {split: split for split in texts.splits}
    source = functools.partial(of_split, Path(texts.name), part_of)

    def queries(split: str) -> Iterator[Query]:
        taken = texts.queries(source(split))
        if split not in ("train", "dev"):
            return taken
        return (query for n, query in enumerate(taken, 1) if (n % every == 0) == (split == "dev"))

    def qrels(split: str) -> Iterator[Qrel]:
        # A label whose query is in neither part stays, so that `check_qrels` can report it.
        other = {"train": "dev", "dev": "train"}.get(split)
        others = {query.id for query in queries(other)} if other else set()
        labels = texts.qrels(source(split))
        yield from (label for label in labels if label.query_id not in others)

    remark = (
        "dev is held out from the training queries, for there are no labels of its own: one in every "
        f"{every} ({count // every:,} of {count:,})"
    )
    return dataclasses.replace(
        texts,
        # Other parts are other texts.
        fingerprint=f"{texts.fingerprint} dev {every}",
        splits=tuple(part_of),
        queries=queries,
        qrels=qrels,
        query_file=lambda split: texts.query_file(source(split)),
        remarks=(*texts.remarks, remark) if count else texts.remarks,
    )
