"""What the benchmarks measure, and that both sides of a comparison do the same work."""

import json

import numpy as np
import pytest
from tiny_run import tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.data.batches import KINDS
from rqv2_jax.errors import InputError
from rqv2_jax.recipe.run import open_run
from rqv2_jax.tools import bench_joint, bench_recipe, bench_retrieval, workload


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = config_lib.default()
    config_lib.tiny(config)
    config.data.update({"dataset": "docstrings", "passage_length": 128, "pair_length": 160})
    config.model.update({"dropout": 0.0, "pooling": "mean"})
    config.joint.update({"batch": 4, "list_size": 4, "accumulate": 2})
    return open_run(config, tmp_path_factory.mktemp("bench") / "workdir")


@pytest.fixture(scope="module")
def texts(run):
    return workload.read(run, "msmarco", 256, 64)


def test_made_up_texts_are_as_long_as_those_of_msmarco(run, texts):
    lengths_N = run.inputs.passage_lengths(texts.store, np.arange(256))
    # The mean that packing was designed for, within three of its deviations.
    assert lengths_N.mean() == pytest.approx(79, abs=3 * 26 / 256**0.5)
    assert (lengths_N.min(), lengths_N.max()) >= (16, 100)
    assert lengths_N.max() <= 128
    assert len({text for _, text in texts.passages}) == 256


@pytest.mark.parametrize("teacher", [None, "BertForSequenceClassification"])
def test_the_joint_step_and_its_rival_do_the_same_work(run, texts, teacher, make_bert):
    """Cosines of means with the re-ranker that the retriever is; dot products and another re-ranker."""
    own = config_lib.loads(config_lib.dumps(run.config))
    # The two round differently where this CPU would have factors rounded.
    own.model.products = "float32"
    if teacher is not None:
        folder, _ = make_bert(6, teacher, num_labels=1, num_hidden_layers=1)
        own.model.update({"pooling": "cls", "similarity": "dot", "scale": 1.0})
        own.model.reranker.update({"weights": str(folder), "num_layers": 1, "pooling": "cls"})
    # Large enough that the third loss tells whether both were updated alike.
    own.joint.learning_rate = 3e-3
    opened = open_run(own, run.workdir)
    if teacher is not None:
        # It has a tokenizer of its own.
        texts = workload.read(opened, "msmarco", 256, 64)
    (found,) = bench_joint.joint(opened, texts, 2, versus=True)
    assert found["losses"] == pytest.approx(found["torch_losses"], rel=1e-3)
    assert found["torch_ratio"] == pytest.approx(
        found["torch_step_seconds"] / found["step_seconds"]
    )
    assert 1 < found["computed_over_real_tokens"] < found["padded_over_real_tokens"] * 1.2
    # With cls pooling the only layer is the last, of which first tokens alone go on.
    assert 0.1 < found["compiled_over_model_flop"] < 1.5
    assert found["pairs_per_second"] == pytest.approx(16 / found["step_seconds"])


