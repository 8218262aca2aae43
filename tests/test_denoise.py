import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rqv2_jax.data import denoise
from rqv2_jax.data.lists import Candidates

# Probabilities 0.119, 0.5 and 0.881 for scores of -2, 0 and 2.
IDENTITY = (1.0, 0.0)
BY = {"probability": "calibrated", "calibrate": "raw", "relevant_share": 0.2}
SCORES = np.array([[2, 0, -2, -2], [2, 2, -2, np.nan], [np.nan] * 4], np.float32)
PASSAGES = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]])
CANDIDATES = Candidates(np.array([5, 3, 8]), PASSAGES, np.zeros((3, 4), np.float32), SCORES)
# Query 5 has passage 0, query 3 has 9 (not retrieved); fuller labels add (5, 2) and (3, 5).
LABELS = np.array([[5, 3], [0, 9]])
FULLER = np.array([[5, 3, 5, 3], [0, 9, 2, 5]])


def table(fuller_2xN=None, chosen=(0.2, 0.8)):
    report = denoise.table(CANDIDATES, LABELS, IDENTITY, 20, chosen=chosen, fuller_2xN=fuller_2xN)
    return {**report, "dev": {"candidates": 30, "labelled": 4}, "by": BY}


def test_counts_by_hand():
    report = table()
    assert (report["queries"], report["labelled"], report["unlabelled"]) == (2, 1, 6)
    assert "hidden" not in report
    negatives = {row["below"]: row for row in report["negatives"]}
    assert negatives[0.1] == {"below": 0.1, "kept": 0, "dropped": 6}
    assert negatives[0.2] == {"below": 0.2, "kept": 3, "dropped": 3}
    assert negatives[0.5] == {"below": 0.5, "kept": 3, "dropped": 3}, "thresholds are strict"
    positives = {row["above"]: row for row in report["positives"]}
    assert positives[0.5] == {"above": 0.5, "kept": 2, "dropped": 4}
    assert positives[0.8] == {"above": 0.8, "kept": 2, "dropped": 4}
    assert positives[0.9] == {"above": 0.9, "kept": 0, "dropped": 6}


def test_precision_and_recall_by_hand():
    report = table(FULLER)
    assert report["hidden"] == 2
    negatives = {row["below"]: row for row in report["negatives"]}
    # Of the three scored -2, passage 2 of query 5 is relevant after all; four of six are not.
    assert (negatives[0.2]["precision"], negatives[0.2]["recall"]) == (2 / 3, 2 / 4)
    positives = {row["above"]: row for row in report["positives"]}
    # Of the two scored 2, passage 5 of query 3 is relevant, one of two hidden ones.
    assert (positives[0.8]["precision"], positives[0.8]["recall"]) == (1 / 2, 1 / 2)
    # Of none, no share is right.
    assert (positives[0.99]["precision"], positives[0.99]["recall"]) == (None, 0)


def test_histogram_counts_every_scored_candidate():
    histogram = table(FULLER)["histogram"]
    assert len(histogram["edges"]) == denoise.BINS + 1
    assert (histogram["edges"][0], histogram["edges"][-1]) == (-2, 2)
    assert (histogram["labelled"][-1], sum(histogram["labelled"])) == (1, 1)
    assert (histogram["unlabelled"][0], sum(histogram["unlabelled"])) == (3, 6)
    assert (histogram["hidden"][0], histogram["hidden"][-1]) == (1, 1)


def test_chosen_thresholds_are_marked():
    text = denoise.render(table(FULLER, chosen=(0.123, 0.5)))
    starred = [line.split() for line in text.splitlines() if "*" in line and "#" not in line]
    assert [line[0] for line in starred] == ["0.123*", "0.500*"]
    assert "2 of them relevant by the fuller labels" in text
    assert "precision" not in denoise.render(table())
    assert "sigmoid(1.000 score +0.000), from 30 dev candidates, of which 4 are labelled" in text
    assert "of unlabelled candidates: 0.119 to 0.881" in text
    (empty,) = (line for line in text.splitlines() if line.split()[:1] == ["0.990"])
    assert empty.split() == ["0.990", "0", "6", "-", "0.000"]
    assert "train it longer" not in text
    flat = denoise.table(CANDIDATES, LABELS, (0.0, -1.4), 20, chosen=(0.1, 0.9))
    assert "train it longer" in denoise.render(
        {**flat, "dev": {"candidates": 30, "labelled": 0}, "by": BY}
    )


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 0.99)),
    st.integers(0, 30),
)
@settings(deadline=None, max_examples=100)
def test_untrusted_candidates_are_likely_and_unlabelled(seed, chosen, count):
    rng = np.random.default_rng(seed)
    passages_QxN = np.stack([rng.permutation(30)[:8] for _ in range(6)])
    scores_QxN = rng.normal(scale=3, size=(6, 8)).astype(np.float32)
    scores_QxN[rng.random((6, 8)) < 0.2] = np.nan
    candidates = Candidates(rng.permutation(9)[:6], passages_QxN, scores_QxN, scores_QxN)
    labels_2xN = np.stack([rng.integers(0, 9, 40), rng.integers(0, 30, 40)])
    probability = (0.7, -0.3)
    known = (candidates, labels_2xN, probability, 30)
    rows = denoise.rejected(*known, negative_below=chosen[0], count=count, seed=1)
    labelled = set(map(tuple, labels_2xN.T.tolist()))
    every = {}
    for query, passages, scores in zip(candidates.query_rows_Q, passages_QxN, scores_QxN):
        for passage, score in zip(passages, scores.astype(np.float64)):
            p = 1 / (1 + np.exp(-(0.7 * score - 0.3)))
            if not np.isnan(p) and (query, passage) not in labelled and p >= chosen[0]:
                every[int(query), int(passage)] = p
    assert len(rows) == min(count, len(every))
    for query, passage, p in rows:
        assert p == pytest.approx(every[query, passage])
    assert [p for *_, p in rows] == sorted((p for *_, p in rows), reverse=True)
    # The report drops as many at the same threshold.
    report = denoise.table(*known, chosen=chosen)
    (row,) = (row for row in report["negatives"] if row["below"] == chosen[0])
    assert row["dropped"] == len(every)
