import gzip
import json
import os
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rqv2_jax.data.collection import (
    Collection,
    Left,
    Passage,
    Qrel,
    Query,
    check_qrels,
    left_out,
    with_dev,
)
from rqv2_jax.data.readers.beir import beir
from rqv2_jax.errors import InputError

CORPUS = [
    '{"_id": "p1", "title": "One", "text": "first passage"}',
    '{"_id": "p2", "text": "second passage"}',
    '{"_id": "p3", "title": null, "text": "third passage"}',
]
QUERIES = [
    '{"_id": "q1", "text": "first?", "answers": ["1", "one"]}',
    '{"_id": "q2", "text": "second?"}',
    '{"_id": "q3", "text": "third?"}',
]
TRAIN = ["query-id\tcorpus-id\tscore", "q2\tp2\t1", "q2\tp1\t0", "q1\tp1\t2"]
DEV = ["q2\tp3\t1"]
TEST = ["q3\tp3\t1", "q1\tp3\t0"]


def write(folder, changed=(), *, suffix=""):
    """A correct folder, but for the files in `changed` (None: left out)."""
    files = {
        "corpus.jsonl": CORPUS,
        "queries.jsonl": QUERIES,
        "labels/train.tsv": TRAIN,
        "labels/dev.tsv": DEV,
        "labels/test.tsv": TEST,
    } | dict(changed)
    for name, lines in files.items():
        if lines is None:
            continue
        data = lines if isinstance(lines, bytes) else "".join(f"{x}\n" for x in lines).encode()
        file = folder / (name + suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(data) if suffix else data)
    return folder


def read(folder, train="labels", evaluation="labels", left=None):
    """Everything, with the labels checked against the rows; `left` counts what is left out."""
    collection = beir(folder, train_qrels=train, eval_qrels=evaluation)
    left = Left() if left is None else left
    mute = dict.fromkeys(left_out(collection, left), -1)
    passages = list(collection.passages())
    passage_rows = {passage.id: row for row, passage in enumerate(passages)}
    splits = {}
    for split in collection.splits:
        queries = list(collection.queries(split))
        query_rows = {query.id: row for row, query in enumerate(queries)}
        labels = check_qrels(collection.qrels(split), mute | query_rows, passage_rows, left)
        splits[split] = (queries, [x.tolist() for x in labels])
    return passages, splits


def message(folder, **folders):
    with pytest.raises(InputError) as caught:
        read(folder, **folders)
    text = str(caught.value)
    assert "\n" not in text
    assert ";" in text, "the mend"
    return text


EXPECTED = (
    [
        Passage("p1", "One", "first passage"),
        Passage("p2", "", "second passage"),
        Passage("p3", "", "third passage"),
    ],
    {
        # File order, and only those with a positive in the split; q1's 0 in test has no query row.
        "train": (
            [Query("q1", "first?", ("1", "one")), Query("q2", "second?", ())],
            [[1, 1, 0], [1, 0, 0], [1, 0, 2]],
        ),
        "dev": ([Query("q2", "second?", ())], [[0], [2], [1]]),
        "test": ([Query("q3", "third?", ())], [[0], [2], [1]]),
    },
)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_plain_and_gzipped(tmp_path, suffix):
    assert read(write(tmp_path, suffix=suffix)) == EXPECTED


def test_reads_queries_from_one_file_per_split(tmp_path):
    files = {
        "queries.jsonl": None,
        "queries.train.jsonl": QUERIES[:2],
        "queries.dev.jsonl": QUERIES[:2],
        # q1 and its label of 0 are known here too.
        "queries.test.jsonl": [QUERIES[2], QUERIES[0]],
    }
    assert read(write(tmp_path, files)) == EXPECTED


def test_train_and_evaluation_labels_come_from_their_own_folders(tmp_path):
    files = {
        "labels/test.tsv": ["q1\tp1\t1"],
        "full/train.tsv": ["q3\tp3\t1"],
        "full/dev.tsv": ["q2\tp1\t1"],
        "full/test.tsv": ["q3\tp1\t1"],
    }
    splits = read(write(tmp_path, files), evaluation="full")[1]
    assert list(splits) == ["train", "dev", "test"]
    assert splits["train"] == EXPECTED[1]["train"]
    assert splits["dev"][0] == [Query("q2", "second?", ())]


