"""Conversion of collections to tensorflow-datasets records and back.

A dataset has the splits `passages` and those of the collection. A record has `id`, `title`, `text` (of
a passage or query) and, of a query, `answers`, the passages `labelled` and their `relevances`.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from rqv2_jax import optional
from rqv2_jax.data.collection import Collection, Passage, Qrel, Query, of_split


def row(
    key: str,
    title: str,
    text: str,
    labels: Iterable[tuple[str, int]] = (),
    answers: Iterable[str] = (),
) -> dict:
    """Returns one record; `labels` are pairs of passage id and relevance."""
    labels = list(labels)
    return {
        "id": key,
        "title": title,
        "text": text,
        "answers": list(answers),
        "labelled": [passage for passage, _ in labels],
        "relevances": [relevance for _, relevance in labels],
    }


def rows(texts: Collection, split: str) -> Iterator[dict]:
    """Yields the records of a collection's split, or of `passages`, in its order."""
    if split == "passages":
        for passage in texts.passages():
            yield row(*passage)
        return
    labels: dict[str, list[tuple[str, int]]] = {}
    for query_id, passage_id, relevance, _ in texts.qrels(split):
        labels.setdefault(query_id, []).append((passage_id, relevance))
    for query in texts.queries(split):
        yield row(query.id, "", query.text, labels.get(query.id, ()), query.answers)


# The argument is one of the base class, whose types are not read.
class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders: the features, and records in the order in which they come."""

    def _info(self):
        text = tfds.features.Text()
        several = tfds.features.Sequence
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                dict.fromkeys(("id", "title", "text"), text)
                | dict.fromkeys(("answers", "labelled"), several(text))
                | {"relevances": several(np.int32)}
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _generate_examples(self, rows: Callable[[], Iterable[dict]]):
        yield from enumerate(rows())


def prepare(builder: Builder) -> None:
    """Writes a builder's records unless they are there; nothing is fetched but what it asks for."""
    optional.tensorflow("data that is not read from a folder")
    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)


def collection(
    builder: Builder, *, name: str, fingerprint: str, answer_splits: tuple[str, ...] = ()
) -> Collection:
    """Returns the collection that a prepared builder's records hold."""
    splits = {split: split for split in ("train", "dev", "test") if split in builder.info.splits}

    def read(split: str) -> Iterator[dict]:
        # One shard after the other, in the order in which they were written.
        read_config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        return iter(tfds.as_numpy(builder.as_dataset(split=split, read_config=read_config)))

    def passages() -> Iterator[Passage]:
        for record in read("passages"):
            yield Passage(*(record[key].decode() for key in ("id", "title", "text")))

    def queries(split: str) -> Iterator[Query]:
        for record in read(of_split(Path(name), splits, split)):
            answers = tuple(answer.decode() for answer in record["answers"])
            yield Query(record["id"].decode(), record["text"].decode(), answers)

    def qrels(split: str) -> Iterator[Qrel]:
        for number, record in enumerate(read(of_split(Path(name), splits, split)), 1):
            for passage, relevance in zip(record["labelled"], record["relevances"].tolist()):
                source = f"{name}/{split}:{number}"
                yield Qrel(record["id"].decode(), passage.decode(), relevance, source)

    return Collection(
        name=name,
        fingerprint=fingerprint,
        splits=tuple(splits),
        passages=passages,
        queries=queries,
        qrels=qrels,
        answer_splits=answer_splits,
    )
