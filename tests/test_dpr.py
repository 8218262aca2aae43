"""DPR's files: what is read, and what is refused."""

import gzip
import json

import pytest

from rqv2_jax.data.collection import Left, Passage, Query, left_out
from rqv2_jax.data.readers.dpr import dpr
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


def test_without_a_dev_file_dev_is_held_out_and_said(tmp_path):
    items = [
        question(f"q{n}?", "1", **({"positive_ctxs": []} if n == 3 else {})) for n in range(21)
    ]
    changed = {"biencoder-nq-train.json": json.dumps(items), "biencoder-nq-dev.json": None}
    found = dpr(write(tmp_path, changed))
    assert found.splits == ("train", "dev", "test")
    held_out = ["train-10", "train-20"]
    asked = [f"train-{n}" for n in range(21) if n != 3]
    assert [query.id for query in found.queries("dev")] == held_out
    training = [query.id for query in found.queries("train")]
    assert training == [key for key in asked if key not in held_out]
    for split, ids in (("train", training), ("dev", held_out)):
        assert [label.query_id for label in found.qrels(split)] == ids
    assert len(list(found.queries("test"))) == 2
    assert list(found.qrels("test")) == []
    assert found.remarks[0].endswith("one in every 10 (2 of 20)")
    left = Left()
    left_out(found, left)
    assert left.lines() == [
        "1 queries have no positive or answer in any split; left out (first: train-3)"
    ]


def trained(**more):
    return json.dumps([question("fine", "1"), {**question("who?", "1"), **more}])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"psgs_w100.tsv": None}, "no psgs_w100.tsv or psgs_w100.tsv.gz"),
        ({"biencoder-nq-train.json": None}, "no biencoder-*-train.json or"),
        (
            {"biencoder-tq-dev.json": "[]"},
            "biencoder-nq-dev.json: stands beside biencoder-tq-dev.json",
        ),
        ({"psgs_w100.tsv": "1\ttext\n"}, "psgs_w100.tsv:1: 2 tab-separated columns instead of 3"),
        ({"psgs_w100.tsv": "1\ta\tb\n\n1\ta\tb\n"}, "psgs_w100.tsv:3: duplicate id '1'"),
        ({"psgs_w100.tsv": "1 2\ta\tb\n"}, "psgs_w100.tsv:1: id '1 2' has white space"),
        ({"psgs_w100.tsv": "\ta\tb\n"}, "psgs_w100.tsv:1: no id"),
        ({"biencoder-nq-train.json": trained()[:-3]}, "not JSON after question 0"),
        ({"biencoder-nq-train.json": "[1]"}, "question 0: no JSON object"),
        ({"biencoder-nq-train.json": trained(question=7)}, "question 1: `question` is 7"),
        ({"biencoder-nq-train.json": trained(answers="a")}, "question 1: `answers` is 'a'"),
        ({"biencoder-nq-train.json": '[{"question": "q"}]'}, "question 0: no `positive_ctxs`"),
        (
            {"biencoder-nq-train.json": trained(positive_ctxs={"a": 1})},
            "question 1: `positive_ctxs`",
        ),
        ({"biencoder-nq-train.json": trained(positive_ctxs=["a"])}, "question 1: `positive_ctxs`"),
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


def test_questions_that_train_or_measure_nothing_are_left_out_and_counted(tmp_path):
    """As the 18,000 of TriviaQA's training questions in which no passage holds the answer."""
    items = [
        question("first?", "1"),
        question("none?", "2", positive_ctxs=[]),
        question("null?", "2", positive_ctxs=None),
        question(" ", "2"),
        question("last?", "3"),
    ]
    test = "where?\t['Paris']\nwhy?\t['', ' ']\n\t['yes']\nwhen?\t[]\n"
    changed = {"biencoder-nq-train.json": json.dumps(items), "nq-test.qa.csv": test}
    found = dpr(write(tmp_path, changed))
    # Numbers are those of the file.
    assert [q.id for q in found.queries("train")] == ["train-0", "train-4"]
    assert [(q.query_id, q.passage_id) for q in found.qrels("train")] == [
        ("train-0", "1"),
        ("train-4", "3"),
    ]
    assert list(found.queries("test")) == [Query("test-0", "where?", ("Paris",))]
    left = Left()
    assert left_out(found, left) == {"train-3", "test-2"}
    assert left.lines() == [
        "2 queries have no text; left out (first: train-3)",
        "4 queries have no positive or answer in any split; left out (first: train-1)",
    ]


def test_training_questions_need_no_answers(tmp_path):
    items = [question("a", "1"), question("b", "2", answers=None)]
    del items[0]["answers"]
    found = dpr(write(tmp_path, {"biencoder-nq-train.json": json.dumps(items)}))
    assert [query.answers for query in found.queries("train")] == [(), ()]


def test_a_passage_may_be_longer_than_a_field_of_csv_and_have_a_title_alone(tmp_path):
    text = "word " * 2**16
    passages = f'1\t"{text}"\tlong\n2\t \tStone garden\n3\tthird\tC\n'
    found = list(dpr(write(tmp_path, {"psgs_w100.tsv": passages})).passages())
    assert found == [
        Passage("1", "long", text),
        Passage("2", "Stone garden", " "),
        Passage("3", "C", "third"),
    ]


def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no split 'eval'; it has train, dev, test"):
        dpr(write(tmp_path)).queries("eval")


def test_questions_are_streamed(tmp_path):
    """A file that ends in rubbish is read up to there."""
    many = json.dumps([question(f"q{n}", "1") for n in range(2000)])[:-1] + ", rubbish"
    queries = dpr(write(tmp_path, {"biencoder-nq-train.json": many})).queries("train")
    assert [next(queries).text for _ in range(1000)][-1] == "q999"
