"""DPR's files: what is read, and what is refused."""

import gzip
import json

import pytest

from rqv2_jax.data.collection import Passage, Query
from rqv2_jax.data.dpr import dpr
from rqv2_jax.errors import InputError


def question(text, passage, **more):
    positives = [{"title": "T", "text": "x", "passage_id": passage}, {"passage_id": "3"}]
    return {
        "question": text,
        "answers": ["a"],
        "positive_ctxs": positives,
        "negative_ctxs": [],
        **more,
    }


def write(folder, changed=(), *, suffix=""):
    files = {
        "psgs_w100.tsv": 'id\ttext\ttitle\n1\t"He said ""no"" twice"\tA title\n'
        '2\tplain\t"Q, R"\n3\tthird\tC\n',
        "biencoder-nq-train.json": json.dumps(
            [question("who?", "2"), question("what?", 1)], indent=1
        ),
        "biencoder-nq-dev.json": json.dumps([question("when?", "3")]),
        "nq-test.qa.csv": 'where?\t[\'Paris\', "the \'city\'"]\n"is it ""so""?"\t[\'yes\']\n',
    } | dict(changed)
    for name, text in files.items():
        if text is not None:
            data = text.encode()
            (folder / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)
    return str(folder)


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzipped"])
def test_everything_is_read(tmp_path, suffix):
    found = dpr(write(tmp_path, suffix=suffix))
    assert list(found.passages()) == [
        Passage("1", "A title", 'He said "no" twice'),
        Passage("2", "Q, R", "plain"),
        Passage("3", "C", "third"),
    ]
    assert found.splits == ("train", "dev", "test")
    assert found.answer_splits == ("test",)
    assert list(found.queries("train")) == [
        Query("train-0", "who?", ("a",)),
        Query("train-1", "what?", ("a",)),
    ]
    assert [query.id for query in found.queries("dev")] == ["dev-0"]
    assert list(found.queries("test")) == [
        Query("test-0", "where?", ("Paris", "the 'city'")),
        Query("test-1", 'is it "so"?', ("yes",)),
    ]
    labels = [(q.query_id, q.passage_id, q.relevance) for q in found.qrels("train")]
    assert labels == [("train-0", "2", 1), ("train-1", "1", 1)]
    assert list(found.qrels("test")) == []


def test_other_questions_name_their_passages_otherwise(tmp_path):
    items = [{"question": "q", "answers": [], "positive_ctxs": [{"psg_id": "7"}]}]
    found = dpr(write(tmp_path, {"biencoder-nq-train.json": json.dumps(items)}))
    assert [label.passage_id for label in found.qrels("train")] == ["7"]


def trained(**more):
    return json.dumps([question("fine", "1"), {**question("who?", "1"), **more}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"psgs_w100.tsv": None}, "no psgs_w100.tsv or psgs_w100.tsv.gz"),
        ({"biencoder-nq-dev.json": None}, "no biencoder-*-dev.json or"),
        (
            {"biencoder-tq-dev.json": "[]"},
            "biencoder-nq-dev.json: stands beside biencoder-tq-dev.json",
        ),
        ({"psgs_w100.tsv": "1\ttext\n"}, "psgs_w100.tsv:1: 2 tab-separated columns instead of 3"),
        ({"psgs_w100.tsv": "1\ta\tb\n\n1\ta\tb\n"}, "psgs_w100.tsv:3: duplicate id '1'"),
        ({"psgs_w100.tsv": "1 2\ta\tb\n"}, "psgs_w100.tsv:1: id '1 2' has white space"),
        ({"psgs_w100.tsv": "1\t \tb\n"}, "psgs_w100.tsv:1: empty passage"),
        ({"psgs_w100.tsv": "\ta\tb\n"}, "psgs_w100.tsv:1: no id"),
        (
            {"psgs_w100.tsv": f"1\t{'a' * 2**17}b\tc\n"},
            "psgs_w100.tsv:1: cannot be read (field larger",
        ),
        ({"biencoder-nq-train.json": trained()[:-3]}, "not JSON after question 0"),
        ({"biencoder-nq-train.json": "[1]"}, "question 0: no JSON object"),
        ({"biencoder-nq-train.json": trained(question=" ")}, "question 1: `question` is ' '"),
        ({"biencoder-nq-train.json": trained(answers="a")}, "question 1: `answers` is no list"),
        ({"biencoder-nq-train.json": trained(positive_ctxs=[])}, "question 1: no `positive_ctxs`"),
        (
            {"biencoder-nq-train.json": trained(positive_ctxs=[{}])},
            "question 1: its positive has no",
        ),
        ({"nq-test.qa.csv": "who?\n"}, "nq-test.qa.csv:1: 1 tab-separated columns instead of 2"),
        ({"nq-test.qa.csv": "who?\t['a'\n"}, "nq-test.qa.csv:1: needs a question and a list"),
        ({"nq-test.qa.csv": "who?\tprint(1)\n"}, "nq-test.qa.csv:1: needs a question and a list"),
        (
            {"nq-test.qa.csv": f"who?\t{'-' * 10**5}1\n"},
            "nq-test.qa.csv:1: needs a question and a list",
        ),
        ({"nq-test.qa.csv": "who?\t['', ' ']\n"}, "nq-test.qa.csv:1: needs a question and a list"),
    ],
)
def test_bad_files_are_one_line_with_the_place(tmp_path, changed, message):
    def read():
        found = dpr(write(tmp_path, changed))
        return [*found.passages(), *found.queries("train"), *found.queries("test")]

    with pytest.raises(InputError) as raised:
        read()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no split 'eval'; it has train, dev, test"):
        dpr(write(tmp_path)).queries("eval")


def test_questions_are_streamed(tmp_path):
    """A file that ends in rubbish is read up to there."""
    many = json.dumps([question(f"q{n}", "1") for n in range(2000)])[:-1] + ", rubbish"
    queries = dpr(write(tmp_path, {"biencoder-nq-train.json": many})).queries("train")
    assert [next(queries).text for _ in range(1000)][-1] == "q999"
