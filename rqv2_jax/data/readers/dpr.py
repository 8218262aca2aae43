"""Reader of DPR's files for open-domain question answering (Karpukhin et al. 2020).

    psgs_w100.tsv               id, text, title, with a header line; fields quoted as in CSV
    biencoder-<name>-train.json an array of objects: question, answers, positive_ctxs (passage_id, ...)
    biencoder-<name>-dev.json   the same; without it, dev is held out from the training questions
    <name>-test.qa.csv          question <tab> list of answers, as Python writes it

Each may be gzipped. A question's positive is the first of its `positive_ctxs`, as in DPR's own
training: the others were found by string match and are not judged. Questions without one are left
out (a quarter of TriviaQA's), and so are questions of test without an answer, by which test is judged.
Queries have no ids of their own and get `<split>-<number>`, from 0.
"""

import ast
import csv
import functools
import zlib
from collections.abc import Iterator
from pathlib import Path

import ijson

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


def corpus(folder: Path) -> Corpus:
    """Returns the passages in a folder."""
    file = files.required(folder, "DPR", "psgs_w100.tsv")
    return Corpus((file,), functools.partial(_passages, file))


def dpr(path: str | Path) -> Collection:
    """Returns the collection in a folder of DPR's files."""
    folder = files.open_folder(path, "DPR")
    passages = corpus(folder)
    splits = {"train": files.required(folder, "DPR", "biencoder-*-train.json")}
    if dev := files.find_file(folder, "biencoder-*-dev.json"):
        splits["dev"] = dev
    splits["test"] = files.required(folder, "DPR", "*-test.qa.csv")

    def read(split: str) -> Iterator[tuple[Query, Qrel | None]]:
        file = of_split(folder, splits, split)
        return _tested(file) if split == "test" else _trained(file, split)

    def queries(split: str) -> Iterator[Query]:
        judged = (q for q, label in read(split) if (q.answers if split == "test" else label))
        return (query for query in judged if query.text.strip())

    def qrels(split: str) -> Iterator[Qrel]:
        asked = read(split)
        if split == "test":
            return iter(())
        return (label for query, label in asked if label and query.text.strip())

    texts = Collection(
        name=folder.resolve().name,
        fingerprint=files.content_hash([*passages.files, *splits.values()]),
        splits=tuple(splits),
        passages=lambda: passages.read(files.lines),
        queries=queries,
        qrels=qrels,
        answer_splits=("test",),
        query_file=lambda split: (query for query, _ in read(split)),
        corpus=passages,
    )
    return texts if dev else with_dev(texts)


def _rows(
    file: Path, count: int, what: str, read: Lines = files.lines
) -> Iterator[tuple[str, list[str]]]:
    """Yields (`path:line`, fields) of a tab-separated file with CSV's quotes."""
    # Python's limit, which is that of all csv readers, is lower than the longest passages.
    csv.field_size_limit(2**31 - 1)
    for number, line in read(file):
        source = f"{file}:{number}"
        try:
            (fields,) = csv.reader([line], delimiter="\t")
        except csv.Error as e:
            raise InputError(f"{source}: cannot be read ({e}); split or mend the line") from None
        if len(fields) != count:
            raise InputError(
                f"{source}: {len(fields)} tab-separated columns instead of {count} in "
                f"{line[:80]!r}; write {what}"
            )
        yield source, fields


def _passages(file: Path, read: Lines) -> Iterator[Passage]:
    seen: set[str] = set()
    for source, (key, text, title) in _rows(file, 3, "id, text and title", read):
        if not seen and (key, text, title) == ("id", "text", "title"):
            continue
        if not key or key in seen:
            what = f"duplicate id {key!r}" if key else "no id"
            raise InputError(f"{source}: {what}; give every passage an id of its own")
        files.check_id(source, key)
        seen.add(key)
        yield Passage(key, title, text)


def _trained(file: Path, split: str) -> Iterator[tuple[Query, Qrel | None]]:
    """Yields every question with its positive, if it has one."""
    number = 0
    try:
        with files.opened(file) as stream:
            for number, item in enumerate(ijson.items(stream, "item")):
                yield _question(item, f"{file}: question {number}", f"{split}-{number}")
    except (ijson.JSONError, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{file}: not JSON after question {number} ({reason}); fetch the file again"
        ) from None


def _question(item: object, source: str, key: str) -> tuple[Query, Qrel | None]:
    if not isinstance(item, dict):
        raise InputError(f"{source}: no JSON object; write question, answers, positive_ctxs")
    text = files.text_of(source, item, "question", "question")
    query = Query(key, text, files.answers_of(source, item))
    if "positive_ctxs" not in item:
        raise InputError(f"{source}: no `positive_ctxs`; use the biencoder files")
    positives = item["positive_ctxs"] or []
    if not isinstance(positives, list) or not all(isinstance(each, dict) for each in positives[:1]):
        raise InputError(f"{source}: `positive_ctxs` is no list of objects; correct it")
    if not positives:
        return query, None
    # Natural Questions' files write passage_id, the others psg_id.
    passage = positives[0].get("passage_id", positives[0].get("psg_id"))
    if not isinstance(passage, str | int) or not str(passage):
        raise InputError(f"{source}: its positive has no `passage_id`; use the biencoder files")
    return query, Qrel(key, str(passage), 1, source)


def _tested(file: Path) -> Iterator[tuple[Query, None]]:
    """Yields every question, without a positive."""
    for number, (source, (text, listed)) in enumerate(_rows(file, 2, "question and answers")):
        try:
            answers = ast.literal_eval(listed)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            answers = None
        if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
            raise InputError(
                f"{source}: needs a question and a list of answers such as ['a', 'b']; correct it"
            )
        answers = tuple(answer for answer in answers if answer.strip())
        yield Query(f"test-{number}", text, answers), None