def test_tolerates_what_editors_leave(tmp_path):
    files = {
        "corpus.jsonl": b"\xef\xbb\xbf" + "\r\n".join([*CORPUS, "", " "]).encode(),
        "labels/train.tsv": "\r\n".join([*TRAIN, ""]).encode(),
    }
    assert read(write(tmp_path, files)) == EXPECTED


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    text = "one\u2028two\x85three"
    line = json.dumps({"_id": "p1", "text": text}, ensure_ascii=False)
    passages, _ = read(write(tmp_path, {"corpus.jsonl": [line, *CORPUS[1:]]}))
    assert passages[0].text == text


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


ids = words.filter(lambda word: word.split() == [word])


@given(st.lists(st.tuples(ids, words, words), min_size=1, unique_by=lambda row: row[0]))
def test_any_unicode_comes_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("unicode")
    lines = [json.dumps({"_id": i, "title": t, "text": x}, ensure_ascii=False) for i, t, x in rows]
    write(folder, {"corpus.jsonl": lines})
    collection = beir(folder, train_qrels="labels", eval_qrels="labels")
    assert list(collection.passages()) == [Passage(*row) for row in rows]


def test_a_character_written_in_two_halves_is_one(tmp_path):
    # Nobody reads the last.
    line = r'{"_id": "p1", "text": "\ud83d\ude00 \\ud83d", "metadata": "\ud83d"}'
    passages, _ = read(write(tmp_path, {"corpus.jsonl": [line, *CORPUS[1:]]}))
    assert passages[0].text == "\N{GRINNING FACE} \\ud83d"


def test_a_repeated_label_counts_once(tmp_path):
    folder = write(tmp_path, {"labels/train.tsv": [*TRAIN, TRAIN[1]]})
    assert read(folder) == EXPECTED


def test_qrels_name_their_source(tmp_path):
    collection = beir(write(tmp_path), train_qrels="labels", eval_qrels="labels")
    file = tmp_path / "labels" / "train.tsv"
    assert next(collection.qrels("train")) == Qrel("q2", "p2", 1, f"{file}:2")


def test_readers_stream_and_can_be_opened_again(tmp_path):
    folder = write(tmp_path, {"corpus.jsonl": [*CORPUS, "broken"]})
    collection = beir(folder, train_qrels="labels", eval_qrels="labels")
    for _ in range(2):
        assert next(collection.passages()).id == "p1"


@pytest.mark.parametrize(
    "name", ["corpus.jsonl", "queries.jsonl", "labels/train.tsv", "labels/test.tsv"]
)
def test_fingerprint_tells_when_a_file_changed(tmp_path, name):
    def fingerprint(folder):
        return beir(folder, train_qrels="labels", eval_qrels="labels").fingerprint

    before = fingerprint(write(tmp_path / "a"))
    assert before == fingerprint(write(tmp_path / "b"))
    # Same size, so that a fingerprint of sizes would miss it.
    file = tmp_path / "a" / name
    file.write_bytes(file.read_bytes().replace(b"1", b"7"))
    assert fingerprint(tmp_path / "a") != before


def test_fingerprint_tells_which_folder_the_labels_come_from(tmp_path):
    files = {"full/train.tsv": ["q1\tp1\t1"], "full/test.tsv": ["q3\tp2\t1"]}
    folder = write(tmp_path, files)
    prints = {
        beir(folder, train_qrels=train, eval_qrels=evaluation).fingerprint
        for train in ("labels", "full")
        for evaluation in ("labels", "full")
    }
    assert len(prints) == 4


