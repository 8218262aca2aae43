import collections
import dataclasses
import hashlib
import tracemalloc
import types

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rqv2_jax.data import lists as lists_lib
from rqv2_jax.data.drawing import Denoising, draw, without_known_positives
from rqv2_jax.data.lists import Candidates, Lists, Provenance, known_positive, training_lists
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.mining import epochs_of_lists

SLOPE, OFFSET = 1.5, -0.5
HEADS = (Provenance.LABELLED_POSITIVE, Provenance.DENOISED_POSITIVE)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def problem(seed, *, queries, depth, passages, unlabelled=1, scored=True):
    """Candidates of some of the queries, and labelled pairs of all of them, in no order."""
    rng = np.random.default_rng(seed)
    total = queries + 2
    rows_Q = rng.permutation(total + 3)[:queries]
    passages_QxN = np.stack([rng.permutation(passages)[:depth] for _ in rows_Q])
    pairs = set()
    for query in rng.permutation(total + 3)[: total - unlabelled].tolist():
        # From the candidates or from anywhere.
        pool = passages_QxN[rows_Q == query].reshape(-1) if rng.random() < 0.7 else []
        pool = pool if len(pool) else np.arange(passages)
        pairs |= {(query, int(p)) for p in rng.choice(pool, rng.integers(1, 4))}
    pairs = rng.permutation(np.array(sorted(pairs)))
    scores_QxN = np.sort(rng.normal(size=passages_QxN.shape))[:, ::-1].astype(np.float32)
    # In steps of 1/4, of which no probability lies near a threshold: float32 decides as float64.
    reranker_QxN = (rng.normal(scale=12, size=passages_QxN.shape).round() / 4).astype(np.float32)
    if not scored:
        reranker_QxN[:] = np.nan
    return Candidates(rows_Q, passages_QxN, scores_QxN, reranker_QxN), pairs.T.copy()


def drawn(candidates, positives_2xN, **changed) -> Lists:
    given = dict(list_size=4, denoised_share=0.5, negative_below=0.3, positive_above=0.8)
    given |= dict(probability=(SLOPE, OFFSET), num_passages=1000, seed=1, epoch=0)
    given |= {"own_2xN": np.zeros((2, 0), np.int64)} | changed
    denoising = Denoising(
        given.pop("denoised_share"),
        *(given.pop(name) for name in ("probability", "negative_below", "positive_above")),
    )
    return draw(candidates, positives_2xN, given.pop("own_2xN"), denoising=denoising, **given)


def by_query(candidates, positives_2xN):
    """{query: ({passage: probability of relevance}, {labelled passages})}."""
    return {
        query: (
            {p: sigmoid(SLOPE * s + OFFSET) for p, s in zip(passages, scores)},
            set(positives_2xN[1, positives_2xN[0] == query].tolist()),
        )
        for query, passages, scores in zip(
            candidates.query_rows_Q.tolist(),
            candidates.passages_QxN.tolist(),
            candidates.reranker_QxN.tolist(),
        )
    }


