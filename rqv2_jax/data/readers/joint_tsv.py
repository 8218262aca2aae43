"""Reader and writer of training lists in the format of the authors' release: query, title, para, label.

Tab-separated, no header; `list_size` lines in a row are one list, the positive (label 1) first, then
the negatives (label 0 or below). Plain or gzipped. A para may be empty; a list whose query is empty is
left out.
"""

import gzip
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rqv2_jax.data import collection, files
from rqv2_jax.data.lists import Lists, Provenance
from rqv2_jax.errors import InputError


def _rows(path: Path, list_size: int, left: collection.Left) -> Iterator[tuple[int, str, str, str]]:
    """Yields (place in its list, query, title, para) of every line; counts lists without a query."""
    place, query, start = 0, "", 0
    for number, line in files.lines(path):
        source = f"{path}:{number}"
        columns = line.split("\t")
        if len(columns) != 4:
            raise InputError(
                f"{source}: {len(columns)} tab-separated columns instead of 4; write query, title, "
                "para and label"
            )
        if not re.fullmatch(r"1|0|-[0-9]+", columns[3]):
            raise InputError(f"{source}: label {columns[3]!r}; write 1 (positive) or 0 (negative)")
        if place == 0:
            query, start = columns[0], number
        elif columns[0] != query:
            raise InputError(
                f"{source}: another query than on line {start}, where its list of {list_size} "
                "begins; mend the list, or set config.joint.list_size to the size of the file's lists"
            )
        if (columns[3] == "1") != (place == 0):
            raise InputError(
                f"{source}: label {columns[3]} in place {place + 1} of the list of {list_size} that "
                f"line {start} begins; give every list one positive, first, or set "
                "config.joint.list_size to the size of the file's lists"
            )
        if query.strip():
            yield place, columns[0], columns[1], columns[2]
        elif place == 0:
            left.add("lists have no query; left out", source)
        place = (place + 1) % list_size
    if place:
        raise InputError(
            f"{path}: the last list, from line {start}, has {place} of {list_size} lines; mend it, or "
            "set config.joint.list_size to the size of the file's lists"
        )


def read(path: Path, list_size: int) -> tuple[collection.Collection, Lists]:
    """Returns a file's texts as a collection with the split train, and its lists in their order.

    The row numbers of the lists are those of the collection's order. The same title and para are one
    passage and the same text one query, in all lists. Texts are streamed, their hashes kept.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a joint TSV file")
    passage_rows: dict[bytes, int] = {}
    query_rows: dict[bytes, int] = {}
    queries, passages, left = [], [], collection.Left()
    for place, query, title, para in _rows(path, list_size, left):
        passages.append(passage_rows.setdefault(_digest(title, para), len(passage_rows)))
        if place == 0:
            queries.append(query_rows.setdefault(_digest(query), len(query_rows)))
    if not queries:
        raise InputError(f"{path}: holds no lists; write one line for each passage of each list")
    passages_LxP = np.array(passages).reshape(-1, list_size)
    provenance_LxP = np.full(passages_LxP.shape, Provenance.GIVEN_NEGATIVE, np.uint8)
    provenance_LxP[:, 0] = Provenance.LABELLED_POSITIVE
    positives = dict.fromkeys(zip(queries, passages_LxP[:, 0].tolist()))

    def rows() -> Iterator[tuple[int, str, str, str]]:
        return _rows(path, list_size, collection.Left())

    def read_passages() -> Iterator[collection.Passage]:
        texts = ((title, para) for _, _, title, para in rows())
        for i, (title, para) in enumerate(_unseen(texts)):
            yield collection.Passage(str(i), title, para)

    def read_queries(_split: str) -> Iterator[collection.Query]:
        texts = ((query,) for place, query, _, _ in rows() if place == 0)
        for i, (query,) in enumerate(_unseen(texts)):
            yield collection.Query(str(i), query, ())

    def read_qrels(_split: str) -> Iterator[collection.Qrel]:
        for query, passage in positives:
            yield collection.Qrel(str(query), str(passage), 1, str(path))

    texts = collection.Collection(
        name=path.name,
        fingerprint=f"{files.content_hash([path])} {list_size}",
        splits=("train",),
        passages=read_passages,
        queries=read_queries,
        qrels=read_qrels,
        remarks=tuple(left.lines()),
    )
    return texts, Lists(np.array(queries), passages_LxP, provenance_LxP)


def _unseen(texts: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    seen = set()
    for parts in texts:
        if (digest := _digest(*parts)) not in seen:
            seen.add(digest)
            yield parts


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\t".join(parts).encode(), digest_size=16).digest()


def write(path: Path, lists: Lists, texts: collection.Collection) -> None:
    """Writes lists of training queries, gzipped if the name ends in `.gz`.

    White space inside a text, which may be a tab or a line end, becomes one space. The file appears
    under its name only when complete.
    """
    wanted_queries = set(lists.query_rows_L.tolist())
    wanted_passages = set(lists.passages_LxP.reshape(-1).tolist())
    queries = {
        row: _cell(query.text)
        for row, query in enumerate(texts.queries("train"))
        if row in wanted_queries
    }
    passages = {
        row: f"{_cell(passage.title)}\t{_cell(passage.text)}"
        for row, passage in enumerate(texts.passages())
        if row in wanted_passages
    }
    positive_LxP = lists.positive()
    partial = path.with_name(f"{path.name}.partial")
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(partial, "wt", encoding="utf-8") as file:
        for query, rows, labels in zip(lists.query_rows_L, lists.passages_LxP, positive_LxP):
            for row, label in zip(rows.tolist(), labels.tolist()):
                file.write(f"{queries[int(query)]}\t{passages[row]}\t{int(label)}\n")
    os.replace(partial, path)


def _cell(text: str) -> str:
    return " ".join(text.split())
