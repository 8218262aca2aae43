"""The evaluation of floors and model states on a split, and of re-rankers on given candidates.

Shape suffixes: Q queries, R queries that are re-ranked, K passages of a query, best first.
"""

import pathlib

import numpy as np

from rqv2_jax.data import own_texts, tokens
from rqv2_jax.errors import InputError
from rqv2_jax.ranking import metrics, trec
from rqv2_jax.recipe import rankings
from rqv2_jax.recipe.rankings import Ranking
from rqv2_jax.recipe.run import STATES, Run
from rqv2_jax.recipe.scoreboard import Scoreboard
from rqv2_jax.recipe.texts import rows_of
from rqv2_jax.retrieval import bm25

# The re-ranker is trained from state reranker on.
RERANKED = ("reranker", "joint")


def evaluate(
    run: Run,
    store: tokens.Store,
    split: str,
    indexes: tuple[str, ...],
    states: tuple[str, ...] = STATES,
) -> dict:
    """Evaluates retrieval and re-ranking of floors and states on a split, as `results.json` has it.

    The floors are BM25 and the starting retriever as its folder has it (state "released"). Retrieves
    with exact search and, if asked for, with ScaNN; the re-ranker re-ranks what its own state's
    retriever found by the first of `indexes`, and what BM25 found (index "bm25"). Where not all
    queries are re-ranked, `evaluate.rerank_queries` of them are, one random sample with a fixed seed:
    the `metrics` of every row are over that sample, and `all_queries` has those of rows that were
    measured on more. A significance test takes all queries that both sides were measured on.

    Writes `runs/*.trec`, `eval/<split>.json` and, as `<state>.<model>.<index>.<metric>`, the value of
    each query the model was measured on, in their order, in `eval/<split>.per_query.npz`. Raises
    InputError if the split is not there, or a stage has not been run.
    """
    board, first = Scoreboard(run, store, split), indexes[0]
    rows_Q, asked = board.rows_Q, (run, store, split, board.rows_Q)
    by_bm25 = rankings.by_bm25(*asked)
    if by_bm25:
        parameters = bm25.described(run.config.evaluate.bm25)
        board.add(("bm25", "bm25", "bm25"), rows_Q, by_bm25, parameters=parameters)
    by_released = rankings.by_released(*asked)
    if by_released:
        board.add(("released", "retriever", "exact"), rows_Q, by_released)
    for state in states:
        if state == "retriever" and run.config.retriever.epochs == 0:
            continue
        retrieved = {}
        for index in indexes:
            how = {"state": state, "index_name": index}
            retrieved[index], recalls = rankings.retrieve_split(*asked, **how)
            # The re-ranker's warm-up leaves the retriever as it was.
            if state != "reranker":
                board.add((state, "retriever", index), rows_Q, retrieved[index], **recalls)
        if state in RERANKED:
            board.add_reranked(retrieved[first], state=state, index=first)
            if by_bm25:
                board.add_reranked(by_bm25, state=state, index="bm25")
    start = "zero_shot" if run.config.retriever.epochs == 0 else "retriever"
    pairs = [
        (("joint", "retriever", first), ("zero_shot", "retriever", first)),
        (("joint", "retriever", first), (start, "retriever", first)),
        (("joint", "reranker", first), ("reranker", "reranker", first)),
        (("joint", "reranker", first), ("joint", "retriever", first)),
    ]
    return board.write(split, pairs, first)


def evaluate_candidates(
    run: Run,
    store: tokens.Store,
    split: str,
    path: pathlib.Path,
    name: str,
    states: tuple[str, ...] = RERANKED,
) -> dict:
    """Evaluates re-ranking of candidates that another system found, the same for every state.

    Differences between states are then due to the re-ranker alone, while in `evaluate` they are also
    due to the retriever that finds its candidates. Writes the same files as `evaluate`, with `name`
    for the index and `<split>.<name>` for the split. Queries of the split that the run file at `path`
    does not name have no candidates and count 0.
    """
    board = Scoreboard(run, store, split)
    ranking, named = _read_candidates(board, path)
    asked = tuple(array[board.reranked_R] for array in ranking)
    given, joint = ("candidates", "given", name), ("joint", "reranker", name)
    board.add(given, board.rows_Q[board.reranked_R], asked, queries_named=named)
    for state in states:
        board.add_reranked(ranking, state=state, index=name)
    pairs = [(joint, ("reranker", "reranker", name)), (joint, given)]
    return board.write(f"{split}.{name}", pairs, name)


def _read_candidates(board: Scoreboard, path: pathlib.Path) -> tuple[Ranking, int]:
    """Reads candidates of re-ranked queries, none of the others; counts queries that have any."""
    listed, passage_rows = trec.read_run(path), rows_of(board.store.passage_ids)
    every_id = [board.queries.ids[row] for row in board.rows_Q]
    query_ids = [every_id[number] for number in board.reranked_R]
    listed = {query: listed[query] for query in query_ids if query in listed}
    if not listed:
        raise InputError(
            f"{path}: holds none of the {len(query_ids)} {board.split} queries of "
            f"{board.run.workdir} that are re-ranked; give a run of these"
        )
    for query, candidates in listed.items():
        for passage, _ in candidates:
            if passage not in passage_rows:
                raise InputError(
                    f"{path}: passage {passage!r} of query {query!r} is not in the collection; give "
                    "a run over its passages"
                )
    passages_QxK, scores_QxK = trec.run_arrays(listed, every_id, passage_rows)
    own_Q = own_texts.of_rows(board.queries, board.rows_Q)
    passages_QxK = np.where(passages_QxK == own_Q[:, None], -1, passages_QxK)
    return metrics.sort_run(passages_QxK, scores_QxK, board.store.passage_ids), len(listed)
