"""Questions with their answers, in a file of rows, to a folder in BEIR layout."""

import collections
import json
import pathlib
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from rqv2_jax import disk
from rqv2_jax.data import pairs
from rqv2_jax.data.collection import Passage
from rqv2_jax.data.readers.records import Record, records
from rqv2_jax.errors import InputError

# Characters of a text that is shown, at most.
MOST_SHOWN = 70


class Columns(NamedTuple):
    """Names of columns; None where the file has none of that kind."""

    query: str
    passage: str
    title: str | None = None
    query_id: str | None = None
    passage_id: str | None = None

    def of_passages(self) -> dict[str, str]:
        """Returns the columns that describe a passage, by their role."""
        roles = {"passage": self.passage, "title": self.title, "passage_id": self.passage_id}
        return {role: name for role, name in roles.items() if name is not None}

    def of_pairs(self) -> dict[str, str]:
        """Returns all columns, by their role."""
        return {role: name for role, name in self._asdict().items() if name is not None}


class Converted(NamedTuple):
    """What was read: its texts and pairs, the part of each query, and a line for each count of rows."""

    found: pairs.Pairs
    parts: pairs.Parts
    counts: list[str]


def shares_of(text: str) -> list[float]:
    """Returns the shares of train, dev and test in `80/10/10`, whose sum is 1 afterwards."""
    try:
        shares = [float(part) for part in text.split("/")]
    except ValueError:
        shares = []
    if len(shares) != len(pairs.SPLITS) or not all(0 < share < float("inf") for share in shares):
        raise InputError(
            f"--splits {text}: write three numbers above 0, for train, dev and test, as 80/10/10"
        )
    return [share / sum(shares) for share in shares]


def convert(
    file: pathlib.Path,
    corpus: pathlib.Path | None,
    columns: Columns,
    shares: Sequence[float],
    seed: int,
) -> Converted:
    """Reads the rows of a file, and those of `corpus`, whose passages have no questions."""
    counts = _Counts()
    queries, passages = pairs.Merged("query"), pairs.Merged("passage")
    labels = dict[tuple[int, int], None]()
    for place, row in _rows(file, columns.of_pairs()):
        counts.add("rows read")
        missing = next((name for name in ("query", "passage") if not row[name]), None)
        if missing:
            counts.add(f"left out: no text in {getattr(columns, missing)!r}", place)
            continue
        query = queries.add(place, "", row["query"], row.get("query_id"))
        known = len(passages.items)
        passage = _add(passages, place, row)
        if (query, passage) in labels:
            counts.add("left out: the question and the passage of an earlier row", place)
        elif passage < known:
            counts.add("merged: the passage of an earlier row, with another question", place)
        labels[query, passage] = None
    for place, row in _rows(corpus, columns.of_passages()) if corpus else ():
        counts.add("rows of --corpus read")
        known = len(passages.items)
        if not row["passage"]:
            counts.add(f"left out of --corpus: no text in {columns.passage!r}", place)
        elif _add(passages, place, row) < known:
            counts.add("left out of --corpus: the passage of an earlier row", place)
    for texts in (queries, passages):
        counts.add(f"ids not used: the {texts.what} has another one already", "", texts.renamed)
    several = sum(n > 1 for n in collections.Counter(query for query, _ in labels).values())
    counts.add("merged: questions with several passages, all relevant", "", several)
    found = pairs.Pairs(queries.items, passages.items, list(labels))
    try:
        parts = pairs.divide(found, shares, seed)
    except InputError as e:
        said = "; ".join(line.strip() for line in counts.lines())
        raise InputError(f"{file}: {e} ({said})") from None
    return Converted(found, parts, counts.lines())


class _Counts:
    """Counts by what is counted, with the place of the first."""

    def __init__(self):
        self._counts = dict[str, tuple[int, str]]()

    def add(self, what: str, place: str = "", number: int = 1) -> None:
        count, first = self._counts.get(what, (0, place))
        self._counts[what] = count + number, first

    def lines(self) -> list[str]:
        return [
            f"{count:>9,}  {what}" + (f" (first: {first})" if first else "")
            for what, (count, first) in self._counts.items()
            if count
        ]


