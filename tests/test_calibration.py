import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rqv2_jax.data.calibration import calibrate, fit_probability, relevance
from rqv2_jax.data.lists import Candidates

SHARE = 0.2


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def negative_log_likelihood(slope, offset, scores_N, relevant_N):
    """Platt's, with his smoothed targets (Platt 1999, equation 2.2.1)."""
    positives, negatives = relevant_N.sum(), (~relevant_N).sum()
    target_N = np.where(relevant_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    logit_N = slope * scores_N.astype(np.float64) + offset
    return np.sum(np.logaddexp(0, logit_N) - target_N * logit_N)


def assert_most_likely(scores_N, relevant_N):
    fitted = fit_probability(scores_N, relevant_N)
    assert all(isinstance(x, float) and np.isfinite(x) for x in fitted)
    mean, scale = float(scores_N.mean(dtype=np.float64)), max(float(scores_N.std()), 1e-6)

    def loss(w):
        slope = w[0] / scale
        return negative_log_likelihood(slope, w[1] - slope * mean, scores_N, relevant_N)

    best = scipy.optimize.minimize(loss, np.zeros(2), method="BFGS").fun
    assert negative_log_likelihood(*fitted, scores_N, relevant_N) <= best + 1e-5 * (1 + best)
    return fitted


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 400),
    st.sampled_from([0.003, 0.05, 0.5, 0.95]),
    st.sampled_from([-2.0, 0.0, 1.0, 4.0, 15.0, 40.0]),
    st.sampled_from([0.01, 1.0, 10.0]),
    st.sampled_from([-30.0, 0.0, 7.0]),
)
@settings(deadline=None, max_examples=100)
# Separated by ten standard deviations, one relevant of a thousand: a whole Newton step overshoots.
@example(0, 1000, 0.001, 10.0, 1.0, 0.0)
@example(1, 400, 0.05, 40.0, 10.0, -30.0)
def test_the_probability_is_the_most_likely(seed, count, share, gap, spread, offset):
    rng = np.random.default_rng(seed)
    relevant_N = np.arange(count) < max(1, round(share * count))
    scores_N = (rng.normal(size=count) + gap * relevant_N) * spread + offset
    assert_most_likely(scores_N.astype(np.float32), relevant_N)


def test_the_fit_beats_a_brute_force_search():
    rng = np.random.default_rng(0)
    relevant_N = rng.random(300) < 0.2
    scores_N = (2 * rng.normal(size=300) + 3 * relevant_N).astype(np.float32)
    slope, offset = fit_probability(scores_N, relevant_N)
    grid = itertools.product(np.linspace(0, 2, 81), np.linspace(-6, 2, 81))
    best = min(grid, key=lambda w: negative_log_likelihood(*w, scores_N, relevant_N))
    assert abs(slope - best[0]) < 0.03
    assert abs(offset - best[1]) < 0.11


