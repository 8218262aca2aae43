"""Readers: a collection is passages, queries and relevance labels, streamed from their files.

Ids are the user's strings here; `check_qrels` turns them into row numbers. Everything wrong with a
file raises `InputError`, one line with the file, the line number and the mend.
"""

import functools
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rqv2_jax.errors import InputError

QRELS_HEADER = ("query-id", "corpus-id", "score")
MAX_RELEVANCE = int(np.iinfo(np.int32).max)


class Passage(NamedTuple):
    """One retrievable text; `title` is empty where the source has none."""

    id: str
    title: str
    text: str


class Query(NamedTuple):
    """One question; `answers` are the strings an answer may contain, empty where unknown."""

    id: str
    text: str
    answers: tuple[str, ...]


class Qrel(NamedTuple):
    """One relevance label, an integer >= 0; `source` is the `path:line` it was read from."""

    query_id: str
    passage_id: str
    relevance: int
    source: str


@dataclass(frozen=True)
class Collection:
    """Passages, queries and qrels as streams that can be opened again and again.

    `queries(split)` yields the queries with at least one positive (relevance > 0) in that split; in
    one of `answer_splits`, which have no qrels, those with an answer. `query_file(split)` yields
    every query of the file they are selected from, whatever its labels; nothing where all are taken.
    `fingerprint` changes whenever the content may have changed. `splits` is the part of
    train, dev, test that exists; asking for another raises `InputError`.
    """

    name: str
    fingerprint: str
    splits: tuple[str, ...]
    passages: Callable[[], Iterator[Passage]]
    queries: Callable[[str], Iterator[Query]]
    qrels: Callable[[str], Iterator[Qrel]]
    answer_splits: tuple[str, ...] = ()
    query_file: Callable[[str], Iterator[Query]] = lambda _split: iter(())


def beir(path, *, train_qrels: str, eval_qrels: str) -> Collection:
    """The collection in folder `path`, in BEIR layout (github.com/beir-cellar/beir).

    Every file may be plain or gzipped: `corpus.jsonl`; `queries.jsonl`, or `queries.<split>.jsonl`
    for each split; the labels of train from `<train_qrels>/train.tsv`, those of dev and test from
    `<eval_qrels>/{dev,test}.tsv`, with or without the header line `query-id corpus-id score`.
    A file that is missing raises `InputError` here, a bad line when it is reached.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the path of a folder in BEIR layout")
    corpus = _required(root, "corpus.jsonl")
    qrels = {}
    for split, folder in (("train", train_qrels), ("dev", eval_qrels), ("test", eval_qrels)):
        if not (root / folder).is_dir():
            raise InputError(f"{root / folder}: no such qrels folder; add it or name another one")
        file = find_file(root / folder, f"{split}.tsv")
        if file is not None:
            qrels[split] = file
    if "train" not in qrels:
        raise InputError(f"{root / train_qrels}: no train.tsv or train.tsv.gz; add the train split")
    queries = {
        split: find_file(root, f"queries.{split}.jsonl") or _required(root, "queries.jsonl")
        for split in qrels
    }

    def file_of(split: str, files: Mapping[str, Path]) -> Path:
        if split not in files:
            raise InputError(f"{root}: no split {split!r}; it has {', '.join(files)}")
        return files[split]

    return Collection(
        name=root.resolve().name,
        fingerprint=content_hash([corpus, *queries.values(), *qrels.values()]),
        splits=tuple(qrels),
        passages=functools.partial(_read_passages, corpus),
        queries=lambda split: _read_queries(file_of(split, queries), file_of(split, qrels)),
        qrels=lambda split: _read_qrels(file_of(split, qrels)),
        query_file=lambda split: _read_query_file(file_of(split, queries)),
    )


def check_qrels(
    qrels: Iterable[Qrel], query_rows: Mapping[str, int], passage_rows: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels as (query row int64 [N], passage row int64 [N], relevance int32 [N]), in order.

    Raises `InputError` for a passage or query that `passage_rows` or `query_rows` does not name.
    A label of relevance 0 whose query is not in `query_rows` is left out: a query without any
    positive takes part nowhere.
    """
    rows = []
    for query_id, passage_id, relevance, source in qrels:
        if passage_id not in passage_rows:
            raise InputError(
                f"{source}: qrels name passage {passage_id!r}, which the corpus does not contain;"
                " remove the row or add the passage"
            )
        if query_id in query_rows:
            rows.append((query_rows[query_id], passage_rows[passage_id], relevance))
        elif relevance > 0:
            raise _unknown_query(source, query_id)
    table_Nx3 = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return table_Nx3[:, 0].copy(), table_Nx3[:, 1].copy(), table_Nx3[:, 2].astype(np.int32)


def _unknown_query(source: str, query_id: str) -> InputError:
    return InputError(
        f"{source}: qrels name query {query_id!r}, which the queries do not contain;"
        " remove the row or add the query"
    )


