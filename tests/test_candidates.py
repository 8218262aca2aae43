"""Who finds the candidates, and which of them are no negatives."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax.data import denoise
from rqv2_jax.data.drawing import Denoising, draw
from rqv2_jax.data.lists import Candidates, Lists, Provenance, interleaved, same_text
from rqv2_jax.errors import InputError
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe import candidates as candidates_lib
from rqv2_jax.recipe import mining, pipeline, rankings, teacher
from rqv2_jax.recipe.claim import claim
from rqv2_jax.recipe.run import open_run
from rqv2_jax.recipe.stage import Dev, stage_batches
from rqv2_jax.retrieval import encode
from rqv2_jax.tools import outputs
from rqv2_jax.training import stages


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 9), st.integers(1, 12))
@settings(deadline=None)
def test_rankings_are_taken_in_turn_each_passage_once(seed, width, other_width, depth):
    rng = np.random.default_rng(seed)
    first, second = (
        np.stack([rng.permutation(12)[:k] for _ in range(4)]) for k in (width, other_width)
    )
    second[rng.random(second.shape) < 0.2] = -1
    scores = rng.normal(size=first.shape).astype(np.float32)
    unknown = np.full(second.shape, np.nan, np.float32)
    passages, found = interleaved([(first, scores), (second, unknown)], depth)
    assert found.dtype == np.float32
    for row in range(4):
        expected = []
        for place in range(max(width, other_width)):
            for ranking in (first, second):
                if place < ranking.shape[1] and (p := int(ranking[row, place])) >= 0:
                    expected += [p] * (p not in expected)
        kept = passages[row][passages[row] >= 0].tolist()
        assert kept == expected[:depth]
        assert (passages[row][len(kept) :] == -1).all()
        known = dict(zip(first[row].tolist(), scores[row]))
        wanted = [known.get(p, np.nan) for p in passages[row].tolist()]
        np.testing.assert_array_equal(found[row], np.array(wanted, np.float32))


def test_the_margin_is_relative_to_the_lowest_labelled_score(monkeypatch):
    monkeypatch.setattr(encode, "PASSAGES_PER_SHARD", 2)
    shards = [np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([[0.0, 1.0]])]
    queries = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    # Query rows 7, 5, 6 and 4; no label for row 4, one for a query that is not among them.
    labelled = np.array([[7, 7, 5, 6, 9], [0, 1, 0, 2, 0]])
    found = candidates_lib.highest(queries, shards, np.array([7, 5, 6, 4]), labelled, 0.1)
    np.testing.assert_allclose(found, [1.0 - 0.1, -2.0 - 0.2, 3.0 - 0.3, np.inf], rtol=1e-6)


def near(share, reranker):
    """Lists of 3 of one query, passages 0 (labelled) to 4, 1 and 2 above the highest score."""
    scores = np.array([[0.5, 0.9, 0.8, 0.2, np.nan]], np.float32)
    reranker = np.array([reranker], np.float32)
    candidates = Candidates(
        np.array([0]), np.arange(5)[None], scores, reranker, np.array([0.45], np.float32)
    )
    nothing = np.zeros((2, 0), np.int64)
    denoising = Denoising(share, (1.0, 0.0), 0.1, 0.9)
    labels = np.array([[0], [0]])
    return [
        draw(
            candidates,
            labels,
            nothing,
            list_size=3,
            denoising=denoising,
            num_passages=6,
            seed=1,
            epoch=epoch,
        )
        for epoch in range(30)
    ]


def test_candidates_within_the_margin_are_no_undenoised_negatives():
    drawn = np.concatenate([lists.passages_LxP for lists in near(0.0, [np.nan] * 5)])
    assert {*drawn[:, 1:].reshape(-1).tolist()} == {3, 4}


def test_chance_does_not_bring_them_back():
    # A list of 4 takes one passage more than there are, and the collection has one.
    candidates = Candidates(
        np.array([0]),
        np.arange(5)[None],
        np.array([[0.5, 0.9, 0.8, 0.2, 0.1]], np.float32),
        np.full((1, 5), np.nan, np.float32),
        np.array([0.45], np.float32),
    )
    for epoch in range(30):
        lists = draw(
            candidates,
            np.array([[0], [0]]),
            np.zeros((2, 0), np.int64),
            list_size=4,
            denoising=Denoising(0.0, (1.0, 0.0), 0.1, 0.9),
            num_passages=6,
            seed=1,
            epoch=epoch,
        )
        assert {*lists.passages_LxP[0].tolist()} == {0, 3, 4, 5}


def test_the_reranker_judges_candidates_within_the_margin():
    # Passage 1 is relevant, 2 is not.
    parts = near(1.0, [5, 5, -5, -5, -5])
    heads = {int(p) for lists in parts for p in lists.passages_LxP[:, 0]}
    negatives = {int(p) for lists in parts for p in lists.passages_LxP[:, 1:].reshape(-1)}
    assert (heads, negatives) == ({0, 1}, {2, 3, 4})


def untrained(run):
    """The run with a re-ranker that scores by a head with random weights."""
    run.config.reranker.epochs = 0.0
    return run


@pytest.fixture(scope="module")
def opened(tmp_path_factory, bert_folder):
    """`opened(**settings of mine)` is a run on the same tiny data in a workdir of its own."""
    data = write_beir(tmp_path_factory.mktemp("candidates") / "data")

    def run(**mine):
        config = tiny_config(data, bert_folder)
        config.retriever.epochs = 0.0
        config.mine.update(mine)
        return untrained(open_run(config, tmp_path_factory.mktemp("workdir") / "w"))

    return run


@pytest.fixture(scope="module")
def made(opened):
    """`made(**settings of mine)` is such a run and its token store."""

    def run(**mine):
        found = opened(**mine)
        return found, pipeline.prepare(found)

    return run


def listed(found, store):
    """{split: {query: [passage ids]}}."""
    return {
        split: {
            store.splits[split].ids[row]: [store.passage_ids[p] for p in passages if p >= 0]
            for row, passages in zip(each.query_rows_Q, each.passages_QxN)
        }
        for split, each in found.items()
    }


def words_shared(run, split):
    """{query: passages by how many of its words they hold}, counted in the files."""
    folder = pathlib.Path(run.config.data.path)
    corpus = [json.loads(line) for line in (folder / "corpus.jsonl").open()]
    queries = {q["_id"]: q["text"] for q in map(json.loads, (folder / "queries.jsonl").open())}
    asked = [line.split()[0] for line in (folder / "qrels" / f"{split}.tsv").open()][1:]
    return {
        query: {p["_id"] for p in corpus if {*queries[query].split()} & {*p["text"].split()}}
        for query in asked
    }


def test_bm25_finds_candidates_without_the_retriever(made):
    run, store = made(sources=("bm25",))
    found = mining.retrieve(run, store)
    assert not (run.workdir / "vectors").exists()
    assert all(np.isnan(each.retriever_QxN).all() for each in found.values())
    first = []
    for split, depth in (("train", 8), ("dev", 6)):
        for query, passages in listed(found, store)[split].items():
            holding = words_shared(run, split)[query]
            assert {*passages} <= holding
            assert len(passages) == min(depth, len(holding))
            first.append(passages[0] == query.replace("q", "p"))
    # A query repeats five words of its passage.
    assert np.mean(first) > 0.5


def test_both_sources_are_taken_in_turn(made):
    ranked = {}
    for sources in (("retriever",), ("bm25",), ("retriever", "bm25")):
        run, store = made(sources=sources)
        ranked[sources] = mining.retrieve(run, store)
    by = {sources: listed(found, store) for sources, found in ranked.items()}
    both = by["retriever", "bm25"]
    for split in ("train", "dev"):
        for query, passages in both[split].items():
            one, other = by[("retriever",)][split][query], by[("bm25",)][split][query]
            turns = [
                p for place in range(8) for p in (one[place : place + 1] + other[place : place + 1])
            ]
            assert passages == list(dict.fromkeys(turns))[: len(one)]
    # Scores are the retriever's, where it has found the passage.
    alone, each = ranked[("retriever",)]["train"], ranked["retriever", "bm25"]["train"]
    for row, passages in enumerate(each.passages_QxN.tolist()):
        known = dict(zip(alone.passages_QxN[row].tolist(), alone.retriever_QxN[row]))
        expected = [known.get(p, np.nan) for p in passages]
        np.testing.assert_allclose(each.retriever_QxN[row], expected, rtol=1e-5)
    assert np.isnan(each.retriever_QxN).any()
    # The same again, from what the workdir holds.
    (run.workdir / "lists" / "train.retrieved.npz").unlink()
    again = mining.retrieve(run, store)["train"]
    np.testing.assert_array_equal(again.passages_QxN, each.passages_QxN)


def test_the_margin_of_a_run_is_that_of_its_retriever(made):
    run, store = made(margin=0.05)
    train = mining.retrieve(run, store)["train"]
    params = run.params(state="retriever", model="retriever")
    texts = store.splits["train"].texts
    queries_QxD = encode.queries(run.forward, tower(params, "query"), texts, train.query_rows_Q)
    every = np.arange(len(store.passage_ids))
    passages_NxD = encode.passages(run.forward, tower(params, "passage"), store, every)
    positive_Q = dict(store.splits["train"].positives().T.tolist())
    labelled = [positive_Q[row] for row in train.query_rows_Q.tolist()]
    score_Q = (queries_QxD * passages_NxD[labelled]).sum(axis=1)
    expected = score_Q - 0.05 * np.abs(score_Q)
    np.testing.assert_allclose(train.highest_Q, expected, rtol=1e-4, atol=1e-4)
    lists = mining.draw_lists(run.config, store, {"train": train}, "reranker", number=64)
    allowed_Q = dict(zip(train.query_rows_Q.tolist(), expected))
    queries = dict(zip(train.query_rows_Q.tolist(), queries_QxD))
    for query, passages in zip(lists.query_rows_L.tolist(), lists.passages_LxP):
        retrieved = passages[1:][
            np.isin(passages[1:], train.passages_QxN[train.query_rows_Q == query])
        ]
        assert (passages_NxD[retrieved] @ queries[query] <= allowed_Q[query] + 1e-4).all()
    kinds = [(lists.provenance_LxP == kind).sum() for kind in Provenance]
    assert kinds[Provenance.UNDENOISED_NEGATIVE] > 0
    assert kinds[Provenance.RANDOM_FILL] > 0, "the margin leaves some lists short"


def write_candidates(path, rows):
    path.write_text("".join(f"{q} Q0 {p} {r} {-r} x\n" for q, p, r in rows))
    return str(path)


def test_a_run_file_names_the_candidates(made, tmp_path, capsys):
    rows = [(f"q{i}", f"p{(i + k) % 48}", k) for i in range(1, 40) for k in range(1, 6)]
    # As many as a list takes for one training and one dev query, more for the others.
    rows = [row for row in rows if row[0] not in ("q1", "q39") or row[2] <= 3]
    path = write_candidates(tmp_path / "run.trec", rows)
    run, store = made(candidates=path)
    candidates = mining.retrieve(run, store)
    found = listed(candidates, store)
    assert "has candidates of 31 of 32 train queries" in capsys.readouterr().out
    assert found["train"]["q0"] == []
    for split, queries in (("train", range(1, 32)), ("dev", range(32, 40))):
        for i in queries:
            count = 3 if i in (1, 39) else 5
            assert found[split][f"q{i}"] == [f"p{(i + k) % 48}" for k in range(1, count + 1)]
    # Where there is no passage there is no score, and the lists are full all the same.
    scored = mining.mine(run, store, candidates)
    assert (scored["train"].passages_QxN < 0).any()
    for each in scored.values():
        assert (np.isnan(each.reranker_QxN) == (each.passages_QxN < 0)).all()
    lists = mining.draw_lists(run.config, store, scored, "joint")
    assert lists.passages_LxP.min() >= 0
    lists = mining.draw_lists(run.config, store, scored, "reranker", number=64)
    filled_L = (lists.provenance_LxP == Provenance.RANDOM_FILL).any(axis=1)
    assert {store.splits["train"].ids[row] for row in lists.query_rows_L[filled_L]} == {"q0"}
    dev = Dev(run.config, run.forward, store, scored["dev"])
    assert dev.pool_N.min() >= 0
    # Another file is other candidates, and they get other scores.
    write_candidates(
        tmp_path / "run.trec", [(q, f"p{(int(p[1:]) + 5) % 48}", r) for q, p, r in rows]
    )
    assert listed(mining.retrieve(run, store), store)["train"]["q1"][0] == "p7"


def test_candidates_that_cannot_be_used_are_told_before_any_training(made, tmp_path):
    everyone = [(f"q{i}", "p1", 1) for i in range(40)]
    for rows, message in (
        ([*everyone, ("q3", "nowhere", 2)], "passage 'nowhere' of query 'q3' is not in the coll"),
        (everyone[:32], r"run\.trec: holds none of the 8 dev queries"),
    ):
        path = write_candidates(tmp_path / "run.trec", rows)
        run, _ = made(candidates=path)
        with pytest.raises(InputError, match=message):
            pipeline.warm_up(run)
        assert not (run.workdir / "lists").exists()
    run, _ = made(candidates=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"none: no such file"):
        pipeline.warm_up(run)


def test_settings_of_bm25_are_fixed_where_it_finds_candidates(opened):
    for sources, fixed in ((("retriever",), False), (("retriever", "bm25"), True)):
        run = opened(sources=sources)
        claim(run)
        run.config.evaluate.bm25.k1 = 0.9
        if fixed:
            with pytest.raises(
                InputError, match=r"another config \(evaluate\.bm25\.k1: 1\.2 -> 0\.9"
            ):
                claim(run)
        else:
            claim(run)


def taught_lists(run, store):
    lists = mining.draw_lists(run.config, store, mining.retrieve(run, store), "reranker", number=16)
    return lists, teacher.taught(run, store, lists)


def test_bm25_teaches_by_the_scores_it_searches_by(made):
    run, store = made(sources=("bm25",), depth=48)
    run.config.reranker.teacher = "bm25"
    teacher.check(run)
    drawn, lists = taught_lists(run, store)
    np.testing.assert_array_equal(lists.passages_LxP, drawn.passages_LxP)
    (ranking,) = rankings.search_bm25(run, store, {"train": lists.query_rows_L}, 48)
    for passages, scores, *found in zip(lists.passages_LxP, lists.teacher_LxP, *ranking):
        known = dict(zip(*(x.tolist() for x in found)))
        np.testing.assert_allclose(scores, [known.get(p, 0.0) for p in passages], rtol=1e-5)
    # Lists that are dealt to batches take their scores along.
    stage = stages.make_stage(run.config, run.models, "reranker")
    batches = stage_batches(run, store, "reranker", stage, lists)
    given = {
        (q, *p): t for q, p, t in zip(lists.query_rows_L, lists.passages_LxP, lists.teacher_LxP)
    }
    dealt = batches.make(1)["teacher"].reshape(8, -1)
    order = batches.lists
    for q, p, t in zip(order.query_rows_L[8:16], order.passages_LxP[8:16], dealt):
        np.testing.assert_array_equal(given[(q, *p)], t)


def test_a_run_file_teaches_what_it_scores(made, tmp_path):
    run, store = made()
    path = tmp_path / "teacher.trec"
    run.config.reranker.teacher = str(path)
    with pytest.raises(InputError, match=r"teacher\.trec: no such file"):
        teacher.check(run)
    path.write_text("q39 Q0 p1 1 0.5 x\n")
    teacher.check(run)
    with pytest.raises(InputError, match="scores no passage of a training list"):
        taught_lists(run, store)
    path.write_text("".join(f"q{i} Q0 p{i} 1 {i / 2} x\n" for i in range(32)))
    _, lists = taught_lists(run, store)
    heads = [int(store.splits["train"].ids[row][1:]) / 2 for row in lists.query_rows_L]
    np.testing.assert_array_equal(lists.teacher_LxP[:, 0], np.array(heads, np.float32))
    assert np.isnan(lists.teacher_LxP[:, 1:]).all()


def test_equal_texts_are_found_by_their_tokens():
    pairs = np.array([[0, 1], [3, 4]])
    # Passages 3, 5 and 7 have one text, 4 and 6 another.
    texts = np.array([0, 1, 2, 3, 4, 3, 4, 3, -1])
    candidates = np.array([[3, 5, 6, -1], [5, 6, 7, 4]])
    found = same_text(pairs, np.array([0, 1]), candidates, texts)
    assert found.T.tolist() == [[0, 5], [1, 6]]


@pytest.fixture(scope="module")
def doubled(tmp_path_factory, bert_folder):
    """A run in which each passage is there twice: p3 with a title, p3b all of it in its text."""
    data = write_beir(tmp_path_factory.mktemp("doubled") / "data")
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").open()]
    corpus += [
        {"_id": f"{p['_id']}b", "title": "", "text": f"{p['title']} {p['text']}"} for p in corpus
    ]
    (data / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in corpus))
    config = tiny_config(data, bert_folder)
    config.retriever.epochs = 0.0
    run = untrained(open_run(config, tmp_path_factory.mktemp("doubled") / "w"))
    return run, pipeline.prepare(run)


@pytest.mark.parametrize("warm", [8, 24, 1000])
def test_joint_training_begins_with_queries_that_the_warm_up_has_not_read(doubled, warm):
    run, store = doubled
    config = config_lib.loads(config_lib.dumps(run.config))
    config.reranker.update({"epochs": 1.0, "most_lists": warm})
    config.joint.update({"epochs": 2.0, "most_lists": 1000})
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    read = mining.draw_lists(config, store, candidates, "reranker").query_rows_L
    lists = mining.draw_lists(config, store, candidates, "joint")
    every = len(lists.query_rows_L) // 2
    assert len(read) == min(warm, every)
    for start in (0, every):
        known_L = np.isin(lists.query_rows_L[start : start + every], read)
        # Those that are new come first, each labelled pair once in a pass.
        assert known_L.sum() == len(read)
        assert (np.diff(known_L.astype(int)) >= 0).all()
    config.reranker.epochs = 0.0
    plain = mining.draw_lists(config, store, candidates, "joint")
    assert warm == 1000 or (plain.query_rows_L != lists.query_rows_L).any()
    assert sorted(plain.query_rows_L) == sorted(lists.query_rows_L)
    if warm == 1000:
        np.testing.assert_array_equal(plain.passages_LxP, lists.passages_LxP)


@pytest.mark.parametrize("stage", ["reranker", "joint"])
def test_a_negative_never_has_the_text_of_a_positive(doubled, capsys, stage):
    run, store = doubled
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    ids = np.array(store.passage_ids)
    twins = 0
    for query, passages in listed(candidates, store)["train"].items():
        twins += query.replace("q", "p") + "b" in passages
    assert twins > 0
    lists = mining.draw_lists(run.config, store, candidates, stage, number=64)
    assert f"  {twins} candidates have the text of a positive" in capsys.readouterr().out
    for query, passages in zip(lists.query_rows_L, ids[lists.passages_LxP]):
        own = store.splits["train"].ids[query].replace("q", "p")
        assert f"{own}b" not in passages[1:]
        assert own not in passages[1:]


def test_without_titles_other_texts_are_equal(doubled):
    _, store = doubled
    rows = np.array([store.passage_ids.index(key) for key in ("p3", "p3b", "p4")])
    numbers = store.same_text(rows, True)
    assert numbers[rows[0]] == numbers[rows[1]] != numbers[rows[2]]
    assert (np.delete(numbers, rows) == -1).all()
    numbers = store.same_text(rows, False)
    assert len({*numbers[rows].tolist()}) == 3


def test_no_negative_of_the_batch_has_the_text_of_a_positive(doubled):
    run, store = doubled
    queries = store.splits["train"]
    rows = [queries.ids.index(f"q{i}") for i in range(8)]
    # The last list has the twin of the first query's passage at its head.
    heads = [store.passage_ids.index(f"p{i}") for i in range(7)] + [store.passage_ids.index("p0b")]
    kinds = np.zeros((8, 1), np.uint8)
    lists = Lists(np.array(rows), np.array(heads)[:, None], kinds)
    stage = stages.make_stage(run.config, run.models, "retriever")
    batch = stage_batches(run, store, "retriever", stage, lists).make(0)
    where = np.asarray(batch["in_batch_where"]).reshape(8, 8)
    assert (~where).sum() == 2


def judged(run, store):
    """Scored candidates with another offset for each query."""
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    for number, (split, each) in enumerate(candidates.items()):
        offsets = np.random.default_rng(number).normal(scale=50, size=(len(each.query_rows_Q), 1))
        shifted = (each.reranker_QxN + offsets).astype(np.float32)
        candidates[split] = dataclasses.replace(each, reranker_QxN=shifted)
    return candidates


def test_probabilities_by_the_settings(made):
    """The mean is over as many candidates of training queries as of dev ones."""
    run, store = made(calibrate="query_mean")
    candidates = judged(run, store)
    found, _ = mining.comparable(run.config, store, candidates)
    # Depths are 8 for training queries and 6 for dev ones.
    for split, each in found.items():
        raw_QxN = candidates[split].reranker_QxN
        expected = raw_QxN - raw_QxN[:, :6].mean(axis=1, keepdims=True)
        np.testing.assert_allclose(each.reranker_QxN, expected, rtol=1e-4, atol=1e-4)
    run.config.mine.scored_depth = 3
    found, _ = mining.comparable(run.config, store, candidates)
    np.testing.assert_allclose(found["dev"].reranker_QxN[:, :3].mean(axis=1), 0, atol=1e-4)
    run.config.mine.update({"calibrate": "raw", "relevant_share": 0.2})
    raw, line = mining.comparable(run.config, store, candidates)
    assert raw["train"] is candidates["train"]
    run.config.mine.relevant_share = 0.5
    _, other = mining.comparable(run.config, store, candidates)
    assert other[0] == line[0]
    assert other[1] - line[1] == pytest.approx(np.log(4))
    run.config.mine.update({"probability": "sigmoid", "calibrate": "query_mean"})
    found, line = mining.comparable(run.config, store, candidates)
    assert line == (1.0, 0.0)
    assert found["train"] is candidates["train"]


def test_lists_are_drawn_by_what_is_comparable(made):
    """Lists and report; offsets of the queries change nothing, as they would for raw scores."""
    run, store = made(calibrate="query_mean", negative_below=0.3)
    candidates = mining.mine(run, store, mining.retrieve(run, store))
    drawn = [
        mining.draw_lists(run.config, store, given, "joint", number=32).passages_LxP
        for given in (candidates, judged(run, store))
    ]
    np.testing.assert_array_equal(*drawn)
    report, _ = outputs.denoise_report(run, "", 2)
    assert "scores less the mean of their query's" in denoise.render(report)
    _, line = mining.comparable(run.config, store, candidates)
    assert tuple(report["probability"].values()) == line


def test_the_whole_recipe_with_other_candidates(tmp_path, bert_folder):
    config = tiny_config(write_beir(tmp_path / "data"), bert_folder)
    config.retriever.epochs = 0.0
    config.reranker.loss = "pointwise"
    config.mine.update({"sources": ("retriever", "bm25"), "probability": "sigmoid", "margin": 0.01})
    config.joint.refresh_every = 3
    pipeline.main(config, tmp_path / "w")
    again = [
        np.load(tmp_path / "w" / "lists" / folder / "train.retrieved.npz")
        for folder in ("", "joint.0000003")
    ]
    assert (again[0]["highest"] != again[1]["highest"]).any()
    for each in again:
        # Half of them are BM25's, of which the retriever has not found all.
        assert 0 < np.isnan(each["scores"]).mean() < 0.5
