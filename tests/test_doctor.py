"""The data doctor: sound data are sound, and each finding is made, where it belongs."""

import dataclasses
import json
import re

import numpy as np
import pytest
import test_dpr
import test_tables
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import run_program, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.data.readers import beir, dpr, tables
from rqv2_jax.data.tokenise import Tokenizer
from rqv2_jax.errors import InputError
from rqv2_jax.recipe import needs
from rqv2_jax.tools import doctor, doctor_checks

# A token for each word.
WORDS = Tokenizer(lambda texts: [[5] * len(text.split()) for text in texts], "words", 9, 1, 2)
CORPUS = [(f"p{i}", f"title {i}", f"passage number {i}") for i in range(12)]
QUERIES = [(f"q{i}", f"question {i}") for i in range(12)]
QRELS = {
    "train": [f"q{i}\tp{i}\t1" for i in range(8)],
    "dev": ["q8\tp8\t1", "q9\tp9\t1"],
    "test": ["q10\tp10\t1", "q11\tp11\t1"],
}


def passage(key, title, text):
    return json.dumps({"_id": key, "title": title, "text": text})


def query(key, text):
    return json.dumps({"_id": key, "text": text})


def write(folder, changed=()):
    """Sound data, but for the files in `changed`: lines, added to the sound ones if callable."""
    files = {
        "corpus.jsonl": [passage(*each) for each in CORPUS],
        "queries.jsonl": [query(*each) for each in QUERIES],
        **{f"qrels/{split}.tsv": lines for split, lines in QRELS.items()},
        "lists.tsv": [line for i in range(4) for line in given_list(i, i, i + 1)],
    }
    (folder / "qrels").mkdir()
    for name, lines in {**files, **dict(changed)}.items():
        if callable(lines):
            lines = lines(list(files.get(name, [])))
        if lines is not None:
            data = lines if isinstance(lines, bytes) else "".join(f"{x}\n" for x in lines).encode()
            (folder / name).write_bytes(data)
    return folder


def given_list(number, *passages):
    """A joint list of question `number`: rows of CORPUS, the positive first."""
    return [
        f"question {number}\ttitle {row}\tpassage number {row}\t{int(place == 0)}"
        for place, row in enumerate(passages)
    ]


def added(*lines):
    return lambda sound: [*sound, *lines]


def replaced(row, line):
    return lambda sound: [*sound[:row], line, *sound[row + 1 :]]


def config_of(**changes):
    config = config_lib.default()
    config.data.update({"query_length": 32, "passage_length": 128, "pair_length": 160})
    config.model.passage_format = "title_sep_text"
    for stage in ("retriever", "reranker", "joint"):
        config[stage].update({"epochs": 1.0, "batch": 4, "list_size": 2})
    config.update_from_flattened_dict(changes)
    for key in ("passage_length", "pair_length"):
        config.data[f"train_{key}"] = config.data[f"train_{key}"] or config.data[key]
    return config


def inputs_of(config, **changes):
    lengths = {key: config.data[key] for key in ("query_length", "passage_length", "pair_length")}
    style = {"titles": config.data.titles, "passage_format": config.model.passage_format}
    special = {"cls": 1, "sep": 2, "pair_cls": 1, "pair_sep": 2}
    special |= {"query_prompt": (), "passage_prompt": ()}
    return Inputs(**{**special, **style, **lengths, **changes})


def examine(folder, reader=None, lists=False, **changes):
    config = config_of(**{"joint.lists": str(folder / "lists.tsv") if lists else "", **changes})

    def read_beir():
        return beir.beir(folder, train_qrels="qrels", eval_qrels="qrels")

    return doctor.examine(config, reader or read_beir, WORDS, inputs_of(config))


@pytest.mark.parametrize("lists", [False, True])
def test_sound_data_are_ok(tmp_path, lists):
    report = examine(write(tmp_path), lists=lists)
    assert report.findings == []
    assert report.verdict() == "ok"
    assert report.usable()
    assert [stream[:2] for stream in report.streams] == [
        ("passages", 12),
        ("train queries", 12),
        ("train qrels", 8),
        ("dev queries", 12),
        ("dev qrels", 2),
        ("test queries", 12),
        ("test qrels", 2),
        *([("joint lists", 4)] if lists else []),
    ]
    assert report.sampled == (12, 12)