def test_missing_folder(tmp_path):
    assert message(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such folder")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_missing_file(tmp_path, name):
    assert message(write(tmp_path, {name: None})).startswith(f"{tmp_path}: no {name} or {name}.gz")


def test_missing_queries_of_one_split(tmp_path):
    folder = write(tmp_path, {"queries.jsonl": None, "queries.train.jsonl": QUERIES[:2]})
    assert "no queries.jsonl" in message(folder)


@pytest.mark.parametrize("folders", [{"train": "other"}, {"evaluation": "other"}])
def test_missing_qrels_folder(tmp_path, folders):
    text = message(write(tmp_path), **folders)
    assert text.startswith(f"{tmp_path / 'other'}: no such qrels folder")


def test_missing_train_split(tmp_path):
    text = message(write(tmp_path, {"labels/train.tsv": None}))
    assert text.startswith(f"{tmp_path / 'labels'}: no train.tsv")


def test_unknown_split(tmp_path):
    collection = beir(write(tmp_path), train_qrels="labels", eval_qrels="labels")
    for stream in (collection.queries, collection.qrels):
        with pytest.raises(InputError, match="no split 'eval'; it has train, dev, test"):
            list(stream("eval"))


def test_plain_beside_gzipped(tmp_path):
    write(write(tmp_path), suffix=".gz")
    assert "corpus.jsonl: stands beside corpus.jsonl.gz" in message(tmp_path)


def test_no_positive(tmp_path):
    text = message(write(tmp_path, {"labels/train.tsv": ["q1\tp1\t0"]}))
    assert text.startswith(f"{tmp_path / 'labels' / 'train.tsv'}: no row has a score above 0")


BAD_LINES = [
    ('{"_id": "x", "text": "t"', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('["x", "t"]', "no JSON object"),
    ('{"text": "t"}', "`_id` is missing"),
    ('{"_id": "", "text": "t"}', "`_id` is ''"),
    ('{"_id": 7, "text": "t"}', "`_id` is 7"),
    ('{"_id": null, "text": "t"}', "`_id` is None"),
    ('{"_id": "x", "text": ["t"]}', "`text` is ['t']"),
    (r'{"_id": "x", "text": "cut \ud83d"}', "half a character"),
    (r'{"_id": "\uDE00", "text": "t"}', r"half a character (\ude00 alone)"),
]


def test_a_query_without_the_field_is_refused(tmp_path):
    text = message(write(tmp_path, {"queries.jsonl": [*QUERIES, '{"_id": "x"}']}))
    assert text.startswith(f"{tmp_path / 'queries.jsonl'}:4: query without `text`")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
@pytest.mark.parametrize(("line", "wrong"), BAD_LINES)
def test_bad_line(tmp_path, name, line, wrong):
    good = CORPUS if name == "corpus.jsonl" else QUERIES
    # After a blank line: numbers are those of the file.
    text = message(write(tmp_path, {name: [*good, "", line]}))
    assert text.startswith(f"{tmp_path / name}:5: ")
    assert wrong in text


@pytest.mark.parametrize("blank", ['""', '" "', '"\\n\\t\\u00a0"', "null", None])
def test_a_passage_without_text_stays_with_its_title(tmp_path, blank):
    text = "" if blank is None else f', "text": {blank}'
    line = f'{{"_id": "p4", "title": "Stone garden"{text}}}'
    passages, splits = read(write(tmp_path, {"corpus.jsonl": [*CORPUS, line]}))
    assert passages[:3] == EXPECTED[0]
    assert (passages[3].id, passages[3].title) == ("p4", "Stone garden")
    assert not passages[3].text.strip()
    assert splits == EXPECTED[1]


@pytest.mark.parametrize("blank", ['""', '" "', "null"])
def test_a_query_without_text_is_left_out_with_its_labels_and_counted(tmp_path, blank):
    files = {
        "queries.jsonl": [*QUERIES, *(f'{{"_id": "q{n}", "text": {blank}}}' for n in (7, 8))],
        # The other one has no label.
        "labels/train.tsv": [*TRAIN, "q7\tp1\t1"],
    }
    left = Left()
    assert read(write(tmp_path, files), left=left) == EXPECTED
    assert left.lines() == ["2 queries have no text; left out (first: q7)"]


def test_queries_without_a_positive_are_left_out_and_counted(tmp_path):
    files = {
        "queries.jsonl": [*QUERIES, '{"_id": "q4", "text": "?"}', '{"_id": "q5", "text": "?"}'],
        "labels/train.tsv": [*TRAIN, "q5\tp1\t0"],
    }
    left = Left()
    assert read(write(tmp_path, files), left=left) == EXPECTED
    assert left.lines() == [
        "2 queries have no positive or answer in any split; left out (first: q4)"
    ]


def test_labels_that_are_not_positive_may_name_what_is_not_there(tmp_path):
    labels = [*TRAIN, "q1\tp9\t0", "q2\tp8\t-1", "q9\tp1\t0", "q9\tp1x\t-2"]
    folder = write(tmp_path, {"labels/train.tsv": labels})
    left = Left()
    assert read(folder, left=left) == EXPECTED
    file = tmp_path / "labels" / "train.tsv"
    assert left.lines() == [
        "3 labels that are not positive name a passage that is not there; left out "
        f"(first: {file}:5, 'p9')"
    ]


@pytest.mark.parametrize("relevance", [-1, -2])
def test_a_negative_relevance_is_not_relevant(tmp_path, relevance):
    labels = [*TRAIN, f"q1\tp2\t{relevance}", f"q3\tp2\t{relevance}"]
    _, splits = read(write(tmp_path, {"labels/train.tsv": labels}))
    queries, (query_N, passage_N, relevance_N) = splits["train"]
    assert queries == EXPECTED[1]["train"][0]
    assert (query_N[-1], passage_N[-1], relevance_N[-1]) == (0, 1, relevance)


def numbered(count):
    queries = [f'{{"_id": "q{n}", "text": "question {n}"}}' for n in range(count)]
    return {"queries.jsonl": queries, "labels/train.tsv": [f"q{n}\tp1\t1" for n in range(count)]}


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, [1]), (32, [9, 19, 29]), (1500, range(14, 1500, 15))]
)
def test_dev_is_held_out_of_train_where_it_has_no_labels(tmp_path, count, held_out):
    files = {**numbered(count), "labels/dev.tsv": None, "labels/test.tsv": ["q0\tp3\t1"]}
    folder = write(tmp_path, files)
    _, splits = read(folder)
    assert list(splits) == ["train", "dev", "test"]
    ids = {split: [query.id for query in queries] for split, (queries, _) in splits.items()}
    assert ids["dev"] == [f"q{n}" for n in held_out]
    assert ids["train"] == [f"q{n}" for n in range(count) if n not in held_out]
    assert ids["test"] == ["q0"]
    for split in ("train", "dev"):
        assert splits[split][1][0] == list(range(len(ids[split])))
    (remark,) = beir(folder, train_qrels="labels", eval_qrels="labels").remarks
    assert remark.startswith("dev is held out from the training queries")