def check(lists, candidates, positives_2xN, *, list_size, below, above, num_passages):
    """Everything that holds of every list, whatever was drawn."""
    kinds = Provenance
    facts = by_query(candidates, positives_2xN)
    labelled_heads, found_heads = [], []
    assert lists.passages_LxP.shape == lists.provenance_LxP.shape
    assert lists.passages_LxP.shape[1] == list_size
    assert lists.positive().tolist() == [
        [True] + [False] * (list_size - 1) for _ in lists.query_rows_L
    ]
    for query, passages, provenance in zip(
        lists.query_rows_L.tolist(), lists.passages_LxP.tolist(), lists.provenance_LxP.tolist()
    ):
        probability, known = facts[query]
        head, *negatives = passages
        assert len(set(passages)) == list_size, "no passage twice"
        assert all(0 <= p < num_passages for p in passages)
        assert provenance[0] in HEADS
        assert not known & set(negatives), "known positives are no negatives"
        count = collections.Counter(provenance[1:])
        denoised = provenance[0] == kinds.DENOISED_POSITIVE or count[kinds.DENOISED_NEGATIVE] > 0
        if provenance[0] == kinds.LABELLED_POSITIVE:
            assert head in known
            labelled_heads.append((query, head))
        else:
            assert head not in known
            assert probability[head] > above
            found_heads.append((query, head))
        eligible = {p for p in probability if p not in known}
        trusted = {p for p in eligible if probability[p] < below}
        for passage, kind in zip(negatives, provenance[1:]):
            if kind == kinds.UNDENOISED_NEGATIVE:
                assert passage in eligible
            elif kind == kinds.DENOISED_NEGATIVE:
                assert passage in trusted
            else:
                assert kind == kinds.RANDOM_FILL
                assert not probability.get(passage, 0) > above, "found relevant"
                rejected = denoised and probability.get(passage, 0) >= below
                assert not rejected, "denoising rejects it, chance brings it back"
        if count[kinds.UNDENOISED_NEGATIVE]:
            assert not denoised, "a list is of one kind"
            assert count[kinds.RANDOM_FILL] == max(0, list_size - 1 - len(eligible))
        elif denoised:
            assert count[kinds.RANDOM_FILL] == max(0, list_size - 1 - len(trusted))
        else:
            assert not trusted, "filled although there were candidates"
    wanted = {(q, p) for q, (_, known) in facts.items() for p in known}
    assert sorted(labelled_heads) == sorted(wanted), "each heads exactly one list"
    assert len(set(found_heads)) == len(found_heads)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(2, 14),
    st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
    st.sampled_from([(0.1, 0.9), (0.5, 0.5), (0.05, 0.2), (0.8, 0.95), (0.0, 1.0), (0.999, 0.999)]),
    st.sampled_from([25, 200]),
    st.booleans(),
)
@example(1, 5, 40, 32, 0.5, (0.1, 0.9), 200, False)
@example(2, 5, 40, 128, 0.5, (0.1, 0.9), 200, True)
@example(3, 5, 160, 128, 1.0, (0.5, 0.9), 1000, False)
@settings(deadline=None, max_examples=200)
def test_every_list_keeps_the_rules(
    seed, queries, depth, size, share, thresholds, passages, partly
):
    candidates, positives_2xN = problem(seed, queries=queries, depth=depth, passages=passages)
    if partly:
        candidates.reranker_QxN[(queries + 1) // 2 :] = np.nan
        candidates.reranker_QxN[:, (depth + 1) // 2 :] = np.nan
    lists = drawn(
        candidates,
        positives_2xN,
        list_size=size,
        denoised_share=share,
        negative_below=thresholds[0],
        positive_above=thresholds[1],
        num_passages=passages,
        seed=seed,
    )
    check(
        lists,
        candidates,
        positives_2xN,
        list_size=size,
        below=thresholds[0],
        above=thresholds[1],
        num_passages=passages,
    )


def easy(*, queries=40, depth=24):
    """Every query has labelled passage 0, candidate 1 is relevant, 2.. are not, half of them surely."""
    passages_QxN = np.tile(np.arange(1, depth + 1), (queries, 1))
    reranker_QxN = np.where(passages_QxN % 2 == 0, -9.0, 0.0).astype(np.float32)
    reranker_QxN[:, 0] = 9
    rows_Q = np.arange(queries)
    scores_QxN = -np.ones_like(passages_QxN).cumsum(axis=1).astype(np.float32)
    positives_2xN = np.stack([rows_Q, np.zeros_like(rows_Q)])
    return Candidates(rows_Q, passages_QxN, scores_QxN, reranker_QxN), positives_2xN


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 12), st.integers(0, 20))
@settings(deadline=None, max_examples=50)
def test_negatives_that_head_another_list_are_replaced(seed, queries, size, more):
    rng = np.random.default_rng(seed)
    # Eight lists hold at most that many positives of a query beside a list's own passages.
    passages = size + 8 + more
    passages_LxP = np.stack([rng.permutation(passages)[:size] for _ in range(8)])
    provenance_LxP = np.full(passages_LxP.shape, Provenance.GIVEN_NEGATIVE, np.uint8)
    provenance_LxP[:, 0] = Provenance.LABELLED_POSITIVE
    given_lists = Lists(rng.integers(0, queries, 8), passages_LxP, provenance_LxP)
    found = without_known_positives(given_lists, np.arange(passages + 1), seed=seed)
    heads = set(zip(given_lists.query_rows_L.tolist(), passages_LxP[:, 0].tolist()))
    count = 0
    for query, before, after, kinds in zip(
        given_lists.query_rows_L.tolist(), passages_LxP, found.passages_LxP, found.provenance_LxP
    ):
        assert len(set(after.tolist())) == size
        assert (after[0], kinds[0]) == (before[0], Provenance.LABELLED_POSITIVE)
        for old, new, kind in zip(before[1:].tolist(), after[1:].tolist(), kinds[1:]):
            known = (query, old) in heads
            count += known
            assert (new == old) != known
            assert (query, new) not in heads
            assert kind == (Provenance.RANDOM_FILL if known else Provenance.GIVEN_NEGATIVE)
    assert (found.provenance_LxP == Provenance.RANDOM_FILL).sum() == count


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.775, 1.0])
def test_the_share_of_denoised_lists_is_exact(share):
    lists = drawn(*easy(), denoised_share=share, list_size=12)
    heads = lists.provenance_LxP[:, 0]
    denoised = lists.provenance_LxP[:, 1:] == Provenance.DENOISED_NEGATIVE
    assert (denoised.all(axis=1) | ~denoised.any(axis=1)).all()
    labelled = heads == Provenance.LABELLED_POSITIVE
    assert labelled.sum() == 40
    assert denoised[labelled].all(axis=1).sum() == round(share * 40)
    # One hidden positive for each query, of which the same share heads a list.
    assert len(heads) == 40 + round(share * 40)
    assert denoised[~labelled].all()
    assert (lists.passages_LxP[~labelled, 0] == 1).all()
    undenoised = ~denoised.any(axis=1)
    assert set(lists.passages_LxP[~undenoised, 1:].reshape(-1).tolist()) <= set(range(2, 25, 2))
    if share < 1:
        # Undenoised lists know nothing of the re-ranker: the hidden positive is a negative in some.
        assert (lists.passages_LxP[undenoised, 1:] == 1).any()