ERRORS = {
    "no JSON": (
        {"corpus.jsonl": replaced(3, "{")},
        "passages",
        r"corpus\.jsonl:4: not JSON",
    ),
    "encoding": (
        {"corpus.jsonl": b'{"_id": "p0", "text": "\xe9"}\n'},
        "passages",
        r"corpus\.jsonl:1: not UTF-8",
    ),
    "id twice": (
        {"corpus.jsonl": added(passage("p0", "", "another"))},
        "passages",
        r"corpus\.jsonl:13: duplicate id 'p0'",
    ),
    "no text": (
        {"corpus.jsonl": added(passage("p12", "title", 7))},
        "passages",
        r"corpus\.jsonl:13: `text` is 7",
    ),
    "empty corpus": ({"corpus.jsonl": []}, "passages", "the corpus is empty"),
    "query without id": (
        {"queries.jsonl": added('{"text": "question"}')},
        "train queries",
        r"queries\.jsonl:13: `_id` is missing",
    ),
    "qrels columns": (
        {"qrels/dev.tsv": replaced(1, "q9\tp9")},
        "dev qrels",
        r"dev\.tsv:2: 2 columns",
    ),
    "unknown passages": (
        {"qrels/test.tsv": added("q11\tnowhere\t1", "q11\tp1\t0", "q10\tnor_here\t2")},
        "test qrels",
        r"test\.tsv:3: qrels name passage 'nowhere', .* \(such labels: 2\)",
    ),
    "unknown query": (
        {"qrels/train.tsv": added("nobody\tp1\t1", "nobody\tp2\t0", "no_one\tp2\t1")},
        "train qrels",
        r"train\.tsv:9: qrels name query 'nobody', .* \(such labels: 2\)",
    ),
    "no positive": (
        {"qrels/dev.tsv": ["q8\tp8\t0"]},
        "dev queries",
        r"dev\.tsv: no row has a score above 0",
    ),
    "no split": (
        {"qrels/dev.tsv": None, "qrels/test.tsv": None},
        "collection",
        "has no qrels for test",
    ),
    "no file": ({"corpus.jsonl": None}, "collection", r"no corpus\.jsonl"),
    "test is train": (
        {"qrels/test.tsv": ["q0\tp0\t1", "q1\tp1\t1", "q10\tp10\t1"]},
        "test queries",
        r"2 of 3 queries \(66\.7%\) are in train too, 2 of them with a positive of theirs, first 'q0'",
    ),
    "two positives": (
        {"lists.tsv": replaced(1, given_list(0, 1)[0])},
        "joint lists",
        r"lists\.tsv:2: label 1 in place 2 of the list of 2",
    ),
    "no positive in a list": (
        {"lists.tsv": replaced(2, given_list(1, 5, 2)[1])},
        "joint lists",
        r"lists\.tsv:3: label 0 in place 1",
    ),
    "half a list": (
        {"lists.tsv": added(given_list(5, 5)[0])},
        "joint lists",
        r"lists\.tsv: the last list, from line 9, has 1 of 2 lines",
    ),
    "no lists": ({"lists.tsv": None}, "joint lists", r"lists\.tsv: no such file"),
    "few lists": (
        {"lists.tsv": given_list(0, 0, 1)},
        "joint stage",
        "1 lists in 1 epochs, fewer than one batch of 4; lower config.joint.batch",
    ),
    "few labels": (
        {"qrels/train.tsv": QRELS["train"][:3]},
        "retriever stage",
        "3 lists in 1 epochs, fewer than one batch of 4; lower config.retriever.batch",
    ),
}