def find_file(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder, plain or gzipped; None if there is none.

    Raises:
      InputError: there are both.
    """
    found = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
    if len(found) > 1:
        raise InputError(f"{found[0]}: stands beside {found[1].name}; remove one of the two")
    return found[0] if found else None


def _required(folder: Path, name: str) -> Path:
    file = find_file(folder, name)
    if file is None:
        raise InputError(f"{folder}: no {name} or {name}.gz; a folder in BEIR layout needs it")
    return file


def content_hash(files: list[Path]) -> str:
    """A hash of the files' names and bytes."""
    digests = {}
    for file in set(files):
        with file.open("rb") as stream:
            digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    lines = [f"{file.name}\t{digests[file]}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) of every line that is not blank.

    Raises:
      InputError: the file is not UTF-8, or a gzipped one is broken.
    """
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for raw in stream:
                number += 1
                # utf-8-sig, because some editors begin a file with a byte order mark.
                line = raw.decode("utf-8-sig").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{file}:{number + 1}: cannot be read on ({error}); fetch or compress the file again"
        ) from None


# Which columns hold query, passage and relevance, by how many there are.
_COLUMNS = {2: (0, 1, None), 3: (0, 1, 2), 4: (0, 2, 3)}


def labels(file: Path) -> Iterator[Qrel]:
    """Relevance labels in any of the field's formats, each pair once.

    Takes TREC's and MS MARCO's lines `qid 0 docid rel`, BEIR's `qid docid rel` with or without its
    header line, and RocketQA's `qid docid`; columns are separated by white space.

    Raises:
      InputError: a line is none of these, or a pair is judged twice, and not the same.
    """
    found: dict[tuple[str, str], int] = {}
    for number, line in lines(file):
        source = f"{file}:{number}"
        columns = line.split()
        if number == 1 and tuple(columns) == QRELS_HEADER:
            continue
        if len(columns) not in _COLUMNS:
            raise InputError(
                f"{source}: {len(columns)} columns; write `qid 0 docid rel`, `qid docid rel` or "
                "`qid docid`"
            )
        query, passage, relevance = _COLUMNS[len(columns)]
        try:
            value = 1 if relevance is None else int(columns[relevance])
        except ValueError:
            raise InputError(
                f"{source}: relevance {columns[relevance]!r} is no integer; correct it"
            ) from None
        pair = columns[query], columns[passage]
        if pair not in found:
            found[pair] = value
            yield Qrel(*pair, value, source)
        elif found[pair] != value:
            raise InputError(
                f"{source}: passage {pair[1]} has relevance {value} for query {pair[0]}, but "
                f"{found[pair]} before; keep one of the two"
            )


def _objects(file: Path) -> Iterator[tuple[str, str, dict]]:
    """(`path:line`, id, object) of a JSON-lines file whose objects each have their own `_id`."""
    first_lines = {}
    for number, line in lines(file):
        source = f"{file}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON ({error}); write one object per line") from None
        if not isinstance(value, dict):
            raise InputError(f'{source}: no JSON object; write {{"_id": "...", "text": "..."}}')
        key = value.get("_id")
        if not isinstance(key, str) or not key:
            found = f"is {key!r}" if "_id" in value else "is missing"
            raise InputError(f"{source}: `_id` {found}; give every line a non-empty string")
        if key in first_lines:
            raise InputError(
                f"{source}: duplicate id {key!r}, first on line {first_lines[key]}; make ids unique"
            )
        first_lines[key] = number
        yield source, key, value


def _text(source: str, value: dict, what: str) -> str:
    if "text" not in value:
        raise InputError(f"{source}: {what} without `text`; add the field or remove the line")
    text = value["text"]
    if not isinstance(text, str):
        raise InputError(f"{source}: `text` is {text!r}; make it a string")
    if not text.strip():
        raise InputError(f"{source}: empty {what}; give it text or remove the line")
    return text


def _read_passages(file: Path) -> Iterator[Passage]:
    for source, key, value in _objects(file):
        title = value.get("title")
        if not isinstance(title, str | None):
            raise InputError(f"{source}: `title` is {title!r}; make it a string or leave it out")
        yield Passage(key, title or "", _text(source, value, "passage"))


def _read_query_file(file: Path) -> Iterator[Query]:
    for source, key, value in _objects(file):
        text = _text(source, value, "query")
        answers = value.get("answers")
        if answers is None:
            answers = []
        if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
            raise InputError(f"{source}: `answers` is {answers!r}; make it a list of strings")
        yield Query(key, text, tuple(answers))


def _read_queries(file: Path, qrels_file: Path) -> Iterator[Query]:
    unseen = {}
    positive = set()
    for query_id, _, relevance, source in _read_qrels(qrels_file):
        unseen.setdefault(query_id, source)
        if relevance > 0:
            positive.add(query_id)
    if not positive:
        raise InputError(f"{qrels_file}: no row has a score above 0; add the positive passages")
    for query in _read_query_file(file):
        unseen.pop(query.id, None)
        if query.id in positive:
            yield query
    for key, source in unseen.items():
        raise _unknown_query(source, key)


def _read_qrels(file: Path) -> Iterator[Qrel]:
    seen = {}
    for number, line in lines(file):
        source = f"{file}:{number}"
        columns = tuple(line.split("\t"))
        if number == 1 and columns == QRELS_HEADER:
            continue
        if len(columns) != 3:
            raise InputError(
                f"{source}: {len(columns)} tab-separated columns instead of 3 in {line[:80]!r};"
                " write query id, passage id and score"
            )
        query_id, passage_id, score = columns
        if not re.fullmatch(r"[0-9]{1,10}", score) or int(score) > MAX_RELEVANCE:
            raise InputError(
                f"{source}: score {score!r} is no integer from 0 to {MAX_RELEVANCE}; write 1 for a"
                f" positive (a header reads {' '.join(QRELS_HEADER)!r})"
            )
        relevance = int(score)
        if (query_id, passage_id) in seen:
            before, first_line = seen[query_id, passage_id]
            if relevance != before:
                raise InputError(
                    f"{source}: score {relevance} for query {query_id!r} and passage"
                    f" {passage_id!r}, but {before} on line {first_line}; keep one of the two"
                )
            continue
        seen[query_id, passage_id] = relevance, number
        yield Qrel(query_id, passage_id, relevance, source)
