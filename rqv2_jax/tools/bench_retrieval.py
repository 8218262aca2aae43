"""The speed of encoding, re-ranking, mining and search, beside rivals'.

Shape suffixes: N sequences or passages, M passages and queries, S shards, R rows, Q queries,
K depth, D vector size.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data import packing
from rqv2_jax.models.bert import BertConfig
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import encode, index, rerank, stream
from rqv2_jax.tools import machines, rivals, workload
from rqv2_jax.tools.workload import Texts

# Dimensions in which the vectors differ; the others hold noise.
INTRINSIC = 24
# Recalls at which indexes are compared with each other.
RECALLS = (0.9, 0.95, 0.99)


def encode_and_rerank(run: Run, texts: Texts, rounds: int, versus: bool) -> list[dict]:
    """Measures passages to vectors, and pairs to scores; tokenising is part of either."""
    towers, scorer, models = run.initial("retriever"), run.initial("reranker"), run.models
    forward, store, asking = run.forward, texts.store, texts.store.splits["train"].texts
    rows_N = np.arange(len(texts.passages))
    query_rows_N = rows_N % len(texts.queries)
    pair_rows = asking, query_rows_N, rows_N[:, None]
    encoding = partial(encode.passages, forward, tower(towers, "passage"), store, rows_N)
    reranking = partial(rerank.scores, forward, scorer, store, *pair_rows)
    encode_rival = rerank_rival = None
    if versus:
        passages = _joined(texts)
        pairs = [(texts.queries[row], passage) for row, passage in zip(query_rows_N, passages)]
        rival = rivals.SentenceTransformers(run)
        if rivals.device() == "cuda":
            rival.tune(passages, pairs)
        encode_rival, rerank_rival = partial(rival.encode, passages), partial(rival.rerank, pairs)
    measured = partial(_measured, run, rounds, texts.tokenised_in)
    lengths_N, layout = run.inputs.passage_lengths(store, rows_N), encode.layout(forward, store)
    encoded = measured(models.retriever, lengths_N, layout, encoding, encode_rival)
    lengths_N = run.inputs.pair_lengths(store, asking, query_rows_N, rows_N)
    layout = rerank.layout(forward, store, asking)
    reranked = measured(models.reranker, lengths_N, layout, reranking, rerank_rival)
    return [{"benchmark": "encode"} | encoded, {"benchmark": "re-rank"} | reranked]


def _measured(
    run: Run,
    rounds: int,
    tokenised_in: float,
    encoder: BertConfig,
    lengths_N: np.ndarray,
    layout: stream.Layout,
    ours: Callable,
    theirs: Callable | None,
) -> dict:
    """Measures an encoder on sequences that it reads in batches, and a rival if there is one."""
    first_seconds = machines.seconds(ours, 1)[0]
    if theirs is not None:
        theirs()
    our_seconds, their_seconds = machines.in_turn(ours, theirs, rounds)
    our_seconds = [tokenised_in + seconds for seconds in our_seconds]
    seconds, real = float(np.median(our_seconds)), float(lengths_N.sum())
    rate, shards = workload.forward_flops(encoder, lengths_N) / seconds, run.sharding.shards
    computed = sum(
        len(numbers_SxR) * packing.size(shapes)
        for numbers_SxR, shapes in stream.schedule(lengths_N, layout, shards)
    )
    line = {
        "sequences": len(lengths_N),
        "sequences_per_second": len(lengths_N) / seconds,
        "tokenising_share": tokenised_in / seconds,
        "real_tokens_per_second": real / seconds,
        "computed_over_real_tokens": computed / real,
        "model_gflop_per_second": rate / 1e9,
        **machines.shares_of_peak(run.config.model.dtype, rate / shards),
        "first_round_seconds": first_seconds,
        "peak_memory_gib": machines.peak_memory(),
    }
    if theirs is not None:
        line |= machines.against("sentence_transformers", "seconds", their_seconds, our_seconds)
    return line


def _joined(texts: Texts) -> list[str]:
    return [" ".join(part for part in passage if part) for passage in texts.passages]


def mine(run: Run, texts: Texts, rounds: int, versus: bool) -> dict:
    """Measures candidates from texts: tokenising, encoding, search, scoring the first of each query."""
    towers, scorer = run.initial("retriever"), run.initial("reranker")
    asking, forward, settings = texts.store.splits["train"].texts, run.forward, run.config.mine
    query_rows_Q, rows_N = np.arange(len(texts.queries)), np.arange(len(texts.passages))

    def ours() -> np.ndarray:
        passages_NxD = encode.passages(forward, tower(towers, "passage"), texts.store, rows_N)
        queries_QxD = encode.queries(forward, tower(towers, "query"), asking, query_rows_Q)
        rows_QxK, _ = index.exact(queries_QxD, [passages_NxD], settings.depth)
        first_QxK = rows_QxK[:, : settings.scored_depth]
        rerank.scores(forward, scorer, texts.store, asking, query_rows_Q, first_QxK)
        return rows_QxK

    theirs, common = None, {}
    ours_QxK = ours()
    if versus:
        depths = settings.depth, settings.scored_depth
        rival = rivals.SentenceTransformers(run)
        theirs = partial(rival.mine, texts.queries, _joined(texts), *depths)
        common = {"candidates_in_common": index.recall(ours_QxK, theirs())}
    our_seconds, their_seconds = machines.in_turn(ours, theirs, rounds)
    our_seconds = [texts.tokenised_in + seconds for seconds in our_seconds]
    line = {
        "benchmark": "mine",
        "passages": len(rows_N),
        "queries": len(texts.queries),
        "scored_pairs": len(texts.queries) * min(settings.scored_depth, len(rows_N)),
        "seconds": float(np.median(our_seconds)),
        "peak_memory_gib": machines.peak_memory(),
    }
    if versus:
        line |= machines.against("sentence_transformers", "seconds", their_seconds, our_seconds)
    return line | common


def _clustered(vectors: int, queries: int, size: int) -> list[np.ndarray]:
    """Draws passage and query vectors [N, D] and [Q, D] alike.

    A vector comes from one of overlapping clusters of about 200 in `INTRINSIC` dimensions, which is
    turned into the space of all, where every coordinate gets noise of its own.
    """
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(vectors // 200, 1), INTRINSIC)).astype(np.float32)
    turn = (rng.normal(size=(INTRINSIC, size)) / INTRINSIC**0.5).astype(np.float32)
    vectors_MxD = np.empty((vectors + queries, size), np.float32)
    for first in range(0, len(vectors_MxD), 2**16):
        part = vectors_MxD[first : first + 2**16]
        place = centres[rng.integers(0, len(centres), len(part))]
        place += 0.7 * rng.standard_normal(place.shape, np.float32)
        part[:] = place @ turn + 0.2 * rng.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return np.split(vectors_MxD, [vectors])


def exact(vectors: int, size: int, queries: int, depth: int, rounds: int, versus: bool) -> dict:
    """Measures exact search over random vectors in this host's memory, beside torch's topk."""
    passages_NxD, queries_QxD = _clustered(vectors, queries, size)
    ours = partial(index.exact, queries_QxD, [passages_NxD], depth)
    theirs, common, (rows_QxK, _) = None, {}, ours()
    if versus:
        theirs = rivals.exact_search(passages_NxD, queries_QxD, depth)
        common = {"found_in_common": index.recall(theirs(), rows_QxK)}
    our_seconds, their_seconds = machines.in_turn(ours, theirs, rounds)
    seconds, read = float(np.median(our_seconds)), passages_NxD.nbytes
    line = {"benchmark": "exact", "vectors": vectors, "dimensions": size, "depth": depth}
    line |= {"queries": queries, "seconds": seconds, "gb_per_second": read / seconds / 1e9}
    if versus:
        line |= machines.against("torch", "seconds", their_seconds, our_seconds)
    return line | common


def search(
    vectors: int, size: int, queries: int, depth: int, settings: ConfigDict, versus: bool
) -> list[dict]:
    """Measures exact search, ScaNN as `settings` say and rivals on random vectors and queries."""
    passages_NxD, queries_QxD = _clustered(vectors, queries, size)
    index.exact(queries_QxD, [passages_NxD[: index.PASSAGES_PER_TILE]], depth)
    started = time.perf_counter()
    exact_QxK, _ = index.exact(queries_QxD, [passages_NxD], depth)
    exact_rate = queries / (time.perf_counter() - started)
    common = {"benchmark": "index", "vectors": vectors, "dimensions": size, "depth": depth}
    lines = [common | {"index": "exact", "queries_per_second": exact_rate}]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        searcher = index.build_scann([passages_NxD], settings, depth, pathlib.Path(folder), "")
        built = time.perf_counter() - started

    def approximate(leaves: int | None) -> np.ndarray:
        return index.scann_search(searcher, queries_QxD, depth, leaves)[0]

    searches = {"as configured": partial(approximate, None)}
    if vectors >= settings.brute_force_below:
        searches |= {f"{n} leaves": partial(approximate, n) for n in (8, 32, 64, 128)}
    candidates: list[tuple[str, float, dict]] = [("ScaNN", built, searches)]
    if versus:
        candidates += rivals.faiss_indexes(passages_NxD, queries_QxD, depth)
    for name, built, searches in candidates:
        for setting, search in searches.items():
            search()
            started = time.perf_counter()
            rows_QxK = search()
            rate = queries / (time.perf_counter() - started)
            lines.append(
                common
                | {"index": name, "setting": setting, "build_seconds": built}
                | {f"recall@{depth}": index.recall(rows_QxK, exact_QxK)}
                | {"queries_per_second": rate, "ratio_to_exact": rate / exact_rate}
            )
    return lines + [common | {"recall": least} | _fastest(lines, depth, least) for least in RECALLS]


def _fastest(lines: list[dict], depth: int, least: float) -> dict:
    """Returns each index's most queries a second at this recall or more, None if it never has it."""
    # Exact search has no recall and is not compared.
    compared = [line for line in lines if line["index"] != "exact"]
    rates: dict[str, float | None] = {line["index"]: None for line in compared}
    for line in compared:
        if line[f"recall@{depth}"] >= least:
            rates[line["index"]] = max(rates[line["index"]] or 0.0, line["queries_per_second"])
    return {"queries_per_second_by_index": rates}