def test_only_mined_queries_head_the_rerankers_lists(tmp_path):
    write(tmp_path)
    few = "3 lists in 1 epochs, fewer than one batch of 4; lower config.{}.batch"
    reranker, joint = examine(tmp_path, **{"mine.queries": 3}).findings
    assert reranker[:2] == ("error", "reranker stage")
    assert reranker.what.startswith(few.format("reranker"))
    # Denoised positives may head more lists.
    assert joint[:2] == ("warning", "joint stage")
    assert joint.what.startswith(few.format("joint"))
    *_, joint = examine(tmp_path, **{"mine.queries": 3, "joint.denoised_share": 0.0}).findings
    assert joint[:2] == ("error", "joint stage")
    assert not examine(tmp_path, **{"mine.queries": 4}).findings


WARNINGS = {
    "passage twice": (
        {"corpus.jsonl": added(passage("p12", "TITLE 3", " Passage\tnumber 3"))},
        "passages",
        r"1 of 13 passages \(7\.7%\) have the text of an earlier one, first 'p12' that of 'p3'",
    ),
    "query twice": (
        {
            "queries.jsonl": added(query("q12", "Question  2"), query("q13", "question 2")),
            "qrels/train.tsv": added("q12\tp1\t1", "q13\tp0\t1"),
        },
        "train queries",
        r"2 of 10 queries \(20\.0%\) have the text of an earlier one, first 'q12' that of 'q2'",
    ),
    "test query in train": (
        {
            "queries.jsonl": added(query("q12", "QUESTION 0")),
            "qrels/test.tsv": added("q12\tp10\t1"),
        },
        "test queries",
        r"1 of 3 queries \(33\.3%\) are in train too, 0 of them with a positive of theirs, first 'q12'",
    ),
    "dev query in train": (
        {"qrels/dev.tsv": added("q3\tp3\t1")},
        "dev queries",
        r"1 of 3 queries \(33\.3%\) are in train too, 1 of them with a positive of theirs, first 'q3'",
    ),
    "passage twice in a list": (
        {"lists.tsv": lambda sound: [*sound, *given_list(5, 5, 5), *given_list(6, 6, 7)]},
        "joint lists",
        r"1 of 6 lists \(16\.7%\) hold a passage twice, first list 5 of .*lists\.tsv",
    ),
    "positive of the qrels among negatives": (
        {"lists.tsv": added(*given_list(5, 7, 6), *given_list(6, 7, 6))},
        "joint lists",
        r"1 of 6 lists \(16\.7%\) have a known positive of their query among .*, first list 6",
    ),
    "positive of another list among negatives": (
        {"lists.tsv": added(*given_list(3, 7, 8), *given_list(3, 9, 7))},
        "joint lists",
        r"1 of 6 lists \(16\.7%\) have a known positive of their query among .*, first list 6",
    ),
    "passage without text": (
        {"corpus.jsonl": added(passage("p12", "", " "), passage("p13", "", None))},
        "passages",
        r"^2 passages have no text; kept, empty \(first: 'p12'\)",
    ),
    "query without text": (
        {
            "queries.jsonl": added(query("q12", ""), query("q13", " ")),
            "qrels/train.tsv": added("q13\tp1\t1"),
        },
        "queries",
        r"^2 queries have no text; left out \(first: 'q12'\)",
    ),
    "labels of 0 that name nothing": (
        {"qrels/test.tsv": added("q11\tnowhere\t0", "q11\tnor_here\t-1", "q99\tp1\t0")},
        "test qrels",
        r"^2 labels that are not positive name a passage that is not there; left out \(first: .*test",
    ),
    "list without a query": (
        {"lists.tsv": added(" \t\tnobody asked\t1", " \t\tnor this\t0")},
        "joint lists",
        r"^1 lists have no query; left out \(first: .*lists\.tsv:9\)",
    ),
    "test query in the lists": (
        {"lists.tsv": added(*given_list(10, 0, 1))},
        "test queries",
        r"1 of 2 queries \(50\.0%\) are in joint\.lists too, 0 of them .*, first 'q10'",
    ),
}
NOTES = {
    "query without label": (
        {
            "queries.jsonl": added(query("q12", "nobody judged it")),
            "qrels/train.tsv": added("q11\tp0\t0"),
        },
        "queries",
        r"1 of 13 queries \(7\.7%\) have no positive in any split",
    ),
    "test positive in train": (
        {"qrels/test.tsv": added("q11\tp0\t1")},
        "test qrels",
        r"1 of 3 positives \(33\.3%\) are positives in train too",
    ),
    "no labels for dev": (
        {"qrels/dev.tsv": None},
        "collection",
        "^dev is held out from the training queries",
    ),
    "queries that are passages": (
        {"corpus.jsonl": added(passage("q8", "", "question 8"), passage("q9", "x", "Question  9"))},
        "dev queries",
        r"^2 of 2 queries \(100\.0%\) stand in the corpus under their own id; .* are ignored for them",
    ),
    "foreign passage in the lists": (
        {"lists.tsv": added("question 5\ttitle 5\tpassage number 5\t1", "question 5\t\tother\t0")},
        "joint lists",
        r"1 of 7 passages \(14\.3%\) are not in the corpus",
    ),
}
CASES = {"error": ERRORS, "warning": WARNINGS, "note": NOTES}


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in CASES for case in CASES[kind]])
def test_each_finding_is_made(tmp_path, kind, case):
    changed, where, what = CASES[kind][case]
    report = examine(write(tmp_path, changed), lists="lists.tsv" in changed)
    found = [f for f in report.findings if re.search(what, f.what)]
    assert [(f.kind, f.where) for f in found] == [(kind, where)]
    assert all("\n" not in f.what for f in report.findings)
    assert report.usable() == (kind != "error")