@pytest.mark.parametrize(
    ("count", "every"),
    [(1, 1), (2, 2), (9, 9), (999, 10), (1000, 10), (1500, 15), (9999, 99), (10_000, 100)],
)
def test_one_rule_says_which_training_queries_are_dev(count, every):
    texts = Collection(
        name="in memory",
        fingerprint="f",
        splits=("train", "test"),
        passages=lambda: iter([Passage("p", "", "t")]),
        queries=lambda split: (Query(f"{split}{n}", "?", ()) for n in range(1, count + 1)),
        qrels=lambda split: (Qrel(f"{split}{n}", "p", 1, "f:1") for n in range(count + 2)),
        remarks=("test is dev",),
    )
    found = with_dev(texts)
    assert found.splits == ("train", "dev", "test")
    dev = [f"train{n}" for n in range(every, count + 1, every)]
    assert [query.id for query in found.queries("dev")] == dev
    train = [f"train{n}" for n in range(1, count + 1) if n % every]
    assert [query.id for query in found.queries("train")] == train
    assert [query.id for query in found.queries("test")][:1] == ["test1"]
    # Labels whose query is nowhere stay, to be reported.
    stray = ["train0", f"train{count + 1}"]
    for split, ids in (("train", train), ("dev", dev)):
        assert [x.query_id for x in found.qrels(split)] == [stray[0], *ids, stray[1]]
    assert len(list(found.qrels("test"))) == count + 2
    assert found.remarks[0] == "test is dev"
    assert found.remarks[1].endswith(f"one in every {every} ({len(dev):,} of {count:,})")
    assert found.fingerprint != texts.fingerprint


