"""MS MARCO's and RocketQA's tables: what is read, held out and refused."""

import gzip

import pytest

from rqv2_jax.data.collection import Left, Passage, Query, left_out
from rqv2_jax.data.readers import tables
from rqv2_jax.errors import InputError

QUERIES = 250
# Every tenth of those with a label.
HELD_OUT = [f"q{n}" for n in range(10, 250, 10)]


def write(folder, changed=(), *, names, suffix=""):
    """The files of a collection with 250 training queries, of which q3 has no label."""
    passages = [(f"{n}", f"passage number {n}") for n in range(40)]
    training = [f"q{n}\tquestion {n}" for n in range(QUERIES)]
    files = {
        "passages": [f"{key}\t{text}" for key, text in passages],
        "titles": [f"{key}\t{'' if key == '7' else f'title {key}'}" for key, _ in passages],
        "train queries": training,
        "train labels": [f"q{n}\t0\t{n % 40}\t1" for n in range(QUERIES) if n != 3],
        "test queries": ["t1\tfirst test", "t2\tsecond test", "t3\tunjudged"],
        "test labels": ["t1\t0\t5\t1", "t1\t0\t6\t1", "t2\t0\t7\t1", "t3\t0\t7\t0"],
        "answers": ["t1\tParis\tthe city", "t2\t1900"],
    } | dict(changed)
    for what, name in names.items():
        if files[what] is not None:
            data = "".join(f"{line}\n" for line in files[what]).encode()
            (folder / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    return folder


MSMARCO = {
    "passages": "collection.tsv",
    "titles": "para.title.txt",
    "train queries": "queries.train.tsv",
    "train labels": "qrels.train.tsv",
    "test queries": "queries.dev.small.tsv",
    "test labels": "qrels.dev.small.tsv",
}
MARCO = {
    **MSMARCO,
    "passages": "para.txt",
    "train queries": "train.query.txt",
    "test queries": "dev.query.txt",
    "test labels": "qrels.dev.tsv",
}
NQ = {
    **MARCO,
    "test queries": "test.query.txt",
    "answers": "test.answers.txt",
}
del NQ["test labels"]


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzipped"])
@pytest.mark.parametrize(
    ("reader", "names"),
    [(tables.msmarco, MSMARCO), (tables.rocketqa, MARCO), (tables.rocketqa, NQ)],
    ids=["MS MARCO", "RocketQA marco", "RocketQA nq"],
)
def test_everything_is_read(tmp_path, reader, names, suffix):
    found = reader(str(write(tmp_path, names=names, suffix=suffix)))
    passages = list(found.passages())
    assert passages[5] == Passage("5", "title 5", "passage number 5")
    assert passages[7] == Passage("7", "", "passage number 7")
    assert len(passages) == 40
    assert found.splits == ("train", "dev", "test")
    assert [query.id for query in found.queries("dev")] == HELD_OUT
    training = {query.id for query in found.queries("train")}
    assert training == {f"q{n}" for n in range(QUERIES)} - {*HELD_OUT, "q3"}
    for split, ids in (("train", training), ("dev", set(HELD_OUT))):
        assert {label.query_id for label in found.qrels(split)} == ids
    if "answers" in names:
        assert found.answer_splits == ("test",)
        assert list(found.queries("test")) == [
            Query("t1", "first test", ("Paris", "the city")),
            Query("t2", "second test", ("1900",)),
        ]
        assert list(found.qrels("test")) == []
    else:
        assert found.answer_splits == ()
        assert [query.id for query in found.queries("test")] == ["t1", "t2"]
        labels = [(q.query_id, q.passage_id, q.relevance) for q in found.qrels("test")]
        assert labels == [("t1", "5", 1), ("t1", "6", 1), ("t2", "7", 1), ("t3", "7", 0)]


def test_titles_may_be_absent(tmp_path):
    found = tables.msmarco(str(write(tmp_path, {"titles": None}, names=MSMARCO)))
    assert {passage.title for passage in found.passages()} == {""}


def test_the_fingerprint_follows_every_file(tmp_path):
    before = tables.rocketqa(str(write(tmp_path, names=NQ))).fingerprint
    for what in NQ:
        text = (tmp_path / NQ[what]).read_text()
        (tmp_path / NQ[what]).write_text(text + "\n")
        assert tables.rocketqa(str(tmp_path)).fingerprint != before
        (tmp_path / NQ[what]).write_text(text)
    assert tables.rocketqa(str(tmp_path)).fingerprint == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"passages": None}, "no collection.tsv or collection.tsv.gz"),
        ({"passages": ["0\ta", "2"]}, "collection.tsv:2: 1 tab-separated columns instead of 2"),
        ({"passages": ["1\ta\tb"]}, "collection.tsv:1: 3 tab-separated columns instead of 2"),
        ({"passages": ["1\ta", "1\tb"], "titles": None}, "collection.tsv:2: duplicate id '1'"),
        ({"passages": ["a b\tt"], "titles": None}, "collection.tsv:1: id 'a b' has white space"),
        ({"passages": ["\ttext"]}, "collection.tsv:1: no id"),
        ({"titles": ["0\ta", "2\tb"]}, "para.title.txt:2: title of '2', but "),
        ({"titles": ["0\ta"]}, "para.title.txt: ends before "),
        (
            {"passages": ["0\ta"], "titles": ["0\ta", "1\tb"]},
            "para.title.txt:2: title of a passage",
        ),
        ({"train queries": ["q1\ta", "q1\tb"]}, "queries.train.tsv:2: duplicate id 'q1'"),
        ({"train labels": ["q1 0 1 1 1"]}, "qrels.train.tsv:1: 5 columns"),
        ({"train labels": ["q1 0 1 x"]}, "qrels.train.tsv:1: relevance 'x' is no integer"),
        (
            {"train labels": ["q1 0 1 3000000000"]},
            "qrels.train.tsv:1: relevance 3000000000 is beyond",
        ),
    ],
)
def test_bad_files_are_one_line_with_the_place(tmp_path, changed, message):
    def read():
        found = tables.msmarco(str(write(tmp_path, changed, names=MSMARCO)))
        return [*found.passages(), *found.queries("train"), *found.qrels("train")]

    with pytest.raises(InputError) as raised:
        read()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_queries_without_an_answer_are_left_out_and_counted(tmp_path):
    folder = write(tmp_path, {"answers": ["t1\tParis", "t2\t "]}, names=NQ)
    found, left = tables.rocketqa(str(folder)), Left()
    assert [query.id for query in found.queries("test")] == ["t1"]
    assert not left_out(found, left)
    # q3 and t3 have no label either.
    assert left.lines() == [
        "3 queries have no positive or answer in any split; left out (first: q3)"
    ]


