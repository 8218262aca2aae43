"""What readers share: finding files, gzipped or not, and reading lines, JSON objects and labels.

What is missing, broken or malformed raises `InputError`, with the file, the line and the mend.
"""

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rqv2_jax.data.collection import Corpus, Lines, Passage, Qrel
from rqv2_jax.errors import InputError

MAX_RELEVANCE = int(np.iinfo(np.int32).max)


def open_file(path: Path) -> Path:
    """Returns the path itself; raises `InputError` if there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a file")
    return path


def open_folder(path: str | Path, layout: str) -> Path:
    """Returns the folder at `path`; raises `InputError`, which names the layout, if there is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the path of a folder in {layout} layout")
    return folder


def find_file(folder: Path, *names: str) -> Path | None:
    """Returns the only file with one of these names (`*`: any text), gzipped or not, or None."""
    patterns = [pattern for name in names for pattern in (name, f"{name}.gz")]
    matches = sorted(
        file for pattern in patterns for file in folder.glob(pattern) if file.is_file()
    )
    if len(matches) > 1:
        others = ", ".join(file.name for file in matches[1:])
        raise InputError(f"{matches[0]}: stands beside {others}; keep one of them")
    return matches[0] if matches else None


def required(folder: Path, layout: str, *names: str) -> Path:
    """Returns what `find_file` does; raises `InputError`, which names the layout, instead of None."""
    file = find_file(folder, *names)
    if file is None:
        raise InputError(
            f"{folder}: no {names[0]} or {names[0]}.gz; a folder in {layout} layout needs it"
        )
    return file


def content_hash(files: list[Path]) -> str:
    """Returns a hash of the files' names and bytes."""
    digests = {}
    for file in set(files):
        with file.open("rb") as stream:
            digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    named = [f"{file.name}\t{digests[file]}" for file in files]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()


def opened(file: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file for reading, unpacked if its name ends in `.gz`."""
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def decoded(file: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (number from 1, the byte at which it begins, text with its end) of every line."""
    number, end = 0, 0
    try:
        with opened(file) as stream:
            for raw in stream:
                number, start, end = number + 1, end, end + len(raw)
                # utf-8-sig, because some editors begin a file with a byte order mark.
                yield number, start, raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}:{number}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"{file}:{number + 1}: cannot be read on ({error}); fetch or compress the file again"
        ) from None


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its line end) of every line that is not blank."""
    return ((number, line) for number, _, line in placed_lines(file))


def placed_lines(file: Path) -> Iterator[tuple[int, int, str]]:
    """Yields what `lines` does, with the byte at which each line begins, from 0, between the two."""
    for number, start, text in decoded(file):
        line = text.rstrip("\r\n")
        if line.strip():
            yield number, start, line


def json_of(source: str, line: str) -> Any:
    """Returns what a line of JSON holds."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON ({error}); write one object per line") from None


# The columns of query, passage and relevance, by the number of columns.
_COLUMNS = {2: (0, 1, None), 3: (0, 1, 2), 4: (0, 2, 3)}


def labels(file: Path) -> Iterator[Qrel]:
    """Yields relevance labels in any of the field's formats, each pair once.

    Takes TREC's and MS MARCO's lines `qid 0 docid rel`, BEIR's `qid docid rel` with or without its
    header line, and RocketQA's `qid docid`; columns are separated by white space, all lines are alike.
    """
    judged: dict[tuple[str, str], tuple[int, int]] = {}
    width = 0
    for number, line in lines(file):
        source = f"{file}:{number}"
        columns = line.split()
        if number == 1 and columns == ["query-id", "corpus-id", "score"]:
            width = len(columns)
            continue
        width = width or len(columns)
        if len(columns) not in _COLUMNS or len(columns) != width:
            form = "`qid 0 docid rel`, `qid docid rel` or `qid docid`, all lines alike"
            raise InputError(f"{source}: {len(columns)} columns in {line[:80]!r}; write {form}")
        query, passage, relevance = _COLUMNS[width]
        value = 1 if relevance is None else _relevance(source, columns[relevance])
        pair = columns[query], columns[passage]
        before, first = judged.setdefault(pair, (value, number))
        if first == number:
            yield Qrel(*pair, value, source)
        elif before != value:
            raise InputError(
                f"{source}: relevance {value} for query {pair[0]!r} and passage {pair[1]!r}, but "
                f"{before} on line {first}; keep one of the two"
            )