@pytest.mark.parametrize("gap", [0.5, 3, 10, 30, 300])
@pytest.mark.parametrize("positives", [1, 10, 450])
def test_higher_scores_are_likelier_however_well_separated(gap, positives):
    rng = np.random.default_rng(positives)
    relevant_N = np.arange(2000) < positives
    scores_N = rng.normal(size=2000).astype(np.float32)
    scores_N[relevant_N] += gap + scores_N[~relevant_N].mean() - scores_N[relevant_N].mean()
    slope, offset = assert_most_likely(scores_N, relevant_N)
    assert slope > 0
    if gap >= 30:
        p_N = sigmoid(slope * scores_N + offset)
        # The smoothed targets, and not 0 and 1, are what a perfect re-ranker is fitted to.
        assert abs(p_N[relevant_N].mean() - (positives + 1) / (positives + 2)) < 0.02
        assert abs(p_N[~relevant_N].mean() - 1 / (2000 - positives + 2)) < 0.001
    slope_down, offset_down = fit_probability(-scores_N, relevant_N)
    np.testing.assert_allclose([slope_down, offset_down], [-slope, offset], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("times", [1, 3, 20])
def test_probabilities_do_not_depend_on_how_many_candidates_are_irrelevant(times):
    rng = np.random.default_rng(times)
    few, many = rng.normal(2, 1, 4000), rng.normal(0, 1, 4000 * times)
    scores_N = np.concatenate([few, many]).astype(np.float32)
    found = calibrate(scores_N, np.arange(len(scores_N)) < len(few), SHARE)
    # Two normal distributions two apart: the likelihood ratio is exp(2 x - 2).
    x = np.linspace(-2, 4, 7)
    odds = np.exp(2 * x - 2) * SHARE / (1 - SHARE)
    np.testing.assert_allclose(relevance(x, found), odds / (1 + odds), atol=0.02)


def test_a_reranker_that_is_wrong_or_untested_is_not_believed():
    rng = np.random.default_rng(0)
    scores_N, relevant_N = rng.normal(size=200).astype(np.float32), np.arange(200) < 20
    scores_N[relevant_N] -= 3
    for labels_N in (relevant_N, np.zeros(200, bool)):
        slope, offset = calibrate(scores_N, labels_N, SHARE)
        assert slope == pytest.approx(0, abs=1e-6)
        assert sigmoid(offset) == pytest.approx(SHARE)


@pytest.mark.parametrize("relevant", [0, 3, 10])
def test_scores_that_are_all_the_same_give_the_prior(relevant):
    relevant_N = np.arange(10) < relevant
    scores_N = np.full(10, 4.0, np.float32)
    slope, offset = fit_probability(scores_N, relevant_N)
    target = (relevant * (relevant + 1) / (relevant + 2) + (10 - relevant) / (12 - relevant)) / 10
    assert abs(sigmoid(slope * 4.0 + offset) - target) < 1e-3


def offset_scores(queries, depth, *, spread, seed):
    """Candidates whose scores have an offset for each query, one or two in front relevant [Q, N].

    Relevant passages score 3 higher than others, whose deviation is 1.
    """
    rng = np.random.default_rng(seed)
    relevant_QxN = np.zeros((queries, depth), bool)
    relevant_QxN[:, 0] = True
    relevant_QxN[: queries // 2, 1] = True
    scores_QxN = rng.normal(size=(queries, depth)) + 3 * relevant_QxN
    scores_QxN += spread * rng.normal(size=(queries, 1))
    rows_QxN = np.tile(np.arange(depth), (queries, 1))
    unused_QxN = np.zeros((queries, depth), np.float32)
    found = Candidates(np.arange(queries), rows_QxN, unused_QxN, scores_QxN.astype(np.float32))
    return found, relevant_QxN


def auc(scores_N, relevant_N):
    ranks_N = scipy.stats.rankdata(scores_N)
    positives, negatives = relevant_N.sum(), (~relevant_N).sum()
    return (ranks_N[relevant_N].sum() - positives * (positives + 1) / 2) / (positives * negatives)


def measured(judged, to_calibrate, depth):
    """AUC, and the share of relevant and of other candidates with a probability above .9."""
    found, relevant_QxN = judged
    fitted, labels_QxN = to_calibrate
    if depth:
        found, fitted = found.centred(depth), fitted.centred(depth)
    line = calibrate(fitted.reranker_QxN.reshape(-1), labels_QxN.reshape(-1), SHARE)
    p_QxN = relevance(found.reranker_QxN, line)
    sure = [(p_QxN[which] > 0.9).mean() for which in (relevant_QxN, ~relevant_QxN)]
    return auc(p_QxN.reshape(-1), relevant_QxN.reshape(-1)), *sure


def test_scores_less_their_querys_mean_tell_relevant_passages_apart():
    """Listwise training leaves each query's scores an offset; train and dev differ in depth."""
    train, dev = (offset_scores(400, n, spread=2.5, seed=n) for n in (40, 20))
    raw, centred = measured(train, dev, 0), measured(train, dev, 20)
    none = measured(*(offset_scores(400, n, spread=0.0, seed=n) for n in (40, 20)), 0)
    assert raw[0] < 0.9 < 0.96 < centred[0]
    assert centred[0] == pytest.approx(none[0], abs=0.01)
    # Nothing is certain of the raw scores; of the others most that is relevant.
    assert raw[1] < 0.2 < 0.5 < centred[1]
    assert centred[1:] == pytest.approx(none[1:], abs=0.06)
    assert centred[2] < 0.01


def test_the_mean_is_that_of_the_scored_among_the_first():
    nan = np.nan
    scores = np.array([[1, 3, 8, nan], [nan, 4, nan, 6], [nan, nan, nan, nan]], np.float32)
    found = Candidates(np.arange(3), np.zeros((3, 4), int), scores, scores).centred(2)
    expected = np.array([[-1, 1, 6, nan], [nan, 0, nan, 2], [nan] * 4], np.float32)
    np.testing.assert_array_equal(found.reranker_QxN, expected)
    assert found.reranker_QxN.dtype == np.float32
    np.testing.assert_array_equal(found.retriever_QxN, scores)


def test_a_probability_stays_what_the_assumed_share_makes_it():
    found, relevant_QxN = offset_scores(300, 20, spread=0.0, seed=1)
    scored = found.reranker_QxN.reshape(-1), relevant_QxN.reshape(-1)
    low, high = (calibrate(*scored, share) for share in (0.1, 0.5))
    assert low[0] == high[0]
    assert high[1] - low[1] == pytest.approx(np.log(9))
