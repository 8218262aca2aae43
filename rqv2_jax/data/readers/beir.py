"""Reader of folders in BEIR layout (github.com/beir-cellar/beir).

    corpus.jsonl                   {"_id": ..., "title": ..., "text": ...}
    queries.jsonl                  {"_id": ..., "text": ...}, or a queries.<split>.jsonl for each split
    <train_qrels>/train.tsv        labels of train, with or without the header line
    <eval_qrels>/{dev,test}.tsv    labels of dev and test

Each may be gzipped. Where only one of dev and test is there it is test, and of the training queries
about a hundred, at most every tenth, are held out as dev.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

from rqv2_jax.data import files
from rqv2_jax.data.collection import HELD_OUT, Collection, Qrel, Query, of_split, taken
from rqv2_jax.errors import InputError

# Of few training queries at most every tenth is dev; about a hundred are wanted.
FEWEST_HELD_OUT = 10


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split's files, and which of its queries it takes, as `collection.taken` has it."""

    queries: Path
    labels: Path
    held_out: bool | None = None


def beir(path: str | Path, *, train_qrels: str, eval_qrels: str) -> Collection:
    """Returns the collection in folder `path`, with the labels in these folders of it."""
    root = files.open_folder(path, "BEIR")
    corpus = files.required(root, "BEIR", "corpus.jsonl")
    splits = {}
    for split, folder in (("train", train_qrels), ("dev", eval_qrels), ("test", eval_qrels)):
        if not (root / folder).is_dir():
            raise InputError(f"{root / folder}: no such qrels folder; add it or name another one")
        labels = files.find_file(root / folder, f"{split}.tsv")
        if labels is not None:
            queries = files.find_file(root, f"queries.{split}.jsonl")
            splits[split] = _Split(queries or files.required(root, "BEIR", "queries.jsonl"), labels)
    if "train" not in splits:
        raise InputError(f"{root / train_qrels}: no train.tsv or train.tsv.gz; add the train split")
    read = [corpus, *(s.queries for s in splits.values()), *(s.labels for s in splits.values())]
    splits, remarks = _with_dev(splits)
    of = functools.partial(of_split, root, splits)
    return Collection(
        name=root.resolve().name,
        fingerprint=files.content_hash(read),
        splits=tuple(splits),
        passages=functools.partial(files.read_passages, corpus, "_id"),
        queries=lambda split: _queries(of(split)),
        qrels=lambda split: _qrels(of(split)),
        query_file=lambda split: _query_file(of(split).queries),
        remarks=remarks,
    )


def _with_dev(splits: dict[str, _Split]) -> tuple[dict[str, _Split], tuple[str, ...]]:
    """Returns the splits train, dev and, if there are labels for it, test; and remarks on them."""
    if {"dev", "test"} <= splits.keys():
        return splits, ()
    train, test = splits["train"], splits.get("dev") or splits.get("test")
    made = {name: dataclasses.replace(train, held_out=name == "dev") for name in ("train", "dev")}
    remark = "dev is held out from the training queries, for there are no labels of its own"
    if "dev" in splits:
        remark = f"test is {splits['dev'].labels.name}; {remark}"
    return made | ({"test": test} if test else {}), (remark,)


def _query_file(file: Path) -> Iterator[Query]:
    for source, key, value in files.objects(file, "_id"):
        yield Query(key, files.text_of(source, value, "query"), files.answers_of(source, value))


def _queries(split: _Split) -> Iterator[Query]:
    positive = files.with_positive(split.labels)
    if not positive:
        raise InputError(f"{split.labels}: no row has a score above 0; add the positive passages")

    def asked() -> Iterator[Query]:
        queries = _query_file(split.queries)
        return (query for query in queries if query.id in positive and query.text.strip())

    count = 0 if split.held_out is None else sum(1 for _ in asked())
    every = min(max(count // HELD_OUT, FEWEST_HELD_OUT), HELD_OUT, max(count, 1))
    yield from taken(asked(), split.held_out, every)


def _qrels(split: _Split) -> Iterator[Qrel]:
    other = set()
    if split.held_out is not None:
        other = {q.id for q in _queries(dataclasses.replace(split, held_out=not split.held_out))}
    yield from (label for label in files.labels(split.labels) if label.query_id not in other)