@pytest.mark.parametrize(
    ("mode", "text", "kind"),
    [
        ("auto", "question 10", "note"),
        ("auto", "another text", None),
        ("always", "another text", "note"),
        ("never", "question 10", "warning"),
        ("never", "another text", None),
    ],
)
def test_ids_that_coincide_are_told_by_their_texts(tmp_path, mode, text, kind):
    folder = write(tmp_path, {"corpus.jsonl": added(passage("q10", "", text))})
    report = examine(folder, **{"data.ignore_identical_ids": mode})
    found = [f.kind for f in report.findings if "under their own id" in f.what]
    assert found == ([kind] if kind else [])


def test_a_title_alone_is_text_where_titles_are_used(tmp_path):
    folder = write(tmp_path, {"corpus.jsonl": added(passage("p12", "Stone garden", ""))})
    assert examine(folder).findings == []
    (found,) = examine(folder, **{"data.titles": False}).findings
    assert found.what == "1 passages have no text; kept, empty (first: 'p12')"


def test_a_language_that_the_vocabulary_lacks_is_a_warning(tmp_path):
    """As BERT's English one cuts Chinese: most characters are [UNK]."""
    folder, config = write(tmp_path), config_of()
    known = {"passage", "question", "title", "number"}

    def tokenizer_of(unknown):
        return Tokenizer(
            lambda texts: [[5 if w in known else 7 for w in t.split()] for t in texts],
            *("words", 9, 1, 2, unknown),
        )

    def examined(unknown, pairs=None):
        words = dataclasses.replace(tokenizer_of(unknown), pairs=pairs)
        found = beir.beir(folder, train_qrels="qrels", eval_qrels="qrels")
        return doctor.examine(config, lambda: found, words, inputs_of(config)).findings

    assert examined(None) == []
    assert examined(8) == []
    passages, queries = examined(7)
    # `title 1 passage number 1` and `question 1`.
    assert passages[:2] == ("warning", "passages")
    assert passages.what.startswith("24 of 60 sampled tokens (40.0%) are [UNK]")
    assert queries[:2] == ("warning", "queries")
    assert queries.what.startswith("12 of 24 sampled tokens (50.0%) are [UNK]")
    # By a tokenizer of the re-ranker's own.
    both = examined(8, tokenizer_of(7))
    assert [found.where for found in both] == ["passages", "queries"]
    assert all("says nothing to the re-ranker; take" in found.what for found in both)