def test_thresholds_are_strict():
    candidates, positives_2xN = easy(queries=4, depth=3)
    # At probability 1/2 exactly, neither below nor above.
    even = Candidates(*list(vars(candidates).values())[:3], np.zeros((4, 3), np.float32))
    settings = dict(probability=(1.0, 0.0), denoised_share=1.0, list_size=2)
    lists = drawn(even, positives_2xN, negative_below=0.5, positive_above=0.5, **settings)
    assert len(lists.query_rows_L) == 4
    assert (lists.provenance_LxP[:, 1] == Provenance.RANDOM_FILL).all()


def test_thresholds_that_overlap_are_an_error():
    # A passage could head a list and be a negative in the same one.
    with pytest.raises(InputError, match="negative_below"):
        drawn(*easy(), negative_below=0.9, positive_above=0.4)


def test_no_reranker_score_is_read_for_undenoised_lists():
    candidates, positives_2xN = problem(3, queries=9, depth=6, passages=50, scored=False)
    scored = problem(3, queries=9, depth=6, passages=50)[0]
    one, other = (drawn(c, positives_2xN, denoised_share=0.0) for c in (candidates, scored))
    np.testing.assert_array_equal(one.passages_LxP, other.passages_LxP)
    assert set(np.unique(one.provenance_LxP)) <= {
        Provenance.LABELLED_POSITIVE,
        Provenance.UNDENOISED_NEGATIVE,
        Provenance.RANDOM_FILL,
    }


def test_denoised_lists_need_reranker_scores():
    candidates, positives_2xN = problem(3, queries=9, depth=6, passages=50, scored=False)
    with pytest.raises(InputError, match=r"denoised_share .* mine stage"):
        drawn(candidates, positives_2xN, denoised_share=0.01)


def test_only_scored_candidates_of_scored_queries_are_denoised():
    candidates, positives_2xN = easy()
    candidates.reranker_QxN[10:] = np.nan
    candidates.reranker_QxN[:, 12:] = np.nan
    lists = drawn(candidates, positives_2xN, denoised_share=0.5, list_size=5)
    denoised = lists.provenance_LxP[:, 1] == Provenance.DENOISED_NEGATIVE
    labelled = lists.provenance_LxP[:, 0] == Provenance.LABELLED_POSITIVE
    assert (denoised & labelled).sum() == 5
    assert lists.query_rows_L[denoised].max() < 10
    assert lists.passages_LxP[denoised].max() <= 12
    assert lists.passages_LxP[~denoised].max() > 12, "undenoised lists take any candidate"
    assert set(lists.query_rows_L[labelled].tolist()) == set(range(40))