def _rows(file: pathlib.Path, columns: dict[str, str]) -> Iterable[tuple[str, dict[str, str]]]:
    """Yields (place, values by role) of every row, with a bar for people if that takes long."""
    stream: Iterable[Record] = records(file, list(columns.values()))
    for place, values in tqdm.tqdm(stream, desc=file.name, leave=False, delay=1):
        yield place, dict(zip(columns, values, strict=True))


def _add(passages: pairs.Merged, place: str, row: dict[str, str]) -> int:
    return passages.add(place, row.get("title", ""), row["passage"], row.get("passage_id"))


def write(made: Converted, folder: pathlib.Path) -> None:
    """Writes the folder, which appears when all its files are complete."""
    queries, passages, labels = made.found
    with disk.new_folder(folder) as partial:
        (partial / "qrels").mkdir()
        _write_objects(partial / "corpus.jsonl", passages, ("id", "title", "text"))
        _write_objects(partial / "queries.jsonl", queries, ("id", "text"))
        for number, split in enumerate(pairs.SPLITS):
            with (partial / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as file:
                file.write("query-id\tcorpus-id\tscore\n")
                for query, passage in labels:
                    if made.parts.split_Q[query] == number:
                        file.write(f"{queries[query].id}\t{passages[passage].id}\t1\n")


def _write_objects(path: pathlib.Path, items: list[Passage], fields: tuple[str, ...]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            names = {"_id" if field == "id" else field: getattr(item, field) for field in fields}
            file.write(json.dumps(names, ensure_ascii=False) + "\n")


def render(made: Converted) -> str:
    """Returns the counts for people: what was left out and merged, and the size of each part."""
    queries, passages, labels = made.found
    rows: list[tuple[Any, ...]] = [("", "questions", "passages", "pairs")]
    for number, split in enumerate(pairs.SPLITS):
        chosen = [pair for pair in labels if made.parts.split_Q[pair[0]] == number]
        asked, judged = ({pair[i] for pair in chosen} for i in (0, 1))
        rows.append((split, len(asked), len(judged), len(chosen)))
    unasked = len(passages) - len({passage for _, passage in labels})
    rows.append(("no question", 0, unasked, 0))
    rows.append(("all", len(queries), len(passages), len(labels)))
    table = [
        f"{name:<12}" + "".join(f"{n:>11,}" if isinstance(n, int) else f"{n:>11}" for n in counts)
        for name, *counts in rows
    ]
    size_G = made.parts.size_G
    (often, times), *_ = collections.Counter(passage for _, passage in labels).most_common(1)
    remarks = [
        f"{len(size_G):,} groups of questions that share a passage or a wording, the largest of "
        f"{size_G.max():,}; no group is in two parts",
        f"most questions of one passage: {times:,} of {passages[often].id}, "
        f"{textwrap.shorten(passages[often].text, MOST_SHOWN)!r}",
    ]
    return "\n".join([*made.counts, "", *table, "", *remarks])


def next_steps(made: Converted, folder: pathlib.Path) -> str:
    """Returns the commands that check the folder, train on it and search it."""
    workdir = pathlib.Path("workdir") / folder.resolve().name
    data = shlex.quote(f"--config.data.path={folder}")
    tested = [made.found.queries[row].text for row in np.flatnonzero(made.parts.split_Q == 2)]
    plain = (text for text in tested if len(text) <= MOST_SHOWN and text.isprintable())
    question = next((text for text in plain if not text.startswith("-")), "a question")
    config, place = "--config configs/beir.py", f"--workdir {shlex.quote(str(workdir))}"
    return "\n".join(
        [
            "what to run next:",
            f"python -m rqv2_jax.check {config} {data}",
            f"python -m rqv2_jax.main {config} {place} {data}",
            f"python -m rqv2_jax.search {place} {shlex.quote(question)}",
        ]
    )