def test_every_stream_has_its_say(tmp_path):
    changed = {
        "corpus.jsonl": replaced(5, "{"),
        # A file of labels and the file of their queries.
        "qrels/train.tsv": replaced(2, "q2 p2"),
        "queries.train.jsonl": [query(*each) for each in QUERIES[:7]] + ["{}"],
        "queries.dev.jsonl": [query(*each) for each in QUERIES[:9]],
        "qrels/test.tsv": added("q11\tp3\tx"),
        "lists.tsv": replaced(7, "question"),
    }
    report = examine(write(tmp_path, changed), lists=True)
    errors = [(f.where, f.what.split("/")[-1].split(": ")[0]) for f in report.findings]
    assert errors == [
        ("passages", "corpus.jsonl:6"),
        ("train qrels", "train.tsv:3"),
        ("train queries", "queries.train.jsonl:8"),
        ("dev qrels", "dev.tsv:2"),
        ("test qrels", "test.tsv:3"),
        ("joint lists", "lists.tsv:8"),
    ]
    assert report.verdict() == "not usable: 6 errors"
    streams = {name: (count, remark) for name, count, remark in report.streams}
    assert streams["passages"] == (5, "5 with a title (100.0%), then an error")
    assert streams["train qrels"] == (2, "2 positive, then an error")
    assert streams["train queries"] == (7, "0 with a positive, then an error")
    assert streams["test qrels"][1] == "2 positive, then an error"


def test_labels_of_relevance_zero_are_no_positives(tmp_path):
    changed = {
        "qrels/train.tsv": added("q5\tp6\t0"),
        "qrels/test.tsv": added("q11\tp0\t0"),
        "lists.tsv": added(*given_list(5, 5, 6)),
    }
    report = examine(write(tmp_path, changed), lists=True)
    assert report.findings == []
    assert ("test qrels", 3, "2 positive") in report.streams


def test_metrics_that_the_test_labels_cannot_give_are_an_error(tmp_path):
    write(tmp_path)
    (found,) = examine(tmp_path, **{"evaluate.min_relevance": 2}).findings
    assert found[:2] == ("error", "config")
    assert "hold no passage of relevance 2 or more" in found.what
    (tmp_path / "qrels" / "test.tsv").write_text("q10\tp10\t2\nq11\tp11\t1\n")
    assert not examine(tmp_path, **{"evaluate.min_relevance": 2}).findings


@pytest.mark.parametrize(("epochs", "lists"), [(0.0, None), (0.4, 3), (0.5, None), (2.0, None)])
def test_lists_of_a_stage_are_counted_over_its_epochs(tmp_path, epochs, lists):
    report = examine(write(tmp_path), **{"retriever.epochs": epochs})
    assert [f.what.split(",")[0] for f in report.findings] == (
        [f"{lists} lists in {epochs} epochs"] if lists else []
    )


def test_what_holds_for_two_splits_is_said_of_both(tmp_path):
    changed = {
        "qrels/dev.tsv": added("q9\tp0\t1"),
        "qrels/test.tsv": added("q11\tp0\t1"),
    }
    report = examine(write(tmp_path, changed))
    assert [f.where for f in report.findings] == ["dev qrels", "test qrels"]
    assert len({f.what for f in report.findings}) == 1


def test_a_corpus_may_have_no_titles(tmp_path):
    corpus = [passage(key, "", text) for key, _, text in CORPUS]
    report = examine(write(tmp_path, {"corpus.jsonl": corpus}))
    assert report.verdict() == "ok"
    assert report.streams[0] == ("passages", 12, "0 with a title (0.0%)")
    assert report.lengths[1] == ("title", 0.0, (0, 0, 0, 0, 0), None, 0.0, 0.0)


def test_lists_are_read_where_there_is_no_collection(tmp_path):
    changed = {"corpus.jsonl": None, "lists.tsv": replaced(0, "question")}
    report = examine(write(tmp_path, changed), lists=True)
    assert [f.where for f in report.findings] == ["collection", "joint lists"]


def test_titles_count_where_they_are_used(tmp_path):
    corpus = added(passage("p12", "another title", CORPUS[3][2]))
    folder = write(tmp_path, {"corpus.jsonl": corpus})
    assert examine(folder).verdict() == "ok"
    report = examine(folder, **{"data.titles": False})
    assert [f.where for f in report.findings] == ["passages"]
    assert [row.name for row in report.lengths] == ["query", "passage", "pair"]


