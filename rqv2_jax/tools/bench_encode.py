"""The speed of encoding, re-ranking and mining, beside sentence-transformers'.

Shape suffixes: N sequences, S batches of a shape, R rows, Q queries, K depth, D vector size.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rqv2_jax.data import packing
from rqv2_jax.models.bert import BertConfig
from rqv2_jax.recipe.workdir import Run
from rqv2_jax.retrieval import encode, index, rerank, stream
from rqv2_jax.tools import bench_common, rivals, workload
from rqv2_jax.tools.bench_common import Texts


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
    first_seconds = bench_common.seconds(work.ours, 1)[0]
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