def test_a_folder_whose_training_queries_cannot_be_read_opens_all_the_same(tmp_path):
    """So that the doctor reads the other files too."""
    folder = write(tmp_path, {"labels/dev.tsv": None, "labels/train.tsv": ["q1"]})
    texts = beir(folder, train_qrels="labels", eval_qrels="labels")
    assert texts.remarks == ()
    assert len(list(texts.passages())) == 3
    for split in ("train", "dev"):
        with pytest.raises(InputError, match=r"train\.tsv:1: 1 columns"):
            list(texts.queries(split))


def test_labels_for_dev_alone_are_those_of_test(tmp_path):
    folder = write(
        tmp_path, {**numbered(20), "labels/dev.tsv": ["q0\tp3\t1"], "labels/test.tsv": None}
    )
    _, splits = read(folder)
    assert [[query.id for query in queries] for queries, _ in splits.values()][1:] == [
        ["q9", "q19"],
        ["q0"],
    ]
    assert "test is dev.tsv" in beir(folder, train_qrels="labels", eval_qrels="labels").remarks[0]


@pytest.mark.parametrize(("name", "key"), [("corpus.jsonl", "p2"), ("queries.jsonl", "q2")])
def test_duplicate_id(tmp_path, name, key):
    good = CORPUS if name == "corpus.jsonl" else QUERIES
    text = message(write(tmp_path, {name: [*good, f'{{"_id": "{key}", "text": "t"}}']}))
    assert text.startswith(f"{tmp_path / name}:4: duplicate id '{key}', first on line 2")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_id_with_white_space_is_refused_before_a_run_file_cannot_hold_it(tmp_path, name):
    text = message(write(tmp_path, {name: ['{"_id": "Barack Obama", "text": "t"}']}))
    assert text.startswith(f"{tmp_path / name}:1: id 'Barack Obama' has white space")


def test_a_title_cut_inside_a_character(tmp_path):
    line = r'{"_id": "x", "title": "cut \ud83d", "text": "t"}'
    assert "half a character" in message(write(tmp_path, {"corpus.jsonl": [*CORPUS, line]}))


def test_title_and_answers_must_be_text(tmp_path):
    text = message(write(tmp_path / "a", {"corpus.jsonl": ['{"_id":"x","text":"t","title":1}']}))
    assert "corpus.jsonl:1: `title` is 1" in text
    for answers in ('"one"', "[1]"):
        line = f'{{"_id": "q1", "text": "t", "answers": {answers}}}'
        text = message(write(tmp_path / "b", {"queries.jsonl": [line]}))
        assert "queries.jsonl:1: `answers` is" in text


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("q1\tp1", "2 columns in 'q1\\tp1'; write"),
        ("q1", "1 columns in 'q1'"),
        ("q1\t0\tp1\t1", "4 columns"),
        ("q1\tp1\t1.5", "relevance '1.5' is no integer"),
        ("q1\tp1\tnan", "relevance 'nan' is no integer"),
        ("q1\tp1\tinf", "relevance 'inf' is no integer"),
        ("q1\tp1\t2147483648.0", "relevance 2147483648 is beyond 2147483647"),
        ("q1\tp1\t", "2 columns"),
        ("q1\tp1\t2147483648", "relevance 2147483648 is beyond 2147483647"),
        ("query-id\tcorpus-id\tscore", "relevance 'score' is no integer"),
        ("q2\tp2\t3", "relevance 3 for query 'q2' and passage 'p2', but 1 on line 2"),
        ("q9\tp1\t1", "qrels name query 'q9'"),
        ("q1\tp9\t1", "qrels name passage 'p9'"),
    ],
)
def test_bad_label(tmp_path, line, wrong):
    text = message(write(tmp_path, {"labels/train.tsv": [*TRAIN, line]}))
    assert text.startswith(f"{tmp_path / 'labels' / 'train.tsv'}:5: ")
    assert wrong in text


