"""Tevatron's JSON lines: what is read, held out and refused."""

import gzip
import json

import pytest

from rqv2_jax.data.collection import Left, Passage, Query, check_qrels, left_out
from rqv2_jax.data.readers.tevatron import tevatron
from rqv2_jax.errors import InputError


def line(key, positives=(), **more):
    """As on the hub: positives with title and text, ten negatives."""
    passages = [{"docid": p, "title": "-", "text": f"passage {p}"} for p in positives]
    negatives = [{"docid": f"{n}", "title": "-", "text": f"passage {n}"} for n in range(10)]
    value = {"query_id": key, "query": f"question {key}", "positive_passages": passages}
    return json.dumps({**value, "negative_passages": negatives, **more}, ensure_ascii=False)


def newer(key, positives=(), **more):
    """As Tevatron's own scripts write version 2 of a dataset."""
    value = {"query_id": key, "query_text": f"question {key}", "query_image": None}
    value |= {"positive_document_ids": positives, "negative_document_ids": ["8"]}
    return json.dumps({**value, "answer": None, "source": "msmarco", **more})


def write(folder, changed=(), *, suffix="", prefix=""):
    files = {
        "corpus.jsonl": [
            '{"docid": "0", "title": "Zero", "text": "the first"}',
            '{"docid": "1", "title": "", "text": "the second, é"}',
            *(f'{{"docid": "{n}", "text": "number {n}"}}' for n in range(2, 10)),
        ],
        "train.jsonl": [line("a", ["1", "0", "1"]), line("b"), line("c", ["2"], answers=["x"])],
        "dev.jsonl": [line("d", ["3"])],
        "test.jsonl": [line("e", ["4", "5"]), line("f")],
    } | dict(changed)
    for name, rows in files.items():
        if rows is not None:
            data = "".join(f"{row}\n" for row in rows).encode()
            jsonl = name.endswith(".jsonl") and name != "corpus.jsonl"
            file = folder / f"{prefix if jsonl else ''}{name}{suffix}"
            file.write_bytes(gzip.compress(data) if suffix else data)
    return folder


def labels(found, split):
    return [(q.query_id, q.passage_id, q.relevance) for q in found.qrels(split)]


def test_version_2_is_read(tmp_path):
    changed = {
        "corpus.jsonl": [
            '{"docid": "0", "text": "the first", "image": null, "source": "msmarco"}',
            '{"docid": "1", "text": null, "image": {"path": "a.png"}, "source": "colpali"}',
            '{"docid": "2", "image": {"path": "b.png"}}',
        ],
        "train.jsonl": [
            newer("a", ["1", "0", "1"]),
            newer("b", []),
            newer("c", ["0"], query_text=None, query_image={"path": "b.png"}),
            newer("d", ["0"], answer="x"),
        ],
        "dev.jsonl": [newer("e", ["0"], answer=["x", "y"])],
        "test.jsonl": [newer("f", [], answer="Paris"), newer("g", [])],
    }
    found = tevatron(write(tmp_path, changed))
    empty = [Passage("1", "", ""), Passage("2", "", "")]
    assert list(found.passages()) == [Passage("0", "", "the first"), *empty]
    assert list(found.queries("train")) == [
        Query("a", "question a", ()),
        Query("d", "question d", ("x",)),
    ]
    left = Left()
    assert left_out(found, left) == {"c"}
    assert left.lines()[1] == (
        "2 queries have no positive or answer in any split; left out (first: b)"
    )
    rows = check_qrels(found.qrels("train"), {"a": 0, "c": -1, "d": 1}, {"0": 0, "1": 1}, left)
    assert [row.tolist() for row in rows] == [[0, 0, 1], [1, 0, 0], [1, 1, 1]]
    assert [query.answers for query in found.queries("dev")] == [("x", "y")]
    assert found.answer_splits == ("test",)
    assert list(found.queries("test")) == [Query("f", "question f", ("Paris",))]


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzipped"])
@pytest.mark.parametrize("prefix", ["", "nq-"], ids=["msmarco's names", "nq's names"])
def test_everything_is_read(tmp_path, suffix, prefix):
    found = tevatron(write(tmp_path, suffix=suffix, prefix=prefix))
    passages = list(found.passages())
    assert passages[:3] == [
        Passage("0", "Zero", "the first"),
        Passage("1", "", "the second, é"),
        Passage("2", "", "number 2"),
    ]
    assert len(passages) == 10
    assert (found.splits, found.answer_splits) == (("train", "dev", "test"), ())
    assert list(found.queries("train")) == [
        Query("a", "question a", ()),
        Query("c", "question c", ("x",)),
    ]
    assert [query.id for query in found.queries("dev")] == ["d"]
    assert [query.id for query in found.queries("test")] == ["e"]
    assert labels(found, "train") == [("a", "1", 1), ("a", "0", 1), ("c", "2", 1)]
    assert labels(found, "dev") == [("d", "3", 1)]
    assert labels(found, "test") == [("e", "4", 1), ("e", "5", 1)]


def test_msmarco_as_published(tmp_path):
    """Dev has queries alone, there is no test, and the labels are MS MARCO's."""
    changed = {
        "train.jsonl": [line(f"t{n}", [str(n % 10)]) for n in range(250)],
        "dev.jsonl": [line("x", title="-"), line("y"), line("z")],
        "test.jsonl": None,
        "qrels.dev.tsv": ["x\t0\t3\t1", "z\t0\t1\t1", "z\t0\t2\t0"],
    }
    found = tevatron(write(tmp_path, changed))
    assert [query.id for query in found.queries("test")] == ["x", "z"]
    assert labels(found, "test") == [("x", "3", 1), ("z", "1", 1), ("z", "2", 0)]
    held_out = [f"t{n}" for n in range(9, 250, 10)]
    assert [query.id for query in found.queries("dev")] == held_out
    assert found.remarks[0] == "test is dev"
    assert found.remarks[1].endswith("one in every 10 (25 of 250)")
    assert labels(found, "dev") == [(key, "9", 1) for key in held_out]
    training = [query.id for query in found.queries("train")]
    assert training == [f"t{n}" for n in range(250) if f"t{n}" not in held_out]
    assert [query for query, _, _ in labels(found, "train")] == training


