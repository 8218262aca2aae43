"""Reader of folders in BEIR layout (github.com/beir-cellar/beir).

    corpus.jsonl                   {"_id": ..., "title": ..., "text": ...}
    queries.jsonl                  {"_id": ..., "text": ...}, or a queries.<split>.jsonl for each split
    <train_qrels>/train.tsv        labels of train, with or without the header line
    <eval_qrels>/{dev,test}.tsv    labels of dev and test

Each may be gzipped. Where only one of dev and test is there it is test, and dev is held out from the
training queries.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from rqv2_jax.data import files
from rqv2_jax.data.collection import Collection, Corpus, Query, of_split, with_dev
from rqv2_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split's files."""

    queries: Path
    labels: Path


def corpus(folder: Path) -> Corpus:
    """Returns the passages in a folder."""
    return files.corpus(files.required(folder, "BEIR", "corpus.jsonl"), "_id")


def beir(path: str | Path, *, train_qrels: str, eval_qrels: str) -> Collection:
    """Returns the collection in folder `path`, with the labels in these folders of it.

    Without `train_qrels` ("") it has no train, and no dev but its own.
    """
    root = files.open_folder(path, "BEIR")
    passages = corpus(root)
    splits = {}
    for split, folder in (("train", train_qrels), ("dev", eval_qrels), ("test", eval_qrels)):
        if not folder:
            continue
        if not (root / folder).is_dir():
            raise InputError(f"{root / folder}: no such qrels folder; add it or name another one")
        labels = files.find_file(root / folder, f"{split}.tsv")
        if labels is not None:
            queries = files.find_file(root, f"queries.{split}.jsonl")
            splits[split] = _Split(queries or files.required(root, "BEIR", "queries.jsonl"), labels)
    if train_qrels and "train" not in splits:
        raise InputError(f"{root / train_qrels}: no train.tsv or train.tsv.gz; add the train split")
    read = [
        *passages.files,
        *(s.queries for s in splits.values()),
        *(s.labels for s in splits.values()),
    ]
    has_dev, remarks = {"dev", "test"} <= splits.keys(), tuple[str, ...]()
    if "dev" in splits and not has_dev:
        splits["test"] = splits.pop("dev")
        remarks = (f"test is {splits['test'].labels.name}",)
    of = functools.partial(of_split, root, splits)
    texts = Collection(
        name=root.resolve().name,
        fingerprint=files.content_hash(read),
        splits=tuple(splits),
        passages=lambda: passages.read(files.lines),
        queries=lambda split: _queries(of(split)),
        qrels=lambda split: files.labels(of(split).labels),
        query_file=lambda split: _query_file(of(split).queries),
        remarks=remarks,
        corpus=passages,
    )
    return texts if has_dev or not train_qrels else with_dev(texts)


def _query_file(file: Path) -> Iterator[Query]:
    for source, key, value in files.objects(file, "_id"):
        yield Query(key, files.text_of(source, value, "query"), files.answers_of(source, value))


def _queries(split: _Split) -> Iterator[Query]:
    positive = files.with_positive(split.labels)
    if not positive:
        raise InputError(f"{split.labels}: no row has a score above 0; add the positive passages")
    queries = _query_file(split.queries)
    yield from (query for query in queries if query.id in positive and query.text.strip())
