"""Passages that are read alone, by the places of their lines in the corpus's files."""

import gzip
import io
import json
import os
import pathlib
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from refusals import refused

from rqv2_jax.data import files, offsets, tokenise
from rqv2_jax.data.collection import Passage
from rqv2_jax.data.readers import beir, dpr, tables, tevatron
from rqv2_jax.data.tokenise import Tokenizer
from rqv2_jax.data.tokens import open_store
from rqv2_jax.recipe import texts

PASSAGES = [
    Passage(f"p{n}", f"Title {n}" if n % 3 else "", "stone " * (n % 4) + f"garden é {n}")
    for n in range(20)
]


def encode(given):
    """One number for each word; an empty list is refused, as by transformers."""
    assert given
    return [[len(word) for word in text.split()] for text in given]


WORDS = Tokenizer(encode, "words", 99, 1, 2)


def json_lines(folder, id_field, name="corpus.jsonl"):
    lines = [json.dumps({id_field: p.id, "title": p.title, "text": p.text}) for p in PASSAGES]
    # A byte order mark, blank lines, other line ends, none at the end.
    text = "\ufeff" + "\n".join(lines[:5]) + "\n\n \u2003\n" + "\r\n".join(lines[5:])
    (folder / name).write_bytes(text.encode())


def write_msmarco(folder):
    (folder / "collection.tsv").write_text("".join(f"{p.id}\t{p.text}\n" for p in PASSAGES))
    titles = "".join(f"{p.id}\t{p.title}\n\n" for p in PASSAGES)
    (folder / "para.title.txt").write_text(titles)


def write_rocketqa(folder):
    (folder / "para.txt").write_text("".join(f"{p.id}\t{p.text}\n" for p in PASSAGES))
    (folder / "para.title.txt").write_text("".join(f"{p.id}\t{p.title}\n" for p in PASSAGES))


def write_dpr(folder):
    rows = "".join(f'{p.id}\t"{p.text}"\t{p.title}\n' for p in PASSAGES)
    (folder / "psgs_w100.tsv").write_text(f"id\ttext\ttitle\n{rows}")


WRITERS = {
    "beir": (lambda folder: json_lines(folder, "_id"), beir.corpus),
    "tevatron": (lambda folder: json_lines(folder, "docid"), tevatron.corpus),
    "msmarco": (write_msmarco, tables.msmarco_corpus),
    "rocketqa": (write_rocketqa, tables.rocketqa_corpus),
    "dpr": (write_dpr, dpr.corpus),
}


def recorded(corpus):
    """The table of a corpus."""
    reader = offsets.Recorded(corpus)
    assert [*reader.passages()] == PASSAGES
    return reader.table(len(PASSAGES))


@pytest.mark.parametrize("dataset", WRITERS)
def test_passages_of_any_format_are_read_alone_as_in_their_order(tmp_path, dataset):
    write, corpus_of = WRITERS[dataset]
    write(tmp_path)
    corpus = corpus_of(tmp_path)
    assert corpus.by_offset()
    table_FxN = recorded(corpus)
    assert table_FxN.shape == (len(corpus.files), len(PASSAGES) + 1)
    for rows in ([0], [19], [4, 5], [7, 3, 12], range(20), []):
        assert offsets.read(corpus, table_FxN, rows) == [PASSAGES[row] for row in rows]
    # No byte of others is looked at.
    rows = [0, 6, 13, 19]
    for file, starts_N in zip(corpus.files, table_FxN):
        data = bytearray(file.read_bytes())
        for row in set(range(20)) - set(rows):
            data[starts_N[row] : starts_N[row + 1]] = b"\xff" * (starts_N[row + 1] - starts_N[row])
        file.write_bytes(data)
    assert offsets.read(corpus, table_FxN, rows) == [PASSAGES[row] for row in rows]


def test_no_byte_is_read_but_those_of_the_lines(tmp_path, monkeypatch):
    write_msmarco(tmp_path)
    corpus = tables.msmarco_corpus(tmp_path)
    table_FxN, count = recorded(corpus), []

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            assert name == "seek"
            return self.file.seek

        def read(self, size):
            count.append(size)
            return self.file.read(size)

    monkeypatch.setattr(pathlib.Path, "open", lambda path, *_, **__: Counted(io.FileIO(path)))
    offsets.read(corpus, table_FxN, [3, 15])
    # An empty line follows each title.
    expected = [f"{PASSAGES[row].id}\t{PASSAGES[row].text}\n" for row in (3, 15)]
    expected += [f"{PASSAGES[row].id}\t{PASSAGES[row].title}\n\n" for row in (3, 15)]
    assert sorted(count) == sorted(len(line.encode()) for line in expected)


def write_beir(folder, compress=False):
    """A folder in BEIR layout."""
    json_lines(folder, "_id")
    if compress:
        data = (folder / "corpus.jsonl").read_bytes()
        (folder / "corpus.jsonl").unlink()
        (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{n}", "text": f"stone {n}"}) + "\n" for n in range(20))
    )
    (folder / "qrels").mkdir()
    for split, numbers in (("train", range(10)), ("dev", range(10, 15)), ("test", range(15, 20))):
        labels = "".join(f"q{n}\tp{n}\t1\n" for n in numbers)
        (folder / "qrels" / f"{split}.tsv").write_text(labels)
    return folder