@pytest.mark.parametrize(
    ("names", "reader"),
    [
        (test_tables.MSMARCO, tables.msmarco),
        (test_tables.MARCO, tables.rocketqa),
        (test_tables.NQ, tables.rocketqa),
    ],
    ids=["MS MARCO", "RocketQA marco", "RocketQA nq"],
)
def test_tables_are_examined_too(tmp_path, names, reader):
    judged = "answers" not in names
    folder = test_tables.write(tmp_path, names=names)
    changes = {"evaluate.metrics": ("RR@10",)}
    report = examine(folder, lambda: reader(str(folder)), **changes)
    assert report.usable()
    streams = {name: (count, remark) for name, count, remark in report.streams}
    assert streams["passages"] == (40, "39 with a title (97.5%)")
    assert streams["train queries"] == (250, "225 with a positive")
    assert streams["dev queries"] == (250, "24 with a positive")
    assert streams["test queries"] == (3, f"2 with {'a positive' if judged else 'an answer'}")
    assert ("test qrels" in streams) == judged
    (unlabelled,) = (f for f in report.findings if f.where == "queries")
    assert unlabelled.what.startswith("2 of 253 queries (0.8%) have no positive")
    labels = [f"q{n}\t0\t{n % 41}\t1" for n in range(252)]
    # A label of relevance 0 of a query that is nowhere is left out.
    labels[3] = "q260\t0\t0\t0"
    # Dev has none that name a missing passage.
    labels[40] = "q40\t0\t0\t1"
    test_tables.write(tmp_path, {"train labels": labels}, names=names)
    report = examine(folder, lambda: reader(str(folder)), **changes)
    assert report.verdict() == "not usable: 2 errors"
    missing, unknown = (f.what for f in report.findings if f.kind == "error")
    assert re.search(r"qrels name passage '40', .* \(such labels: 5\)", missing)
    assert re.search(r"qrels name query 'q250', .* \(such labels: 2\)", unknown)


def test_dpr_is_examined_too(tmp_path):
    folder = test_dpr.write(tmp_path)
    changes = {f"{stage}.batch": 2 for stage in ("retriever", "reranker", "joint")}
    (found,) = examine(tmp_path, lambda: dpr.dpr(folder), **changes).findings
    assert found[:2] == ("error", "config")
    assert "R@1000 needs labels of all relevant passages" in found.what
    changes["evaluate.metrics"] = ("RR@10",)
    report = examine(tmp_path, lambda: dpr.dpr(folder), **changes)
    assert report.verdict() == "ok"
    assert ("test queries", 2, "2 with an answer") in report.streams
    train = json.dumps([test_dpr.question("who?", "2"), test_dpr.question("what?", "9")])
    broken = {
        "biencoder-nq-train.json": train,
        "biencoder-nq-dev.json": "[]",
        "nq-test.qa.csv": "where?\n",
    }
    test_dpr.write(tmp_path, broken)
    report = examine(tmp_path, lambda: dpr.dpr(folder), **changes)
    errors = [f.where for f in report.findings if f.kind == "error"]
    assert errors == ["train qrels", "dev queries", "test queries"]
    assert "dev is empty" in report.findings[1].what


