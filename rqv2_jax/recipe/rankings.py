"""Rankings of a split's queries: by the retriever of a model state, and by the floors.

The floors are what training has to beat: BM25, and the starting retriever as its folder describes it.
Shape suffixes: Q queries, K passages of a query, best first, D vector size.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import tqdm

from rqv2_jax import artifacts, hosts, optional
from rqv2_jax.data import own_texts, tokens
from rqv2_jax.data.lists import Lists
from rqv2_jax.errors import InputError
from rqv2_jax.models.scoring import tower
from rqv2_jax.ranking import metrics, trec
from rqv2_jax.recipe.run import Run, as_released
from rqv2_jax.recipe.texts import rows_of, texts_of
from rqv2_jax.retrieval import bm25, encode, index

# Passage rows [Q, K] and scores [Q, K] of some queries.
Ranking = tuple[np.ndarray, np.ndarray]
# Ranks passages for some of the given queries; K is `config.evaluate.retrieve_depth`.
Search = Callable[[tokens.Queries, np.ndarray], Ranking]


def source_of(run: Run, store: tokens.Store, state: str) -> str:
    """Names the corpus as the retriever of a state encodes it."""
    return f"{run.origin(state=state, model='retriever')} {store.fingerprint}"


def _cached(path: pathlib.Path, source: str, search: Callable[[], Ranking]) -> Ranking:
    """Returns a ranking as `artifacts.cached` keeps it."""
    arrays = artifacts.cached(path, source, lambda: dict(zip(("passages", "scores"), search())))
    return arrays["passages"], arrays["scores"]


def _searching(
    run: Run, store: tokens.Store, towers: dict, find: Callable[[np.ndarray, int], Ranking | None]
) -> Search:
    """Returns a search by vectors of queries, for which `find(vectors_QxD, depth)` ranks passages.

    Where that gives None, the search gives empty arrays.
    """

    def search(queries: tokens.Queries, rows_Q: np.ndarray) -> Ranking:
        own_Q = own_texts.of_rows(queries, rows_Q)
        depth = own_texts.deeper(run.config.evaluate.retrieve_depth, own_Q)
        vectors_QxD = encode.queries(run.forward, tower(towers, "query"), queries.texts, rows_Q)
        ranking = find(vectors_QxD, depth)
        if ranking is None:
            return np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)
        # By the tie rule, so that the re-ranker's cut does not depend on the order of the corpus.
        return own_texts.without(*metrics.sort_run(*ranking, store.passage_ids), own_Q)

    return search


def _vectors(
    run: Run, store: tokens.Store, towers: dict, folder: pathlib.Path, source: str
) -> list[np.ndarray]:
    """Returns the vectors of all passages, as `encode.corpus` keeps them in a folder."""
    dtype, passage = run.config.encode.dtype, tower(towers, "passage")
    return encode.corpus(run.forward, passage, store, folder, source, dtype)


def _exact(shards: list[np.ndarray]) -> Callable[[np.ndarray, int], Ranking]:
    """Returns exact search over the passages' vectors."""
    return lambda vectors_QxD, depth: index.exact(vectors_QxD, shards, depth)


def open_retriever(run: Run, store: tokens.Store, *, state: str, index_name: str) -> Search:
    """Loads the retriever of a state and its vectors of the passages, by which the search finds.

    "exact" or "scann" says how. By ScaNN only the first of several hosts gets anything.
    """
    settings, stage = run.config.evaluate, run.kept_by(state=state, model="retriever")
    source, towers = source_of(run, store, state), run.params(state=state, model="retriever")
    vectors = run.workdir / "vectors" / stage
    shards = _vectors(run, store, towers, vectors, source)
    if index_name == "exact":
        return _searching(run, store, towers, _exact(shards))

    @functools.cache
    def searcher(depth: int) -> Callable[[np.ndarray], Ranking]:
        folder = run.workdir / "index" / stage
        return index.open_scann(shards, settings.scann, depth, folder, source)

    def find(vectors_QxD: np.ndarray, depth: int) -> Ranking | None:
        # All hosts have encoded the queries together.
        return searcher(depth)(vectors_QxD) if hosts.first() else None

    return _searching(run, store, towers, find)


def retrieve(
    run: Run,
    store: tokens.Store,
    queries: tokens.Queries,
    rows_Q: np.ndarray,
    *,
    state: str,
    index_name: str,
) -> Ranking:
    """Returns what the search of `open_retriever` finds for some of the queries."""
    return open_retriever(run, store, state=state, index_name=index_name)(queries, rows_Q)


