"""Metrics against closed forms and ir-measures; the tie rule; the paired test; TREC files."""

import gzip
import itertools
import math
import re

import ir_measures
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rqv2_jax.errors import InputError
from rqv2_jax.ranking import metrics, significance, trec

REPORTED = [
    "RR@10",
    "Success@5",
    "Success@20",
    "Success@50",
    "Success@100",
    "R@1000",
    "nDCG@10",
]
# No NUL, which ends a string in trec_eval, and nothing str.split takes for white space.
ID_CHARACTERS = st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"])
IDS = st.one_of(
    st.integers(0, 2000).map(str),
    st.integers(0, 99).map("d{:03}".format),
    st.text(ID_CHARACTERS, min_size=1, max_size=5),
    st.text("aAéz\uffff\U0001f600", min_size=1, max_size=3),
)
SCORES = st.sampled_from([0.0, -0.0, 0.5, 1.0, -3.0, 1.0 + 2.0**-23, -math.inf])


def as_qrels(*judgements: tuple[int, int, int]) -> metrics.Qrels:
    queries_N, passages_N, relevances_N = np.array(judgements, np.int64).reshape(-1, 3).T
    return queries_N, passages_N, relevances_N


@st.composite
def collections(draw):
    """Passage ids, a run with ties, padding anywhere and empty rows, and graded qrels."""
    passage_ids = draw(st.lists(IDS, min_size=1, max_size=12, unique=True))
    num_queries = draw(st.integers(1, 4))
    width = draw(st.integers(0, len(passage_ids)))
    passages_QxK = np.full((num_queries, width), -1)
    scores_QxK = np.full((num_queries, width), np.nan, np.float32)
    for query in range(num_queries):
        order = draw(st.permutations(range(len(passage_ids))))
        for column in range(width):
            if draw(st.integers(0, 4)):
                passages_QxK[query, column] = order[column]
                scores_QxK[query, column] = draw(SCORES)
    pairs = list(itertools.product(range(num_queries), range(len(passage_ids))))
    judged = draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=20, unique=True))
    grades = [draw(st.integers(1, 3)), *draw(st.lists(st.integers(-1, 3), max_size=19))]
    qrels = as_qrels(*((q, p, grade) for (q, p), grade in zip(judged, grades)))
    return passage_ids, passages_QxK, scores_QxK, qrels


def trec_values(passage_ids, passages_QxK, scores_QxK, qrels, names):
    """The same through pytrec_eval, whose tie rule is ours; RR@k by cutting its RR."""
    truth, run = {}, {}
    for query, passage, relevance in zip(*(array.tolist() for array in qrels)):
        truth.setdefault(f"q{query:05}", {})[passage_ids[passage]] = relevance
    for query, passage in np.argwhere(passages_QxK >= 0).tolist():
        passage_id = passage_ids[passages_QxK[query, passage]]
        run.setdefault(f"q{query:05}", {})[passage_id] = float(scores_QxK[query, passage])
    kept = sorted(q for q, grades in truth.items() if max(grades.values()) >= 1)
    values = {}
    for name in names:
        measure, k = name.split("@")
        asked = ir_measures.parse_measure(measure if measure.startswith("RR") else name)
        found = {
            m.query_id: m.value for m in ir_measures.pytrec_eval.iter_calc([asked], truth, run)
        }
        values_J = np.array([found[query] for query in kept])
        if measure.startswith("RR"):
            values_J = np.where(values_J >= 1 / int(k) - 1e-9, values_J, 0)
        values[name] = values_J
    return values


def assert_same_values(actual, expected):
    assert actual.keys() == expected.keys()
    for name, values_J in expected.items():
        np.testing.assert_allclose(actual[name], values_J, rtol=1e-9, atol=1e-12, err_msg=name)


