"""Readers: a collection is passages, queries and relevance labels, streamed from their files.

Ids are the user's strings here; `check_qrels` turns them into row numbers. A file that cannot be
read as it stands raises `InputError`, one line with the file, the line number and the mend. What real
data hold and nothing needs is left out and counted, by one rule for all formats:

    a passage without text               kept, empty, for labels and results may name it
    a query without text                 left out, with its labels
    a query without a positive           left out
    a label for a passage not there      left out if it is not positive, else an error
    a label for a query not there        the same
    a negative relevance                 not relevant, as 0
"""

import functools
import gzip
import hashlib
import json
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
# Every so many-th training query is dev, where the files have no split to look at during training.
HELD_OUT = 100
# The same for few queries, of which about a hundred are wanted.
FEWEST_HELD_OUT = 10


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

    `queries(split)` yields the queries with text and at least one positive (relevance > 0) in that
    split; in one of `answer_splits`, which have no qrels, those with an answer. `query_file(split)`
    yields every query of the file they are selected from, whatever its text and labels; nothing
    where all are taken. `fingerprint` changes whenever the content may have changed. `splits` is the
    part of train, dev, test that exists; asking for another raises `InputError`. `remarks` are lines
    for people: how the splits were made, and what was left out before.
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

    def shown(self, rows: Container[int]) -> dict[int, str]:
        """The passages of some row numbers as text for people, the title first."""
        return {
            row: f"{p.title}: {p.text}" if p.title else p.text
            for row, p in enumerate(self.passages())
            if row in rows
        }


class Left:
    """Counts what is left out or kept as it is, by kind, with the first of each."""

    def __init__(self):
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, first: str):
        """Counts one more; `what` has a verb for several, `first` names it."""
        count, known = self._found.get(what, (0, first))
        self._found[what] = count + 1, known

    def lines(self) -> list[str]:
        """A line for each kind: how many, what, and the first."""
        return [f"{n:,} {what} (first: {first})" for what, (n, first) in self._found.items()]


def left_out(texts: Collection, left: Left) -> set[str]:
    """Counts the queries of the files that take part in no split; returns ids of those without text."""
    asked = {query.id for split in texts.splits for query in texts.queries(split)}
    mute, unjudged = {}, {}
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


@dataclass(frozen=True)
class _Split:
    """A split's files in BEIR layout, and which of its queries it takes, as `takes` has it."""

    queries: Path
    labels: Path
    held_out: bool | None = None


def beir(path, *, train_qrels: str, eval_qrels: str) -> Collection:
    """The collection in folder `path`, in BEIR layout (github.com/beir-cellar/beir).

    Every file may be plain or gzipped: `corpus.jsonl`; `queries.jsonl`, or `queries.<split>.jsonl`
    for each split; the labels of train from `<train_qrels>/train.tsv`, those of dev and test from
    `<eval_qrels>/{dev,test}.tsv`, with or without the header line `query-id corpus-id score`. Where
    only one of dev and test is there it is test, and of the training queries about a hundred, at most
    every tenth, are held out as dev. A file that is missing raises `InputError` here, a bad line when
    it is reached.
    """
    root = open_folder(path, "BEIR")
    corpus = required(root, "BEIR", "corpus.jsonl")
    files = {}
    for split, folder in (("train", train_qrels), ("dev", eval_qrels), ("test", eval_qrels)):
        if not (root / folder).is_dir():
            raise InputError(f"{root / folder}: no such qrels folder; add it or name another one")
        file = find_file(root / folder, f"{split}.tsv")
        if file is not None:
            queries = find_file(root, f"queries.{split}.jsonl")
            queries = queries or required(root, "BEIR", "queries.jsonl")
            files[split] = _Split(queries, file)
    if "train" not in files:
        raise InputError(f"{root / train_qrels}: no train.tsv or train.tsv.gz; add the train split")
    splits, remarks = _with_dev(files)
    of = functools.partial(of_split, root, splits)
    return Collection(
        name=root.resolve().name,
        fingerprint=content_hash(
            [corpus, *(f.queries for f in files.values()), *(f.labels for f in files.values())]
        ),
        splits=tuple(splits),
        passages=functools.partial(read_passages, corpus, "_id"),
        queries=lambda split: _read_queries(of(split)),
        qrels=lambda split: _read_qrels(of(split)),
        query_file=lambda split: _read_query_file(of(split).queries),
        remarks=remarks,
    )