def arrays(lists):
    return [lists.query_rows_L, lists.passages_LxP, lists.provenance_LxP]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def test_lists_are_a_function_of_seed_and_epoch():
    # List size above the number of candidates, so that the random fills are in it.
    candidates, positives_2xN = problem(5, queries=30, depth=6, passages=300)
    arguments = [x for x in [*vars(candidates).values(), positives_2xN] if x is not None]
    before = [x.copy() for x in arguments]
    given = dict(list_size=9, num_passages=300)
    first = drawn(candidates, positives_2xN, seed=1, epoch=2, **given)
    np.random.default_rng(0)
    assert same(first, drawn(candidates, positives_2xN, seed=1, epoch=2, **given))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not same(first, drawn(candidates, positives_2xN, seed=seed, epoch=epoch, **given))
    for array, copy in zip(arguments, before):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("epochs", "most", "taken"), [(0.5, 100, 5), (2.5, 100, 25), (2.5, 25, 25), (2.5, 13, 13)]
)
def test_a_stage_takes_its_passes_up_to_its_most_lists(epochs, most, taken):
    def draw(epoch):
        numbers_L = np.arange(10) + 10 * epoch
        return Lists(numbers_L, numbers_L[:, None], np.zeros((10, 1), np.uint8))

    stage = types.SimpleNamespace(epochs=epochs, most_lists=most)
    assert training_lists(stage, 10) == taken
    lists = epochs_of_lists(draw, stage)
    for found_L in (lists.query_rows_L, lists.passages_LxP[:, 0]):
        np.testing.assert_array_equal(found_L, np.arange(taken))
    assert len(lists.provenance_LxP) == taken
    assert len(epochs_of_lists(draw, stage, number=30).query_rows_L) == 30


def test_every_epoch_mixes_anew():
    candidates, positives_2xN = easy()
    epochs = [drawn(candidates, positives_2xN, epoch=epoch) for epoch in range(100)]
    heads = [
        {
            kind: lists.query_rows_L[
                (lists.provenance_LxP[:, 0] == Provenance.LABELLED_POSITIVE)
                & (lists.provenance_LxP[:, 1] == kind)
            ]
            for kind in (Provenance.DENOISED_NEGATIVE, Provenance.UNDENOISED_NEGATIVE)
        }
        for lists in epochs
    ]
    # Each of 40 positives heads a denoised list in about half of the epochs.
    times = np.bincount(
        np.concatenate([x[Provenance.DENOISED_NEGATIVE] for x in heads]), minlength=40
    )
    assert times.sum() == 2000
    assert times.min() >= 25
    assert times.max() <= 75
    found = np.concatenate([x.query_rows_L[x.provenance_LxP[:, 0] == 1] for x in epochs])
    assert np.bincount(found, minlength=40).min() >= 25
    # Lists come in random order: kinds and queries are spread over the epoch.
    places = np.concatenate([np.nonzero(x.provenance_LxP[:, 0] == 1)[0] for x in epochs])
    assert 25 < places.mean() < 34
    first = np.array([x.query_rows_L[0] for x in epochs])
    assert len(set(first.tolist())) > 20


def test_negatives_are_drawn_evenly_from_the_candidates():
    candidates, positives_2xN = easy(queries=1, depth=12)
    count = collections.Counter()
    for epoch in range(600):
        lists = drawn(candidates, positives_2xN, denoised_share=0.0, epoch=epoch)
        count.update(lists.passages_LxP[0, 1:].tolist())
    # 3 of 12 candidates each time: 150 expected of each, standard deviation 11.
    assert set(count) == set(range(1, 13))
    assert min(count.values()) > 100
    assert max(count.values()) < 200