def large_run(seed, *, levels):
    """7 queries, 1,200 of 1,500 passages each; scores on `levels` values, relevance 0 to 3."""
    rng = np.random.default_rng(seed)
    passage_ids = [str(number) for number in rng.permutation(100_000)[:1500]]
    passages_QxK = np.stack([rng.permutation(1500)[:1200] for _ in range(7)])
    scores_QxK = np.stack([rng.permutation(1200) * levels // 1200 for _ in range(7)])
    passages_QxK[5] = -1
    judgements = {(0, 1499): 1}
    for query, num_judged in enumerate([1, 2, 5, 10, 20, 30, 400]):
        for passage in rng.permutation(1500)[:num_judged].tolist():
            judgements[query, passage] = int(rng.integers(0, 4))
    qrels = as_qrels(*((*pair, relevance) for pair, relevance in judgements.items()))
    return passage_ids, passages_QxK, scores_QxK.astype(np.float32), qrels


# Measures.


def test_values_in_closed_form():
    # Query 0 has relevant passages at ranks 2 and 4 (grades 1 and 3) and one not retrieved (2);
    # query 1 nothing relevant in its results; query 2 no relevant passage; query 3 no results.
    passages_QxK = np.array([[5, 1, 6, 0], [5, 6, 7, -1], [0, 1, 2, 3], [-1, -1, -1, -1]])
    scores_QxK = np.array([[9, 8, 7, 6], [3, 2, 1, 0], [4, 3, 2, 1], [0, 0, 0, 0]], np.float32)
    qrels = as_qrels((0, 0, 3), (0, 1, 1), (0, 2, 2), (0, 5, -1), (1, 0, 1), (2, 0, 0), (3, 0, 1))
    values = metrics.evaluate(
        passages_QxK,
        scores_QxK,
        [f"d{row}" for row in range(8)],
        qrels,
        ["RR@1", "RR@2", "Success@1", "Success@2", "R@2", "R@4", "R@1000", "nDCG@2", "nDCG@4"],
    )
    assert metrics.judged_queries(qrels).tolist() == [0, 1, 3]
    ideal_2 = 3 + 2 / math.log2(3)
    ideal_4 = ideal_2 + 1 / math.log2(4)
    expected = {
        "RR@1": 0,
        "RR@2": 1 / 2,
        "Success@1": 0,
        "Success@2": 1,
        "R@2": 1 / 3,
        "R@4": 2 / 3,
        "R@1000": 2 / 3,
        "nDCG@2": 1 / math.log2(3) / ideal_2,
        "nDCG@4": (1 / math.log2(3) + 3 / math.log2(5)) / ideal_4,
    }
    assert_same_values(values, {name: np.array([value, 0, 0]) for name, value in expected.items()})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(collections(), st.integers(1, 6))
def test_agrees_with_trec_eval_on_ties_missing_queries_and_grades(collection, k):
    passage_ids, passages_QxK, scores_QxK, qrels = collection
    names = [*REPORTED, *(f"{measure}@{k}" for measure in ("RR", "Success", "R", "nDCG"))]
    values = metrics.evaluate(passages_QxK, scores_QxK, passage_ids, qrels, names)
    assert_same_values(
        values, trec_values(passage_ids, passages_QxK, scores_QxK, qrels, list(values))
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(collections(), st.integers(2, 3), st.integers(1, 6))
def test_least_relevance_agrees_with_ir_measures(collection, least, k):
    """As in the deep learning track; where a query's best grade is 1 it counts, as 0."""
    passage_ids, passages_QxK, scores_QxK, qrels = collection
    qrels[2][0] = least
    plain = ["RR@10", "R@1000", "Success@5", "nDCG@10", f"RR@{k}", f"R@{k}", f"Success@{k}"]
    names = metrics.at_relevance(plain, least)
    assert {f"RR(rel={least})@10", f"R(rel={least})@1000", "nDCG@10"} <= set(names)
    values = metrics.evaluate(passages_QxK, scores_QxK, passage_ids, qrels, names)
    assert_same_values(
        values, trec_values(passage_ids, passages_QxK, scores_QxK, qrels, list(values))
    )


def test_least_relevance_by_hand():
    run = np.array([[0, 1, 2], [0, 1, 2]]), np.array([[3, 2, 1], [3, 2, 1]]), ["a", "b", "c"]
    qrels = as_qrels((0, 0, 1), (0, 1, 2), (0, 2, 3), (0, 9, 2), (1, 1, 1))
    names = ("RR(rel=2)@10", "RR(rel=3)@10", "R(rel=2)@10", "Success(rel=3)@2", "RR(rel=1)@10")
    assert_same_values(
        metrics.evaluate(*run, qrels, names),
        {
            "RR(rel=2)@10": np.array([1 / 2, 0]),
            "RR(rel=3)@10": np.array([1 / 3, 0]),
            "R(rel=2)@10": np.array([2 / 3, 0]),
            "Success(rel=3)@2": np.array([0, 0]),
            "RR(rel=1)@10": np.array([1, 1 / 2]),
        },
    )
    with pytest.raises(
        InputError, match=r"RR\(rel=4\)@10: the labels hold no passage of relevance 4"
    ):
        metrics.evaluate(*run, qrels, ["RR(rel=4)@10"])


def test_names_say_the_least_relevance():
    names = ("RR@10", "R@1000", "Success(rel=3)@5", "nDCG@10")
    assert metrics.at_relevance(names, 1) == names
    assert metrics.at_relevance(names, 2) == (
        *("RR(rel=2)@10", "R(rel=2)@1000", "Success(rel=3)@5", "nDCG@10"),
    )


@pytest.mark.parametrize("levels", [1, 3, 40, 1200])
def test_agrees_with_trec_eval_on_long_runs(levels):
    passage_ids, passages_QxK, scores_QxK, qrels = large_run(levels, levels=levels)
    names = [*REPORTED, "R@20", "nDCG@100", "RR@100"]
    values = metrics.evaluate(passages_QxK, scores_QxK, passage_ids, qrels, names)
    assert_same_values(values, trec_values(passage_ids, passages_QxK, scores_QxK, qrels, names))
    assert 0 < values["R@1000"].mean() < 1


def test_run_file_gives_ir_measures_every_reported_value(tmp_path):
    """Through the file and the providers ir-measures chooses; for RR@k they agree without ties."""
    passage_ids, passages_QxK, scores_QxK, qrels = large_run(0, levels=1200)
    scores_QxK = scores_QxK / np.float32(7)
    query_ids = [f"q{row}" for row in range(7)]
    trec.write_run(tmp_path / "run.trec", query_ids, passage_ids, passages_QxK, scores_QxK, "test")
    values = metrics.evaluate(passages_QxK, scores_QxK, passage_ids, qrels, REPORTED)
    judged = {query_ids[row] for row in metrics.judged_queries(qrels)}
    truth = [
        ir_measures.Qrel(query_ids[query], passage_ids[passage], int(relevance))
        for query, passage, relevance in zip(*qrels)
        if query_ids[query] in judged
    ]
    means = ir_measures.calc_aggregate(
        [ir_measures.parse_measure(name) for name in REPORTED],
        truth,
        ir_measures.read_trec_run(str(tmp_path / "run.trec")),
    )
    assert {str(measure): value for measure, value in means.items()} == pytest.approx(
        {name: values_J.mean() for name, values_J in values.items()}
    )


def test_ir_measures_breaks_ties_the_other_way_for_rr_at_k_only():
    """The exception that the module docstring states."""
    truth, run = {"q": {"a": 1}}, {"q": {"a": 1.0, "b": 1.0}}
    asked = [ir_measures.RR @ 10, ir_measures.RR, ir_measures.Success @ 1]
    assert ir_measures.calc_aggregate(asked, truth, run) == dict(zip(asked, [1.0, 0.5, 0.0]))
    ours = metrics.evaluate(
        np.array([[0, 1]]),
        np.ones((1, 2), np.float32),
        ["a", "b"],
        as_qrels((0, 0, 1)),
        ["RR@10", "Success@1"],
    )
    assert_same_values(ours, {"RR@10": np.array([0.5]), "Success@1": np.array([0.0])})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_narrow_integer_qrels_give_the_same_values(dtype):
    passages_QxK, scores_QxK = np.array([[0, 1, 2]], np.int32), np.array([[1, 2, 3]], np.float32)
    qrels = as_qrels((0, 0, 3), (0, 1, 0), (0, 2, 2))
    arguments = passages_QxK, scores_QxK, ["a", "b", "c"]
    assert_same_values(
        metrics.evaluate(*arguments, tuple(array.astype(dtype) for array in qrels), REPORTED),
        metrics.evaluate(*arguments, qrels, REPORTED),
    )


def test_relevance_of_padding_is_not_the_previous_querys_last_passage():
    relevance_QxK = metrics.relevance_of(np.array([[0, -1], [-1, 1]]), as_qrels((0, 1, 2)))
    assert relevance_QxK.tolist() == [[0, 0], [0, 0]]
    relevance_QxK = metrics.relevance_of(
        np.array([[0, 7], [7, 3]]), as_qrels((0, 0, -2), (0, 7, 1), (1, 0, 3), (1, 3, 2))
    )
    assert relevance_QxK.tolist() == [[0, 1], [0, 2]]
    assert metrics.relevance_of(np.array([[0, -1]]), as_qrels()).tolist() == [[0, 0]]


def test_relevant_counts_and_ideal_gains_cover_every_query():
    qrels = as_qrels((2, 5, 1), (0, 1, 1), (0, 2, 3), (0, 3, 0), (1, 1, -1), (0, 9, 2))
    assert metrics.num_relevant(qrels, 4, 1).tolist() == [3, 0, 1, 0]
    assert metrics.num_relevant(qrels, 4, 2).tolist() == [2, 0, 0, 0]
    np.testing.assert_allclose(metrics.ideal_dcg(qrels, 4, 2), [3 + 2 / math.log2(3), 0, 1, 0])


@pytest.mark.parametrize(
    "name",
    [
        *("MRR@10", "RR", "RR@0", "RR@", "RR@1.5", "rr@10", "nDCG@10 ", "R@-1", "Recall@5"),
        *("nDCG(rel=2)@10", "RR(rel=0)@10", "RR(rel=2)", "R(rel=two)@5", "RR(rel=2)@10 "),
    ],
)
def test_unknown_metric_lists_the_known(name):
    with pytest.raises(InputError, match=r"known are RR@k, Success@k, R@k and nDCG@k") as error:
        metrics.evaluate(
            np.array([[0]]), np.zeros((1, 1)), ["a"], as_qrels((0, 0, 1)), ["RR@10", name]
        )
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (as_qrels(), "hold no relevant passage"),
        (as_qrels((0, 0, 0)), "hold no relevant passage"),
        (as_qrels((0, 0, 1), (1, 0, 0)), "judge query row 1 and the run has 1 rows"),
        (as_qrels((0, 3, 1), (0, 0, 1), (0, 3, 2)), "query row 0 with passage row 3 twice"),
    ],
)
def test_qrels_that_do_not_fit_the_run(qrels, message):
    with pytest.raises(InputError, match=message):
        metrics.evaluate(np.array([[0]]), np.zeros((1, 1)), ["a"], qrels, ["RR@10"])


# The tie rule.


def test_order_is_score_then_id_descending_then_padding():
    passage_ids = ["10", "9", "é", "z", "za", "Z"]
    passages_QxK = np.array([[0, 1, 2, 3, 4, 5], [-1, 0, -7, 5, 1, -1]])
    scores_QxK = np.array([[1, 1, 1, 1, 1, 2], [np.nan, -np.inf, np.inf, 0.0, -0.0, 5]], np.float32)
    passages_QxK, scores_QxK = metrics.sort_run(passages_QxK, scores_QxK, passage_ids)
    assert passages_QxK.tolist() == [[5, 2, 4, 3, 1, 0], [5, 1, 0, -1, -1, -1]]
    assert scores_QxK.dtype == np.float32
    assert scores_QxK.tolist() == [[2, 1, 1, 1, 1, 1], [0, 0, *[-np.inf] * 4]]


def test_scores_that_differ_only_beyond_float32_are_tied():
    passages_QxK, _ = metrics.sort_run(np.array([[0, 1]]), np.array([[1 + 1e-12, 1]]), ["a", "b"])
    assert passages_QxK.tolist() == [[1, 0]]


def test_constant_scorer_scores_at_chance_with_the_positive_first():
    rng = np.random.default_rng(0)
    num_queries, width = 4000, 20
    passage_ids = [f"{number:x}" for number in rng.permutation(10**6)[:5000]]
    passages_QxK = np.stack([rng.permutation(5000)[:width] for _ in range(num_queries)])
    ones_Q = np.ones(num_queries, np.int64)
    values = metrics.evaluate(
        passages_QxK,
        np.zeros(passages_QxK.shape, np.float32),
        passage_ids,
        (np.arange(num_queries), passages_QxK[:, 0], ones_Q),
        ["RR@10", "Success@5"],
    )
    chance = sum(1 / rank for rank in range(1, 11)) / width
    # Four standard errors of a mean of 4,000.
    assert values["RR@10"].mean() == pytest.approx(chance, abs=0.016)
    assert values["Success@5"].mean() == pytest.approx(5 / width, abs=0.028)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(collections(), st.randoms(use_true_random=False))
def test_order_of_the_lists_changes_nothing(collection, random):
    passage_ids, passages_QxK, scores_QxK, _ = collection
    columns = list(range(passages_QxK.shape[1]))
    random.shuffle(columns)
    first = metrics.sort_run(passages_QxK, scores_QxK, passage_ids)
    second = metrics.sort_run(passages_QxK[:, columns], scores_QxK[:, columns], passage_ids)
    again = metrics.sort_run(*first, passage_ids)
    for one, two, three in zip(first, second, again):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_nan_scores_and_passages_listed_twice_are_refused():
    passages_QxK = np.array([[0, 1], [1, 0]])
    with pytest.raises(InputError, match="score of passage b for query row 1 is NaN"):
        metrics.sort_run(passages_QxK, np.array([[0, 1], [np.nan, 2]]), ["a", "b"])
    with pytest.raises(InputError, match="query row 1 has passage b twice"):
        metrics.sort_run(np.array([[0, 1, -1, -1], [1, 0, -1, 1]]), np.zeros((2, 4)), ["a", "b"])


# The paired test.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-30, 30), min_size=1, max_size=9))
def test_small_samples_are_enumerated_exactly(thirtieths):
    """Whole numbers have no rounding: sums of thirtieths must not be told apart by theirs."""
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, thirtieths)))
        for signs in itertools.product((1, -1), repeat=len(thirtieths))
    ]
    expected = sum(value >= abs(sum(thirtieths)) for value in sums) / len(sums)
    a_Q = np.array(thirtieths) / 30
    difference, p_value = significance.paired_test(a_Q, np.zeros(len(a_Q)), permutations=9, seed=0)
    assert difference == pytest.approx(sum(thirtieths) / 30 / len(thirtieths))
    assert p_value == expected