def _with_dev(files: dict[str, _Split]) -> tuple[dict[str, _Split], tuple[str, ...]]:
    """The splits train, dev and, if there is one, test, and what there is to say of them."""
    if {"dev", "test"} <= files.keys():
        return files, ()
    train = files["train"]
    splits = {
        "train": _Split(train.queries, train.labels, held_out=False),
        "dev": _Split(train.queries, train.labels, held_out=True),
    }
    remarks = ["dev is held out from the training queries, for there are no labels of its own"]
    if "dev" in files:
        remarks = [f"test is {files['dev'].labels.name}; {remarks[0]}"]
    for name in ("dev", "test"):
        if name in files:
            splits["test"] = files[name]
    return splits, tuple(remarks)


def check_qrels(
    qrels: Iterable[Qrel],
    query_rows: Mapping[str, int],
    passage_rows: Mapping[str, int],
    left: Left,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels as (query row int64 [N], passage row int64 [N], relevance int32 [N]), in order.

    Labels of queries whose row is negative are left out, and so are those that are not positive and
    name a query or passage without a row; `left` counts the latter passages.

    Raises:
      InputError: a positive names a passage or query that is not in `passage_rows` or `query_rows`;
        it tells how many do.
    """
    rows, wrong = [], {}
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
    for what, found in wrong.items():
        source, key = found[0]
        raise InputError(
            f"{source}: qrels name {what} {key!r}, which {holders[what]} not contain; "
            f"remove the row or add the {what} (such labels: {len(found):,})"
        )
    table_Nx3 = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return table_Nx3[:, 0].copy(), table_Nx3[:, 1].copy(), table_Nx3[:, 2].astype(np.int32)


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


def takes(number: int, held_out: bool | None, every: int = HELD_OUT) -> bool:
    """Does a split take the training query of that number? Dev is every `every`-th, train the rest.

    `held_out` says which of the two the split is; None takes every query.
    """
    return held_out is None or (number % every == every - 1) == held_out


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
      InputError: a line is none of these or not as the first one, or a pair is judged twice, and not
        the same.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    width = 0
    for number, line in lines(file):
        source = f"{file}:{number}"
        columns = line.split()
        if number == 1 and tuple(columns) == QRELS_HEADER:
            width = len(columns)
            continue
        width = width or len(columns)
        if len(columns) not in _COLUMNS or len(columns) != width:
            form = "`qid 0 docid rel`, `qid docid rel` or `qid docid`, all lines alike"
            raise InputError(f"{source}: {len(columns)} columns in {line[:80]!r}; write {form}")
        query, passage, relevance = _COLUMNS[width]
        value = 1 if relevance is None else _relevance(source, columns[relevance])
        pair = columns[query], columns[passage]
        before, first = found.setdefault(pair, (value, number))
        if first == number:
            yield Qrel(*pair, value, source)
        elif before != value:
            raise InputError(
                f"{source}: relevance {value} for query {pair[0]!r} and passage {pair[1]!r}, but "
                f"{before} on line {first}; keep one of the two"
            )


def _relevance(source: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise InputError(f"{source}: relevance {text!r} is no integer; correct it") from None
    if abs(value) > MAX_RELEVANCE:
        raise InputError(f"{source}: relevance {value} is beyond {MAX_RELEVANCE}; correct it")
    return value


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
    """The text of a passage or query (`what`) in a JSON object, empty where it is null.

    Raises:
      InputError: the field is missing or no text.
    """
    if field not in value:
        raise InputError(f"{source}: {what} without `{field}`; add the field or remove the line")
    text = "" if value[field] is None else value[field]
    if not isinstance(text, str):
        raise InputError(f"{source}: `{field}` is {text!r}; make it a string")
    check_whole(source, text)
    return text


def answers_of(source: str, value: dict, field: str = "answers") -> tuple[str, ...]:
    """The strings in `answers` of a JSON object; none where it is absent or null."""
    answers = value.get(field)
    if answers is None:
        return ()
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        raise InputError(f"{source}: `{field}` is {answers!r}; make it a list of strings")
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


def _read_queries(split: _Split) -> Iterator[Query]:
    positive = {label.query_id for label in labels(split.labels) if label.relevance > 0}
    if not positive:
        raise InputError(f"{split.labels}: no row has a score above 0; add the positive passages")

    def asked():
        queries = _read_query_file(split.queries)
        return (query for query in queries if query.id in positive and query.text.strip())

    count = 0 if split.held_out is None else sum(1 for _ in asked())
    every = min(max(count // HELD_OUT, FEWEST_HELD_OUT), HELD_OUT, max(count, 1))
    yield from (q for number, q in enumerate(asked()) if takes(number, split.held_out, every))


def _read_qrels(split: _Split) -> Iterator[Qrel]:
    other = set()
    if split.held_out is not None:
        rest = _Split(split.queries, split.labels, not split.held_out)
        other = {query.id for query in _read_queries(rest)}
    yield from (label for label in labels(split.labels) if label.query_id not in other)
