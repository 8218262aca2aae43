"""Queries that are passages under their own ids: which are found, and that nothing counts them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batches import batches_of, world

from rqv2_jax.data import own_texts
from rqv2_jax.data.drawing import Denoising, draw
from rqv2_jax.data.lists import Candidates
from rqv2_jax.data.tokens import Queries, Store, Texts


def texts(*rows):
    tokens = [token for row in rows for token in row]
    return Texts(np.array(tokens, np.int64), np.cumsum([0, *map(len, rows)]))


PASSAGES = {"q1": [1, 2], "a": [7], "q0": [3], "7": [4, 5]}


def store(**titles):
    return Store(
        titles=texts(*(titles.get(key, []) for key in PASSAGES)),
        texts=texts(*PASSAGES.values()),
        passage_ids=list(PASSAGES),
        splits={},
        fingerprint="",
    )


def queries(asked, labels=()):
    qrels_3xN = np.array(labels, np.int64).reshape(-1, 3).T
    return Queries(texts(*asked.values()), list(asked), qrels_3xN)


# As in ArguAna and Quora.
THEMSELVES = {"q0": [3], "q1": [1, 2], "q2": [9]}
# As in MS MARCO: numbers that are both by chance.
BY_CHANCE = {"q0": [8], "q1": [8, 8], "7": [4, 5]}


@pytest.mark.parametrize(
    ("mode", "asked", "pairs"),
    [
        ("auto", THEMSELVES, [(0, 2), (1, 0)]),
        ("auto", BY_CHANCE, []),
        ("auto", {"q2": [3]}, []),
        ("always", BY_CHANCE, [(0, 2), (1, 0), (2, 3)]),
        ("never", THEMSELVES, []),
    ],
)
def test_a_query_is_a_passage_by_id_and_text(mode, asked, pairs):
    found = own_texts.of_queries(store(), queries(asked), mode)
    assert list(map(tuple, found.own_2xN.T.tolist())) == pairs
    assert found.own_2xN.shape == (2, len(pairs))


def test_where_most_have_one_text_the_others_are_ignored_too():
    """A text that was cut or cleaned is the same."""
    asked = {"q0": [3], "q1": [1]}
    assert own_texts.of_queries(store(), queries(asked), "auto").own_2xN.tolist() == [
        [0, 1],
        [2, 0],
    ]


def test_a_query_may_be_title_and_text():
    asked = {"q1": [9, 1, 2]}
    assert not own_texts.of_queries(store(), queries(asked), "auto").own_2xN.size
    found = own_texts.of_queries(store(q1=[9]), queries(asked), "auto")
    assert found.own_2xN.tolist() == [[0], [0]]


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_what_is_labelled_relevant_is_not_ignored(mode):
    labelled = queries(THEMSELVES, [(0, 2, 1), (1, 0, 0)])
    found = own_texts.of_queries(store(), labelled, mode)
    assert found.own_2xN.tolist() == [[1], [0]]
    assert found.positives().tolist() == [[0], [2]]
    assert found.never_negative().tolist() == [[0, 1], [2, 0]]


def test_all_splits_are_marked_and_told():
    splits = {"train": queries(THEMSELVES), "dev": queries({"q9": [1]})}
    marked = own_texts.marked(dataclasses.replace(store(), splits=splits), "auto")
    assert marked.splits["train"].own_2xN.size
    (line,) = own_texts.remarks(marked)
    assert line.startswith("2 of 3 train queries stand in the corpus under their own id;")
    assert own_texts.of_rows(marked.splits["train"], np.array([2, 1, 0])).tolist() == [-1, 0, 2]


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(
            st.tuples(st.permutations(range(8)).map(lambda p: p[:k]), st.integers(-1, 7)),
            min_size=1,
            max_size=5,
        )
    )
)
def test_ignored_passages_go_and_all_queries_keep_as_many(rows):
    passages_QxK, own_Q = (np.array(x) for x in zip(*rows))
    scores_QxK = np.random.default_rng(0).random(passages_QxK.shape)
    found, scores = own_texts.without(passages_QxK, scores_QxK, own_Q)
    some = bool((own_Q >= 0).any())
    wanted = own_texts.deeper(passages_QxK.shape[1] - some, own_Q)
    assert wanted == passages_QxK.shape[1]
    for row, (ranked, own) in enumerate(rows):
        expected = [p for p in ranked if p != own][: len(ranked) - some]
        assert found[row].tolist() == expected
        place = [ranked.index(p) for p in expected]
        assert scores[row].tolist() == scores_QxK[row, place].tolist()


def test_padding_is_not_what_is_ignored():
    passages_QxK = np.array([[3, -1, -1], [4, 5, 6]])
    found, _ = own_texts.without(passages_QxK, passages_QxK * 1.0, np.array([-1, 4]))
    assert found.tolist() == [[3, -1], [5, 6]]


def test_they_never_fill_a_list():
    """Of five passages one is the positive, one a candidate and one the query itself."""
    rows_Q = np.zeros(1, np.int64)
    candidates = Candidates(
        rows_Q, np.array([[1]]), np.ones((1, 1), np.float32), np.full((1, 1), np.nan, np.float32)
    )
    for seed in range(20):
        lists = draw(
            candidates,
            np.array([[0], [0]]),
            np.array([[0], [4]]),
            list_size=4,
            denoising=Denoising(0.0, (1.0, 0.0), 0.1, 0.9),
            num_passages=5,
            seed=seed,
            epoch=0,
        )
        assert sorted(lists.passages_LxP[0].tolist()) == [0, 1, 2, 3]


def test_they_are_no_negatives_of_a_batch():
    tiny, asked, lists = world(passages_per_list=2, lists=8)
    other = (lists.query_rows_L[0], lists.passages_LxP[-1, 0])
    made = {}
    for name, pairs in (("plain", []), ("marked", [other])):
        own_2xN = np.array(pairs, np.int64).reshape(-1, 2).T
        marked = Queries(asked.texts, asked.ids, asked.qrels_3xN, own_2xN=own_2xN)
        batches = batches_of(tiny, marked, lists, batch=8, shards=1, in_batch=True)
        made[name] = batches.make(0)["in_batch_where"], batches.lists
    (plain, lists), (where, _) = made.values()
    changed = np.argwhere(plain != where)[:, 1:]
    queries_B = lists.query_rows_L[changed[:, 0]]
    passages_B = lists.passages_LxP.reshape(-1)[changed[:, 1]]
    assert len(changed)
    assert {*zip(queries_B.tolist(), passages_B.tolist())} == {tuple(map(int, other))}