def test_random_flips_approach_the_exact_p_value():
    difference_Q = np.random.default_rng(3).normal(0.3, 1, 17)
    # The first bit of every byte of random flips decides most.
    difference_Q[::8] += 3
    signs_PxQ = 1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)
    exact = (np.abs(signs_PxQ @ difference_Q) >= abs(difference_Q.sum()) - 1e-12).mean()
    assert 0.05 < exact < 0.95
    a_Q, b_Q = np.append(difference_Q, 0.5), np.append(np.zeros(17), 0.5)
    permutations = 20_000
    difference, p_value = significance.paired_test(a_Q, b_Q, permutations=permutations, seed=0)
    assert difference == pytest.approx(difference_Q.sum() / 18)
    error = math.sqrt(exact * (1 - exact) / permutations)
    assert p_value == pytest.approx(exact, abs=4 * error)
    assert p_value != exact
    assert significance.paired_test(b_Q, a_Q, permutations=permutations, seed=0) == (
        -difference,
        p_value,
    )
    assert significance.paired_test(a_Q, b_Q, permutations=permutations, seed=1)[1] != p_value


def test_queries_without_a_difference_leave_the_test_exact():
    a_Q = np.append(np.zeros(100), np.ones(5))
    assert significance.paired_test(a_Q, np.zeros(105), permutations=9, seed=0) == (5 / 105, 2 / 32)