def retrieve_split(
    run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray, *, state: str, index_name: str
) -> tuple[Ranking, dict[str, float]]:
    """Returns what `retrieve` finds for queries of a split, kept in `eval/`, and ScaNN's recall."""
    settings, queries = run.config.evaluate, store.splits[split]
    stage = run.kept_by(state=state, model="retriever")
    source = f"{source_of(run, store, state)} {queries.fingerprint} "
    source += f"{settings.queries} {settings.retrieve_depth}"

    def by(name: str, source: str) -> Ranking:
        how = {"state": state, "index_name": name}
        path = run.workdir / "eval" / f"{split}.{stage}.{name}.npz"
        return _cached(path, source, lambda: retrieve(run, store, queries, rows_Q, **how))

    exact = by("exact", source)
    if index_name == "exact":
        return exact, {}
    sizes = len(store.passage_ids), run.models.retriever.hidden_size
    built_by = hosts.from_first(lambda: index.scann_described(settings.scann, *sizes))
    approximate = by("scann", f"{source} {built_by}")
    recalls = {
        f"recall@{depth} against exact": index.recall(
            approximate[0][:, :depth], exact[0][:, :depth]
        )
        for depth in (10, 100)
    }
    return approximate, recalls


def _too_large(name: str, most: int, store: tokens.Store) -> bool:
    """Says, in a line too, whether a floor is left out because there are too many passages."""
    passages = len(store.passage_ids)
    if passages > most:
        tqdm.tqdm.write(
            f"  {name}: left out, as {passages} passages are more than "
            f"config.evaluate.{name}.most_passages, {most}"
        )
    return passages > most


def _reading(run: Run) -> tuple:
    """Returns what decides how the retriever of a run reads and scores texts."""
    inputs = dataclasses.replace(run.inputs, pair_length=0, pair_cls=0, pair_sep=0)
    return inputs, run.models.retriever, run.models.pooling, run.models.similarity


def _released_source(run: Run, released: Run, store: tokens.Store) -> str:
    """Names the corpus as the starting retriever of a run encodes it as released."""
    return f"released {run.weights_hash} {store.fingerprint} {_reading(released)} "


def _search_as_released(released: Run, store: tokens.Store, source: str) -> Search:
    """Returns the search of a run that `as_released` has opened, its passages encoded if need be."""
    towers, folder = released.initial("retriever"), released.workdir / "vectors" / "released"
    shards = _vectors(released, store, towers, folder, source)
    return _searching(released, store, towers, _exact(shards))


def open_released(run: Run, store: tokens.Store, *, encoded: bool) -> Search:
    """Loads the starting retriever as its folder has it, and its vectors of the passages.

    Raises InputError if the folder cannot be read as it is; and, unless they may be `encoded` now, if
    the workdir has no such vectors.
    """
    released = as_released(run)
    same = _reading(released) == _reading(run)
    source = source_of(run, store, "zero_shot") if same else _released_source(run, released, store)
    vectors = run.workdir / "vectors" / ("zero_shot" if same else "released")
    if not encoded and encode.made_from(vectors) != source:
        raise InputError(
            f"the workdir has no vectors of the passages by the released model; python -m "
            f"rqv2_jax.search --workdir {run.workdir} --serve --encode_released makes them, once"
        )
    if same:
        return open_retriever(run, store, state="zero_shot", index_name="exact")
    return _search_as_released(released, store, source)


def by_released(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray) -> Ranking | None:
    """Returns what the starting retriever finds as released; None, with a line, if left out."""
    queries, settings = store.splits[split], run.config.evaluate
    if _too_large("released", settings.released.most_passages, store):
        return None
    try:
        released = as_released(run)
    except InputError as e:
        tqdm.tqdm.write(f"  released: left out, as the folder cannot be read as it is ({e})")
        return None
    if _reading(released) == _reading(run):
        where = {"state": "zero_shot", "index_name": "exact"}
        return retrieve_split(run, store, split, rows_Q, **where)[0]
    own_Q = own_texts.of_rows(queries, rows_Q)
    source = _released_source(run, released, store)

    def search():
        tqdm.tqdm.write(
            f"  released: the starting model at {released.inputs.passage_length} tokens"
        )
        return _search_as_released(released, store, source)(queries, rows_Q)

    asked = f"{source} {queries.fingerprint} {settings.retrieve_depth}"
    path = run.workdir / "eval" / f"{split}.released.npz"
    return _cached(path, artifacts.digest(asked, rows_Q, own_Q), search)


def by_bm25(run: Run, store: tokens.Store, split: str, rows_Q: np.ndarray) -> Ranking | None:
    """Returns what BM25 finds; None, with a line that says why, where it is left out."""
    settings, queries = run.config.evaluate, store.splits[split]
    if _too_large("bm25", settings.bm25.most_passages, store):
        return None
    try:
        for package in bm25.PACKAGES:
            optional.load(package, "the floor BM25")
    except InputError as e:
        tqdm.tqdm.write(f"  bm25: left out ({e})")
        return None
    own_Q = own_texts.of_rows(queries, rows_Q)

    def search() -> dict[str, np.ndarray]:
        if not hosts.first():
            return {}
        try:
            (ranking,) = search_bm25(run, store, {split: rows_Q}, settings.retrieve_depth)
        except InputError as e:
            tqdm.tqdm.write(f"  bm25: left out, as the texts cannot be read ({e})")
            return {}
        if (ranking[0] < 0).all():
            tqdm.tqdm.write(
                "  bm25: left out, as no query has a word of a passage; words are runs of two letters "
                "or more, which does not do for languages written without spaces"
            )
            return {}
        return dict(zip(("passages", "scores"), metrics.sort_run(*ranking, store.passage_ids)))

    method = json.dumps(bm25.described(settings.bm25), sort_keys=True)
    source = f"{store.fingerprint} {queries.fingerprint} {method} {run.config.data.titles} "
    source = artifacts.digest(source + str(settings.retrieve_depth), rows_Q, own_Q)
    arrays = artifacts.cached(run.workdir / "eval" / f"{split}.bm25.npz", source, search)
    return (arrays["passages"], arrays["scores"]) if arrays else None