def with_positive(file: Path) -> set[str]:
    """Returns the ids of the queries with a label above 0."""
    return {label.query_id for label in labels(file) if label.relevance > 0}


def _relevance(source: str, text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise InputError(f"{source}: relevance {text!r} is no integer; correct it")
    value = int(value)
    if abs(value) > MAX_RELEVANCE:
        raise InputError(f"{source}: relevance {value} is beyond {MAX_RELEVANCE}; correct it")
    return value


def objects(file: Path, id_field: str, read: Lines = lines) -> Iterator[tuple[str, str, dict]]:
    """Yields (`path:line`, id, object) of a JSON-lines file whose objects have ids, each once.

    Its lines are those that `read(file)` yields.
    """
    first_lines: dict[str, int] = {}
    for number, line in read(file):
        source = f"{file}:{number}"
        value = json_of(source, line)
        if not isinstance(value, dict):
            raise InputError(f'{source}: no JSON object; write {{"{id_field}": "...", ...}}')
        key = value.get(id_field)
        if not isinstance(key, str) or not key:
            fault = f"is {key!r}" if id_field in value else "is missing"
            raise InputError(f"{source}: `{id_field}` {fault}; give every line a non-empty string")
        check_id(source, key)
        if key in first_lines:
            raise InputError(
                f"{source}: duplicate id {key!r}, first on line {first_lines[key]}; make ids unique"
            )
        first_lines[key] = number
        yield source, key, value


def check_characters(source: str, text: str) -> None:
    """Raises `InputError` for a text with half a character in it, as JSON's \\u may write them."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = text[e.start : e.end].encode("ascii", "backslashreplace").decode()
        raise InputError(f"{source}: holds half a character ({half} alone); remove it") from None


def check_id(source: str, key: str) -> None:
    """Raises `InputError` for an id that no TREC run file could hold."""
    check_characters(source, key)
    if key.split() != [key]:
        raise InputError(
            f"{source}: id {key!r} has white space, which separates the columns of a TREC run file; "
            "rename it"
        )


def text_of(source: str, value: dict, what: str, field: str = "text") -> str:
    """Returns the text of a passage or query (`what`) in a JSON object, empty where it is null."""
    if field not in value:
        raise InputError(f"{source}: {what} without `{field}`; add the field or remove the line")
    text = "" if value[field] is None else value[field]
    if not isinstance(text, str):
        raise InputError(f"{source}: `{field}` is {text!r}; make it a string")
    check_characters(source, text)
    return text


def answers_of(source: str, value: dict, field: str = "answers") -> tuple[str, ...]:
    """Returns the strings in `answers` of a JSON object; none where it is absent or null."""
    answers = value.get(field)
    if answers is None:
        return ()
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        raise InputError(f"{source}: `{field}` is {answers!r}; make it a list of strings")
    return tuple(answers)


def corpus(file: Path, id_field: str) -> Corpus:
    """Returns the passages of a JSON-lines file: id, and `title` and `text` where there are any."""
    return Corpus((file,), lambda read: _passages(file, id_field, read))


def _passages(file: Path, id_field: str, read: Lines) -> Iterator[Passage]:
    for source, key, value in objects(file, id_field, read):
        title = value.get("title")
        if not isinstance(title, str | None):
            raise InputError(f"{source}: `title` is {title!r}; make it a string or leave it out")
        check_characters(source, title or "")
        yield Passage(key, title or "", text_of(source, {"text": None, **value}, "passage"))
