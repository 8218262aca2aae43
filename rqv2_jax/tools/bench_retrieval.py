"""The speed of encoding, re-ranking, mining and search, beside rivals'.

Shape suffixes: N sequences or passages, M passages and queries, S batches of a shape, R rows,
Q queries, K depth, D vector size.
"""

import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rqv2_jax.data import packing
from rqv2_jax.models.bert import BertConfig
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import encode, index, rerank, stream
from rqv2_jax.tools import bench_common, machines, rivals, workload
from rqv2_jax.tools.bench_common import Texts

# Dimensions in which the vectors differ; the others hold noise.
INTRINSIC = 24
# Recalls at which indexes are compared with each other.
RECALLS = (0.9, 0.95, 0.99)


class _Work(NamedTuple):
    """Sequences that an encoder reads in batches, by us and, if there is one, by a rival."""

    name: str
    encoder: BertConfig
    lengths_N: np.ndarray
    layout: stream.Layout
    ours: Callable
    theirs: Callable | None


def encode_and_rerank(run: Run, texts: Texts, rounds: int, versus: bool) -> list[dict]:
    """Measures passages to vectors, and pairs to scores; tokenising is part of either."""
    towers, scorer = run.initial("retriever"), run.initial("reranker")
    forward, store, asking = run.forward, texts.store, texts.store.splits["train"].texts
    rows_N = np.arange(len(texts.passages))
    query_rows_N = rows_N % len(texts.queries)
    pair_rows = asking, query_rows_N, rows_N[:, None]
    passages = [_joined(passage) for passage in texts.passages]
    pairs = [(texts.queries[row], passage) for row, passage in zip(query_rows_N, passages)]
    rival = rivals.SentenceTransformers(run) if versus else None
    if versus and rivals.device() == "cuda":
        rival.tune(passages, pairs)
    encoding = _Work(
        "encode",
        run.models.retriever,
        run.inputs.passage_lengths(store, rows_N),
        encode.layout(forward, store),
        lambda: encode.passages(forward, towers["passage"], store, rows_N),
        (lambda: rival.encode(passages)) if versus else None,
    )
    reranking = _Work(
        "re-rank",
        run.models.reranker,
        run.inputs.pair_lengths(store, asking, query_rows_N, rows_N),
        rerank.layout(forward, store, asking),
        lambda: rerank.scores(forward, scorer, store, *pair_rows),
        (lambda: rival.rerank(pairs)) if versus else None,
    )
    return [_measured(run, work, rounds, texts.tokenised_in) for work in (encoding, reranking)]


def _measured(run: Run, work: _Work, rounds: int, tokenised_in: float) -> dict:
    first_seconds = machines.seconds(work.ours, 1)[0]
    ours, theirs = bench_common.in_turn(work.ours, work.theirs, rounds)
    ours = [tokenised_in + seconds for seconds in ours]
    seconds, count = float(np.median(ours)), len(work.lengths_N)
    real = float(work.lengths_N.sum())
    rate = float(workload.forward_flops(work.encoder, 1, work.lengths_N).sum()) / seconds
    computed = sum(
        len(numbers_SxR) * packing.size(shapes)
        for numbers_SxR, shapes in stream.schedule(work.lengths_N, work.layout, run.sharding.shards)
    )
    line = {
        "benchmark": work.name,
        "sequences": count,
        "sequences_per_second": count / seconds,
        "tokenising_share": tokenised_in / seconds,
        "real_tokens_per_second": real / seconds,
        "computed_over_real_tokens": computed / real,
        "model_gflop_per_second": rate / 1e9,
        **bench_common.shares_of_peak(run, rate),
        "first_round_seconds": first_seconds,
        "peak_memory_gib": bench_common.peak_memory(),
    }
    if theirs:
        line |= bench_common.against("sentence_transformers", "seconds", theirs, ours)
    return line


def _joined(passage: tuple[str, str]) -> str:
    return " ".join(part for part in passage if part)


def mine(run: Run, texts: Texts, rounds: int, versus: bool) -> dict:
    """Measures candidates from texts: tokenising, encoding, search, scoring the first of each query."""
    towers, scorer = run.initial("retriever"), run.initial("reranker")
    asking, forward, settings = texts.store.splits["train"].texts, run.forward, run.config.mine
    query_rows_Q = np.arange(len(texts.queries))
    ours_QxK = theirs_QxK = None

    def ours() -> None:
        nonlocal ours_QxK
        passages_NxD = encode.passages(
            forward, towers["passage"], texts.store, np.arange(len(texts.passages))
        )
        queries_QxD = encode.queries(forward, towers["query"], asking, query_rows_Q)
        ours_QxK, _ = index.exact(queries_QxD, [passages_NxD], settings.depth)
        first_QxK = ours_QxK[:, : settings.scored_depth]
        rerank.scores(forward, scorer, texts.store, asking, query_rows_Q, first_QxK)

    def theirs() -> None:
        nonlocal theirs_QxK
        theirs_QxK = rival.mine(texts.queries, passages, settings.depth, settings.scored_depth)

    rival = rivals.SentenceTransformers(run) if versus else None
    passages = [_joined(passage) for passage in texts.passages]
    ours()
    our_seconds, their_seconds = bench_common.in_turn(ours, theirs if versus else None, rounds)
    our_seconds = [texts.tokenised_in + seconds for seconds in our_seconds]
    line = {
        "benchmark": "mine",
        "passages": len(passages),
        "queries": len(texts.queries),
        "scored_pairs": len(texts.queries) * min(settings.scored_depth, len(passages)),
        "seconds": float(np.median(our_seconds)),
        "peak_memory_gib": bench_common.peak_memory(),
    }
    if rival is not None:
        line |= bench_common.against("sentence_transformers", "seconds", their_seconds, our_seconds)
        line["candidates_in_common"] = index.recall(ours_QxK, theirs_QxK)
    return line


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

    def ours() -> np.ndarray:
        return index.exact(queries_QxD, [passages_NxD], depth)[0]

    rows_QxK = ours()
    line = {"benchmark": "exact", "vectors": vectors, "dimensions": size, "depth": depth}
    theirs = rivals.exact_search(passages_NxD, queries_QxD, depth) if versus else None
    our_seconds, their_seconds = bench_common.in_turn(ours, theirs, rounds)
    seconds, read = float(np.median(our_seconds)), passages_NxD.nbytes
    line |= {"queries": queries, "seconds": seconds, "gb_per_second": read / seconds / 1e9}
    if versus:
        line |= bench_common.against("torch", "seconds", their_seconds, our_seconds)
        line["found_in_common"] = index.recall(theirs(), rows_QxK)
    return line


def search(
    vectors: int, size: int, queries: int, depth: int, settings: ConfigDict, versus: bool
) -> list[dict]:
    """Measures exact search, ScaNN and rivals on random vectors, queries drawn as passages are.

    `settings` are `config.evaluate.scann`.
    """
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

    searches = {"as configured": lambda: approximate(None)}
    if vectors >= settings.brute_force_below:
        searches |= {f"{n} leaves": lambda n=n: approximate(n) for n in (8, 32, 64, 128)}
    candidates = [("ScaNN", built, searches)]
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
    rates: dict = {line["index"]: None for line in lines if line["index"] != "exact"}
    for line in lines:
        # Exact search has no recall and is not compared.
        if line["index"] in rates and line[f"recall@{depth}"] >= least:
            rates[line["index"]] = max(rates[line["index"]] or 0.0, line["queries_per_second"])
    return {"queries_per_second_by_index": rates}
