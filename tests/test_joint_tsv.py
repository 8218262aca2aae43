import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqv2_jax.data import collection
from rqv2_jax.data.lists import Lists, Provenance
from rqv2_jax.data.readers import joint_tsv
from rqv2_jax.errors import InputError

LINES = [
    "who wrote it\ta book\tIt was written by her.\t1",
    "who wrote it\t\tNobody knows.\t0",
    "when\ta book\tIn June.\t1",
    "when\ta book\tIt was written by her.\t0",
    "who wrote it\tanother\tShe did.\t1",
    "who wrote it\t\tNobody knows.\t0",
]


def file_of(tmp_path, lines, name="lists.tsv"):
    path = tmp_path / name
    text = "".join(f"{line}\n" for line in lines)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["lists.tsv", "lists.tsv.gz"])
def test_texts_and_lists_of_a_file(tmp_path, name):
    texts, lists = joint_tsv.read(file_of(tmp_path, LINES, name), 2)
    assert [(p.id, p.title, p.text) for p in texts.passages()] == [
        ("0", "a book", "It was written by her."),
        ("1", "", "Nobody knows."),
        ("2", "a book", "In June."),
        ("3", "another", "She did."),
    ]
    assert [(q.id, q.text) for q in texts.queries("train")] == [
        ("0", "who wrote it"),
        ("1", "when"),
    ]
    labels = [(q.query_id, q.passage_id, q.relevance) for q in texts.qrels("train")]
    assert labels == [("0", "0", 1), ("1", "2", 1), ("0", "3", 1)]
    assert texts.splits == ("train",)
    assert lists.query_rows_L.tolist() == [0, 1, 0]
    assert lists.passages_LxP.tolist() == [[0, 1], [2, 0], [3, 1]]
    assert lists.positive().tolist() == [[True, False]] * 3
    assert (lists.provenance_LxP[:, 1] == Provenance.GIVEN_NEGATIVE).all()


def test_the_fingerprint_is_that_of_content_and_list_size(tmp_path):
    path = file_of(tmp_path, LINES)
    prints = {joint_tsv.read(path, 2)[0].fingerprint}
    assert {joint_tsv.read(path, 2)[0].fingerprint} == prints
    prints.add(joint_tsv.read(file_of(tmp_path, LINES[:4]), 2)[0].fingerprint)
    one_query = [LINES[0], LINES[1], LINES[5], LINES[1]]
    prints |= {joint_tsv.read(file_of(tmp_path, one_query), 4)[0].fingerprint}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:5], r"lists\.tsv: the last list, from line 5, has 1 of 2 lines; .*list_size"),
        (lambda x: [*x[:3], x[3].replace("when", "where"), *x[4:]], r"lists\.tsv:4: another query"),
        (lambda x: [x[1], x[0], *x[2:]], r"lists\.tsv:1: label 0 in place 1"),
        (lambda x: [x[0], x[1][:-1] + "1", *x[2:]], r"lists\.tsv:2: label 1 in place 2"),
        (lambda x: [x[0], x[1][:-1] + "2", *x[2:]], r"lists\.tsv:2: label '2'"),
        (lambda x: [x[0], x[1] + "\t", *x[2:]], r"lists\.tsv:2: 5 tab-separated columns"),
        (lambda x: ["query\ttitle\tpara\tlabel", *x], r"lists\.tsv:1: label 'label'"),
        (lambda x: [f"\t{line.split(chr(9), 1)[1]}" for line in x], "holds no lists"),
        (lambda x: [], r"lists\.tsv: holds no lists"),
    ],
)
def test_bad_files_are_one_line_with_the_place(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as e:
        joint_tsv.read(file_of(tmp_path, change(LINES)), 2)
    assert "\n" not in str(e.value)


def test_a_para_may_be_empty_and_a_list_without_a_query_is_left_out(tmp_path):
    lines = [" \t\tNobody asked.\t1", " \ta book\tIn June.\t0", *LINES]
    lines[3] = "who wrote it\tStone garden\t\t0"
    texts, lists = joint_tsv.read(file_of(tmp_path, lines), 2)
    passages = [(p.title, p.text) for p in texts.passages()]
    assert passages[:2] == [("a book", "It was written by her."), ("Stone garden", "")]
    assert ("", "Nobody asked.") not in passages
    assert [q.text for q in texts.queries("train")] == ["who wrote it", "when"]
    assert lists.query_rows_L.tolist() == [0, 1, 0]
    assert texts.remarks == (
        f"1 lists have no query; left out (first: {tmp_path / 'lists.tsv'}:1)",
    )


def test_a_negative_label_is_not_relevant(tmp_path):
    lines = [line[:-1] + "-1" if line.endswith("0") else line for line in LINES]
    _, lists = joint_tsv.read(file_of(tmp_path, lines), 2)
    assert lists.positive().tolist() == [[True, False]] * 3


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.tsv: no such file"):
        joint_tsv.read(tmp_path / "nowhere.tsv", 2)


# Any characters, line ends and tabs among them, which the format cannot hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
WORDS = TEXT.map(lambda text: f"w{text}")


@given(
    st.lists(WORDS, min_size=2, max_size=4, unique_by=lambda x: " ".join(x.split())),
    st.lists(
        st.tuples(st.one_of(st.just(""), TEXT), WORDS),
        min_size=4,
        max_size=8,
        unique_by=lambda x: (" ".join(x[0].split()), " ".join(x[1].split())),
    ),
    st.integers(2, 4),
    st.booleans(),
    st.data(),
)
@settings(deadline=None, max_examples=100)
def test_written_lists_are_read_again(tmp_path_factory, queries, passages, size, zipped, data):
    texts = collection.Collection(
        name="texts",
        fingerprint="",
        splits=("train",),
        passages=lambda: (collection.Passage(str(i), *p) for i, p in enumerate(passages)),
        queries=lambda split: (collection.Query(str(i), q, ()) for i, q in enumerate(queries)),
        qrels=lambda split: iter(()),
    )
    rows = st.lists(st.integers(0, len(passages) - 1), min_size=size, max_size=size, unique=True)
    drawn = data.draw(
        st.lists(st.tuples(st.integers(0, len(queries) - 1), rows), min_size=1, max_size=6)
    )
    provenance_LxP = np.full((len(drawn), size), Provenance.UNDENOISED_NEGATIVE)
    provenance_LxP[:, 0] = Provenance.DENOISED_POSITIVE
    lists = Lists(np.array([q for q, _ in drawn]), np.array([p for _, p in drawn]), provenance_LxP)
    path = tmp_path_factory.mktemp("tsv") / ("lists.tsv.gz" if zipped else "lists.tsv")
    joint_tsv.write(path, lists, texts)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    back, again = joint_tsv.read(path, size)
    found_passages = [(p.title, p.text) for p in back.passages()]
    found_queries = [q.text for q in back.queries("train")]

    def plain(text):
        return " ".join(text.split())

    assert [found_queries[row] for row in again.query_rows_L] == [
        plain(queries[q]) for q, _ in drawn
    ]
    assert [[found_passages[row] for row in rows] for rows in again.passages_LxP] == [
        [(plain(passages[p][0]), plain(passages[p][1])) for p in rows] for _, rows in drawn
    ]
    assert again.positive().tolist() == lists.positive().tolist()
