"""Readers of collections in tab-separated tables: MS MARCO's files and RocketQA's.

    MS MARCO    collection.tsv (pid, text), queries.{train,dev.small}.tsv (qid, text),
                qrels.{train,dev.small}.tsv (qid, 0, pid, relevance)
    RocketQA    para.txt (pid, text), para.title.txt (pid, title), {train,dev,test}.query.txt
                (qid, text), qrels.{train,dev,test}.tsv, test.answers.txt (qid, answer, answer, ...)

Each may be gzipped. A folder of MS MARCO's may hold RocketQA's para.title.txt, the titles that MS MARCO
itself left out. What the papers call dev is `test` here, and `dev` is held out from the training
queries, because training itself evaluates on dev.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

from rqv2_jax.data import files
from rqv2_jax.data.collection import (
    Collection,
    Corpus,
    Lines,
    Passage,
    Qrel,
    Query,
    of_split,
    with_dev,
)
from rqv2_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split's files."""

    queries: Path
    labels: Path | None
    answers: Path | None = None


def msmarco(path: str | Path) -> Collection:
    """Returns MS MARCO's passages; test is `dev.small`, the papers' 6,980 dev queries."""
    folder = files.open_folder(path, "MS MARCO")
    file = functools.partial(files.required, folder, "MS MARCO")
    train = file("queries.train.tsv"), file("qrels.train.tsv")
    test = _Split(file("queries.dev.small.tsv"), file("qrels.dev.small.tsv"))
    return _collection(folder, msmarco_corpus(folder), *train, test)


def rocketqa(path: str | Path) -> Collection:
    """Returns the collection in a folder of RocketQA's `corpus/`: marco, or nq, judged by answers.

    Test is `test.query.txt` with `test.answers.txt` where there is one, else `dev.query.txt`.
    """
    folder = files.open_folder(path, "RocketQA")
    file = functools.partial(files.required, folder, "RocketQA")
    train = file("train.query.txt"), file("qrels.train.tsv")
    name = "test" if files.find_file(folder, "test.query.txt") else "dev"
    answers = files.find_file(folder, f"{name}.answers.txt")
    labels = None if answers else file(f"qrels.{name}.tsv")
    test = _Split(file(f"{name}.query.txt"), labels, answers)
    return _collection(folder, rocketqa_corpus(folder), *train, test)


def msmarco_corpus(folder: Path) -> Corpus:
    """Returns the passages in a folder of MS MARCO's."""
    return _corpus(folder, files.required(folder, "MS MARCO", "collection.tsv"))


def rocketqa_corpus(folder: Path) -> Corpus:
    """Returns the passages in a folder of RocketQA's."""
    return _corpus(folder, files.required(folder, "RocketQA", "para.txt"))


def _corpus(folder: Path, texts: Path) -> Corpus:
    titles = files.find_file(folder, "para.title.txt")
    both = (texts,) if titles is None else (texts, titles)
    return Corpus(both, functools.partial(_passages, texts, titles))


def _collection(
    folder: Path, corpus: Corpus, queries: Path, labels: Path, test: _Split
) -> Collection:
    splits = {"train": _Split(queries, labels), "test": test}
    read: list[Path | None] = [*corpus.files]
    for split in splits.values():
        read += [split.queries, split.labels, split.answers]
    of = functools.partial(of_split, folder, splits)
    found = Collection(
        name=folder.resolve().name,
        fingerprint=files.content_hash([file for file in read if file]),
        splits=tuple(splits),
        passages=lambda: corpus.read(files.lines),
        queries=lambda split: _queries(of(split)),
        qrels=lambda split: _qrels(of(split)),
        query_file=lambda split: (Query(key, text, ()) for key, text in _ids(of(split))),
        answer_splits=tuple(name for name, split in splits.items() if split.answers),
        corpus=corpus,
    )
    return with_dev(found)


def pairs(file: Path, what: str, read: Lines = files.lines) -> Iterator[tuple[str, str, str]]:
    """Yields (`path:line`, id, text) of a table with two columns; texts may be empty.

    Its lines are those that `read(file)` yields.
    """
    for number, line in read(file):
        source = f"{file}:{number}"
        columns = line.split("\t")
        if len(columns) != 2:
            raise InputError(
                f"{source}: {len(columns)} tab-separated columns instead of 2 in {line[:80]!r}; "
                f"write id and {what}"
            )
        key, text = columns[0].strip(), columns[1].strip()
        if not key:
            raise InputError(f"{source}: no id; write id and {what}")
        yield source, key, text


def unique(rows: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yields the same rows; raises `InputError` at an id that comes twice or has white space."""
    seen = set()
    for source, key, text in rows:
        files.check_id(source, key)
        if key in seen:
            raise InputError(f"{source}: duplicate id {key!r}; make ids unique")
        seen.add(key)
        yield source, key, text


def _passages(texts: Path, titles: Path | None, read: Lines) -> Iterator[Passage]:
    rows = unique(pairs(texts, "passage", read))
    if titles is None:
        yield from (Passage(key, "", text) for _, key, text in rows)
        return
    for row, head in itertools.zip_longest(rows, pairs(titles, "title", read)):
        if head is None:
            raise InputError(f"{titles}: ends before {row[0]}; give every passage its line")
        if row is None:
            raise InputError(f"{head[0]}: title of a passage that {texts} does not have; remove it")
        (source, key, text), (where, title_key, title) = row, head
        if title_key != key:
            raise InputError(
                f"{where}: title of {title_key!r}, but {source} is passage {key!r}; bring both files "
                "into one order"
            )
        yield Passage(key, title, text)


def _ids(split: _Split) -> Iterator[tuple[str, str]]:
    """Yields (id, text) of a split's queries."""
    for _, key, text in unique(pairs(split.queries, "query")):
        yield key, text


def _queries(split: _Split) -> Iterator[Query]:
    answers = _answers(split.answers) if split.answers else {}
    positive = files.with_positive(split.labels) if split.labels else ()
    for key, text in _ids(split):
        if text and (key in answers or key in positive):
            yield Query(key, text, answers.get(key, ()))


def _qrels(split: _Split) -> Iterator[Qrel]:
    return files.labels(split.labels) if split.labels else iter(())


def _answers(file: Path) -> dict[str, tuple[str, ...]]:
    """Returns the answers of each query that has one."""
    answers_of: dict[str, tuple[str, ...]] = {}
    for _, line in files.lines(file):
        key, *answers = line.split("\t")
        if kept := tuple(answer for answer in answers if answer.strip()):
            answers_of[key.strip()] = kept
    return answers_of
