"""The speed of search over clustered random vectors, exact and by ScaNN, beside torch and faiss.

Shape suffixes: N passages, M passages and queries, Q queries, K depth, D vector size.
"""

import pathlib
import tempfile
import time

import ml_collections
import numpy as np

from rqv2_jax.retrieval import index
from rqv2_jax.tools import bench_common, rivals

# Dimensions in which the vectors differ; the others hold noise.
INTRINSIC = 24
# Recalls at which indexes are compared with each other.
RECALLS = (0.9, 0.95, 0.99)


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
    vectors: int,
    size: int,
    queries: int,
    depth: int,
    settings: ml_collections.ConfigDict,
    versus: bool,
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
