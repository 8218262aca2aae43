"""From a file of questions with their answers to a folder in BEIR layout."""

import csv
import errno
import gzip
import json
import os
import pathlib
import random
import shlex
import string
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from tiny_run import ROOT, run_program

from rqv2_jax import disk
from rqv2_jax.data import pairs
from rqv2_jax.data.readers import beir
from rqv2_jax.data.readers.records import records
from rqv2_jax.errors import InputError
from rqv2_jax.tools import conversion

COLUMNS = conversion.Columns("question", "answer")
TITLED = conversion.Columns("question", "answer", "title")
SHARES = (0.8, 0.1, 0.1)


def write_csv(file, rows, header=("question", "answer"), **how):
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, **how).writerows([header, *rows])
    return file


def converted(file, columns=COLUMNS, corpus=None, shares=SHARES, seed=0):
    return conversion.convert(file, corpus, columns, shares, seed)


def read(folder):
    """{split: {(question, title, passage)}}, and all passages, by the package's own reader."""
    texts = beir.beir(folder, train_qrels="qrels", eval_qrels="qrels")
    assert not texts.remarks
    passages = {p.id: (p.title, p.text) for p in texts.passages()}
    triples = {}
    for split in texts.splits:
        asked = {query.id: query.text for query in texts.queries(split)}
        labels = list(texts.qrels(split))
        assert {label.query_id for label in labels} == set(asked)
        triples[split] = {(asked[each.query_id], *passages[each.passage_id]) for each in labels}
    return triples, set(passages.values())


def of_parts(made):
    """{question: split} and {(question, passage): split}."""
    queries, passages, labels = made.found
    split = [pairs.SPLITS[number] for number in made.parts.split_Q]
    return (
        {query.text: split[row] for row, query in enumerate(queries)},
        {(queries[q].text, passages[p].text): split[q] for q, p in labels},
    )


QUOTED = [(f"question {i}", f'answer, "{i % 7}"\nnext line', f"title {i % 7}") for i in range(50)]


def test_the_readers_find_what_the_file_holds(tmp_path):
    header = ("question", "answer", "title")
    made = converted(write_csv(tmp_path / "a.csv", [*QUOTED, QUOTED[0]], header), TITLED)
    conversion.write(made, tmp_path / "folder")
    triples, passages = read(tmp_path / "folder")
    assert set.union(*triples.values()) == {(q, title, text) for q, text, title in QUOTED}
    assert sum(map(len, triples.values())) == len(QUOTED)
    assert passages == {(title, text) for _, text, title in QUOTED}
    assert "        1  left out: the question and the passage of an earlier row" in made.counts[-1]


def written(folder, name, rows):
    """The rows in a file of the format that `name` tells."""
    file = folder / name
    objects = [{"other": 1, "question": q, "answer": a} for q, a in rows]
    lines = "".join(json.dumps(each) + "\n" for each in objects)
    if ".parquet" in name:
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(objects), file)
    elif ".json" in name or ".ndjson" in name:
        file.write_bytes(gzip.compress(lines.encode()) if ".gz" in name else lines.encode())
    else:
        how = {"delimiter": "\t" if ".tsv" in name.lower() else ";" if "excel" in name else ","}
        write_csv(file, [(1, *row) for row in rows], ("other", "question", "answer"), **how)
        if "excel" in name:
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        if ".gz" in name:
            file.write_bytes(gzip.compress(file.read_bytes()))
    return file


