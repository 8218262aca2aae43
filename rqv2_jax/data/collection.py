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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from rqv2_jax.errors import InputError

T = TypeVar("T")
QRELS_HEADER = ("query-id", "corpus-id", "score")
MAX_RELEVANCE = int(np.iinfo(np.int32).max)
# Of the training queries, where the files have no split to look at during training.
HELD_OUT = 100


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
    """One relevance label, above 0 for a positive; `source` is the `path:line` it was read from."""

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

    def shown(self, rows: Container[int]) -> dict[int, str]:
        """The passages of some row numbers as text for people, the title first."""
        return {
            row: f"{p.title}: {p.text}" if p.title else p.text
            for row, p in enumerate(self.passages())
            if row in rows
        }


def beir(path, *, train_qrels: str, eval_qrels: str) -> Collection:
    """The collection in folder `path`, in BEIR layout (github.com/beir-cellar/beir).

    Every file may be plain or gzipped: `corpus.jsonl`; `queries.jsonl`, or `queries.<split>.jsonl`
    for each split; the labels of train from `<train_qrels>/train.tsv`, those of dev and test from
    `<eval_qrels>/{dev,test}.tsv`, with or without the header line `query-id corpus-id score`.
    A file that is missing raises `InputError` here, a bad line when it is reached.
    """
    root = open_folder(path, "BEIR")
    corpus = required(root, "BEIR", "corpus.jsonl")
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
        split: find_file(root, f"queries.{split}.jsonl") or required(root, "BEIR", "queries.jsonl")
        for split in qrels
    }
    of = functools.partial(of_split, root)
    return Collection(
        name=root.resolve().name,
        fingerprint=content_hash([corpus, *queries.values(), *qrels.values()]),
        splits=tuple(qrels),
        passages=functools.partial(read_passages, corpus, "_id"),
        queries=lambda split: _read_queries(of(queries, split), of(qrels, split)),
        qrels=lambda split: _read_qrels(of(qrels, split)),
        query_file=lambda split: _read_query_file(of(queries, split)),
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


def open_file(path: Path) -> Path:
    """The path itself; `InputError` if there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a file")
    return path


def open_folder(path, layout: str) -> Path:
    """The folder at `path`; `InputError`, which names the layout, if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the path of a folder in {layout} layout")
    return folder


def find_file(folder: Path, *names: str) -> Path | None:
    """The file of one of those names (`*`: any text) in a folder, plain or gzipped, or None.

    Raises:
      InputError: there are several.
    """
    patterns = [pattern for name in names for pattern in (name, f"{name}.gz")]
    found = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    if len(found) > 1:
        others = ", ".join(file.name for file in found[1:])
        raise InputError(f"{found[0]}: stands beside {others}; keep one of them")
    return found[0] if found else None


def required(folder: Path, layout: str, *names: str) -> Path:
    """What `find_file` finds; `InputError`, which names the layout, if that is nothing."""
    file = find_file(folder, *names)
    if file is None:
        raise InputError(
            f"{folder}: no {names[0]} or {names[0]}.gz; a folder in {layout} layout needs it"
        )
    return file


def of_split(folder: Path, splits: Mapping[str, T], split: str) -> T:
    """What belongs to a split; `InputError` if the folder does not have it."""
    if split not in splits:
        raise InputError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def takes(number: int, held_out: bool | None) -> bool:
    """Does a split take the training query of that number? Dev is every hundredth, train the rest.

    `held_out` says which of the two the split is; None takes every query.
    """
    return held_out is None or (number % HELD_OUT == HELD_OUT - 1) == held_out


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
        if abs(value) > MAX_RELEVANCE:
            raise InputError(f"{source}: relevance {value} is beyond {MAX_RELEVANCE}; correct it")
        pair = columns[query], columns[passage]
        if pair not in found:
            found[pair] = value
            yield Qrel(*pair, value, source)
        elif found[pair] != value:
            raise InputError(
                f"{source}: passage {pair[1]} has relevance {value} for query {pair[0]}, but "
                f"{found[pair]} before; keep one of the two"
            )


def objects(file: Path, id_field: str) -> Iterator[tuple[str, str, dict]]:
    """(`path:line`, id, object) of a JSON-lines file whose objects each have an id of their own.

    Raises:
      InputError: a line is no such object, or an id comes twice.
    """
    first_lines = {}
    for number, line in lines(file):
        source = f"{file}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON ({error}); write one object per line") from None
        if not isinstance(value, dict):
            raise InputError(f'{source}: no JSON object; write {{"{id_field}": "...", ...}}')
        key = value.get(id_field)
        if not isinstance(key, str) or not key:
            found = f"is {key!r}" if id_field in value else "is missing"
            raise InputError(f"{source}: `{id_field}` {found}; give every line a non-empty string")
        check_id(source, key)
        if key in first_lines:
            raise InputError(
                f"{source}: duplicate id {key!r}, first on line {first_lines[key]}; make ids unique"
            )
        first_lines[key] = number
        yield source, key, value


def check_whole(source: str, text: str):
    """Raises `InputError` for a text with half a character in it, as JSON's \\u may write them."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = text[e.start : e.end].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{source}: holds half a character ({half} alone); remove it") from None


def check_id(source: str, key: str):
    """Raises `InputError` for an id that no TREC run file could hold."""
    check_whole(source, key)
    if key.split() != [key]:
        raise InputError(
            f"{source}: id {key!r} has white space, which separates the columns of a TREC run file; "
            "rename it"
        )


def text_of(source: str, value: dict, what: str, field: str = "text") -> str:
    """The text of a passage or query (`what`) in a JSON object; `InputError` if it has none."""
    if field not in value:
        raise InputError(f"{source}: {what} without `{field}`; add the field or remove the line")
    text = value[field]
    if not isinstance(text, str):
        raise InputError(f"{source}: `{field}` is {text!r}; make it a string")
    if not text.strip():
        raise InputError(f"{source}: empty {what}; give it text or remove the line")
    check_whole(source, text)
    return text


def answers_of(source: str, value: dict) -> tuple[str, ...]:
    """The strings in `answers` of a JSON object; none where it is absent or null."""
    answers = value.get("answers")
    if answers is None:
        return ()
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        raise InputError(f"{source}: `answers` is {answers!r}; make it a list of strings")
    return tuple(answers)


def read_passages(file: Path, id_field: str) -> Iterator[Passage]:
    """The passages of a JSON-lines file: id, `text` and, if there is one, `title`."""
    for source, key, value in objects(file, id_field):
        title = value.get("title")
        if not isinstance(title, str | None):
            raise InputError(f"{source}: `title` is {title!r}; make it a string or leave it out")
        check_whole(source, title or "")
        yield Passage(key, title or "", text_of(source, value, "passage"))


def _read_query_file(file: Path) -> Iterator[Query]:
    for source, key, value in objects(file, "_id"):
        yield Query(key, text_of(source, value, "query"), answers_of(source, value))


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
