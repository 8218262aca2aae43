"""The table, the verdict and the advice in words, against values counted by hand."""

import types

import numpy as np
import pytest

from rqv2_jax import config as config_lib
from rqv2_jax.data.tokens import Queries, Store, Texts
from rqv2_jax.recipe import results


def outcome(a, b, difference, p_value):
    return {
        "a": a,
        "b": b,
        "metric": "RR@10",
        "queries": 40,
        "difference": difference,
        "p_value": p_value,
    }


def test_the_verdict_tells_better_worse_and_not_told_apart():
    tests = [
        outcome("joint retriever", "bm25", -0.2, 0.001),
        outcome("joint reranker", "bm25", 0.1, 0.049),
        outcome("joint reranker on bm25", "bm25", 0.3, 0.05),
        outcome("joint retriever", "released retriever", -0.3, 0.9),
    ]
    assert results.verdict(tests) == [
        "joint retriever is worse than bm25: RR@10 -0.2000 (p = 0.0010, 40 queries)",
        "joint reranker is better than bm25: RR@10 +0.1000 (p = 0.0490, 40 queries)",
        "joint reranker on bm25 is not told apart from bm25: RR@10 +0.3000 (p = 0.0500, 40 queries)",
        "joint retriever is not told apart from released retriever: RR@10 -0.3000 (p = 0.9000, "
        "40 queries)",
    ]


def test_sentences_tell_of_each_joint_model_in_words():
    tests = [
        outcome("joint retriever", "bm25", -0.2, 0.001),
        outcome("joint retriever", "released retriever", 0.1, 0.049),
        outcome("joint retriever", "retriever retriever", 0.0125, 0.5),
        outcome("joint reranker", "joint retriever", 0.3, 0.0),
        outcome("reranker reranker", "bm25", 0.3, 0.0),
    ]
    assert [line.replace("\xa0", " ") for line in results.sentences(tests)] == [
        "The joint retriever is better than the model as released (+0.1000, p = 0.0490), worse than "
        "BM25 (-0.2000, p = 0.0010) and not told apart from its warm-up (+0.0125, p = 0.5000), by "
        "RR@10 on 40 queries.",
        "The joint re-ranker is better than its retriever (+0.3000, p = 0.0000), by RR@10 on 40 "
        "queries.",
    ]


def test_lengths_of_a_sample_as_they_are_read_and_uncut(run_and_store):
    read_N, whole_N = results.lengths_by(run_and_store[0].inputs, run_and_store[1])["query_length"]
    assert (read_N.tolist(), whole_N.tolist()) == ([5, 8], [5, 18])


def of_lengths(*lengths):
    return Texts(np.zeros(sum(lengths), np.uint16), np.cumsum([0, *lengths]))


@pytest.fixture
def run_and_store(world, tmp_path):
    """A run that reads queries of 8 tokens, passages of 16 and pairs of 24, and its store."""
    config = config_lib.default()
    config.data.update({"query_length": 8, "passage_length": 16, "pair_length": 24})
    # With [CLS], [SEP] and [SEP]: 3, 13 and 43 tokens.
    store = Store(
        titles=of_lengths(0, 0, 10),
        texts=of_lengths(0, 10, 30),
        passage_ids=["a", "b", "c"],
        splits={
            "test": Queries(of_lengths(3, 16), ["t", "u"], np.zeros((3, 0), np.int64)),
            "train": Queries(
                of_lengths(*[2] * 99), [str(i) for i in range(99)], np.ones((3, 99), np.int64)
            ),
        },
        fingerprint="",
    )
    store.splits["train"].qrels_3xN[0] = np.arange(99)
    inputs = world.inputs.__class__(
        **{**vars(world.inputs), "query_length": 8, "passage_length": 16, "pair_length": 24}
    )
    run = types.SimpleNamespace(
        config=config,
        inputs=inputs,
        workdir=tmp_path,
        trained_by=lambda *, state, model: state,
    )
    return run, store


def test_the_share_of_tokens_that_a_length_cuts_off(run_and_store):
    shares = results.cut_by(run_and_store[0].inputs, run_and_store[1])
    assert shares["query_length"] == pytest.approx(1 - (5 + 8) / (5 + 18))
    assert shares["passage_length"] == pytest.approx(1 - (3 + 13 + 16) / (3 + 13 + 43))
    # Queries of 3, 16 and 3 tokens, 3 special ones, and passages of 0, 10 and 40.
    assert shares["pair_length"] == pytest.approx(1 - (6 + 24 + 24) / (6 + 29 + 46))


def test_advice_names_the_settings_by_what_the_run_knows(run_and_store):
    run, store = run_and_store
    for stage, step in (("joint", 4), ("reranker", 0), ("retriever", 3)):
        for model in ("retriever", "reranker"):
            (run.workdir / stage / "best" / model / str(step)).mkdir(parents=True)
    run.config.joint.batch, run.config.retriever.batch = 24, 33
    run.config.evaluate.rerank_depth = 7

    def advice(*worse):
        return results.advice(run, store, {*worse}, {"exact": 0.25, "bm25": 0.5})

    retriever = advice(("joint", "retriever", "exact"))
    assert retriever == [
        "look at: config.data.query_length = 8 cuts off 43.5% of the queries' tokens",
        "look at: config.data.passage_length = 16 cuts off 45.8% of the passages' tokens",
        "look at: the kept retriever of stage joint has seen 96 lists, and there are 99 training "
        "queries; raise config.joint.epochs or config.mine.queries",
    ]
    reranker = advice(("joint", "reranker", "bm25"))
    assert (
        reranker[0] == "look at: config.data.pair_length = 24 cuts off 33.3% of the pairs' tokens"
    )
    assert reranker[2] == (
        "look at: the 7 passages of bm25 that are re-ranked (config.evaluate.rerank_depth) hold a "
        "relevant one for 50.0% of the queries, so the re-ranker cannot find more"
    )
    assert len(advice(("joint", "retriever", "exact"), ("joint", "reranker", "bm25"))) == 6
    (kept,) = (x for x in advice(("reranker", "reranker", "exact")) if "kept" in x)
    assert (
        "stage reranker kept the reranker it started from, as dev found later steps worse" in kept
    )
    # With all queries seen and nothing cut, there is nothing to say.
    run.config.data.update({"query_length": 99, "passage_length": 99})
    run.inputs = run.inputs.__class__(
        **{**vars(run.inputs), "query_length": 99, "passage_length": 99}
    )
    assert advice(("retriever", "retriever", "exact")) == []


def test_metrics_that_do_not_fit_are_shown_below():
    names = [f"Success(rel=2)@{10**k}" for k in range(6)]
    row = {
        "state": "joint",
        "model": "retriever",
        "index": "exact",
        "split": "test",
        "queries": 3,
        "metrics": {name: k / 10 for k, name in enumerate(names)},
    }
    report = {"rows": [row], "significance": [], "verdict": ["a word " * 40], "titles": True}
    lines = results.render(report).splitlines()
    assert max(map(len, lines)) <= 100
    heads = [line.split()[3:] for line in lines if line.startswith("state")]
    assert [name for head in heads for name in head] == names
    assert len(heads) == 2
    shown = [line.split()[3:] for line in lines if line.startswith("joint")]
    assert [cell for cells in shown for cell in cells] == [f"{k / 10:.4f}" for k in range(6)]
