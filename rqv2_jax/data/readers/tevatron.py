"""Reader of Tevatron's JSON lines (github.com/texttron/tevatron, docs/datasets.md).

    corpus.jsonl               docid, title, text
    {train,dev,test}.jsonl     query_id, query, positive_passages, negative_passages (lists of objects
                               with docid, title, text) and, of question answering, answers; or, since
                               version 2, query_id, query_text, positive_document_ids,
                               negative_document_ids (lists of docids) and answer
    qrels.{dev,test}.tsv       labels of a split whose lines have no positives

Images, video and audio are not read: what has no text besides is without text. Each may be gzipped,
and a name before the split is allowed. On the Hugging Face hub, msmarco-passage
has train and dev, wikipedia-nq nq-train, nq-dev and nq-test; corpora are in repositories of their
own, msmarco-passage-corpus and wikipedia-nq-corpus. MS MARCO's dev lines are queries alone: put its
qrels.dev.small.tsv beside them as qrels.dev.tsv. Lines of nq-test have answers alone and are judged
by them.

Positives are taken by docid; their texts are those of the corpus. Negatives are not read: this
package mines its own. Where only one of dev and test is there it is `test`, and every hundredth
training query is held out as `dev`.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rqv2_jax.data.collection import (
    HELD_OUT,
    Collection,
    Qrel,
    Query,
    answers_of,
    content_hash,
    find_file,
    labels,
    objects,
    of_split,
    open_folder,
    read_passages,
    required,
    takes,
    text_of,
)
from rqv2_jax.errors import InputError


@dataclass(frozen=True)
class _Split:
    """A split's lines, labels in a file of their own, and which of the queries it takes."""

    file: Path
    labels: Path | None = None
    held_out: bool | None = None
    by_answers: bool = False

    def queries(self) -> Iterator[tuple[Query, tuple[str, ...], str]]:
        """(query, docids of its positives, `path:line`) of every line."""
        for source, key, value in self.lines():
            yield _query(source, key, value), _positives(source, value), source

    def lines(self) -> Iterator[tuple[str, str, dict]]:
        for number, line in enumerate(objects(self.file, "query_id")):
            if takes(number, self.held_out):
                yield line


def tevatron(path: str) -> Collection:
    """The collection in a folder of Tevatron's files.

    Raises:
      InputError: a file is missing; bad lines raise it when they are reached.
    """
    folder = open_folder(path, "Tevatron")
    corpus = required(folder, "Tevatron", "corpus.jsonl")
    train = required(folder, "Tevatron", "train.jsonl", "*-train.jsonl")
    dev, test = (find_file(folder, f"{name}.jsonl", f"*-{name}.jsonl") for name in ("dev", "test"))
    if not (dev or test):
        raise InputError(f"{folder}: neither dev.jsonl nor test.jsonl; add the queries to test on")
    if dev and test:
        splits = {
            "train": _Split(train),
            "dev": _Split(dev, find_file(folder, "qrels.dev.tsv")),
            "test": _tested(test, find_file(folder, "qrels.test.tsv")),
        }
        remarks = ()
    else:
        name = "test" if test else "dev"
        splits = {
            "train": _Split(train, held_out=False),
            "dev": _Split(train, held_out=True),
            "test": _tested(test or dev, find_file(folder, f"qrels.{name}.tsv")),
        }
        remarks = (f"test is {name}; dev is every {HELD_OUT}th of the training queries, held out",)
    files = [corpus, *(f for split in splits.values() for f in (split.file, split.labels) if f)]
    of = functools.partial(of_split, folder, splits)
    return Collection(
        name=folder.resolve().name,
        fingerprint=content_hash(files),
        splits=tuple(splits),
        passages=functools.partial(read_passages, corpus, "docid"),
        queries=lambda split: _queries(of(split)),
        qrels=lambda split: _qrels(of(split)),
        answer_splits=tuple(name for name, split in splits.items() if split.by_answers),
        query_file=lambda split: (query for query, _, _ in of(split).queries()),
        remarks=remarks,
    )


def _tested(file: Path, labelled: Path | None) -> _Split:
    """The split test: judged by answers where its first line has them, and no label is to be found."""
    source, _, value = next(objects(file, "query_id"), ("", "", {}))
    has_labels = labelled is not None or bool(_positives(source, value))
    return _Split(file, labelled, by_answers=not has_labels and bool(_answers(source, value)))


def _query(source: str, key: str, value: dict) -> Query:
    field = "query_text" if "query_text" in value else "query"
    return Query(key, text_of(source, value, "query", field), _answers(source, value))


def _answers(source: str, value: dict) -> tuple[str, ...]:
    if isinstance(value.get("answer"), str):
        return (value["answer"],)
    return answers_of(source, value, "answer" if value.get("answer") else "answers")


def _positives(source: str, value: dict) -> tuple[str, ...]:
    """The docids of a line's positives, each once."""
    if "positive_document_ids" in value:
        field, form = "positive_document_ids", "strings"
        ids = _listed(value[field])
    else:
        field, form = "positive_passages", "objects with a `docid`"
        found = _listed(value.get(field))
        ids = [each.get("docid") if isinstance(each, dict) else None for each in found]
    if not all(isinstance(key, str) and key for key in ids):
        raise InputError(f"{source}: `{field}` is no list of {form}; correct it")
    return tuple(dict.fromkeys(ids))


def _listed(found) -> Iterable:
    """The items of a list, none of null; None is the one item of anything else."""
    return [] if found is None else found if isinstance(found, list) else [None]


def _queries(split: _Split) -> Iterator[Query]:
    labelled = {q.query_id for q in labels(split.labels) if q.relevance > 0} if split.labels else ()
    found = False
    for query, positives, _ in split.queries():
        if split.labels:
            judged = query.id in labelled
        elif split.by_answers:
            judged = any(answer.strip() for answer in query.answers)
        else:
            judged = bool(positives)
        if judged and query.text.strip():
            found = True
            yield query
    if not found:
        part = " of those held out as dev" if split.held_out else ""
        raise InputError(
            f"{split.file}: no query{part} has a positive; add positive_passages or, of dev and test, "
            "labels in qrels.dev.tsv or qrels.test.tsv"
        )


def _qrels(split: _Split) -> Iterator[Qrel]:
    if split.labels:
        yield from labels(split.labels)
    elif not split.by_answers:
        for query, positives, source in split.queries():
            yield from (Qrel(query.id, passage, 1, source) for passage in positives)
