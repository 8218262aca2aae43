"""Reader of query files, to search a corpus or to evaluate on it.

    qid <tab> text                      MS MARCO's, as msmarco-test2019-queries.tsv of TREC's deep
                                        learning track
    <top> <num> <title> ... </top>      TREC's classic topics (trec.nist.gov/data/topics_eng); the
                                        query is the title, description and narrative are not read
    {"_id": ..., "text": ...}           BEIR's queries.jsonl
    {"query_id": ..., "query": ...}     Tevatron's, where the text may be `query_text` too

Gzipped or not. Texts may be empty: `asked` leaves these out.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rqv2_jax.data import files
from rqv2_jax.data.collection import Left, Query
from rqv2_jax.data.readers.tables import pairs, unique
from rqv2_jax.errors import InputError

_TAG = re.compile(r"<(/?\w+)>(.*)")
# Labels before the number and, until 1994, before the title.
_LABELS = {"num": "Number:", "title": "Topic:"}
# Fields that may hold the text, by the name of the id.
_FIELDS = {"_id": ("text",), "query_id": ("query_text", "query", "text")}


def topics(file: Path) -> Iterator[Query]:
    """Yields the queries of a file, in its order."""
    _, first = next(files.lines(files.open_file(file)), (0, ""))
    if first.lstrip().lower().startswith("<top>"):
        rows = _trec(file)
    elif first.lstrip().startswith("{"):
        rows = _json(file, first)
    else:
        rows = pairs(file, "query")
    for _, key, text in unique(rows):
        yield Query(key, text, ())


def asked(queries: Iterable[Query], left: Left) -> list[Query]:
    """Returns the queries that have text; `left` counts the others."""
    kept = []
    for query in queries:
        if query.text.strip():
            kept.append(query)
        else:
            left.add("queries have no text; left out", query.id)
    return kept


def _json(file: Path, first: str) -> Iterator[tuple[str, str, str]]:
    """Yields (`path:line`, id, text) of every object; the first line tells the format."""
    try:
        id_field = "query_id" if "query_id" in json.loads(first) else "_id"
    except (ValueError, RecursionError):
        id_field = "_id"
    names = _FIELDS[id_field]
    for source, key, value in files.objects(file, id_field):
        field = next((name for name in names if name in value), names[-1])
        yield source, key, files.text_of(source, value, "query", field)


def _trec(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (`path:line`, number, title) of every topic."""
    start, fields, field = 0, dict[str, list[str]](), ""
    for number, line in files.lines(file):
        match = _TAG.match(line.strip())
        tag, text = (match[1].lower(), match[2]) if match else ("", line)
        if (tag == "top") == bool(start):
            what = f"line {start} begins a topic" if start else "no topic begins before it"
            raise InputError(f"{file}:{number}: {what}; put each between <top> and </top>")
        if tag == "top":
            start, fields, field = number, {}, ""
        elif tag == "/top":
            source = f"{file}:{start}"
            key, title = (_value(source, fields, name) for name in ("num", "title"))
            yield source, key, title
            start = 0
        else:
            field = tag or field
            fields.setdefault(field, []).append(re.sub(r"</\w+>\s*$", "", text))
    if start:
        raise InputError(f"{file}:{start}: this topic has no end; close it by </top>")


def _value(source: str, fields: dict[str, list[str]], name: str) -> str:
    text = " ".join(" ".join(fields.get(name, ())).split())
    text = text.removeprefix(_LABELS[name]).strip()
    if name not in fields or (name == "num" and not text):
        raise InputError(f"{source}: topic without <{name}>; add it or remove the topic")
    return text
