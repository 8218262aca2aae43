"""Topics: both formats, and what is refused."""

import gzip
import json

import pytest

from rqv2_jax.data.collection import Left, Query
from rqv2_jax.data.readers.topics import asked, topics
from rqv2_jax.errors import InputError

# The layout of topics 301 to 450, of 51 to 100, and of collections that close their tags.
TREC = """\

<top>

<num> Number: 301
<title> International Organized Crime

<desc> Description:
Identify organizations that participate in international
criminal activity.

<narr> Narrative:
A relevant document must name the organization. <title> inside a line is text.

</top>

<top>
<head> Tipster Topic Description
<num> Number:  051
<dom> Domain:  International Economics
<title> Topic:  Airbus
Subsidies
<desc> Description:
none
</top>
<top>
<num>MB7</num>
<title>
a title below its tag
</title>
</top>
"""
EXPECTED = [
    Query("301", "International Organized Crime", ()),
    Query("051", "Airbus Subsidies", ()),
    Query("MB7", "a title below its tag", ()),
]


def test_classic_topics(tmp_path):
    (tmp_path / "topics.301-450").write_text(TREC)
    assert list(topics(tmp_path / "topics.301-450")) == EXPECTED
    (tmp_path / "topics.gz").write_bytes(gzip.compress(TREC.replace("\n", "\r\n").encode()))
    assert list(topics(tmp_path / "topics.gz")) == EXPECTED


def test_tab_separated(tmp_path):
    file = tmp_path / "msmarco-test2019-queries.tsv"
    file.write_text("1108939\twhat slows down the flow of blood\n\n1112389\tIllinois' county\n")
    assert list(topics(file)) == [
        Query("1108939", "what slows down the flow of blood", ()),
        Query("1112389", "Illinois' county", ()),
    ]


def test_queries_of_beir_and_of_tevatron(tmp_path):
    file = tmp_path / "queries.jsonl"
    rows = [
        {"_id": "q1", "text": 'what is "query_id"?', "metadata": {}},
        {"_id": "q2", "text": "two", "answers": ["x"]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [Query("q1", rows[0]["text"], ()), Query("q2", "two", ())]
    assert list(topics(file)) == expected
    (tmp_path / "queries.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert list(topics(tmp_path / "queries.jsonl.gz")) == expected
    for name in ("query", "query_text", "text"):
        file.write_text(
            "".join(json.dumps({"query_id": q.id, name: q.text}) + "\n" for q in expected)
        )
        assert list(topics(file)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "1\ta\n2\t\n3\t \n",
        '{"_id": "1", "text": "a"}\n{"_id": "2", "text": ""}\n{"_id": "3", "text": null}\n',
        "".join(
            f"<top>\n<num> {n}\n<title> {t}\n</top>\n" for n, t in ((1, "a"), (2, ""), (3, ""))
        ),
    ],
    ids=["table", "JSON", "TREC"],
)
def test_queries_without_text_are_left_out_and_counted(tmp_path, text):
    (tmp_path / "topics").write_text(text)
    left = Left()
    assert asked(topics(tmp_path / "topics"), left) == [Query("1", "a", ())]
    assert left.lines() == ["2 queries have no text; left out (first: 2)"]


TOPIC = "<top>\n<num> Number: 1\n<title> a\n</top>\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"_id": "1"}\n', ":1: query without `text`"),
        ('{"id": "1", "text": "a"}\n', ":1: `_id` is missing"),
        ('{"query_id": "1", "title": "a"}\n', ":1: query without `text`"),
        ("{\n", ":1: not JSON"),
        ("1 what\n", ":1: 1 tab-separated columns instead of 2"),
        ("1\ta\n1\tb\n", ":2: duplicate id '1'"),
        (TOPIC + TOPIC, ":5: duplicate id '1'"),
        ("1 a\tb\n", ":1: id '1 a' has white space"),
        (TOPIC.replace("1", "1 2"), ":1: id '1 2' has white space"),
        (TOPIC.replace("<title> a\n", "<desc> a\n"), ":1: topic without <title>"),
        (TOPIC.replace("<num> Number: 1\n", ""), ":1: topic without <num>"),
        (TOPIC.replace("</top>\n", ""), ":1: this topic has no end"),
        (TOPIC.replace("</top>\n", "") + TOPIC, ":4: line 1 begins a topic"),
        (TOPIC + "<num> Number: 2\n", ":5: no topic begins before it"),
    ],
)
def test_bad_files_are_one_line_with_the_place(tmp_path, text, message):
    (tmp_path / "topics").write_text(text)
    with pytest.raises(InputError) as raised:
        list(topics(tmp_path / "topics"))
    assert f"{tmp_path / 'topics'}{message}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(topics(tmp_path / "topics"))