def test_lengths_and_truncation_by_hand():
    inputs = inputs_of(config_of(), query_length=5, passage_length=8, pair_length=10)
    queries = ["a b", "a b c d"]
    passages = [("t", "a"), ("t t", "a b c d e"), ("", "a b c")]
    query_row, title, passage_row, pair = doctor_checks.measure(
        WORDS, inputs, queries, passages, seed=0
    )
    assert query_row == ("query", 5.0, (4, 4, 6, 6, 6), 5, 1 / 2, 1 / 10)
    assert title == ("title", 1.0, (0, 1, 2, 2, 2), None, 0, 0)
    # [CLS] title [SEP] text [SEP]: 5, 10, 6.
    assert passage_row == ("passage", 7.0, (5, 6, 10, 10, 10), 8, 1 / 3, 2 / 21)
    # [CLS] query [SEP] title text [SEP]: 3 + {2, 4} + {2, 7, 3}; query_length is not for pairs.
    wholes = np.array([3 + q + p for q in (2, 4) for p in (2, 7, 3)])
    kept = np.minimum(wholes, 10)
    assert (pair.name, pair.limit, pair.quantiles[0], pair.quantiles[-1]) == ("pair", 10, 7, 14)
    assert pair.mean == pytest.approx(wholes.mean(), abs=0.1)
    assert pair.cut == pytest.approx((wholes > kept).mean(), abs=0.02)
    assert pair.lost == pytest.approx((wholes - kept).sum() / wholes.sum(), abs=0.02)
    without = doctor_checks.measure(
        WORDS, inputs_of(config_of(), titles=False), queries, passages, 0
    )
    assert [row.name for row in without] == ["query", "passage", "pair"]
    assert without[1].quantiles == (4, 6, 8, 8, 8)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"data.query_length": 3}, "query tokens"),
        ({"data.passage_length": 8}, "passage tokens"),
        ({"data.pair_length": 40}, "pair tokens"),
    ],
)
def test_much_truncation_is_a_warning(tmp_path, changes, where):
    long = [passage(key, title, "w " * (30 + 2 * n)) for n, (key, title, _) in enumerate(CORPUS)]
    folder = write(tmp_path, {"corpus.jsonl": long})
    assert examine(folder).verdict() == "ok"
    report = examine(folder, **changes)
    (found,) = report.findings
    (row,) = (row for row in report.lengths if where == f"{row.name} tokens")
    assert (found.kind, found.where) == ("warning", where)
    assert f"shortens {row.cut:.1%} of the inputs and takes {row.lost:.1%}" in found.what
    assert f"raise config.{next(iter(changes))}" in found.what


def test_a_sample_is_fair(monkeypatch):
    monkeypatch.setattr(doctor_checks, "SAMPLED", 5)
    counts = np.zeros(20)
    for seed in range(2000):
        sample = doctor_checks.Sample(seed)
        for item in range(20):
            sample.add(item)
        assert len(set(sample.items)) == 5
        counts[sample.items] += 1
    # Each is drawn in a quarter of the cases; the standard deviation is 19.
    np.testing.assert_allclose(counts, 500, atol=5 * 19.4)
    few = doctor_checks.Sample(0)
    for item in range(4):
        few.add(item)
    assert few.items == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 8)), st.lists(st.integers(0, 12)))
def test_hashes_find_rows_and_repeats(texts, wanted):
    hashes = doctor_checks.Hashes()
    for row, text in enumerate(texts):
        hashes.add(str(row), str(text))
    expected = [int(key) if key < len(texts) else -1 for key in wanted]
    ids_M = np.array([hash(str(key)) for key in wanted], np.int64)
    assert hashes.rows(ids_M).tolist() == expected
    last = {}
    repeats = []
    for row, text in enumerate(texts):
        if text in last:
            repeats.append((row, last[text]))
        last[text] = row
    assert list(map(tuple, doctor_checks.repeats(hashes.texts_N).T.tolist())) == repeats


@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.lists(st.integers(0, 11), min_size=3, max_size=3)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=40)
def test_lists_are_counted_as_by_hand(tmp_path_factory, lists, at_once):
    folder = tmp_path_factory.mktemp("doctor")
    lines = [line for number, rows in lists for line in given_list(number, *rows)]
    folder = write(folder, {"lists.tsv": lines})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor_checks, "LISTS_AT_ONCE", at_once)
        report = examine(folder, lists=True, **{"joint.list_size": 3})
    known = {(i, i) for i in range(12)} | {(number, rows[0]) for number, rows in lists}
    repeated = sum(len(set(rows)) < 3 for _, rows in lists)
    doubtful = sum(any((n, row) in known for row in rows[1:]) for n, rows in lists)
    found = [f.what for f in report.findings if f.where == "joint lists" and f.kind == "warning"]
    expected = [(repeated, "hold a passage twice"), (doubtful, "have a known positive")]
    assert len(found) == sum(count > 0 for count, _ in expected)
    for count, what in expected:
        assert not count or any(f"{count} of {len(lists)} lists" in f and what in f for f in found)