@pytest.mark.parametrize(
    "name",
    [
        "a.csv",
        "a.csv.gz",
        "excel.csv",
        "a.tsv",
        "A.TSV",
        "a.jsonl",
        "a.ndjson.gz",
        "a.json",
        "a.parquet",
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = [('wer, "wo"; wann?', "é\r\nnext\tline"), ("二?", "x" * 300_000), ("'", "  b ")]
    found = list(records(written(tmp_path, name, rows), ["question", "answer"]))
    assert [record.values for record in found] == [(q, a.strip()) for q, a in rows]
    assert len({record.place for record in found}) == len(rows)


def test_what_json_says_otherwise_is_text_too(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"question": 7, "answer": null}\n\n{"answer": NaN}\n{"question": 1.5, "answer": ""}\n'
    )
    found = list(records(file, ["question", "answer"]))
    assert [record.values for record in found] == [("7", ""), ("", ""), ("1.5", "")]
    assert [record.place for record in found] == [f"{file}:{n}" for n in (1, 3, 4)]


HEAD = b"question,answer\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEAD + b'a,"b\nc"\nd,e,f\n', "a.csv:4: 3 columns, but the header has 2"),
        ("a.csv", HEAD + b"a\n", "a.csv:2: 1 columns, but the header has 2"),
        ("a.csv", HEAD + b'a,b\nc,"d\ne,f\n', "a.csv:3: the row that begins here"),
        ("a.csv", HEAD + b'a,"b"c\n', "a.csv:2: the row that begins here"),
        ("a.csv", HEAD + b'a,"' + b"x" * (2**24 + 1), "a.csv:2: the row that begins here"),
        ("a.csv", HEAD + b"a,b\nc,d\0\n", "a.csv:3: holds a NUL byte"),
        ("a.csv", "question,answer\n".encode("utf-16"), "a.csv:1: not UTF-8"),
        ("a.csv", "question,answer\n".encode("utf-16-le"), "a.csv:1: holds a NUL byte"),
        ("a.csv", HEAD + "é,b\n".encode("latin-1"), "a.csv:2: not UTF-8"),
        ("a.csv", b"q,answer\na,b\n", "a.csv: no column 'question'; it has 'q', 'answer'"),
        ("a.csv", b"question,answer,answer\n", "a.csv: 2 columns are named 'answer'"),
        ("a.csv", b"", "a.csv: is empty"),
        ("a.csv.gz", gzip.compress(HEAD * 99)[:-9], "cannot be read on"),
        (
            "a.jsonl",
            b'{"question": "a", "answer": ["b"]}',
            "a.jsonl:1: column 'answer' holds ['b']",
        ),
        (
            "a.jsonl",
            b'{"question": "a", "answer": "\\u0000"}',
            "a.jsonl:1: column 'answer' holds a NUL",
        ),
        ("a.jsonl", b'{"question": "a", "answer": "\\ud800"}', "a.jsonl:1: holds half a character"),
        ("a.jsonl", b'{"q": "a", "answer": "b"}', "no column 'question'; it has 'q', 'answer'"),
        ("a.jsonl", b'{"question": "a"\n', "a.jsonl:1: not JSON"),
        ("a.jsonl", b"3\n", "a.jsonl:1: no JSON object"),
        ("a.jsonl", b"\n", "a.jsonl: is empty"),
        ("a.json", b'[{"question": "a"}]', "a.json:1: an array; write one object per line"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read"),
        ("a.parquet.gz", b"", "the end of its name tells no format"),
        ("a.xlsx", b"", "a.xlsx: the end of its name tells no format"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(lambda: list(records(tmp_path / name, ["question", "answer"])), message)


def test_a_parquet_file_without_the_column_says_what_it_has(tmp_path):
    file = written(tmp_path, "a.parquet", [("a", "b")])
    refused(
        lambda: list(records(file, ["q"])), "no column 'q'; it has 'other', 'question', 'answer'"
    )


def test_without_pyarrow_a_line_says_what_to_install(tmp_path, monkeypatch):
    file = written(tmp_path, "a.parquet", [("a", "b")])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(lambda: list(records(file, ["question"])), "pyarrow.parquet", "pip install")


def test_blank_lines_are_no_rows_and_places_are_those_of_the_file(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'question,answer\r\n\r\na,"b\r\n\r\nc"\r\n  \r\nd,e\r\n,\r\n')
    found = [
        (record.place.rpartition(":")[2], record.values) for record in records(file, ["answer"])
    ]
    assert found == [("3", ("b\r\n\r\nc",)), ("7", ("e",)), ("8", ("",))]


def test_equal_texts_become_one_and_counts_say_what_became_of_each_row(tmp_path):
    rows = [(f"q{i}?", f"a{i}") for i in range(20)]
    messy = [("", "x"), ("y", " "), ("q0?", "a0"), ("Q0?  ", "A0"), ("q1?", "a2"), ("q 1?", "a1")]
    made = converted(write_csv(tmp_path / "a.csv", rows + messy))
    assert [
        line.split("  (")[0].split(" (")[0].split("  ", 1)[-1].strip() for line in made.counts
    ] == [
        "26  rows read",
        "1  left out: no text in 'question'",
        "1  left out: no text in 'answer'",
        "2  left out: the question and the passage of an earlier row",
        "2  merged: the passage of an earlier row, with another question",
        "1  merged: questions with several passages, all relevant",
    ]
    assert f"(first: {tmp_path / 'a.csv'}:22)" in made.counts[1]
    queries, passages, labels = made.found
    assert [query.text for query in queries] == [*(q for q, _ in rows), "q 1?"]
    assert [passage.text for passage in passages] == [a for _, a in rows]
    assert len(set(labels)) == len(labels) == 22
    told = conversion.render(made)
    assert "all                  21         20         22" in told
    assert "\n19 groups of questions" in told
    assert "most questions of one passage: 2 of p1, 'a1'" in told


def test_passages_of_the_corpus_have_no_question_and_come_once(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(f"q{i}", f"a{i}") for i in range(5)])
    corpus = write_csv(
        tmp_path / "b.csv", [("a1", 1), ("z", 2), ("", 3), ("Z", 4)], ("answer", "n")
    )
    made = converted(file, corpus=corpus)
    conversion.write(made, tmp_path / "folder")
    triples, passages = read(tmp_path / "folder")
    assert passages == {("", text) for text in ("a0", "a1", "a2", "a3", "a4", "z")}
    assert sum(map(len, triples.values())) == 5
    assert "no question           0          1          0" in conversion.render(made)
    assert [line.split(" (first")[0].strip() for line in made.counts[1:]] == [
        "4  rows of --corpus read",
        "2  left out of --corpus: the passage of an earlier row",
        "1  left out of --corpus: no text in 'answer'",
    ]


def test_given_ids_are_kept_and_must_name_one_text(tmp_path):
    header = ("question", "answer", "qid", "pid")
    columns = conversion.Columns("question", "answer", None, "qid", "pid")
    rows = [(f"q{i}", f"a{i}", f"Q{i}", f"P{i}") for i in range(4)]
    made = converted(
        write_csv(tmp_path / "a.csv", [*rows, ("q0", "a1", "Q0", "P9")], header), columns
    )
    assert [query.id for query in made.found.queries] == ["Q0", "Q1", "Q2", "Q3"]
    assert [passage.id for passage in made.found.passages] == ["P0", "P1", "P2", "P3"]
    assert "1  ids not used: the passage has another one already" in "".join(made.counts)
    for row, message in [
        (("new", "a1", "Q0", "P1"), "a.csv:6: id 'Q0' is that of another query at"),
        (("q0", "new", "Q0", "P1"), "a.csv:6: id 'P1' is that of another passage at"),
        (("q0", "a1", "", "P1"), "a.csv:6: the query has no id"),
        (("q0", "a1", "Q0", "P 1"), "a.csv:6: id 'P 1' has white space"),
    ]:
        file = write_csv(tmp_path / "a.csv", [*rows, row], header)
        refused(lambda file=file: converted(file, columns), message)


@pytest.mark.parametrize(
    ("rows", "count"), [([], 0), ([("a", "b")], 1), ([(f"q{i}", "a") for i in range(9)], 1)]
)
def test_too_few_rows_to_split_are_refused(tmp_path, rows, count):
    file = write_csv(tmp_path / "a.csv", rows)
    refused(lambda: converted(file), file, f"questions with a passage: {len(rows)}", f": {count};")


def test_shares_are_kept_where_groups_are_small(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(f"q{i}", f"a{i // 3}") for i in range(300)])
    found = list(of_parts(converted(file, shares=conversion.shares_of("70/10/20")))[0].values())
    assert [found.count(split) for split in pairs.SPLITS] == [210, 30, 60]


def test_large_groups_are_no_likelier_to_be_test_than_small_ones(tmp_path):
    """Half of the questions is in groups of one, the other half in groups of fifteen."""
    rows = [(f"q{i}", f"a{i // 15}") for i in range(150, 300)]
    rows += [(f"q{i}", f"single {i}") for i in range(150)]
    file, singles = write_csv(tmp_path / "a.csv", rows), 0
    for seed in range(20):
        found, _ = of_parts(converted(file, shares=(0.4, 0.3, 0.3), seed=seed))
        singles += sum(found[f"q{i}"] == "test" for i in range(150))
    # 900, with a deviation of 90, and some more: small groups fill what large ones leave.
    assert 600 <= singles <= 1200


@pytest.mark.parametrize("text", ["80/20", "80/10/0", "a/b/c", "1/-1/1", "1/2/inf", "1/2/nan", ""])
def test_wrong_shares_are_refused(text):
    refused(lambda: conversion.shares_of(text), "--splits", "three numbers above 0")


WORDED = st.text("ab?! ", min_size=1, max_size=3)
ROWS = st.lists(st.tuples(WORDED, st.text("cd", max_size=3), st.sampled_from("xyX")), max_size=40)


def in_several(parts):
    """What is in more than one of the sets."""
    return {each for n, part in enumerate(parts) for other in parts[:n] for each in part & other}


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_text_is_in_two_splits_and_every_row_has_its_label_in_one(rows, seed, rng):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        extra = [(f"extra {letter}", letter, "") for letter in string.ascii_uppercase[4:10]]
        rows = rows + extra
        header = ("question", "answer", "title")
        made = converted(write_csv(folder / "a.csv", rows, header), TITLED, seed=seed)
        conversion.write(made, folder / "made")
        triples, _ = read(folder / "made")
        assert all(triples.values())
        for part in (lambda t: pairs.wording(t[0]), lambda t: pairs.wording(t[2])):
            assert not in_several([set(map(part, triples[split])) for split in pairs.SPLITS])

        def equal(*texts):
            return tuple(" ".join(text.split()).casefold() for text in texts)

        kept = {equal(q, t, a) for q, a, t in rows if q.strip() and a.strip()}
        labelled = [equal(*triple) for split in pairs.SPLITS for triple in triples[split]]
        assert sorted(labelled) == sorted(kept)

        # Another order of the rows gives every question the same split.
        splits = {equal(text): split for text, split in of_parts(made)[0].items()}
        rng.shuffle(rows)
        again = converted(write_csv(folder / "b.csv", rows, header), TITLED, seed=seed)
        assert {equal(text): split for text, split in of_parts(again)[0].items()} == splits


@pytest.mark.parametrize(
    "rows",
    [
        [("What is it?", "same"), ("Why?", " SAME!")],
        [("what is it", "one"), ("What  is it?!", "two")],
        [("a", "1"), ("b", "1"), ("b", "2"), ("c", "2"), ("C.", "3"), ("d", "3")],
        [("caf\u00e9", "1"), ("cafe\u0301", "2")],
    ],
)
def test_what_shares_a_passage_or_a_wording_is_on_one_side(tmp_path, rows):
    others = [(f"q{i}", f"a{i}") for i in range(12)]
    file = write_csv(tmp_path / "a.csv", rows + others)
    seen = set()
    for seed in range(30):
        found, _ = of_parts(converted(file, shares=(0.4, 0.3, 0.3), seed=seed))
        (split,) = {found[question] for question, _ in rows}
        seen.add(split)
    assert len(seen) > 1


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_split(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(f"q{i}", f"a{i // 2}") for i in range(100)])
    contents = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        conversion.write(converted(file, seed=seed), tmp_path / name)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append({path.relative_to(tmp_path / name): path.read_bytes() for path in paths})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5
    assert contents[0] != contents[2]