@pytest.mark.parametrize("dev", [None, [line("d", ["3"], answers=["a"])]], ids=["no dev", "dev"])
def test_nq_as_published(tmp_path, dev):
    """Test has answers alone; dev, which training looks at, is judged by its positives."""
    rows = [
        json.dumps({"query_id": key, "query": f"question {key}", "answers": answers})
        for key, answers in (("1", ["Paris", "the city"]), ("2", ["1900"]), ("3", [" "]))
    ]
    changed = {"train.jsonl": [line(f"{n}", ["1"], answers=["y"]) for n in range(100)]}
    found = tevatron(write(tmp_path, {**changed, "dev.jsonl": dev, "test.jsonl": rows}))
    assert found.answer_splits == ("test",)
    assert list(found.queries("test")) == [
        Query("1", "question 1", ("Paris", "the city")),
        Query("2", "question 2", ("1900",)),
    ]
    assert labels(found, "test") == []
    held_out = [(f"{n}", "1", 1) for n in range(9, 100, 10)]
    assert labels(found, "dev") == ([("d", "3", 1)] if dev else held_out)


def test_dev_is_held_out_of_few_queries_of_which_some_have_no_positive(tmp_path):
    found = tevatron(write(tmp_path, {"dev.jsonl": None}))
    assert found.splits == ("train", "dev", "test")
    assert [[q.id for q in found.queries(split)] for split in ("train", "dev")] == [["a"], ["c"]]
    assert labels(found, "train") == [("a", "1", 1), ("a", "0", 1)]
    assert labels(found, "dev") == [("c", "2", 1)]
    assert [query.id for query in found.query_file("dev")] == ["a", "b", "c"]


def test_the_fingerprint_follows_every_file(tmp_path):
    before = tevatron(write(tmp_path, {"qrels.test.tsv": ["e 4"]})).fingerprint
    for file in tmp_path.iterdir():
        text = file.read_text()
        file.write_text(text + "\n")
        assert tevatron(tmp_path).fingerprint != before
        file.write_text(text)
    assert tevatron(tmp_path).fingerprint == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus.jsonl": None}, "no corpus.jsonl or corpus.jsonl.gz; a folder in Tevatron layout"),
        ({"train.jsonl": None}, "no train.jsonl or train.jsonl.gz"),
        ({"dev.jsonl": None, "test.jsonl": None}, "neither dev.jsonl nor test.jsonl"),
        ({"nq-dev.jsonl": [line("d")]}, "dev.jsonl: stands beside nq-dev.jsonl"),
        ({"corpus.jsonl": ['{"_id": "0", "text": "x"}']}, "corpus.jsonl:1: `docid` is missing"),
        ({"corpus.jsonl": ['{"docid": 0, "text": "x"}']}, "corpus.jsonl:1: `docid` is 0"),
        ({"train.jsonl": [line("a"), '{"query": "x"}']}, "train.jsonl:2: `query_id` is missing"),
        ({"train.jsonl": [line("a"), line("a")]}, "train.jsonl:2: duplicate id 'a'"),
        ({"train.jsonl": ['{"query_id": "a"}']}, "train.jsonl:1: query without `query`"),
        ({"train.jsonl": [line("a", query=7)]}, "train.jsonl:1: `query` is 7"),
        (
            {"train.jsonl": [newer("a", [7])]},
            "train.jsonl:1: `positive_document_ids` is no list of",
        ),
        (
            {"train.jsonl": [newer("a", "7")]},
            "train.jsonl:1: `positive_document_ids` is no list of",
        ),
        ({"train.jsonl": [line("a", answers="x")]}, "train.jsonl:1: `answers` is 'x'"),
        ({"train.jsonl": [line("a", positive_passages=3)]}, "train.jsonl:1: `positive_passages`"),
        (
            {"train.jsonl": [line("a", positive_passages={"docid": "1"})]},
            "train.jsonl:1: `positive",
        ),
        (
            {"train.jsonl": [line("a", positive_passages=[{"docid": 1}])]},
            "train.jsonl:1: `positive",
        ),
        ({"train.jsonl": [line("a"), line("b")]}, "train.jsonl: no query has a positive"),
        (
            {"dev.jsonl": None, "train.jsonl": [line("a"), line("b")]},
            "train.jsonl: no query has a positive",
        ),
        ({"dev.jsonl": [line("d", answers=["x"])]}, "dev.jsonl: no query has a positive"),
        ({"test.jsonl": []}, "test.jsonl: no query has a positive"),
        ({"qrels.test.tsv": ["e 0 4 x"]}, "qrels.test.tsv:1: relevance 'x' is no integer"),
        ({"qrels.test.tsv": ["e 0 4 .5"]}, "qrels.test.tsv:1: relevance '.5' is no integer"),
    ],
)
def test_bad_files_are_one_line_with_the_place(tmp_path, changed, message):
    def read():
        found = tevatron(write(tmp_path, changed))
        list(found.passages())
        return [(*found.queries(split), *found.qrels(split)) for split in found.splits]

    with pytest.raises(InputError) as raised:
        read()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_split_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no split 'eval'; it has train, dev, test"):
        tevatron(write(tmp_path)).queries("eval")