def test_p_value_is_uniform_under_the_null_hypothesis():
    rng = np.random.default_rng(0)
    p_values = np.array(
        [
            significance.paired_test(*rng.random((2, 30)), permutations=199, seed=trial)[1]
            for trial in range(1000)
        ]
    )
    # Kolmogorov-Smirnov distance from uniform: 1.95 / sqrt(1000) is the 0.1% point.
    distance = np.abs(np.sort(p_values) - (np.arange(1000) + 0.5) / 1000).max()
    assert distance < 0.062


def test_p_value_at_its_bounds():
    ones_Q, zeros_Q = np.ones(100), np.zeros(100)
    assert significance.paired_test(ones_Q, zeros_Q, permutations=999, seed=0) == (1.0, 1 / 1000)
    assert significance.paired_test(ones_Q, ones_Q, permutations=999, seed=0) == (0.0, 1.0)
    # Two-sided: no flip has a mean nearer to zero than zero, in every chunk.
    balanced_Q = np.tile([0.1, 0.2, -0.3], 3000)
    assert significance.paired_test(balanced_Q, 0 * balanced_Q, permutations=2000, seed=0) == (
        pytest.approx(0),
        1.0,
    )


@pytest.mark.parametrize(
    ("a_Q", "b_Q"),
    [([1.0, 0.0], [1.0]), ([], []), ([np.nan, 1.0], [0.0, 1.0]), ([np.inf], [np.inf])],
)
def test_paired_test_refuses_values_that_do_not_pair(a_Q, b_Q):
    with pytest.raises(InputError, match="finite values of the same queries"):
        significance.paired_test(np.array(a_Q), np.array(b_Q), permutations=9, seed=0)