@pytest.mark.parametrize(
    ("changes", "versus", "message"),
    [
        ({"joint.train_reranker": False}, True, "--vs torch: the rival trains both models"),
        ({"joint.in_batch_weight": 1.0, "joint.accumulate": 1}, True, "--vs torch: the rival"),
        ({"joint.loss.reranker_loss": "pointwise"}, True, "--vs torch: the rival"),
        ({"joint.list_size": 257}, False, "list_size is 257, but there are 256 passages"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, texts, changes, versus, message):
    own = config_lib.loads(config_lib.dumps(run.config))
    own.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        list(bench_joint.joint(open_run(own, run.workdir), texts, 2, versus=versus))


def test_model_flops_are_those_of_real_tokens(run, texts):
    """By the formula in the planner's docstring, of each sequence at its own length, three times."""
    batches = bench_joint.joint_batches(run, texts, 1)
    d, f = 384, 1536
    expected = 0
    for kind in KINDS:
        for length in batches.ragged(kind, 0).lengths_N.tolist():
            expected += 3 * length * (8 * d**2 + 4 * d * f + 4 * d * length)
    ragged = {kind: batches.ragged(kind, 0).lengths_N for kind in KINDS}
    flops = {
        kind: workload.training_flops(run.config, run.models, "joint", kind, lengths_N)
        for kind, lengths_N in ragged.items()
    }
    assert sum(flops.values()) == pytest.approx(expected)
    static = config_lib.loads(config_lib.dumps(run.config))
    static.joint.train_reranker = False
    for kind, lengths_N in ragged.items():
        found = workload.training_flops(static, run.models, "joint", kind, lengths_N)
        assert found == pytest.approx(flops[kind] / (3 if kind == "pairs" else 1))
    each = [workload.forward_flops(run.models.retriever, np.array([n])) for n in (7, 9)]
    assert workload.forward_flops(run.models.retriever, np.array([7, 9])) == sum(each)


def test_encoding_re_ranking_mining_and_inputs(run, texts):
    encoded, reranked = bench_retrieval.encode_and_rerank(run, texts, 1, versus=False)
    assert (encoded["benchmark"], reranked["benchmark"]) == ("encode", "re-rank")
    for found in (encoded, reranked):
        assert found["sequences"] == 256
        assert 0 < found["tokenising_share"] < 1
    # A few hundred sequences do not fill their last batches.
    assert 1 < encoded["computed_over_real_tokens"] < 1.6
    mined = bench_retrieval.mine(run, texts, 1, versus=False)
    assert (mined["passages"], mined["queries"], mined["scored_pairs"]) == (256, 64, 64 * 20)
    found = bench_joint.inputs(run, texts, 3, 2.0)
    assert found["times_what_the_step_takes"] == pytest.approx(found["lists_per_second"] * 2 / 4)
    wanted = found["lists_per_second_of_a_v5e_32_at_paper_scale"]
    assert found["cores_to_feed_it"] == pytest.approx(
        wanted * 128 * found["cores"] / (found["lists_per_second"] * 4)
    )
    json.dumps([encoded, reranked, mined, found])


def test_search_measures_every_index_at_its_recall(run):
    found = bench_retrieval.search(2000, 16, 100, 10, run.config.evaluate.scann, versus=False)
    found, equal = found[:2], found[2:]
    assert [line["index"] for line in found] == ["exact", "ScaNN"]
    assert [line["recall"] for line in equal] == list(bench_retrieval.RECALLS)
    rate = found[1]["queries_per_second"]
    assert all(line["queries_per_second_by_index"] == {"ScaNN": rate} for line in equal)
    line = {"index": "other", "recall@10": 0.95, "queries_per_second": 7.0}
    faster = {**line, "recall@10": 0.5, "queries_per_second": 9.0}
    for least, best in ((0.95, 7.0), (0.99, None), (0.5, 9.0)):
        assert bench_retrieval._fastest([line, faster], 10, least) == {
            "queries_per_second_by_index": {"other": best}
        }
    assert found[1]["recall@10"] == 1, "so small a collection is scored whole"
    assert found[1]["ratio_to_exact"] == pytest.approx(
        found[1]["queries_per_second"] / found[0]["queries_per_second"]
    )
    json.dumps(found)


@pytest.mark.slow
def test_the_recipe_and_its_rival_get_the_same_minutes_and_are_compared(tmp_path, make_bert):
    config = tiny_config(write_beir(tmp_path / "data"), make_bert()[0])
    config.evaluate.update({"indexes": ("exact",), "permutations": 100, "rerank_queries": 6})
    lines = list(bench_recipe.recipe(config, tmp_path / "w", 0.4, rival=True))
    ours, theirs, *pairs = lines
    assert (ours["system"], theirs["system"]) == ("rqv2_jax", "sentence-transformers")
    assert theirs["seconds"] == pytest.approx(24, rel=0.25)
    assert theirs["retriever_seconds"] == pytest.approx(12, rel=0.25)
    for model in ("retriever", "reranker"):
        assert theirs[model]["steps"] > 0
        assert len(theirs[model]["tried"]) == 3
    compared = {(pair["a"], pair["b"]): pair for pair in pairs}
    assert compared["ours.retriever", "rival.retriever"]["queries"] == 8
    assert compared["ours.reranker", "rival.reranker"]["queries"] == 6
    assert {b for _, b in compared} == {"bm25", "rival.retriever", "rival.reranker"}
    # The same figure as in the table of ours, which is of the re-ranked queries.
    row = compared["ours.reranker", "bm25"]["metrics"][0]
    mean = next(r["metrics"]["RR@10"] for r in ours["rows"] if r["state"] == "bm25")
    assert row["b"] == pytest.approx(mean)
    json.dumps(lines)