def search_bm25(
    run: Run, store: tokens.Store, rows: dict[str, np.ndarray], depth: int
) -> list[Ranking]:
    """Returns what BM25 finds, `depth` passages at most, for some queries of each split.

    The passages are read and indexed once for all. Raises InputError if the texts cannot be read.
    """
    own = {split: own_texts.of_rows(store.splits[split], rows_Q) for split, rows_Q in rows.items()}
    deepest = max(depth, *(own_texts.deeper(depth, own_Q) for own_Q in own.values()))
    found = bm25.search(*_strings(run, store, rows), deepest, run.config.evaluate.bm25)
    ends = np.cumsum([len(rows_Q) for rows_Q in rows.values()])[:-1]
    rankings = []
    for *part, own_Q in zip(*(np.split(array, ends) for array in found), own.values()):
        passages_QxK, scores_QxK = own_texts.without(part[0], part[1], own_Q)
        rankings.append((passages_QxK[:, :depth], scores_QxK[:, :depth]))
    return rankings


def score_bm25(run: Run, store: tokens.Store, lists: Lists) -> np.ndarray:
    """Returns BM25's scores [L, P] of the passages of training lists; InputError as `search_bm25`."""
    rows_Q, query_L = np.unique(lists.query_rows_L, return_inverse=True)
    passages, asked = _strings(run, store, {"train": rows_Q})
    asked = [asked[number] for number in query_L]
    return bm25.scores(passages, asked, lists.passages_LxP, run.config.evaluate.bm25)


def open_bm25(run: Run, store: tokens.Store) -> Callable[[list[str]], Ranking]:
    """Indexes the passages for BM25 and returns the search for questions, as `by_bm25` ranks.

    Raises InputError if there are more passages than `config.evaluate.bm25.most_passages`, if they
    cannot be read, or if a package is missing.
    """
    settings, count = run.config.evaluate, len(store.passage_ids)
    if count > settings.bm25.most_passages:
        raise InputError(
            f"{count} passages are more than config.evaluate.bm25.most_passages, "
            f"{settings.bm25.most_passages}"
        )
    for package in bm25.PACKAGES:
        optional.load(package, "BM25")
    passages, _ = _strings(run, store, {})
    made = bm25.build(passages, settings.bm25)

    def search(questions: list[str]) -> Ranking:
        ranking = made.search(questions, settings.retrieve_depth)
        return metrics.sort_run(*ranking, store.passage_ids)

    return search


def _strings(
    run: Run, store: tokens.Store, rows: dict[str, np.ndarray]
) -> tuple[Iterator[str], list[str]]:
    """Returns the texts of all passages and of some queries of each split, one after the other."""
    texts, titles = texts_of(run, store.fingerprint), run.config.data.titles
    asked: list[str] = []
    for split, rows_Q in rows.items():
        strings = store.splits[split].strings or [query.text for query in texts.queries(split)]
        asked += [strings[row] for row in rows_Q]
    return (f"{p.title} {p.text}" if titles else p.text for p in texts.passages()), asked


def read_candidates(
    path: pathlib.Path, store: tokens.Store, split: str, rows_Q: np.ndarray, chosen_R: np.ndarray
) -> tuple[Ranking, int]:
    """Reads candidates of some of a split's queries from a run file, best first.

    Only those numbered `chosen_R` get any; also returns how many of them do. Raises InputError if that
    is none, or the file names a passage that is not in the collection.
    """
    queries = store.splits[split]
    listed, passage_rows = trec.read_run(path), rows_of(store.passage_ids)
    every_id = [queries.ids[row] for row in rows_Q]
    query_ids = [every_id[number] for number in chosen_R]
    listed = {query: listed[query] for query in query_ids if query in listed}
    if not listed:
        raise InputError(
            f"{path}: holds none of the {len(query_ids)} {split} queries that are to be re-ranked; "
            "give a run of these"
        )
    for query, candidates in listed.items():
        for passage, _ in candidates:
            if passage not in passage_rows:
                raise InputError(
                    f"{path}: passage {passage!r} of query {query!r} is not in the collection; give "
                    "a run over its passages"
                )
    passages_QxK, scores_QxK = trec.run_arrays(listed, every_id, passage_rows)
    own_Q = own_texts.of_rows(queries, rows_Q)
    passages_QxK = np.where(passages_QxK == own_Q[:, None], -1, passages_QxK)
    return metrics.sort_run(passages_QxK, scores_QxK, store.passage_ids), len(listed)