def prepared(tmp_path, **options):
    """(run, store) of a collection; only what reading passages needs."""
    (tmp_path / "data").mkdir()
    folder = write_beir(tmp_path / "data", **options)
    data = {"dataset": "beir", "path": str(folder), "train_qrels": "qrels", "eval_qrels": "qrels"}
    run = types.SimpleNamespace(
        config=ConfigDict({"data": data}), workdir=tmp_path / "w", tokenizer=WORDS
    )
    collection = texts.open_collection(run.config.data, tmp_path / "tfds")
    tokenise.prepare(collection, WORDS, tmp_path / "w" / "data" / "tokens")
    return run, open_store(tmp_path / "w" / "data" / "tokens")


def shown(rows):
    return {row: PASSAGES[row].shown() for row in rows}


def test_a_question_opens_no_collection(tmp_path, monkeypatch):
    run, store = prepared(tmp_path)
    monkeypatch.setattr(texts, "texts_of", None)
    monkeypatch.setattr(files, "content_hash", None)
    assert texts.show_passages(run, store, [17, 2, 5]) == shown([2, 5, 17])
    assert texts.show_passages(run, store, []) == {}
    # The folder may have another place.
    os.rename(tmp_path / "data", tmp_path / "moved")
    refused(lambda: texts.show_passages(run, store, [1]), tmp_path / "data", "--data DIR")
    run.config.data.path = str(tmp_path / "moved")
    assert texts.show_passages(run, store, [1]) == shown([1])


def test_a_gzipped_corpus_is_read_in_order(tmp_path):
    run, store = prepared(tmp_path, compress=True)
    assert store.lines_FxN is None
    assert texts.open_corpus(run.config.data) is None
    assert texts.show_passages(run, store, [17, 2]) == shown([2, 17])


def edited(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


CHANGES = {
    "another id": lambda path: edited(path, b'"p7"', b'"x7"'),
    "another text of the same length": lambda path: edited(path, b"\\u00e9 7", b"\\u00e9 z"),
    "another title": lambda path: edited(path, b"Title 7", b"Ti le 7"),
    "a line before it": lambda path: path.write_bytes(
        b'{"_id": "n", "text": "n"}\n' + path.read_bytes()
    ),
    "cut short": lambda path: os.truncate(path, 300),
    "no JSON": lambda path: path.write_bytes(b"\n" * path.stat().st_size),
    "gzipped": lambda path: (
        path.with_name("corpus.jsonl.gz").write_bytes(gzip.compress(path.read_bytes())),
        path.unlink(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_corpus_that_has_changed_is_noticed(tmp_path, change):
    run, store = prepared(tmp_path)
    run.tokenizer = LETTERS = Tokenizer(lambda g: [[*map(ord, t)] for t in g], "words", 999, 1, 2)
    folder = tmp_path / "letters"
    tokenise.prepare(texts.open_collection(run.config.data, tmp_path), LETTERS, folder)
    store = open_store(folder)
    assert texts.show_passages(run, store, [2, 7]) == shown([2, 7])
    CHANGES[change](tmp_path / "data" / "corpus.jsonl")
    message = refused(lambda: texts.show_passages(run, store, [2, 7]), tmp_path / "w")
    assert "bring the" in message or "bring these" in message


@pytest.mark.parametrize("place", [-1, 2**62])
def test_places_beyond_the_file_are_noticed(tmp_path, place):
    write_msmarco(tmp_path)
    corpus = tables.msmarco_corpus(tmp_path)
    for number in (7, 8):
        table_FxN = recorded(corpus)
        table_FxN[1, number] = place
        refused(lambda given=table_FxN: offsets.read(corpus, given, [3, 7]), "para.title.txt")


def test_titles_that_are_gone_are_noticed(tmp_path):
    write_msmarco(tmp_path)
    corpus, data = tables.msmarco_corpus(tmp_path), {"dataset": "msmarco", "path": str(tmp_path)}
    table_FxN = recorded(corpus)
    store = types.SimpleNamespace(lines_FxN=table_FxN)
    run = types.SimpleNamespace(config=ConfigDict({"data": data}), workdir=tmp_path / "w")
    (tmp_path / "para.title.txt").unlink()
    refused(lambda: texts.show_passages(run, store, [1]), "collection.tsv", "bring these back")


def test_a_head_line_and_nothing_else_may_come_beside_the_passages(tmp_path):
    write_dpr(tmp_path)
    reader = offsets.Recorded(dpr.corpus(tmp_path))
    passages = [*reader.passages()]
    assert reader.table(20)[0, 0] == len("id\ttext\ttitle\n")
    assert np.array_equal(reader.table(21)[0, 1:], reader.table(20)[0])
    for count in (19, 22):
        with pytest.raises(ValueError, match=f"lines for {count} passages"):
            reader.table(count)
    assert len(passages) == 20