@pytest.mark.parametrize(("reader", "names"), [(tables.msmarco, MSMARCO), (tables.rocketqa, MARCO)])
def test_empty_rows_are_kept_of_passages_and_left_out_of_queries(tmp_path, reader, names):
    changed = {
        "passages": ["0\tfirst", "1\t ", "2\t"],
        "titles": ["0\t", "1\tStone garden", "2\t"],
        "train queries": ["a\tquestion", "b\t", "c\t ", "d\tanother"],
        "train labels": ["a\t0\t0\t1", "b\t0\t0\t1", "d\t0\t0\t1"],
    }
    found, left = reader(str(write(tmp_path, changed, names=names))), Left()
    assert list(found.passages()) == [
        Passage("0", "", "first"),
        Passage("1", "Stone garden", ""),
        Passage("2", "", ""),
    ]
    assert list(found.queries("train")) == [Query("a", "question", ())]
    assert list(found.queries("dev")) == [Query("d", "another", ())]
    assert left_out(found, left) == {"b", "c"}
    assert left.lines()[0] == "2 queries have no text; left out (first: b)"


def test_what_is_held_out_is_said(tmp_path):
    found = tables.msmarco(str(write(tmp_path, names=MSMARCO)))
    (remark,) = found.remarks
    assert remark.startswith("dev is held out from the training queries")
    assert remark.endswith("one in every 10 (24 of 249)")


def test_a_split_that_is_not_there(tmp_path):
    found = tables.rocketqa(str(write(tmp_path, names=NQ)))
    with pytest.raises(InputError, match="no split 'eval'; it has train, dev, test"):
        found.queries("eval")
