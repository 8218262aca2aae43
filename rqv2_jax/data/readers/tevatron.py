"""Reader of Tevatron's JSON lines (github.com/texttron/tevatron, docs/datasets.md).

    corpus.jsonl               docid, title, text
    {train,dev,test}.jsonl     query_id, query, positive_passages, negative_passages (lists of objects
                               with docid, title, text) and, of question answering, answers; or, since
                               version 2, query_id, query_text, positive_document_ids,
                               negative_document_ids (lists of docids) and answer
    qrels.{dev,test}.tsv       labels of a split whose lines have no positives

Images, video and audio are not read: a passage without other text is empty. Each may be gzipped,
and a name before the split is allowed. On the Hugging Face hub, msmarco-passage has
train and dev, wikipedia-nq nq-train, nq-dev and nq-test; corpora are in repositories of their own,
msmarco-passage-corpus and wikipedia-nq-corpus. MS MARCO's dev lines are queries alone: put its
qrels.dev.small.tsv beside them as qrels.dev.tsv. Lines of nq-test have answers alone, which judge.

Positives are taken by docid; their texts are those of the corpus. Negatives are not read: this
package mines its own. Where only one of dev and test is there it is `test`, and `dev` is held out from
the training queries.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rqv2_jax.data import files
from rqv2_jax.data.collection import Collection, Corpus, Qrel, Query, of_split, with_dev
from rqv2_jax.errors import InputError


@dataclass(frozen=True)
class _Split:
    """A split's lines, and labels in a file of their own."""

    file: Path
    labels: Path | None = None
    by_answers: bool = False

    def queries(self) -> Iterator[tuple[Query, tuple[str, ...], str]]:
        """Yields (query, docids of its positives, `path:line`) of every line."""
        for source, key, value in files.objects(self.file, "query_id"):
            field = "query_text" if "query_text" in value else "query"
            text = files.text_of(source, value, "query", field)
            yield Query(key, text, _answers(source, value)), _positives(source, value), source


def corpus(folder: Path) -> Corpus:
    """Returns the passages in a folder."""
    return files.corpus(files.required(folder, "Tevatron", "corpus.jsonl"), "docid")


def tevatron(path: str | Path) -> Collection:
    """Returns the collection in a folder of Tevatron's files."""
    folder = files.open_folder(path, "Tevatron")
    passages = corpus(folder)
    train = files.required(folder, "Tevatron", "train.jsonl", "*-train.jsonl")
    find = functools.partial(files.find_file, folder)
    dev, test = (find(f"{name}.jsonl", f"*-{name}.jsonl") for name in ("dev", "test"))
    if not (last := test or dev):
        raise InputError(f"{folder}: neither dev.jsonl nor test.jsonl; add the queries to test on")
    name = "test" if test else "dev"
    splits = {"train": _Split(train)}
    if dev and test:
        splits["dev"] = _Split(dev, find("qrels.dev.tsv"))
    splits["test"] = _tested(last, find(f"qrels.{name}.tsv"))
    read = [
        *passages.files,
        *(f for split in splits.values() for f in (split.file, split.labels) if f),
    ]
    of = functools.partial(of_split, folder, splits)
    found = Collection(
        name=folder.resolve().name,
        fingerprint=files.content_hash(read),
        splits=tuple(splits),
        passages=lambda: passages.read(files.lines),
        queries=lambda split: _queries(of(split)),
        qrels=lambda split: _qrels(of(split)),
        answer_splits=tuple(name for name, split in splits.items() if split.by_answers),
        query_file=lambda split: (query for query, _, _ in of(split).queries()),
        remarks=() if test else ("test is dev",),
        corpus=passages,
    )
    return found if "dev" in splits else with_dev(found)


def _tested(file: Path, labelled: Path | None) -> _Split:
    """Returns the split test, judged by answers if its first line has some and there are no labels."""
    source, _, value = next(files.objects(file, "query_id"), ("", "", {}))
    has_labels = labelled is not None or bool(_positives(source, value))
    return _Split(file, labelled, by_answers=not has_labels and bool(_answers(source, value)))


def _answers(source: str, value: dict) -> tuple[str, ...]:
    if isinstance(value.get("answer"), str):
        return (value["answer"],)
    return files.answers_of(source, value, "answer" if value.get("answer") else "answers")


def _positives(source: str, value: dict) -> tuple[str, ...]:
    """Returns the docids of a line's positives, each once."""
    if "positive_document_ids" in value:
        field, form = "positive_document_ids", "strings"
        ids = _listed(value[field])
    else:
        field, form = "positive_passages", "objects with a `docid`"
        passages = _listed(value.get(field))
        ids = [each.get("docid") if isinstance(each, dict) else None for each in passages]
    if not all(isinstance(key, str) and key for key in ids):
        raise InputError(f"{source}: `{field}` is no list of {form}; correct it")
    return tuple(dict.fromkeys(ids))


def _listed(value: object) -> list:
    """Returns the items of a list, none of null; None is the one item of anything else."""
    return [] if value is None else value if isinstance(value, list) else [None]


def _queries(split: _Split) -> Iterator[Query]:
    labelled = files.with_positive(split.labels) if split.labels else ()
    empty = True
    for query, positives, _ in split.queries():
        if split.labels:
            judged = query.id in labelled
        elif split.by_answers:
            judged = any(answer.strip() for answer in query.answers)
        else:
            judged = bool(positives)
        if judged and query.text.strip():
            empty = False
            yield query
    if empty:
        raise InputError(
            f"{split.file}: no query has a positive; add positive_passages or, of dev and test, "
            "labels in qrels.dev.tsv or qrels.test.tsv"
        )


def _qrels(split: _Split) -> Iterator[Qrel]:
    if split.labels:
        yield from files.labels(split.labels)
    elif not split.by_answers:
        for query, positives, source in split.queries():
            yield from (Qrel(query.id, passage, 1, source) for passage in positives)