def test_fills_come_evenly_from_the_whole_collection():
    candidates, positives_2xN = easy(queries=1, depth=2)
    count = collections.Counter()
    for epoch in range(600):
        lists = drawn(
            candidates, positives_2xN, denoised_share=0.0, num_passages=13, epoch=epoch, list_size=5
        )
        assert sorted(lists.passages_LxP[0, 1:3]) == [1, 2], "candidates first"
        assert (lists.provenance_LxP[0, 3:] == Provenance.RANDOM_FILL).all()
        count.update(lists.passages_LxP[0, 3:].tolist())
    # 2 of 10 passages each time: 120 expected of each, standard deviation 10.
    assert set(count) == set(range(3, 13))
    assert min(count.values()) > 75
    assert max(count.values()) < 170


def test_a_list_may_need_the_last_passage_of_the_collection():
    candidates, positives_2xN = easy(queries=1, depth=2)
    # Two labelled passages, of which only one can be in a list.
    positives_2xN = np.array([[0, 0], [0, 5]])
    given = dict(denoised_share=0.0, num_passages=6)
    lists = drawn(candidates, positives_2xN, list_size=5, **given)
    assert sorted(lists.passages_LxP[:, 0]) == [0, 5]
    assert [sorted(row) for row in lists.passages_LxP[:, 1:].tolist()] == 2 * [[1, 2, 3, 4]]
    with pytest.raises(InputError, match="list_size"):
        drawn(candidates, positives_2xN, list_size=6, **given)


def test_queries_without_candidates_have_no_lists():
    candidates, _ = easy(queries=3)
    positives_2xN = np.array([[7, 1, 9, 1], [3, 30, 2, 31]])
    lists = drawn(candidates, positives_2xN, denoised_share=0.0)
    assert lists.query_rows_L.tolist() == [1, 1]
    assert sorted(lists.passages_LxP[:, 0]) == [30, 31]


def test_provenance_says_which_passage_is_positive():
    lists = Lists(np.array([0]), np.arange(5)[None], np.array([[1, 2, 3, 4, 0]], np.uint8))
    assert lists.positive().tolist() == [[True, False, False, False, True]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None)
def test_known_positives_are_the_labelled_pairs(seed, queries, depth):
    candidates, positives_2xN = problem(seed, queries=queries, depth=depth, passages=8)
    known_QxN = known_positive(
        positives_2xN, candidates.query_rows_Q, candidates.passages_QxN, num_passages=8
    )
    pairs = set(map(tuple, positives_2xN.T.tolist()))
    assert known_QxN.tolist() == [
        [(query, passage) in pairs for passage in row]
        for query, row in zip(
            candidates.query_rows_Q.tolist(), candidates.passages_QxN.tolist(), strict=True
        )
    ]


def hash_of(*arrays):
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:16]


def variants():
    """Candidates and settings of the lists whose hashes stand below."""
    candidates, positives_2xN = problem(11, queries=40, depth=30, passages=300, unlabelled=4)
    highest_Q = np.quantile(candidates.retriever_QxN, 0.8, axis=1).astype(np.float32)
    near = dataclasses.replace(candidates, highest_Q=highest_Q)
    reranker_QxN, passages_QxN = candidates.reranker_QxN.copy(), candidates.passages_QxN.copy()
    reranker_QxN[::3], reranker_QxN[:, 20:], passages_QxN[1::2, 25:] = np.nan, np.nan, -1
    half = dataclasses.replace(candidates, reranker_QxN=reranker_QxN)
    padded = dataclasses.replace(half, passages_QxN=passages_QxN)
    own_2xN = np.array([[candidates.query_rows_Q[0]], [candidates.passages_QxN[0, 1]]])
    given = {
        "plain": (candidates, {}),
        "undenoised": (candidates, {"denoised_share": 0.0}),
        "near": (near, {}),
        "half": (half, {}),
        "long": (padded, {"list_size": 32}),
    }
    settings = {"seed": 7, "epoch": 3, "num_passages": 300, "own_2xN": own_2xN}
    return {name: (each, positives_2xN, settings | own) for name, (each, own) in given.items()}


# Of the function that looked at all candidates at once; a run resumes with its lists.
GOLDEN = {
    "plain": "14719d3af745f158",
    "undenoised": "a636d305db0667b9",
    "near": "dc44d949f9a5a8e0",
    "half": "1a614a79c4e9536d",
    "long": "ca451887fabe028d",
}