@pytest.mark.parametrize("form", ["{}\t{}\t{}.0", "{} 0 {} {}.00", "{}\t0\t{}\t{}e0"])
def test_a_whole_relevance_may_be_written_as_a_float(tmp_path, form):
    labels = [("q2", "p2", 1), ("q2", "p1", 0), ("q1", "p1", 2)]
    files = {"labels/train.tsv": [form.format(*label) for label in labels]}
    assert read(write(tmp_path, files)) == EXPECTED


def test_largest_score_survives(tmp_path):
    files = {"labels/train.tsv": ["q1\tp1\t2147483647"]}
    assert read(write(tmp_path, files))[1]["train"][1][2] == [2147483647]


def test_not_utf8(tmp_path):
    data = "\n".join(CORPUS).encode() + b'\n{"_id": "x", "text": "caf\xe9"}\n'
    text = message(write(tmp_path, {"corpus.jsonl": data}))
    assert text.startswith(f"{tmp_path / 'corpus.jsonl'}:4: not UTF-8")


def test_truncated_gzip(tmp_path):
    lines = [json.dumps({"_id": str(i), "text": os.urandom(100).hex()}) for i in range(1000)]
    write(tmp_path, {"corpus.jsonl": lines}, suffix=".gz")
    file = tmp_path / "corpus.jsonl.gz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    collection = beir(tmp_path, train_qrels="labels", eval_qrels="labels")
    read = []
    with pytest.raises(InputError) as caught:
        # Not extend: it would keep nothing of a stream that breaks.
        deque(map(read.append, collection.passages()), maxlen=0)
    # Up to the damage, everything arrives; the line named is the first that did not.
    assert str(caught.value).startswith(f"{file}:{len(read) + 1}: cannot be read on (")
    assert 300 < len(read) < 600


def test_a_gz_file_that_is_not_gzipped(tmp_path):
    write(tmp_path, suffix=".gz")
    file = tmp_path / "labels" / "train.tsv.gz"
    file.write_bytes(b"q1\tp1\t1\n")
    assert message(tmp_path).startswith(f"{file}:1: cannot be read on (")


def test_check_qrels_maps_ids_to_rows():
    qrels = [Qrel("b", "y", 3, "f:1"), Qrel("a", "x", 0, "f:2"), Qrel("c", "x", 0, "f:3")]
    rows = check_qrels(iter(qrels), {"a": 4, "b": 7}, {"x": 2**33, "y": 5}, Left())
    assert [row.tolist() for row in rows] == [[7, 4], [5, 2**33], [3, 0]]
    assert [row.dtype for row in rows] == [np.int64, np.int64, np.int32]


def test_check_qrels_of_nothing_has_its_types():
    rows = check_qrels([], {}, {}, Left())
    assert [(row.shape, row.dtype) for row in rows] == [
        ((0,), np.int64),
        ((0,), np.int64),
        ((0,), np.int32),
    ]


def test_check_qrels_names_the_source_of_what_is_unknown_and_counts_it():
    for qrel, wrong in [
        (Qrel("a", "z", 1, "f:8"), "f:8: qrels name passage 'z'"),
        (Qrel("z", "x", 1, "f:8"), "f:8: qrels name query 'z'"),
    ]:
        qrels = [qrel, Qrel("a", "x", 1, "f:9"), qrel._replace(source="f:10")]
        with pytest.raises(InputError, match=rf"{wrong}.*\(such labels: 2\)"):
            check_qrels(qrels, {"a": 0}, {"x": 0}, Left())


def test_labels_of_queries_that_are_left_out_go_with_them():
    qrels = [Qrel("b", "x", 1, "f:1"), Qrel("a", "x", 1, "f:2")]
    rows = check_qrels(qrels, {"a": 0, "b": -1}, {"x": 3}, Left())
    assert [row.tolist() for row in rows] == [[0], [3], [1]]