# TREC run files.


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 4), elements=st.floats(width=32, allow_nan=False)),
    st.lists(IDS, min_size=4, max_size=4, unique=True),
)
def test_written_run_is_read_back_bit_for_bit_in_rank_order(tmp_path_factory, scores_QxK, ids):
    path = tmp_path_factory.mktemp("runs") / "run.trec"
    passages_QxK = np.array([[0, 1, 2, 3], [3, -1, 0, -1]])
    trec.write_run(path, ["q1", "q2"], ids, passages_QxK, scores_QxK, "tag")
    sorted_QxK, sorted_scores_QxK = metrics.sort_run(passages_QxK, scores_QxK, ids)
    read = trec.read_run(path)
    assert {
        query: [(passage_id, np.float32(score).item()) for passage_id, score in results]
        for query, results in read.items()
    } == {
        query: [
            (ids[passage], score.item()) for passage, score in zip(passages, scores) if passage >= 0
        ]
        for query, passages, scores in zip(["q1", "q2"], sorted_QxK, sorted_scores_QxK)
    }


def test_written_lines_and_no_file_beside(tmp_path):
    path = tmp_path / "run.trec"
    trec.write_run(
        path,
        ["q1", "q2", "q3"],
        np.array(["a", "b"], object),
        np.array([[0, 1], [-1, -1], [-1, 0]]),
        np.array([[0.1, 0.1], [0, 0], [9, -2]], np.float32),
        "retriever",
    )
    assert path.read_text() == (
        "q1 Q0 b 1 0.100000001 retriever\nq1 Q0 a 2 0.100000001 retriever\nq3 Q0 a 1 -2 retriever\n"
    )
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("old")
    two = np.array([[0], [0]]), np.zeros((2, 1))
    with pytest.raises(ValueError, match="longer than argument 1"):
        trec.write_run(path, ["q1"], ["a"], *two, "tag")
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("query_id", "passage_id", "tag", "message"),
    [
        ("q 1", "a", "tag", "query 'q 1' is empty or has white space"),
        ("q1", "a\u00a0b", "tag", r"passage 'a\\xa0b' is empty or has white space"),
        ("q1", "a\n", "tag", r"passage 'a\\n' is empty"),
        ("q1", "a", "", "tag '' is empty"),
    ],
)
def test_ids_that_no_trec_file_can_hold(tmp_path, query_id, passage_id, tag, message):
    path = tmp_path / "run.trec"
    with pytest.raises(InputError, match=message) as error:
        trec.write_run(
            path, [query_id], [passage_id, "not listed"], np.array([[0]]), np.zeros((1, 1)), tag
        )
    assert str(error.value).startswith(f"{path}: ")
    assert not list(tmp_path.iterdir())
    trec.write_run(path, ["q"], ["a", "not listed"], np.array([[0]]), np.ones((1, 1)), "t")