@pytest.mark.parametrize("at_once", [1, 7, 40, 1024])
@pytest.mark.parametrize("name", GOLDEN)
def test_lists_are_the_same_bit_for_bit_however_many_queries_are_looked_at(
    monkeypatch, name, at_once
):
    monkeypatch.setattr(lists_lib, "AT_ONCE", at_once)
    candidates, positives_2xN, settings = variants()[name]
    lists = drawn(candidates, positives_2xN, **settings)
    assert (lists.passages_LxP.dtype, lists.provenance_LxP.dtype) == (np.int32, np.uint8)
    assert hash_of(*lists.identity(), lists.provenance_LxP) == GOLDEN[name]


@pytest.mark.parametrize("at_once", [1, 7, 1024])
def test_centred_scores_are_the_same_bit_for_bit(monkeypatch, at_once):
    monkeypatch.setattr(lists_lib, "AT_ONCE", at_once)
    candidates, *_ = variants()["long"]
    assert hash_of(candidates.centred(5).reranker_QxN) == "c444fe7ea278e6c1"
    assert hash_of(candidates.centred(20).reranker_QxN) == "83518b618435b83b"


@pytest.mark.parametrize("at_once", [1, 7, 1024])
def test_labelled_candidates_are_known_however_many_queries_are_looked_at(monkeypatch, at_once):
    monkeypatch.setattr(lists_lib, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    rows_Q, passages_QxN = rng.permutation(40)[:20], rng.integers(-1, 12, (20, 9))
    pairs_2xN = np.stack([rng.integers(0, 40, 60), rng.integers(0, 12, 60)])
    pairs = {*map(tuple, pairs_2xN.T.tolist())}
    known_QxN = known_positive(pairs_2xN, rows_Q, passages_QxN, 12)
    expected = [
        [(q, p) in pairs for p in row] for q, row in zip(rows_Q.tolist(), passages_QxN.tolist())
    ]
    assert known_QxN.tolist() == expected
    assert 0 < known_QxN.sum() < 100
    assert not known_positive(pairs_2xN[:, :0], rows_Q, passages_QxN, 12).any()


@pytest.mark.parametrize("at_once", [1, 7, 1024])
def test_twins_are_found_however_many_queries_are_looked_at(monkeypatch, at_once):
    monkeypatch.setattr(lists_lib, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    text_N, passages_QxN = np.append(rng.integers(0, 30, 60), -1), rng.integers(-1, 60, (20, 9))
    rows_Q, pairs_2xN = rng.permutation(40)[:20], rng.integers(0, 40, (2, 50))
    labelled = {(q, p) for q, p in pairs_2xN.T.tolist()}
    texts = {(q, text_N[p]) for q, p in labelled}
    expected = [
        (query, passage)
        for query, passages in zip(rows_Q.tolist(), passages_QxN.tolist())
        for passage in passages
        if passage >= 0 and (query, text_N[passage]) in texts and (query, passage) not in labelled
    ]
    found_2xN = lists_lib.same_text(pairs_2xN, rows_Q, passages_QxN, text_N)
    assert [tuple(pair) for pair in found_2xN.T.tolist()] == expected
    assert len(expected) > 5


def test_drawing_takes_memory_for_the_lists_and_not_for_all_candidates(monkeypatch):
    monkeypatch.setattr(lists_lib, "AT_ONCE", 64)
    rng, queries, depth = np.random.default_rng(0), 4000, 500
    passages_QxN = rng.integers(0, 10**6, (queries, depth))
    scores_QxN = rng.normal(size=(queries, depth)).astype(np.float32)
    candidates = Candidates(np.arange(queries), passages_QxN, scores_QxN, scores_QxN)
    positives_2xN = np.stack([np.arange(queries), passages_QxN[:, 3]])
    tracemalloc.start()
    settings = {"list_size": 8, "positive_above": 0.97, "num_passages": 10**6}
    lists = drawn(candidates.centred(50), positives_2xN, **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(lists.query_rows_L) > queries
    # Four bytes of the centred scores; all else that is as large as the lists, or as 64 queries.
    beside = peak - 4 * queries * depth
    assert beside < 1.5 * queries * depth, beside / (queries * depth)