def test_a_folder_appears_when_it_is_complete_and_not_at_all_after_a_failure(tmp_path):
    with disk.new_folder(tmp_path / "inner" / "new") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "inner" / "new").exists()
    assert (tmp_path / "inner" / "new" / "file").read_text() == "x"

    def fail(error):
        with disk.new_folder(tmp_path / "other") as partial:
            (partial / "file").write_text("x")
            raise error

    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), ValueError()):
        with pytest.raises(type(error)):
            fail(error)
    refused(lambda: fail(OSError(errno.EACCES, "no")), tmp_path / "other", "cannot be written")
    assert os.listdir(tmp_path) == ["inner"]


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, what in (("full", "not empty"), ("full/mine", "no folder")):
        with pytest.raises(InputError, match=what), disk.new_folder(tmp_path / name):
            pass
    with disk.new_folder(tmp_path / "empty") as partial:
        (partial / "file").write_text("y")
    assert (tmp_path / "empty" / "file").read_text() == "y"


def test_a_folder_that_another_process_has_filled_meanwhile_is_left_as_it_is(tmp_path):
    def fill():
        with disk.new_folder(tmp_path / "late"):
            (tmp_path / "late").mkdir()
            (tmp_path / "late" / "theirs").touch()

    refused(fill, tmp_path / "late", "cannot be written")
    assert os.listdir(tmp_path / "late") == ["theirs"]
    assert os.listdir(tmp_path) == ["late"]


