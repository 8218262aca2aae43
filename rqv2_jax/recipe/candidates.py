"""Candidates of training and dev queries: found by the retriever, by BM25, or named in a run file.

Shape suffixes: Q queries, N candidates of a query (or labelled pairs), D vector size.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import files, own_texts, tokens
from rqv2_jax.data import lists as lists_lib
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe.rankings import read_candidates, search_bm25
from rqv2_jax.recipe.run import Run
from rqv2_jax.retrieval import bm25, encode, index

# By split, "train" and "dev".
Candidates = dict[str, lists_lib.Candidates]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Finder:
    """A folder of a run for candidates, with the name of the models and the corpus they come from."""

    run: Run
    store: tokens.Store
    folder: pathlib.Path
    models: str

    @functools.cached_property
    def source(self) -> str:
        """Names what the candidates are made from, the config's file of candidates included."""
        path = self.run.config.mine.candidates
        if not path:
            return self.models
        return f"{self.models} {files.content_hash([files.open_file(pathlib.Path(path))])}"

    def find(
        self, rows: Arrays, vectors: pathlib.Path, retriever: Callable[[], dict]
    ) -> Candidates:
        """Returns passages for the queries of `rows`, by split, as `config.mine` says.

        The retriever has the params `retriever()`; `vectors` is the folder of the corpus's.
        """
        mine, dev = self.run.config.mine, self.run.config.dev
        further = functools.cache(lambda: _further(self.run, self.store, rows))
        retriever = functools.cache(retriever)

        def candidates(split: str, depth: int) -> lists_lib.Candidates:
            def compute() -> Arrays:
                found, rankings = {}, []
                if "retriever" in mine.sources and not mine.candidates:
                    found = self._retrieve(split, rows[split], depth, vectors, retriever())
                    rankings.append((found["passages"], found["scores"]))
                if "bm25" in mine.sources or mine.candidates:
                    passages_QxN = further()[split][:, :depth]
                    unknown_QxN = np.full(passages_QxN.shape, np.nan, np.float32)
                    rankings.append((passages_QxN, unknown_QxN))
                    interleaved = lists_lib.interleaved(rankings, depth)
                    found |= dict(zip(("passages", "scores"), interleaved))
                return {"query_rows": rows[split], **found}

            kept = artifacts.cached(self.folder / f"{split}.retrieved.npz", self.source, compute)
            unseen_QxN = np.full(kept["scores"].shape, np.nan, np.float32)
            ranking = kept["query_rows"], kept["passages"], kept["scores"]
            return lists_lib.Candidates(*ranking, unseen_QxN, kept.get("highest"))

        depths = {"train": mine.depth, "dev": dev.depth}
        return {split: candidates(split, depths[split]) for split in rows}

    def _retrieve(
        self, split: str, rows_Q: np.ndarray, depth: int, vectors: pathlib.Path, towers: dict
    ) -> Arrays:
        """Returns what the retriever finds: `passages`, `scores`, and with a margin `highest`."""
        queries, forward = self.store.splits[split], self.run.forward
        own_Q = own_texts.of_rows(queries, rows_Q)
        vectors_QxD = encode.queries(forward, tower(towers, "query"), queries.texts, rows_Q)
        dtype, passage = self.run.config.encode.dtype, tower(towers, "passage")
        shards = encode.corpus(forward, passage, self.store, vectors, self.models, dtype)
        ranking = index.exact(vectors_QxD, shards, own_texts.deeper(depth, own_Q))
        found = dict(zip(("passages", "scores"), own_texts.without(*ranking, own_Q)))
        if split == "train" and self.run.config.mine.margin > 0:
            labelled_2xN, margin = queries.positives(), self.run.config.mine.margin
            found["highest"] = highest(vectors_QxD, shards, rows_Q, labelled_2xN, margin)
        return found


def highest(
    vectors_QxD: np.ndarray,
    shards: list[np.ndarray],
    rows_Q: np.ndarray,
    labelled_2xN: np.ndarray,
    margin: float,
) -> np.ndarray:
    """Returns the highest retriever score of a negative [Q], by sentence-transformers' relative margin.

    It is s - margin |s|, where s is the lowest score of a query's labelled passages, retrieved or not;
    infinite where a query has none.
    """
    numbers = {row: number for number, row in enumerate(rows_Q.tolist())}
    lowest_Q = np.full(len(rows_Q), np.inf, np.float32)
    for query, passage in labelled_2xN.T.tolist():
        if (number := numbers.get(query)) is not None:
            shard, place = divmod(passage, encode.PASSAGES_PER_SHARD)
            score = vectors_QxD[number] @ shards[shard][place].astype(np.float32)
            lowest_Q[number] = min(lowest_Q[number], score)
    labelled_Q = np.isfinite(lowest_Q)
    lowest_Q[labelled_Q] -= margin * np.abs(lowest_Q[labelled_Q])
    return lowest_Q


def _further(run: Run, store: tokens.Store, rows: Arrays) -> Arrays:
    """Returns passages [Q, N] by split from the config's run file, or else BM25's, kept in `lists/`."""
    if run.config.mine.candidates:
        return read_given(run, store, rows)
    for package in bm25.PACKAGES:
        optional.load(package, "candidates from BM25")
    depth = max(run.config.mine.depth, run.config.dev.depth)

    def search() -> Arrays:
        found: Arrays = {}

        def by_first() -> None:
            ranked = search_bm25(run, store, rows, depth)
            found.update({split: passages for split, (passages, _) in zip(rows, ranked)})

        hosts.from_first(by_first)
        return found

    method = json.dumps(bm25.described(run.config.evaluate.bm25), sort_keys=True)
    source = artifacts.digest(f"{store.fingerprint} {method} {depth} {[*rows]}", *rows.values())
    return artifacts.cached(run.workdir / "lists" / "bm25.npz", source, search)


def read_given(run: Run, store: tokens.Store, rows: Arrays) -> Arrays:
    """Returns passages [Q, N] by split from the run file that `config.mine.candidates` names.

    Raises InputError if it cannot be used, or names no query of a split.
    """
    path, found = files.open_file(pathlib.Path(run.config.mine.candidates)), {}
    for split, rows_Q in rows.items():
        everyone = np.arange(len(rows_Q))
        (found[split], _), named = read_candidates(path, store, split, rows_Q, everyone)
        if named < len(rows_Q):
            tqdm.tqdm.write(
                f"  {path}: has candidates of {named:,} of {len(rows_Q):,} {split} queries; random "
                "passages fill the others' lists"
            )
    return found


def drawn_queries(run: Run, store: tokens.Store) -> Arrays:
    """Returns the rows, by split, of the training and dev queries that get candidates.

    Dev queries only, if no training lists are drawn from the others.
    """
    most = {"dev": run.config.dev.queries}
    if run.config.reranker.epochs > 0 or not run.config.joint.lists:
        most = {"train": run.config.mine.queries, **most}
    return {
        split: lists_lib.subset(len(store.splits[split].ids), count, run.config.seed)
        for split, count in most.items()
    }