def test_the_report_ends_with_the_verdict():
    def report(*kinds):
        found = [doctor_checks.Finding(kind, f"stream {i}", "what") for i, kind in enumerate(kinds)]
        sizes = needs.Sizes(0, 0.0, {}, 0.0, {})
        return doctor_checks.Report("name", [], (0, 0), [], found, sizes)

    for kinds, verdict in (
        ((), "ok"),
        (("note",), "ok"),
        (("note", "warning"), "usable, with 1 warning"),
        (("warning", "warning"), "usable, with 2 warnings"),
        (("warning", "error"), "not usable: 1 error"),
        (("error", "note", "error"), "not usable: 2 errors"),
    ):
        lines = doctor_checks.render(report(*kinds)).splitlines()
        assert lines[-1] == report(*kinds).verdict() == verdict
        shown = [line.split()[0] for line in lines if ": what" in line]
        assert shown == sorted(kinds, key=["error", "warning", "note"].index)


def test_the_table_is_aligned(tmp_path):
    lines = doctor_checks.render(examine(write(tmp_path))).splitlines()
    table = lines[lines.index("") :]
    head = next(line for line in table if line.startswith("tokens"))
    rows = [line for line in table if line.startswith(("query ", "title ", "passage ", "pair "))]
    assert len(rows) == 4
    assert {len(row) for row in rows} == {len(head), len(head) - 25}
    for name in ("min", "median", "mean", "90%", "99%", "max", "limit"):
        end = head.index(name) + len(name)
        assert all(row[end - 1] != " " and row[end : end + 1] in (" ", "") for row in rows)


def test_no_devices_are_needed_and_nothing_is_written(tmp_path, bert_folder):
    config = tiny_config(write_beir(tmp_path / "data"), bert_folder)
    # More than there are.
    config.mesh.data = 4096
    for usable in (True, False):
        report, _ = doctor.examine_config(config)
        last = doctor_checks.render(report).splitlines()[-1]
        assert report.usable() == usable
        assert last == ("ok" if usable else "not usable: 1 error")
        with (tmp_path / "data" / "qrels" / "test.tsv").open("a") as file:
            file.write("q40\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    config.data.passage_length = 1000
    with pytest.raises(InputError, match="1000 tokens"):
        doctor.examine_config(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of --config and --workdir"),
        (["--config=configs/beir.py", "--workdir=w"], "give exactly one of --config and --workdir"),
        (["--config=configs/beir.py", "--labels=full"], "--labels goes with --workdir"),
        (["--config=configs/beir.py", "--samples=5"], "--samples goes with --workdir"),
        (["--workdir=w", "--force"], "--force goes with --config"),
        (["--workdir=w", "--disk=."], "--disk goes with --config"),
        (["--config=configs/none.py"], "No such file or directory: 'configs/none.py'"),
        (["--config=configs/ablations.py:beir,deep"], "configs/ablations.py, line "),
        (["--config=configs/ablations.py:beir,deep"], "no preset 'beir,deep'; choose of"),
        (["--config=configs/nq.py:huge"], "configs/nq.py, line "),
    ],
)
def test_wrong_flags_are_one_line(arguments, message):
    ended = run_program("rqv2_jax.check", *arguments)
    assert ended.returncode in (1, 2)
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert message in ended.stderr
    assert not ended.stdout


def test_the_program_prints_the_report(tmp_path):
    folder = write(tmp_path)
    arguments = ["--config=configs/beir.py", f"--config.data.path={folder}"]
    arguments += ["--config.retriever.epochs=0", "--config.reranker.batch=17"]
    ended = run_program("rqv2_jax.check", *arguments)
    assert ended.returncode == 1, ended.stderr
    assert "\nerror    reranker stage: 16 lists in 2 epochs, fewer than" in ended.stdout
    assert ended.stdout.endswith("\n\nnot usable: 1 error\n")