def test_read_takes_tabs_crlf_blank_lines_and_scattered_queries(tmp_path):
    path = tmp_path / "run.trec"
    path.write_bytes(b"q1\tQ0\ta\t9\t1e-3\tx\r\n\nq2 Q0 a 1 -2 x\n q1 Q0 b 1 5 x")
    expected = {"q1": [("a", 0.001), ("b", 5.0)], "q2": [("a", -2.0)]}
    assert trec.read_run(path) == expected
    # As some editors save it, and gzipped.
    (tmp_path / "marked.trec").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert trec.read_run(tmp_path / "marked.trec") == expected
    (tmp_path / "run.trec.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert trec.read_run(tmp_path / "run.trec.gz") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"q1 Q0 b 2 0.5", "5 columns, but a line of a run has six"),
        (b"q1 b 2", "3 columns, but a line of a run has six"),
        (b"q1 Q0 b 2 0.5 my tag", "7 columns"),
        (b"q1 Q0 b 2 high tag", "the score 'high' is not a number"),
        (b"q1 Q0 b 2 nan tag", "the score 'nan' is not a number"),
        (b"q1 Q0 a 2 0.5 tag", "passage a is listed twice for query q1"),
        (b"q1 Q0 \xff 2 0.5 tag", "not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "run.trec"
    path.write_bytes(b"q1 Q0 a 1 1.0 tag\n\n" + line + b"\nq2 Q0 a 1 1 tag\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}:3: {message}") as error:
        trec.read_run(path)
    assert "\n" not in str(error.value)


def test_runs_of_msmarco_rank_by_rank(tmp_path):
    """As anserini's and the leaderboard's: query, passage and rank, in any order."""
    path = tmp_path / "run.tsv"
    path.write_text("1\tb\t2\n1\ta\t1\n2\tb\t1\n1\tc\t10\n")
    listed = trec.read_run(path)
    assert listed == {"1": [("b", -2.0), ("a", -1.0), ("c", -10.0)], "2": [("b", -1.0)]}
    ids = ["a", "b", "c"]
    arrays = trec.run_arrays(listed, ["1", "2"], {key: row for row, key in enumerate(ids)})
    passages_QxK, _ = metrics.sort_run(*arrays, ids)
    assert passages_QxK.tolist() == [[0, 1, 2], [1, -1, -1]]


def test_runs_of_rocketqa_rank_by_score(tmp_path):
    path = tmp_path / "run.tsv"
    path.write_text("1\ta\t1\t0.5\n1\tb\t2\t0.75\n")
    assert trec.read_run(path) == {"1": [("a", 0.5), ("b", 0.75)]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\ta\tx\n", ":1: the rank 'x' is not a number"),
        ("1\ta\t1.5\n", ":1: the rank '1.5' is not a number"),
        ("1\tQ0\ta\t1\n", ":1: the rank 'a' is not a number"),
        ("1\ta\t1\n1 Q0 b 2 0.5 x\n", ":2: 6 columns"),
        ("1\ta\t1\n1\ta\t2\n", ":2: passage a is listed twice"),
    ],
)
def test_bad_lines_of_short_runs_are_named(tmp_path, text, message):
    path = tmp_path / "run.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}{message}")):
        trec.read_run(path)


def test_run_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"no\.trec: no such file"):
        trec.read_run(tmp_path / "no.trec")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None, max_examples=200)
def test_holm_against_its_definition(p_values):
    """Corrected p-values are at or below a level exactly where Holm's rule rejects at that level."""
    corrected = significance.holm(p_values)
    for level in {*corrected, 0.05, 0.5} - {1.0}:
        rejected = set()
        for rank, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
            if p_values[i] * (len(p_values) - rank) > level:
                break
            rejected.add(i)
        assert rejected == {i for i, p in enumerate(corrected) if p <= level}


def test_holm_by_hand():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]
    assert significance.holm([]) == []


def test_interval_is_that_of_the_normal_approximation():
    rng = np.random.default_rng(3)
    difference_Q = rng.normal(0.2, 1.0, 2000)
    low, high = significance.interval(difference_Q, resamples=4000, seed=0)
    half = 1.96 * difference_Q.std() / 2000**0.5
    assert low == pytest.approx(difference_Q.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(difference_Q.mean() + half, abs=0.1 * half)
    assert (low, high) == significance.interval(difference_Q, resamples=4000, seed=0)
    assert significance.interval(np.zeros(9), resamples=99, seed=0) == (0.0, 0.0)
