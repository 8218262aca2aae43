"""Reader of files whose rows have named columns, as people keep questions with their answers.

    NAME.csv        a header line, then rows; separated by `,` `;` or tabs: what the header has most of
    NAME.tsv        the same, separated by tabs
    NAME.jsonl      one object per line (.ndjson and .json, too)
    NAME.parquet    read by pyarrow

All but the last may be gzipped (NAME.csv.gz). Quotes are those of RFC 4180: a field that holds the
separator, a line end or a quote stands between quotes, and a quote within it is written twice.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rqv2_jax import optional
from rqv2_jax.data import files
from rqv2_jax.errors import InputError

# Longer fields are those whose closing quote is missing.
MOST_CHARACTERS = 2**24
_TABLES, _OBJECTS = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")


class Record(NamedTuple):
    """A row's values in the columns that were asked for; `place` is `path:line` of its first line."""

    place: str
    values: tuple[str, ...]


def records(file: Path, columns: list[str]) -> Iterator[Record]:
    """Yields the values of the named columns, stripped, of every row of a file that is not blank.

    A value that is null or missing is "", a number is its text. Raises `InputError` if a column is
    missing or ambiguous, and for a row that cannot be read.
    """
    files.open_file(file)
    kind = Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower()
    rows: Iterator[tuple[str, Sequence[object]]]
    if kind in _TABLES:
        rows = _table(file, columns, kind)
    elif kind in _OBJECTS:
        rows = _objects(file, columns)
    elif kind == ".parquet" and file.suffix != ".gz":
        rows = _parquet(file, columns)
    else:
        raise InputError(
            f"{file}: the end of its name tells no format; name it .csv, .tsv, .jsonl (each may be "
            "followed by .gz) or .parquet"
        )
    for place, values in rows:
        texts = tuple(_text(place, *each) for each in zip(columns, values, strict=True))
        yield Record(place, texts)


def _text(place: str, column: str, value: object) -> str:
    """Returns a value as text, without white space around it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        shown = repr(value)[:80]
        raise InputError(f"{place}: column {column!r} holds {shown}; make it a string")
    text = str(value).strip()
    if "\0" in text:
        raise InputError(f"{place}: column {column!r} holds a NUL character; remove it")
    files.check_characters(place, text)
    return text


def _positions(file: Path, names: list[str], columns: list[str]) -> list[int]:
    """Returns where the columns stand among the names of a header."""
    for column in columns:
        if (count := names.count(column)) != 1:
            what = f"{count} columns are named {column!r}" if count else f"no column {column!r}"
            there = ", ".join(repr(name) for name in names)
            mend = "rename all but one" if count else "name one of those"
            raise InputError(f"{file}: {what}; it has {there}; {mend}")
    return [names.index(column) for column in columns]


def _lines(file: Path) -> Iterator[str]:
    """Yields lines with their ends; blank ones too, which a quoted field may hold."""
    for number, _, line in files.decoded(file):
        if "\0" in line:
            raise InputError(f"{file}:{number}: holds a NUL byte, as UTF-16 does; save it as UTF-8")
        yield line


def _table(file: Path, columns: list[str], kind: str) -> Iterator[tuple[str, list[str]]]:
    first = next(_lines(file), "")
    separator = "\t" if kind == ".tsv" else max(",;\t", key=first.count)
    csv.field_size_limit(MOST_CHARACTERS)
    rows = csv.reader(_lines(file), delimiter=separator, strict=True)
    start, names, positions = 1, list[str](), list[int]()
    while True:
        try:
            row = next(rows, None)
        except csv.Error as e:
            raise InputError(
                f"{file}:{start}: the row that begins here is no row of a table ({e}); put a field "
                "with quotes in it between quotes, and write each quote in it twice"
            ) from None
        if row is None:
            break
        place, start = f"{file}:{start}", rows.line_num + 1
        if not names:
            names = [name.strip() for name in row]
            positions = _positions(file, names, columns) if row else []
        elif len(row) > 1 or any(map(str.strip, row)):
            if len(row) != len(names):
                raise InputError(
                    f"{place}: {len(row)} columns, but the header has {len(names)}; put a field that "
                    f"holds {separator!r} or a line end between quotes"
                )
            yield place, [row[i] for i in positions]
    if not names:
        raise InputError(f"{file}: is empty; begin it with a line of column names")


def _objects(file: Path, columns: list[str]) -> Iterator[tuple[str, list[object]]]:
    names = dict[str, None]()
    for number, line in files.lines(file):
        place = f"{file}:{number}"
        if not names and line.lstrip().startswith("["):
            raise InputError(f"{place}: an array; write one object per line (jq -c '.[]' does)")
        value = files.json_of(place, line)
        if not isinstance(value, dict):
            raise InputError(f"{place}: no JSON object; write one object per line")
        names |= dict.fromkeys(value)
        yield place, [value.get(column) for column in columns]
    if not names:
        raise InputError(f"{file}: is empty; write one object per line")
    # An object may lack what others have.
    _positions(file, list(names), columns)


def _parquet(file: Path, columns: list[str]) -> Iterator[tuple[str, list[object]]]:
    parquet = optional.load("pyarrow.parquet", f"reading {file}")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _positions(file, names, columns)
            for batch in table.iter_batches(columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", [row[column] for column in columns]
    except (OSError, RuntimeError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{file}: cannot be read ({e}); write the file again") from None