def test_the_command_prints_commands_to_copy(tmp_path):
    file = write_csv(tmp_path / "it's.csv", [(f"what's {i}?", f"a{i}") for i in range(30)])
    folder = tmp_path / "a folder"
    flags = [f"--from={file}", "--query=question", "--passage=answer", f"--to={folder}"]
    ended = run_program("rqv2_jax.convert", *flags)
    assert ended.returncode == 0, ended.stderr
    read(folder)
    lines = ended.stdout.splitlines()
    check, train, search = map(shlex.split, lines[lines.index("what to run next:") + 1 :])
    data = f"--config.data.path={folder}"
    assert check[1:] == ["-m", "rqv2_jax.check", "--config", "configs/beir.py", data]
    assert train[1:5] == ["-m", "rqv2_jax.main", "--config", "configs/beir.py"]
    assert train[5:] == ["--workdir", "workdir/a folder", data]
    assert search[1:5] == ["-m", "rqv2_jax.search", "--workdir", "workdir/a folder"]
    test = (folder / "qrels" / "test.tsv").read_text()
    queries = map(json.loads, (folder / "queries.jsonl").read_text().splitlines())
    assert search[5] in [query["text"] for query in queries if f"{query['_id']}\t" in test]
    ended = run_program("rqv2_jax.convert", *flags)
    assert ended.returncode == 1
    assert (
        ended.stderr
        == f"error: {folder}: is a folder that is not empty; name a new one or empty it\n"
    )


def test_a_conversion_needs_neither_jax_nor_tensorflow(tmp_path):
    file = write_csv(tmp_path / "a.csv", [(f"q{i}", f"a{i}") for i in range(9)])
    code = (
        "import sys\nfor name in ('jax', 'jaxlib', 'flax', 'tensorflow'): sys.modules[name] = None\n"
        "sys.argv[1:] = {!r}\nimport runpy\nrunpy.run_module('rqv2_jax.convert', run_name='__main__')\n"
    )
    flags = [f"--from={file}", "--query=question", "--passage=answer", f"--to={tmp_path / 'to'}"]
    # Already set, so that the process does not start anew without the above.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    command = [sys.executable, "-c", code.format(flags)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "what to run next:" in ended.stdout


def test_an_example_question_is_one_that_a_shell_and_a_command_take(tmp_path):
    odd = ["-x", "two\nlines", "y" * 99]
    rows = [(f"{odd[i % 3]}{i}", f"a{i}") for i in range(30)]
    random.Random(0).shuffle(rows)
    told = conversion.next_steps(converted(write_csv(tmp_path / "a.csv", rows)), pathlib.Path("to"))
    assert told.endswith("--workdir workdir/to 'a question'")
